"""Behaviour of aerial_nb.data.ground and aerial_nb.data.burn: labels land on their pixels, and every feature is accounted for."""

from dataclasses import replace
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pyproj import CRS, Geod
from shapely import affinity

from aerial_nb.data.burn import (
    BurnReport,
    Rules,
    as_ids,
    burn,
    burn_instances,
    place_shapes,
)
from aerial_nb.data.ground import Grid, image_grid, measuring_crs, reproject
from aerial_nb.data.masks import read_class_map
from aerial_nb.data.raster import DataError, read_pixels, write_raster
from aerial_nb.data.vectors import PIXELS, open_layer, resolve_crs

REAL = Path(__file__).parents[1] / "../shared/data"
QUICK = settings(deadline=None, max_examples=25)
UTM = CRS("EPSG:32633")
GRID = Grid((60, 80), UTM, Affine(0.5, 0, 500_000, 0, -0.5, 5_400_000))


def frame(*geoms, crs=UTM, **columns):
    return gpd.GeoDataFrame(columns, geometry=list(geoms), crs=crs)


def at(geom, grid=GRID):
    "A geometry in pixels, as it lies on the map."
    t = grid.transform
    return affinity.affine_transform(geom, [t.a, t.b, t.d, t.e, t.c, t.f])


def box(x0, y0, x1, y1, grid=GRID):
    return at(shapely.box(x0, y0, x1, y1), grid)


def oracle(geom, grid=GRID):
    "Pixels whose centre lies inside, one by one."
    rows, cols = np.mgrid[: grid.shape[0], : grid.shape[1]] + 0.5
    x, y = (
        grid.transform.a * cols + grid.transform.b * rows + grid.transform.c,
        grid.transform.d * cols + grid.transform.e * rows + grid.transform.f,
    )
    return shapely.contains_xy(geom, x, y)


def real(*parts):
    path = REAL.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the real data {'/'.join(parts)} is not on this machine")
    return path


# Published masks, pixel for pixel


def test_real_roofs_come_out_identical():
    folder = real("roofs", "oam_1024")
    images = sorted((folder / "images").glob("*.tif"))
    assert len(images) == 24
    for image in images:
        mask, report = burn(image, folder / "labels" / f"{image.stem}.geojson")
        assert (mask == read_class_map(folder / "masks" / image.name)).all(), image.name
        assert report.burned == report.read - report.outside > 0


def test_real_atlanta_comes_out_identical():
    folder = real("spacenet", "atlanta_buildings")
    mask, report = burn(folder / "image_pan_epsg32616.tif", folder / "image_pan_labels_epsg32616.geojson")
    assert (mask == read_class_map(folder / "image_pan_labels_expected_mask.tif")).all()
    assert report.burned == 43


def test_real_vegas_roads_come_out_identical():
    folder = real("spacenet", "vegas_roads")
    image, roads = folder / "image_pan.tif", folder / "roads.geojson"
    expected = read_class_map(folder / "roads_expected_mask_4m.tif")
    assert (burn(image, roads, Rules(width_m=4))[0] == expected).all()
    assert 0 < (burn(image, roads, Rules(width_m=4, metric="aeqd"))[0] != expected).sum() < 20


# Polygons


@st.composite
def polygons(draw):
    "Stars with a hole, in pixels: simple, often concave, partly outside."
    n = draw(st.integers(3, 9))
    angle = np.sort(draw(st.lists(st.floats(0, 6.28), min_size=n, max_size=n, unique=True)))
    radius = np.array(draw(st.lists(st.floats(4, 40), min_size=n, max_size=n)))
    x, y = draw(st.floats(-5, 85)), draw(st.floats(-5, 65))
    star = shapely.make_valid(shapely.Polygon(np.c_[x + radius * np.cos(angle), y + radius * np.sin(angle)]))
    shape = star.difference(shapely.Point(x, y).buffer(draw(st.floats(0.1, 3))))
    assume(shape.area > 1)
    return shapely.union_all([g for g in shapely.get_parts(shape) if g.geom_type == "Polygon"])


@QUICK
@given(polygons(), st.booleans(), st.floats(-0.7, 0.7))
def test_a_pixel_is_burned_when_its_centre_is_inside(shape, all_touched, turn):
    t = GRID.transform
    turned = Affine(t.a * np.cos(turn), -t.a * np.sin(turn), t.c, -t.a * np.sin(turn), -t.a * np.cos(turn), t.f)
    grid = replace(GRID, transform=turned)
    geom = at(shape, grid)
    mask, report = burn(grid, frame(geom), Rules(all_touched=all_touched), allow_outside=True)
    inside = oracle(geom, grid)
    rim = oracle(geom.boundary.buffer(1e-6), grid)
    if all_touched:
        assert (mask[inside & ~rim] == 1).all()
    else:
        assert ((mask == 1) == inside)[~rim].all()
    assert report.read == report.burned + report.outside + report.empty + report.dropped == 1


def test_parts_holes_z_and_collections():
    hole = box(10, 10, 30, 30).difference(box(15, 15, 25, 25))
    parts = [
        shapely.MultiPolygon([hole, box(40, 10, 50, 20)]),
        shapely.force_3d(box(60, 10, 70, 20), 9.0),
        shapely.GeometryCollection(
            [box(10, 40, 20, 50), at(shapely.Point(1, 1)), shapely.GeometryCollection([box(30, 40, 40, 50)])]
        ),
    ]
    mask, report = burn(GRID, frame(*parts))
    assert (mask == oracle(shapely.union_all([shapely.force_2d(p.buffer(0)) for p in parts[:2]] + [box(10, 40, 20, 50), box(30, 40, 40, 50)]))).all()
    assert report == BurnReport(read=3, burned=3)


def test_a_bow_tie_is_repaired_and_counted():
    bow = at(shapely.Polygon([(10, 10), (50, 50), (50, 10), (10, 50)]))
    mask, report = burn(GRID, frame(bow, box(60, 10, 70, 20)))
    wings = at(shapely.Polygon([(10, 10), (30, 30), (10, 50)])), at(shapely.Polygon([(50, 10), (30, 30), (50, 50)]))
    edge = oracle(shapely.union_all([w.boundary for w in wings]).buffer(1e-6))  # centres exactly on the diagonals
    assert ((mask == 1) == oracle(shapely.union_all([*wings, box(60, 10, 70, 20)])))[~edge].all()
    assert (report.repaired, report.burned) == (1, 2)


def test_overlapping_parts_do_not_cancel_out():
    both = shapely.MultiPolygon([box(10, 10, 30, 30), box(20, 20, 40, 40)])
    assert not both.is_valid
    assert (burn(GRID, frame(both))[0] == oracle(shapely.union_all(list(both.geoms)))).all()


def test_every_feature_is_accounted_for():
    nan = shapely.Polygon([(500_001, 5_399_999), (np.nan, 5_399_990), (500_009, 5_399_990)])
    flat = at(shapely.Polygon([(1, 1), (9, 9), (1, 1)]))
    table = frame(box(10, 10, 30, 30), None, shapely.Polygon(), flat, nan, box(5, 5, 5.4, 5.4), box(900, 0, 950, 9))
    mask, report = burn(GRID, table)
    assert (mask == oracle(box(10, 10, 30, 30))).all()
    assert report.read == 7 == report.burned + report.outside + report.empty + report.dropped
    assert (report.burned, report.outside, report.tiny) == (2, 1, 1) and report.empty + report.dropped == 4
    assert str(report).startswith("2 of 7 features burned (1 outside")


kinds = st.sampled_from(["box", "bow", "none", "empty", "far", "flat", "bits"])


@QUICK
@given(st.lists(kinds, max_size=12))
def test_the_counts_add_up(names):
    made = {
        "box": box(3, 3, 9, 9),
        "bow": at(shapely.Polygon([(1, 1), (9, 9), (9, 1), (1, 9)])),
        "none": None,
        "empty": shapely.Polygon(),
        "far": box(-90, -90, -80, -80),
        "flat": at(shapely.Polygon([(1, 1), (9, 9), (1, 1)])),
        "bits": shapely.GeometryCollection([at(shapely.LineString([(0, 0), (5, 5)]))]),
    }
    _, report = burn(GRID, frame(*[made[n] for n in names]), allow_outside=True)
    count = {n: names.count(n) for n in made}
    assert report.read == len(names) and report.burned == count["box"] + count["bow"]
    assert report.repaired == count["bow"] and report.outside == count["far"]
    assert report.empty == count["none"] + count["empty"] and report.dropped == count["flat"] + count["bits"]


def test_an_empty_layer_gives_an_empty_mask():
    mask, report = burn(GRID, frame())
    assert not mask.any() and mask.shape == GRID.shape and report == BurnReport()
    assert not burn(GRID, frame(None, None))[0].any()


def test_points_and_bare_lines_are_refused():
    with pytest.raises(DataError, match="1 of 2 features are points, which have no area to burn; buffer them"):
        burn(GRID, frame(at(shapely.Point(5, 5)), box(1, 1, 2, 2)))
    with pytest.raises(DataError, match="1 of 1 features are lines and have no area to burn; pass width_m="):
        burn(GRID, frame(at(shapely.LineString([(1, 1), (9, 9)]))))


# From one CRS to another


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857", "EPSG:3035", "ESRI:54009", "EPSG:32632"])
def test_any_crs_gives_the_same_mask(crs):
    shapes = frame(box(10, 10, 30.3, 30.2), at(shapely.Point(60, 40).buffer(15)))
    assert (burn(GRID, shapes)[0] == burn(GRID, shapes.to_crs(crs))[0]).all()


def test_long_edges_bend():
    "A band of one degree between two parallels, as two corners and two corners, in a CRS where parallels are arcs."
    grid = Grid((200, 200), CRS("EPSG:3035"), Affine(5000, 0, 3_800_000, 0, -5000, 3_700_000))
    band = shapely.Polygon([(-5, 52), (25, 52), (25, 53), (-5, 53)])
    truth = reproject(np.array([shapely.segmentize(band, 0.005)]), CRS("EPSG:4326"), grid.crs)[0]
    table = frame(band, crs=4326)
    right, straight = burn(grid, table)[0], burn(grid, table, Rules(tolerance_px=0))[0]
    near = oracle(truth.boundary.buffer(0.11 * grid.pixel), grid)
    assert ((right == 1) == oracle(truth, grid))[~near].all()
    assert (straight != right).mean() > 0.05


@settings(deadline=None, max_examples=25)
@given(st.tuples(st.floats(-170, 170), st.floats(-70, 70)), st.tuples(st.floats(-5, 5), st.floats(-5, 5)))
def test_no_edge_is_off_by_more_than_the_tolerance(start, step):
    assume(np.hypot(*step) > 1e-3)
    line = shapely.LineString([start, np.add(start, step)])
    crs = measuring_crs(Grid((10, 10), CRS("EPSG:4326"), Affine(1e-5, 0, start[0], 0, -1e-5, start[1])))[0]
    got = reproject(np.array([line]), CRS("EPSG:4326"), crs, 20.0)[0]
    fine = reproject(np.array([shapely.segmentize(line, 0.01)]), CRS("EPSG:4326"), crs)[0]
    assert shapely.hausdorff_distance(got, fine) < 21 + shapely.length(fine) / 100


def test_a_shape_of_the_whole_world():
    world = shapely.box(-180, -90, 180, 90).difference(box(20, 20, 40, 40, GRID)).buffer(0)
    hole = frame(box(20, 20, 40, 40)).to_crs(4326).geometry[0]
    mask, _ = burn(GRID, frame(shapely.difference(world, hole), crs=4326))
    assert (mask == ~oracle(box(20, 20, 40, 40))).all()


def test_across_the_180th_meridian():
    grid = Grid((100, 100), CRS("EPSG:32601"), Affine(2000, 0, 80_000, 0, -2000, 1_900_000))
    lon = [-179.9, 179.9]
    spots = frame(*[shapely.Point(x, 16.5).buffer(0.05) for x in lon], crs=4326)
    mask, report = burn(grid, spots)
    assert report.burned == 2 and mask.sum() > 20


def test_feet_are_no_metres():
    ftus = CRS("EPSG:2272")
    grid = Grid((200, 200), ftus, Affine(1, 0, 2_700_000, 0, -1, 240_000))  # a pixel is a foot
    line = frame(shapely.LineString([(2_700_050, 239_900), (2_700_150, 239_900)]), crs=ftus)
    mask, _ = burn(grid, line, Rules(width_m=6.096))  # 20 feet
    assert measuring_crs(grid)[0] == ftus and mask[:, 100].sum() == 20


@pytest.mark.parametrize("lat", [0, 27.6, 60.2, -45])
@pytest.mark.parametrize("crs", ["EPSG:3857", "EPSG:4326"])
def test_a_road_is_as_wide_as_on_the_ground(lat, crs):
    "Its burned area over its length, both measured on the ellipsoid."
    geod, east = Geod(ellps="WGS84"), 0.004
    road = shapely.LineString([(10, lat), (10 + east, lat + 0.001)])
    wide = frame(road, crs=4326)
    x0, y0, x1, y1 = wide.to_crs(crs).total_bounds
    side = (x1 - x0) / 1500
    grid = Grid((int((y1 - y0) / side) + 200, 1700), CRS(crs), Affine(side, 0, x0 - 100 * side, 0, -side, y1 + 100 * side))
    shapes = place_shapes(grid, wide, Rules(width_m=8))
    outline = reproject(shapes.geoms, grid.crs, CRS("EPSG:4326"))[0]
    area, length = abs(geod.geometry_area_perimeter(outline)[0]), geod.geometry_length(road)
    caps = np.pi * 16
    assert (area - caps) / length == pytest.approx(8, rel=2e-3)
    assert shapes.draw().sum() * grid.gsd_m**2 == pytest.approx(area, rel=0.01)


def test_widths_from_a_column():
    lines = [at(shapely.LineString([(x, 10), (x, 50)])) for x in (20, 40, 60)]
    table = frame(*lines, width=["4", None, "-1"])
    with pytest.raises(DataError, match="2 lines have no width above 0 in 'width', first the one numbered 1"):
        burn(GRID, table, Rules(width_m="width"))
    mask, _ = burn(GRID, table, Rules(width_m="width", default_width_m=2))
    assert mask[30].tolist() == [1 if 16 <= x < 24 or 38 <= x < 42 or 58 <= x < 62 else 0 for x in range(80)]
    with pytest.raises(DataError, match="no column 'lanes'; it has width"):
        burn(GRID, table, Rules(width_m="lanes"))


def test_a_wide_road_outside_reaches_in():
    table = frame(at(shapely.LineString([(-15, -100), (-15, 100)])), box(70, 50, 75, 55), width=[20.0, 1.0])
    for width in (20, "width"):
        assert burn(GRID, table, Rules(width_m=width))[0][:, :5].all()


def test_where_lengths_are_measured():
    pick = lambda epsg, x, y: measuring_crs(Grid((10, 10), CRS(epsg), Affine(1e-5, 0, x, 0, -1e-5, y)))[0].name
    assert pick("EPSG:4326", -115.2, 36.1) == "WGS 84 / UTM zone 11N"
    assert pick("EPSG:4326", 179.99, -40) == "WGS 84 / UTM zone 60S"
    assert pick("EPSG:4326", 20, 88).startswith("azimuthal equidistant around 88")
    assert pick("EPSG:3857", 0, 9) == "WGS 84 / UTM zone 31N"
    assert pick("EPSG:32633", 500_000, 5e6) == "WGS 84 / UTM zone 33N"
    assert measuring_crs(GRID, "EPSG:3035")[0].to_epsg() == 3035
    with pytest.raises(DataError, match="lengths need a projected CRS"):
        measuring_crs(GRID, "EPSG:4326")
    with pytest.raises(DataError, match="lies nowhere on earth"):
        measuring_crs(Grid((10, 10), CRS("EPSG:4326"), Affine(1, 0, 500_000, 0, -1, 5_400_000)))


# Pixel space


def test_labels_in_pixels():
    table = frame(shapely.box(2, 3, 12, 7), crs=PIXELS)
    for grid in (Grid((60, 80)), GRID):  # with and without a place on the map
        assert np.argwhere(burn(grid, table)[0]).min(0).tolist() == [3, 2]
        assert burn(grid, table)[0].sum() == 40
    line = frame(shapely.LineString([(10, 30), (70, 30)]), crs=PIXELS)
    with pytest.raises(DataError, match="no georeference, so a width in metres has no meaning; pass gsd_m="):
        burn(Grid((60, 80)), line, Rules(width_m=4))
    assert burn(Grid((60, 80)), line, Rules(width_m=4, gsd_m=0.5))[0][:, 40].sum() == 8
    assert burn(GRID, line, Rules(width_m=4))[0][:, 40].sum() == 8  # the image knows its pixels


def test_map_labels_need_a_map(tmp_path):
    image = write_raster(tmp_path / "photo.png", np.zeros((3, 60, 80), "uint8"))
    with pytest.raises(DataError, match="photo.png: the image has no georeference, the labels are in WGS 84 / UTM zone 33N"):
        burn(image, frame(box(1, 1, 5, 5)))


def test_an_image_with_a_local_crs(tmp_path):
    wkt = 'LOCAL_CS["WGS 84 / Pseudo-Mercator",UNIT["metre",1],AXIS["Easting",EAST],AXIS["Northing",NORTH]]'
    place = dict(crs=rasterio.crs.CRS.from_wkt(wkt), transform=Affine(4.77, 0, -1_000_000, 0, -4.77, 5_000_000))
    with rasterio.open(tmp_path / "l15.tif", "w", driver="GTiff", width=64, height=64, count=3, dtype="uint8", **place) as d:
        d.write(np.ones((3, 64, 64), "uint8"))
    with rasterio.open(tmp_path / "l15.tif") as d:
        assert "3857" not in d.crs.to_wkt()  # the file does not know better
    grid = image_grid(tmp_path / "l15.tif")
    assert grid.crs.to_epsg() == 3857
    house = frame(box(10, 20, 30, 40, grid), crs=3857).to_crs(4326)
    assert (burn(tmp_path / "l15.tif", house)[0] == oracle(box(10, 20, 30, 40, grid), grid)).all()


def test_pixels_of_an_image_are_a_grid(tmp_path):
    file = write_raster(tmp_path / "a.tif", np.zeros((60, 80), "uint8"), "EPSG:32633", GRID.transform)
    assert image_grid(read_pixels(file)) == replace(image_grid(file), name="the image")
    assert image_grid(file).gsd_m == pytest.approx(0.5, rel=1e-3)


# Labels of another place


def test_a_layer_of_another_continent():
    far = frame(shapely.box(-84.3, 33.6, -84.2, 33.7), crs=4326)
    with pytest.raises(DataError, match=r"all 1 features of the GeoDataFrame lie outside the image, about 7,\d\d\d km away") as error:
        burn(GRID, far)
    for part in ("WGS 84", "(-84.3, 33.6) to (-84.2, 33.7)", "(14.9", "allow_outside=True"):
        assert part in str(error.value)
    mask, report = burn(GRID, far, allow_outside=True)
    assert not mask.any() and report == BurnReport(read=1, outside=1)


def test_swapped_axes_are_recognised():
    swapped = frame(box(10, 10, 30, 30)).to_crs(4326)
    swapped = swapped.set_geometry(shapely.transform(swapped.geometry.array, lambda xy: xy[:, ::-1]))
    with pytest.raises(DataError, match="with x and y swapped they would meet"):
        burn(GRID, swapped)


def test_a_layer_around_the_image_is_no_mistake():
    mask, report = burn(GRID, frame(box(-50, -50, -40, -40), box(140, 140, 150, 150)))
    assert not mask.any() and report.outside == 2


# Classes


def test_classes_in_their_order():
    table = frame(box(0, 0, 20, 20), box(10, 10, 30, 30), kind=["roof", "road"])
    first, last = {"roof": 1, "road": 2}, {"road": 2, "roof": 1}
    assert burn(GRID, table, Rules("kind", first))[0][15, 15] == 2
    assert burn(GRID, table, Rules("kind", last))[0][15, 15] == 1
    unsure = burn(GRID, table, Rules("kind", {"roof": 1, "road": 255}))[0]
    assert sorted(np.unique(unsure)) == [0, 1, 255]
    cleared = burn(GRID, table, Rules("kind", {"roof": 1, "road": 0}))[0]
    assert cleared[15, 15] == 0 and cleared[5, 5] == 1


@pytest.mark.parametrize("values", [[1, 2], [1.0, 2.0], ["1", "2"], [" 1", "2.0"[:1]]])
def test_numbers_are_classes_however_they_are_stored(values):
    table = frame(box(0, 0, 20, 20), box(30, 30, 50, 50), kind=values)
    for rules in (Rules("kind"), Rules("kind", {1: 1, "2": 2}), Rules("kind", {"1": 1, 2.0: 2})):
        assert np.unique(burn(GRID, table, rules)[0]).tolist() == [0, 1, 2]


def test_a_value_without_a_class_is_an_error():
    table = frame(*[box(i, 0, i + 1, 1) for i in range(4)], kind=["roof", "shed", None, "shed"])
    with pytest.raises(DataError, match=r"no class for 'kind' = 'shed' \(2\), 'nothing' \(1\); name them in classes="):
        burn(GRID, table, Rules("kind", {"roof": 1}))
    with pytest.raises(DataError, match=r"no class for 'kind' = .*'roof' \(1\)"):
        burn(GRID, table, Rules("kind"))
    assert burn(GRID, table, Rules("kind", {"roof": 1}, other=255))[0][0, :4].tolist() == [1, 255, 255, 255]
    with pytest.raises(DataError, match="no column 'type'; it has kind"):
        burn(GRID, table, Rules("type"))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (dict(classes={"a": 1}), "needs attribute="),
        (dict(attribute="k", classes={"a": 256}), "whole numbers 0..255"),
        (dict(attribute="k", classes={"a": "1"}), "whole numbers 0..255"),
        (dict(other=-1), "whole numbers 0..255"),
        (dict(width_m=0), "greater than 0"),
        (dict(default_width_m=-4), "greater than 0"),
        (dict(border_m=-1), "border_m is a width"),
    ],
)
def test_rules_that_make_no_sense(rules, message):
    with pytest.raises(DataError, match=message):
        Rules(**rules)


# Borders and instances


def test_the_border_between_touching_buildings():
    table = frame(box(10, 10, 20, 30), box(20, 10, 30, 30), box(40, 10, 50, 30), box(52, 10, 60, 30), box(70, 10, 75, 30))
    mask, report = burn(GRID, table, Rules(border_m=2))  # four pixels
    assert np.flatnonzero(mask[20] == 2).tolist() == [18, 19, 20, 21, 50, 51]  # the wall; the gap, one pixel to each side
    assert report.burned == 5
    assert (burn(GRID, table, Rules(border_m=2, border_class=7))[0] == 7).sum() == (mask == 2).sum()
    assert (mask > 0)[burn(GRID, table)[0] > 0].all()  # a border takes nothing from the background's side but the gap
    far = frame(box(10, 10, 20, 30), box(26, 10, 30, 30))
    assert not (burn(GRID, far, Rules(border_m=2))[0] == 2).any()


def test_borders_of_doubled_and_ignored_buildings():
    twice = frame(box(10, 10, 30, 30), box(10, 10, 30, 30))
    mask = burn(GRID, twice, Rules(border_m=1))[0]
    assert (mask[13:27, 13:27] == 1).all() and (mask[10:30, 10] == 2).all()
    table = frame(box(10, 10, 20, 30), box(20, 10, 30, 30), box(15, 15, 25, 25), kind=["roof", "roof", "unsure"])
    mask = burn(GRID, table, Rules("kind", {"roof": 1, "unsure": 255}, border_m=2))[0]
    assert (mask[15:25, 15:25] == 255).all() and (mask[10:15, 19:21] == 2).all()


def test_parts_of_one_building_have_no_border():
    one = frame(shapely.MultiPolygon([box(10, 10, 20, 30), box(21, 10, 30, 30)]))
    assert not (burn(GRID, one, Rules(border_m=3))[0] == 2).any()


def test_instances():
    table = frame(box(10, 10, 20, 30), box(900, 0, 950, 9), box(20, 10, 30, 30), box(40, 10, 45, 30), kind=["r", "r", "r", "x"])
    ids, report = burn_instances(GRID, table, Rules("kind", {"r": 1, "x": 255}, border_m=2))
    assert ids.dtype == np.uint16 and report.burned == 3
    assert ids[20].tolist() == [0] * 10 + [1] * 10 + [2] * 10 + [0] * 50  # a border takes no pixel from them
    assert burn_instances(GRID, table, Rules("kind", {"r": 1, "x": 1}), dtype="uint32")[0].max() == 3
    with pytest.raises(DataError, match="more than uint16 can number; use uint32"):
        as_ids(np.array([70_000], "uint32"), "uint16")
    with pytest.raises(DataError, match="uint16 or uint32, not int8"):
        burn_instances(GRID, table, Rules("kind", other=1), dtype="int8")


# In pieces


@QUICK
@given(st.lists(polygons(), min_size=1, max_size=4), st.integers(1, 59), st.floats(-0.6, 0.6))
def test_strips_are_the_whole(shapes, rows, turn):
    t = GRID.transform
    turned = Affine(t.a * np.cos(turn), -t.a * np.sin(turn), t.c, -t.a * np.sin(turn), -t.a * np.cos(turn), t.f)
    grid = replace(GRID, transform=turned)
    table = frame(*[at(s, grid) for s in shapes], kind=[str(i % 3) for i in range(len(shapes))])
    placed = place_shapes(grid, table, Rules("kind", {"0": 1, "1": 2, "2": 255}, border_m=1), allow_outside=True)
    for ids in (False, True):
        pieces = [placed.draw(r, min(rows, 60 - r), ids) for r in range(0, 60, rows)]
        assert (np.concatenate(pieces) != placed.draw(ids=ids)).mean() < 1e-3  # but for centres on an edge


def test_a_layer_is_read_once_and_asked_often(tmp_path):
    frame(*[box(i, 0, i + 0.5, 60) for i in range(0, 80, 2)]).to_file(tmp_path / "l.gpkg")
    disk, memory = open_layer(tmp_path / "l.gpkg", memory_mb=0), open_layer(tmp_path / "l.gpkg")
    for shift in (0, 30):
        grid = replace(GRID, transform=GRID.transform @ Affine.translation(shift, 0) if hasattr(Affine, "__matmul__")
                       else GRID.transform * Affine.translation(shift, 0))
        assert (burn(grid, disk)[0] == burn(grid, memory)[0]).all()


def test_the_crs_of_an_open_layer_counts():
    assert resolve_crs("EPSG:32633") == open_layer(frame(box(1, 1, 2, 2))).crs
