"""Behaviour of aerial_nb.data.splits, ties and blocks: no place on two sides, the same draw everywhere."""

import itertools
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import shapely
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from rasterio import CRS
from rasterio.transform import from_bounds, from_origin
from rasterio.warp import transform

from aerial_nb.data.blocks import map_split, plot_split, split_by_block
from aerial_nb.data.raster import DataError, write_raster
from aerial_nb.data.splits import (SPLITS, check_split, crossings, ensure_split, few_shot, k_folds, split_by_city, split_by_list,
                                   split_by_scene, split_hash)
from aerial_nb.data.ties import ground_of, same_pixels, ties

settings.register_profile("busy", deadline=None, max_examples=40)  # the first call looks into files and libraries
settings.load_profile("busy")
SIZES = st.lists(st.integers(1, 9), min_size=3, max_size=40)
SEED = st.integers(0, 10_000)


def table(sizes):
    "A samples table with scenes of these sizes."
    scenes = [f"scene{i}" for i, n in enumerate(sizes) for _ in range(n)]
    return pd.DataFrame(
        {
            "image": [f"data/tiles/{i}.tif" for i in range(len(scenes))],
            "label": "",
            "scene": scenes,
            "split": "",
            "gsd_m": 1.0,
        }
    )


@given(SIZES, SEED)
def test_no_scene_crosses_and_no_image_is_lost(sizes, seed):
    samples = table(sizes)
    out = split_by_scene(samples, seed=seed)
    assert (out.groupby("scene")["split"].nunique() == 1).all()
    assert set(out["split"]) == set(SPLITS)  # none of the three is empty
    assert out["image"].tolist() == samples["image"].tolist() and (samples["split"] == "").all()


@given(SIZES, SEED, st.randoms())
def test_order_of_rows_does_not_matter(sizes, seed, random):
    samples = table(sizes)
    order = list(range(len(samples)))
    random.shuffle(order)
    mixed = split_by_scene(samples.iloc[order], seed=seed).sort_index()
    assert mixed["split"].tolist() == split_by_scene(samples, seed=seed)["split"].tolist()


@given(st.lists(st.integers(1, 3), min_size=20, max_size=60), SEED)
def test_shares_are_met_where_scenes_are_small(sizes, seed):
    got = split_by_scene(table(sizes), (0.5, 0.25, 0.25), seed)["split"].value_counts(normalize=True)
    assert (got - pd.Series({"train": 0.5, "valid": 0.25, "test": 0.25})).abs().max() < 0.08


def test_the_same_on_every_machine():
    "Known answers: a change here makes every published split hash void."
    out = split_by_scene(table([1] * 10), seed=0)
    assert "".join(s[1] for s in out["split"]) == "rrrarreera"
    assert split_hash(out) == "32e4f4e4f8660e42"


def test_seeds_differ():
    draws = {tuple(split_by_scene(table([4, 1, 3, 1, 2, 6, 1, 2]), seed=s)["split"]) for s in range(20)}
    assert len(draws) > 8


def test_a_zero_share_gets_nothing():
    assert set(split_by_scene(table([1] * 5), (0.8, 0.2, 0))["split"]) == {"train", "valid"}


@pytest.mark.parametrize("sizes", [[5], [3, 2]])
def test_too_few_scenes(sizes):
    with pytest.raises(
        DataError, match=f"{len(sizes)} scenes? cannot be divided into train, valid, test: touching"
    ):
        split_by_scene(table(sizes))


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.6, 0.6, -0.2), (0.5, 0.2, 0.2), (np.nan, 0.5, 0.5)])
def test_impossible_fractions(fractions):
    with pytest.raises(DataError, match="add up to 1"):
        split_by_scene(table([1] * 9), fractions)


def test_a_scene_too_large_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        split_by_scene(table([50, 1, 1, 1]))
    assert "the largest holds 50 of 53 images" in caplog.text


def test_ensure_split_keeps_and_draws():
    samples = table([1] * 10)
    official = samples.assign(split=["test"] * 4 + ["train"] * 6)
    assert ensure_split(official)["split"].tolist() == official["split"].tolist()
    for blank in ("", None, np.nan):
        assert ensure_split(samples.assign(split=blank), seed=3).equals(split_by_scene(samples, seed=3))
    for split in (["train"] * 9 + [""], ["val"] * 10):
        with pytest.raises(DataError, match="in no split or in an unknown one"):
            ensure_split(samples.assign(split=split))


@given(SIZES, SEED, st.sampled_from(["/data/", "C:\\work\\", "", "../x/y/"]))
def test_hash_names_the_split_and_not_the_place(sizes, seed, prefix):
    out = split_by_scene(table(sizes), seed=seed)
    moved = out.assign(image=prefix + out["image"]).sample(frac=1, random_state=seed)
    assert split_hash(moved) == split_hash(out)
    other = out.copy()
    other.loc[0, "split"] = "test" if out["split"][0] != "test" else "train"
    assert split_hash(other) != split_hash(out)
    assert split_hash(out.iloc[1:]) != split_hash(out)
    assume(len(out) > 1)
    assert split_hash(out.assign(scene=out["scene"] + "x")) != split_hash(out)


# ---- nothing crosses, whichever function divides: checked against a plain reading of the files

ZONE, CELL = CRS.from_epsg(32633), 400


@dataclass(frozen=True)
class Tile:
    path: str
    box: object  # polygon in metres of zone 33, or None
    pixels: bytes


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    "A mosaic of touching tiles, tiles that overlap it, copies as PNG, a tile in degrees, and a town far away."
    folder, rng, tiles = tmp_path_factory.mktemp("pool"), np.random.default_rng(0), []

    def tile(name, east, north, data=None, crs=ZONE):
        data = rng.integers(0, 255, (3, 40, 40), dtype="uint8") if data is None else data
        box = None if east is None else shapely.box(east, north - CELL, east + CELL, north)
        place = {} if east is None else dict(crs=crs, transform=from_origin(east, north, CELL / 40, CELL / 40))
        if east is not None and crs != ZONE:
            lon, lat = transform(ZONE, crs, [east, east + CELL], [north, north - CELL])
            place["transform"] = from_bounds(lon[0], lat[1], lon[1], lat[0], 40, 40)
        path = write_raster(folder / name, data, **place)
        tiles.append(Tile(str(path), box, data.tobytes()))
        return data

    kept = {(x, y): tile(f"grid_{x}_{y}.tif", 400_000 + CELL * x, 5_000_000 + CELL * y) for x in range(5) for y in range(4)}
    tile("over_1.tif", 400_000 + 1.5 * CELL, 5_000_000 + 0.5 * CELL)
    tile("over_2.tif", 400_000 + 3.9 * CELL, 5_000_000 + 3 * CELL)
    tile("degrees.tif", 400_000 + 6 * CELL, 5_000_000, crs=CRS.from_epsg(4326))
    tile("degrees_over.tif", 400_000 + 6.5 * CELL, 5_000_000)
    for x in range(3): tile(f"far_{x}.tif", 600_000 + 3 * CELL * x, 5_000_000)
    for (x, y), name in (((0, 0), "copy_a.png"), ((4, 3), "copy_b.png"), ((2, 2), "copy_c.png")): tile(name, None, None, kept[x, y])
    tile("blank_a.png", None, None, np.zeros((3, 40, 40), "uint8"))
    tile("blank_b.png", None, None, np.zeros((3, 40, 40), "uint8"))
    return tiles


def assert_apart(samples, pool, scenes=True, gap_m=0.0):
    "No two rows of different splits belong together; by brute force over all pairs."
    known = {t.path: t for t in pool}
    rows = samples.to_dict("records")
    for a, b in itertools.combinations(rows, 2):
        if a["split"] == b["split"]: continue
        one, two = known[a["image"]], known[b["image"]]
        names = f"{Path(one.path).name} and {Path(two.path).name}"
        assert not scenes or a["scene"] != b["scene"], names
        assert one.pixels != two.pixels or not any(one.pixels), names
        if one.box is not None and two.box is not None:
            assert one.box.intersection(two.box).area < 12 * CELL, names       # less than a pixel and a bit of a side
            assert one.box.distance(two.box) >= gap_m - 2, names


TABLES = st.tuples(st.sets(st.integers(0, 31), min_size=12), st.integers(4, 40), st.integers(0, 99))


def drawn(pool, choice):
    "Some tiles of the pool, with scenes drawn at random."
    picks, scenes, seed = choice
    rng = np.random.default_rng(seed)
    tiles = [pool[i] for i in sorted(picks) if i < len(pool)]
    return pd.DataFrame({"image": [t.path for t in tiles], "label": "", "scene": [f"s{k}" for k in rng.integers(0, scenes, len(tiles))],
                         "split": "", "gsd_m": 10.0}), seed


PROPERTY = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def attempt(function):
    "The result, or None where the data cannot be divided so: a refusal is right, a crossing is not."
    try: return function()
    except DataError: return None


@PROPERTY
@given(TABLES)
def test_by_scene_nothing_crosses(pool, choice):
    samples, seed = drawn(pool, choice)
    out = attempt(lambda: split_by_scene(samples, seed=seed))
    if out is not None:
        assert_apart(out, pool)
        check_split(out)
        assert_apart(ensure_split(out), pool)


@PROPERTY
@given(TABLES)
def test_by_list_and_by_city_nothing_crosses(pool, choice):
    samples, seed = drawn(pool, choice)
    rng = np.random.default_rng(seed)
    kinds = rng.choice(["train", "train", "valid", "test"], len(samples))
    lists = {s: [Path(p).name for p, k in zip(samples["image"], kinds) if k == s] for s in SPLITS}
    cities = samples.assign(city=[f"c{k}" for k in rng.integers(0, 4, len(samples))])
    whole = samples.assign(city=samples["scene"])
    drawn_split = attempt(lambda: split_by_scene(samples, seed=seed))
    if drawn_split is not None:
        again = split_by_list(samples, {s: drawn_split["image"][drawn_split["split"] == s] for s in SPLITS})
        assert split_hash(again) == split_hash(drawn_split)
    for out in (attempt(lambda: split_by_list(samples, lists)), attempt(lambda: split_by_city(cities, "city", seed=seed)),
                attempt(lambda: split_by_city(whole, "city", seed=seed)),
                attempt(lambda: split_by_city(cities, "city", named={"test": "c0"})), attempt(lambda: ensure_split(samples.assign(split=kinds)))):
        if out is not None: assert_apart(out, pool)


@PROPERTY
@given(TABLES, st.sampled_from([0, 50, 130, 500]), st.sampled_from([800, 1500, 3000]), st.booleans())
def test_by_block_nothing_crosses_and_the_buffer_is_kept(pool, choice, buffer_m, block_m, divide):
    samples, seed = drawn(pool, choice)
    samples = samples[samples["image"].str.endswith("tif")].reset_index(drop=True)
    out = attempt(lambda: split_by_block(samples, block_m, buffer_m, seed=seed, divide_scenes=divide))
    if out is None: return
    assert_apart(out.samples, pool, gap_m=buffer_m)                # the scene of the result: a block, where scenes are divided
    if not divide: assert_apart(out.samples.drop(columns="scene").merge(samples[["image", "scene"]]), pool)
    assert sorted([*out.samples["image"], *out.left_out["image"]]) == sorted(samples["image"])
    assert (out.left_out["distance_m"] < max(buffer_m, 1)).all() and (out.left_out["was"] != "test").all()


@PROPERTY
@given(TABLES, st.integers(3, 5))
def test_in_folds_nothing_crosses_and_everything_is_tested_once(pool, choice, k):
    samples, seed = drawn(pool, choice)
    folds = attempt(lambda: k_folds(samples, k, seed))
    if folds is None: return
    for fold in folds: assert_apart(fold, pool)
    tested = [p for f in folds for p in f["image"][f["split"] == "test"]]
    assert sorted(tested) == sorted(samples["image"]) and all(set(f["split"]) == set(SPLITS) for f in folds)


@PROPERTY
@given(TABLES)
def test_folds_keep_a_test_that_is_there(pool, choice):
    samples, seed = drawn(pool, choice)
    out = attempt(lambda: split_by_scene(samples, seed=seed))
    folds = out is not None and attempt(lambda: k_folds(out, 3, seed, keep_test=True))
    if not folds: return
    rest = set(out["image"][out["split"] != "test"])
    for fold in folds:
        assert_apart(fold, pool)
        assert (fold["split"] == "test").equals(out["split"] == "test")
    assert sorted(p for f in folds for p in f["image"][f["split"] == "valid"]) == sorted(rest)


@PROPERTY
@given(TABLES, st.lists(st.integers(1, 6), min_size=1, max_size=3, unique=True))
def test_budgets_are_nested_and_nothing_crosses(pool, choice, budgets):
    samples, seed = drawn(pool, choice)
    out = attempt(lambda: split_by_scene(samples, seed=seed))
    few = out is not None and attempt(lambda: few_shot(out, budgets, seed))
    if not few: return
    known, last = {t.path: t.pixels for t in pool}, set()
    for n, part in few.items():
        assert_apart(part, pool)
        train = part[part["split"] == "train"]["image"]
        pictures = [known[p] for p in train if any(known[p])]
        assert len(train) == n and last <= set(train) and len(set(pictures)) == len(pictures)
        last = set(train)
        for split in ("valid", "test"): assert set(part["image"][part["split"] == split]) == set(out["image"][out["split"] == split])


def test_the_pool_has_something_to_cross(pool):
    "Divided tile by tile, it crosses in every way: the tests above can fail."
    samples = pd.DataFrame({"image": [t.path for t in pool], "label": "", "scene": "one", "split": ["train", "test"] * (len(pool) // 2), "gsd_m": 10.0})
    found = crossings(samples)
    assert set(found["why"]) == {"scene", "overlap", "pixels"}
    with pytest.raises(AssertionError): assert_apart(samples.assign(scene=samples["image"]), pool)
    with pytest.raises(DataError, match="show the same ground"): check_split(samples.assign(scene=samples["image"]))


def test_ties_say_why(pool):
    samples = pd.DataFrame({"image": [t.path for t in pool], "label": "", "scene": [t.path for t in pool], "split": "", "gsd_m": 10.0})
    tied, name = ties(samples), [Path(t.path).stem for t in pool]
    found = {(name[a], name[b], why) for (a, b), why in zip(tied.pairs, tied.why)}
    assert ("degrees", "degrees_over", "overlap") in found and ("grid_0_0", "copy_a", "pixels") in found
    assert not any("blank_a" in pair and "blank_b" in pair for pair in found)      # two blank tiles are no copies
    assert not any(a.startswith("grid") and b.startswith("grid") for a, b, _ in found)  # touching is not overlapping
    places = ground_of(samples).place
    assert places[name.index("far_0")] != places[name.index("grid_0_0")] and places[name.index("copy_a")] == -1


def test_a_changed_file_is_looked_at_again(pool, tmp_path):
    data = np.random.default_rng(5).integers(0, 255, (3, 40, 40), dtype="uint8")
    one, two = (write_raster(tmp_path / f"{n}.png", data) for n in "ab")
    assert same_pixels([one, two]).tolist() == [0, 0]
    data[0, 39, 39] ^= 1
    write_raster(two, data)
    assert same_pixels([one, two]).tolist() == [0, 1]


# ---- lists

def test_lists_of_every_form(tmp_path):
    samples = table([1] * 6)
    wanted = ["train"] * 3 + ["valid"] * 2 + ["test"]
    names = {s: [f"{i}.tif" for i, w in enumerate(wanted) if w == s] for s in SPLITS}
    (tmp_path / "a.json").write_text(json.dumps({"training": names["train"], "val": names["valid"], "TEST": [5]}))
    (tmp_path / "a.csv").write_text("tile,split\n" + "".join(f"tiles/{i},{w}\n" for i, w in enumerate(wanted)))
    for split, some in names.items(): (tmp_path / f"{split}.txt").write_text("\n".join(some) + "\n\n")
    files = {s: tmp_path / f"{s}.txt" for s in SPLITS}
    for lists in (names, tmp_path / "a.json", str(tmp_path / "a.csv"), files):
        assert split_by_list(samples, lists)["split"].tolist() == wanted


def test_unknown_and_missing_names_are_all_listed():
    samples = table([1] * 6)
    with pytest.raises(DataError) as error: split_by_list(samples, dict(train=["0", "1", "ghost"], test=["2", "phantom"]))
    for said in ("ghost", "phantom", "3.tif", "4.tif", "5.tif", "partial=True", "drop=True"): assert said in str(error.value), said
    out = split_by_list(samples, dict(train=["0", "1", "ghost"], test=["2", "phantom"]), partial=True, drop=True)
    assert out["split"].tolist() == ["train", "train", "test"]


@pytest.mark.parametrize("lists, says", [
    (dict(train=["0"], test=["0"]), "1 names are in two splits: 0"), (dict(holdout=["0"]), "'holdout' is no split"), ("none.json", "no such list"), (["0"], "got list")])
def test_impossible_lists(lists, says):
    with pytest.raises(DataError, match=says): split_by_list(table([1] * 3), lists)


def test_a_name_of_two_images_and_a_damaged_list(tmp_path):
    samples = table([1] * 2).assign(image=["a/x.tif", "b/x.tif"])
    with pytest.raises(DataError, match="several images"): split_by_list(samples, dict(train=["x"], test=["b/x"]))
    assert split_by_list(samples, dict(train=["a/x"], test=["b/x.tif"]))["split"].tolist() == ["train", "test"]
    (tmp_path / "bad.json").write_text("{"); (tmp_path / "bad.csv").write_text("name,where\nx,y\n")
    for name, says in (("bad.json", "no JSON"), ("bad.csv", "needs a column 'split'")):
        with pytest.raises(DataError, match=says): split_by_list(samples, tmp_path / name)


def test_a_list_that_crosses_is_refused_or_kept_as_published(caplog):
    samples, lists = table([2, 2]), dict(train=["0", "2"], test=["1", "3"])
    with pytest.raises(DataError, match="2 pairs of images cross"): split_by_list(samples, lists)
    with caplog.at_level(logging.WARNING): kept = split_by_list(samples, lists, as_published=True)
    assert kept["split"].tolist() == ["train", "test"] * 2 and "2 pairs" in caplog.text


# ---- cities, folds, budgets: what is refused

def test_cities():
    samples = table([2] * 6).assign(city=["a"] * 4 + ["b"] * 4 + ["c"] * 4)
    out = split_by_city(samples, lambda row: row["city"].upper(), named=dict(test=["B"]))
    assert set(out["split"][out["city"] == "b"]) == {"test"} and set(out["split"][out["city"] != "b"]) == {"train"}
    assert (split_by_city(samples, "city").groupby("city")["split"].nunique() == 1).all()
    for city, named, says in (("town", None, "no column 'town'"), ("city", dict(test="z"), "no image of z"), ("city", dict(test="a", val="a"), "named for two splits"),
                              ("city", dict(train="a", test="b"), "no split is named for c"), (lambda row: "one", None, "1 group cannot be divided"),
                              (lambda row: row["image"], None, "cities share")):
        with pytest.raises(DataError, match=says): split_by_city(samples, city, named=named)


def test_folds_and_budgets_refuse_what_cannot_be():
    samples = table([3, 3, 3])
    for call, says in ((lambda: k_folds(samples, 4), "3 scenes cannot be divided into 4 folds"), (lambda: k_folds(samples, 2), "3 or more"),
                       (lambda: few_shot(split_by_scene(samples), (5, 12)), "need 1 to"), (lambda: few_shot(samples.assign(split="train"), ()), "need 1 to"),
                       (lambda: few_shot(samples.assign(split="test")), "need 1 to 0")):
        with pytest.raises(DataError, match=says): call()


def test_folds_are_balanced():
    folds = k_folds(table([7, 6, 5, 4, 3, 3, 2, 2, 2, 1]), 3)
    assert max(counts := [(f["split"] == "test").sum() for f in folds]) - min(counts) <= 2


def test_budgets_take_from_many_scenes_and_repeat():
    samples = split_by_scene(table([6] * 12), (0.7, 0.1, 0.2))
    few = few_shot(samples, (5, 12, 24), seed=3)
    train = few[5][few[5]["split"] == "train"]
    assert train["scene"].nunique() == 5 and few_shot(samples.sample(frac=1, random_state=0), (5,), seed=3)[5]["image"].isin(few[5]["image"]).all()
    assert set(few_shot(samples, (5,), seed=4)[5]["image"]) != set(few[5]["image"])


# ---- blocks

def squares(n=20):
    "A square of n x n touching tiles of 100 m, without files."
    at = [(x, y) for x in range(n) for y in range(n)]
    samples = pd.DataFrame({"image": [f"{x:02}_{y:02}.tif" for x, y in at], "label": "", "scene": "town", "split": "", "gsd_m": 1.0})
    return samples, [shapely.box(100 * x, 100 * y, 100 * x + 100, 100 * y + 100) for x, y in at]


def test_blocks_of_a_mosaic_without_files():
    samples, shapes = squares()
    out = split_by_block(samples, 500, 150, divide_scenes=True, shapes=shapes)
    assert set(out.samples["split"]) == set(SPLITS) and len(out.left_out) and "town" not in set(out.samples["scene"])
    place = dict(zip(samples["image"], shapes))
    for row in out.left_out.itertuples():
        assert abs(place[row.image].distance(place[row.near]) - row.distance_m) < 0.1
        assert row.distance_m < 150 and row.was != "test"
    check_split(out.samples, 150, list(out.shapes))
    narrow = split_by_block(samples, 500, 50, divide_scenes=True, shapes=shapes)
    with pytest.raises(DataError, match="100 m apart"): check_split(narrow.samples, 150, list(narrow.shapes))


def test_a_wider_buffer_leaves_out_more():
    samples, shapes = squares()
    lost = [len(split_by_block(samples, 700, b, divide_scenes=True, shapes=shapes).left_out) for b in (0, 50, 150, 250)]
    assert lost[0] == 0 and lost == sorted(lost) and lost[-1] > lost[1] > 0


def test_the_buffer_is_at_least_the_receptive_field():
    samples, shapes = squares()
    out = split_by_block(samples, 700, divide_scenes=True, shapes=shapes, receptive_px=128)
    assert out.buffer_m == 128                                      # at 1 m a pixel
    coarse = split_by_block(samples.assign(gsd_m=[0.5] * 399 + [1.5]), 900, divide_scenes=True, shapes=shapes, receptive_px=128)
    assert coarse.buffer_m == 192                                   # the coarsest tile decides
    for arguments, says in ((dict(buffer_m=100, receptive_px=128), "make it 128 m"), (dict(), "give buffer_m"), (dict(buffer_m=-1), "0 or more"),
                            (dict(buffer_m=100, block_m=0), "above 0"), (dict(buffer_m=2000), "leaves nothing in")):
        with pytest.raises(DataError, match=says): split_by_block(samples, **(dict(block_m=700) | arguments), divide_scenes=True, shapes=shapes)


def test_images_without_a_place_and_scenes_that_are_whole():
    samples, shapes = squares(4)
    with pytest.raises(DataError, match="16 of 16 images have no place"): split_by_block(samples, 100, 0)
    with pytest.raises(DataError, match="divide_scenes=True"): split_by_block(samples, 100, 0, shapes=shapes)
    with pytest.raises(DataError, match="15 shapes for 16"): split_by_block(samples, 100, 0, shapes=shapes[1:])


def test_pictures_and_maps_of_a_split(pool, tmp_path):
    samples = pd.DataFrame({"image": [t.path for t in pool], "label": "", "scene": [Path(t.path).stem[:4] for t in pool], "split": "", "gsd_m": 10.0})
    placed = samples[samples["image"].str.endswith("tif")]
    division = split_by_block(placed, 900, 130, divide_scenes=True)
    figure = plot_split(division, names=True)
    shown = sum(len(c.get_paths()) for ax in figure.axes for c in ax.collections)
    texts = [t.get_text() for t in figure.legends[0].get_texts()]
    assert shown == len(placed) and f"left out ({len(division.left_out)})" in texts and "buffer, 130 m" in texts
    page = map_split(division).get_root().render()
    assert page.count('"type": "Polygon"') >= len(placed) and "buffer, 130 m" in page and all(Path(p).name in page for p in placed["image"])
    assert str(Path(pool[0].path).parent) not in page and "tile.openstreetmap" not in page
    assert "tile.openstreetmap" in map_split(placed, tiles="OpenStreetMap").get_root().render()
    nowhere = samples[samples["image"].str.endswith("png")]
    for draw in (plot_split, map_split):
        with pytest.raises(DataError, match="no image has a place"): draw(nowhere)
