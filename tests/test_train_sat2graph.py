"""The experiment on road graphs: a whole run of either kind, what is refused before it, and a run that goes on."""
import json

import numpy as np
import pandas as pd
import pytest
import torch

from notebooks import play, quiet_place

from aerial_nb.data.raster import DataError, write_raster
from aerial_nb.roads.graph import RoadGraph
from aerial_nb.training.parameters import ParameterError
from aerial_nb.training.runs import RunFolder

SMALL = dict(width=1, size=64, steps=4, crops=4, valid_crops=2, checkpoint_s=0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(before)


def whole(folder, **params) -> tuple[dict, RunFolder]:
    with quiet_place(folder): space = play("train_sat2graph.ipynb", folder, "run.finish(", **SMALL | params)
    return space, RunFolder.open(space["run"].path)


def test_a_split_reads_its_test_tiles_once(tmp_path):
    space, run = whole(tmp_path, protocol="split", limit=3)
    assert run.status == "finished" and run.metrics["protocol"] == "split" and not run.metrics["is_result"]    # drawn towns
    (arm,) = run.arms.values()
    assert {"model.safetensors", "model.json", "history.csv", "search.csv", "scores.csv", "predictions"} <= {p.name for p in arm.path.iterdir()}
    (reading,) = json.loads((run.path / "test_read.json").read_text())["readings"]
    assert reading["rows"] == len(pd.read_csv(arm / "scores.csv")) and reading["purpose"] == "score" and not reading["again"]
    found = run.metrics["arms"]["sat2graph"]
    assert 0 <= found["topo_f1"] <= 1 and found["numbers"][0]["thr"] == found["thresholds"][0] and set(found["intervals"]) == {"topo_f1", "topo_precision", "topo_recall", "apls"}
    assert {p.stem for p in (run.path / "figures").glob("*.png")} >= {"encoded", "losses", "channels", "search_topo_f1", "roads"}
    assert space["task"].dls.train.dataset.augment is not None and len(arm.history) == 2
    kept = list((arm / "predictions").glob("*.npz"))
    assert len(kept) == reading["rows"] and isinstance(RoadGraph.load(kept[0]), RoadGraph)
    assert str(tmp_path) not in (arm / "model.json").read_text()


@pytest.mark.slow
def test_overfit_goes_on_where_it_was_killed(tmp_path):
    params = dict(limit=1, seeds=2, road=False, choose_by="topo")
    with quiet_place(tmp_path): play("train_sat2graph.ipynb", tmp_path, "plot_losses(history)", **SMALL | params)
    (first,) = (tmp_path / "runs/train_sat2graph").iterdir()
    before = RunFolder.open(first)
    assert before.status == "unfinished" and len(before.arms) == 2
    saved = {a: (f / "model.safetensors").stat().st_mtime_ns for a, f in before.arms.items()}
    _, run = whole(tmp_path, **params, resume=before.id)
    assert run.id == before.id and run.status == "finished" and not run.metrics["is_result"] and run.metrics["arms"]["sat2graph"]["seeds"] == 2
    assert {a: (f / "model.safetensors").stat().st_mtime_ns for a, f in run.arms.items()} == saved
    with pytest.raises(ValueError, match="is finished"), quiet_place(tmp_path): play("train_sat2graph.ipynb", tmp_path, "check_parameters(", **SMALL | params, resume=run.id)


def test_impossible_parameters_are_refused_together(tmp_path):
    with pytest.raises(ParameterError) as refused: play("train_sat2graph.ipynb", tmp_path, epochs=3, steps=0, protocol="fit", choose_by="iou", lr=-1.)
    for says in ("unknown parameter 'epochs'", "steps is 0", "protocol is 'fit'", "choose_by is 'iou'", "lr is -1"): assert says in str(refused.value), says
    for wrong, says in ((dict(loss_weights="1,-10,1000,0.1"), "weights of losses"), (dict(backbone="resnet35"), "resnet35"),
                        (dict(residual_steps=9), "multiple of 8")):
        with pytest.raises(ValueError, match=says): play("train_sat2graph.ipynb", tmp_path, **wrong)
    assert not (tmp_path / "runs").exists()


def test_data_that_cannot_be_used_is_named(tmp_path):
    def until_task(**params): return play("train_sat2graph.ipynb", tmp_path, "graph_task(", **SMALL | params)
    with pytest.raises(DataError, match="nowhere: no such folder"): until_task(data="nowhere")
    tiles = tmp_path / "tiles"
    for part in ("images", "masks"): (tiles / part).mkdir(parents=True)
    for i in range(3):
        mask = np.zeros((1, 128, 128), "uint8"); mask[:, 60:66] = i != 1
        write_raster(tiles / f"images/{i}.tif", np.random.default_rng(i).integers(1, 250, (3, 128, 128), dtype="uint8"))
        write_raster(tiles / f"masks/{i}.tif", mask[..., :100] if i == 2 else mask)
    with pytest.raises(DataError, match="pixel size is not known"): until_task(data=str(tiles))


@pytest.mark.slow
def test_an_encoder_of_ones_choice(tmp_path):
    _, run = whole(tmp_path, limit=1, backbone="resnet18", encoder_weights="")
    card = json.loads((run.arms["sat2graph_resnet18-seed0"].path / "model.json").read_text())
    assert card["builder"] == "sat2graph_smp" and card["arguments"]["encoder"] == "resnet18" and card["extra"]["graph"]["channels"] == 28
