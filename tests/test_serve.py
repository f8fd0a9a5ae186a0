"""The service: uploads that are not what they seem, options, queues, time limits, stopping, the page and its container."""
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
import torch
from PIL import Image
from pyproj import Transformer
from rasterio.io import MemoryFile
from rasterio.transform import from_origin

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")

import httpx
import uvicorn
from fastapi.testclient import TestClient

from aerial_nb.data.loaders import Stats
from aerial_nb.data.raster import DataError, read_pixels
from aerial_nb.models.zoo import build
from aerial_nb.roads.graph import RoadGraph
from aerial_nb.roads.gte import encode
from aerial_nb.scenes import serve, servepage
from aerial_nb.scenes.answers import OPTIONS, Job, choose, read_options, serve_models
from aerial_nb.scenes.eyes import Eye, Look
from aerial_nb.scenes.graphwindows import graph_predictor
from aerial_nb.scenes.rasters import predict_raster
from aerial_nb.scenes.serve import make_app
from aerial_nb.scenes.upload import Limits, Refused, _unpacked_size, accept, driver_of, without_paths
from aerial_nb.training.saved import ModelCard, save_model

ROOT = Path(__file__).parents[1]
UTM = dict(crs="EPSG:32633", transform=from_origin(5e5, 5e6, 1., 1.))
SIZES = dict(bands=3, width=4, depth=2)
PATHS = re.compile(r"(?<![\w.:/])/(?:home|root|work|tmp|Users|var|opt|usr|private)/[\w.-]+|Traceback|File \"")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CARD = dict(mean=(120,) * 3, std=(50,) * 3, gsd_m=1., threshold=.5, extra=dict(size=64))


def bright(pixels, valid): return (pixels.astype("float32").mean(1) / 255).clip(0, 1)


def eye(name="bright", network=bright, classes=("background", "building"), **card):
    return Eye(name, ModelCard("none", classes=classes, **CARD | card), "1", lambda device: network)


def noise(seed=0, shape=(64, 64), bands=3): return np.random.default_rng(seed).integers(1, 255, (bands, *shape), dtype="uint8")


def block(shape=(64, 64)):
    image = np.full((3, *shape), 40, "uint8")
    image[:, 20:40, 10:50] = 220
    return image


def tif(pixels, **more):
    pixels = np.asarray(pixels)
    with MemoryFile() as memory:
        with memory.open(**dict(driver="GTiff", width=pixels.shape[2], height=pixels.shape[1], count=len(pixels), dtype=pixels.dtype) | UTM | more) as file:
            file.write(pixels)
        return memory.read()


def picture(pixels, kind="PNG", **more):
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1).squeeze())).save(buffer, kind, **more)
    return buffer.getvalue()


def opened(content):
    with MemoryFile(content) as memory, memory.open() as d: return d.read(), d.crs, d.transform


def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A small network with random weights whose answers differ from place to place."
    folder = tmp_path_factory.mktemp("models") / "small"
    torch.manual_seed(1)
    model = build("unet", **SIZES).eval()
    with torch.no_grad(): model.score.weight *= 60
    save_model(folder, model, "unet", SIZES, stats=((120.,) * 3, (50.,) * 3), threshold=.5, gsd_m=1., data="/home/somebody/elsewhere",
               metrics=dict(iou=.5), extra=dict(size=64))
    return folder


@pytest.fixture(scope="module")
def client():
    with TestClient(make_app([eye(), eye("roads", classes=("background", "road"))], Limits(max_mb=2, max_mpx=1, timeout_s=30))) as c: yield c


@contextmanager
def running(app):
    "A real server on a port of its own."
    listener = serve._listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listener]), daemon=True)
    thread.start()
    for _ in range(400):
        if server.started: break
        time.sleep(.025)
    assert server.started
    try: yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


# ---------------------------------------------------------------- many at once

def at_once(url, bodies, **options):
    with httpx.Client(timeout=100, limits=httpx.Limits(max_connections=100)) as http, ThreadPoolExecutor(100) as many:
        return list(many.map(lambda body: http.post(f"{url}/predict", params=options, content=body), bodies))


def test_a_hundred_requests_at_once_lose_none(saved, tmp_path):
    bodies, expected = [tif(noise(k)) for k in range(20)], []
    for k, body in enumerate(bodies):
        (tmp_path / f"{k}.tif").write_bytes(body)
        predict_raster(tmp_path / f"{k}.tif", str(saved), tmp_path / f"{k}_out.tif", Look(), workers=1, progress=False)
        expected.append(opened((tmp_path / f"{k}_out.tif").read_bytes())[0])
    assert len({e.tobytes() for e in expected}) == 20   # no two are alike
    app = make_app([saved], Limits(queue=128))
    with running(app) as url:
        answers = at_once(url, bodies * 5, output="mask")
        assert [a.status_code for a in answers] == [200] * 100
        for k, a in enumerate(answers): assert (opened(a.content)[0] == expected[k % 20]).all()
        state = httpx.get(f"{url}/health").json()
        assert (state["inside"], state["waiting"], state["ready"]) == (0, 0, True)
        assert not list(Path(app.state.desk.place.name).iterdir())


def test_a_full_queue_says_when_to_come_back(saved):
    bodies = [tif(noise(k)) for k in range(4)] * 25
    with running(make_app([saved], Limits(queue=2))) as url:
        answers = at_once(url, bodies, output="mask")
        found = {a.status_code for a in answers}
        assert found == {200, 503}
        for a in answers:
            if a.status_code == 503: assert 1 <= int(a.headers["retry-after"]) <= 60 and "queue is full" in a.json()["error"]
        with ThreadPoolExecutor(6) as many:   # whoever comes back is served
            def patient(body):
                for _ in range(300):
                    a = httpx.post(f"{url}/predict?output=mask", content=body, timeout=60)
                    if a.status_code != 503: return a.status_code
                    time.sleep(.02)
            assert set(many.map(patient, bodies[:12])) == {200}


def test_a_network_is_entered_by_one_request_at_a_time():
    inside, most, calls = [], [], []
    def careful(pixels, valid):
        inside.append(1); most.append(len(inside)); time.sleep(.01); inside.pop(); calls.append(1)
        return bright(pixels, valid)
    made = []
    both = [Eye(name, ModelCard("none", classes=("background", "building"), **CARD), "1", lambda device: made.append(1) or careful) for name in "ab"]
    with running(make_app(both, Limits(queue=32, workers=4))) as url, ThreadPoolExecutor(12) as many:
        asked = [(f"{url}/predict?output=mask&model={'ab'[k % 2]}", tif(noise(k))) for k in range(12)]
        assert {a.status_code for a in many.map(lambda x: httpx.post(x[0], content=x[1], timeout=60), asked)} == {200}
    assert max(most) == 1 and len(calls) == 12 and len(made) == 2   # and its weights are read once


# ---------------------------------------------------------------- over the wire

def test_a_large_body_is_refused_before_it_is_read():
    sent = []
    def parts():
        for _ in range(2000): sent.append(1); yield bytes(1 << 16)
    with running(make_app([eye()], Limits(max_mb=1))) as url:
        answer = httpx.post(f"{url}/predict", content=parts(), timeout=30)
        assert answer.status_code == 413 and "1 MB" in answer.json()["error"]
        said = httpx.post(f"{url}/predict", content=bytes(3_000_000), timeout=30)   # declared
        assert said.status_code == 413
        begun = time.monotonic()
        with socket.create_connection((url[7:].split(":")[0], int(url.rsplit(":", 1)[1]))) as line:   # declares, and sends nothing
            line.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99000000\r\n\r\n")
            line.settimeout(10)
            assert b"413" in line.recv(4096) and time.monotonic() - begun < 2
        assert httpx.get(f"{url}/health").json()["inside"] == 0


def test_an_image_that_does_not_arrive_and_one_that_hangs_up():
    with running(make_app([eye()], Limits(timeout_s=.5, queue=2))) as url:
        host, port = "127.0.0.1", int(url.rsplit(":", 1)[1])
        with socket.create_connection((host, port)) as line:
            line.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n\x89PNG")
            line.settimeout(10)
            assert b"408" in line.recv(4096)
        with socket.create_connection((host, port)) as line:
            line.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n\x89PNG")
        for _ in range(100):
            if httpx.get(f"{url}/health").json()["inside"] == 0: break
            time.sleep(.02)
        assert httpx.get(f"{url}/health").json()["inside"] == 0


def test_work_ends_when_its_time_is_over_or_its_caller_gone():
    seen = []
    def slow(pixels, valid): seen.append(1); time.sleep(.1); return bright(pixels, valid)
    body = tif(noise(shape=(640, 640)))   # many batches
    with running(make_app([eye("slow", slow)], Limits(timeout_s=.4, queue=1, workers=1))) as url:
        answer = httpx.post(f"{url}/predict", content=body, timeout=30)
        assert answer.status_code == 504 and httpx.get(f"{url}/health").json()["inside"] == 0
        time.sleep(.3); after = len(seen); time.sleep(.5)
        assert len(seen) == after < 20
        with pytest.raises(httpx.TimeoutException): httpx.post(f"{url}/predict", content=body, timeout=.15)
        for _ in range(40):
            if httpx.get(f"{url}/health").json()["inside"] == 0: break
            time.sleep(.01)
        time.sleep(.25); after = len(seen); time.sleep(.3)
        assert len(seen) == after


# ---------------------------------------------------------------- bad input

def png_of(width, height, *more, bits=8):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(bytes(height * (1 + 3 * width)) if width < 5000 else bytes(99))) + chunk(b"IEND", b"")


def bare_tiff(width, height, **tags):
    "The header of a TIFF without pixels."
    values = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 100} | {int(k[1:]): v for k, v in tags.items()}
    rows = b"".join(struct.pack("<HHII", k, 4, 1, v) for k, v in sorted(values.items()))
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(values)) + rows + bytes(4) + bytes(100)


VRT = (b"<VRTDataset rasterXSize='64' rasterYSize='64'><VRTRasterBand dataType='Byte' band='1'><SimpleSource>"
       b"<SourceFilename>/etc/hostname</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>")

BAD = {
    "nothing": (b"", 422, "no bytes"),
    "a VRT": (VRT, 415, "VRT"),
    "a VRT behind spaces": (b"  \n" + VRT, 415, "VRT"),
    "a remote path": (b"/vsicurl/http://127.0.0.1/a.tif", 415, "PNG, a JPEG or a GeoTIFF"),
    "a PDF": (b"%PDF-1.7", 415, "PDF"),
    "a zip": (b"PK\3\4" + bytes(99), 415, "zip"),
    "text": (b"hello", 415, "PNG"),
    "a huge PNG": (png_of(100_000, 100_000), 413, "million pixels"),
    "a huge TIFF": (bare_tiff(200_000, 200_000), 413, "million pixels"),
    "huge tiles": (bare_tiff(64, 64, t322=40_000, t323=40_000, t324=8, t325=100), 413, "blocks"),
    "half a PNG": (picture(noise())[:3000], 422, "truncated"),
    "a flipped bit": (bytes(b ^ (k == 500) for k, b in enumerate(picture(noise()))), 422, "checksum"),
    "a PNG of too few rows": (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)) +
                              chunk(b"IDAT", zlib.compress(bytes(500))) + chunk(b"IEND", b""), 422, "corrupt"),
    "half a JPEG": (picture(noise(), "JPEG")[:1500], 422, "corrupt"),
    "half a TIFF": (tif(noise())[:4000], 422, "corrupt"),
    "only a head": (b"II*\0", 422, "corrupt"),
    "one band": (picture(noise(bands=1)), 422, "1 bands, and the model was trained on 3"),
    "five bands": (tif(noise(bands=5)), 422, "5 bands"),
    "complex numbers": (tif(noise().astype("complex64")), 422, "complex"),
    "another scaling": (tif((noise() * 250.).astype("float32")), 422, "trained on bytes"),
    "no place": (picture(noise()), 422, "give gsd_m"),
    "a thousandth of the size": (tif(noise(), transform=from_origin(5e5, 5e6, 1e-3, 1e-3)), 422, "eight times apart"),
}


def interlaced(pixels):
    "A PNG of (h, w) bytes in the seven passes of Adam7."
    passes = (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)
    rows = b"".join(b"\0" + bytes(row) for x, y, dx, dy in passes for row in pixels[y::dy, x::dx] if len(row))
    high, wide = pixels.shape
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", wide, high, 8, 0, 0, 0, 1)) +
            chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")), len(rows)


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (5, 3), (64, 37), (3, 70)])
def test_rows_of_an_interlaced_png_are_counted(tmp_path, shape):
    pixels = np.random.default_rng(3).integers(0, 256, shape, np.uint8)
    content, size = interlaced(pixels)
    assert _unpacked_size(content[16:29]) == size and (shape != (8, 8) or size == 79)
    (tmp_path / "a.png").write_bytes(content)
    with rasterio.open(accept(tmp_path / "a.png", Limits()).path) as d: assert np.array_equal(d.read(1), pixels)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_pngs_of_every_kind_have_all_their_rows(tmp_path, mode):
    noisy = Image.fromarray(np.random.default_rng(4).integers(0, 256, (33, 41, 4), np.uint8), "RGBA")
    made = Image.fromarray(np.arange(33 * 41, dtype=np.uint16).reshape(33, 41)) if mode == "I;16" else noisy.convert("RGB").convert(mode)
    made.save(tmp_path / "a.png")
    assert accept(tmp_path / "a.png", Limits()).info.shape == (33, 41)


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_image_or_does_not_fit(client, what):
    content, status, text = BAD[what]
    answer = client.post("/predict?output=mask", content=content)
    assert answer.status_code == status and text in answer.json()["error"], answer.text
    assert not PATHS.search(answer.text) and answer.json()["status"] == status
    form = client.post("/predict", files={"file": ("../../etc/x.png", content)}, data=dict(output="mask"))
    assert form.status_code == status and not PATHS.search(form.text)
    assert not list(Path(client.app.state.desk.place.name).iterdir())


def test_a_million_pixels_seen_at_another_size_are_many_more(client):
    large = tif(noise(shape=(450, 450)), transform=from_origin(5e5, 5e6, 7., 7.))
    answer = client.post("/predict?output=mask", content=large)   # 450 x 450 x 49
    assert answer.status_code == 413 and "once it is shown" in answer.json()["error"]


def test_comments_that_unpack_to_gigabytes_are_left_out(tmp_path):
    packed = zlib.compress(bytes(100_000_000), 9)
    bomb = png_of(32, 32, *[chunk(b"zTXt", b"Comment%d\0\0" % k + packed) for k in range(8)], chunk(b"iCCP", b"x\0\0" + packed))
    (tmp_path / "upload").write_bytes(bomb)
    began = time.process_time()
    assert accept(tmp_path / "upload", Limits()).info.shape == (32, 32)
    assert time.process_time() - began < .3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GTiff"])
def test_whatever_is_broken_it_is_an_image_or_refused(kind, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL, "rasterio")
    good = tif(noise(shape=(24, 24)), compress="deflate") if kind == "GTiff" else picture(noise(shape=(24, 24)), kind)
    dice, ends = np.random.default_rng(0), []
    for k in range(150):
        bad = bytearray(good)
        for at in dice.integers(3, min(len(bad), 400 if k % 2 else len(bad)), 1 + k % 4): bad[at] = dice.integers(256)
        if k % 5 == 0: bad = bad[:dice.integers(4, len(bad))]
        (tmp_path / "upload").write_bytes(bad)
        try: ends.append(accept(tmp_path / "upload", Limits(max_mpx=1), 3).info.shape)
        except Refused as no:
            ends.append(no.status)
            assert no.status in (413, 415, 422) and not PATHS.search(str(no)), str(no)
    assert 422 in ends


def test_no_neighbour_of_a_file_is_looked_at(tmp_path):
    (tmp_path / "upload").write_bytes(tif(noise(), crs=None, transform=rasterio.Affine.identity()))
    (tmp_path / "upload.aux.xml").write_text("<PAMDataset><SRS>EPSG:32633</SRS><GeoTransform>5,1,0,5,0,-1</GeoTransform></PAMDataset>")
    for name in ("upload.tfw", "upload.wld"): (tmp_path / name).write_text("1\n0\n0\n-1\n500000\n5000000\n")
    assert accept(tmp_path / "upload", Limits()).info.crs is None


def test_a_driver_is_chosen_by_bytes_and_opens_nothing_else(tmp_path):
    for name, content in (("JPEG", tif(noise())), ("GTiff", picture(noise())), ("PNG", VRT)):
        from aerial_nb.scenes.upload import opened as open_alone
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(Refused) as no, open_alone(tmp_path / "a", name): pass
        assert no.value.status == 422
    assert driver_of(b"MM\0*") == "GTiff"


def test_the_copy_is_the_image(tmp_path):
    pixels = noise(3, (40, 50))
    hole = tif(np.concatenate([pixels, np.where(np.arange(50) < 9, 0, 255)[None, None].repeat(40, 1).astype("uint8")]), photometric="rgb", alpha="yes")
    nodata = tif(np.where(np.arange(50) < 9, 7, pixels), nodata=7)
    palette = io.BytesIO(); Image.fromarray(np.moveaxis(pixels, 0, -1)).quantize(16).save(palette, "PNG")
    for content in (hole, nodata, tif(pixels.astype("uint16") * 40), palette.getvalue(), picture(pixels, "JPEG", quality=70), picture(pixels, "JPEG", progressive=True)):
        (tmp_path / "a.img").write_bytes(content); (tmp_path / "upload").write_bytes(content)
        a, b = read_pixels(tmp_path / "a.img"), read_pixels(accept(tmp_path / "upload", Limits(), 3).path)
        assert (a.valid == b.valid).all() and (a.data == b.data)[:, a.valid].all() and a.data.dtype == b.data.dtype
        assert a.crs == b.crs and a.transform == b.transform


def test_messages_name_nothing_of_the_machine(tmp_path):
    said = without_paths(f"{tmp_path}/clean.tif: bad; see /usr/lib/x.so, C:\\Users\\ann\\b, https://a.org/home", tmp_path / "clean.tif")
    assert said == "the image: bad; see a file, a file, https://a.org/home"


def test_an_error_inside_is_a_number_outside(caplog):
    def broken(pixels, valid): raise KeyError("/home/ann/secret")
    with TestClient(make_app([eye("broken", broken)])) as c:
        answer = c.post("/predict?output=mask", content=tif(noise()))
    assert answer.status_code == 500 and "secret" not in answer.text and not PATHS.search(answer.text)
    number = re.search(r"[0-9a-f]{8}$", answer.json()["error"]).group()
    assert any(number in r.getMessage() and r.exc_info for r in caplog.records)


def test_a_network_that_gives_no_probabilities(client):
    with TestClient(make_app([eye("nan", lambda p, v: np.full(v.shape, np.nan, "float32"))])) as c:
        answer = c.post("/predict?output=mask", content=tif(noise()))
    assert answer.status_code == 422 and "no probabilities" in answer.json()["error"] and not PATHS.search(answer.text)


# ---------------------------------------------------------------- options

@pytest.mark.parametrize("given, text", [
    ("treshold=.5", "Did you mean threshold?"), ("threshold=1.5", "up to 1"), ("threshold=nan", "above 0"), ("gsd_m=0", "above 0"),
    ("output=raods", "Did you mean roads?"), ("threshold=.5&threshold=.6", "twice"), ("output=graph", "buildings or mask"),
    ("output=mask&threshold=.5", "means nothing for mask"), ("output=mask&format=geojson", "geotiff or png"), ("thr=.5", "option of graph"),
    ("output=buildings&format=png", "geojson or geopackage"), ("gsd_m=wide", "is a number"), ("min_area_m2=-1", "above 0"), ("coordinates=utm", "auto, pixels"),
])
def test_options_that_mean_nothing_are_refused(client, given, text):
    answer = client.post(f"/predict?{given}", content=tif(block()))
    assert answer.status_code == 422 and text in answer.json()["error"]


def test_models_by_name(client):
    missing = client.post("/predict?model=raods", content=tif(block()))
    assert missing.status_code == 404 and "Did you mean roads?" in missing.json()["error"] and "bright, roads" in missing.json()["error"]
    assert client.post("/predict?model=roads&output=mask", content=tif(block())).headers["aerial-model"] == "roads"
    assert client.post("/predict", data=dict(model="roads", output="mask"), files=dict(image=("a.tif", tif(block())))).headers["aerial-model"] == "roads"
    with pytest.raises(DataError, match="two models are called bright"): make_app([eye(), eye()])
    with pytest.raises(DataError, match="no model to serve"): make_app([])
    with pytest.raises(DataError, match="nowhere"): make_app(["nowhere"])


def test_every_option_has_its_names():
    found = read_options([("v_thr", ".1"), ("e_thr", ".2"), ("snap_px", "20"), ("angle_weight", "50")])
    assert found == dict(thr=.1, edge_thr=.2, snap_px=20, angle_weight=50)
    models = serve_models([eye("both", classes=("background", "road", "building"))])
    assert choose(models, {})[1]["output"] == "roads" and choose(models, {"output": "buildings"})[1]["min_area_m2"] == 10
    assert len({o.name for o in OPTIONS}) == len(OPTIONS)
    job = Job(time.monotonic() - 1)
    with pytest.raises(Refused) as no: job.check()
    assert no.value.status == 504


# ---------------------------------------------------------------- answers

def test_pixels_and_degrees_are_the_same_place(client):
    there, here = (client.post(f"/predict?{q}", content=tif(block())) for q in ("", "coordinates=pixels"))
    assert there.headers["content-type"] == "application/geo+json" and here.headers["content-type"] == "application/json"
    (feature,), (shape,) = there.json()["features"], here.json()["shapes"]
    assert there.json()["type"] == "FeatureCollection" and "type" not in here.json() and here.json()["crs"] == "pixels"
    x, y = np.array(shape["geometry"]["coordinates"][0]).T
    assert (x.min(), x.max(), y.min(), y.max()) == (10, 50, 20, 40)
    lon, lat = Transformer.from_crs("EPSG:32633", 4326, always_xy=True).transform(5e5 + x, 5e6 - y)
    found = np.array(feature["geometry"]["coordinates"][0])
    assert found.min(0) == pytest.approx([lon.min(), lat.min()], abs=2e-9) and found.max(0) == pytest.approx([lon.max(), lat.max()], abs=2e-9)
    assert feature["properties"]["area_m2"] == pytest.approx(800, rel=1e-3)


def test_areas_of_a_picture_by_its_pixel_size(client):
    found = client.post("/predict?gsd_m=1.01", content=picture(block())).json()
    assert found["shapes"][0]["properties"]["area_m2"] == pytest.approx(800 * 1.01**2) and found["shapes"][0]["properties"]["area_px"] == 800
    assert client.post("/predict?gsd_m=1.01&min_area_m2=810", content=picture(block())).json()["count"] == 1   # 800 pixels are 816 m2
    assert client.post("/predict?gsd_m=1.01&min_area_m2=820", content=picture(block())).json()["count"] == 0


def test_threshold_counts_and_nothing_found_is_an_answer(client):
    answer = client.post("/predict?threshold=0.95", content=tif(block()))
    assert answer.status_code == 200 and answer.json()["features"] == [] and answer.headers["aerial-count"] == "0"
    roads = client.post("/predict?model=roads&threshold=0.95", content=picture(block()), params=dict(gsd_m=1))
    assert roads.status_code in (200, 422)
    line = np.full((3, 64, 64), 30, "uint8"); line[:, 30:35] = 230
    found = client.post("/predict", params=dict(model="roads", gsd_m=1), content=picture(line)).json()
    assert found["output"] == "roads" and found["count"] == 1 and found["shapes"][0]["properties"]["length_m"] == pytest.approx(64, abs=4)


def test_a_geopackage_holds_the_layers_in_the_images_crs(client, tmp_path):
    line = np.full((3, 64, 64), 30, "uint8"); line[:, 30:35] = 230
    answer = client.post("/predict?model=roads&format=geopackage", content=tif(line))
    assert answer.headers["content-disposition"] == 'attachment; filename="roads.gpkg"'
    (tmp_path / "a.gpkg").write_bytes(answer.content)
    assert gpd.read_file(tmp_path / "a.gpkg", layer="roads").crs == "EPSG:32633" and len(gpd.read_file(tmp_path / "a.gpkg", layer="nodes")) == 2


def test_a_mask_is_on_the_pixels_of_the_image(client):
    probs, crs, transform = opened(client.post("/predict?output=mask", content=tif(block())).content)
    assert probs.shape == (1, 64, 64) and crs == "EPSG:32633" and transform == UTM["transform"]
    assert (np.abs(probs[0] / 254 - block().mean(0) / 255) < .005).all()
    shown = np.asarray(Image.open(io.BytesIO(client.post("/predict?output=mask&format=png", content=tif(block())).content)))
    assert shown.shape == (64, 64, 2) and (shown[..., 1] == 255).all() and abs(int(shown[30, 30, 0]) - 220) < 3
    assert opened(client.post("/predict?output=mask&gsd_m=1", content=picture(block())).content)[1] is None


def test_a_preview_shows_what_a_browser_cannot(client):
    deep = tif(noise(shape=(50, 1400)).astype("uint16") * 100)
    answer = client.post("/preview", content=deep)
    shown = Image.open(io.BytesIO(answer.content))
    assert shown.size == (1280, 46) and answer.headers["aerial-width"] == "1400" and np.asarray(shown)[..., :3].std() > 20
    assert client.post("/preview?output=mask", content=deep).status_code == 422
    assert client.post("/preview", content=VRT).status_code == 415


# ---------------------------------------------------------------- road graphs

GRAPH = dict(graph=dict(thr=.1, edge_thr=.1, snap_px=15., angle_weight=100., channels=28))


def streets():
    "Two crossing roads, a network that knows them by place, and the image that says each pixel's place."
    graph = RoadGraph([(20, 96), (96, 90), (170, 100), (90, 20), (100, 170)], [(0, 1), (1, 2), (3, 1), (1, 4)]).densify(20., gsd_m=1.)
    tensor = encode(graph, (192, 192), road=True)
    def known(pixels, valid): return np.stack([tensor[:, p[0].clip(0, 191), p[1].clip(0, 191)] for p in pixels.astype(int)])
    image = np.stack([*np.mgrid[:192, :192], np.full((192, 192), 9)]).astype("uint8")
    return graph, known, image


def test_a_graph_model_gives_a_road_graph(tmp_path):
    graph, known, image = streets()
    model = eye("streets", known, ("road",), threshold=None, extra=GRAPH)
    with TestClient(make_app([model, eye()])) as c:
        about = c.get("/models").json()["models"][0]
        assert about["outputs"] == ["graph"] and about["graph"]["thr"] == .1
        here = c.post("/predict?coordinates=pixels", content=tif(image))
        assert here.status_code == 200, here.text
        found = shapely.union_all([shapely.geometry.shape(s["geometry"]) for s in here.json()["shapes"]])
        truth = shapely.union_all(shapely.linestrings(graph.nodes[graph.edges]))
        assert shapely.hausdorff_distance(found, truth, .1) < 3 and found.length == pytest.approx(truth.length, rel=.03)
        assert all(.5 < s["properties"]["confidence"] <= 1 for s in here.json()["shapes"])
        there = c.post("/predict", content=tif(image))
        assert there.headers["content-type"] == "application/geo+json" and there.headers["aerial-thr"] == "0.1"
        assert sum(f["properties"]["length_m"] for f in there.json()["features"]) == pytest.approx(truth.length, rel=.03)
        plain = c.post("/predict?gsd_m=1", content=picture(image))
        assert plain.json()["crs"] == "pixels" and plain.json()["count"] == len(there.json()["features"])
        (tmp_path / "a.gpkg").write_bytes(c.post("/predict?format=geopackage", content=tif(image)).content)
        assert len(gpd.read_file(tmp_path / "a.gpkg", layer="nodes")) == 5
        changed = c.post("/predict?v_thr=.2&e_thr=.3&snap_px=10&angle_weight=50", content=tif(image))
        assert (changed.headers["aerial-thr"], changed.headers["aerial-edge-thr"]) == ("0.2", "0.3")
        for given, text in (("threshold=.5", "roads, buildings"), ("output=roads", "gives graph, not roads"), ("thr=1", "between 0 and 1")):
            no = c.post(f"/predict?{given}", content=tif(image))
            assert no.status_code == 422 and text in no.json()["error"]
        assert c.post("/predict", content=tif(image[:2])).status_code == 422
        assert c.post("/predict?model=bright&output=mask", content=tif(image)).status_code == 200


def test_a_saved_graph_model_is_read_as_one(tmp_path):
    torch.manual_seed(0)
    sizes = dict(bands=3, width=1, residual_steps=8)
    network = build("sat2graph", **sizes).eval()
    save_model(tmp_path / "graphs", network, "sat2graph", sizes, stats=((127.5,) * 3, (255.,) * 3), gsd_m=1., data="elsewhere", classes=("road",),
               extra=GRAPH | dict(size=64))
    app = make_app([tmp_path / "graphs"])
    seen = noise()[None], np.ones((1, 64, 64), bool)
    expected = graph_predictor(network, Stats((127.5,) * 3, (255.,) * 3))(*seen)
    assert expected.shape == (1, 28, 64, 64)
    with TestClient(app) as c:
        assert np.allclose(app.state.desk.models["graphs"].load()(*seen), expected, atol=1e-6)
        answer = c.post("/predict", content=tif(noise()))
        assert answer.status_code == 200 and answer.headers["aerial-output"] == "graph", answer.text


# ---------------------------------------------------------------- facts, doors

def test_what_the_service_says_of_itself(saved):
    with TestClient(make_app([saved, eye()], device="cpu")) as c:
        found = c.get("/models").json()
        assert [m["name"] for m in found["models"]] == ["small", "bright"] and found["models"][0]["data"] == "elsewhere"
        assert found["models"][0] | {} == dict(name="small", outputs=["roads", "mask"], classes=["road"], bands=3, gsd_m=1., threshold=.5, data="elsewhere",
                                              metrics=dict(iou=.5), builder="unet", graph=None)
        assert not PATHS.search(json.dumps(found))
        assert c.get("/health").json() == dict(ready=True, inside=0, queue=8, waiting=0, device="cpu", models=2)
        names = {p["name"] for p in c.get("/openapi.json").json()["paths"]["/predict"]["post"]["parameters"]}
        assert names == {o.name for o in OPTIONS}
        for method, path, status in (("GET", "/predict", 405), ("GET", "/docs", 404), ("GET", "/../etc/passwd", 404), ("PUT", "/", 405)):
            answer = c.request(method, path)
            assert answer.status_code == status and "/health" in answer.json()["error"]


def test_forms_that_are_none(client):
    for body, text in ((b"--x\r\nnothing", "form"), (b"", "no file"),
                       (b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n1\r\n'
                        b'--x\r\nContent-Disposition: form-data; name="b"; filename="b"\r\n\r\n1\r\n--x--\r\n', "one file"),
                       (b'--x\r\nContent-Disposition: form-data; name="output"\r\n\r\n' + b"a" * 9000 + b"\r\n--x--\r\n", "one line")):
        answer = client.post("/predict", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
        assert answer.status_code == 422 and text in answer.json()["error"], answer.text
    assert client.post("/predict", content=b"a", headers={"content-type": "multipart/form-data"}).status_code == 422


def test_other_names_and_other_sites_are_kept_out():
    app = make_app([eye()], hosts=("127.0.0.1", "localhost", "::1"))
    with TestClient(app, base_url="http://127.0.0.1:8000") as c:
        assert c.get("/health").status_code == 200
        assert c.get("/health", headers={"host": "evil.example"}).status_code == 421
        assert c.get("/health", headers={"host": "[::1]:8000"}).status_code == 200
        assert c.post("/predict?output=mask", content=tif(block()), headers={"sec-fetch-site": "cross-site"}).status_code == 403
        assert c.post("/predict?output=mask", content=tif(block()), headers={"sec-fetch-site": "same-origin"}).status_code == 200
        assert c.get("/health").headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("wrong", [dict(queue=0), dict(max_mb=-1), dict(max_mpx=float("nan")), dict(timeout_s=0), dict(workers=1.5)])
def test_impossible_limits(wrong):
    with pytest.raises(DataError, match="limits are above 0"): Limits(**wrong)


# ---------------------------------------------------------------- the command

def command(monkeypatch, *words):
    "The command in this process; what it sets for the whole of it is put back."
    monkeypatch.setattr(sys, "argv", ["aerial_serve", *map(str, words)])
    monkeypatch.setattr(serve.os, "_exit", lambda code: pytest.fail("left without ending"))
    before = {sig: signal.getsignal(sig) for sig in (signal.SIGTERM, signal.SIGINT)}
    levels = {name: logging.getLogger(name).level for name in ("aerial_nb", "rasterio", "pyogrio", serve.logger.name)}
    try:
        with pytest.raises(SystemExit) as stop: serve.aerial_serve()
    finally:
        for sig, handler in before.items(): signal.signal(sig, handler)
        for name, level in levels.items(): logging.getLogger(name).setLevel(level)
    return stop.value.code


def test_the_command_refuses_in_words(monkeypatch, caplog, saved):
    caplog.set_level(logging.INFO)
    with serve._listen("127.0.0.1", 0) as taken:
        cases = [(("nowhere",), "no model"), ((saved, "--queue", "0"), "queue"), ((saved, "--device", "tpu"), "device"),
                 ((saved, "--port", taken.getsockname()[1]), "choose another --port"), ((saved, "--host", "300.1.1.1", "--port", 0), "cannot listen")]
        for words, text in cases:
            caplog.clear()
            assert command(monkeypatch, *words) == 2 and text in caplog.text
    monkeypatch.setitem(sys.modules, "fastapi", None)
    caplog.clear()
    assert command(monkeypatch, saved) == 2 and "pip install 'aerial_nb[serve]'" in caplog.text


def test_another_host_is_said_aloud(monkeypatch, caplog, saved):
    caplog.set_level(logging.INFO)
    seen = []
    monkeypatch.setattr(serve, "_run", lambda app, listener, limits: (seen.append((app, limits)), listener.close()))
    assert command(monkeypatch, saved, "--port", 0, "--max-mb", 5) == 0 and "password" not in caplog.text
    assert command(monkeypatch, saved, "--port", 0, "--host", "0.0.0.0") == 0 and "everybody who reaches it" in caplog.text
    assert seen[0][1].max_mb == 5 and seen[0][0].user_middleware[0].kwargs["hosts"] == (*serve.LOOPBACK, "127.0.0.1")
    assert seen[1][0].user_middleware[0].kwargs["hosts"] == ()


def until(what, seconds=10.):
    "Wait for something to be true."
    for _ in range(int(seconds / .01)):
        try:
            if found := what(): return found
        except httpx.TransportError: pass
        time.sleep(.01)
    raise AssertionError("waited too long")


def test_a_signal_lets_what_is_inside_finish(monkeypatch, caplog, saved, tmp_path):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ends = {}
    def caller():
        url = until(lambda: re.search(r"http://127.0.0.1:\d+", caplog.text)).group()
        until(lambda: httpx.get(f"{url}/health").json()["ready"])
        with ThreadPoolExecutor(1) as one:
            answer = one.submit(httpx.post, f"{url}/predict?output=mask", content=tif(noise(shape=(320, 320))), timeout=60)
            until(lambda: httpx.get(f"{url}/health").json()["inside"])
            os.kill(os.getpid(), signal.SIGTERM)   # the server's handlers are there: it is ready
            ends["answer"] = answer.result().status_code
        try: ends["after"] = httpx.get(f"{url}/health", timeout=5).status_code
        except httpx.TransportError: ends["after"] = "refused"
    thread = threading.Thread(target=caller)
    thread.start()
    code = command(monkeypatch, saved, "--port", 0, "--device", "cpu")
    thread.join(30)
    assert (code, ends) == (0, dict(answer=200, after="refused"))
    assert "1 requests are inside" in caplog.text and "aerial_serve_" not in " ".join(p.name for p in tmp_path.iterdir())


@pytest.mark.slow
def test_told_to_stop_it_finishes_and_leaves_nothing(saved, tmp_path):
    code = "from aerial_nb.scenes.serve import aerial_serve; aerial_serve()"
    process = subprocess.Popen([sys.executable, "-c", code, str(saved), "--port", "0", "--device", "cpu"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               env=os.environ | dict(TMPDIR=str(tmp_path), OMP_NUM_THREADS="1"))
    try:
        line = next(line for line in process.stderr if "http://" in line)
        url = re.search(r"http://\S+", line).group()
        assert "small on http://127.0.0.1:" in line
        for _ in range(200):
            try:
                if httpx.get(f"{url}/health").json()["ready"]: break
            except httpx.TransportError: pass
            time.sleep(.05)
        with ThreadPoolExecutor(1) as one:
            answer = one.submit(httpx.post, f"{url}/predict?output=mask", content=tif(noise(shape=(320, 320))), timeout=60)
            for _ in range(400):
                if httpx.get(f"{url}/health").json()["inside"]: break
                time.sleep(.005)
            process.send_signal(signal.SIGTERM)
            assert answer.result().status_code == 200   # what was inside is finished
        with pytest.raises(httpx.TransportError): httpx.get(f"{url}/health", timeout=5)
        assert process.wait(20) == 0
        said = process.stderr.read()
        assert "1 requests are inside" in said and "stopped" in said and "Traceback" not in said
        assert not [p for p in tmp_path.iterdir() if p.name.startswith("aerial_serve_")]
    finally:
        process.kill(); process.wait(); process.stderr.close()


def test_work_that_does_not_end_is_left_behind():
    def stuck(pixels, valid): time.sleep(1.5); return bright(pixels, valid)
    app = make_app([eye("stuck", stuck)], Limits(timeout_s=.1))
    desk = app.state.desk
    with TestClient(app) as c:
        assert c.post("/predict?output=mask", content=tif(block())).status_code == 504
        began = time.monotonic()
        assert desk.close(.1) is False and time.monotonic() - began < 1
        assert not Path(desk.place.name).exists()
        closed = c.post("/predict", content=tif(block()))
        assert closed.status_code == 503 and "being stopped" in closed.json()["error"]
        assert c.get("/health").json()["ready"] is False


# ---------------------------------------------------------------- the page

def test_the_page_needs_nothing_from_elsewhere(client):
    page = client.get("/")
    class Links(HTMLParser):
        found = []
        def handle_starttag(self, tag, attributes): self.found += [v for k, v in attributes if k in ("src", "href", "action")]
    reader = Links(); reader.feed(page.text)
    assert reader.found == ["data:,"] and "innerHTML" not in page.text and not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page.text)
    assert page.headers["content-security-policy"] == servepage.POLICY and "unsafe-inline'; script" not in servepage.POLICY
    demo = client.get("/demo.png")
    assert Image.open(io.BytesIO(demo.content)).size == (256, 256) and demo.headers["aerial-gsd-m"] == "1"


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here to open the page with")
def test_the_page_shows_an_answer_over_the_picture(tmp_path):
    def browse(url, *more):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000", "--window-size=1000,800"]
        return subprocess.run([CHROMIUM, *flags, *more, url], capture_output=True, text=True, timeout=60).stdout
    with running(make_app([eye(), eye("none", lambda p, v: np.full(v.shape, np.nan, "float32"))])) as url:
        expected = httpx.post(f"{url}/predict?gsd_m=1", content=httpx.get(f"{url}/demo.png").content, timeout=60).json()["count"]
        page = browse(f"{url}/?demo=1", "--dump-dom", f"--screenshot={tmp_path / 'shot.png'}")
        if not (tmp_path / "shot.png").exists(): browse(f"{url}/?demo=1", f"--screenshot={tmp_path / 'shot.png'}")
        wrong = browse(f"{url}/?demo=1&model=none&output=mask", "--dump-dom")
    assert 'data-state="error"' in wrong and re.search(r'class="bad">[^<]*no probabilities[^<]*\(422\)<', wrong)   # errors are shown, in words
    assert 'data-state="done"' in page and f"{expected} buildings" in page and expected > 0
    assert page.count('class="area"') == expected
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    orange = (shot[..., 0] > 200) & (shot[..., 1] < 140) & (shot[..., 2] < 90)
    assert orange.sum() > 200 and orange[:, :300].sum() == 0   # over the picture, not over the form


# ---------------------------------------------------------------- the container

def test_the_container_copies_what_is_there_and_starts_the_command():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    parts = [(word, rest) for word, _, rest in (line.partition(" ") for line in lines) if word.isupper()]
    assert [rest for word, rest in parts if word == "FROM"] == ["python:3.12-slim"] and not re.search(r"\w+\.(?:io|com|org|dev)\b", text)
    ignored = (ROOT / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    for rest in (rest for word, rest in parts if word == "COPY"):
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists() and f"!{source.removeprefix('./')}" in ignored
    order = [word for word, _ in parts]
    assert order.index("USER") < order.index("ENTRYPOINT") and dict(parts)["USER"] not in ("root", "0")
    program, *words = json.loads(dict(parts)["ENTRYPOINT"])
    asked = serve._parser().parse_args([*words, "/models/town"])
    assert program == "aerial_serve" and asked.model == ["/models/town"] and (asked.host, asked.port) == ("0.0.0.0", 8000)
    check = json.loads(dict(parts)["HEALTHCHECK"].split("CMD ", 1)[1])
    compile(check[2], "health", "exec")
    assert check[:2] == ["python", "-c"] and f":{asked.port}/health" in check[2] and str(asked.port) == dict(parts)["EXPOSE"]
    with pytest.raises(SystemExit) as stop: serve._parser().parse_args([*words, *json.loads(dict(parts)["CMD"])])
    assert stop.value.code == 0
