"""The study of few labels through papermill: a whole run, and parameters that are refused."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from notebooks import play

from aerial_nb.training.launch import plan_run
from aerial_nb.training.parameters import ParameterError
from aerial_nb.training.runs import RunFolder

ROOT = Path(__file__).parents[1]
SMALL = dict(limit=9, size=48, epochs=2, draws=4, budget="2,4", attempt="1,4", augment="LIGHT")


def papermill(folder: Path, **params) -> subprocess.CompletedProcess:
    arguments = [part for k, v in (SMALL | params).items() for part in ("-p", k, str(v))]
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs/train_roofs.ipynb"), str(folder / "out.ipynb"), "--no-progress-bar", *arguments]
    places = dict(AERIAL_RUNS=str(folder / "runs"), AERIAL_CACHE=str(folder / "cache"), OMP_NUM_THREADS="1")
    return subprocess.run(command, cwd=folder, env=os.environ | places, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roofs")
    done = papermill(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (folder / "runs/train_roofs").iterdir()
    return folder, RunFolder.open(path)


def test_a_run_leaves_every_arm_its_tiles_and_one_reading_each(finished):
    _, run = finished
    arms = {f"attempt{n}-{b}tiles-seed42" for n in (1, 4) for b in (2, 4)}
    assert run.status == "finished" and set(run.arms) == arms and run.metrics["budgets"] == [2, 4]
    tiles = run.read_json("tiles.json")
    for n in (1, 4): assert set(tiles[f"attempt{n}-2tiles-seed42"]) < set(tiles[f"attempt{n}-4tiles-seed42"])
    readings = run.read_json("test_read.json")["readings"]
    assert {r["reader"] for r in readings} == arms and len(readings) == run.metrics["readings"] == 4
    assert not run.metrics["is_result"]
    for arm in run.arms.values():
        assert {"epoch", "train_loss", "valid_iou", "item_f1", "worst", "step_ms", "memory_mb"} <= set(arm.history.columns)
        assert {"model.safetensors", "scores.csv", "predictions"} <= {p.name for p in arm.path.iterdir()}


def test_the_leaderboard_tells_validation_from_test_and_who_is_alike(finished):
    _, run = finished
    board = pd.DataFrame(run.metrics["leaderboard"])
    assert set(board.attempt) == {1, 4} and all({"value", "low", "high", "scenes"} <= set(i) for i in [*board.valid_iou, *board.test_iou])
    assert board.weights.tolist() == ["random"] * 4 and all("(tiny)" in m for m in board.model)
    assert len(run.metrics["pairs"]) == 4 and len(run.metrics["verdicts"]) >= 5


def test_figures_are_there_and_name_no_machine(finished):
    folder, run = finished
    assert {p.stem for p in (run.path / "figures").glob("*.png")} == {"contact_sheet", "curves", "overlays_attempt1", "overlays_attempt4", "budget_curve", "predictions"}
    kinds = [k for c in json.loads((folder / "out.ipynb").read_text())["cells"] for o in c.get("outputs", []) for k in o.get("data", {})]
    assert kinds.count("image/png") >= 7 and "text/markdown" in kinds


def test_what_is_impossible_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ParameterError) as refused: play("train_roofs.ipynb", tmp_path, epoch=9, size=0, whole="pad", ema=1.5)
    for says in ("unknown parameter 'epoch'; did you mean 'epochs'", "size is 0", "whole is 'pad'", "ema is 1.5"): assert says in str(refused.value), says
    assert not (tmp_path / "runs").exists()


def test_one_number_is_a_list_of_one_on_the_command_line(tmp_path):
    run, given = plan_run(ROOT / "nbs/train_roofs.ipynb", dict(attempt=2, budget=5, size=64), tmp_path)
    run.release()
    assert given == dict(attempt="2", budget="5", size=64) and run.params["budget"] == "5"
