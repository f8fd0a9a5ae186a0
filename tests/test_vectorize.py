"""Files for a GIS, and the command aerial_vectorize."""
import errno
import json
import logging
import resource
import sys

import geopandas as gpd
import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
from rasterio.transform import from_origin

from aerial_nb.data.raster import DataError, write_raster
from aerial_nb.data.vectors import PIXELS, read_layer
from aerial_nb.scenes import vectorize
from aerial_nb.scenes.probmap import open_map
from aerial_nb.scenes.vectorize import aerial_vectorize, what_is_in, write_vectors
from aerial_nb.training.records import DiskFull

UTM = {"crs": "EPSG:32633", "transform": from_origin(5e5, 5e6, 0.5, 0.5)}


def table(n=3, crs="EPSG:32633"):
    "Squares with courtyards, at coordinates with many digits."
    rng = np.random.default_rng(0)
    west, north = 5e5 + rng.random(n) * 900, 5e6 + rng.random(n) * 900
    geoms = [shapely.box(x, y, x + 20 / 3, y + 30 / 7) - shapely.box(x + 1, y + 1, x + 2, y + 2) for x, y in zip(west, north)]
    return gpd.GeoDataFrame({"instance": np.arange(1, n + 1), "area_m2": rng.random(n) * 99, "mean_prob": rng.random(n), "cut": rng.random(n) < .5},
                            geometry=geoms, crs=crs)


def building_map(path, names=("building",), place=UTM, holes=True, **tags):
    mask = np.zeros((len(names), 60, 80)); mask[:, 10:30, 10:40] = 1; mask[:, 40:58, 50:80] = .8
    data = np.rint(mask * 254).astype("uint8"); data[:, :3] = 255
    write_raster(path, data, nodata=255, **place)
    with rasterio.open(path, "r+") as d:
        d.scales, d.descriptions = (1 / 254,) * len(names), names
        d.update_tags(AERIAL_THRESHOLD=.5, **tags)
    return path


# ---- files

@pytest.mark.parametrize("name", ["a.gpkg", "a.parquet"])
@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:3857", None, PIXELS], ids=str)
def test_what_is_written_is_read_back(tmp_path, name, crs):
    made = table(crs=crs)
    path = write_vectors(made, tmp_path / "new" / name)
    read = gpd.read_parquet(path) if name.endswith("parquet") else gpd.read_file(path)
    assert shapely.equals_exact(read.geometry.to_numpy(), made.geometry.to_numpy(), 0).all()
    assert read.drop(columns="geometry").astype({"instance": "int64"}).equals(made.drop(columns="geometry"))
    if crs in ("EPSG:32633", "EPSG:3857"): assert read.crs == crs
    else:
        if name.endswith("parquet"): assert read.crs is None
        assert read_layer(path, crs="pixels").crs == PIXELS
    assert [p.name for p in (tmp_path / "new").iterdir()] == [name]


def test_geojson_is_as_the_standard_says(tmp_path):
    made = table()
    made.geometry = made.geometry.reverse()   # the wrong way round
    path = write_vectors(made, tmp_path / "a.geojson")
    text = json.loads(path.read_text())
    assert "crs" not in text and len(text["features"]) == 3
    for feature in text["features"]:
        outside, courtyard = feature["geometry"]["coordinates"]
        assert shapely.is_ccw(shapely.linearrings(outside)) and not shapely.is_ccw(shapely.linearrings(courtyard))
        assert abs(outside[0][0] - 15) < 1 and abs(outside[0][1] - 45) < 1   # longitude first
    back = gpd.read_file(path)
    assert back.crs == "EPSG:4326"
    assert (back.to_crs(made.crs).hausdorff_distance(made) < 1e-3).all()
    with pytest.raises(DataError, match="no georeference"): write_vectors(table(crs=PIXELS), tmp_path / "b.geojson")
    assert not (tmp_path / "b.geojson").exists()


@pytest.mark.parametrize("name", ["a.gpkg", "a.parquet", "a.geojson"])
def test_an_empty_table_is_a_file_with_columns(tmp_path, name):
    path = write_vectors(table()[:0], tmp_path / name)
    read = gpd.read_parquet(path) if name.endswith("parquet") else gpd.read_file(path)
    assert len(read) == 0 and read.crs == ("EPSG:4326" if name.endswith("json") else "EPSG:32633")
    if not name.endswith("json"): assert list(read.columns) == list(table().columns)


def test_layers_and_refusals(tmp_path):
    lines = gpd.GeoDataFrame({"length_m": [5.]}, geometry=[shapely.LineString([(0, 0), (3, 4)])], crs="EPSG:32633")
    points = gpd.GeoDataFrame({"node": [0, 1]}, geometry=[shapely.Point(0, 0), shapely.Point(3, 4)], crs="EPSG:32633")
    write_vectors({"roads": lines, "nodes": points}, tmp_path / "a.gpkg")
    assert sorted(pyogrio.list_layers(tmp_path / "a.gpkg")[:, 0]) == ["nodes", "roads"]
    with pytest.raises(DataError, match="only a .gpkg holds several"): write_vectors({"roads": lines, "nodes": points}, tmp_path / "a.parquet")
    for name, words in (("a.shp", "none of the endings"), ("a", "none of the endings"), ("a.gpkg", "exists")):
        with pytest.raises(DataError, match=words): write_vectors(lines, tmp_path / name)
    (tmp_path / "b.gpkg").mkdir()
    with pytest.raises(DataError, match="is a folder"): write_vectors(lines, tmp_path / "b.gpkg")
    write_vectors(table(), tmp_path / "a.gpkg", overwrite=True)
    assert pyogrio.list_layers(tmp_path / "a.gpkg")[:, 0].tolist() == ["buildings"]   # the older layers are gone


@pytest.mark.parametrize("name", ["a.gpkg", "a.parquet", "a.geojson"])
def test_a_full_disk_leaves_what_was_there(tmp_path, name):
    "Files may grow to 50 kB only, which is how a full disk looks to a writer."
    path = write_vectors(table(), tmp_path / name)
    before, large = path.read_bytes(), table(4000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises((DiskFull, DataError)): write_vectors(large, path, overwrite=True)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [name]


def test_a_writer_that_dies_leaves_nothing(tmp_path, monkeypatch):
    def dies(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(vectorize, "_write_layer", dies)
    with pytest.raises(DiskFull, match="what was there before is intact"): write_vectors(table(), tmp_path / "a.gpkg")
    monkeypatch.setattr(vectorize, "_write_layer", lambda t, part, *_: part.write_bytes(b""))
    monkeypatch.setattr(vectorize, "_count", lambda *_: 2)
    with pytest.raises(DataError, match="2 of 3 rows"): write_vectors(table(), tmp_path / "a.gpkg")
    assert not list(tmp_path.iterdir())


# ---- the command

def call(monkeypatch, *words) -> int: # exit code
    monkeypatch.setattr(sys, "argv", ["aerial_vectorize", *map(str, words)])
    try: aerial_vectorize()
    except SystemExit as stop: return stop.code or 0
    return 0


def test_the_command_makes_buildings(tmp_path, monkeypatch, caplog):
    path = building_map(tmp_path / "m.tif", AERIAL_DAMAGED="0 0 3 80")
    with caplog.at_level(logging.INFO): assert call(monkeypatch, path, tmp_path / "b.gpkg", "--min-area-m2", 5, "--strip_rows", 7) == 0
    found = gpd.read_file(tmp_path / "b.gpkg")
    assert found.area_m2.tolist() == [150, 135] and found.cut.tolist() == [False, True] and found.crs == "EPSG:32633"
    assert "2 buildings" in caplog.text and "1 blocks of the map have no data" in caplog.text
    assert call(monkeypatch, path, tmp_path / "b.gpkg") == 2 and "exists" in caplog.text
    assert call(monkeypatch, path, tmp_path / "b.gpkg", "--overwrite", "--threshold", .9, "--regularise") == 0
    found = gpd.read_file(tmp_path / "b.gpkg")
    assert len(found) == 1 and bool(found.regularised[0]) and found.geometry[0].area == pytest.approx(150, rel=.05)
    assert call(monkeypatch, path, tmp_path / "b.geojson", "--min_area_m2", 140) == 0 and len(gpd.read_file(tmp_path / "b.geojson")) == 1


@pytest.mark.parametrize("words, said", [
    (["--threshold", 7], "lies in 0..1"), (["--threshold", 0], "lies in 0..1"), (["--split", "border"], "a band named border"),
    (["--split", "magic"], "split is one of"), (["--what", "trees"], "buildings, roads or auto"), (["--min_area_m2", -1], "0 or more"),
    (["--band", "roof"], "no band 'roof'"), (["--regularise", "--simplify_m", 1], "choose one"),
    (["--gap_m", 0], "--gap_m is for roads"), (["--low", .2, "--prune_m", 5], "--low and --prune_m are for roads"), (["--gsd_m", 1], "--gsd_m is for roads"),
    (["--what", "roads", "--split", "watershed", "--gap_m", 5], "--split is for buildings"), (["--what", "roads", "--regularise"], "--regularise is for buildings"),
    (["--what", "roads", "--gap_m", -1], "gap_m is 0 or more"), (["--what", "roads", "--low", .9], "low=0.9 and threshold=0.5")], ids=str)
def test_what_cannot_be_is_refused(tmp_path, monkeypatch, caplog, words, said):
    assert call(monkeypatch, building_map(tmp_path / "m.tif"), tmp_path / "b.gpkg", *words) == 2
    assert said in caplog.text and not (tmp_path / "b.gpkg").exists() and "Traceback" not in caplog.text


def test_bad_maps_and_outputs(tmp_path, monkeypatch, caplog):
    write_raster(tmp_path / "photo.tif", np.random.default_rng(0).integers(0, 255, (3, 40, 40)).astype("uint8"))
    assert call(monkeypatch, tmp_path / "photo.tif", tmp_path / "b.gpkg") == 2 and "an image, not a map" in caplog.text
    assert call(monkeypatch, tmp_path / "none.tif", tmp_path / "b.gpkg") == 2 and "no such file" in caplog.text
    path = building_map(tmp_path / "m.tif")
    assert call(monkeypatch, path, tmp_path / "b.shp") == 2 and "none of the endings" in caplog.text
    monkeypatch.setitem(sys.modules, "buildingregulariser", None)
    assert call(monkeypatch, path, tmp_path / "b.gpkg", "--regularise") == 2 and "aerial_nb[polygons]" in caplog.text
    def full(*_, **__): raise DiskFull(errno.ENOSPC, "no space left for b.gpkg")
    monkeypatch.setattr(vectorize, "write_vectors", full)
    assert call(monkeypatch, path, tmp_path / "b.gpkg") == 3


def test_a_map_without_place(tmp_path, monkeypatch, caplog):
    path = building_map(tmp_path / "m.tif", place={})
    assert call(monkeypatch, path, tmp_path / "b.gpkg") == 0 and "areas are pixels" in caplog.text
    assert gpd.read_file(tmp_path / "b.gpkg").area_px.tolist() == [600, 540]
    assert call(monkeypatch, path, tmp_path / "b.geojson") == 2 and "no georeference" in caplog.text


@pytest.mark.parametrize("value", [0, 255], ids=["no building", "no data"])
def test_a_map_of_nothing_is_an_empty_file(tmp_path, monkeypatch, value):
    path = building_map(tmp_path / "m.tif")
    with rasterio.open(path, "r+") as d: d.write(np.full((1, 60, 80), value, "uint8"))
    assert call(monkeypatch, path, tmp_path / "b.gpkg") == 0
    found = gpd.read_file(tmp_path / "b.gpkg")
    assert len(found) == 0 and "area_m2" in found.columns and found.crs == "EPSG:32633"


def test_what_a_map_holds(tmp_path):
    for names, kind in ((("building",), "buildings"), (("roof", "border"), "buildings"), (("road",), "roads"), (("main road", "street"), "roads")):
        assert what_is_in(open_map(building_map(tmp_path / "m.tif", names))) == kind
    for names, said in ((("water",), "neither"), (("",), "neither"), (("road", "building"), "both")):
        with pytest.raises(DataError, match=f"{said}.*--what"): what_is_in(open_map(building_map(tmp_path / "m.tif", names)))
    assert what_is_in(open_map(building_map(tmp_path / "m.tif", ("",), AERIAL_CLASS="road"))) == "roads"


def test_the_command_makes_roads(tmp_path, monkeypatch):
    pytest.importorskip("aerial_nb.scenes.centrelines", reason="the chapter on centre lines is not there")
    mask = np.zeros((200, 260), "uint8"); mask[95:105] = 254; mask[:, 125:135] = 254
    path = building_map(tmp_path / "m.tif", ("road",))
    write_raster(path, mask, nodata=255, **UTM)
    with rasterio.open(path, "r+") as d: d.scales, d.descriptions = (1 / 254,), ("road",); d.update_tags(AERIAL_THRESHOLD=.5)
    assert call(monkeypatch, path, tmp_path / "r.gpkg") == 0
    roads, nodes = (gpd.read_file(tmp_path / "r.gpkg", layer=name) for name in ("roads", "nodes"))
    assert len(roads) == 4 and sorted(nodes.degree) == [1, 1, 1, 1, 4] and roads.length_m.sum() == pytest.approx(230, rel=.1)
    assert call(monkeypatch, path, tmp_path / "r.geojson") == 0 and len(gpd.read_file(tmp_path / "r.geojson")) == 4


def street_map(path):
    "A long road with a gap of 12 m and a dead end of 15 m, a road of 40 m by itself, and one that is unsure from the middle on; pixels of 0.5 m."
    probs = np.zeros((240, 400))
    probs[40:50] = 1; probs[40:50, 180:204] = 0          # the gap
    probs[50:80, 300:310] = 1                             # the dead end
    probs[110:120, 20:100] = 1                            # alone
    probs[180:190, :200] = 1; probs[180:190, 200:] = .3   # unsure
    write_raster(path, np.rint(probs * 254).astype("uint8"), nodata=255, **UTM)
    with rasterio.open(path, "r+") as d: d.scales, d.descriptions = (1 / 254,), ("road",); d.update_tags(AERIAL_THRESHOLD=.5)
    return path


@pytest.mark.parametrize("words, rules", [
    ([], {}), (["--gap_m", 5], dict(gap_m=5)), (["--prune-m", 30], dict(prune_m=30)), (["--min_length_m", 50], dict(min_length_m=50)),
    (["--low", .2], dict(low=.2)), (["--min-area-m2", 500], dict(min_area_m2=500)), (["--simplify_m", 3], dict(simplify_m=3)), (["--gap_m", 0], dict(gap_m=0))], ids=str)
def test_road_rules_from_the_command_line(tmp_path, monkeypatch, words, rules):
    from aerial_nb.scenes.centrelines import map_roads
    path = street_map(tmp_path / "m.tif")
    assert call(monkeypatch, path, tmp_path / "r.gpkg", *words) == 0
    found, want = gpd.read_file(tmp_path / "r.gpkg", layer="roads"), map_roads(path, **rules).lines
    assert len(found) == len(want) and shapely.equals_exact(found.geometry.to_numpy(), want.geometry.to_numpy(), 1e-6).all()
    usual, total = map_roads(path).lines, found.length_m.sum()
    if words and words[0] == "--low": assert total > usual.length_m.sum() + 80
    elif words and words[0] != "--simplify_m": assert total < usual.length_m.sum() - 8, "each of these rules takes something away here"


def test_a_named_class_of_roads(tmp_path, monkeypatch, caplog):
    path = building_map(tmp_path / "m.tif", ("road", "track"))
    with rasterio.open(path, "r+") as d: d.write(np.zeros((60, 80), "uint8"), 1); d.write(np.pad(np.full((8, 80), 254, "uint8"), ((26, 26), (0, 0))), 2)
    assert call(monkeypatch, path, tmp_path / "a.gpkg", "--what", "roads") == 0 and len(gpd.read_file(tmp_path / "a.gpkg", layer="roads")) == 0
    assert call(monkeypatch, path, tmp_path / "b.gpkg", "--band", "track") == 0 and len(gpd.read_file(tmp_path / "b.gpkg", layer="roads")) == 1
    assert call(monkeypatch, path, tmp_path / "c.gpkg", "--band", "path") == 2 and "no band 'path'" in caplog.text
