"""The experiment on buildings through papermill: a whole run on a drawn SpaceNet 7 tree, and what is refused."""
import json
import os
import subprocess
import sys
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from notebooks import play
from rasterio.transform import from_origin

from aerial_nb.data.raster import DataError, write_raster
from aerial_nb.scenes.finished import open_finished
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
    with pytest.raises(ParameterError, match="border_m is '1,wide': give widths in metres"): play("train_buildings.ipynb", tmp_path, border_m="1,wide")
    assert not (tmp_path / "runs").exists()


def rows_of_houses(folder: Path) -> Path:
    "Five images with polygons, a kilometre apart: houses of 8 x 12 m that share walls."
    for k in range(5):
        west = 5e5 + 1000 * k
        for part in ("images", "labels"): (folder / part).mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(k).integers(1, 255, (3, 64, 64), dtype="uint8")
        write_raster(folder / f"images/place{k}{chr(97 + k)}.tif", image, "EPSG:32633", from_origin(west, 5e6, 1, 1))
        houses = [shapely.box(west + 4 + 8 * i, 5e6 - 16 - 20 * r, west + 12 + 8 * i, 5e6 - 4 - 20 * r) for r in range(3) for i in range(5)]
        gpd.GeoDataFrame(geometry=houses, crs="EPSG:32633").to_crs("EPSG:4326").to_file(folder / f"labels/place{k}{chr(97 + k)}.geojson")
    return folder


def test_arms_with_a_border_learn_it_and_are_scored_on_whole_houses(tmp_path):
    made = play("train_buildings.ipynb", tmp_path, "with_border(", data=str(rows_of_houses(tmp_path / "data")), months=1, border_m="0,2", size=32, crops=4, nine="test")
    plain, walls = (made["tasks"][1, w] for w in (0, 2))
    assert plain is made["task"] and plain.classes == ("background", "building") and walls.classes == ("background", "building", "border")
    assert walls.arguments["classes"] == 3 and walls.recipe.class_weights == (.25, .75, .75) and walls.score_on is plain.score_on
    assert {2} == set(np.unique(walls.dls.train.dataset.store.mask(0))) - set(np.unique(plain.dls.train.dataset.store.mask(0)))
    with pytest.raises(DataError, match="no pixel of the training labels lies in a border of 0.001 m"):
        play("train_buildings.ipynb", tmp_path, "with_border(", data=str(tmp_path / "data"), months=1, border_m=.001, size=32, crops=4)


@pytest.mark.slow
def test_a_run_with_and_without_a_border(tmp_path):
    done = papermill(tmp_path, data=str(rows_of_houses(tmp_path / "data")), months=1, border_m="0,2", size=32, crops=4, epochs=1)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "runs/train_buildings").iterdir()
    run = RunFolder.open(path)
    arms = ["1 month, no border", "1 month, border 2 m"]
    assert list(run.metrics["arms"]) == arms and list(run.metrics["apart"]) == [f"{a}, {how}" for a in arms for how in ("patches", "apart")]
    cards = {name: json.loads((arm.path / "model.json").read_text())["classes"] for name, arm in run.arms.items()}
    assert cards == {"months1_x1-seed0": ["background", "building"], "months1_x1_border2-seed0": ["background", "building", "border"]}
    assert len({arm["buildings"]["iou_0.5"]["tp"] + arm["buildings"]["iou_0.5"]["fn"] for arm in run.metrics["arms"].values()}) == 1
    found = open_finished(run, "months1_x1_border2")     # labels and predictions of a border arm come together again
    assert len(found) and found.card.classes[-1] == "border"
