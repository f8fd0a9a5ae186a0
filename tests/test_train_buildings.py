"""The experiment on buildings through papermill: a whole run on a drawn SpaceNet 7 tree, and what is refused."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from notebooks import play

from aerial_nb.training.parameters import ParameterError
from aerial_nb.training.runs import RunFolder

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "nbs/train_buildings.ipynb"


def papermill(folder: Path, **params) -> subprocess.CompletedProcess:
    environment = os.environ | dict(AERIAL_RUNS=str(folder / "runs"), AERIAL_CACHE=str(folder / "cache"), OMP_NUM_THREADS="1")
    given = [part for k, v in params.items() for part in ("-r" if isinstance(v, str) else "-p", k, str(v))]
    command = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(folder / "out.ipynb"), "--no-progress-bar", *given]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("buildings")
    done = papermill(folder, epochs=2, crops=4, size=32, freeze_epochs=1, encoder_lr=0.1)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (folder / "runs/train_buildings").iterdir()
    return folder, RunFolder.open(path)


def test_a_run_leaves_scores_of_pixels_and_of_buildings(finished):
    _, run = finished
    assert run.status == "finished" and not run.metrics["is_result"] and set(run.metrics["arms"]) == {"1 month", "2 months"}
    for arm in run.metrics["arms"].values():
        half, quarter = (arm["buildings"][k] for k in ("iou_0.5", "iou_0.25"))
        assert quarter["tp"] >= half["tp"] and half["unit"] == "m2" and "all" in half["by_size"]
        assert 0 <= arm["f1"] <= 1 and arm["intervals"]["f1"]["scenes"] == 3
        assert arm["f1"] == pytest.approx(2 * arm["iou"] / (1 + arm["iou"])), "F1 over pixels is the Dice"


def test_the_best_epoch_by_iou_is_the_best_by_dice(finished):
    for arm in finished[1].arms.values():
        history = arm.history.dropna(subset="valid_iou")
        assert history.valid_iou.idxmax() == history.valid_f1.idxmax()
        record = json.loads((arm.path / "arm.json").read_text())["record"]
        assert json.loads((arm.path / "model.json").read_text())["extra"]["recipe"]["freeze_epochs"] == 1
        assert history.epoch[history.valid_iou.idxmax()] == record["best_epoch"]


def test_both_arms_were_scored_on_the_same_test_scenes(finished):
    one, two = (pd.read_csv(a.path / "scores.csv") for a in finished[1].arms.values())
    assert list(one.image) == list(two.image) and ((one.tp + one.fn) == (two.tp + two.fn)).all()


def test_figures_are_there(finished):
    folder, run = finished
    names = {p.stem for p in (run.path / "figures").glob("*.png")}
    assert {"class_shares", "curves", "buildings", "errors", "losses_months1_x1", "gallery_months2_x1"} <= names
    assert "image/png" in (folder / "out.ipynb").read_text()


def test_impossible_parameters_are_refused_before_any_data(tmp_path):
    with pytest.raises(ParameterError) as refused: play("train_buildings.ipynb", tmp_path, epoch=3, share=2.0, nine="train", loss="dice")
    for says in ("did you mean 'epochs'", "share is 2.0", "nine is 'train'", "loss is 'dice'"): assert says in str(refused.value), says
    with pytest.raises(ValueError, match="takes a class out"): play("train_buildings.ipynb", tmp_path, class_weights="0,1")
    assert not (tmp_path / "runs").exists()
