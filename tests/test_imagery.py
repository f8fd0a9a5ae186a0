"""Tiles from a service in a thread that has every mood, pictures of a place, and data sets of both."""

import http.server
import io
import logging
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aerial_nb.data.download import Line
from aerial_nb.data.graphtiles import GraphStore, graph_samples
from aerial_nb.data.imagery import aerial_imagery, box_picture, write_picture
from aerial_nb.data.overpass import Box, box_grid
from aerial_nb.data.raster import DataError, raster_info, read_pixels, write_raster
from aerial_nb.data.roadset import Making, aerial_roadset, box_tiles, make_dataset
from aerial_nb.data.tileservice import Fetching, Service, fetch_tiles, named_service, open_service, pick_zoom, zoom_gsd
from aerial_nb.roads.graph import RoadGraph

pytest.importorskip("mercantile")
pytest.importorskip("xyzservices")
PLACE = Box(13.366, 52.518, 13.376, 52.523)      # nine tiles of zoom 16
TILE = "16/35202/21492"
KEY = "s3cret/key+1"


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        "A client that hangs up is part of the test."


class Tiles(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        host, name = self.server, self.path.partition("?")[0].strip("/")
        host.asked.append((name, time.monotonic(), dict(self.headers), self.path))
        moods = host.moods.get(name, [])
        mood = (moods.pop(0) if len(moods) > 1 else moods[0]) if moods else {}
        time.sleep(mood.get("slow", 0))
        body = mood.get("body", host.picture(*map(int, name.split("/"))))
        if mood.get("drop"):
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.send_response(mood.get("status", 200))
        for k, v in (mood.get("headers", {}) | {"Content-Length": len(body)}).items():
            self.send_header(k, str(v))
        self.end_headers()
        if "drip" in mood:
            for i in range(0, len(body), 8):
                self.wfile.write(body[i:i + 8])
                self.wfile.flush()
                time.sleep(mood["drip"])
        else:
            self.wfile.write(body[:mood.get("cut", len(body))])


def png(z, x, y, px=256):
    "A gradient that is continuous over the tiles: red grows east, green south."
    at = np.add.outer(np.zeros(px), np.arange(px))
    body = io.BytesIO()
    Image.fromarray(np.stack([(x % 8) * 32 + at / px * 32, (y % 8) * 32 + at.T / px * 32, at * 0 + 77], -1).astype("uint8")).save(body, "PNG")
    return body.getvalue()


@contextmanager
def tiles(tmp_path, moods=None, attempts=3, picture=png, **more):
    host = Server(("127.0.0.1", 0), Tiles)
    host.asked, host.waits, host.picture = [], [], picture
    host.moods = {k: list(v) for k, v in (moods or {}).items()}
    thread = threading.Thread(target=host.serve_forever, kwargs=dict(poll_interval=.01), daemon=True)
    thread.start()

    def wait(s):
        host.waits.append(s)
        time.sleep(min(s, .02))

    line = Line(attempts=attempts, timeout_s=(2, .6), longest_wait_s=60, sleep=wait)
    service = Service(f"http://127.0.0.1:{host.server_port}/{{z}}/{{x}}/{{y}}?key={{key}}", "© them", KEY)
    try:
        yield host, service, Fetching(**dict(line=line, cache=tmp_path / "cache") | more)
    finally:
        host.shutdown()
        host.server_close()
        thread.join(5)


def get(service, fetch, zoom=16):
    return fetch_tiles(PLACE, zoom, service, fetch, progress=False)


# ---- services and keys


@pytest.mark.parametrize("url, says", [("https://a.org/{z}/{x}.png", "is an address such as"), ("a.org/{z}/{x}/{y}", "is an address such as"),
                                       ("https://a.org/{z}/{x}/{y}?t={token}", "{token}"), ("https://a.org/{z}/{x}/{y}?k={key}", "needs a key")])
def test_what_is_no_service(url, says):
    with pytest.raises(DataError, match=says):
        Service(url, "© them")


def test_attribution_and_choice_are_asked_for(monkeypatch):
    with pytest.raises(DataError, match="whose pictures"):
        Service("https://a.org/{z}/{x}/{y}", " ")
    with pytest.raises(DataError, match="say which pictures"):
        open_service()
    monkeypatch.delenv("TILE_KEY", raising=False)
    with pytest.raises(DataError, match="TILE_KEY is empty"):
        open_service(url="https://a.org/{z}/{x}/{y}?k={key}", key_env="TILE_KEY", attribution="x")
    with pytest.raises(DataError, match="near: Esri"):
        named_service("Esri.WorldImagry")
    with pytest.raises(DataError, match="needs a key"):
        named_service("MapBox")


def test_addresses():
    import mercantile
    tile = mercantile.Tile(3, 1, 2)
    at = {u: Service("https://a.org/" + u, "x", KEY).address(tile) for u in ("{z}/{x}/{y}", "{z}/{x}/{-y}", "{q}.png?k={key}")}
    assert at == {"{z}/{x}/{y}": "https://a.org/2/3/1", "{z}/{x}/{-y}": "https://a.org/2/3/2", "{q}.png?k={key}": "https://a.org/13.png?k=s3cret%2Fkey%2B1"}
    assert named_service("Esri.WorldImagery").address(tile).endswith("/tile/2/1/3")
    assert KEY in named_service("MapTiler.Basic", "s3cret").hide("x") + KEY
    boxed = named_service("MapBox", "abcdefgh")
    assert "abcdefgh" in boxed.address(tile) and "abcdefgh" not in boxed.hide(boxed.address(tile)) and "abcdefgh" not in repr(boxed)


@given(st.floats(.1, 30), st.floats(-80, 80))
@settings(max_examples=60, deadline=None)
def test_the_zoom_is_the_coarsest_that_is_fine_enough(gsd, lat):
    service = Service("https://a.org/{z}/{x}/{y}", "x", max_zoom=30)
    zoom = pick_zoom(gsd, lat, service)
    assert zoom_gsd(zoom, lat) <= gsd * 1.1 * (1 + 1e-9) and (zoom == 0 or zoom_gsd(zoom - 1, lat) > gsd * 1.1 * (1 - 1e-9))


def test_a_service_that_ends_early_says_so(caplog):
    assert pick_zoom(.1, 50, Service("https://a.org/{z}/{x}/{y}", "x", max_zoom=17)) == 17
    assert "will be interpolated" in caplog.text


# ---- the moods of a server


def test_all_is_well_and_kept(tmp_path):
    with tiles(tmp_path) as (host, service, fetch):
        made = get(service, fetch)
        assert (made.count, made.missing, made.asked) == (9, 0, 9) and made.valid.all()
        assert get(service, fetch).asked == 0 and len(host.asked) == 9
    assert all("aerial_nb" in h["User-Agent"] and "s3cret%2Fkey%2B1" in p for _, _, h, p in host.asked)
    step = np.diff(made.data[0].astype(int), axis=1)
    assert step.min() >= 0 and step.max() <= 1      # tiles are where they belong


@pytest.mark.parametrize("mood, waited", [(dict(status=429, headers={"Retry-After": "0.6"}), .6), (dict(status=503), 1.), (dict(status=500), 1.), (dict(drop=True), 1.),
                                          (dict(cut=40), 1.), (dict(slow=1.), 1.)])
def test_what_passes_is_waited_for(tmp_path, mood, waited):
    with tiles(tmp_path, {TILE: [mood, {}]}) as (host, service, fetch):
        assert get(service, replace(fetch, threads=1)).missing == 0
    assert waited in [round(w, 1) for w in host.waits] and len(host.asked) == 10


def test_all_threads_wait_when_one_is_told_to(tmp_path):
    with tiles(tmp_path, {"16/35201/21491": [dict(status=429, headers={"Retry-After": "0.5"}), {}]}) as (host, service, fetch):
        get(service, fetch)
    told = host.asked[0][1]
    early = [n for n, t, *_ in host.asked if .1 < t - told < .45]
    assert len(host.asked) == 10 and not early


@pytest.mark.parametrize("mood, says", [
    (dict(status=403), f"tile {TILE} of 127.0.0.1: not admitted .403.: the key"), (dict(status=401), "not admitted"), (dict(status=500), f"tile {TILE} of .* answered 500, 3 times"),
    (dict(status=400, body=b"bad zoom " + KEY.encode()), r"refused \(400\): bad zoom \*\*\*"), (dict(body=b"<html>log in</html>"), f"tile {TILE} .* no picture, beginning '<html>"),
    (dict(body=png(1, 2, 3)[:200]), "no picture"), (dict(drop=True), "dropped the line"), (dict(status=429, headers={"Retry-After": "900"}), "asks to wait 900 s"),
    (dict(slow=1.), "ReadTimeout"), (dict(body=b"x" * 3000, drip=.02), "more than 0.2 s")])
def test_what_does_not_pass_names_the_tile_and_no_key(tmp_path, mood, says, caplog):
    with caplog.at_level(logging.DEBUG), tiles(tmp_path, {TILE: [mood]}, attempts=3 if "500" in says else 2, longest_s=.2) as (_, service, fetch):
        with pytest.raises(DataError, match=says) as error:
            get(service, fetch)
    assert TILE in str(error.value)
    for secret in (KEY, "s3cret"):
        assert secret not in str(error.value) and secret not in caplog.text
    kept = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert not any(secret.encode() in p.read_bytes() or secret in str(p) for p in kept)


def test_a_failed_call_goes_on_where_it_was(tmp_path):
    last = "16/35203/21493"
    with tiles(tmp_path, {last: [dict(status=403), {}]}) as (host, service, fetch):
        with pytest.raises(DataError):
            get(service, replace(fetch, threads=1))
        assert get(service, fetch).asked == 1


def test_missing_tiles_are_no_data(tmp_path, caplog):
    with tiles(tmp_path, {TILE: [dict(status=404)], "16/35203/21492": [dict(status=204, body=b"")]}) as (_, service, fetch):
        made = get(service, fetch)
        assert made.missing == 2 and made.valid.mean() == pytest.approx(7 / 9) and (made.data[:, ~made.valid] == 0).all()
        file = write_picture(box_picture(PLACE, service, 2., fetch=fetch, progress=False), tmp_path / "out.tif")
    assert "2 of 9 tiles are not there" in caplog.text
    assert not read_pixels(file).valid.all()
    with rasterio.open(file) as kept:
        assert kept.tags()["MISSING_TILES"] == "2"


def test_no_tile_at_all_and_the_same_one_everywhere(tmp_path, caplog):
    with tiles(tmp_path) as (host, service, fetch):
        host.moods = {f"16/{x}/{y}": [dict(status=404)] for x in range(35201, 35204) for y in range(21491, 21494)}
        with pytest.raises(DataError, match="none of 9 tiles at zoom 16"):
            get(service, fetch)
    with tiles(tmp_path, picture=lambda *_: png(0, 0, 0)) as (_, service, fetch):
        get(service, replace(fetch, cache=tmp_path / "other"))
    assert "9 of 9 tiles are the same picture" in caplog.text


def test_other_sizes_and_bombs(tmp_path):
    with tiles(tmp_path, {TILE: [dict(body=png(0, 0, 0, 512))]}) as (_, service, fetch):
        with pytest.raises(DataError, match="tiles of 256, 512 px"):
            get(service, fetch)
    large = io.BytesIO()
    Image.new("1", (4096, 4096)).save(large, "PNG")
    with tiles(tmp_path, {TILE: [dict(body=large.getvalue())]}) as (_, service, fetch):
        with pytest.raises(DataError, match="is no tile"):
            get(service, replace(fetch, cache=tmp_path / "b"))


def test_a_damaged_cache_is_asked_again(tmp_path):
    with tiles(tmp_path) as (host, service, fetch):
        get(service, fetch)
        next(p for p in (tmp_path / "cache").rglob("21492") if p.parent.name == "35202").write_bytes(b"half")
        assert get(service, fetch).asked == 1
        assert get(service, replace(fetch, keep=False)).asked == 9
        assert len([p for p in (tmp_path / "cache").rglob("*") if p.is_file()]) == 9


def test_too_many_tiles_are_refused_before_any_is_asked(tmp_path):
    with tiles(tmp_path) as (host, service, fetch):
        with pytest.raises(DataError, match="9 tiles at zoom 16, and 8 is the limit"):
            get(service, replace(fetch, most_tiles=8))
        with pytest.raises(DataError, match="is the limit"):
            box_picture("-170,-60,170,60", service, crs="EPSG:3857", fetch=fetch)
        with pytest.raises(DataError, match="too many for one picture"):
            box_picture("13,52,14,53", service, .5, fetch=fetch)
        assert not host.asked


def test_nobody_there(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    service = Service(f"http://127.0.0.1:{port}/{{z}}/{{x}}/{{y}}", "x")
    with pytest.raises(DataError, match="is this machine online"):
        get(service, Fetching(line=Line(attempts=2, sleep=lambda s: None), cache=tmp_path))


def test_libraries_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "mercantile", None)
    with pytest.raises(DataError, match=r"pip install 'aerial_nb\[osm\]'"):
        get(Service("https://a.org/{z}/{x}/{y}", "x"), Fetching())


# ---- pictures


def test_pixels_are_where_the_tiles_say(tmp_path):
    "The gradient of the tiles, computed for the centres of the pixels of the UTM grid."
    from pyproj import Transformer
    with tiles(tmp_path) as (_, service, fetch):
        made = box_picture(PLACE, service, 2., fetch=fetch, progress=False)
    rows, cols = made.valid.shape
    t = made.grid.transform
    x, y = np.meshgrid(t.c + t.a * (np.arange(cols) + .5), t.f + t.e * (np.arange(rows) + .5))
    u, v = Transformer.from_crs(made.grid.crs, "EPSG:3857", always_xy=True).transform(x, y)
    side = 2 * np.pi * 6378137 / 2**16
    want = [((u + side * 2**15) / side % 8) * 32 - .5, ((side * 2**15 - v) / side % 8) * 32 - .5]
    for band, expected in zip(made.data[:2].astype(float), want):
        assert np.abs(band - expected)[2:-2, 2:-2].max() < 1.1
    assert made.valid.all() and made.grid.gsd_m == pytest.approx(2, rel=1e-3)


def test_mercator_keeps_the_pixels(tmp_path):
    with tiles(tmp_path) as (_, service, fetch):
        made = box_picture(PLACE, service, 2., "EPSG:3857", fetch=fetch, progress=False)
        whole = get(service, fetch)
    info = raster_info(write_picture(made, tmp_path / "m.tif"))
    c, r = (round((made.grid.transform.c - whole.transform.c) / whole.transform.a), round((made.grid.transform.f - whole.transform.f) / whole.transform.e))
    rows, cols = made.valid.shape
    assert np.array_equal(made.data, whole.data[:, r:r + rows, c:c + cols]) and info.crs.to_epsg() == 3857
    assert info.gsd_m == pytest.approx(zoom_gsd(16, 52.52), rel=.01)


def test_the_picture_says_whose_it_is_and_nothing_of_the_key(tmp_path):
    with tiles(tmp_path) as (_, service, fetch):
        made = box_picture(PLACE, service, 4., fetch=fetch, progress=False)
    file = write_picture(made, tmp_path / "p.tif")
    with rasterio.open(file) as kept:
        assert kept.tags()["ATTRIBUTION"] == "© them" and kept.tags()["ZOOM"] == "15"
    assert b"s3cret" not in file.read_bytes()
    with pytest.raises(DataError, match="exists"):
        write_picture(made, file)
    with pytest.raises(DataError, match="written as .tif"):
        write_picture(made, tmp_path / "p.jpg")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    with tiles(tmp_path) as (_, service, fetch):
        made = box_picture(PLACE, service, 4., fetch=fetch, progress=False)
    monkeypatch.setattr("aerial_nb.data.imagery.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match="No space left"):
        write_picture(made, tmp_path / "p.tif")
    assert not list(tmp_path.glob("*.tif")) and not list(tmp_path.glob(".*"))


def run(monkeypatch, main, *words):
    monkeypatch.setattr(sys, "argv", [main.__name__, *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_command(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TILE_KEY", KEY)
    monkeypatch.setenv("AERIAL_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "place.tif"
    with caplog.at_level(logging.INFO), tiles(tmp_path) as (host, service, _):
        words = ["--url", service.url, "--key_env", "TILE_KEY", "--attribution", "© them", "--gsd_m", "2"]
        assert run(monkeypatch, aerial_imagery, PLACE, out, *words) == 0
        assert run(monkeypatch, aerial_imagery, PLACE, out, *words) == 2 and "exists" in caplog.text
        assert run(monkeypatch, aerial_imagery, "-71.06,42.35,-71.055,42.353", tmp_path / "boston.tif", *words) == 0
        assert run(monkeypatch, aerial_imagery, PLACE, tmp_path / "b.tif", "--url", service.url, "--key_env", "TILE_KEY") == 2
        assert run(monkeypatch, aerial_imagery, "13,52", tmp_path / "b.tif", *words) == 2
    assert raster_info(out).gsd_m == pytest.approx(2) and "read its terms" in caplog.text and "s3cret" not in caplog.text
    assert raster_info(tmp_path / "boston.tif").crs.to_epsg() == 32619


# ---- data sets


def streets(*boxes):
    lines = [shapely.LineString([(b.west - .001, (b.south + b.north) / 2), (b.east + .001, (b.south + b.north) / 2)]) for b in boxes]
    return gpd.GeoDataFrame(dict(highway=["residential"] * len(lines)), geometry=lines, crs="EPSG:4326")


APART = [Box(13.366 + .1 * i, 52.518, 13.370 + .1 * i, 52.5205) for i in range(3)]


def test_boxes_become_samples_that_a_store_reads(tmp_path):
    how = Making(fractions=(.34, .33, .33))
    with tiles(tmp_path) as (host, service, fetch):
        how = replace(how, fetch=fetch)
        made = make_dataset(APART, tmp_path / "set", streets(*APART), service, how, progress=False)
        asked = len(host.asked)
        assert make_dataset(APART, tmp_path / "set", streets(*APART), service, how, progress=False).equals(made) and len(host.asked) == asked
    assert sorted(made.split) == ["test", "train", "valid"] and "© them" in (tmp_path / "set/ATTRIBUTION.md").read_text()
    store = GraphStore(graph_samples(tmp_path / "set"), cache=tmp_path / "store", progress=False)
    for tile, i in zip(store.graphs, range(3)):
        rows, cols = store.tiles.shape(i)
        assert tile.graph.length == pytest.approx(cols, rel=.45) and abs(tile.graph.nodes[:, 1].mean() - rows / 2) < 5


def test_roads_of_openstreetmap_are_asked_for_each_place_and_said_to_be_theirs(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("aerial_nb.data.osm.overpass_lines", lambda box, server: asked.append(box) or streets(*APART))
    with tiles(tmp_path) as (_, service, fetch):
        for _ in range(2):
            make_dataset(APART[:2], tmp_path / "set", "overpass", service, Making(fetch=fetch), progress=False)
        make_dataset(APART[2:], tmp_path / "set", streets(*APART), replace(service, attribution="© others"), Making(fetch=fetch), progress=False)
    assert len(asked) == 2 and all(a.west <= b.west and a.east >= b.east for a, b in zip(asked, APART))
    said = (tmp_path / "set/ATTRIBUTION.md").read_text()
    assert "OpenStreetMap" in said and "© them" in said and "© others" in said
    assert len(graph_samples(tmp_path / "set")) == 3


def test_failed_places_are_named_and_the_others_kept(tmp_path):
    with tiles(tmp_path) as (_, service, fetch):
        with pytest.raises(DataError, match="1 of 3 places failed(.|\n)*no roads here"):
            make_dataset(APART, tmp_path / "set", streets(*APART[:2]), service, Making(fetch=fetch), progress=False)
        assert len(list((tmp_path / "set/graphs").iterdir())) == 2
        with pytest.raises(DataError, match="no places"):
            make_dataset([], tmp_path / "set")
        with pytest.raises(DataError, match="have the name of another"):
            make_dataset([APART[0], APART[0]], tmp_path / "set", streets(*APART), service)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="no data set of this kind"):
        make_dataset([tmp_path / "a.tif"], tmp_path / "mine", streets(*APART))


def test_tiles_of_a_large_box_touch_and_are_places_of_their_own(tmp_path):
    found = box_tiles("13.366,52.518,13.372,52.5205", 128, 1.)
    edges = [(t.transform.c, t.transform.c + 128) for t in found]
    assert {t.shape for t in found} == {(128, 128)} and len(found) == len({(t.transform.c, t.transform.f) for t in found}) == (407 // 128) * (287 // 128)
    assert {b for _, b in edges} - {a for a, _ in edges} == {max(b for _, b in edges)}
    with pytest.raises(DataError, match="smaller than a tile"):
        box_tiles("13.366,52.518,13.372,52.5205", 2048)
    with pytest.raises(DataError, match="100 is the limit|is the limit"):
        box_tiles("13,52,14,53", 500)
    with tiles(tmp_path) as (_, service, fetch):
        made = make_dataset(found[:3], tmp_path / "set", streets(Box(13.36, 52.518, 13.38, 52.5230)), service, Making(fetch=fetch), progress=False)
    assert made.scene.nunique() == 3 and sorted(made.split.unique()) == ["test", "train", "valid"]
    assert all(raster_info(p).shape == (128, 128) for p in made.image)


def test_images_of_ones_own_and_the_command(tmp_path, monkeypatch, caplog):
    grid = box_grid(APART[0], 1.)
    (tmp_path / "mine").mkdir()
    for i, box in enumerate(APART):
        g = box_grid(box, 1.)
        write_raster(tmp_path / f"mine/t{i}.tif", np.full((3, *g.shape), 9 * i + 5, "uint8"), g.crs.to_wkt(), g.transform)
    streets(*APART).to_file(tmp_path / "lines.gpkg")
    with caplog.at_level(logging.INFO):
        assert run(monkeypatch, aerial_roadset, tmp_path / "set", "--images", tmp_path / "mine", "--lines", tmp_path / "lines.gpkg") == 0
    assert "3 places" in caplog.text and len(graph_samples(tmp_path / "set")) == 3
    assert run(monkeypatch, aerial_roadset, tmp_path / "set2", "--boxes", APART[0], "--lines", tmp_path / "lines.gpkg") == 2
    assert "need a service" in caplog.text
    write_raster(tmp_path / "plain.png", np.zeros((3, *grid.shape), "uint8"))
    with pytest.raises(DataError, match="no place"):
        make_dataset([tmp_path / "plain.png"], tmp_path / "set3", "overpass", progress=False)


def test_two_images_are_too_few_for_three_parts(tmp_path, caplog):
    g = box_grid(APART[0], 1.)
    image = write_raster(Path(tmp_path) / "one.tif", np.full((3, *g.shape), 9, "uint8"), g.crs.to_wkt(), g.transform)
    made = make_dataset([image], tmp_path / "set", streets(*APART), progress=False)
    assert made.split.tolist() == [""] and "1 places are fewer than 3 parts" in caplog.text
    assert isinstance(GraphStore(made, cache=tmp_path / "c", progress=False).graphs[0].graph, RoadGraph)
