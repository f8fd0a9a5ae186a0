"""Behaviour of aerial_nb.data.tiles: what a store holds, and where crops may lie."""
import math
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aerial_nb.data.augment import d4, inverse
from aerial_nb.data.masks import read_class_map
from aerial_nb.data.raster import DataError, read_pixels, write_raster
from aerial_nb.data.tiles import (
    CROP, CropRule, TileStore, centre_crops, crop_name, draw_crops, fixed_crops, grid_crops, place, read_crop, row_table, window_sums)

REAL = Path(__file__).parents[1] / "../shared/data"
quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def write_tile(folder, name, image, mask, valid=None):
    row = {"image": write_raster(folder / f"{name}.tif", image), "label": write_raster(folder / f"{name}_m.png", mask)}
    if valid is not None:
        row["valid"] = write_raster(folder / f"{name}_v.png", valid.astype("uint8"))
    return row


def random_tile(folder, name, shape, seed=0, valid=None, share=0.2):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 250, (3, *shape), dtype="uint8")
    return write_tile(folder, name, image, (rng.random(shape) < share).astype("uint8"), valid)


def open_store(rows, folder, **options):
    return TileStore(pd.DataFrame(rows), cache=folder / "cache", progress=False, **options)


@pytest.fixture(scope="module")
def coast(tmp_path_factory):
    "One whole tile, one with a blank left part, one all blank."
    folder = tmp_path_factory.mktemp("coast")
    right = np.zeros((60, 70), bool)
    right[:, 40:] = True
    rows = [random_tile(folder, "inland", (60, 70), 1), random_tile(folder, "shore", (60, 70), 2, right),
            random_tile(folder, "sea", (60, 70), 3, np.zeros((60, 70), bool))]
    return open_store([row | {"valid": row.get("valid", "")} for row in rows], folder)


# ---- what the store holds

@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("bands", [1, 3, 16])
def test_pixels_as_in_the_file(tmp_path, dtype, bands):
    image = np.random.default_rng(0).integers(0, 200, (bands, 21, 34)).astype(dtype)
    image[:, :4] = 255
    row = write_tile(tmp_path, "a", image, np.eye(21, 34, dtype="uint8") * 255)
    store = open_store([row], tmp_path, fill=255)
    assert (store.bands, store.dtype, store.shape(0), len(store)) == (bands, dtype, (21, 34), 1)
    pixels = read_pixels(row["image"], fill=255)
    np.testing.assert_array_equal(store.image(0), image)
    np.testing.assert_array_equal(store.valid(0), pixels.valid)
    np.testing.assert_array_equal(store.mask(0), read_class_map(row["label"], pixels.valid))
    assert (store.mask(0)[:4] == 255).all() and store.mask(0).dtype == np.uint8


def test_fill_of_the_table_and_of_the_argument(tmp_path):
    image = np.full((3, 8, 8), 100, "uint8")
    image[:, 0], image[:, 1] = 255, 0
    row = write_tile(tmp_path, "a", image, np.zeros((8, 8), "uint8"))
    table = [row | {"fill": (255, 255, 255)}, row | {"fill": None}]
    assert [open_store(table, tmp_path).valid(i)[:].sum() for i in (0, 1)] == [56, 64]
    assert not open_store(table, tmp_path, fill=0).valid(1)[1].any()


def test_label_arguments_reach_the_reader(tmp_path):
    row = write_tile(tmp_path, "a", np.zeros((1, 4, 4), "uint8"), np.full((4, 4), 7, "uint8"))
    with pytest.raises(DataError, match="positive="):
        open_store([row], tmp_path)
    assert (open_store([row], tmp_path, labels={"positive": 7}).mask(0)[:] == 1).all()


def test_unlabelled_only_when_asked(tmp_path):
    row = random_tile(tmp_path, "bare", (9, 9)) | {"label": ""}
    with pytest.raises(DataError, match="1 of 1 samples have no label.*bare.*unlabelled=True"):
        open_store([row], tmp_path)
    store = open_store([row], tmp_path, unlabelled=True)
    assert (store.mask(0)[:] == 255).all() and store.valid(0)[:].all()
    assert len(draw_crops(store, 3, 5, 0)) == 3 and len(grid_crops(store, 5)) == 4


def test_kinds_are_not_mixed(tmp_path):
    rows = [write_tile(tmp_path, str(bands), np.zeros((bands, 4, 4), "uint8"), np.zeros((4, 4), "uint8")) for bands in (1, 3)]
    with pytest.raises(DataError, match="1 bands of uint8 in 1; 3 bands of uint8 in 3"):
        open_store(rows, tmp_path)
    with pytest.raises(DataError, match="empty"):
        open_store([], tmp_path)


def _sum_in_child(store, queue):
    queue.put(int(store.image(0)[:].sum()))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_goes_to_other_processes(coast, method):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_sum_in_child, args=(coast, queue))
    child.start()
    assert queue.get(timeout=60) == int(coast.image(0)[:].sum())
    child.join()
    assert len(pickle.dumps(coast)) < 50_000


def test_shows_what_it_holds_and_no_paths(coast):
    assert "3 tiles" in repr(coast) and "MB on disk" in repr(coast)
    table = coast.table()
    assert table["valid"].tolist() == [1.0, 30 / 70, 0.0]
    assert str(coast.cache) not in coast._repr_html_() + repr(coast)
    assert coast.nbytes == sum(f.stat().st_size for f in coast.cache.glob("*.npy"))


# ---- where a crop may lie

@quick
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 9), st.integers(0, 99))
def test_window_sums_as_counted_plainly(rows, cols, size, seed):
    plane = np.random.default_rng(seed).random((rows, cols)) < 0.5
    sums = window_sums(plane, size)
    assert sums.shape == (max(rows - size, 0) + 1, max(cols - size, 0) + 1)
    for r, c in np.ndindex(sums.shape):
        assert sums[r, c] == plane[r:r + size, c:c + size].sum()


def plain_places(store, i, rule):
    mask, (rows, cols) = store.mask(i), store.shape(i)
    area = min(rule.size, rows) * min(rule.size, cols)
    for r, c in np.ndindex(max(rows - rule.size, 0) + 1, max(cols - rule.size, 0) + 1):
        part = mask[r:r + rule.size, c:c + rule.size]
        enough = (part != 255).sum() >= max(1, math.ceil(rule.min_valid * area - 1e-9))
        if enough and (part == 1).sum() >= math.ceil(rule.min_positive * area - 1e-9):
            yield r, c


@quick
@given(st.integers(1, 80), st.sampled_from([0, 0.3, 0.5, 0.9, 1]), st.sampled_from([0, 0.05, 0.2]))
def test_places_as_counted_plainly(coast, size, min_valid, min_positive):
    rule = CropRule(size, min_valid, min_positive)
    for i in range(3):
        plain = list(plain_places(coast, i, rule))
        assert row_table(coast, i, rule)[-1] == len(plain)
        for rank in {0, len(plain) // 3, len(plain) - 1} if plain else ():
            assert place(coast, i, rule, rank) == plain[rank]


def test_tall_tiles_are_counted_in_parts(tmp_path):
    valid = np.random.default_rng(0).random((1300, 9)) < 0.5
    store = open_store([random_tile(tmp_path, "tall", (1300, 9), valid=valid)], tmp_path)
    rule = CropRule(3, 0.8)
    assert row_table(store, 0, rule)[-1] == sum(1 for _ in plain_places(store, 0, rule))


@pytest.mark.parametrize("arguments", [(0,), (-3,), (2.5,), ("8",), (8, 1.5), (8, -0.1), (8, 0.5, 2)])
def test_impossible_rules_are_refused(arguments):
    with pytest.raises(ValueError, match=r"must be a whole number|must lie in 0\.\.1"):
        CropRule(*arguments)


# ---- drawn plans

def test_the_same_for_the_same_arguments_whatever_else_is_drawn(coast):
    plan = draw_crops(coast, 50, 16, seed=3, epoch=2)
    np.random.seed(9)
    np.random.random(7)
    fresh = TileStore(pd.DataFrame({"image": [s.image for s in coast.sources], "label": [s.label for s in coast.sources],
                                    "valid": [s.valid for s in coast.sources]}), cache=coast.cache, progress=False)
    np.testing.assert_array_equal(draw_crops(fresh, 50, 16, seed=3, epoch=2), plan)
    np.testing.assert_array_equal(draw_crops(fresh, 20, 16, seed=3, epoch=2), plan[:20])
    for other in ({"seed": 4, "epoch": 2}, {"seed": 3, "epoch": 1}, {"seed": 2, "epoch": 3}):
        assert not np.array_equal(draw_crops(coast, 50, 16, **other), plan)
    assert plan.dtype == CROP


def test_the_same_on_every_machine(tmp_path):
    "Written down once: a change of these numbers changes every training."
    store = open_store([random_tile(tmp_path, "a", (40, 50)), random_tile(tmp_path, "b", (30, 20), 1)], tmp_path)
    plan = draw_crops(store, 4, 8, seed=7, epoch=1)
    assert plan.tolist() == [(0, 5, 11, 6), (1, 7, 0, 3), (0, 1, 7, 2), (1, 7, 11, 6)]


def test_every_offset_is_reached_the_last_one_too(tmp_path):
    store = open_store([random_tile(tmp_path, "a", (10, 11))], tmp_path)
    plan = draw_crops(store, 2000, 8, seed=0)
    assert set(plan["row"]) == {0, 1, 2} and set(plan["col"]) == {0, 1, 2, 3}
    assert set(plan["d4"]) == set(range(8))
    assert np.unique(plan[["row", "col"]], return_counts=True)[1].min() > 2000 / 12 * 0.7
    assert set(draw_crops(store, 50, 8, seed=0, d4=False)["d4"]) == {0}


def test_a_tile_of_the_size_of_the_crop(tmp_path):
    store = open_store([random_tile(tmp_path, "a", (16, 16))], tmp_path)
    for crop in draw_crops(store, 20, 16, seed=0):
        assert (crop["row"], crop["col"]) == (0, 0)
        np.testing.assert_array_equal(read_crop(store, crop, 16)[0], d4(store.image(0), int(crop["d4"])))


def test_a_smaller_tile_is_padded_and_named(tmp_path, caplog):
    store = open_store([random_tile(tmp_path, "small", (10, 20))], tmp_path)
    plan = draw_crops(store, 30, 16, seed=1, min_valid=1)
    assert "smaller than the crop and padded" in caplog.text and "small" in caplog.text
    for crop in plan:
        image, mask, valid = read_crop(store, crop, 16)
        assert valid.sum() == 160 and (mask[~valid] == 255).all() and (image[:, ~valid] == 0).all()
        upright = d4(image, inverse(int(crop["d4"])))
        np.testing.assert_array_equal(upright[:, :10], store.image(0)[:, :, crop["col"]:crop["col"] + 16])


def test_enough_valid_pixels_in_every_crop(coast):
    plan = draw_crops(coast, 200, 24, seed=0, min_valid=0.7)
    shares = [(read_crop(coast, crop, 24)[1] != 255).mean() for crop in plan]
    assert min(shares) >= 0.7 and set(plan["tile"]) == {0, 1}
    assert any(share < 1 for share in shares)


def test_all_blank_is_an_error_that_says_so(coast, tmp_path):
    store = open_store([random_tile(tmp_path, "sea", (30, 30), valid=np.zeros((30, 30), bool))], tmp_path)
    for call in (lambda: draw_crops(store, 4, 8, 0), lambda: grid_crops(store, 8), lambda: fixed_crops(store, 1, 8)):
        with pytest.raises(DataError, match="none of the 1 tiles.*sea: all blank"):
            call()
    with pytest.raises(DataError, match="ask for less"):
        draw_crops(coast, 4, 40, 0, min_valid=1, balance=(1, 0.9))


def test_tiles_weigh_as_much_as_their_valid_places(coast):
    plan = draw_crops(coast, 4000, 16, seed=0)
    counts = np.array([row_table(coast, i, CropRule(16))[-1] for i in range(3)])
    np.testing.assert_allclose(np.bincount(plan["tile"], minlength=3) / 4000, counts / counts.sum(), atol=0.03)


def test_a_small_tile_is_not_forgotten(tmp_path):
    store = open_store([random_tile(tmp_path, "large", (120, 120)), random_tile(tmp_path, "exact", (40, 40))], tmp_path)
    share = (draw_crops(store, 3000, 40, seed=0)["tile"] == 1).mean()
    assert abs(share - 1600 / 16000) < 0.02  # by places it would be 1 of 6562


def test_balance(tmp_path):
    "Roads in one corner only: half the crops asked to hold some, do."
    mask = np.zeros((100, 100), "uint8")
    mask[:12, :12] = 1
    store = open_store([write_tile(tmp_path, "a", np.zeros((3, 100, 100), "uint8"), mask)], tmp_path)
    shares = lambda balance: [(read_crop(store, crop, 16)[1] == 1).mean() for crop in draw_crops(store, 400, 16, 0, balance=balance)]
    assert np.mean(np.array(shares(None)) >= 0.1) < 0.05
    assert 0.45 < np.mean(np.array(shares((0.5, 0.1))) >= 0.1) < 0.6
    assert min(shares((1, 0.1))) >= 0.1


@pytest.mark.parametrize("wrong", [{"n": 0}, {"seed": -1}, {"epoch": -2}, {"size": 0}])
def test_impossible_draws_are_refused(coast, wrong):
    with pytest.raises(ValueError, match="need n >= 1|size must be"):
        draw_crops(coast, **({"n": 3, "size": 8, "seed": 0} | wrong))


# ---- reading

def test_image_mask_and_valid_move_together(tmp_path):
    y, x = np.mgrid[:30, :40]
    code = (y * 7 + x * 3) % 251
    valid = (y + x) % 5 > 0
    store = open_store([write_tile(tmp_path, "a", np.stack([code] * 3).astype("uint8"), (code % 2).astype("uint8"), valid)], tmp_path)
    for k in range(8):
        image, mask, real = read_crop(store, np.array((0, 4, 6, k), CROP), 12)
        np.testing.assert_array_equal(image[0], d4(code[4:16, 6:18], k))
        np.testing.assert_array_equal(real, d4(valid[4:16, 6:18], k))
        np.testing.assert_array_equal(mask, np.where(real, image[0] % 2, 255))
        assert image.flags.c_contiguous and mask.flags.c_contiguous


def test_a_crop_has_a_name(coast):
    assert crop_name(coast, np.array((1, 5, 9, 3), CROP), 16) == "tile shore, rows 5..21, columns 9..25"


# ---- plans that stay

@quick
@given(st.integers(1, 75))
def test_the_grid_counts_each_pixel_once(coast, size):
    plan = grid_crops(coast, size)
    counted = sum(int((read_crop(coast, crop, size)[1] != 255).sum()) for crop in plan)
    assert counted == sum(r["counted_px"] for r in coast.records)
    assert 2 not in plan["tile"] and not plan["d4"].any()


def test_fixed_crops_are_worth_learning(tmp_path):
    half = np.ones((64, 64), bool)
    half[:, :40] = False
    rows = [random_tile(tmp_path, f"t{i}", (64, 64), i) | {"valid": ""} for i in range(4)]
    rows += [random_tile(tmp_path, "half", (64, 64), 7, half), random_tile(tmp_path, "bare", (64, 64), 8, share=0) | {"valid": ""}]
    store = open_store(rows, tmp_path)
    plan = fixed_crops(store, 5, 32, seed=1)
    assert sorted(plan["tile"]) == [0, 1, 2, 3, 4] and plan["tile"][-1] == 4  # wholly valid tiles come first
    whole = [(read_crop(store, crop, 32)[1] != 255).all() for crop in plan]
    assert whole == [True] * 4 + [False]
    assert all((read_crop(store, crop, 32)[1] == 1).mean() >= 0.02 for crop in plan)
    np.testing.assert_array_equal(fixed_crops(store, 5, 32, seed=1), plan)
    many = fixed_crops(store, 12, 32, seed=1)
    assert len(np.unique(many)) == 12 and np.bincount(many["tile"]).max() <= 3


def test_fixed_crops_say_what_is_missing(coast, tmp_path):
    with pytest.raises(DataError, match="at least 50% valid and 90.0% positive"):
        fixed_crops(coast, 2, 16, min_positive=0.9)
    one = open_store([random_tile(tmp_path, "one", (16, 16))], tmp_path)
    with pytest.raises(DataError, match="only 1 different crops.*2 asked for"):
        fixed_crops(one, 2, 16)


# ---- one crop a scene

def test_centre_crops(tmp_path, caplog):
    mask = np.zeros((90, 90), "uint8")
    mask[70:, 70:] = 1
    rows = [write_tile(tmp_path, name, np.zeros((3, 90, 90), "uint8"), m) for name, m in (("bare", mask * 0), ("corner", mask), ("full", mask * 0 + 1))]
    store = open_store([*rows, random_tile(tmp_path, "small", (20, 10))], tmp_path)
    plan = centre_crops(store, 32)
    assert plan.dtype == CROP and plan["tile"].tolist() == [0, 1, 2, 3] and not plan["d4"].any()
    assert plan[["row", "col"]].tolist()[2:] == [(29, 29), (0, 0)]
    assert (read_crop(store, plan[1], 32)[1] == 1).mean() >= 0.05 and tuple(plan[1])[1:3] != (29, 29)
    assert "1 of 4 scenes have no crop of 32 px with 5.0 % positive pixels" in caplog.text and "bare (0.0%)" in caplog.text
    np.testing.assert_array_equal(centre_crops(store, 32), plan)
    assert centre_crops(store, 32, scenes=["x", "x", "x", "y"])["tile"].tolist() == [1, 3]
    with pytest.raises(ValueError, match="2 scenes for 4 tiles"): centre_crops(store, 32, scenes=["x", "y"])


def test_the_door_to_grids():
    from aerial_nb.data import grid, tiles
    for name in ("grid_windows", "put_back", "blended_rows", "centre_crop", "window_weights", "WINDOW"):
        assert getattr(tiles, name) is getattr(grid, name) and name in tiles.__all__


# ---- real tiles

@pytest.mark.skipif(not (REAL / "massachusetts_roads").is_dir(), reason="the Massachusetts tiles are not on this machine")
def test_real_tiles(tmp_path):
    root = REAL / "massachusetts_roads"
    names = [p.stem for p in sorted((root / "images").glob("*.jpg"))[:3]]
    rows = [{"image": root / f"images/{n}.jpg", "label": root / f"masks/{n}.png", "valid": root / f"valid/{n}.png"} for n in names]
    store = open_store(rows, tmp_path)
    blank = pd.read_csv(root / "stats.csv", dtype={"tile": str}).set_index("tile")["nodata_fraction"]
    assert store.shape(0) == (1500, 1500) and set(np.unique(store.mask(0))) <= {0, 1, 255}
    np.testing.assert_allclose(1 - store.table()["valid"], blank[names], atol=1e-4)
    for crop in draw_crops(store, 20, 256, seed=0):
        assert (read_crop(store, crop, 256)[1] != 255).mean() >= 0.5


def test_import_stays_light():
    code = "import sys, aerial_nb.data.tiles; sys.exit('torch' in sys.modules or 'fastai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
