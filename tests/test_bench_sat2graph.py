"""The benchmark of the road graphs: what it refuses before anything is timed."""
import pytest
import torch

from notebooks import play, quiet_place

from aerial_nb.models.zoo import build
from aerial_nb.training.parameters import ParameterError
from aerial_nb.training.runs import RunFolder
from aerial_nb.training.saved import save_model


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads(); yield; torch.set_num_threads(before)


def asked(folder, **params) -> dict: return play("bench_sat2graph.ipynb", folder, **params)


def test_impossible_parameters_are_refused_together(tmp_path):
    with pytest.raises(ParameterError) as refused:
        asked(tmp_path, steps=0, rounds=0, part=-1, ways="fp32,fp8", amp="yes", widht=12, bs=2.5)
    for says in ("steps is 0", "rounds is 0", "part is -1", "ways is 'fp8'", "amp is 'yes'", "did you mean 'width'", "bs is 2.5"):
        assert says in str(refused.value), says
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("wrong, says", [
    (dict(crops="128,large"), "crops is '128,large', and must be whole numbers"),
    (dict(crops="32,128"), "crops is '32,128', and must be 64 pixels or more"),
    (dict(tiles="512,200"), "tiles is '512,200', and must be 256 pixels or more"),
    (dict(tiles=512), "tiles is 512, text is expected: give it with -r"),
    (dict(size=32), "size is 32, and must be 64 pixels or more"),
    (dict(ways="bf16,bf16"), "names 'bf16' twice"),
    (dict(ways="channels_last+bf16"), "ways is 'channels_last.bf16', and must be some of"),
])
def test_a_list_that_means_nothing_is_named(tmp_path, wrong, says):
    with pytest.raises(ParameterError, match=says): asked(tmp_path, **wrong)
    assert not (tmp_path / "runs").exists()


def test_a_model_of_masks_and_a_model_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"): asked(tmp_path, model=str(tmp_path / "nothing"))
    save_model(tmp_path / "mask", build("unet", width=1, depth=1), "unet", dict(width=1, depth=1), stats=((120.,) * 3, (50.,) * 3))
    with pytest.raises(ParameterError, match="a model of masks"): asked(tmp_path, model=str(tmp_path / "mask"))
    assert not (tmp_path / "runs").exists()


def test_what_others_are_compared_to_is_always_there(tmp_path):
    space = asked(tmp_path, ways="bf16+channels_last", tiles="300,256", threads=1)
    assert space["asked"] == ["fp32", "bf16+channels_last"] and space["tile_sides"] == [300, 256] and torch.get_num_threads() == 1
    assert space["params"]["tiles"] == "300,256" and space["run"].path.is_dir()


@pytest.mark.slow
def test_a_whole_run_with_a_model_compares_graphs(tmp_path):
    torch.manual_seed(0)
    network = build("sat2graph", width=1)
    save_model(tmp_path / "arm", network, "sat2graph", dict(width=1), stats=((127.5,) * 3, (255.,) * 3),
               extra=dict(graph=dict(thr=.3, edge_thr=.3, snap_px=15., angle_weight=100., channels=28)))
    small = dict(crops="64", n=2, width=1, size=64, bs=1, steps=1, ways="bf16", tiles="320", batch=4, part=1, rounds=1, threads=1, device="cpu")
    with quiet_place(tmp_path): space = play("bench_sat2graph.ipynb", tmp_path, "run.finish(", **small, model=str(tmp_path / "arm"))
    run = RunFolder.open(space["run"].path)
    rows, by = run.metrics["rows"], lambda part: [r for r in run.metrics["rows"] if r["part"] == part]
    assert run.status == "finished" and run.metrics["weights"] == "trained" and all(not isinstance(v, (dict, list)) for r in rows for v in r.values())
    assert {(r["way"], r["kind"]) for r in by("training")} == {(w, k) for w in ("fp32", "bf16") for k in ("step alone", "with loading")}
    ours, published = by("windows")
    assert (ours["windows"], published["windows"], published["timed"], published["reckoned"]) == (1, 4, 1, True)
    assert published["s"] == pytest.approx(4 / published["per_s"]) and ours["ratio"] == pytest.approx(published["s"] / ours["s"])
    (agreement,) = by("agreement")
    assert agreement["compared"] == 288 and 0 <= agreement["probability"] < .2 and " and " in agreement["edges"]
    cured, faulty = by("decoding")
    assert cured["topo_f1"] > faulty["topo_f1"] > 0 and min(r["ms"] for r in rows if "ms" in r) > 0
    assert {p.stem for p in (run.path / "figures").glob("*.png")} == {"agreement", "stages"}
