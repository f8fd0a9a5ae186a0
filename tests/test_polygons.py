"""Maps of probabilities, outlines along pixel edges, touching buildings, and polygons strip by strip."""
import logging
import sys
from pathlib import Path

import cv2
import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
from hypothesis import given, settings, strategies as st
from pyproj import Geod
from rasterio.features import rasterize, shapes
from rasterio.transform import from_origin
from scipy.ndimage import distance_transform_edt, gaussian_filter
from skimage.morphology import local_maxima, reconstruction

from aerial_nb.data.masks import CLASS_MAP_TAG
from aerial_nb.data.raster import DataError, write_raster
from aerial_nb.data.vectors import PIXELS
from aerial_nb.scenes import polygons
from aerial_nb.scenes.outlines import find_corners, find_rings, ring_polygons
from aerial_nb.scenes.polygons import How, polygonise
from aerial_nb.scenes.probmap import open_map
from aerial_nb.scenes.regular import regularise_polygons, simplify_polygons
from aerial_nb.scenes.separate import by_border, by_watershed, connected, separate

REAL = Path(__file__).parents[1] / "../shared/data/roofs/oam_1024"
UTM = {"crs": "EPSG:32633", "transform": from_origin(5e5, 5e6, 0.5, 0.5)}


def write_map(path, probs, names=("building",), crs=None, transform=None, dtype="uint8", **tags):
    "A map as aerial_predict writes it; NaN is no data."
    probs = np.asarray(probs, "float32").reshape(len(names), *np.shape(probs)[-2:])
    top = {"uint8": 254, "uint16": 65534, "float32": 1}[dtype]
    data = probs if dtype == "float32" else np.where(np.isnan(probs), top + 1, np.rint(probs * top)).astype(dtype)
    write_raster(path, data, crs, transform, nodata=np.nan if dtype == "float32" else top + 1)
    with rasterio.open(path, "r+") as d:
        d.scales, d.descriptions = (1 / top,) * len(names), tuple(names)
        d.update_tags(**tags)
    return path


def blobs(shape, seed, coarse=2, share=.55):
    "Ragged shapes that touch, with corners that meet."
    rng = np.random.default_rng(seed)
    small = rng.random(tuple(-(-n // coarse) for n in shape)) < share
    return np.kron(small, np.ones((coarse, coarse), bool))[:shape[0], :shape[1]]


def same(a, b):
    assert list(a.columns) == list(b.columns) and a.crs == b.crs and len(a) == len(b)
    assert a.drop(columns="geometry").equals(b.drop(columns="geometry"))
    assert shapely.equals_exact(a.geometry.to_numpy(), b.geometry.to_numpy(), 0).all()


# ---- maps

@pytest.mark.parametrize("dtype, step", [("uint8", 1 / 254), ("uint16", 1 / 65534), ("float32", 0)])
def test_a_map_reads_back_as_probabilities(tmp_path, dtype, step):
    probs = np.random.default_rng(0).random((20, 30)).astype("float32"); probs[3, 4] = np.nan; probs[5, 6], probs[7, 8] = 0, 1
    found = open_map(write_map(tmp_path / "a.tif", probs, **UTM, dtype=dtype, AERIAL_THRESHOLD=0.3, AERIAL_DAMAGED="1 2 3 4; 5 6 7 8"))
    got = found.read()
    assert got.dtype == np.float32 and np.isnan(got[3, 4]) and np.isnan(got).sum() == 1
    assert np.nanmax(abs(got - probs)) <= step / 2 + 1e-7 and got[5, 6] == 0 and got[7, 8] == 1
    assert (found.classes, found.threshold, found.damaged) == (("building",), .3, ((1, 2, 3, 4), (5, 6, 7, 8)))
    assert found.gsd_m == pytest.approx(.5, abs=.001) and np.array_equal(found.read((4, 5, 3, 7)), got[4:7, 5:12])
    assert open_map(tmp_path / "a.tif", .8).threshold == open_map(found, .8).threshold == .8


@settings(max_examples=30, deadline=None)
@given(high=st.integers(1, 40), rows=st.integers(1, 50), overlap=st.integers(0, 9))
def test_strips_cover_each_row_once(tmp_path_factory, high, rows, overlap):
    path = write_map(tmp_path_factory.mktemp("s") / "a.tif", np.zeros((high, 3)), AERIAL_THRESHOLD=.5)
    strips = list(open_map(path).strips(rows, overlap))
    assert [r for s in strips for r in range(s.first, s.last)] == list(range(high))
    for s in strips:
        top, left, n, wide = s.window
        assert (top, top + n) == (max(s.first - overlap, 0), min(s.last + overlap, high)) and (left, wide) == (0, 3)


def test_masks_and_class_maps_are_maps(tmp_path):
    mask = blobs((30, 40), 1)
    for name, data in (("a.png", mask * np.uint8(255)), ("b.tif", mask.astype("uint8")), ("c.tif", np.stack([mask * np.uint8(255)] * 3))):
        write_raster(tmp_path / name, data)
        assert np.array_equal(open_map(tmp_path / name).read(), mask) and open_map(tmp_path / name).threshold == .5
    classes = np.where(mask, 1, 0).astype("uint8"); classes[:5] = 2; classes[-3:] = 255
    write_raster(tmp_path / "d.tif", classes, **UTM)
    with rasterio.open(tmp_path / "d.tif", "r+") as d: d.update_tags(**{CLASS_MAP_TAG: "0 background; 1 building; 2 border; 255 ignored"})
    found = open_map(tmp_path / "d.tif")
    assert found.classes == ("building", "border") and found.band("Border") == 2 and found.is_mask
    assert np.array_equal(found.read(band=2)[:27], classes[:27] == 2) and np.isnan(found.read(band=1)[-3:]).all()


def test_what_is_no_map_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    write_raster(tmp_path / "photo.tif", rng.integers(0, 255, (3, 40, 40)).astype("uint8"))
    with pytest.raises(DataError, match="an image, not a map of probabilities"): open_map(tmp_path / "photo.tif")
    write_raster(tmp_path / "four.tif", rng.integers(0, 255, (4, 40, 40)).astype("uint16"))
    with pytest.raises(DataError, match="an image, not a map"): open_map(tmp_path / "four.tif")
    grey = rng.integers(0, 256, (40, 40)).astype("uint8")
    write_raster(tmp_path / "grey.tif", grey)
    with pytest.raises(DataError, match="scale=1/255"): open_map(tmp_path / "grey.tif")
    assert np.allclose(open_map(tmp_path / "grey.tif", scale=1 / 255).read(), grey / 255)
    write_raster(tmp_path / "logits.tif", rng.normal(0, 5, (40, 40)).astype("float32"))
    with pytest.raises(DataError, match="apply a sigmoid"): open_map(tmp_path / "logits.tif")
    (tmp_path / "text.tif").write_text("no image")
    with pytest.raises(DataError, match="text.tif"): open_map(tmp_path / "text.tif")
    with pytest.raises(DataError, match="no such file"): open_map(tmp_path / "missing.tif")


def test_thresholds(tmp_path, caplog):
    path = write_map(tmp_path / "a.tif", np.full((4, 4), .5))
    for wrong in (0, -.5, 1.5, 50, float("nan"), "high"):
        with pytest.raises(DataError, match="0..1"): open_map(path, wrong)
    with caplog.at_level(logging.WARNING): assert open_map(path).threshold == .5
    assert "names no threshold" in caplog.text
    with pytest.raises(DataError, match="AERIAL_THRESHOLD"): open_map(write_map(tmp_path / "b.tif", np.zeros((4, 4)), AERIAL_THRESHOLD="7"))
    assert len(polygonise(path, .5, min_area_m2=0)) == 1   # what reaches the threshold counts: 127 of 254 is a half
    with pytest.raises(DataError, match="no band 3"): open_map(path).read(band=3)


# ---- outlines

@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 24), cols=st.integers(1, 24), seed=st.integers(0, 10**6), share=st.floats(.2, .9), coarse=st.integers(1, 3))
def test_outlines_are_those_of_gdal(rows, cols, seed, share, coarse):
    labels = connected(blobs((rows, cols), seed, coarse, share))[0]
    ids, found, area = ring_polygons(find_rings(find_corners(labels)), UTM["transform"])
    theirs = {int(v): shapely.geometry.shape(g) for g, v in shapes(labels, mask=labels > 0, connectivity=4, transform=UTM["transform"])}
    assert ids.tolist() == sorted(theirs) and shapely.is_valid(found).all() and shapely.is_ccw(shapely.get_exterior_ring(found)).all()
    assert all(shapely.equals(p, theirs[i]) for i, p in zip(ids, found))
    assert np.array_equal(area, np.bincount(labels.ravel())[1:]) if len(ids) else not labels.any()
    # no corner too many: GDAL has none on straight lines either
    assert shapely.get_num_coordinates(found).sum() == sum(shapely.get_num_coordinates(p) for p in theirs.values())


def test_small_courtyards_are_filled():
    mask = np.ones((12, 12), "int32"); mask[2, 2] = 0; mask[5:8, 5:8] = 0
    rings = find_rings(find_corners(mask))
    for least, holes, area in ((0, 2, 134), (2, 1, 135), (9, 1, 135), (10, 0, 144)):
        _, (p,), (px,) = ring_polygons(rings, None, least)
        assert (len(p.interiors), p.area, px) == (holes, area, area)


# ---- touching buildings

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), depth=st.integers(1, 30))
def test_summits_are_h_maxima(seed, depth):
    relief = np.rint(gaussian_filter(np.random.default_rng(seed).random((30, 35)), 2) * 200)
    relief += 1 - relief.min()
    filled = reconstruction(relief - depth + .5, relief, footprint=np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]]))
    want = len(connected(local_maxima(filled, connectivity=1))[1]) - 1
    found = by_watershed(np.ones(relief.shape, bool), depth, relief)
    assert len(np.unique(found)) == max(want, 1) and found.min() > 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), how=st.sampled_from(["none", "border", "watershed"]))
def test_objects_cover_the_mask_and_hang_together(seed, how):
    probs = gaussian_filter(np.random.default_rng(seed).random((40, 50)).astype("float32"), 1.5)
    edge = gaussian_filter(np.random.default_rng(seed + 1).random((40, 50)).astype("float32"), 1)
    labels = separate(probs, .5, how, edge)
    assert (labels[probs >= .5] > 0).all()
    if how != "border": assert np.array_equal(labels > 0, probs >= .5)
    parts = connected(labels > 0)[0]
    for k in np.unique(labels)[1:]:
        assert len(connected(labels == k)[1]) == 2 and len(np.unique(parts[labels == k])) == 1


def test_houses_at_a_neck_and_at_a_border():
    y, x = np.mgrid[:40, :80]
    two = ((abs(x - 20) < 12) & (abs(y - 20) < 12)) | ((abs(x - 55) < 14) & (abs(y - 20) < 10)) | ((abs(x - 36) < 8) & (abs(y - 20) < 3))
    assert len(np.unique(by_watershed(two))) - 1 == 2 and len(np.unique(by_watershed(two, 50))) - 1 == 1
    long = (abs(x - 40) < 35) & (abs(y - 20) < 6)
    assert len(np.unique(by_watershed(long))) - 1 == 1   # a long roof has one summit
    line = long & (abs(x - 40) < 2)
    labels = by_border(long, line)
    assert np.array_equal(labels > 0, long) and np.bincount(labels.ravel())[1:].max() < .55 * long.sum()
    assert len(np.unique(by_border(long, long))) - 1 == 1                # all border: stays whole
    assert not by_border(np.zeros_like(long), long).any()                # a border alone is no building
    assert len(np.unique(by_border(long, long & ((x % 3 > 0) | (y != 20))))) - 1 == 1  # seeds of a pixel are noise


def test_the_distance_is_the_true_one():
    mask = blobs((50, 60), 3, 5, .7)
    ours = by_watershed(mask)
    theirs = by_watershed(mask, height=distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1])
    assert np.array_equal(ours, theirs)


# ---- strips

@settings(max_examples=40, deadline=None)
@given(rows=st.integers(3, 60), cols=st.integers(3, 50), seed=st.integers(0, 10**6), strip=st.integers(1, 40),
       how=st.sampled_from([("none", "distance"), ("border", "distance"), ("watershed", "distance"), ("watershed", "probability")]),
       smooth=st.sampled_from([0, 1, 2]), least=st.sampled_from([0, 3]))
def test_strips_give_the_same_as_one_piece(tmp_path_factory, rows, cols, seed, strip, how, smooth, least):
    rng = np.random.default_rng(seed)
    probs = gaussian_filter(rng.random((2, rows, cols)), (0, smooth, smooth))
    probs = (probs - probs.min()) / np.ptp(probs)
    probs[:, rng.random((rows, cols)) < .01] = np.nan
    path = write_map(tmp_path_factory.mktemp("m") / "a.tif", probs, ("building", "border"), **UTM)
    split, on = how
    whole, parts = (polygonise(path, .5, least, split, strip_rows=n, how=How(on=on)) for n in (rows, strip))
    same(whole, parts)
    assert whole.geometry.is_valid.all() and (whole.geometry.geom_type == "Polygon").all()
    if least or split == "border": return
    mask = open_map(path).read() >= .5   # NaN is smaller
    burned = rasterize([*zip(whole.geometry, whole.instance)] or [(shapely.Polygon(), 0)], (rows, cols), transform=UTM["transform"]) if len(whole) else 0
    assert np.array_equal(burned > 0, mask) if len(whole) else not mask.any()


@pytest.mark.parametrize("split", ["none", "watershed"])
def test_one_part_through_all_strips(tmp_path, split, caplog, monkeypatch):
    "A comb whose teeth meet in the last row, and a ring around a house."
    mask = np.zeros((90, 60)); mask[:, ::4] = 1; mask[-1] = 1; mask[20:60, 20:50] = 0; mask[20:60, [20, 49]] = mask[[20, 59], 20:50] = 1
    mask[35:45, 30:40] = 1
    path = write_map(tmp_path / "a.tif", mask, **UTM)
    monkeypatch.setattr(polygons, "_ALOUD_PX", 1000)
    with caplog.at_level(logging.WARNING): found = polygonise(path, .5, 0, split, strip_rows=8)
    same(found, polygonise(path, .5, 0, split, strip_rows=90))
    assert ("held in memory to be separated" in caplog.text) == (split == "watershed")
    if split == "none":
        assert len(found) == 2 and found.area_m2.tolist() == [(mask.sum() - 100) / 4, 25]


def test_connected_parts_are_held_as_corners():
    "A full strip of building keeps two corners, however many rows go by."
    parts, ones = polygons.Parts(500, 1), np.ones((100, 500), "float32")
    for k in range(5):
        parts.add(100 * k, ones > 0, ones, ones > 2, False)
        assert len(parts.corners) == 2 and parts.sums[1, 0] == (k + 1) * 50_000
    corners, _ = parts.add(500, ones > 0, ones, ones > 2, True)
    assert corners[:, 1:3].tolist() == [[0, 0], [0, 500], [600, 0], [600, 500]]


# ---- the table

def test_what_the_table_says(tmp_path):
    probs = np.zeros((60, 80)); probs[10:30, 10:30] = .75; probs[15:17, 15:17] = 0     # 396 px, with a courtyard of 4
    probs[40:50, 70:80] = 1; probs[50:55, 20:24] = .9; probs[50:55, 24] = np.nan; probs[2:4, 60:62] = 1
    found = polygonise(write_map(tmp_path / "a.tif", probs, **UTM, dtype="float32"), .5, 1, how=How(min_hole_m2=1))
    assert list(found.columns) == ["instance", "area_m2", "mean_prob", "cut", "geometry"] and found.crs == "EPSG:32633"
    assert found.instance.tolist() == [1, 2, 3, 4] and found.area_m2.tolist() == [1, 99, 25, 5]
    assert found.cut.tolist() == [False, False, True, True] and np.allclose(found.mean_prob, [1, .75, 1, .9], atol=1e-6)
    assert len(found.geometry[1].interiors) == 1
    filled = polygonise(tmp_path / "a.tif", .5, 2, how=How(min_hole_m2=1.1))
    assert len(filled) == 3 and filled.area_m2[0] == 100 and not filled.geometry[0].interiors
    with pytest.raises(DataError, match="min_hole_m2 may be min_area_m2 at most"): polygonise(tmp_path / "a.tif", .5, 2, how=How(min_hole_m2=5))


@pytest.mark.parametrize("crs, lon, lat", [("EPSG:4326", 30, 60), ("EPSG:3857", 30, 60), ("EPSG:4326", 179.9, -45), ("EPSG:3857", -70, 1),
                                           ("EPSG:32635", 27, 60), ("EPSG:2263", -74, 40.7)])
def test_areas_are_those_of_the_ground(tmp_path, crs, lon, lat):
    from pyproj import Transformer
    there = Transformer.from_crs("EPSG:4326", crs, always_xy=True)
    (x, x1), (y, y1) = there.transform([lon, lon + 1e-4], [lat, lat + 5e-5])
    mask = np.zeros((30, 40), "uint8"); mask[5:20, 5:30] = 1
    write_raster(tmp_path / "a.tif", mask, crs, from_origin(x, y, (x1 - x) / 10, (y1 - y) / 10))
    found = polygonise(tmp_path / "a.tif", min_area_m2=1)
    ring = np.array(found.geometry[0].exterior.coords)
    degrees = Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(*ring.T)
    true = abs(Geod(ellps="WGS84").polygon_area_perimeter(*degrees)[0])
    assert found.area_m2[0] == pytest.approx(true, rel=2e-3)
    same(found, polygonise(tmp_path / "a.tif", min_area_m2=1, strip_rows=7))
    assert len(polygonise(tmp_path / "a.tif", min_area_m2=true * 1.01)) == 0 and len(polygonise(tmp_path / "a.tif", min_area_m2=true * .99)) == 1


def test_without_georeference_areas_are_pixels(tmp_path, caplog):
    probs = np.zeros((30, 30)); probs[3:9, 4:9] = 1
    with caplog.at_level(logging.WARNING): found = polygonise(write_map(tmp_path / "a.tif", probs, AERIAL_THRESHOLD=.5))
    assert "areas are pixels" in caplog.text and found.crs == PIXELS
    assert found.area_px.tolist() == [30] and found.geometry[0].bounds == (4, 3, 9, 9)


@pytest.mark.parametrize("probs", [np.full((20, 20), np.nan), np.zeros((20, 20))], ids=["no data", "no building"])
@pytest.mark.parametrize("split", ["none", "watershed", "border"])
def test_nothing_is_an_empty_table(tmp_path, probs, split):
    path = write_map(tmp_path / "a.tif", [probs, probs], ("building", "border"), **UTM)
    found = polygonise(path, .5, split=split, strip_rows=6)
    assert len(found) == 0 and list(found.columns) == ["instance", "area_m2", "mean_prob", "cut", "geometry"] and found.crs == "EPSG:32633"
    assert len(polygonise(path, .5, split=split, regularise=True)) == 0 == len(polygonise(path, .5, split=split, simplify_m=1))


def test_bands_and_borders(tmp_path):
    y, x = np.mgrid[:40, :60]
    row = ((y > 6) & (y < 33) & (x > 5) & (x < 55)).astype(float)
    edge = row * (abs(x - 30) < 2)
    both = write_map(tmp_path / "a.tif", [edge, row], ("border", "building"), **UTM)
    assert len(polygonise(both, .5)) == 2 and len(polygonise(both, .5, split="none")) == 1
    assert polygonise(both, .5).area_m2.sum() == row.sum() / 4
    one = write_map(tmp_path / "b.tif", row, ("",), **UTM)
    assert len(polygonise(one, .5)) == 1
    with pytest.raises(DataError, match="a band named border"): polygonise(one, .5, split="border")
    with pytest.raises(DataError, match="split is one of"): polygonise(one, .5, split="magic")
    several = write_map(tmp_path / "c.tif", [edge, row], ("water", "grass"), **UTM)
    with pytest.raises(DataError, match="which of water, grass are buildings"): polygonise(several, .5)
    assert len(polygonise(several, .5, how=How(band="grass"))) == 1
    with pytest.raises(DataError, match="min_area_m2"): polygonise(one, .5, -3)
    with pytest.raises(DataError, match="choose one"): polygonise(one, .5, regularise=True, simplify_m=1)
    with pytest.raises(DataError, match="depth"): How(depth=-1)


# ---- drawn outlines

def turned(crs=None):
    y, x = np.mgrid[:60, :60]
    u, v = (x - 30) * np.cos(.4) + (y - 30) * np.sin(.4), (y - 30) * np.cos(.4) - (x - 30) * np.sin(.4)
    return ((abs(u) < 20) & (abs(v) < 12)).astype(float)


@pytest.mark.parametrize("crs, transform", [("EPSG:32633", from_origin(5e5, 5e6, .5, .5)), (None, None),
                                            ("EPSG:4326", from_origin(15, 60, 9e-6, 4.5e-6)), ("EPSG:3857", from_origin(1e6, 8399737, 1, 1))])
def test_right_angles_anywhere(tmp_path, crs, transform):
    path = write_map(tmp_path / "a.tif", turned(), crs=crs, transform=transform)
    stairs, straight, fewer = polygonise(path, .5), polygonise(path, .5, regularise=True), polygonise(path, .5, simplify_m=.75 if crs else 1.5)
    assert straight.regularised.all() and fewer.simplified.all() and straight.crs == fewer.crs == stairs.crs
    for drawn, corners in ((straight, 6), (fewer, 14)):
        a, b = stairs.geometry[0], drawn.geometry[0]
        assert len(b.exterior.coords) <= corners and b.is_valid and a.intersection(b).area / a.union(b).area > .9
        assert drawn.iloc[0, 1] == pytest.approx(stairs.iloc[0, 1] * b.area / a.area, rel=1e-3)   # the area is that of the new outline


def test_an_outline_that_loses_its_building_stays(caplog, monkeypatch):
    table = gpd.GeoDataFrame({"instance": [1, 2, 3]}, geometry=[shapely.box(k * 50, 0, k * 50 + 20, 10) for k in range(3)], crs="EPSG:32633")
    bow = shapely.Polygon([(50, 0), (70, 10), (70, 0), (50, 10)])
    def library(given, **_): return gpd.GeoDataFrame({"row": [0, 1]}, geometry=[shapely.box(0, 0, 5, 5), bow])
    monkeypatch.setattr("aerial_nb.scenes.regular._library", lambda: library)
    with caplog.at_level(logging.WARNING): found = regularise_polygons(table)
    assert not found.regularised.any() and found.geometry.geom_equals(table.geometry).all() and "3 of 3 outlines stay" in caplog.text
    assert list(found.columns) == ["instance", "geometry", "regularised"]


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "buildingregulariser", None)
    path = write_map(tmp_path / "a.tif", turned(), **UTM)
    with pytest.raises(DataError, match=r"aerial_nb\[polygons\]"): polygonise(path, .5, regularise=True)
    assert len(simplify_polygons(polygonise(path, .5), 1)) == 1


# ---- proof

def noisy(truth, seed=0):
    rng = np.random.default_rng(seed)
    probs = cv2.GaussianBlur(truth.astype("float32"), (0, 0), 1.5) + .15 * cv2.GaussianBlur(rng.normal(0, 1, truth.shape).astype("float32"), (0, 0), 2)
    return probs.clip(0, 1)


def iou(a, b): return (a & b).sum() / (a | b).sum()


def test_vectorising_does_not_change_the_score(tmp_path):
    from aerial_nb.data.synthetic import scene
    drawn = scene(size=384, seed=13)
    truth = drawn.buildings == 1
    path = write_map(tmp_path / "a.tif", noisy(truth), crs=drawn.crs, transform=drawn.transform)
    mask = open_map(path, .5).read() >= .5
    burn = lambda t: rasterize(t.geometry, mask.shape, transform=drawn.transform) == 1
    for split in ("none", "watershed"): assert np.array_equal(burn(polygonise(path, .5, 0, split, strip_rows=50)), mask)
    assert abs(iou(burn(polygonise(path, .5, 2)), truth) - iou(mask, truth)) < .01
    assert abs(iou(burn(polygonise(path, .5, 2, regularise=True)), truth) - iou(mask, truth)) < .08   # right angles cost something


@pytest.mark.skipif(not REAL.is_dir(), reason="the OpenAerialMap roofs are not on this machine")
@pytest.mark.parametrize("index", [0, 9, 20])
def test_real_roofs(tmp_path, index):
    from aerial_nb.data.masks import read_class_map
    image = sorted((REAL / "images").glob("*.tif"))[index]
    truth = read_class_map(REAL / "masks" / image.name) == 1
    with rasterio.open(image) as d: crs, transform = d.crs, d.transform
    path = write_map(tmp_path / "a.tif", noisy(truth), crs=crs, transform=transform)
    mask = open_map(path, .5).read() >= .5
    found = polygonise(path, .5, 0)
    assert np.array_equal(rasterize(found.geometry, mask.shape, transform=transform) == 1, mask)   # the score cannot differ
    large = polygonise(path, .5, 4)
    assert abs(iou(rasterize(large.geometry, mask.shape, transform=transform) == 1, truth) - iou(mask, truth)) < .01
    geod = Geod(ellps="WGS84")
    true = [abs(geod.geometry_area_perimeter(g)[0]) for g in found.to_crs("EPSG:4326").geometry]
    assert np.allclose(found.area_m2, true, rtol=1e-3)   # web mercator, on the ground
    same(found, polygonise(path, .5, 0, strip_rows=100))
