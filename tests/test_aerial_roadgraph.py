"Rasters to road graphs with coordinates: files, pixel sizes, thresholds, bad input, and the command."
import json
import logging
import pickle
from functools import cache

import geopandas as gpd
import numpy as np
import pyogrio
import pytest
import torch
from rasterio.transform import from_origin

from aerial_nb.data.raster import DataError, write_raster
from aerial_nb.data.synthetic import scene
from aerial_nb.models.zoo import build
from aerial_nb.roads.decode import decode
from aerial_nb.roads.files import read_graph
from aerial_nb.roads.graph import RoadGraph
from aerial_nb.roads.gte import encode
from aerial_nb.roads.topo import topo
from aerial_nb.scenes.eyes import Eye, Look
from aerial_nb.scenes.graphmap import GraphRules, aerial_roadgraph, predict_graph, write_roadgraph
from aerial_nb.scenes.graphwindows import predict_tensor
from aerial_nb.scenes.rasters import predict_raster
from aerial_nb.training.saved import ModelCard, save_model

UTM = dict(crs="EPSG:32633", transform=from_origin(5e5, 5e6, 1., 1.))
PROBS = [0, *range(2, 26, 4), 26]
SIDE = 320


@cache
def town(seed=0):
    found = scene(SIDE, seed=seed, gsd_m=1.).graph.crop((4, 4, SIDE - 4, SIDE - 4)).simplify(.5).merge_close(4.).densify(20.)
    return RoadGraph(found.nodes, found.edges)


@cache
def tensor():
    out = encode(town(), (SIDE, SIDE), road=True)
    out += np.random.default_rng(0).normal(0, .02, out.shape).astype(np.float32)
    out[PROBS] = out[PROBS].clip(0, 1)
    return out


def look_up(pixels, valid):
    "Bytes of the image say its place: bands hold row and column, their high digits in the third."
    row, col = (pixels[:, k].astype(int) + 250 * ((pixels[:, 2].astype(int) >> k) & 1) for k in (0, 1))
    return np.stack([tensor()[:, r, c] * known for r, c, known in zip(row, col, valid)])


def image_of(rows=SIDE, cols=SIDE):
    r, c = np.mgrid[:rows, :cols]
    return np.stack([r % 250, c % 250, (r >= 250) + 2 * (c >= 250)]).astype("uint8")


CARD = ModelCard("none", gsd_m=1., mean=(127.5,) * 3, std=(255.,) * 3, extra=dict(graph=dict(thr=.1, edge_thr=.1, channels=28)))
EYE = Eye("places", CARD, "1", lambda device: look_up)
LOOK = Look(size=128, overlap=32)


def saved(folder, builder="sat2graph", arguments=None, **card):
    torch.manual_seed(0)
    arguments = dict(width=1, bands=3) | (arguments or {})
    values = dict(stats=((127.5,) * 3, (255.,) * 3), gsd_m=1., classes=("road",), extra=dict(graph=dict(thr=.1, channels=28))) | card
    save_model(folder, build(builder, **arguments), builder, arguments, **values)
    return folder


def photo(folder, shape=(70, 90), bands=3, name="photo.tif", value=None, **place):
    pixels = np.random.default_rng(0).integers(1, 255, (bands, *shape), dtype=np.uint8)
    if value is not None: pixels[:] = value
    place = place or UTM
    return write_raster(folder / name, pixels, place.get("crs"), place.get("transform"))


def run(*arguments, **options):
    with pytest.raises(SystemExit) as stop: aerial_roadgraph(*map(str, arguments), **dict(device="cpu") | options)
    return stop.value.code


# the graph

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    image = write_raster(tmp_path_factory.mktemp("scene") / "scene.tif", image_of(), **UTM)
    return predict_graph(image, EYE, LOOK, piece_px=700, panel_px=100, progress=False)


def test_the_graph_of_one_piece_on_the_ground(made):
    whole = decode(predict_tensor(image_of(), np.ones((SIDE, SIDE), bool), look_up, 128, 96), .1, .1, part_px=200., spur_px=50.)
    assert np.allclose(made.pixels.nodes, whole.nodes, atol=1e-6) and np.array_equal(made.graph.edges, whole.edges)
    assert np.allclose(made.graph.nodes, whole.nodes * (1, -1) + (5e5, 5e6), atol=1e-6)
    assert topo(town(), RoadGraph(made.pixels.nodes, made.graph.edges), gsd_m=1.).f1 > .9


def test_lines_are_the_graph(made):
    lines, graph = made.lines, made.graph
    assert np.isclose(lines.length_m.sum(), graph.length_m) and np.isclose(lines.length.sum(), lines.length_m.sum(), rtol=.01)
    assert lines.confidence.between(.01, 1).all() and lines.crs == "EPSG:32633" and len(made.edge_line) == len(graph)
    line = int(lines.length_m.idxmax())
    mine = made.edge_line == line
    assert np.isclose(lines.confidence[line], np.average(made.edge_confidence[mine], weights=made.edge_length_m[mine]))
    assert "GraphMap" in made._repr_html_() and "km" in repr(made)


def test_thresholds_come_from_the_card_or_from_who_asks(made):
    assert made.rules.decoding == (.1, .1, 15., 100.)
    assert GraphRules(thr=.3, angle_weight=50.).of(CARD).decoding == (.3, .1, 15., 50.)


@pytest.mark.parametrize("gsd", [.5, 2.])
def test_other_pixel_sizes_come_back_to_the_ground(tmp_path, caplog, gsd):
    "The network sees 1 m; what it says is found at the same place on the ground."
    factor = 1 / gsd
    size = int(SIDE * factor)
    r = ((np.arange(size) + .5) / factor)
    pixels = np.zeros((3, size, size), "uint8")
    pixels[0], pixels[1] = r[:, None] * .75, r * .75
    image = write_raster(tmp_path / "a.tif", pixels, "EPSG:32633", from_origin(5e5, 5e6, gsd, gsd))

    def coarse(pixels, valid):
        row, col = ((pixels[:, k].astype(float) / .75).round().astype(int).clip(0, SIDE - 1) for k in (0, 1))
        return np.stack([tensor()[:, a, b] * known for a, b, known in zip(row, col, valid)])
    with caplog.at_level(logging.INFO):
        found = predict_graph(image, Eye("coarse", CARD, "2", lambda device: coarse), LOOK, progress=False)
    assert "the network sees 320 x 320" in caplog.text and np.isclose(found.factor, gsd)
    scaled = RoadGraph((found.graph.nodes - (5e5, 5e6)) * (1, -1), found.graph.edges)
    assert topo(town(), scaled, gsd_m=1.).f1 > .85
    assert abs(found.lines.length_m.sum() / town().length - 1) < .12


def test_fewer_nodes_and_no_short_roads(tmp_path, made):
    image = write_raster(tmp_path / "scene.tif", image_of(), **UTM)
    few = predict_graph(image, EYE, LOOK, simplify_m=2., progress=False)
    assert len(few.graph) < .7 * len(made.graph) and abs(few.graph.length_m / made.graph.length_m - 1) < .02
    assert len(few.edge_confidence) == len(few.graph)
    long = predict_graph(image, EYE, LOOK, min_length_m=1e5, progress=False)
    assert len(long) == 0


# files

@pytest.mark.parametrize("ending", [".gpkg", ".geojson", ".parquet"])
def test_files_for_a_gis(tmp_path, made, ending):
    out = write_roadgraph(made, tmp_path / f"roads{ending}")
    table = gpd.read_parquet(out) if ending == ".parquet" else gpd.read_file(out, layer="roads" if ending == ".gpkg" else None)
    assert len(table) == len(made) and {"length_m", "confidence"} <= set(table.columns)
    assert table.crs == ("EPSG:4326" if ending == ".geojson" else "EPSG:32633")
    assert np.isclose(table.to_crs("EPSG:32633").length.sum(), made.lines.length.sum(), rtol=1e-4)
    if ending == ".gpkg":
        assert sorted(name for name, _ in pyogrio.list_layers(out)) == ["nodes", "roads"]
        assert len(gpd.read_file(out, layer="nodes")) == int((made.graph.degrees != 2).sum())
    assert list(tmp_path.iterdir()) == [out]


def test_files_for_those_who_compare(tmp_path, made):
    out = write_roadgraph(made, tmp_path / "deep" / "roads.p")
    back = read_graph(out)
    assert len(back) == len(made.graph) and np.isclose(back.length, made.pixels.length)
    assert all(isinstance(k, tuple) for k in pickle.loads(out.read_bytes()))
    points, edges = json.loads(write_roadgraph(made, tmp_path / "roads.json").read_text())
    assert np.allclose(np.array(points)[:, ::-1], made.pixels.nodes) and np.array_equal(edges, made.graph.edges)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["roads.p"]


# bad input

@pytest.mark.parametrize("road", [True, False])
def test_the_command(tmp_path, road):
    "Both channel counts; an image smaller than a window; a network that knows nothing gives some graph or none."
    model = saved(tmp_path / "model", arguments=dict(road=road))
    out = tmp_path / "roads.gpkg"
    assert run(photo(tmp_path), model, out, size=128, overlap=32) == 0
    assert {"length_m", "confidence"} <= set(gpd.read_file(out, layer="roads").columns)
    assert run(photo(tmp_path), model, out) == 2 and run(photo(tmp_path), model, out, overwrite=True) == 0


def test_no_road_is_an_empty_file_with_columns(tmp_path, caplog):
    model = saved(tmp_path / "model")
    out = tmp_path / "roads.gpkg"
    with caplog.at_level(logging.INFO): assert run(photo(tmp_path), model, out, thr=.999, edge_thr=.999) == 0
    table = gpd.read_file(out, layer="roads")
    assert len(table) == 0 and {"length_m", "confidence", "component"} <= set(table.columns) and table.crs == "EPSG:32633"
    assert "no road found" in caplog.text and "grey around" in caplog.text


def test_an_image_without_data_has_no_roads(tmp_path, caplog):
    found = predict_graph(photo(tmp_path, value=255), saved(tmp_path / "model"), Look(fill=(255,) * 3), progress=False)
    assert len(found) == 0 and "no valid pixel" in caplog.text and write_roadgraph(found, tmp_path / "a.geojson").exists()


def test_images_without_a_place(tmp_path, caplog):
    from rasterio.transform import Affine
    image = photo(tmp_path, crs=None, transform=Affine.identity())
    model = saved(tmp_path / "model")
    with pytest.raises(DataError, match="data_gsd_m"): predict_graph(image, model, progress=False)
    found = predict_graph(image, model, Look(data_gsd_m=1.), progress=False)
    assert found.transform is None and found.graph.space == "pixel"
    write_roadgraph(found, tmp_path / "roads.gpkg")
    with pytest.raises(DataError, match="longitude"): write_roadgraph(found, tmp_path / "roads.geojson")


def test_what_does_not_fit_is_refused(tmp_path, caplog):
    image, model = photo(tmp_path), saved(tmp_path / "model")
    mask = saved(tmp_path / "mask", "unet", dict(width=4, depth=2), extra={}, classes=("background", "road"))
    with pytest.raises(DataError, match="aerial_predict and.*aerial_vectorize"): predict_graph(image, mask, progress=False)
    with pytest.raises(DataError, match="aerial_roadgraph"): predict_raster(image, str(model), tmp_path / "map.tif", progress=False)
    with pytest.raises(DataError, match="4 bands"): predict_graph(photo(tmp_path, bands=4, name="four.tif"), model, progress=False)
    with pytest.raises(DataError, match="not averaged"): predict_graph(image, f"{model},{model}", progress=False)
    liar = saved(tmp_path / "liar", "unet", dict(width=4, depth=2), classes=("background", "road"))
    with pytest.raises(DataError, match="26 or 28"): predict_graph(image, liar, progress=False)
    for look, said in ((Look(turns=True), "turns"), (Look(margin=3), "margin"), (Look(overlap=64), "size"), (Look(size=100), "multiple")):
        with pytest.raises(DataError, match=said): predict_graph(image, model, look, progress=False)
    for rule in (dict(thr=1.5), dict(snap_px=0), dict(precision="int8"), dict(simplify_m=-1), dict(nothing=1), dict(blend="mean")):
        with pytest.raises(DataError): predict_graph(image, model, progress=False, **rule)


def test_the_command_refuses_in_words(tmp_path, caplog):
    image, model = photo(tmp_path), saved(tmp_path / "model")
    (tmp_path / "there.gpkg").write_text("kept")
    for out in ("a.shp", "there.gpkg", ""):
        assert run(image, model, tmp_path / out) == 2
    assert (tmp_path / "there.gpkg").read_text() == "kept" and "none of the endings" in caplog.text and "exists" in caplog.text
    assert run(image, tmp_path / "nowhere", tmp_path / "a.gpkg") == 2
    assert run(tmp_path / "nothing.tif", model, tmp_path / "a.gpkg") == 2 and "no such file" in caplog.text
    assert run(image, model, tmp_path / "a.gpkg", fill="blue") == 2
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "a.gpkg").exists()


def test_a_damaged_image_is_said(tmp_path):
    image = write_raster(tmp_path / "scene.tif", np.random.default_rng(0).integers(0, 255, (3, 600, 600), dtype=np.uint8), **UTM)
    data = bytearray(image.read_bytes())
    data[len(data) // 2:len(data) // 2 + 4000] = b"\xff" * 4000
    image.write_bytes(data)
    assert run(image, saved(tmp_path / "model"), tmp_path / "a.gpkg") == 1
