"""Graph-tensors: the published drawing and decoding, the cured one, crossings that stay apart, and bad input."""
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gte as plain

from aerial_nb.data.synthetic import scene
from aerial_nb.roads.apls import apls
from aerial_nb.roads.files import read_graph
from aerial_nb.roads.graph import RoadGraph
from aerial_nb.roads.gte import decode, encode
from aerial_nb.roads.topo import topo

EXAMPLE = Path(__file__).parents[1] / "../shared/data/roadgraphs/sat2graph_examples/gt.p"
needs_data = pytest.mark.skipif(not EXAMPLE.is_file(), reason="the published example graphs are not on this machine")


def town(seed: int, side: int = 200, n: int = 12) -> RoadGraph:
    "A random network of edges of 12 to 24 px on whole pixels, away from the border."
    dice = np.random.default_rng(seed)
    nodes, edges = [dice.integers(60, side - 60, 2)], []
    for _ in range(200):
        i, angle, size = dice.integers(len(nodes)), dice.uniform(0, 2 * np.pi), dice.uniform(12, 24)
        new = np.round(nodes[i] + size * np.array([np.cos(angle), np.sin(angle)])).astype(int)
        if (new < 24).any() or (new > side - 24).any() or min(np.hypot(*(new - o)) for o in nodes) < 11: continue
        nodes.append(new); edges.append((i, len(nodes) - 1))
        if len(nodes) == n: break
    return RoadGraph(np.array(nodes, float), np.array(edges))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_the_published_drawing_is_the_plain_one(seed):
    graph = town(seed)
    expected, _ = plain.encode_plain(plain.as_dict(graph), (200, 200))
    assert np.allclose(encode(graph, (200, 200), published=True), expected, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_the_published_decoder_is_the_plain_one(seed):
    tensor = encode(town(seed), (200, 200), published=True)
    ours, expected = decode(tensor, published=True), plain.decode_plain(tensor, part=100., spur=25.)
    assert len(ours) == sum(map(len, expected.values())) // 2
    roads = {tuple(sorted((tuple(ours.nodes[u][::-1].astype(int)), tuple(ours.nodes[v][::-1].astype(int))))) for u, v in ours.edges}
    assert roads == {tuple(sorted((tuple(map(int, p)), tuple(map(int, q))))) for p, others in expected.items() for q in others}


@needs_data
def test_the_example_tile_decodes_to_the_published_numbers_and_ours_to_more():
    truth = read_graph(EXAMPLE)
    tensor = encode(truth, (2048, 2048), published=True)
    theirs, ours = decode(tensor, published=True), decode(encode(truth, (2048, 2048)))
    assert len(theirs.nodes) == pytest.approx(3564, rel=.01) and len(theirs) == pytest.approx(3847, rel=.01)
    assert apls(truth, theirs, gsd_m=1).apls == pytest.approx(.983, abs=.003)
    assert topo(truth, theirs, gsd_m=1).f1 == pytest.approx(.971, abs=.003)
    assert apls(truth, ours, gsd_m=1).apls >= .99 and topo(truth, ours, gsd_m=1).f1 >= .99


@pytest.mark.parametrize("seed", range(10))
def test_a_crossing_without_a_node_stays_one(seed):
    dice = np.random.default_rng(seed)
    bend, angle = dice.uniform(-.2, .2), dice.uniform(0, np.pi)
    along = np.arange(-70, 71, 20.)
    def road(turn): return 100 + np.stack([along * np.cos(turn), along * np.sin(turn)], 1) + bend * 10
    nodes = np.round(np.concatenate([road(angle), road(angle + np.pi / 2)]))
    graph = RoadGraph(nodes, [(i, i + 1) for part in (0, 8) for i in range(part, part + 7)])
    found = decode(encode(graph, (200, 200)))
    assert found.n_parts == 2 and (found.degrees <= 2).all() and len(found) == 14


def test_a_drawn_town_with_an_overpass_survives():
    drawn = scene(size=512, seed=0).graph.densify(20, gsd_m=1) if hasattr(RoadGraph, "densify") else scene(size=512, seed=0).graph
    found = decode(encode(drawn, (512, 512)))
    assert found.length == pytest.approx(drawn.crop((0, 0, 512, 512)).length, rel=.08) if hasattr(RoadGraph, "crop") else len(found)


def test_a_crop_is_the_crop_of_the_whole():
    graph = town(3)
    whole = encode(graph, (200, 200))
    assert np.array_equal(encode(graph, (200, 200), window=(30, 40, 96, 64)), whole[:, 30:126, 40:104])


def test_nothing_in_nothing_out():
    empty = RoadGraph(np.zeros((0, 2)), np.zeros((0, 2), int))
    for published in (True, False): assert len(decode(encode(empty, (64, 96), published=published), published=published)) == 0


@pytest.mark.parametrize("spoil", [lambda t: t[:25], lambda t: np.where(t > .5, np.nan, t), lambda t: t * 8 - 4, lambda t: t[0]])
def test_what_is_no_graph_tensor_is_refused(spoil):
    with pytest.raises(ValueError): decode(spoil(encode(town(1), (200, 200))))


def test_a_graph_on_the_map_is_refused():
    graph = town(1)
    with pytest.raises(ValueError, match="pixel|map"): encode(RoadGraph(graph.nodes, graph.edges, "EPSG:32633"), (200, 200))
