"""Boxes, OpenStreetMap by Overpass and from files, and road graphs of them."""

import http.server
import json
import logging
import pickle
import socket
import sys
import threading
import time
from contextlib import contextmanager

import geopandas as gpd
import numpy as np
import pandas as pd
import pyogrio
import pytest
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st

from aerial_nb.data.download import Line
from aerial_nb.data.graphtiles import KINDS, Preparing, graph_samples, read_places, road_label
from aerial_nb.data.osm import (
    NO_ROADS,
    Keeping,
    aerial_roads2graph,
    keep_roads,
    lines_graph,
    road_lines,
    roads_to_graph,
    write_roads,
)
from aerial_nb.data.overpass import Box, Overpass, box_grid, grid_box, overpass_lines, parse_box
from aerial_nb.data.raster import DataError, raster_info, write_raster
from aerial_nb.roads.files import read_graph
from aerial_nb.roads.stacked import crossings

LON, LAT = 13.37, 52.52
PLACE = Box(13.366, 52.518, 13.374, 52.522)
NODES = dict(a=(-150, 0), b=(0, 0), c=(150, 20), d=(0, -120), e=(60, 130), f=(80, -130), g=(-100, 60), h=(-20, 90))
WAYS = [("abc", dict(highway="residential")), ("bd", dict(highway="tertiary", oneway="yes")),
        ("ef", dict(highway="motorway", bridge="yes", layer="1")), ("gh", dict(highway="footway"))]


def degrees(x, y):
    return round(LON + x / 67_800, 7), round(LAT + y / 111_320, 7)


def osm_text(ways=WAYS, nodes=NODES):
    number = {n: i + 1 for i, n in enumerate(nodes)}
    at = "".join('<node id="{}" version="1" lon="{}" lat="{}"/>'.format(number[n], *degrees(*p)) for n, p in nodes.items())
    for k, (path, tags) in enumerate(ways):
        said = "".join(f'<tag k="{a}" v="{b}"/>' for a, b in tags.items())
        at += f'<way id="{k + 1}" version="1">' + "".join(f'<nd ref="{number[n]}"/>' for n in path) + said + "</way>"
    return f'<?xml version="1.0"?><osm version="0.6">{at}</osm>'


def overpass_text(ways=WAYS, nodes=NODES, **more):
    number = {n: i + 1 for i, n in enumerate(nodes)}
    found = [dict(type="node", id=number[n], lon=degrees(*p)[0], lat=degrees(*p)[1]) for n, p in nodes.items()]
    found += [dict(type="way", id=k + 1, nodes=[number[n] for n in path], tags=tags) for k, (path, tags) in enumerate(ways)]
    return json.dumps(dict(elements=found) | more).encode()


@pytest.fixture
def extract(tmp_path):
    (tmp_path / "place.osm").write_text(osm_text())
    return tmp_path / "place.osm"


# ---- boxes


@pytest.mark.parametrize("text, says", [
    ("1,2,3", "four numbers"), ("a,b,c,d", "four numbers"), ("nan,0,1,1", "not all"), ("392000,5819000,394000,5821000", "no degrees"),
    ("2,1,1,2", "west must be less"), ("1,2,2,1", "west must be less"), ("1,1,1,2", "west must be less"), ("40.7,-174,40.8,-173.9", "south,west"),
    ("179.5,-17,-179.5,-16", "antimeridian"), ("0,0,1,950", "no degrees")])
def test_what_is_no_box(text, says):
    with pytest.raises(DataError, match=says):
        parse_box(text)


@given(st.floats(-179, 178), st.floats(-79, 82), st.floats(1e-3, .05), st.floats(1e-3, .05))
@settings(max_examples=30, deadline=None)
def test_the_grid_of_a_box_covers_it_in_metres(west, south, wide, high):
    box = Box(west, south, west + wide, south + high)
    grid = box_grid(box, 2.)
    if not -179.9 < west < 179.8:
        return
    around = grid_box(grid)
    assert around.west <= box.west + 1e-7 and around.south <= box.south + 1e-7
    assert around.east >= box.east - 1e-7 and around.north >= box.north - 1e-7
    assert grid.gsd_m == pytest.approx(2, rel=2e-3)


# ---- which ways are roads


def test_the_published_list():
    values = [*NO_ROADS, "residential", "service", "track", "motorway_link", "living_street", None]
    lines = gpd.GeoDataFrame(dict(highway=values), geometry=[shapely.LineString([(0, i), (1, i)]) for i in range(len(values))], crs="EPSG:32633")
    assert keep_roads(lines)[0].highway.tolist() == ["residential", "service", "track", "motorway_link", "living_street"]
    assert len(NO_ROADS) == 15


def test_parking_driveways_tunnels_and_chosen_values():
    rows = [dict(highway="service", amenity="parking"), dict(highway="service", service="driveway"), dict(highway="service", service="alley"),
            dict(highway="primary", tunnel="yes"), dict(highway="primary", tunnel="no"), dict(highway="primary", tunnel="F")]
    lines = gpd.GeoDataFrame(pd.DataFrame(rows), geometry=[shapely.LineString([(0, i), (1, i)]) for i in range(6)], crs="EPSG:32633")
    assert keep_roads(lines)[1].tolist() == ["parking or driveway"] * 2 + [""] * 4
    assert (keep_roads(lines, Keeping(service=True))[1] == "").all()
    assert keep_roads(lines, Keeping(tunnels=False))[1][3:].tolist() == ["tunnel", "", ""]
    assert keep_roads(lines, Keeping(highway=("primary",)))[1][:3].tolist()[2] == "not asked for"
    with pytest.raises(DataError, match="no column highway"):
        keep_roads(lines.drop(columns="highway"), Keeping(highway=("primary",)))


def test_lines_without_tags_are_all_roads():
    lines = gpd.GeoDataFrame(dict(name=["x"]), geometry=[shapely.LineString([(392000, 5819000), (392200, 5819000)])], crs="EPSG:32633")
    made = lines_graph(lines)
    assert made.graph.length_m == pytest.approx(200, rel=1e-3) and made.ways.kept.all()


# ---- reading


def test_an_extract_keeps_junctions_and_bridges(extract):
    made = lines_graph(road_lines(extract), how=None)
    assert (made.graph.n_parts, int((made.graph.degrees > 2).sum()), made.crossings) == (2, 1, 1)
    assert made.ways[["highway", "kept"]].values.tolist() == [["motorway", True], ["residential", True], ["tertiary", True], ["footway", False]]


def test_a_geopackage_of_the_extract_says_the_same(extract, tmp_path):
    pyogrio.read_dataframe(extract, layer="lines").to_file(tmp_path / "lines.gpkg")
    one, two = (lines_graph(road_lines(f)).graph for f in (extract, tmp_path / "lines.gpkg"))
    assert np.allclose(one.nodes, two.nodes) and np.array_equal(one.edges, two.edges)


def test_a_shared_node_joins_and_a_moved_one_does_not(tmp_path):
    nodes = NODES | dict(m=(70, 9), n=(70, 9))
    for name, ways in dict(shared=[("abmc", WAYS[0][1]), ("emf", WAYS[2][1])], apart=[("abmc", WAYS[0][1]), ("ef", WAYS[2][1])]).items():
        (tmp_path / f"{name}.osm").write_text(osm_text(ways, nodes))
    assert lines_graph(road_lines(tmp_path / "shared.osm"), how=None).graph.n_parts == 1
    assert lines_graph(road_lines(tmp_path / "apart.osm"), how=None).graph.n_parts == 2


def test_fclass_of_geofabrik(tmp_path):
    lines = gpd.GeoDataFrame(dict(fclass=["track_grade3", "footway", "primary"], tunnel=["F", "F", "T"]), crs="EPSG:4326",
                             geometry=[shapely.LineString([degrees(0, 30 * i), degrees(100, 30 * i)]) for i in range(3)])
    lines.to_file(tmp_path / "gis_osm_roads.shp")
    found = road_lines(tmp_path / "gis_osm_roads.shp")
    assert keep_roads(found, Keeping(tunnels=False))[1].tolist() == ["", "no road for cars", "tunnel"]


def test_several_values_of_osmnx():
    lines = gpd.GeoDataFrame(dict(highway=["['footway', 'path']", "['path', 'service']", ["steps", "primary"], "track"]), crs="EPSG:32633",
                             geometry=[shapely.LineString([(0, i), (90, i)]) for i in range(4)])
    assert road_lines(lines).highway.tolist() == ["footway", "service", "primary", "track"]


def test_points_and_areas_are_left_out_or_refused(tmp_path, caplog):
    mixed = gpd.GeoDataFrame(geometry=[shapely.LineString([(0, 0), (50, 0)]), shapely.Point(1, 1), shapely.box(0, 0, 9, 9)], crs="EPSG:32633")
    with caplog.at_level(logging.WARNING):
        assert len(road_lines(mixed)) == 1
    assert "1 Point" in caplog.text and "1 Polygon" in caplog.text
    with pytest.raises(DataError, match="must be lines, found 1 Polygon"):
        road_lines(mixed[2:])


def test_bad_files(tmp_path):
    (tmp_path / "half.osm.pbf").write_bytes(b"\x00\x00\x00\x0d\x0a\x09OSMHeader\x18")
    with pytest.raises(DataError, match="half.osm.pbf"):
        roads_to_graph(tmp_path / "half.osm.pbf")
    with pytest.raises(DataError, match="no such file"):
        road_lines(tmp_path / "none.osm.pbf")
    with pytest.raises(DataError, match="no such file"):
        road_lines(tmp_path / "none.gpkg")
    (tmp_path / "roads.docx").write_text("nothing")
    with pytest.raises(DataError, match="no readable vector layer"):
        road_lines(tmp_path / "roads.docx")
    bare = gpd.GeoDataFrame(geometry=[shapely.LineString([(392000, 5819000), (392200, 5819000)])])
    with pytest.raises(DataError, match="states no CRS"):
        road_lines(bare)
    odd = gpd.GeoDataFrame(geometry=[shapely.LineString([(np.nan, 0), (1, 1)])], crs="EPSG:32633")
    with pytest.raises(DataError, match="1 of 1 lines have coordinates that are no numbers"):
        road_lines(odd)


def test_no_road_in_the_box(extract):
    with pytest.raises(DataError, match="no roads here: there are no lines at all"):
        roads_to_graph(extract, box="2.3,48.8,2.4,48.9")
    with pytest.raises(DataError, match="no road for cars"):
        lines_graph(road_lines(extract).query("highway == 'footway'"))


# ---- graphs


def test_vertices_are_even_and_make_room(extract):
    made = lines_graph(road_lines(extract), how=Preparing(1., 20., 9.5))
    bare = made.graph.nodes
    at = crossings(made.graph)[1]
    assert len(at) == 1 and made.moved > 0
    assert np.hypot(*(bare - at[0]).T).min() > 8
    assert made.graph.lengths.max() < 32 and np.median(made.graph.lengths) == pytest.approx(19, abs=3)
    assert lines_graph(road_lines(extract), how=Preparing(1., 20., 0)).moved == 0


@pytest.fixture
def image(tmp_path):
    grid = box_grid(PLACE, .5)
    return write_raster(tmp_path / "tile.tif", np.zeros((3, *grid.shape), "uint8"), grid.crs.to_wkt(), grid.transform)


def test_the_graph_of_an_image_is_what_a_label_becomes(extract, image, tmp_path):
    "In pixels of the image, though spaced in metres; the same as a store makes of the lines."
    made = roads_to_graph(extract, image)
    lines = keep_roads(road_lines(extract))[0]
    lines.to_file(tmp_path / "lines.gpkg")
    label = road_label(tmp_path / "lines.gpkg", raster_info(image), factor=.5)
    assert np.allclose(made.graph.nodes * .5, label.nodes) and np.array_equal(made.graph.edges, label.edges)
    rows, cols = raster_info(image).shape
    assert made.graph.nodes.max(0)[0] <= cols + 50.1 and made.graph.nodes.max(0)[1] <= rows + 50.1


def test_a_box_clips(extract):
    made = roads_to_graph(extract, box="13.368,52.519,13.372,52.521")
    rows, cols = made.grid.shape
    assert made.graph.nodes.min() >= -1e-6 and (made.graph.nodes.max(0) <= (cols + 1e-6, rows + 1e-6)).all()
    with pytest.raises(DataError, match="not both"):
        roads_to_graph(extract, image="x.tif", box="13.368,52.519,13.372,52.521")


@pytest.mark.parametrize("ending", [".gpkg", ".geojson", ".parquet", ".npz", ".p"])
def test_files_and_back(extract, image, tmp_path, ending):
    made = roads_to_graph(extract, image)
    out = write_roads(made, tmp_path / f"roads{ending}", points=tmp_path / "points.json", notes=dict(attribution="© them"))
    again = read_graph(out)
    if again.crs is not None:
        again = again.to_crs(made.graph.crs).to_pixels(made.graph.transform)
    assert len(again) == len(made.graph) and again.length == pytest.approx(made.graph.length, rel=1e-6)
    places = read_places(tmp_path / "points.json")
    assert all(np.allclose(places[k], made.places[k], atol=1e-3) for k in KINDS) and len(places["overpass"]) == 1
    said = out.read_bytes()
    assert ending in (".npz", ".p") or "© them".encode() in said or b"\\u00a9 them" in said
    if ending == ".p":
        assert all(isinstance(k, tuple) and isinstance(v, list) for k, v in pickle.loads(said).items())
    with pytest.raises(DataError, match="exists"):
        write_roads(made, out)


def test_a_failed_write_leaves_what_was(extract, tmp_path, monkeypatch):
    made, out = lines_graph(road_lines(extract)), tmp_path / "roads.gpkg"
    out.write_text("before")
    monkeypatch.setattr("aerial_nb.data.osm.write_graph", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match="No space left"):
        write_roads(made, out, overwrite=True)
    assert out.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == ["place.osm", "roads.gpkg"]


def test_lines_in_pixels_of_an_image_without_a_place(tmp_path):
    tile = write_raster(tmp_path / "plain.png", np.zeros((3, 200, 200), "uint8"))
    lines = gpd.GeoDataFrame(geometry=[shapely.LineString([(0, 100), (200, 100)])])
    made = lines_graph(road_lines(lines, crs="pixels"), roads_to_graph.__globals__["image_grid"](tile))
    assert made.graph.crs is None and made.graph.length == pytest.approx(200) and "px" in str(made)


# ---- the command


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["aerial_roads2graph", *map(str, words)])
    try:
        aerial_roads2graph()
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_command(extract, image, tmp_path, monkeypatch, caplog):
    out = tmp_path / "roads.gpkg"
    with caplog.at_level(logging.INFO):
        assert run(monkeypatch, extract, out, "--image", image, "--points", tmp_path / "points.json") == 0
    assert "© OpenStreetMap contributors" in caplog.text and "1 crossings without a junction" in caplog.text
    assert "OpenStreetMap" in pyogrio.read_info(out)["dataset_metadata"]["attribution"]
    assert run(monkeypatch, extract, out) == 2
    assert "exists" in caplog.text
    assert run(monkeypatch, extract, tmp_path / "roads.dwg") == 2
    assert run(monkeypatch, extract, tmp_path / "west.p", "--box", "-71.1,42.3,-71.0,42.4") == 2
    assert "no roads here" in caplog.text


# ---- Overpass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        "A client that hangs up is part of the test."


class Answers(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(200, b"Connected as: 1\nCurrent time: now\nEndpoint: none\nRate limit: 2\n2 slots available now.\n")

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(dict(self.headers))
        moods = self.server.moods
        status, body, more = (*(moods.pop(0) if len(moods) > 1 else moods[0]), {}, {})[:3]
        time.sleep(more.pop("slow", 0) if isinstance(more, dict) else 0)
        if status == 0:
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.answer(status, body, more)

    def answer(self, status, body, more=None):
        self.send_response(status)
        for k, v in ((more or {}) | {"Content-Length": len(body)}).items():
            self.send_header(k, str(v))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def overpass(tmp_path, *moods, attempts=3, **more):
    host = Server(("127.0.0.1", 0), Answers)
    host.asked, host.moods, host.waits = [], list(moods), []
    thread = threading.Thread(target=host.serve_forever, kwargs=dict(poll_interval=.01), daemon=True)
    thread.start()
    line = Line(attempts=attempts, sleep=host.waits.append)
    try:
        yield host, Overpass(f"http://127.0.0.1:{host.server_port}/api/interpreter", **dict(timeout_s=1, line=line, cache=tmp_path / "kept") | more)
    finally:
        host.shutdown()
        host.server_close()
        thread.join(5)


def test_overpass_ways_become_the_same_graph_as_the_extract(extract, tmp_path):
    pytest.importorskip("osmnx")
    with overpass(tmp_path, (200, overpass_text())) as (host, server):
        made = roads_to_graph(f"overpass:{PLACE}", server=server)
        again = overpass_lines(PLACE, server)
    assert len(host.asked) == 1 and len(again) == 4 and "aerial_nb" in host.asked[0]["User-Agent"]
    file = roads_to_graph(extract, box=PLACE)
    assert (len(made.graph), made.crossings, made.graph.n_parts) == (len(file.graph), 1, 2)
    assert np.allclose(made.graph.nodes, file.graph.nodes, atol=.02)


@pytest.mark.parametrize("mood, waited", [((429, b"busy", {"Retry-After": "7"}), [7.]), ((504, b"busy"), [1.]), ((0, b""), [1.]),
                                          ((200, b"{}", {"slow": 1.6}), [1.])])
def test_what_passes_is_waited_for(tmp_path, mood, waited):
    pytest.importorskip("osmnx")
    before = socket.getaddrinfo
    with overpass(tmp_path, mood, (200, overpass_text())) as (host, server):
        assert len(overpass_lines(PLACE, server)) == 4
    assert host.waits == waited and len(host.asked) == 2 and socket.getaddrinfo is before


@pytest.mark.parametrize("mood, says", [
    ((429, b"busy"), "answered 429, 3 times in a row"), ((504, b"busy"), "answered 504"), ((400, b"<p>parse <b>error</b></p>"), r"refused the query \(400\): parse error"),
    ((200, b"<html>log in</html>"), "no answer of Overpass, but: log in"), ((200, b"[]"), "no elements"),
    ((200, overpass_text(remark="runtime error: Query timed out in \"query\"")), "Query timed out"), ((429, b"", {"Retry-After": "9000"}), "asks to wait 9000 s")])
def test_what_does_not_pass_is_said(tmp_path, mood, says):
    pytest.importorskip("osmnx")
    with overpass(tmp_path, mood) as (host, server), pytest.raises(DataError, match=says):
        overpass_lines(PLACE, server)
    assert len(host.asked) <= 3


def test_an_empty_answer_is_no_road(tmp_path):
    pytest.importorskip("osmnx")
    with overpass(tmp_path, (200, b'{"elements": []}')) as (_, server):
        assert len(overpass_lines(PLACE, server)) == 0
        with pytest.raises(DataError, match="no roads here"):
            roads_to_graph(f"overpass:{PLACE}", server=server)


def test_no_server_no_osmnx_and_a_country(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pytest.importorskip("osmnx")
    start = time.monotonic()
    with pytest.raises(DataError, match="cannot be reached"):
        overpass_lines(PLACE, Overpass(f"http://127.0.0.1:{port}", timeout_s=1, line=Line(attempts=1), cache=tmp_path))
    assert time.monotonic() - start < 40      # not the minute that osmnx waits
    with pytest.raises(DataError, match="use an extract"):
        overpass_lines("5,47,15,55")
    monkeypatch.setitem(sys.modules, "osmnx", None)
    with pytest.raises(DataError, match=r"pip install 'aerial_nb\[osm\]'"):
        overpass_lines(PLACE)


# ---- lists of places


def test_samples_csv_brings_scenes_and_splits(extract, image, tmp_path):
    home = tmp_path / "set"
    (home / "images").mkdir(parents=True)
    (home / "graphs").mkdir()
    image.rename(home / "images/tile.tif")
    write_roads(roads_to_graph(extract, home / "images/tile.tif", how=None), home / "graphs/tile.gpkg")
    assert graph_samples(home)[["scene", "split"]].values.tolist() == [["tile", ""]]
    (home / "samples.csv").write_text("image,scene,split\ntile.tif,berlin,valid\n")
    assert graph_samples(home)[["scene", "split"]].values.tolist() == [["berlin", "valid"]]
    (home / "samples.csv").write_text("image,scene,split\nother.tif,berlin,valid\n")
    with pytest.raises(DataError, match="other.tif, tile.tif"):
        graph_samples(home)
    (home / "samples.csv").write_text("image,split\ntile.tif,valid\n")
    with pytest.raises(DataError, match="no column scene"):
        graph_samples(home)


def test_a_transform_is_not_needed_twice():
    assert box_grid(PLACE).transform.b == 0 and isinstance(box_grid(PLACE).transform, Affine)
