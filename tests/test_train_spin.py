"""The main experiment through papermill and aerial_run: a whole run, bad input, a kill, a full disk."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from notebooks import play

from aerial_nb.data.raster import DataError, write_raster
from aerial_nb.training.parameters import ParameterError
from aerial_nb.training.runs import RunFolder

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "nbs/train_spin.ipynb"
SMALL = dict(width=16, size=64, limit=3, epochs=2, checkpoint_s=0)


def environment(folder: Path) -> dict:
    return os.environ | dict(AERIAL_RUNS=str(folder / "runs"), AERIAL_CACHE=str(folder / "cache"), OMP_NUM_THREADS="1")


def arguments(params: dict) -> list[str]:
    return [part for k, v in params.items() for part in ("-p", k, str(v))]


def papermill(folder: Path, **params) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(folder / "out.ipynb"), "--no-progress-bar", *arguments(SMALL | params)]
    return subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=400)


def only_run(folder: Path) -> RunFolder:
    (path,) = (folder / "runs/train_spin").iterdir()
    return RunFolder.open(path)


@pytest.fixture(scope="module")
def split_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    done = papermill(folder, protocol="split", crops=4, bs=2, models="hourglass,spin_pyramid", limit=5)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_run_leaves_what_the_contract_says(split_run):
    run = only_run(split_run)
    assert run.status == "finished" and run.metrics["protocol"] == "split" and run.metrics["is_result"]
    assert run.params["epochs"] == 2 and run.env["packages"]["torch"]
    assert {a for a in run.arms} == {"hourglass-seed0", "spin_pyramid-seed0"}
    for arm in run.arms.values():
        assert {"model.safetensors", "model.json", "history.csv", "scores.csv", "predictions"} <= {p.name for p in arm.path.iterdir()}
        assert len(arm.history) == 2 and arm.history.train_loss.notna().all()
    found = run.metrics["arms"]["hourglass"]
    assert 0 <= found["iou"] <= 1 and found["scenes"] >= 1 and 0 < found["thresholds"][0] < 1
    assert len(list((run.path / "figures").glob("*.png"))) >= 4 and (run.path / "history.csv").is_file()


def test_both_arms_saw_the_same_test_pixels(split_run):
    one, two = (pd.read_csv(a / "scores.csv") for a in only_run(split_run).arms.values())
    assert list(one.image) == list(two.image)
    assert ((one.tp + one.fn) == (two.tp + two.fn)).all() and (one[["tp", "fp", "fn", "tn"]].sum(1) == 512 * 512).all()


def test_the_executed_notebook_shows_figures_and_no_machine(split_run):
    notebook = json.loads((split_run / "out.ipynb").read_text())
    kinds = [k for c in notebook["cells"] for o in c.get("outputs", []) for k in o.get("data", {})]
    assert kinds.count("image/png") >= 6 and "text/markdown" in kinds


@pytest.mark.slow
def test_directions_are_learned_shown_and_recorded(tmp_path):
    done = papermill(tmp_path, orientation=True, orientation_weight=0.5, models="spin", epochs=1)
    assert done.returncode == 0, done.stderr[-3000:]
    run = only_run(tmp_path)
    assert (run.path / "figures/directions.png").is_file() and run.params["orientation"] is True
    found, loading = run.metrics["directions"]["spin"], run.metrics["loading"]
    assert 0 <= found["found"] <= 1 and 0 < loading["share"] < 1 and loading["share_of_step"] > 0
    card = json.loads((run.arms["spin-seed0"].path / "model.json").read_text())
    assert card["arguments"]["tasks"] == "road,orientation" and card["extra"]["recipe"]["orientation_weight"] == 0.5


def test_unknown_and_impossible_parameters_are_refused_together(tmp_path):
    with pytest.raises(ParameterError) as refused: play("train_spin.ipynb", tmp_path, epoch=200, epochs=-3, protocol="fit", models="hourglass,spinn")
    for says in ("unknown parameter 'epoch'; did you mean 'epochs'", "epochs is -3", "protocol is 'fit'", "did you mean spin"):
        assert says in str(refused.value), says
    assert not (tmp_path / "runs").exists()


def folder_of_tiles(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for part in ("images", "masks"): (folder / part).mkdir(parents=True)
    for name in ("good", "cut", "small", "blank"):
        image, mask = rng.integers(1, 250, (3, 160, 160), dtype="uint8"), np.zeros((1, 160, 160), "uint8")
        mask[:, 70:80] = 1
        if name == "small": mask = mask[:, :100]
        if name == "blank": image[:] = 0
        write_raster(folder / "images" / f"{name}.tif", image, nodata=0)
        write_raster(folder / "masks" / f"{name}.tif", mask)
    cut = folder / "images/cut.tif"
    cut.write_bytes(cut.read_bytes()[:40_000])
    return folder


def test_every_broken_file_is_named_before_training(tmp_path):
    done = papermill(tmp_path, data=str(folder_of_tiles(tmp_path / "tiles")), limit=0)
    assert done.returncode != 0
    for name in ("cut", "small", "blank"): assert name in done.stderr, name
    assert "DataError" in done.stderr and not list((tmp_path / "runs").rglob("history.csv"))


def test_a_missing_folder_and_one_without_roads(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"): play("train_spin.ipynb", tmp_path, "open_samples(", data="nowhere")
    fields = tmp_path / "fields"
    for part in ("images", "masks"): (fields / part).mkdir(parents=True)
    for i in range(3):
        write_raster(fields / f"images/{i}.tif", np.random.default_rng(i).integers(1, 250, (3, 160, 160), dtype="uint8"))
        write_raster(fields / f"masks/{i}.tif", np.zeros((1, 160, 160), "uint8"))
    with pytest.raises(DataError, match="(?s)positive.*ask for less"): play("train_spin.ipynb", tmp_path, "open_samples(", data=str(fields), size=64, limit=0)


def test_a_kill_in_mid_epoch_then_resume_gives_the_same_curve(tmp_path):
    slow = SMALL | dict(epochs=6, models="hourglass", protocol="split", crops=8, bs=2, limit=5)
    aerial_run = [str(Path(sys.executable).parent / "aerial_run"), str(NOTEBOOK)]
    first = subprocess.Popen([*aerial_run, *arguments(slow)], cwd=tmp_path, env=environment(tmp_path), start_new_session=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    history = lambda: list(tmp_path.glob("runs/train_spin/*/arms/*/history.csv"))
    for _ in range(1200):
        if history() and len(history()[0].read_text().splitlines()) > 3: break
        time.sleep(0.1)
    killed = only_run(tmp_path)
    kernel = json.loads((killed.path / ".lock").read_text())["pid"]
    os.killpg(first.pid, signal.SIGKILL); os.kill(kernel, signal.SIGKILL)
    first.wait()
    time.sleep(1)
    assert killed.status == "unfinished" and 2 <= len(pd.read_csv(history()[0])) < 6
    again = subprocess.run([*aerial_run, "-p", "resume", killed.id], cwd=tmp_path, env=environment(tmp_path), capture_output=True,
                           text=True, timeout=400)
    assert again.returncode == 0, again.stderr[-3000:] + again.stdout[-2000:]
    whole = tmp_path / "whole"; whole.mkdir()
    assert papermill(whole, **slow).returncode == 0
    columns = ["epoch", "train_loss", "valid_loss", "valid_iou", "lr"]
    resumed, at_once = (RunFolder.open(p).arms["hourglass-seed0"].history[columns] for p in (killed.path, only_run(whole).path))
    pd.testing.assert_frame_equal(resumed, at_once, rtol=1e-6)
    scores = [pd.read_csv(r.arms["hourglass-seed0"] / "scores.csv") for r in (killed, only_run(whole))]
    pd.testing.assert_frame_equal(*scores)


@pytest.mark.slow
def test_a_full_disk_ends_with_a_sentence(tmp_path):
    small = tmp_path / "small"; small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode: pytest.skip("needs the right to mount a small tmpfs")
    try:
        command = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(tmp_path / "out.ipynb"), "--no-progress-bar", *arguments(SMALL)]
        done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path) | dict(AERIAL_RUNS=str(small / "runs")), capture_output=True,
                              text=True, timeout=400)
        assert done.returncode != 0 and "no space left in" in done.stderr and "AERIAL_RUNS" in done.stderr
        (run,) = (small / "runs/train_spin").iterdir()
        assert RunFolder(run).status != "finished" and json.loads((run / "params.json").read_text())["epochs"] == 2
    finally: subprocess.run(["umount", str(small)], check=True)
