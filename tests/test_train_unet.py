"""The U-Net experiment through papermill and aerial_run: two recipes, two starts, and what is refused before training."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from notebooks import play

from aerial_nb.models.zoo import build
from aerial_nb.training.parameters import ParameterError
from aerial_nb.training.runs import RunFolder

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "nbs/train_unet.ipynb"
SMALL = dict(encoder="tu-test_efficientnet", weights="random", size=32, bs=4, epochs=1, limit=6, checkpoint_s=0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def call(program: list, folder: Path, cache: Path, **params) -> subprocess.CompletedProcess:
    env = os.environ | dict(AERIAL_RUNS=str(folder / "runs"), AERIAL_CACHE=str(cache), OMP_NUM_THREADS="1",
                            HF_HUB_CACHE=str(folder / "hub"), HF_HUB_OFFLINE="1")
    given = [part for k, v in (SMALL | params).items() for part in ("-p", k, str(v))]
    return subprocess.run([*program, *given], cwd=folder, env=env, capture_output=True, text=True, timeout=400)


def only_run(folder: Path) -> RunFolder:
    (path,) = (folder / "runs/train_unet").iterdir()
    return RunFolder.open(path)


def page(notebook: Path) -> str:
    cells = json.loads(notebook.read_text())["cells"]
    return "\n".join("".join(o["data"].get("text/markdown", "")) for c in cells for o in c.get("outputs", []) if "data" in o)


# ---- a whole run

@pytest.fixture(scope="module")
def run_of_four(tmp_path_factory, cache):
    "Two recipes that share nothing but their steps, from a file and from random weights."
    folder = tmp_path_factory.mktemp("four")
    torch.save(build("smp", encoder=SMALL["encoder"], weights="").encoder.state_dict(), folder / "found.pth")
    done = call([str(Path(sys.executable).parent / "aerial_run"), str(NOTEBOOK)], folder, cache, weights="mine=found.pth,auto",
                recipes="published,one_cycle,ours")
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    return folder


def test_a_run_leaves_what_the_contract_says(run_of_four):
    run = only_run(run_of_four)
    assert run.status == "finished" and run.metrics["protocol"] == "split" and not run.metrics["is_result"], "drawn scenes are no result"
    assert set(run.arms) == {f"{r}-{w}-seed0" for r in ("published", "ours") for w in ("mine", "random")}, "two steps share a training"
    for name, arm in run.arms.items():
        assert {"model.safetensors", "model.json", "history.csv", "scores.csv", "predictions"} <= {p.name for p in arm.path.iterdir()}
        card, published = json.loads((arm.path / "model.json").read_text()), name.startswith("published")
        assert (card["threshold"] == 0.5) == published and card["extra"]["squeeze"] == (32 if published else 0)
        assert card["extra"]["recipe"] | dict(schedule="flat" if published else "one_cycle", optimiser="adam", lr=3e-3, weight_decay=0,
                                              loss="bce_dice", best_by="loss") == card["extra"]["recipe"]
        assert arm.read_json("arm.json")["record"]["weights"] == ("found.pth" if "mine" in name else "")
    assert {"curves_ours.png", "steps.png", "gallery_ours_mine.png", "errors_published_random.png"} <= {p.name for p in (run.path / "figures").iterdir()}


def test_steps_and_starts_are_compared_on_the_same_pixels(run_of_four):
    run = only_run(run_of_four)
    tables = [pd.read_csv(a / "scores.csv") for a in run.arms.values()]
    for other in tables[1:]: assert ((tables[0].tp + tables[0].fn) == (other.tp + other.fn)).all() and list(tables[0].image) == list(other.image)
    metrics = run.metrics
    assert set(metrics["arms"]) == {f"{r}, {w}" for r in ("published", "one_cycle", "ours") for w in ("mine", "random")}
    for w in ("mine", "random"):
        changes, iou = metrics["changes"][w], lambda r, w=w: metrics["arms"][f"{r}, {w}"]["iou"]
        assert list(changes) == ["published to one_cycle", "one_cycle to ours", "published to ours"]
        assert changes["published to ours"]["iou"]["value"] == pytest.approx(iou("ours") - iou("published"))
        both = metrics["both_thresholds"][f"ours, {w}"]
        assert both["test IoU at 0.5"] == pytest.approx(iou("one_cycle")) and both["test IoU at the threshold"] == pytest.approx(iou("ours"))
        assert metrics["arms"][f"one_cycle, {w}"]["thresholds"] == [0.5] == metrics["arms"][f"published, {w}"]["thresholds"]
    assert list(metrics["changes"]["weights"]) == [f"{r}: random to mine" for r in ("published", "one_cycle", "ours")]
    readings = json.loads((run.path / "test_read.json").read_text())["readings"]
    assert len(readings) == 4 and not any(r["again"] for r in readings), "once per model"


def test_the_page_says_where_the_weights_are_from(run_of_four):
    run = only_run(run_of_four)
    said = page(run.path / "train_unet.ipynb")
    assert "from the file found.pth" in said and "no result about roads" in said
    assert "random weights, because ImageNet's could not be had" in said and "HF_HUB_CACHE" in said, "auto, and no hub"
    assert "could not be had" in run.metrics["weights"]["random"]
    assert "test IoU at 0.5" in said and "change (random)" in said


# ---- refused before training

def refused(folder: Path, kind: type, *says: str, until: str = "check_parameters(", **params) -> None:
    "Ends with these words, and has trained nothing."
    with pytest.raises(kind) as error: play("train_unet.ipynb", folder, until, **SMALL | params)
    for words in says: assert words in str(error.value), (words, error.value)
    assert not (folder / "runs").exists()


def test_unknown_and_impossible_values_are_refused_together(tmp_path):
    refused(tmp_path, ParameterError, "unknown parameter 'epoch'; did you mean 'epochs'", "epochs is 0", "did you mean published", "decoder_dropout is 1.5",
            "bs is -1", "lr is 'fast'", epoch=3, epochs=0, recipes="publishd,ours", decoder_dropout=1.5, bs=-1, lr="fast")


def test_a_missing_file_of_weights_is_named(tmp_path):
    refused(tmp_path, ValueError, "weights/none.pth", "there is no such file", "or a file", until="settle_starts(", weights="random,weights/none.pth")
