"Graph-tensors from windows, and road graphs of whole scenes: as published, as in one piece, at borders, on bad input."
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerial_nb.data.grid import rings
from aerial_nb.data.loaders import Stats
from aerial_nb.data.raster import DataError
from aerial_nb.data.synthetic import scene
from aerial_nb.models.sat2graph import Sat2Graph, as_tensor
from aerial_nb.roads.decode import decode
from aerial_nb.roads.files import read_graph
from aerial_nb.roads.graph import RoadGraph
from aerial_nb.roads.gte import encode
from aerial_nb.roads.topo import topo
from aerial_nb.scenes.graphmap import simplified
from aerial_nb.scenes.graphparts import answered, connect_parts, gathered, panels, refined, strip_vertices
from aerial_nb.scenes.graphwindows import as_channels, cut, graph_predictor, graph_windows, predict_tensor, told

calm = settings(deadline=None, max_examples=8)
EXAMPLES = Path(__file__).parents[1] / "../shared/data/roadgraphs/sat2graph_examples"
GREY = Stats((127.5,) * 3, (255.,) * 3)
PROBS = [0, *range(2, 26, 4), 26]
USUAL = .05, .05, 15., 100.


def places(shape):
    "An image whose pixels say where they are."
    return np.stack(np.mgrid[:shape[0], :shape[1]]).astype("uint16"), np.ones(shape, bool)


def looked_up(tensor, sigma=0., bias=0.):
    "A stand-in for a network: a tensor at the places of the pixels, with noise of its own in every window."
    def fn(pixels, valid):
        out = np.zeros((len(pixels), len(tensor), *pixels.shape[2:]), np.float32)
        for one, (row, col), known in zip(out, pixels.astype(int), valid):
            rng = np.random.default_rng(int(row.max()) * 10007 + int(col.max()))
            one[:] = tensor[:, row, col]
            if sigma: one += rng.normal(0, sigma, one.shape)
            one[[k for k in PROBS if k < len(one)]] = (one + bias)[[k for k in PROBS if k < len(one)]].clip(0, 1)
            one[:, ~known] = .5    # what a network says of grey is not to be used
        return out
    return fn


@cache
def town_graph(seed=0, size=384):
    town = scene(size, seed=seed, gsd_m=1.).graph.crop((4, 4, size - 4, size - 4)).simplify(.5).merge_close(4.).densify(20.)
    return RoadGraph(town.nodes, town.edges)


@cache
def town(seed=0, size=384): return encode(town_graph(seed, size), (size, size), road=True)


def in_pieces(pixels, valid, fn, size, stride, panel_px, piece_px, blend="ramp", **rest):
    plan, look_at = graph_windows(valid.shape, size, stride, blend), lambda w: (*cut(pixels, valid, w), [])
    points = gathered(v for p in panels(plan, panel_px)
                      for _, v in strip_vertices(plan, p, answered(plan, p[2], look_at, fn, 3, 2), *USUAL[:2]))
    return refined(*connect_parts(points, valid.shape, *USUAL, piece_px), **rest)


# windows

def test_published_windows_are_441():
    plan = graph_windows((2048, 2048), blend="published")
    assert len(plan) == 441 and plan.work == 441 * 352**2
    assert plan.seen[0].tolist() == (-32, -32, 352, 352) and plan.seen[-1].tolist() == (1728, 1728, 352, 352)
    assert len(graph_windows((2048, 2048))) == 16
    assert graph_windows((2048, 2048), 1120, 992).work < plan.work / 10


@calm
@given(st.tuples(st.integers(1, 700), st.integers(1, 700)), st.sampled_from([(96, 64), (256, 160), (704, None), (128, 128)]))
def test_windows_cover_every_image_in_phase(shape, sides):
    plan, weight = graph_windows(shape, *sides), np.zeros(shape)
    for i, (r, c, h, w) in enumerate(plan.kept.tolist()):
        weight[r:r + h, c:c + w] += plan.weights(i)
    assert (weight > 0).all() and len({tuple(s)[2:] for s in plan.seen.tolist()}) == 1
    assert ((plan.seen["row"] + 32) % 32 == 0).all() and (plan.seen["height"] % 32 == 0).all()
    inside = (plan.kept["row"] >= plan.seen["row"]) & (plan.kept["row"] + plan.kept["height"] <= plan.seen["row"] + plan.seen["height"])
    assert inside.all()


@pytest.mark.parametrize("blend, start", [("published", 0.), ("published-test", .001)])
def test_published_blending_is_the_plain_loop(blend, start):
    "The authors' loop: grey border, windows of 352 every 88 pixels, four weights, all channels alike."
    shape = (352 + 88 - 64, 352 - 64)
    tensor = np.random.default_rng(0).random((28, *shape), np.float32)
    for k in PROBS: tensor[k + 1] = 1 - tensor[k]
    fn = looked_up(tensor, .1)
    pixels, valid = places(shape)
    padded, known = np.pad(pixels, ((0, 0), (32, 32), (32, 32))), np.pad(valid, 32)
    total, weight = np.zeros((28, *known.shape)), np.full(known.shape, start)
    for row in range(0, known.shape[0] - 351, 88):
        for col in range(0, known.shape[1] - 351, 88):
            here = slice(row, row + 352), slice(col, col + 352)
            out = fn(padded[None, :, *here], known[None, *here])[0]
            for k in PROBS: out[k + 1] = 1 - out[k]
            total[:, *here] += out * rings(352, 352)
            weight[here] += rings(352, 352)
    plain = (total / weight)[:, 32:-32, 32:-32]
    assert np.abs(predict_tensor(pixels, valid, fn, blend=blend) - plain).max() < 2e-6


@pytest.mark.parametrize("road", [True, False])
def test_planes_are_the_tensor(road):
    logits = torch.randn(2, 28 if road else 26, 5, 7) * 3
    assert np.allclose([as_channels(p) for p in told(logits).numpy()], as_tensor(logits), atol=1e-6)


@pytest.mark.parametrize("shape", [(20, 30), (65, 200), (300, 41)])
def test_any_size_with_a_network(shape):
    torch.manual_seed(0)
    fn = graph_predictor(Sat2Graph(width=1, road=shape[0] != 65), GREY)
    pixels = np.random.default_rng(0).integers(0, 255, (3, *shape), dtype=np.uint8)
    out = predict_tensor(pixels, np.ones(shape, bool), fn, 128, 96)
    assert out.shape == (28 - 2 * (shape[0] == 65), *shape) and out.dtype == np.float32
    assert np.isfinite(out).all() and np.allclose(out[0] + out[1], 1, atol=1e-6)


def test_larger_windows_give_the_published_roads():
    "A network that looks 15 pixels around itself, on a graph that its weights cannot know: both blendings, the same answer."
    torch.manual_seed(1)
    blur = torch.nn.AvgPool2d(5, 1, 2)
    tensor = town()

    def fn(pixels, valid):
        out = looked_up(tensor, .05)(pixels, valid)
        mixed = blur(torch.from_numpy(out)).numpy()
        return (.8 * out + .2 * mixed).astype(np.float32)      # what lies beyond the window is missed at its border
    pixels, valid = places(tensor.shape[1:])
    fast, slow = predict_tensor(pixels, valid, fn, 256, 160), predict_tensor(pixels, valid, fn, blend="published")
    assert np.abs(fast - slow)[PROBS].mean() < .02
    assert topo(decode(slow), decode(fast), gsd_m=1.).f1 > .98
    assert topo(town_graph(), decode(fast), gsd_m=1.).f1 > .9


def test_invalid_pixels_hold_nothing_and_blank_windows_are_not_seen():
    pixels, valid = places((300, 300))
    valid[:, 100:] = False
    calls, fn = [], looked_up(np.full((28, 300, 300), .7, np.float32))
    def counted(p, v): calls.append(len(p)); return fn(p, v)
    out = predict_tensor(pixels, valid, counted, 96, 64, batch=2)
    seen = sum(calls)
    assert (out[PROBS][:, ~valid] == 0).all() and (out[4:6][:, ~valid] == 0).all() and np.allclose(out[0][valid], .7)
    assert seen < len(graph_windows((300, 300), 96, 64)) * .6
    calls.clear()
    assert predict_tensor(pixels, valid & False, counted, 96, 64)[0].max() == 0 and sum(calls) == 1


def test_bad_model_functions_are_refused():
    pixels, valid = places((64, 64))
    for shape, said in (((1, 2, 128, 128), "26 or 28"), ((1, 28, 64, 64), "for 1 windows")):
        with pytest.raises(DataError, match=said): predict_tensor(pixels, valid, lambda p, v, s=shape: np.zeros(s, np.float32), 128)
    with pytest.raises(DataError, match="not finite"): predict_tensor(pixels, valid, lambda p, v: np.full((1, 28, *v.shape[1:]), np.nan), 128)
    for arguments, said in ((dict(blend="mean"), "blend is"), (dict(size=100), "multiple"), (dict(size=128, stride=200), "stride"), (dict(batch=0), "batch")):
        with pytest.raises(DataError, match=said): predict_tensor(pixels, valid, looked_up(np.zeros((28, 64, 64))), **arguments)


# pieces

@settings(deadline=None, max_examples=5)
@given(st.integers(0, 3), st.sampled_from([(256, 160), (128, 96), (160, 160)]), st.sampled_from([100, 230, 9999]),
       st.sampled_from([700, 480, 9999]))
def test_pieces_give_the_graph_of_one_piece(seed, sides, panel_px, piece_px):
    tensor = town(seed)
    pixels, valid = places(tensor.shape[1:])
    fn = looked_up(tensor, .04)
    whole = decode(predict_tensor(pixels, valid, fn, *sides), *USUAL, part_px=200., spur_px=50.)
    graph, sure = in_pieces(pixels, valid, fn, *sides, panel_px, piece_px)
    assert np.array_equal(graph.nodes, whole.nodes) and np.array_equal(graph.edges, whole.edges)
    assert len(sure) == len(graph) and (sure > .0025).all() and (sure <= 1).all()


@pytest.mark.parametrize("piece_px", [130, 173, 256, 311])
def test_small_parts_neither_cut_nor_double_roads(piece_px):
    tensor = town(1)
    tensor = (tensor + np.random.default_rng(0).normal(0, .05, tensor.shape)).astype(np.float32)
    tensor[PROBS] = tensor[PROBS].clip(0, 1)
    pixels, valid = places(tensor.shape[1:])
    whole = decode(tensor, *USUAL, part_px=200., spur_px=50.)
    graph, _ = in_pieces(pixels, valid, looked_up(tensor), 128, 96, 150, piece_px)
    assert abs(graph.length / whole.length - 1) < .002
    assert topo(whole, graph, gsd_m=1., match_m=5).f1 > .99
    assert doubled(graph) <= doubled(whole)


def doubled(graph):
    "Pairs of edges over 20 px that run side by side nearer than 3 px without sharing a node."
    lines = shapely.linestrings(graph.nodes[graph.edges])
    tree = shapely.STRtree(lines)
    a, b = tree.query(lines, predicate="dwithin", distance=3.)
    apart = (a < b) & ~(graph.edges[a][:, :, None] == graph.edges[b][:, None]).any((1, 2))
    shared = shapely.length(shapely.intersection(lines[a[apart]], shapely.buffer(lines[b[apart]], 3.)))
    return int((shared > 20).sum())


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the published example graphs are not on this machine")
def test_a_published_tile_in_pieces():
    graph = read_graph(next(EXAMPLES.rglob("gt.p"))).crop((0, 0, 2048, 2048)).crop((300, 300, 1100, 1100))
    graph = RoadGraph(graph.nodes - 300, graph.edges)
    tensor = encode(graph, (800, 800), road=True)
    tensor += np.random.default_rng(0).normal(0, .03, tensor.shape).astype(np.float32)
    tensor[PROBS] = tensor[PROBS].clip(0, 1)
    pixels, valid = places((800, 800))
    whole = decode(tensor, *USUAL)
    found, _ = in_pieces(pixels, valid, looked_up(tensor), 352, 256, 300, 700)
    assert topo(whole, found, gsd_m=1., match_m=5).f1 > .995 and abs(found.length / whole.length - 1) < .002
    assert doubled(found) <= doubled(whole) and topo(graph, found, gsd_m=1.).f1 > .93


def test_sure_is_of_the_scene_not_of_a_part():
    "A weak spur in a weak quarter stays or goes by the surest roads of the whole scene."
    graph = RoadGraph([(100, 100), (140, 100), (180, 100), (220, 100), (140, 130)], [(0, 1), (1, 2), (2, 3), (1, 4)])
    strong, weak = np.array([1., 1., 1., 1.]), np.array([1., 1., 1., .3])
    assert len(refined(graph, strong, 50., 50.)[0]) == 4 and len(refined(graph, weak, 50., 50.)[0]) == 3
    assert len(refined(graph, weak, 50., 50., sure=.2)[0]) == 4


@calm
@given(st.integers(0, 2**32 - 1), st.floats(.1, 20))
def test_simplified_roads_keep_their_mean_confidence(seed, tolerance):
    rng = np.random.default_rng(seed)
    graph = town_graph(int(seed % 3))
    sure = rng.random(len(graph))
    fewer, mean = simplified(graph, sure, tolerance, gsd_m=1.)
    plain = graph.simplify(tolerance, 1.)
    assert np.array_equal(fewer.edges, plain.edges) and len(mean) == len(plain) and fewer.n_parts == graph.n_parts
    assert mean.min() >= sure.min() - 1e-9 and mean.max() <= sure.max() + 1e-9
    flat, ones = simplified(graph, np.full(len(graph), .25), tolerance, gsd_m=1.)
    assert np.allclose(ones, .25)


def test_a_ring_keeps_its_confidence():
    ring = RoadGraph([(0, 0), (50, 0), (100, 0), (100, 100), (0, 100)], [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)])
    fewer, sure = simplified(ring, np.array([.2, .4, .6, .6, .6]), 2., gsd_m=1.)
    assert fewer.n_parts == 1 and len(fewer) == 4 and np.isclose(sorted(sure)[0], .3)

