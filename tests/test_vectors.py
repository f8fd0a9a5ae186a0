"""Behaviour of aerial_nb.data.vectors: every format, and no layer whose place is a guess."""

from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pyogrio
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyproj.exceptions import ProjError

from aerial_nb.data.raster import DataError
from aerial_nb.data.vectors import PIXELS, list_layers, open_layer, read_layer, resolve_crs

REAL = Path(__file__).parents[1] / "../shared/data"
FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=12)
LOCAL = 'LOCAL_CS["{}",UNIT["{}",{}],AXIS["Easting",EAST],AXIS["Northing",NORTH]]'


def boxes(crs="EPSG:32633", east=400_000, n=3):
    x = east + np.arange(n) * 100.0
    return gpd.GeoDataFrame({"kind": list("abc")[:n]}, geometry=shapely.box(x, 10, x + 50, 60), crs=crs)


def degrees():
    return gpd.GeoDataFrame({"kind": ["a"]}, geometry=[shapely.box(12.5, 41.9, 12.6, 42.0)], crs=4326)


def saved(path, table):
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".csv":
        table.to_wkt().to_csv(path, index=False)
    else:
        table.to_file(path)
    return path


# Formats


@pytest.mark.parametrize("name", ["a.gpkg", "a.geojson", "a.shp", "a.parquet", "a.fgb", "a.csv"])
@pytest.mark.parametrize("z", [False, True])
def test_formats_give_the_same_table(tmp_path, name, z):
    table = boxes()
    if z:
        table = table.set_geometry(shapely.force_3d(table.geometry.array, 7.0))
    file = saved(tmp_path / name, table)
    back = read_layer(file, crs="EPSG:32633" if name.endswith("csv") else None).sort_values("kind")
    assert back.crs == "EPSG:32633" and back.active_geometry_name == "geometry"
    assert back["kind"].tolist() == list("abc")
    assert shapely.equals(shapely.force_2d(back.geometry.array), shapely.force_2d(table.geometry.array)).all()


def test_a_geodataframe_is_a_layer_too():
    table = boxes().rename_geometry("shape")
    assert read_layer(table).active_geometry_name == "geometry"
    assert table.active_geometry_name == "shape"  # the caller's table stays as it was
    assert read_layer(boxes(crs=None), crs="EPSG:32633").crs == "EPSG:32633"


@pytest.mark.parametrize("name", ["a.gpkg", "a.geojson", "a.shp", "a.parquet", "a.csv"])
def test_empty_layers(tmp_path, name):
    file = saved(tmp_path / name, boxes().iloc[:0])
    layer = open_layer(file, crs="EPSG:32633" if name.endswith(("csv", "shp")) else None)
    assert layer.count == 0 and len(layer.near((0, 0, 1, 1))) == 0


def test_bbox_and_columns(tmp_path):
    table = boxes().assign(other=1)
    for name in ("a.gpkg", "a.geojson", "a.parquet", "a.csv"):
        file = saved(tmp_path / name, table)
        crs = "EPSG:32633" if name.endswith("csv") else None
        near = read_layer(file, crs=crs, bbox=(400_090, 0, 400_120, 20))
        assert near["kind"].tolist() == ["b"]
    assert "other" not in read_layer(tmp_path / "a.gpkg", columns=["kind"])


# Layers of one file


def test_several_layers_are_named(tmp_path):
    file = tmp_path / "town.gpkg"
    for name in ("houses", "roads"):
        boxes().to_file(file, layer=name)
    assert list_layers(file)[["name", "features"]].to_numpy().tolist() == [["houses", 3], ["roads", 3]]
    with pytest.raises(DataError, match=r"houses \(Polygon, 3\); roads .* pass layer="):
        read_layer(file)
    with pytest.raises(DataError, match="'trees' is not one of them"):
        read_layer(file, "trees")
    assert len(read_layer(file, "roads")) == 3


def test_a_table_beside_one_layer_is_no_choice(tmp_path):
    file = saved(tmp_path / "a.gpkg", boxes())
    pyogrio.write_dataframe(pd.DataFrame({"note": ["x"]}), file, layer="notes", append=True)
    assert len(read_layer(file)) == 3
    with pytest.raises(DataError, match="'notes' is not one of them"):
        read_layer(file, "notes")


def test_what_is_no_layer(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_layer(tmp_path / "none.gpkg")
    for name in ("bad.gpkg", "bad.geojson", "bad.shp", "bad.parquet", "bad.txt"):
        (tmp_path / name).write_bytes(b"no labels in here")
        with pytest.raises(DataError, match=rf"{name}: no readable"):
            read_layer(tmp_path / name)


# CRS


def test_degrees_without_crs_are_named(tmp_path):
    file = saved(tmp_path / "a.shp", degrees())
    file.with_suffix(".prj").unlink()
    with pytest.raises(DataError, match=r"states no CRS, .* look like degrees: if they are, pass crs='EPSG:4326'"):
        read_layer(file)
    assert read_layer(file, crs="EPSG:4326").crs == "EPSG:4326"


def test_metres_without_crs_are_named(tmp_path):
    file = saved(tmp_path / "a.shp", boxes())
    file.with_suffix(".prj").unlink()
    with pytest.raises(DataError, match=r"\(400,000, 10\) to \(400,250, 60\), are no degrees: pass the CRS"):
        read_layer(file)
    with pytest.raises(DataError, match="the CRS is WGS 84, in degrees, but the coordinates"):
        read_layer(file, crs="EPSG:4326")
    with pytest.raises(DataError, match="states no CRS"):
        read_layer(boxes(crs=None))


def test_a_geojson_is_in_degrees_by_standard(tmp_path):
    plain = saved(tmp_path / "plain.geojson", degrees().set_crs(None, allow_override=True))
    assert "crs" not in plain.read_text() and read_layer(plain).crs == "EPSG:4326"
    metres = saved(tmp_path / "metres.geojson", boxes(crs=None))
    with pytest.raises(DataError, match="in degrees, but the coordinates, .* are no degrees"):
        read_layer(metres)
    assert read_layer(metres, crs="EPSG:32633").total_bounds[0] == 400_000
    assert read_layer(metres, crs="pixels").crs == PIXELS


def test_what_a_file_states_is_not_overruled(tmp_path):
    file = saved(tmp_path / "a.geojson", boxes())
    with pytest.raises(DataError, match="states WGS 84 / UTM zone 33N, but crs=WGS 84 was passed"):
        read_layer(file, crs="EPSG:4326")
    assert read_layer(file, crs="EPSG:32633").crs == "EPSG:32633"


@pytest.mark.parametrize("bad", ["EPSG:999999", "somewhere", ""])
def test_a_crs_nobody_knows(bad):
    with pytest.raises(DataError, match="is no CRS; give one such as"):
        resolve_crs(bad)


@pytest.mark.parametrize(
    ("name", "unit", "factor", "epsg"),
    [
        ("WGS 84 / Pseudo-Mercator", "metre", 1, 3857),
        ("WGS 84 / UTM zone 15N", "metre", 1, 32615),
        ("WGS_1984_UTM_Zone_15N", "metre", 1, 32615),
        ("NAD83 / Pennsylvania South (ftUS)", "US survey foot", 0.304800609601219, 2272),
    ],
)
def test_a_local_crs_that_names_a_real_one(name, unit, factor, epsg):
    assert resolve_crs(LOCAL.format(name, unit, factor)).to_epsg() == epsg


@pytest.mark.parametrize(
    ("name", "unit", "factor"),
    [
        ("Site grid", "metre", 1),
        ("Popular Visualisation", "metre", 1),  # PROJ would find EPSG:3857 for a part of its name
        ("WGS 84 / Pseudo-Mercator", "foot", 0.3048),  # the unit contradicts the name
        ("WGS 84", "metre", 1),
    ],
)
def test_a_local_crs_that_names_none(name, unit, factor):
    with pytest.raises(DataError, match=f"a local one, '{name}', and no known CRS"):
        resolve_crs(LOCAL.format(name, unit, factor), "a.tif")


def test_a_local_crs_with_an_authority():
    wkt = 'LOCAL_CS["mosaic",UNIT["metre",1],AXIS["E",EAST],AXIS["N",NORTH],AUTHORITY["EPSG","3857"]]'
    assert resolve_crs(wkt).to_epsg() == 3857


def test_pixels_lead_nowhere():
    assert resolve_crs("pixels") == PIXELS == resolve_crs(PIXELS)
    with pytest.raises(ProjError):
        boxes(crs=PIXELS).to_crs(4326)


# WKT


def table(tmp_path, **columns):
    pd.DataFrame(columns).to_csv(tmp_path / "t.csv", index=False)
    return tmp_path / "t.csv"


SQUARE = "POLYGON ((1 1, 5 1, 5 5, 1 5, 1 1))"


def test_columns_of_wkt(tmp_path):
    file = table(tmp_path, id=[1], PolygonWKT_Pix=[SQUARE], PolygonWKT_Geo=["POLYGON Z ((7 50 0, 8 50 0, 8 51 0, 7 50 0))"])
    with pytest.raises(DataError, match="several columns of WKT, PolygonWKT_Pix, PolygonWKT_Geo; pass geometry="):
        read_layer(file)
    assert read_layer(file, crs="pixels").total_bounds.tolist() == [1, 1, 5, 5]
    assert read_layer(file, crs="EPSG:4326").total_bounds.tolist() == [7, 50, 8, 51]
    assert read_layer(file, geometry="PolygonWKT_Pix").crs == PIXELS
    with pytest.raises(DataError, match="states no CRS"):
        read_layer(file, geometry="PolygonWKT_Geo")
    with pytest.raises(DataError, match="no column 'shape'; it has id, PolygonWKT_Pix"):
        read_layer(file, geometry="shape")
    with pytest.raises(DataError, match="no column of WKT; it has id"):
        read_layer(table(tmp_path, id=[1], note=["POLYGON, they said"]))


def test_wkt_that_states_its_crs(tmp_path):
    assert read_layer(table(tmp_path, wkt=["SRID=32633;" + SQUARE])).crs == "EPSG:32633"
    with pytest.raises(DataError, match="rows in several CRS, EPSG:32633, EPSG:4326"):
        read_layer(table(tmp_path, wkt=["SRID=32633;" + SQUARE, "srid=4326;" + SQUARE]))


def test_wkt_that_is_cut_off(tmp_path):
    file = table(tmp_path, wkt=[SQUARE, None, SQUARE[:20], SQUARE])
    with pytest.raises(DataError, match=r"1 of 4 rows of 'wkt' hold no readable WKT, first on line 4: 'POLYGON \(\(1 1, 5 1,'"):
        read_layer(file, crs="pixels")


def test_empty_wkt_is_counted(tmp_path):
    layer = open_layer(table(tmp_path, geom_pix=[SQUARE, "POLYGON EMPTY", None]))
    assert (layer.count, layer.empty, layer.bounds) == (3, 2, (1, 1, 5, 5))


# Large layers


@FIXTURE
@given(st.tuples(*[st.floats(-50, 350)] * 4))
def test_a_layer_on_disk_answers_like_one_in_memory(tmp_path, box):
    file = tmp_path / "a.gpkg"
    if not file.exists():
        saved(file, boxes())
    bounds = (400_000 + min(box[:2]), min(box[2:]), 400_000 + max(box[:2]), max(box[2:]))
    disk, memory = open_layer(file, memory_mb=0), open_layer(file)
    assert disk.table is None and disk.bounds == memory.bounds and disk.count == memory.count == 3
    assert sorted(disk.near(bounds)["kind"]) == sorted(memory.near(bounds)["kind"])
    assert disk.near(bounds).crs == memory.crs


def test_rows_of_one_image():
    rows = gpd.GeoDataFrame({"ImageId": ["img1", "img1", "img11"]}, geometry=shapely.box([0, 1, 2], 0, 5, 5), crs=PIXELS)
    layer = open_layer(rows)
    assert layer.only("ImageId", "img1").count == 2 and layer.only("ImageId", "PAN_img11").count == 1
    for wrong in ("myimg1", "img2"):
        with pytest.raises(DataError, match=f"no row with '{wrong}'"):
            layer.only("ImageId", wrong)
    with pytest.raises(DataError, match="no column 'tile'; it has ImageId"):
        layer.only("tile", "img1")


# Published files


def real(*parts):
    path = REAL.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the real data {'/'.join(parts)} is not on this machine")
    return path


def test_real_spacenet_csv():
    file = real("spacenet", "footprint_scoring", "sn2", "SN2_sample_truth.csv")
    layer = open_layer(file, crs="pixels")
    names = pd.read_csv(file)["ImageId"]
    assert layer.count == len(names) and 600 < layer.bounds[2] <= 651
    assert layer.only("ImageId", f"PAN_{names[0]}").count == (names == names[0]).sum()


def test_real_geojson_in_two_crs():
    one, two = (read_layer(real("spacenet", "atlanta_buildings", f"gt_epsg{c}.geojson")) for c in (32616, 4326))
    assert one.crs == "EPSG:32616" and two.crs.equals("EPSG:4326", ignore_axis_order=True)
    assert shapely.hausdorff_distance(one.geometry.array, two.to_crs(32616).geometry.array).max() < 0.01
