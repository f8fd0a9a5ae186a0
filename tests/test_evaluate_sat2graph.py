"""The experiment that judges a saved graph model: a whole run, what is refused before it, and a run that goes on."""
import pandas as pd
import pytest
import torch

from notebooks import play, quiet_place

from aerial_nb.data.graphtiles import graph_samples
from aerial_nb.data.raster import DataError
from aerial_nb.models.zoo import build
from aerial_nb.report.archive import read_archive
from aerial_nb.scenes import graphways
from aerial_nb.training.parameters import ParameterError
from aerial_nb.training.runs import RunFolder
from aerial_nb.training.saved import save_model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(before)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A graph model that was never trained, and a folder of towns."
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(1)
    numbers = dict(thr=.3, edge_thr=.3, snap_px=15., angle_weight=100.)
    save_model(folder / "model", build("sat2graph", width=1), "sat2graph", dict(width=1, bands=3), stats=((127.5,) * 3, (255.,) * 3), gsd_m=1., data="elsewhere",
               extra=dict(graph=numbers, arm="tiny"))
    samples = graph_samples("synthetic", dict(n=3, size=96, seed=3, gsd_m=1.), cache=folder)
    return dict(model=str(folder / "model"), data=str(folder / "drawn_graphs/96px_1m")), samples


def whole(folder, **params) -> tuple[dict, RunFolder]:
    with quiet_place(folder): space = play("evaluate_sat2graph.ipynb", folder, "run.finish(", **params)
    return space, RunFolder.open(space["run"].path)


def test_the_defaults_show_the_way_and_no_result(tmp_path, monkeypatch):
    from aerial_nb.scenes import graphjudge
    quick = lambda *a, real=graphjudge.smoke_graph_model, **k: real(*a, **k, steps=1)
    monkeypatch.setattr(graphjudge, "smoke_graph_model", quick)
    _, run = whole(tmp_path, limit=1, window=128)
    assert run.status == "finished" and not run.metrics["is_result"] and run.metrics["trained_on"] == "smoke scenes" and run.metrics["factors"] == [.5]
    assert {p.stem for p in (run.path / "figures").glob("*.png")} == {"tiles", "roads"} and len(pd.read_csv(run / "scores.csv")) == 1


def test_two_ways_beside_each_other_and_a_run_that_goes_on(tmp_path, home, monkeypatch):
    given, _ = home
    params = given | dict(data_gsd_m=1., windows="ours,published+decoder")
    real, asked = graphways.judge_tile, []
    def failing(judged, *rest):
        asked.append(judged.name)
        if len(asked) == 2: raise RuntimeError("the lights went out")
        return real(judged, *rest)
    monkeypatch.setattr(graphways, "judge_tile", failing)
    with pytest.raises(RuntimeError, match="lights"): whole(tmp_path, **params)
    (before,) = (tmp_path / "runs/evaluate_sat2graph").iterdir()
    assert RunFolder.open(before).status == "unfinished" and len(pd.read_csv(before / "scores.csv")) == 2
    space, run = whole(tmp_path, **params, resume=before.name)
    assert run.path.name == before.name and run.status == "finished" and len(asked) == 4 and asked[0] not in asked[1:]
    table = pd.read_csv(run / "scores.csv")
    assert len(table) == 6 and set(table.way) == {"ours", "published+decoder"}
    assert {p.stem for p in (run.path / "figures").glob("*.png")} == {"tiles", "roads", "ways"}
    assert run.metrics["is_result"] and set(run.metrics["differences"]) == {"ours minus published+decoder"} and space["result"].data == "96px_1m"
    (entry,) = read_archive(tmp_path / "runs", tmp_path / "results")
    assert list(entry.arms().arm) == ["tiny", "tiny, published windows and decoder"] and entry.arms().topo_f1.notna().all()
    with pytest.raises(ValueError, match="is finished"), quiet_place(tmp_path): play("evaluate_sat2graph.ipynb", tmp_path, **params, resume=run.id)


def test_what_cannot_be_asked_for_is_refused_before_a_run_begins(tmp_path, home):
    given, _ = home
    with pytest.raises(ParameterError) as refused: play("evaluate_sat2graph.ipynb", tmp_path, threshold=.5, split="tests", apls="x", worst=0, gsd_m=-1.)
    for says in ("unknown parameter 'threshold'", "split is 'tests'", "apls is 'x'", "worst is 0", "gsd_m is -1"): assert says in str(refused.value), says
    with pytest.raises(DataError, match="windows 'all' are unknown; use ours, published"): play("evaluate_sat2graph.ipynb", tmp_path, windows="all")
    with pytest.raises(FileNotFoundError, match="no model 'nowhere'"): play("evaluate_sat2graph.ipynb", tmp_path, model="nowhere")
    save_model(tmp_path / "masks", build("unet", width=4, depth=2), "unet", dict(width=4, depth=2), gsd_m=1.)
    with pytest.raises(DataError, match="is a mask model.*evaluate.ipynb"): play("evaluate_sat2graph.ipynb", tmp_path, model=str(tmp_path / "masks"))
    assert not (tmp_path / "runs").exists()
    with pytest.raises(DataError, match="none of the 3 images are in split valid"): play("evaluate_sat2graph.ipynb", tmp_path, "judge_graphs(judge", **given, data_gsd_m=1., split="valid")
    with pytest.raises(DataError, match="nowhere: no such folder"): play("evaluate_sat2graph.ipynb", tmp_path, "judge_graphs(judge", **given | dict(data="nowhere"))
