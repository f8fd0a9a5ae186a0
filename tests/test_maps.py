"Maps of a scene: in place, within the budget, without a network; and small pictures for notebooks."
import io
import json
import logging
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyproj import CRS, Transformer
from scipy.ndimage import gaussian_filter

from aerial_nb.data.ground import Grid
from aerial_nb.data.raster import DataError, Pixels, write_raster
from aerial_nb.data.synthetic import scene, write_scene
from aerial_nb.report.figures import FALSE_POSITIVE, MISS, TRUE_POSITIVE
from aerial_nb.roads.graph import RoadGraph
from aerial_nb.scenes import leaflet
from aerial_nb.scenes.glance import glance
from aerial_nb.scenes.layers import error_planes, rows_of
from aerial_nb.scenes.leaflet import leaflet_files, needs_network
from aerial_nb.scenes.maps import MapLook, aerial_map, scene_map
from aerial_nb.scenes.pictures import (Frame, distance_km, frame_of, heat_png, image_bytes, on_frame, shares_png, shrink_image,
                                       shrink_rows)
from aerial_nb.scenes.probmap import open_map
from aerial_nb.scenes.shapes import coded, for_script, measured, place_layer

REAL = Path(__file__).parents[1] / "../shared/data"
inside = pytest.mark.skipif(leaflet_files() is None, reason="Leaflet's files are not installed: pip install XStatic-Leaflet")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here to open the page with")


@pytest.fixture(scope="module")
def town(): return scene(256, seed=3)


@pytest.fixture(scope="module")
def probs(town): return gaussian_filter((town.roads == 1).astype("float32"), 1.5) * np.where(np.arange(256) < 160, 1, .2).astype("float32")


def pixels_of(s): return Pixels(s.image, s.valid, s.crs, s.transform)


# ---------------------------------------------------------------- in place

PLACES = [("EPSG:32631", 500_000, 5_000_000), ("EPSG:32631", 210_000, 8_500_000), ("EPSG:32733", 300_000, 6_200_000),
          ("EPSG:3857", 1_000_000, 6_000_000), ("EPSG:2154", 700_000, 6_600_000)]


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(PLACES), st.integers(0, 59), st.integers(0, 59), st.sampled_from([.3, 2., 10.]), st.sampled_from([0, 20, 90]))
def test_a_pixel_lies_on_the_map_where_the_projection_puts_it(place, row, col, gsd, turn):
    crs, x, y = place
    transform = Affine.translation(x, y) @ Affine.rotation(turn) @ Affine.scale(gsd, -gsd) if hasattr(Affine, "__matmul__") else \
        Affine.translation(x, y) * Affine.rotation(turn) * Affine.scale(gsd, -gsd)
    data = np.zeros((3, 64, 64), "uint8")
    data[:, row:row + 4, col:col + 4] = 255
    image = Pixels(data, np.ones((64, 64), bool), rasterio.CRS.from_string(crs), transform)
    frame = frame_of(image)
    shape = frame.shape(640)
    light = on_frame(shrink_image(image), frame, shape)[0].astype(float)
    lit = (np.argwhere(light > 127) + .5).mean(0)
    c, r = col + 2, row + 2
    lon, lat = Transformer.from_crs(crs, 4326, always_xy=True).transform(transform.a * c + transform.b * r + transform.c,
                                                                         transform.d * c + transform.e * r + transform.f)
    mx, my = Transformer.from_crs(4326, 3857, always_xy=True).transform(lon, lat)
    west, south, east, north = frame.bounds
    expected = (north - my) / (north - south) * shape[0], (mx - west) / (east - west) * shape[1]
    assert np.abs(lit - expected).max() < 2   # of 640: a fifth of a pixel of the image


def test_pictures_and_shapes_share_a_plane(town):
    frame = frame_of(pixels_of(town))
    shape = frame.shape(1024)
    burned = on_frame(shrink_rows(lambda row, rows: (town.buildings[None, row:row + rows] == 1).astype("float32"), frame.grid), frame, shape)[0]
    roofs = place_layer(town.building_polygons, frame)
    west, south, east, north = frame.bounds
    to = rasterio.transform.from_bounds(west, south, east, north, shape[1], shape[0])
    drawn = rasterio.features.rasterize(roofs.geometry, shape, transform=to)
    both = np.isfinite(burned)
    seen, real = burned[both] > .5, drawn[both] == 1
    assert (seen & real).sum() / (seen | real).sum() > .93   # one place, but for half pixels at the edges


def test_pixel_space_counts_rows_downwards(town):
    image = Pixels(town.image, town.valid)
    frame = frame_of(image)
    assert frame.corners == [[-256, 0], [0, 256]]
    np.testing.assert_array_equal(on_frame(shrink_image(image), frame, (256, 256))[:3], town.image)
    graph = RoadGraph(np.array([[10., 20.], [30., 20.]]), np.array([[0, 1]]))
    assert place_layer(graph, frame).total_bounds.tolist() == [10, -20, 30, -20]


def test_a_graph_in_pixels_lies_on_an_image_with_a_place(town):
    frame = frame_of(pixels_of(town))
    bare = RoadGraph(town.graph.nodes, town.graph.edges)
    np.testing.assert_allclose(place_layer(bare, frame).total_bounds, place_layer(town.graph, frame).total_bounds, atol=.01)


def test_sizes_are_of_the_ground_not_of_mercator():
    grid = Grid((100, 100), CRS("EPSG:32631"), Affine(1, 0, 500_000, 0, -1, 6_700_000), "60 north")
    frame = frame_of(grid)
    square = gpd.GeoDataFrame(geometry=[shapely.box(500_010, 6_699_910, 500_030, 6_699_930)], crs=32631)
    table = measured(place_layer(square, frame), frame)
    assert table.area_m2[0] == pytest.approx(400, rel=.002) and table.area[0] > 1500


# ---------------------------------------------------------------- what is shown

def test_errors_are_counted_before_anything_is_made_smaller(town, probs):
    truth = np.where(town.roads == 255, np.nan, town.roads == 1).astype("float32")
    planes = error_planes(truth, probs, .4)
    small = shrink_rows(lambda row, rows: error_planes(truth[row:row + rows], probs[row:row + rows], .4), Grid((256, 256)), side=32)
    np.testing.assert_allclose(np.nanmean(small.planes, (1, 2)), np.nanmean(planes, (1, 2)), atol=1e-6)
    assert (planes.sum(0) <= 1).all() and planes.sum() > 0


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(0, 5))
def test_block_means_are_those_of_numpy(high, wide, side, seed):
    rng = np.random.default_rng(seed)
    data = rng.random((2, high, wide)).astype("float32")
    data[:, rng.random((high, wide)) < .2] = np.nan
    small = shrink_rows(lambda row, rows: data[:, row:row + rows], Grid((high, wide)), side)
    f = int(small.factor)
    assert max(small.planes.shape[1:]) <= side
    for r in range(small.planes.shape[1]):
        for c in range(small.planes.shape[2]):
            block = data[:, r * f:(r + 1) * f, c * f:(c + 1) * f]
            if np.isfinite(block).any(): np.testing.assert_allclose(small.planes[:, r, c], np.nanmean(block, (1, 2)), rtol=1e-4)
            else: assert np.isnan(small.planes[:, r, c]).all()


def test_colours_of_the_pictures_are_the_fixed_ones():
    shares = np.zeros((3, 2, 3), "float32")
    shares[0, 0, 0] = shares[1, 0, 1] = shares[2, 0, 2] = 1
    shares[:, 1, 2] = np.nan
    picture = np.asarray(Image.open(io.BytesIO(shares_png(shares, [TRUE_POSITIVE, FALSE_POSITIVE, MISS]))).convert("RGBA"))
    for col, colour in enumerate((TRUE_POSITIVE, FALSE_POSITIVE, MISS)):
        assert "#{:02X}{:02X}{:02X}".format(*picture[0, col, :3]) == colour and picture[0, col, 3] > 200
    assert (picture[1, :, 3] == 0).all()
    heat = np.asarray(Image.open(io.BytesIO(heat_png(np.float32([[0, .2, .6, 1, np.nan]])))).convert("RGBA"))[0]
    assert heat[0, 3] == heat[4, 3] == 0 and (np.diff(heat[:4, 3].astype(int)) > 0).all()


def test_transparent_parts_make_a_webp_and_whole_images_a_jpeg(town):
    rgba = np.concatenate([town.image, np.full((1, 256, 256), 255, "uint8")])
    assert image_bytes(rgba)[1] == "jpeg"
    rgba[3, :50] = 0
    data, kind = image_bytes(rgba)
    back = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    assert kind == "webp" and (back[:50, :, 3] == 0).all() and (back[50:, :, 3] == 255).all()


def test_layers_follow_from_what_is_given(town, probs):
    names = lambda **given: scene_map(town, **given).layers.name.tolist()
    assert names() == ["image"]
    assert names(label=town.roads) == ["image", "label"]
    assert names(prediction=probs, look=MapLook(.4)) == ["image", "probability", "prediction at 0.4"]
    assert names(label=town.roads, prediction=probs) == ["image", "label", "probability", "prediction at 0.5", "errors"]
    assert names(label=town.building_polygons, prediction=probs)[-2:] == ["errors", "label"]
    assert names(vectors=[town.graph, town.building_polygons]) == ["image", "layer 1", "layer 2"]


def test_files_are_as_good_as_arrays(town, probs, tmp_path):
    files = write_scene(town, tmp_path, "a")
    path = write_raster(tmp_path / "p.tif", np.where(probs > 1, 254, probs * 254).astype("uint8"), town.crs, town.transform, nodata=255)
    with rasterio.open(path, "r+") as d: d.scales, d.descriptions = (1 / 254,), ("road",); d.update_tags(AERIAL_THRESHOLD="0.35")
    found = scene_map(files["image"], files["roads"], path, {"roads": files["road_lines"], "roofs": files["building_polygons"]},
                      tmp_path / "a.html")
    assert found.layers.name.tolist() == ["image", "label", "probability: road", "prediction at 0.35", "errors", "roads", "roofs"]
    assert (tmp_path / "a.html").read_text() == found.html == found.html
    alone = scene_map(None, prediction=open_map(path))
    assert alone.layers.name[0] == "probability: road" and alone.frame.bounds == pytest.approx(found.frame.bounds)


@pytest.mark.parametrize("shape, dtype", [((1, 300, 200), "uint16"), ((4, 200, 300), "uint8"), ((1, 64, 64), "float32"), ((3, 1, 1), "uint8")])
def test_images_of_all_kinds(shape, dtype, tmp_path):
    data = (np.random.default_rng(0).random(shape) * 200).astype(dtype)
    if dtype == "float32": data[0, :9] = np.nan
    path = write_raster(tmp_path / "a.tif", data, rasterio.CRS.from_epsg(32631), Affine(1, 0, 500_000, 0, -1, 5_000_000))
    assert scene_map(path).layers.name.tolist() == ["image"]


# ---------------------------------------------------------------- the budget

@inside
@pytest.mark.parametrize("max_mb", [.3, .6, 10])
def test_the_file_is_smaller_than_its_budget(town, probs, max_mb, tmp_path):
    noise = Pixels(np.random.default_rng(0).integers(0, 255, (3, 900, 900)).astype("uint8"), np.ones((900, 900), bool), town.crs, town.transform)
    scene_map(noise, vectors={"roofs": town.building_polygons}, out=tmp_path / "a.html", max_mb=max_mb)
    assert (tmp_path / "a.html").stat().st_size < max_mb * 1e6


def test_many_shapes_are_limited_and_the_map_says_so(town, caplog):
    n = 400
    x, y = (v.ravel() * .5 for v in np.meshgrid(np.arange(n), np.arange(300)))
    side = np.where(np.arange(len(x)) < 100, .6, .2)
    t = town.transform
    boxes = gpd.GeoDataFrame(geometry=shapely.box(t.c + x * .6, t.f - y * .8, t.c + x * .6 + side, t.f - y * .8 + side), crs=town.crs)
    assert len(boxes) == 120_000
    with caplog.at_level(logging.WARNING): found = scene_map(town, vectors={"boxes": boxes}, max_mb=1)
    row = found.layers.set_index("name").loc["boxes"]
    assert row.features + row.left_out == 120_000 and 1000 < row.features <= 20_000
    assert "of 120,000 shapes" in caplog.text and f"the {row.features:,} largest of 120,000 shapes" in found.html
    assert len(found.html.encode()) < 1e6


def test_the_largest_shapes_stay(town):
    frame = frame_of(pixels_of(town))
    roofs = place_layer(town.building_polygons, frame)
    found = coded(roofs, frame, most=3)
    assert sorted(found.table.area)[0] >= sorted(roofs.area)[-3]


def test_shapes_come_back_from_their_text(town):
    frame = frame_of(pixels_of(town))
    roofs = place_layer(town.building_polygons, frame)
    said = json.loads(coded(roofs, frame).text)
    pixel = (frame.bounds[2] - frame.bounds[0]) / 256
    for (kind, parts), real in zip(said["f"], roofs.geometry):
        ring = np.cumsum(np.reshape(parts[0][0], (-1, 2)), 0) * said["u"] + (said["x"], said["y"])
        assert kind == "p" and shapely.hausdorff_distance(shapely.Polygon(ring), real) < .75 * pixel


@pytest.mark.slow
def test_a_huge_raster_is_read_in_bounded_memory(tmp_path):
    code = """if True:
        import resource, sys, rasterio
        from rasterio.transform import from_origin
        path, n = sys.argv[1], 40_000
        with rasterio.open(path, "w", driver="GTiff", width=n, height=n, count=3, dtype="uint8", crs="EPSG:32631", tiled=True,
                           transform=from_origin(3e5, 5e6, .5, .5), SPARSE_OK=True) as d: pass
        from aerial_nb.scenes.maps import MapLook, scene_map
        found = scene_map(path, look=MapLook(side=2048))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "big.tif")], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 700   # MB, of an image of 4,800


# ---------------------------------------------------------------- no network

class Addresses(HTMLParser):
    "Every address that a tag of a page would fetch."
    def __init__(self): super().__init__(); self.found = []
    def handle_starttag(self, tag, attrs):
        names = {"script": "src", "img": "src", "iframe": "src", "link": "href"}
        self.found += [v for k, v in attrs if k == names.get(tag) and v and not v.startswith("data:")]


@inside
@pytest.mark.parametrize("place", [True, False])
def test_a_page_fetches_nothing(town, probs, place):
    image = pixels_of(town) if place else Pixels(town.image, town.valid)
    html = scene_map(image, town.roads, probs, {"roads": RoadGraph(town.graph.nodes, town.graph.edges)}).html
    reader = Addresses()
    reader.feed(html)
    assert reader.found == [] and needs_network(html) == []
    assert not re.search(r"url\(\s*['\"]?(?!data:|#)[\w/.]", html.split("</style>")[0])


def test_network_addresses_are_found():
    for html in ('<script src="https://a.b/x.js">', "<link rel=stylesheet href='//a.b/x.css'>", "@import url(https://a.b/x)",
                 '<img alt="" src=http://a.b/x.png>', 'L.tileLayer( "https://a.b/{z}.png"'):
        assert needs_network(html), html
    assert needs_network('<a href="https://leafletjs.com">x</a>') == []


def test_a_base_map_is_asked_for_by_name(town):
    page = scene_map(town, look=MapLook(basemap="OpenStreetMap"))
    assert "openstreetmap.org" in "".join(needs_network(page.html)) and "OpenStreetMap" in page.html
    with pytest.raises(DataError, match="name one such as"): scene_map(town, look=MapLook(basemap="https://a.b/{z}/{x}/{y}.png"))
    with pytest.raises(DataError, match="no place"): scene_map(Pixels(town.image, town.valid), look=MapLook(basemap="OpenStreetMap"))


def test_without_leaflets_files_the_page_links_and_says_so(town, monkeypatch, caplog, tmp_path):
    def missing(name): raise leaflet.PackageNotFoundError(name)
    monkeypatch.setattr(leaflet, "distribution", missing)
    with caplog.at_level(logging.WARNING): scene_map(town, out=tmp_path / "a.html")
    assert "XStatic-Leaflet" in caplog.text and "opens with a network only" in caplog.text
    assert len(needs_network((tmp_path / "a.html").read_text())) == 2


def test_names_and_values_cannot_break_out(town):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    roofs = town.building_polygons.assign(**{"note": evil, evil: 1.})
    html = scene_map(town, vectors={evil: roofs}, look=MapLook(title=evil, credit=evil)).html
    assert "<script>alert" not in html and "<img src=x" not in html
    assert json.loads(for_script(evil)) == evil


# ---------------------------------------------------------------- refused

def refused(match, *args, **kwargs):
    with pytest.raises(DataError, match=match): scene_map(*args, **kwargs)


def test_other_places_are_refused_with_the_distance(town, probs, tmp_path):
    far = scene(64, seed=9)
    path = write_raster(tmp_path / "p.tif", np.zeros((64, 64), "float32"), far.crs, far.transform)
    km = distance_km(frame_of(pixels_of(town)).grid, frame_of(pixels_of(far)).grid)
    refused(rf"another place.*{km:,.1f} km away", town, prediction=path)
    refused(rf"another place.*{km:,.1f} km away", town, label=write_raster(tmp_path / "l.tif", np.ones((64, 64), "uint8"), far.crs, far.transform))
    refused("layer 'roofs' lies elsewhere.*km from", town, vectors={"roofs": far.building_polygons})
    refused("layer 'label' lies elsewhere", town, label=far.building_polygons, prediction=probs)
    refused("give both a place", town, prediction=write_raster(tmp_path / "q.tif", np.zeros((256, 256), "float32")))


def test_layers_without_a_known_place_are_refused(town):
    bare = gpd.GeoDataFrame(geometry=list(town.building_polygons.geometry))
    refused("layer 'roofs'.*no CRS.*set_crs", town, vectors={"roofs": bare})
    refused("has no place", Pixels(town.image, town.valid), vectors={"roofs": town.building_polygons})
    refused("is no layer", town, vectors={"roofs": 5})
    refused("no such file", town, vectors=["missing.gpkg"])


def test_the_rest_of_bad_input(town, probs, tmp_path):
    refused("nothing to show", None)
    refused("nothing to show", None, label=town.building_polygons, vectors={"a": town.graph})
    refused("give the image too", None, prediction=probs)
    refused("raise max_mb", town, max_mb=.17)
    refused("on the image's pixels", town, prediction=probs[:99])
    refused("lie in 0..1", town, prediction=probs * 255)
    refused("name it .html", town, out=tmp_path / "a.png")
    refused("no such file", tmp_path / "missing.tif")
    (tmp_path / "a.html").write_text("mine")
    refused("a.html exists", town, out=tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text() == "mine"
    scene_map(town, out=tmp_path / "a.html", overwrite=True)
    assert (tmp_path / "a.html").read_text() != "mine"
    small = Pixels(town.image, town.valid)
    refused("must be of one size", small, label=write_raster(tmp_path / "m.png", np.ones((9, 9), "uint8")))


@pytest.mark.parametrize("crs, at, match", [("EPSG:32760", (400_000, 9_000_000), "across longitude 180"), ("EPSG:3413", (-50_000, 50_000), "web maps end"),
                                            ("EPSG:3031", (-900_000, 900_000), "web maps end|longitude 180"), ("EPSG:4326", (179.99, 10), "longitude 180")])
def test_places_that_web_maps_do_not_have(crs, at, match):
    step = .01 if crs == "EPSG:4326" else 10_000
    with pytest.raises(DataError, match=match): frame_of(Grid((180, 180), CRS(crs), Affine(step, 0, at[0], 0, -step, at[1]), "there.tif"))


def test_errors_need_common_pixels_and_say_so(town, probs, tmp_path, caplog):
    t = town.transform
    path = write_raster(tmp_path / "p.tif", probs[::2, ::2], town.crs, Affine(t.a * 2, 0, t.c, 0, t.e * 2, t.f))
    with caplog.at_level(logging.WARNING): found = scene_map(town, town.roads, path)
    assert "errors" not in found.layers.name.tolist() and "errors are left out" in caplog.text
    bare = town.road_lines.drop(columns="width_m")
    with caplog.at_level(logging.WARNING): found = scene_map(town, bare, probs)
    assert found.layers.name.tolist()[-1] == "label" and "errors are left out" in caplog.text.split("\n", 1)[1]


def test_a_prediction_without_data_is_shown_empty(town):
    found = scene_map(town, town.roads, np.full((256, 256), np.nan, "float32"))
    assert "errors" in found.layers.name.tolist()


def test_thresholds_are_checked(town, probs):
    with pytest.raises(DataError, match="0..1"): rows_of(probs, frame_of(pixels_of(town)).grid, "prediction", 7)


# ---------------------------------------------------------------- command line

def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["aerial_map", *map(str, words)])
    try: aerial_map()
    except SystemExit as stop: return stop.code
    return 0


def test_the_command_writes_a_page_and_refuses_with_a_code(town, probs, tmp_path, monkeypatch):
    files = write_scene(town, tmp_path, "a")
    path, page = write_raster(tmp_path / "p.tif", probs, town.crs, town.transform), tmp_path / "out" / "a.html"
    words = files["image"], page, "--map", path, "--label", files["roads"], "--vectors", f"{files['road_lines']},{files['building_polygons']}"
    assert run(monkeypatch, *words, "--max-mb", "2") == 0 and page.stat().st_size < 2e6
    assert run(monkeypatch, *words) == 2
    assert run(monkeypatch, *words, "--overwrite") == 0
    assert run(monkeypatch, tmp_path / "missing.tif", tmp_path / "b.html") == 2 and not (tmp_path / "b.html").exists()


# ---------------------------------------------------------------- small pictures

def test_things_draw_themselves_small_and_without_scripts(town, probs, tmp_path):
    path = write_raster(tmp_path / "p.tif", probs, town.crs, town.transform)
    things = [open_map(path, .4), glance(town.building_polygons), glance(town.road_lines.geometry), scene_map(town, vectors=[town.graph]), town,
              town.graph]
    for thing in things:
        html = thing._repr_html_()
        assert len(html) < 80_000 and "<script" not in html and "<iframe" not in html and needs_network(html) == []
    assert "<td>0.4</td>" in open_map(path, .4)._repr_html_() and "without a name" in open_map(path, .4)._repr_html_()


def test_a_glance_measures_in_metres(town):
    html = glance(town.building_polygons)._repr_html_()
    area = town.building_polygons.to_crs(town.crs).area.sum()
    said = float(re.search(r"area</td><td>([\d,]+) m²", html)[1].replace(",", ""))
    assert said == pytest.approx(area, rel=.01)
    bare = gpd.GeoDataFrame(geometry=[shapely.box(0, 0, 10, 20)])
    assert "200 px²" in glance(bare)._repr_html_()


def test_a_glance_of_nothing_and_of_odd_shapes(town):
    with pytest.raises(DataError, match="nothing to draw"): glance(town.road_lines.iloc[:0])
    with pytest.raises(DataError, match="no table of shapes"): glance([1, 2])
    odd = gpd.GeoDataFrame(geometry=[shapely.Point(0, 0).buffer(9).difference(shapely.Point(0, 0).buffer(4)), shapely.Point(1, 1), None,
                                     shapely.MultiPoint([(0, 0), (3, 3)]), shapely.LineString([(0, 0), (5, 5)])], crs=32631)
    assert "4" in glance(odd)._repr_html_()


# ---------------------------------------------------------------- in a browser

def chromium(page: Path, folder: Path, *words) -> bytes:
    flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
             "--disable-sync --hide-scrollbars --virtual-time-budget=5000 --window-size=900,700").split()
    return subprocess.run([CHROMIUM, *flags, f"--user-data-dir={folder}", *words, page.as_uri()], capture_output=True, timeout=90, check=True).stdout


def near(picture: np.ndarray, colour: str, tolerance: int = 40) -> int:
    "Pixels of about a colour."
    return int((np.abs(picture.astype(int) - [int(colour[i:i + 2], 16) for i in (1, 3, 5)]).max(-1) < tolerance).sum())


@browser
@inside
def test_a_browser_shows_the_layers_in_their_place(town, probs, tmp_path):
    free = (town.roads == 0) & (town.buildings == 0) & (probs < .4)
    top, left = next((r, c) for r in range(0, 240, 8) for c in range(0, 240, 8) if free[r:r + 16, c:c + 16].all())
    mark = town.image.copy()
    mark[:, top:top + 16, left:left + 16] = np.array([255, 0, 255], "uint8")[:, None, None]
    image = Pixels(mark, town.valid, town.crs, town.transform)
    roofs = town.building_polygons
    found = scene_map(image, town.roads, probs, {"roofs": roofs}, look=MapLook(threshold=.4))
    t = town.transform
    lon, lat = Transformer.from_crs(town.crs, 4326, always_xy=True).transform(t.a * (left + 8) + t.c, t.e * (top + 8) + t.f)
    probe = (f"<script>var at = L.DomUtil.create('div', '', {found.map.get_name()}.getContainer());"   # a green dot where Leaflet has the place
             "at.style = 'position:absolute;width:6px;height:6px;background:#0f0;z-index:9999';"
             f"function dot() {{ var p = {found.map.get_name()}.latLngToContainerPoint([{lat}, {lon}]);"
             "at.style.left = p.x - 3 + 'px'; at.style.top = p.y - 3 + 'px'; }"
             f"dot(); {found.map.get_name()}.on('moveend zoomend', dot);</script>")
    page = tmp_path / "a.html"
    page.write_text(found.html.replace("</html>", probe + "</html>"))
    dom = chromium(page, tmp_path / "one", "--dump-dom").decode()
    chromium(page, tmp_path / "two", f"--screenshot={tmp_path / 'a.png'}")
    head = dom[:dom.index("<head>")]
    assert f'data-layers="{len(found.layers)}"' in head and "data-error" not in head
    assert dom.count("leaflet-image-layer") >= 2 and "<canvas" in dom and "leaflet-control-scale-line" in dom
    for name in found.layers.name: assert f">{name}</span>" in dom
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    for colour, least in ((TRUE_POSITIVE, 300), (MISS, 300), ("#FF00FF", 100)): assert near(picture, colour) > least, colour
    dot, block = (np.argwhere(np.abs(picture.astype(int) - colour).max(-1) < 60) for colour in ([0, 255, 0], [255, 0, 255]))
    near_by = block[np.abs(block - dot.mean(0)).max(1) < 60]
    assert len(dot) == 36 and np.abs((near_by.min(0) + near_by.max(0)) / 2 - dot.mean(0)).max() < 1.5   # pixels of the screen


@browser
@inside
def test_a_browser_shows_pixel_space(town, tmp_path):
    page = tmp_path / "a.html"
    scene_map(Pixels(town.image, town.valid), town.roads, out=page)
    dom = chromium(page, tmp_path / "one", "--dump-dom").decode()
    assert 'data-layers="2"' in dom[:200] and "data-error" not in dom[:200] and re.search(r">\d+ px</div>", dom)
    scene_map(Pixels(town.image, town.valid), look=MapLook(gsd_m=.5), out=page, overwrite=True)
    assert re.search(r">\d+ m</div>", chromium(page, tmp_path / "two", "--dump-dom").decode())


# ---------------------------------------------------------------- real data

@pytest.mark.skipif(not (REAL / "roofs/oam_1024").exists(), reason="the real data is not beside the repository")
def test_a_real_drone_image_with_its_polygons(tmp_path):
    folder, name = REAL / "roofs/oam_1024", "zanzibar_19_319299_270960"
    with rasterio.open(folder / f"masks/{name}.tif") as d: probs = gaussian_filter(d.read(1).astype("float32"), 4)
    found = scene_map(folder / f"images/{name}.tif", folder / f"labels/{name}.geojson", probs, out=tmp_path / "a.html")
    assert found.layers.name.tolist() == ["image", "probability", "prediction at 0.5", "errors", "label"]
    west, south, east, north = found.frame.bounds   # zoom 19, x 319299, y 270960 of web tiles
    side = 2 * np.pi * 6378137 / 2 ** 19
    assert west == pytest.approx(319299 * side - np.pi * 6378137, abs=.01) and north == pytest.approx(np.pi * 6378137 - 270960 * side, abs=.01)


@pytest.mark.skipif(not (REAL / "massachusetts_roads_full").exists(), reason="the real data is not beside the repository")
def test_a_real_tile_without_a_place_with_a_soft_prediction():
    folder = REAL / "massachusetts_roads_full"
    soft = open_map(folder / "predictions/val01.jpg", threshold=.5, scale=1 / 255)
    found = scene_map(folder / "images/val01.jpg", folder / "masks/val01.png", soft, look=MapLook(side=750))
    assert found.layers.name.tolist()[-1] == "errors" and not found.frame.on_earth and isinstance(found.frame, Frame)


def test_lines_without_a_crs_are_pixels_on_a_picture_without_a_place():
    import geopandas as gpd
    import shapely
    picture = Pixels(np.full((3, 40, 60), 90, np.uint8), np.ones((40, 60), bool), None, None)
    table = gpd.GeoDataFrame(dict(length_px=[30.]), geometry=[shapely.LineString([(5, 5), (35, 5)])])
    assert scene_map(picture, vectors={"roads": table}).layers.set_index("name").loc["roads", "features"] == 1
