"""SpaceNet 7 trees: names, the drawn layout, masks and numbers from polygons, three parts, months, covering tiles."""
import json
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from hypothesis import given
from hypothesis import strategies as st
from rasterio.features import rasterize

from aerial_nb.data.burn import burn
from aerial_nb.data.covering import balanced_weights, class_shares, covering_loaders, covering_plan, shuffled
from aerial_nb.data.masks import read_class_map
from aerial_nb.data.raster import DataError, raster_info, read_pixels, write_raster
from aerial_nb.data.readers import SPACENET7_VALID, spacenet7
from aerial_nb.data.spacenet7 import (PIXEL, bordered, built_ground, burned, first_months, month_view, open_buildings, polygon_folder, scene_corner, scene_name,
                                      shrunk, three_parts, write_spacenet7, write_towns)
from aerial_nb.data.tiles import TileStore

OAM = Path(__file__).parents[1] / "../shared/data/roofs/oam_1024"


@pytest.fixture(scope="module")
def tree(tmp_path_factory): return write_spacenet7(tmp_path_factory.mktemp("tree"), scenes=6, months=3, size=64, named=2)


@pytest.fixture(scope="module")
def samples(tree): return burned(spacenet7(tree), tree / "masks")


@given(st.integers(0, 8191), st.integers(0, 8191))
def test_a_name_and_its_place_are_one(x, y):
    left, top = scene_corner(scene_name(x, y))
    assert left == pytest.approx(x * 1024 * PIXEL - 20037508.342789244) and top == pytest.approx(20037508.342789244 - y * 1024 * PIXEL)


def test_the_nine_published_names_follow_the_rule():
    for name in SPACENET7_VALID: assert scene_name(*map(int, name.split("_")[1:3])) == name
    for wrong in ("L15-0571E-1076N_2287_3888_13", "scene_1", ""):
        with pytest.raises(DataError, match="is no name"): scene_corner(wrong)
    with pytest.raises(DataError, match="0 to 8191"): scene_name(8192, 0)


def test_the_tree_has_the_exact_layout(tree):
    scene = tree / "train" / SPACENET7_VALID[1]
    assert {p.name for p in scene.iterdir()} - {".drawn"} == {"images", "images_masked", "labels", "labels_match", "labels_match_pix", "UDM_masks"}
    stem = f"global_monthly_2020_01_mosaic_{scene.name}"
    with rasterio.open(scene / "images_masked" / f"{stem}.tif") as file:
        assert file.count == 4 and file.dtypes[0] == "uint8" and file.transform.a == pytest.approx(4.777314, abs=1e-6)
        assert not file.crs.is_projected, "the second scene states a local CRS, as published files do"
    labels = json.loads((scene / "labels_match" / f"{stem}_Buildings.geojson").read_text())["features"]
    lon, lat = labels[0]["geometry"]["coordinates"][0][0][:2]
    assert abs(lon) <= 180 and abs(lat) <= 90 and labels[0]["properties"]["Id"] >= 1
    months = [len(json.loads(p.read_text())["features"]) for p in sorted((scene / "labels_match").iterdir())]
    assert months == sorted(months) and months[-1] > months[0], "buildings appear"


def test_ids_stay_with_their_building(tree):
    first, last = (gpd.read_file(p).set_index("Id") for p in sorted((tree / "train" / SPACENET7_VALID[0] / "labels_match").iterdir())[::2])
    assert set(first.index) <= set(last.index) and first.geometry.geom_equals_exact(last.geometry.loc[first.index], 1e-9).all()


def test_a_lot_is_bare_until_its_month():
    ground = built_ground(SPACENET7_VALID[0], 48, 5, 4)
    views = [month_view(ground, k, 5, False)[0].astype(float) for k in (0, 3)]
    change = np.abs(np.subtract(*(v - v.mean((1, 2), keepdims=True) for v in views))).mean(0)
    inside = rasterize([(s, 1) for s in ground.outlines[ground.born > 0]], (48, 48)).astype(bool)
    assert inside.any() and change[inside].mean() > 3 * change[~inside].mean()


def test_a_finished_scene_is_kept_and_impossible_numbers_are_refused(tree, tmp_path):
    file = next((tree / "train" / SPACENET7_VALID[0] / "images").iterdir())
    stamp = file.stat().st_mtime_ns
    write_spacenet7(tree, scenes=6, months=3, size=64, named=2)
    assert file.stat().st_mtime_ns == stamp
    for wrong in (dict(named=7, scenes=6), dict(months=0), dict(size=2000)):
        with pytest.raises(DataError, match="need 1 month"): write_spacenet7(tmp_path, **wrong)


def test_masks_are_the_polygons_and_clouds_are_ignored(samples):
    for row in samples.itertuples():
        mask, pixels, ids = read_class_map(row.label), read_pixels(row.image), read_pixels(row.objects).data[0]
        assert ((mask == 255) == ~pixels.valid).all() and pixels.data.shape[0] == 3
        t = raster_info(row.image).transform
        shapes = gpd.read_file(row.polygons).to_crs(3857).geometry
        plain = rasterize([(s, 1) for s in shapes], mask.shape, transform=t).astype(bool)
        assert (plain == (mask == 1))[mask != 255].mean() > .999
        assert (ids > 0)[mask != 255].sum() == (mask == 1).sum()
    assert (samples.udm != "").any() and (samples.udm == "").any()
    clouds = samples[samples.udm != ""].iloc[0]
    assert ((read_pixels(clouds.udm, alpha=False).data[0] == 255) == (read_class_map(clouds.label) == 255)).all()


def test_every_mask_that_fails_is_named_at_once(tree, tmp_path):
    table = spacenet7(tree, months=1)
    wrong = tmp_path / "wrong.geojson"; wrong.write_text("{")
    table.loc[[0, 1], "label"] = str(wrong)
    with pytest.raises(DataError, match="2 of 6 masks") as error: burned(table, tmp_path / "out")
    assert error.value.args[0].count("wrong.geojson") >= 2
    with pytest.raises(DataError, match="share a mask"): burned(pd.concat([table, table]), tmp_path / "out")


def test_a_scene_without_buildings_is_a_scene(tree, tmp_path):
    table = spacenet7(tree, months=1)
    empty = tmp_path / Path(table.label[0]).name; empty.write_text('{"type": "FeatureCollection", "features": []}')
    table.loc[0, "label"] = str(empty)
    found = burned(table, tmp_path / "out")
    assert set(np.unique(read_class_map(found.label[0]))) <= {0, 255}


@pytest.mark.parametrize("nine", ["valid", "test"])
def test_three_parts_keep_the_nine_together_and_scenes_whole(samples, nine):
    parts = three_parts(samples, nine, share=.4)
    assert set(parts[parts.split == nine].scene) == set(SPACENET7_VALID[:2]) and set(parts.split) == {"train", "valid", "test"}
    assert parts.groupby("scene").split.nunique().max() == 1 and len(parts) == len(samples)
    assert parts.equals(three_parts(samples, nine, share=.4))


def test_three_parts_refuse_what_cannot_be(samples):
    with pytest.raises(DataError, match="'train'"): three_parts(samples, "train")
    with pytest.raises(DataError, match="between 0 and 1"): three_parts(samples, share=1)
    with pytest.raises(DataError, match="nothing to train on"): three_parts(samples[samples.scene.isin(SPACENET7_VALID)])
    with pytest.raises(DataError, match="no column 'place'"): three_parts(samples, by="place")


def test_months_are_taken_from_training_only(samples):
    parts = three_parts(samples, share=.4)
    one = first_months(parts, 1)
    assert set(one[one.split == "train"].month) == {"2020-01"}
    for part in ("valid", "test"): assert one[one.split == part].equals(one[one.split == part]) and (one.split == part).sum() == (parts.split == part).sum()
    for n in (0, 4):
        with pytest.raises(DataError, match=f"{n} months of 3"): first_months(parts, n)
    with pytest.raises(DataError, match="no months"): first_months(parts.assign(month=""), 2)


def test_images_with_polygons_of_ones_own(tree, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "labels").mkdir()
    for k in range(4):
        t = rasterio.transform.from_origin(1000 * k, 0, .5, .5)
        write_raster(tmp_path / f"images/{'ab'[k > 1]}_{k}.tif", rng.integers(1, 250, (3, 96, 96), dtype="uint8"), "EPSG:3857", t)
        gpd.GeoSeries([shapely.box(1000 * k + 8, -24, 1000 * k + 20, -8)], crs=3857).to_crs(4326).to_file(tmp_path / f"labels/{'ab'[k > 1]}_{k}.geojson")
    (tmp_path / "scenes.csv").write_text("scene,place,split\n" + "".join(f"{'ab'[k > 1]}_{k},{'ab'[k > 1]},train\n" for k in range(4)))
    whole = open_buildings(tmp_path, cache=tmp_path / "cache")
    half = open_buildings(tmp_path, shrink=2, cache=tmp_path / "cache")
    assert (read_class_map(whole.label[0]) == 1).sum() == 24 * 32 and (read_class_map(half.label[0]) == 1).sum() == 12 * 16
    assert half.gsd_m[0] == pytest.approx(1., rel=.01) and read_pixels(half.image[0]).data.shape == (3, 48, 48)
    fine, coarse = read_pixels(whole.image[0]).data, read_pixels(half.image[0]).data
    assert np.abs(fine.reshape(3, 48, 2, 48, 2).mean((2, 4)) - coarse).max() <= .5
    assert set(whole.place) == {"a", "b"} and (whole.split == "").all()
    with pytest.raises(DataError, match="shrink less"): open_buildings(tmp_path, shrink=4, cache=tmp_path / "cache")
    (tmp_path / "labels/a_0.geojson").unlink()
    with pytest.raises(DataError, match="1 of 4 images have no vector file"): polygon_folder(tmp_path)


def test_shrink_is_for_polygons_and_fine_imagery(tree, tmp_path):
    with pytest.raises(DataError, match="4 m pixels"): open_buildings(tree, shrink=2, cache=tmp_path)
    with pytest.raises(DataError, match="no such folder"): open_buildings(tmp_path / "nowhere", cache=tmp_path)


@pytest.mark.skipif(not OAM.is_dir(), reason="the OpenAerialMap scenes are not at hand")
def test_real_polygons_burn_to_the_published_masks(tmp_path):
    table = polygon_folder(OAM).iloc[[0, 9]].reset_index(drop=True)
    for row in table.itertuples():
        mask = burn(row.image, row.label)[0]
        assert (mask == read_class_map(OAM / "masks" / Path(row.image).name)).mean() > .9999
    small = shrunk(table, 8, tmp_path)
    assert read_pixels(small.image[0]).data.shape == (3, 128, 128) and small.gsd_m[0] == pytest.approx(8 * table.gsd_m[0])


@given(st.integers(20, 90), st.integers(20, 90), st.integers(8, 64), st.data())
def test_tiles_cover_every_counted_pixel(rows, cols, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    class Store:
        sources = []
        def __len__(self): return 1
        def shape(self, i): return rows, cols
        def mask(self, i): return target
    target = np.zeros((rows, cols), np.uint8)
    target[: rows // 2, : cols // 2] = data.draw(st.sampled_from((0, 255)))
    plan, seen = covering_plan(Store(), size, overlap), np.zeros((rows, cols), bool)
    for _, row, col, _ in plan.tolist(): seen[row:row + size, col:col + size] = True
    assert seen[target != 255].all()


def test_overlap_and_blank_scenes_are_refused(samples, tmp_path):
    store = TileStore(samples[:2], cache=tmp_path, progress=False)
    for wrong in (-1, 32):
        with pytest.raises(DataError, match="0 to 31"): covering_plan(store, 32, wrong)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 5))
def test_each_tile_comes_once_before_any_comes_again(tiles, n, seed):
    seen = np.concatenate([shuffled(np.arange(tiles), n, seed, epoch) for epoch in range(3)])
    counts = [np.bincount(seen[:k], minlength=tiles) for k in range(1, len(seen) + 1)]
    assert all(c.max() - c.min() <= 1 for c in counts)


def test_empty_tiles_are_left_out_of_training_only(samples, tmp_path):
    parts = three_parts(samples, share=.4)
    field = [i for i in parts.index if parts.split[i] != "test"][::2]
    for i in field:
        with rasterio.open(parts.label[i]) as file: profile, mask = file.profile, file.read(1)
        mask[:40] = 0
        copy = tmp_path / Path(parts.label[i]).name
        with rasterio.open(copy, "w", **profile) as file: file.write(mask, 1); file.update_tags(AERIAL_CLASS_MAP="0 background")
        parts.loc[i, "label"] = str(copy)
    dls = covering_loaders(parts, 16, 2, loading=dict(cache=tmp_path / "c", progress=False))
    train, valid = (dl.dataset for dl in dls)
    assert (class_shares(train.store, train.plan, 16).positive > 0).all() and (class_shares(valid.store, valid.plan, 16).positive == 0).any()
    everything = covering_loaders(parts, 16, 2, loading=dict(cache=tmp_path / "c", progress=False, drop_empty=False))
    assert everything.tiles > dls.tiles


def test_one_class_cannot_be_weighed():
    assert balanced_weights(pd.DataFrame(dict(counted=[100], positive=[25]))) == (.25, .75)
    for positive in (0, 100):
        with pytest.raises(DataError, match="nothing to learn"): balanced_weights(pd.DataFrame(dict(counted=[100], positive=[positive])))


# ---- borders

def two_by_two(folder, gap_m=0.):
    "Four scenes of 60 px at half a metre: a pair of houses with a gap or a shared wall, and one alone."
    for k in range(4):
        grid = dict(crs="EPSG:32633", transform=rasterio.transform.from_origin(5e5, 5e6, .5, .5))
        (folder / "images").mkdir(parents=True, exist_ok=True); (folder / "labels").mkdir(exist_ok=True)
        write_raster(folder / f"images/s{k}.tif", np.random.default_rng(k).integers(1, 255, (3, 60, 60), dtype="uint8"), **grid)
        boxes = [shapely.box(5, 5, 10, 15), shapely.box(10 + gap_m, 5, 16, 15), shapely.box(20, 20, 25, 25)]
        shapes = [shapely.transform(b, lambda xy: np.stack([5e5 + xy[:, 0], 5e6 - xy[:, 1]], 1)) for b in boxes]
        gpd.GeoDataFrame(geometry=shapes, crs="EPSG:32633").to_crs("EPSG:4326").to_file(folder / f"labels/s{k}.geojson")
    return open_buildings(folder, cache=folder / "cache").assign(split=["train", "train", "valid", "test"])


@pytest.mark.parametrize("gap_m", [0., 1.])
def test_a_border_lies_between_buildings_and_hides_none(tmp_path, gap_m):
    plain = two_by_two(tmp_path, gap_m)
    walls = bordered(plain, 2.)
    assert walls.split.tolist() == ["train", "train", "valid"] and walls.image.tolist() == plain.image.tolist()[:3]
    whole, learned = read_class_map(plain.label[0]), read_class_map(walls.label[0])
    assert set(np.unique(whole)) == {0, 1} and set(np.unique(learned)) == {0, 1, 2}
    rows, cols = np.nonzero(learned == 2)
    assert 8 <= rows.min() and rows.max() < 32 and 18 <= cols.min() and cols.max() < 24   # within a metre of the wall, or of the gap
    assert (learned[learned != 2] == whole[learned != 2]).all()
    assert (read_pixels(walls.objects[0]).data == read_pixels(plain.objects[0]).data).all()
    assert (learned[40:50, 40:50] == 1).all(), "a house alone has none"


def test_borders_that_cannot_be_are_refused(tmp_path):
    plain = two_by_two(tmp_path, 1.)
    with pytest.raises(DataError, match="no pixel of the training labels lies in a border of 0.01 m.*0.5 m"): bordered(plain, .01)
    with pytest.raises(DataError, match="width in metres above 0"): bordered(plain, 0)
    with pytest.raises(DataError, match="labels of this data set are masks"): bordered(plain.drop(columns="polygons"), 2.)


def test_towns_have_shared_walls(tmp_path, monkeypatch):
    from aerial_nb.data import synthetic
    folder = write_towns(tmp_path / "towns", 2, 160)
    stamps = {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}
    assert len(stamps) == 4 and write_towns(folder, 2, 160) == folder and {f: f.stat().st_mtime_ns for f in stamps} == stamps
    for label in folder.glob("labels/*"):
        shapes = gpd.read_file(label).to_crs("EPSG:32631").geometry.to_numpy()
        i, j = shapely.STRtree(shapes).query(shapes, predicate="dwithin", distance=.3)
        assert (i < j).sum() >= 6
    field = synthetic.scene(24, 2, kind="rural")
    monkeypatch.setattr(synthetic, "scene", lambda *_, **__: field)
    with pytest.raises(DataError, match="of 12 m holds 6 shared walls: draw larger ones"): write_towns(tmp_path / "tiny", 1, 24)
