"""Buildings as objects, learning rates without a trace, parameters that are lists, tiles by loss."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerial_nb.data.raster import DataError
from aerial_nb.data.spacenet7 import bordered, first_months, open_buildings, three_parts
from aerial_nb.scenes.confusions import rank_tiles, show_tiles, tile_losses
from aerial_nb.scenes.separate import separate
from aerial_nb.training.arms import Arm, border_class, predict_to, read_bands, read_prediction, run_arm
from aerial_nb.training.buildings import (border_widths, choose_seeds, class_weights_of, covering_task, dice_of, find_rate, match_buildings, object_labels, size_intervals,
                                          true_objects, whole_numbers, with_border, with_training)
from aerial_nb.training.learner import Recipe
from aerial_nb.training.losses import build_loss
from aerial_nb.training.parameters import ParameterError
from aerial_nb.training.records import Folder

RECIPE = Recipe(2, loss="weighted_ce", class_weights=(.25, .75))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp("buildings")
    samples = three_parts(open_buildings("synthetic", synthetic=dict(scenes=5, size=48, named=2), cache=home), share=.4)
    tiling = dict(n_train=4, loading=dict(cache=home / "tiles", progress=False))
    return samples, covering_task(first_months(samples, 1), 32, 2, RECIPE, dict(width=8, classes=2), tiling), tiling


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_the_best_by_iou_is_the_best_by_dice(ious): assert np.argmax(ious) == np.argmax([dice_of(i) for i in ious])


def test_dice_is_the_pixel_f1():
    tp, fp, fn = 30, 10, 20
    assert dice_of(tp / (tp + fp + fn)) == pytest.approx(2 * tp / (2 * tp + fp + fn))


@pytest.mark.parametrize("text, says", [("0,1", "takes a class out"), ("0.25", "has 1 numbers"), ("1,2,3,4", "has 4 numbers"), ("1,2,0", "all must be above 0"), ("a,b", "two numbers"), ("nan,1", "above 0"), ("-1,2", "above 0")])
def test_impossible_class_weights_are_refused(text, says):
    with pytest.raises(ParameterError, match=says): class_weights_of(text)


def test_class_weights_can_balance():
    assert class_weights_of("0.25,0.75") == (.25, .75) and class_weights_of("1,2,3") == (1, 2, 3)
    assert class_weights_of("auto", pd.DataFrame(dict(counted=[10], positive=[2]))) == (.2, .8)
    with pytest.raises(DataError, match="nothing to learn"): class_weights_of("auto", pd.DataFrame(dict(counted=[10], positive=[0])))


@pytest.mark.parametrize("text", ["0", "1,1", "two", "4", "", "1.5", True])
def test_lists_of_whole_numbers(text):
    assert whole_numbers(3, "upsample", 3) == (3,) and whole_numbers("1, 2", "months") == (1, 2)
    with pytest.raises(ParameterError, match="upsample"): whole_numbers(text, "upsample", 3)


def test_a_search_for_a_rate_leaves_no_trace(made, tmp_path):
    _, task, _ = made
    torch.manual_seed(5); np.random.seed(5)
    before, plan = torch.rand(1), task.dls.train.dataset.plan.copy()
    torch.manual_seed(5); np.random.seed(5)
    found = find_rate(task, Arm("unet"), steps=20)
    assert torch.rand(1) == before and (task.dls.train.dataset.plan == plan).all()
    assert 1e-7 < found.suggested < 10 and len(found.curve) >= 10 and found.curve.lr.is_monotonic_increasing and found.show()
    runs = [run_arm(task, "unet", 0, Folder(tmp_path / f"arms/{k}"), quiet=True) for k in range(1)]
    assert np.isfinite(runs[0].folder.history.train_loss).all()
    with pytest.raises(ValueError, match="20 steps"): find_rate(task, "unet", steps=5)


def test_looking_for_a_rate_does_not_change_the_run(made, tmp_path):
    samples, task, tiling = made
    tables = []
    for looked in (False, True):
        fresh = covering_task(first_months(samples, 1), 32, 2, RECIPE, dict(width=8, classes=2), tiling)
        if looked: find_rate(fresh, "unet", steps=20)
        tables.append(run_arm(fresh, "unet", 3, Folder(tmp_path / f"{looked}/arms/unet"), quiet=True).folder.history[["train_loss", "valid_loss"]])
    pd.testing.assert_frame_equal(*tables)


def test_an_arm_with_more_months_differs_in_training_only(made):
    samples, _, tiling = made
    task = covering_task(first_months(samples, 1), 32, 2, RECIPE, dict(width=8, classes=2), tiling)
    both = with_training(task, samples, 2, tiling)
    assert len(both.dls.train.dataset.store) == 2 * len(task.dls.train.dataset.store) and len(both.dls.train) == len(task.dls.train)
    assert both.choose_on is task.choose_on and both.score_on is task.score_on and both.stats == both.dls.stats
    with pytest.raises(DataError, match="behind their door"): task.score_on[0]


def test_a_missing_part_and_one_class_are_refused(made):
    samples, _, tiling = made
    for part in ("train", "valid", "test"):
        with pytest.raises(DataError, match=f"no tiles in split {part}"): covering_task(samples[samples.split != part], 32, 2, RECIPE, {}, tiling)
    bare = samples.copy()
    field = Path(samples.label[0]).parent / "field"; field.mkdir(exist_ok=True)
    import rasterio
    for i in bare.index[bare.split == "valid"]:
        with rasterio.open(bare.label[i]) as file: profile, mask = file.profile, file.read(1) * 0
        with rasterio.open(field / Path(bare.label[i]).name, "w", **profile) as file: file.write(mask, 1)
        bare.loc[i, "label"] = str(field / Path(bare.label[i]).name)
    with pytest.raises(DataError, match="split valid"): covering_task(bare, 32, 2, RECIPE, {}, tiling)


@given(st.integers(0, 999), st.floats(.2, .7), st.floats(.1, 1.))
def test_seeds_cut_the_mask_and_never_change_it(seed, threshold, seeds):
    from scipy.ndimage import gaussian_filter
    probs = gaussian_filter(np.random.default_rng(seed).random((24, 24)), 1.2)
    probs = (probs - probs.min()) / np.ptp(probs)
    probs[:2] = np.nan
    parts, cut = object_labels(probs, threshold), object_labels(probs, threshold, seeds)
    assert ((cut > 0) == (np.nan_to_num(probs) >= threshold)).all() and cut.max() >= parts.max()
    assert len(np.unique(cut[cut > 0])) == cut.max(), "numbered without gaps"
    for k in range(1, cut.max() + 1): assert len(np.unique(parts[cut == k])) == 1, "a building lies in one patch"


def test_small_parts_can_be_dropped():
    probs = np.zeros((8, 8)); probs[1, 1] = probs[4:7, 4:7] = 1
    assert object_labels(probs, .5, min_px=2)[1, 1] == 0 and (object_labels(probs, .5, min_px=2) > 0).sum() == 9


def test_the_truth_found_exactly_is_found_exactly(made, tmp_path):
    samples, task, _ = made
    objects, folder = dict(zip(samples.image, samples.objects)), Folder(tmp_path / "arm")
    for j in task.choose_on:
        ids = true_objects(j, objects)
        sure = np.where(ids > 0, .9, .05)
        predict_to(folder, j, lambda pixels, valid, sure=sure: np.stack([sure] * len(pixels)), 48)
    found = match_buildings(folder, task.choose_on, objects, .5)
    assert found[.25].tp >= found[.5].tp > 0 and found[.5].unit == "m2"
    assert found[.5].fp == 0 or found[.5].fp < len(found[.5].truth), "touching buildings are one patch"
    scenes = {j.name: j.scene for j in task.choose_on}
    table = size_intervals(found[.5], scenes)
    assert table["all"].value == pytest.approx(found[.5].f1) and "at least 3" in table["all"].reason
    for name, row in found[.5].by_size().iterrows():
        if row.tp + row.fn: assert table[name].value == pytest.approx(row.f1)
        else: assert name not in table
    seeds, tried = choose_seeds(folder, task.choose_on, objects, .5)
    assert seeds == 0 and len(tried) == 5, "flat probabilities cannot be cut; the lowest of equals is none"


def test_parts_of_the_mask_are_the_truth_where_there_are_no_polygons(made):
    _, task, _ = made
    from scipy.ndimage import label
    j = task.choose_on[0]
    assert true_objects(j, {}).max() == label(np.asarray(j.target) == 1)[1]


@given(st.integers(0, 999), st.floats(.05, .95))
def test_the_loss_of_a_tile_is_that_of_the_training(seed, weight):
    rng = np.random.default_rng(seed)
    probs, target = rng.uniform(.05, .95, (16, 16)), rng.choice([0, 1, 255], (16, 16), p=[.6, .3, .1]).astype(np.uint8)
    row = tile_losses("a", probs, target, 16, (1 - weight, weight))
    logits = torch.tensor(np.log(probs / (1 - probs)))[None, None]
    assert row.loss[0] == pytest.approx(float(build_loss("weighted_ce", weights=(1 - weight, weight))(logits, torch.tensor(target)[None])), rel=1e-5)


def test_tiles_are_ranked_from_both_ends_and_blank_ones_left_out():
    probs, target = np.full((32, 64), .2), np.zeros((32, 64), np.uint8)
    target[:16, :16], probs[16:, 16:32], probs[:8, 40:], probs[20:, 50:] = 255, .9, np.nan, .999
    table = tile_losses("a", probs, target, 16)
    assert len(table) == 7 and not ((table.row == 0) & (table.col == 0)).any() and np.isfinite(table.loss).all()
    ranked = rank_tiles(table, 3)
    assert ranked.group.tolist() == ["highest"] * 2 + ["middle"] * 2 + ["lowest"] * 2 and ranked.loss.is_monotonic_decreasing
    assert not ranked.duplicated(["row", "col"]).any() and len(rank_tiles(table[:1])) == 1
    assert len(show_tiles(ranked, lambda n: (np.zeros((3, 32, 64), np.uint8), probs, target), 16).axes) == 24
    with pytest.raises(ValueError, match="no tile"): rank_tiles(table[:0])
    with pytest.raises(ValueError, match="differ in size"): tile_losses("a", probs[:5], target, 16)
    with pytest.raises(ValueError, match="class weights"): tile_losses("a", probs, target, 16, (0, 0))


# ---- a border between buildings

@pytest.mark.parametrize("text", ["-1", "1,1", "wide", "", "inf", "nan", True])
def test_widths_of_borders(text):
    assert border_widths(1.5) == (1.5,) and border_widths("0, 1.5") == (0, 1.5) and border_widths("0") == (0,)
    with pytest.raises(ParameterError, match="border_m"): border_widths(text)


@given(st.integers(0, 999), st.floats(.2, .8))
@settings(deadline=None)
def test_buildings_apart_at_a_border_are_the_polygons(seed, threshold):
    from scipy.ndimage import gaussian_filter
    building, border = (gaussian_filter(np.random.default_rng([seed, k]).random((24, 24)), 1.2).astype(np.float32) for k in (0, 1))
    building, border = (((p - p.min()) / np.ptp(p)) for p in (building, border))
    building[:2] = border[:2] = np.nan
    got, want = object_labels(building, threshold, border=border), separate(building, threshold, "border", border)
    assert ((got > 0) == (want > 0)).all() and len(np.unique(np.stack([got, want]).reshape(2, -1), axis=1).T) == len(np.unique(got)) == len(np.unique(want))
    either = np.nan_to_num(np.fmax(building, border)) >= np.float32(threshold)
    assert not (got > 0)[~either].any(), "what is scored holds every building"
    assert (got > 0)[np.nan_to_num(building) >= np.float32(threshold)].all() and (object_labels(building, threshold, .9, border=border) == got).all()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    "Three rows of five houses that share walls, as images with polygons: every house 12 x 8 m in pixels of a metre, and a task with a border."
    import geopandas as gpd
    import shapely
    from rasterio.transform import from_origin

    from aerial_nb.data.raster import write_raster
    home = tmp_path_factory.mktemp("rows")
    (home / "images").mkdir(); (home / "labels").mkdir()
    for k in range(5):
        boxes = [shapely.box(4 + 8 * i, 4 + 20 * r, 12 + 8 * i, 16 + 20 * r) for r in range(3) for i in range(5)]
        image = np.full((3, 64, 64), 60 + k, np.uint8)
        for r in range(3):
            for i in range(5): image[:, 4 + 20 * r:16 + 20 * r, 4 + 8 * i:12 + 8 * i] = 150
            for i in range(1, 5): image[:, 4 + 20 * r:16 + 20 * r, 3 + 8 * i:5 + 8 * i] = 230
        write_raster(home / f"images/row{k}{chr(97 + k)}.tif", image, "EPSG:32633", from_origin(5e5 + 1000 * k, 5e6, 1, 1))
        shapes = [shapely.transform(b, lambda xy, west=5e5 + 1000 * k: np.stack([west + xy[:, 0], 5e6 - xy[:, 1]], 1)) for b in boxes]
        gpd.GeoDataFrame(geometry=shapes, crs="EPSG:32633").to_crs("EPSG:4326").to_file(home / f"labels/row{k}{chr(97 + k)}.geojson")
    samples = open_buildings(home, cache=home / "cache").assign(split=["train", "train", "valid", "test", "test"])
    tiling = dict(n_train=8, preset=None, loading=dict(cache=home / "tiles", progress=False))
    recipe = Recipe(12, lr=2e-2, loss="weighted_ce", class_weights=(.3, .7), amp="no", valid_every=4)
    task = covering_task(samples, 32, 4, recipe, dict(width=8, depth=2, classes=2), tiling)
    return samples, task, with_border(task, bordered(samples, 2.), 4, tiling)


def test_a_task_with_a_border_is_scored_on_the_same_ground(rows):
    _, task, walls = rows
    assert walls.classes == ("background", "building", "border") and border_class(walls.classes) == 2 and border_class(task.classes) == 0
    assert walls.arguments["classes"] == 3 and walls.recipe.class_weights == (.3, .7, .7) and task.recipe.class_weights == (.3, .7)
    assert walls.choose_on is task.choose_on and walls.score_on is task.score_on and walls.split_hash == task.split_hash
    values = [set(np.unique(t.dls.train.dataset.store.mask(0))) for t in (task, walls)]
    assert values == [{0, 1}, {0, 1, 2}] and all((np.asarray(j.target) < 2).all() for j in walls.choose_on)


def test_houses_of_a_row_are_counted_with_a_border_and_not_without(rows, tmp_path, monkeypatch):
    import geopandas as gpd

    from aerial_nb.scenes import rasters, vectorize
    from aerial_nb.training.saved import load_card
    samples, task, walls = rows
    objects = dict(zip(samples.image, samples.objects))
    plain, apart = (run_arm(t, Arm(name, "unet"), 0, Folder(tmp_path / f"arms/{name}"), quiet=True) for name, t in (("plain", task), ("apart", walls)))
    seeds = {r.name: choose_seeds(r.folder, task.choose_on, objects, r.threshold) for r in (plain, apart)}
    assert len(seeds["plain"][1]) == 5 and len(seeds["apart"][1]) == 1 and seeds["apart"][0] == 0
    found = {r.name: match_buildings(r.folder, task.score_on, objects, r.threshold, seeds[r.name][0])[.5] for r in (plain, apart)}
    whole = match_buildings(apart.folder, task.score_on, objects, apart.threshold, split=False)[.5]
    assert found["apart"].f1 > .9 and found["plain"].f1 < .5 and whole.f1 < .5 and len(whole.truth) == 30
    counts = [r.counts[["tp", "fn"]].sum().sum() for r in (plain, apart)]
    assert counts[0] == counts[1] == 2 * 15 * 96, "both are scored on whole houses"
    assert min(r.counts.tp.sum() / counts[0] for r in (plain, apart)) > .8, "the border is not taken from the houses"
    judged = task.score_on[0]
    bands = read_bands(apart.folder, judged)
    assert bands.shape == (2, 64, 64) and (read_prediction(apart.folder, judged) == bands.max(0)).all() and len(read_bands(plain.folder, judged)) == 1
    assert load_card(apart.folder.path).classes == ("background", "building", "border")
    # the two commands on a whole image: the border of the map is found by itself
    with pytest.raises(SystemExit) as end: rasters.aerial_predict(judged.source, str(apart.folder.path), str(tmp_path / "map.tif"), size=64, device="cpu")
    assert end.value.code == 0
    vectorize.aerial_vectorize(str(tmp_path / "map.tif"), str(tmp_path / "houses.gpkg"))
    houses = gpd.read_file(tmp_path / "houses.gpkg")
    assert 13 <= ((60 < houses.area_m2) & (houses.area_m2 < 140)).sum() <= 15, "each with its part of the border"
