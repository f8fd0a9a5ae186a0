"""Tiles with road graphs, and crops of them: what is read, where it is cut, and that picture and graph move together."""
import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerial_nb.data.augment import d4
from aerial_nb.data.graphcrops import (BYTES, KINDS, SAT2GRAPH, GraphCrops, draw_places, erasing, graph_loaders, graph_stats, moved_graph,
                                       published_colour)
from aerial_nb.data.graphtiles import GraphStore, Preparing, graph_samples, hard_places, read_places, road_label
from aerial_nb.data.presets import Augment, preset
from aerial_nb.data.raster import DataError, raster_info, write_raster
from aerial_nb.data.synthetic import scene, write_scene
from aerial_nb.data.warp import Layers, Move, cut
from aerial_nb.roads.graph import RoadGraph
from aerial_nb.roads.gte import encode


@pytest.fixture(scope="module")
def home(tmp_path_factory): return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def store(home): return GraphStore(graph_samples(synthetic=dict(n=3, size=384), cache=home), cache=home, progress=False)


def dots(nodes, size):
    "A picture with a bright pixel at each node."
    image = np.zeros((1, size, size), np.uint8)
    for x, y in nodes: image[0, int(y), int(x)] = 255
    return image


@given(k=st.integers(0, 7), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_exact_moves_take_vertices_where_their_pixels_go(k, seed):
    rng = np.random.default_rng(seed)
    nodes = rng.integers(0, 32, (6, 2)) + .5
    graph = RoadGraph(nodes, np.array([[i, i + 1] for i in range(5)]))
    moved = moved_graph(graph, 0, 0, 32, Move(k=k))
    assert np.array_equal(dots(moved.nodes, 32), d4(dots(nodes, 32), k))


@given(angle=st.floats(-180, 180), scale=st.floats(.7, 1.4), dx=st.floats(-.15, .15), dy=st.floats(-.15, .15), k=st.integers(0, 7))
@settings(max_examples=30, deadline=None)
def test_any_move_takes_a_vertex_where_its_blob_goes(angle, scale, dx, dy, k):
    size, row, col = 64, 20, 12
    yy, xx = np.mgrid[:128, :128] + .5
    for x, y in ((40.3, 55.8), (50., 44.5)):
        blob = np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / 18)
        image = (255 * blob).astype(np.uint8)[None]
        move = Move(k=k, angle_deg=angle, scale=scale, shift=(dx, dy))
        got = cut(Layers(image, np.zeros((128, 128), np.uint8), np.ones((128, 128), bool)), move, row, col, size).image[0].astype(float)
        at = moved_graph(RoadGraph([[x, y], [x + 1, y]], [[0, 1]]), row, col, size, move).nodes[0]
        if not ((at > 12) & (at < size - 12)).all(): continue
        py, px = np.mgrid[:size, :size] + .5
        assert np.hypot((px * got).sum() / got.sum() - at[0], (py * got).sum() / got.sum() - at[1]) < .6


def test_edges_out_of_a_crop_keep_their_vectors(store):
    "The tensor of a crop is the crop of a tensor that goes on beyond the tile."
    plan = draw_places(store, 8, 128, 0)
    crops = GraphCrops(store, plan, 128)
    for i in range(8):
        tile, row, col, _ = plan[i].item()
        graph = store.graphs[tile].graph
        whole = encode(RoadGraph(graph.nodes + 100, graph.edges), (584, 584), (row + 100, col + 100, 128, 128), road=True)
        assert np.allclose(crops.tensor(crops.crop(i)[1])[:26], whole[:26], atol=1e-5)


def test_plans_repeat_and_are_where_asked(store):
    a, b = (draw_places(store, 40, 128, 3, epoch=2) for _ in range(2))
    assert (a == b).all() and (a != draw_places(store, 40, 128, 3, epoch=3)).any()
    for tile, row, col, _ in a: assert 0 <= row <= 256 and 0 <= col <= 256 and 0 <= tile < 3
    over = draw_places(store, 20, 128, 0, shares=(0, 0, 0, 1))
    assert (over["kind"] == 1 + KINDS.index("overpass")).all()
    for tile, row, col, _ in over:
        assert any(((at >= (col, row)) & (at <= (col + 128, row + 128))).all() for at in store.graphs[tile].places["overpass"])


def test_places_that_do_not_exist_go_to_anywhere(store):
    plan = draw_places(store, 30, 128, 0, shares=(0, 1, 0, 0))
    none = not any(len(t.places["complicated_intersections"]) for t in store.graphs)
    assert none and (plan["kind"] == 0).all()
    with pytest.raises(ValueError, match="shares"): draw_places(store, 3, 128, 0, shares=(1, 1))


def test_crops_have_road(store):
    crops = GraphCrops(store, draw_places(store, 30, 192, 1), 192)
    assert sum(len(crops.crop(i)[1]) > 0 for i in range(30)) == 30


def test_the_same_seed_gives_the_same_batch_and_another_epoch_another(store):
    make = lambda: GraphCrops(store, partial(draw_places, store, 6, 96, 5), 96, Augment(SAT2GRAPH, seed=5))
    one, two = make(), make()
    for a, b in zip(one.batch([0, 4]), two.batch([0, 4])): assert torch.equal(a, b)
    two.set_epoch(1)
    assert not torch.equal(one.batch([0])[0], two.batch([0])[0])
    assert "tile town" in one.describe(0)


def test_what_is_mirrored_does_not_count(store):
    "A crop in the corner, turned by 45 degrees, looks outside."
    plan = np.array([(0, 0, 0, 0)], draw_places(store, 1, 96, 0).dtype)
    light = Augment(preset("LIGHT"), seed=0)
    crops = GraphCrops(store, plan, 96, light)
    assert crops.batch([0])[2].all()
    turned = GraphCrops(store, plan, 96, Augment(SAT2GRAPH, seed=1))
    found = [turned.set_epoch(e) or turned.batch([0]) for e in range(12)]
    lost = [v for *_, v, s in found if not v.all()]
    assert lost and all((v <= s).all() for *_, v, s in found)


def test_bends_are_refused(store):
    with pytest.raises(ValueError, match="bends"): GraphCrops(store, draw_places(store, 2, 64, 0), 64, Augment("EXTREME"))


@pytest.mark.parametrize("dtype, limits", [("uint8", (0, 255)), ("uint16", (100., 3000.)), ("float32", (0., 1.))])
def test_light_keeps_the_type_and_the_range(dtype, limits):
    rng = np.random.default_rng(0)
    image = (limits[0] + (limits[1] - limits[0]) * rng.random((96, 80, 4))).astype(dtype)
    for step in (published_colour, erasing):
        out = step(image, np.random.default_rng(1), limits)
        assert out.dtype == image.dtype and out.shape == image.shape and (out != image).any()
        assert out.min() >= limits[0] - 1e-4 and out.max() <= limits[1] + 1e-4


def test_erasing_leaves_most_of_a_crop():
    image = np.full((352, 352, 3), 128, np.uint8)
    shares = [(erasing(image, np.random.default_rng(s), (0, 255)) == 128).mean() for s in range(20)]
    assert min(shares) > .6 and max(shares) < 1


def test_bytes_and_other_types(store, tmp_path):
    assert graph_stats(store) == BYTES
    dls = graph_loaders(GraphCrops(store, partial(draw_places, store, 5, 64, 0), 64), GraphCrops(store, draw_places(store, 3, 64, 1), 64), 2, BYTES)
    assert len(dls.train) == 2 and len(dls.valid) == 2
    x, target, valid = dls.one_batch()
    assert -.5 <= x.min() <= x.max() <= .5 and target.shape == (2, 28, 64, 64) and valid.dtype == torch.bool


def folder_with(tmp_path, s=None, **scenes):
    s = s or scene(size=160, seed=3, gsd_m=1.)
    return s, write_scene(s, tmp_path, "a")


def test_lines_masks_and_arrays_agree(tmp_path):
    s, files = folder_with(tmp_path)
    info = raster_info(files["image"])
    lines, array = road_label(files["road_lines"], info), road_label(files["graph"], info)
    assert abs(lines.crop((0, 0, 160, 160)).length / array.crop((0, 0, 160, 160)).length - 1) < .05
    mask = road_label(files["roads"], info)
    assert abs(mask.length / s.graph.length - 1) < .25 and mask.lengths.max() < 30
    assert array.lengths.max() < 30


def test_pickles_are_taken_as_they_are(tmp_path):
    import pickle
    _, files = folder_with(tmp_path)
    roads = {(10.5, 20.): [(100., 20.)], (100., 20.): [(10.5, 20.)]}
    (tmp_path / "g.p").write_bytes(pickle.dumps(roads, 2))
    graph = road_label(tmp_path / "g.p", raster_info(files["image"]))
    assert sorted(map(tuple, graph.nodes.tolist())) == [(20., 10.5), (20., 100.)]    # x is the column


def test_roads_of_another_place_are_refused(tmp_path):
    _, files = folder_with(tmp_path)
    other = write_scene(scene(size=160, seed=8, gsd_m=1.), tmp_path, "b")
    with pytest.raises(DataError, match="none is in it"): road_label(other["road_lines"], raster_info(files["image"]))


def test_nodes_outside_are_reported(tmp_path, caplog):
    _, files = folder_with(tmp_path)
    graph = RoadGraph([[10., 10.], [150., 80.], [900., 900.], [990., 900.]], [[0, 1], [2, 3]])
    graph.save(tmp_path / "far.npz")
    with caplog.at_level("INFO", "aerial_nb.data.graphtiles"): got = road_label(tmp_path / "far.npz", raster_info(files["image"]))
    assert "2 of 4 nodes lie outside" in caplog.text and got.nodes.max() < 200


def test_more_than_six_roads_at_a_vertex_are_counted(tmp_path, caplog):
    _, files = folder_with(tmp_path)
    angles = np.linspace(0, 2 * np.pi, 9)[:-1]
    star = np.concatenate([[[80., 80.]], 80 + 60 * np.stack([np.cos(angles), np.sin(angles)], 1)])
    RoadGraph(star, [[0, i] for i in range(1, 9)]).save(tmp_path / "star.npz")
    table = pd.DataFrame([dict(image=str(files["image"]), label=str(tmp_path / "star.npz"), scene="a", split="", gsd_m=1.)])
    with caplog.at_level("WARNING"): made = GraphStore(table, cache=tmp_path / "c", progress=False)
    assert "1 vertices have more than six roads" in caplog.text and len(made.graphs[0].places["complicated_intersections"]) == 1


def test_all_faults_are_told_at_once(tmp_path):
    _, files = folder_with(tmp_path)
    rows = [dict(image=str(files["image"]), label=label, scene="a", split="", gsd_m=1.) for label in ("", str(tmp_path / "gone.p"))]
    with pytest.raises(DataError) as said: GraphStore(pd.DataFrame(rows), cache=tmp_path / "c", progress=False)
    assert "2 of 2 tiles" in str(said.value) and "gone.p" in str(said.value) and "no label" in str(said.value)


def test_other_pixel_sizes_are_resampled_and_said(tmp_path, caplog):
    s = scene(size=200, seed=3, gsd_m=.5)
    files = write_scene(s, tmp_path, "a")
    table = pd.DataFrame([dict(image=str(files["image"]), label=str(files["road_lines"]), scene="a", split="", gsd_m=.5)])
    with caplog.at_level("INFO"): made = GraphStore(table, cache=tmp_path / "c", progress=False)
    assert made.tiles.shape(0) == (100, 100) and "resampled to 1 m" in caplog.text
    assert abs(made.graphs[0].graph.crop((0, 0, 100, 100)).length / (s.graph.length / 2) - 1) < .06
    with pytest.raises(ValueError): Preparing(gsd_m=0)


def test_blank_pixels_stay_blank_after_resampling(tmp_path):
    image = np.full((3, 64, 64), 90, np.uint8); image[:, :, 32:] = 0
    write_raster(tmp_path / "x.tif", image, nodata=0)
    RoadGraph([[2., 10.], [30., 40.]], [[0, 1]]).save(tmp_path / "x.npz")
    table = pd.DataFrame([dict(image=str(tmp_path / "x.tif"), label=str(tmp_path / "x.npz"), scene="a", split="", gsd_m=.5)])
    made = GraphStore(table, cache=tmp_path / "c", progress=False)
    assert made.tiles.valid(0)[:, :15].all() and not made.tiles.valid(0)[:, 17:].any()


def test_hard_places():
    ladder = RoadGraph([[0., 0.], [100., 0.], [0., 12.], [100., 12.], [50., -40.], [50., 60.]], [[0, 1], [2, 3], [4, 5]])
    got = hard_places(ladder)
    assert len(got["overpass"]) == 2 and len(got["parallel_road"]) == 2 and not len(got["complicated_intersections"])
    joined = RoadGraph([[0., 0.], [100., 0.], [0., 12.], [100., 12.]], [[0, 1], [2, 3], [0, 2]])
    assert not len(hard_places(joined)["parallel_road"])


def test_sample_points_are_read_as_rows_and_columns(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(dict(overpass=[[10, 20]], parallel_road=[])))
    got = read_places(tmp_path / "p.json")
    assert got["overpass"].tolist() == [[20., 10.]] and got["complicated_intersections"].shape == (0, 2)
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(DataError, match="no list of sample points"): read_places(tmp_path / "bad.json")


def test_folders(tmp_path):
    folder_with(tmp_path)
    table = graph_samples(tmp_path)
    assert table.label.str.endswith("a_roads.geojson").all()
    (tmp_path / "images" / "lonely.png").write_bytes((tmp_path / "images" / "a.tif").read_bytes())
    with pytest.raises(DataError, match="lonely.png"): graph_samples(tmp_path)
    with pytest.raises(DataError, match="no such folder"): graph_samples(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images with roads"): graph_samples(tmp_path / "empty")


def test_spacenet_names(tmp_path):
    for name in ("SN3_roads_train_AOI_2_Vegas_PS-RGB_img7.tif", "SN3_roads_train_AOI_2_Vegas_PS-RGB_img12.tif"):
        (tmp_path / "PS-RGB").mkdir(exist_ok=True); write_raster(tmp_path / "PS-RGB" / name, np.zeros((3, 8, 8), np.uint8))
    (tmp_path / "geojson_roads").mkdir()
    (tmp_path / "geojson_roads" / "SN3_roads_train_AOI_2_Vegas_geojson_roads_img7.geojson").write_text('{"type":"FeatureCollection","features":[]}')
    table = graph_samples(tmp_path, gsd_m=.3)
    assert table.scene.tolist() == ["AOI_2_Vegas_img7"] and table.gsd_m.tolist() == [.3]
