"Graph-tensors against their plain definitions and the published numbers; round trips, bad input, stacked roads."
import math
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.gte import (as_dict, connect_plain, crossings_plain, decode_plain, deloop_plain, encode_plain, ends_plain,
                         refine_plain, separate_plain, shave_plain, vertices_plain)
from scipy.spatial import cKDTree

from aerial_nb.data.synthetic import scene
from aerial_nb.roads.apls import apls
from aerial_nb.roads.clean import Chains
from aerial_nb.roads.decode import decode as decode_here
from aerial_nb.roads.files import read_graph
from aerial_nb.roads.graph import RoadGraph
from aerial_nb.roads.gte import CHANNELS, collisions, decode, encode
from aerial_nb.roads.refine import refine_by_evidence, refine_published
from aerial_nb.roads.stacked import crossings, separate_stacked
from aerial_nb.roads.topo import topo

calm = settings(deadline=None, max_examples=20)
EXAMPLES = Path(__file__).parents[1] / "../shared/data/roadgraphs/sat2graph_examples"
real = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the published example graphs are not on this machine")
EMPTY = RoadGraph(np.zeros((0, 2)), np.zeros((0, 2), int))
SEEDS = st.integers(0, 2**32 - 1)


def scattered(seed, n=30, size=120, reach=30):
    "Nodes anywhere, some in one pixel and some outside, joined where near; worse than any road network."
    rng = np.random.default_rng(seed)
    at = rng.uniform(-5, size + 5, (n, 2))
    at[rng.integers(0, n, 3)] = at[rng.integers(0, n, 3)] + rng.uniform(.1, .3, (3, 2))   # never the same place: a key of a dict
    pairs = cKDTree(at).query_pairs(reach, output_type="ndarray")
    edges = pairs[rng.random(len(pairs)) < .5]
    return RoadGraph(at, rng.permutation(edges))


def network(seed, size=512, margin=170):
    "Bent streets over a square, all inside; where two cross there is a junction, or one leads over the other."
    rng, lines = np.random.default_rng(seed), []
    for _ in range(rng.integers(3, 8)):
        turn, t = rng.uniform(0, np.pi), np.linspace(-1, 1, 9)[:, None]
        way, half = np.array([np.cos(turn), np.sin(turn)]), rng.uniform(60, 150)
        bow = rng.uniform(-.15, .15) * half * (1 - t**2)
        lines.append(shapely.LineString(rng.uniform(margin, size - margin, 2) + way * half * t + way[::-1] * (-1, 1) * bow))
    stops = [[(line.project(shapely.Point(p)), tuple(p)) for p in shapely.get_coordinates(line)] for line in lines]
    for i, line in enumerate(lines):
        for j in range(i):
            for p in shapely.get_coordinates(line.intersection(lines[j])):
                if rng.random() < .5: continue
                for k in (i, j): stops[k].append((lines[k].project(shapely.Point(p)), tuple(p)))
    return RoadGraph.from_lines([shapely.LineString([p for _, p in sorted(stop)]) for stop in stops])


def in_pixels(graph):
    "Edges as pairs of whole pixels."
    return {tuple(sorted(map(tuple, e))) for e in np.floor(graph.nodes)[graph.edges].astype(int).tolist()}


def noisy(tensor, sigma, sigma_px, seed=0):
    rng, out = np.random.default_rng(seed), tensor.copy()
    if sigma:
        for i in (0, *range(2, 26, 4)): out[i] = (out[i] + rng.normal(0, sigma, out[i].shape)).clip(0, 1)
    for i in range(4, 26, 4):
        if sigma_px: out[i:i + 2] += rng.normal(0, sigma_px / 25, out[i:i + 2].shape)
    return out


def same(graph, near):
    "Whether a graph is a published dict, node for node in its order."
    nodes = np.array([(c, r) for r, c in near], float).reshape(-1, 2)
    edges = {tuple(sorted((p[::-1], q[::-1]))) for p, others in near.items() for q in others}
    return np.array_equal(graph.nodes, nodes) and in_pixels(graph) == edges


@cache
def drawn_town(seed):
    town = scene(512, seed=seed, gsd_m=1.).graph.crop((4, 4, 508, 508))
    town = separate_stacked(town.simplify(.5).merge_close(4.).densify(20.))
    return RoadGraph(town.nodes, town.edges)


def cpu(repeats, f, *args, **options):
    "Best CPU seconds of a few runs, after one that compiles."
    f(*args, **options)
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        f(*args, **options)
        times.append(time.process_time() - begin)
    return min(times)


# encoding

@calm
@given(SEEDS)
def test_published_encoding_is_the_plain_one(seed):
    graph = replace(scattered(seed), nodes=np.abs(scattered(seed).nodes))
    plain, clashes = encode_plain(as_dict(graph), (100, 130))
    assert np.allclose(encode(graph, (100, 130), published=True), plain, rtol=0, atol=1e-6)
    assert collisions(graph, (100, 130), published=True).clashes == clashes


def test_layout_is_the_published_one():
    graph = RoadGraph([(40, 40), (60, 45)], [(0, 1)])       # x, y: 20 columns to the right, 5 rows down
    tensor = encode(graph, (90, 100), road=True)
    k = int((math.atan2(20, 5) + math.pi) / (math.pi / 3))
    assert np.allclose(tensor[:, 40, 40][[0, 1, 2 + 4 * k, 3 + 4 * k, 4 + 4 * k, 5 + 4 * k]], [1, 0, 1, 0, .2, .8])
    assert tensor[0].sum() == 18 and tensor[2:26:4].sum() == 18 and len(CHANNELS) == 28
    for i in (0, *range(2, 26, 4), 26): assert np.array_equal(tensor[i] + tensor[i + 1], np.ones((90, 100)))
    assert tensor[26, 42, 48:52].all() and tensor[26].sum() < 90


@calm
@given(SEEDS, st.booleans(), st.integers(-20, 90), st.integers(-20, 90), st.integers(1, 60))
def test_a_crop_of_the_tensor_is_the_tensor_of_the_crop(seed, published, row, col, size):
    graph = scattered(seed)
    whole = np.pad(encode(graph, (110, 120), road=True, published=published), ((0, 0), (20, 100), (20, 100)))
    for i in (1, *range(3, 28, 4)): whole[i][whole[i - 1] == 0] = 1
    part = encode(graph, (110, 120), (row, col, size, size + 3), road=True, published=published)
    assert np.array_equal(part, whole[:, row + 20:row + 20 + size, col + 20:col + 23 + size])


@calm
@given(SEEDS)
def test_default_encoding_keeps_all_edges_up_to_six(seed):
    graph = scattered(seed, 14)
    report = collisions(graph, (120, 120))
    tensor = encode(graph, (120, 120))
    at = np.floor(graph.nodes[:, ::-1]).astype(int)
    inside = np.flatnonzero(((at >= 0) & (at < 120)).all(1))
    edges = graph.edges[np.isin(graph.edges, inside).all(1)]
    alone = cKDTree(at).query_ball_point(at, .5, return_length=True) == 1
    degree = np.bincount(edges.ravel(), minlength=len(at))
    for u in inside[alone[inside]]:
        steps = 25 * np.stack([tensor[4:26:4, *at[u]], tensor[5:26:4, *at[u]]], 1)[tensor[2:26:4, *at[u]] == 1]
        near = [at[a if b == u else b] - at[u] for a, b in edges if u in (a, b)]
        assert len(steps) == min(degree[u], 6) or not alone[edges].all()
        assert all(np.abs(step - np.array(near)).max(1).min() < 1e-4 for step in steps)
    if degree.max(initial=0) <= 6 and alone.all(): assert report.lost == 0


def test_seven_roads_are_one_too_many():
    turns = np.arange(7) * 2 * np.pi / 7
    star = RoadGraph([(50, 50), *(50 + 20 * np.stack([np.cos(turns), np.sin(turns)], 1))], [(0, i) for i in range(1, 8)])
    report = collisions(star, (100, 100))
    assert (report.clashes, report.lost, report.edges_lost) == (1, 1, 0)
    assert report.where.tolist() == [[50, 50]]
    assert len(decode(encode(star, (100, 100)), part_px=0, spur_px=0)) == 7     # one direction suffices


def test_edges_lost_at_both_ends_are_counted():
    fan = RoadGraph([(40, 40), (60, 38), (60, 42), (40, 44)], [(0, 1), (0, 2), (3, 2), (3, 1)])
    report = collisions(fan, (90, 90), published=True)
    plain, clashes = encode_plain(as_dict(fan), (90, 90))
    assert report.clashes == report.lost == clashes > 0
    assert report.edges_lost == 4 - len({tuple(sorted((p, q))) for p in as_dict(fan) for q in as_dict(fan)[p]
                                         if holds(plain, p, q) or holds(plain, q, p)}) > 0
    assert collisions(fan, (90, 90)).lost == 0


def holds(tensor, p, q):
    p, q = (tuple(int(x) for x in at) for at in (p, q))
    steps = 25 * np.stack([tensor[4:26:4, *p], tensor[5:26:4, *p]], 1)
    return (np.abs(steps - (np.array(q) - p)).max(1) < 1e-6).any()


def test_each_pixel_belongs_to_the_nearest_vertex():
    pair = RoadGraph([(50, 50), (51, 50), (30, 50), (70, 50)], [(0, 2), (1, 3)])
    tensor = encode(pair, (100, 100))
    assert np.allclose(25 * tensor[5:26:4, 50, 50].sum(), -20, atol=1e-4)
    assert np.allclose(25 * tensor[5:26:4, 50, 51].sum(), 19, atol=1e-4)


def test_a_crop_is_made_in_the_loader():
    for options in ({}, dict(published=True), dict(road=True)):
        assert cpu(10, encode, drawn_town(3), (512, 512), (100, 80, 352, 352), **options) < .005


def test_encode_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="to_pixels"): encode(RoadGraph([(0, 0), (1, 1)], [(0, 1)], "EPSG:32633"), (64, 64))
    with pytest.raises(ValueError, match="rows and columns"): encode(EMPTY, (0, 64))
    with pytest.raises(ValueError, match="with some area"): encode(EMPTY, (64, 64), (0, 0, 5, 0))
    with pytest.raises(ValueError, match="to_pixels"): separate_stacked(RoadGraph([(0, 0), (1, 1)], [(0, 1)], "EPSG:32633"))


def test_an_empty_graph_is_an_empty_tensor():
    for published in (False, True):
        tensor = encode(EMPTY, (40, 70), road=True, published=published)
        assert tensor.shape == (28, 40, 70) and tensor.sum() == 8 * 40 * 70
        assert len(decode(tensor, published=published)) == 0
    assert collisions(EMPTY, (40, 70)).ends == 0


# decoding as published

@settings(deadline=None, max_examples=12)
@given(SEEDS, st.sampled_from([(0, 0), (.02, 1), (.1, 2)]), st.sampled_from([.05, .3]), st.sampled_from([50., 100.]),
       st.sampled_from([np.float32, np.float64]))
def test_published_decoding_is_the_plain_one(seed, noise, edge_thr, weight, dtype):
    tensor, _ = encode_plain(as_dict(scattered(seed, 40, 110)), (120, 131), 2, dtype)
    tensor = noisy(tensor, *noise, seed)
    plain = connect_plain(tensor, .05, edge_thr, weight)
    assert same(decode(tensor, .05, edge_thr, 15, weight, True, 0, 0), plain)
    assert same(decode(tensor, .05, edge_thr, 15, weight, True, 60, 20), decode_plain(tensor, .05, edge_thr, weight, 15., True, 60, 20))


def test_published_thresholds_halve_in_small_images():
    for size, part, spur in ((399, 100, 25), (401, 200, 50)):
        tensor, _ = encode_plain(as_dict(network(3)), (size, size))
        assert same(decode(tensor, published=True), decode_plain(tensor, part=part, spur=spur))


def test_pass_three_finds_ends_without_a_vertex():
    "A vertex erased: its neighbours meet where it was."
    line = RoadGraph([(x, 60.) for x in range(20, 420, 20)], [(i, i + 1) for i in range(19)])
    for published in (True, False):
        tensor = encode(line, (120, 440), published=published)
        tensor[0:26, 57:64, 197:204] = 0
        back = decode(tensor, published=published, part_px=0, spur_px=0)
        assert back.n_parts == 1 and len(back) == 19
        assert np.abs(back.nodes - (200, 60)).sum(1).min() < 3
    tensor, _ = encode_plain(as_dict(line), (120, 440))
    tensor[0:26, 57:64, 197:204] = 0
    assert len(ends_plain(tensor, vertices_plain(tensor, .05), .05)) > 0


@calm
@given(SEEDS)
def test_refinement_is_the_plain_one(seed):
    graph = scattered(seed, 60, 300, 60)
    graph = replace(graph, nodes=np.round(graph.nodes) + np.arange(60)[:, None] * 1e-3).tidy()
    near, cut = refine_plain(as_dict(graph), 90., 40.), 1
    while cut: near, cut = deloop_plain(refine_plain(near, 90., 40.))
    near = shave_plain(near, 40.)
    found = refine_published(graph, 90., 40.)
    assert np.array_equal(found.nodes, np.array([p[::-1] for p in near]).reshape(-1, 2))
    assert len(found) == sum(map(len, near.values())) / 2


def cul_de_sacs():
    "A street with two turning loops and a ring that stands alone."
    turn = np.linspace(0, 2 * np.pi, 9)[:-1]
    nodes, edges = [(60. + 20 * i, 160.) for i in range(15)], [(i, i + 1) for i in range(14)]
    for joint, x, y in ((3, 120, 100), (14, 400, 160), (None, 200, 300)):
        first = len(nodes)
        nodes += [(x + 40 * np.sin(t), y - 40 * np.cos(t)) for t in turn]
        edges += [(first + i, first + (i + 1) % 8) for i in range(8)]
        if joint == 3: edges.append((3, first + 4))
        if joint == 14: edges.append((14, first + 6))
    return RoadGraph(nodes, edges)


def test_cul_de_sacs_come_back_and_can_be_simplified():
    graph = cul_de_sacs()
    for published in (True, False):
        back = decode(encode(graph, (400, 500), published=published), published=published)
        assert back.n_parts == 2 and (published or in_pixels(back) == in_pixels(graph))
        assert isinstance(back.chains(), Chains) and back.simplify(2.5, gsd_m=1).n_parts == 2


# decoding, cured

@pytest.mark.parametrize("start", range(0, 100, 25))
def test_networks_with_overpasses_survive(start):
    "100 random networks: every edge comes back to its pixels, and roads that do not meet still do not."
    seen = bridges = 0
    for seed in range(start * 4, start * 4 + 400):
        roads = separate_stacked(network(seed).densify(20., gsd_m=1, corners=False))
        over = crossings(roads)[1]
        if not len(over) or len(cKDTree(roads.nodes).query_pairs(4.5)): continue     # such vertices melt
        back = decode(encode(roads, (512, 512)))
        assert in_pixels(back) == in_pixels(roads), seed
        assert len(crossings(back)[0]) == len(over) and back.n_parts == roads.n_parts
        seen, bridges = seen + 1, bridges + len(over)
        if seen == 25: break
    assert seen == 25 and bridges > 25


@pytest.mark.parametrize("seed", [1, 3, 6])
def test_drawn_towns_survive(seed):
    town = drawn_town(seed)
    assert len(crossings(town)[0]) > 0
    back = decode(encode(town, (512, 512)))
    assert in_pixels(back) == in_pixels(town) and len(crossings(back)[0]) == len(crossings(town)[0])


def test_spurs_and_small_parts_stay_when_sure_and_go_when_not():
    roads = RoadGraph([(x, 60.) for x in range(40, 460, 20)] + [(200., 78), (200, 96), (300, 150), (318, 150)],
                      [(i, i + 1) for i in range(20)] + [(8, 21), (21, 22), (23, 24)])
    tensor = encode(roads, (220, 500))
    assert len(decode(tensor, published=True)) == 20 and len(decode(tensor)) == 23
    weak = tensor.copy()
    for i in (0, *range(2, 26, 4)): weak[i, 70:] *= .3
    weak[2 + 4 * 3, :, 190:210] *= .3           # the junction's view of the spur
    assert len(decode(weak)) == 20 and len(decode(weak, part_px=0, spur_px=0)) == 23


def test_evidence_saves_a_chain_by_one_sure_edge():
    roads = RoadGraph([(0, 0), (100, 0), (200, 0), (100, 15), (100, 30)], [(0, 1), (1, 2), (1, 3), (3, 4)])
    assert len(refine_by_evidence(roads, np.array([.9, .9, .2, .5]), .45, 10, 50)) == 4
    assert len(refine_by_evidence(roads, np.array([.9, .9, .2, .4]), .45, 10, 50)) == 2
    assert len(refine_by_evidence(roads, np.full(4, .1), .45, 300, 50)) == 0


def test_noise_on_a_drawn_town():
    town = drawn_town(3)
    clean = encode(town, (512, 512))
    for noise, least in (((0, 2), .98), ((.1, 2), .98), ((.2, 3), .95)):
        tensor = noisy(clean, *noise)
        ours, theirs = (topo(town, decode(tensor, published=p), gsd_m=1).f1 for p in (False, True))
        assert ours > least and ours > theirs + .1


def test_one_name_and_any_array():
    assert decode is decode_here
    tensor = encode(network(5), (512, 512))
    back = decode(tensor)
    class Array:
        "As torch and others do it."
        def __array__(self, dtype=None, copy=None): return tensor
    for other in (Array(), tensor.astype(np.float64), np.moveaxis(np.moveaxis(tensor, 0, -1).copy(), -1, 0)):
        assert decode(other) == back
    wide = np.pad(tensor, ((0, 2), (0, 0), (0, 37)))
    assert decode(wide) == back                             # 28 channels, not square


def test_decode_refuses_what_is_no_graph_tensor():
    good = encode(network(5), (512, 512))
    with pytest.raises(ValueError, match=r"\(26 or 28, rows, cols\), got \(27"): decode(np.zeros((27, 9, 9), np.float32))
    with pytest.raises(ValueError, match="moveaxis"): decode(np.zeros((9, 9, 28), np.float32))
    with pytest.raises(ValueError, match="floating point"): decode(np.zeros((26, 9, 9), np.uint8))
    with pytest.raises(ValueError, match="logits"): decode(good * 8 - 4)
    with pytest.raises(ValueError, match="thr is a probability"): decode(good, thr=5)
    with pytest.raises(ValueError, match="edge_thr is a probability"): decode(good, edge_thr=0.)
    with pytest.raises(ValueError, match="positive"): decode(good, snap_px=0)
    for published in (False, True):
        for channel, value, what in ((0, np.nan, "vertex channel holds NaN"), (6, np.nan, "edge channel holds NaN"),
                                     (6, 7., "no probabilities"), (8, np.nan, "not finite"), (8, np.inf, "not finite")):
            bad = good.copy()
            bad[2::4] = np.maximum(bad[2::4], .5 * bad[0])      # so that every vector is read
            bad[channel][good[0] == 1] = value
            with pytest.raises(ValueError, match=what): decode(bad, published=published)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 2), (40, 5)])
def test_tiny_images(shape):
    for published in (False, True):
        full = np.ones((26, *shape), np.float32)
        full[4::4] = full[5::4] = .1
        decode(full, published=published)
        assert len(decode(np.zeros((26, *shape), np.float32), published=published)) == 0


# stacked roads

def grid_of_bridges(seed):
    rng, nodes, edges = np.random.default_rng(seed), [], []
    for _ in range(rng.integers(3, 8)):
        a, b = rng.uniform(0, 160, (2, 2))
        n = max(int(np.hypot(*(a - b)) // rng.uniform(8, 22)), 1)
        edges += [(len(nodes) + i, len(nodes) + i + 1) for i in range(n)]
        nodes += [a + (b - a) * i / n for i in range(n + 1)]
    return RoadGraph(nodes, edges)


def rounded(ends): return sorted(tuple(sorted(tuple(round(float(x), 6) for x in p) for p in e)) for e in ends)


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10_000))
def test_stacked_roads_move_as_published(seed):
    roads = grid_of_bridges(seed).tidy()
    plain = separate_plain(as_dict(roads))
    found = separate_stacked(roads)
    assert rounded(found.nodes[found.edges][..., ::-1]) == sorted({e for e in rounded(
        (p, q) for p, others in plain.items() for q in others)})


@calm
@given(st.integers(0, 10_000))
def test_crossings_are_where_shapely_has_them(seed):
    roads = grid_of_bridges(seed)
    pairs, where = crossings(roads)
    lines = shapely.linestrings(roads.nodes[roads.edges])
    apart = {(i, j) for i in range(len(lines)) for j in range(i + 1, len(lines))
             if lines[i].crosses(lines[j]) and not set(roads.edges[i]) & set(roads.edges[j])}
    assert {tuple(p) for p in pairs.tolist()} == apart
    assert all(lines[i].distance(shapely.Point(p)) < 1e-6 and lines[j].distance(shapely.Point(p)) < 1e-6
               for (i, j), p in zip(pairs, where))
    assert len(crossings_plain(as_dict(roads.tidy()))) == 2 * len(apart)


def test_vertices_keep_clear_and_plain_streets_stay():
    for seed in (4, 5, 9, 16, 19):
        roads = network(seed).densify(20., gsd_m=1)
        apart = separate_stacked(roads)
        over = crossings(apart)[1]
        assert len(over) == len(crossings(roads)[0]) > 0
        assert cKDTree(apart.nodes).query(over)[0].min() > 9 > cKDTree(roads.nodes).query(crossings(roads)[1])[0].min()
    flat = RoadGraph([(0, 0), (20, 0), (40, 0)], [(0, 1), (1, 2)])
    assert separate_stacked(flat) == flat and separate_stacked(EMPTY) == EMPTY
    assert len(crossings(EMPTY)[0]) == 0


# the published example

LEVELS = [(0, 0), (0, 1), (0, 2), (.01, 1), (.02, 1), (.05, 1), (.10, 2)]


@pytest.fixture(scope="module")
def example():
    graph = read_graph(EXAMPLES / "gt.p")
    return graph, encode(graph, (2048, 2048), published=True)


@real
def test_the_published_numbers(example):
    graph, tensor = example
    report = collisions(graph, (2048, 2048), published=True)
    assert (report.ends, report.clashes) == (7950, 24)
    back = decode(tensor, published=True)
    assert len(back.nodes) == pytest.approx(3564, rel=.01) and len(back) == pytest.approx(3847, rel=.01)
    assert topo(graph, back, gsd_m=1).f1 == pytest.approx(.971, abs=.003)
    assert apls(graph, back, gsd_m=1).apls == pytest.approx(.983, abs=.003)
    assert len(crossings(graph)[0]) == 13


@real
def test_the_cured_decoder_returns_the_example(example):
    graph, tensor = example
    back = decode(tensor)
    assert topo(graph, back, gsd_m=1).f1 > .99 and apls(graph, back, gsd_m=1).apls > .99
    apart = graph.merge_close(3.1, gsd_m=1)                     # without vertices that melt: all but a knot
    back = decode(encode(apart, (2048, 2048)))
    assert len(back) == len(apart) and len(in_pixels(back) ^ in_pixels(apart)) < .01 * len(apart)


@real
def test_a_tile_is_decoded_in_a_third_of_a_second(example):
    for published in (True, False): assert cpu(3, decode, example[1], published=published) < .3


@real
@pytest.mark.slow
@pytest.mark.parametrize("noise", LEVELS)
def test_better_at_every_noise_level(example, noise):
    graph, tensor = example
    tensor = noisy(tensor, *noise)
    theirs, ours = decode(tensor, published=True), decode(tensor)
    assert topo(graph, ours, gsd_m=1).f1 > topo(graph, theirs, gsd_m=1).f1 + .02
    assert apls(graph, ours, gsd_m=1).apls > apls(graph, theirs, gsd_m=1).apls + .005
    for published in (True, False): assert cpu(2, decode, tensor, published=published) < 1
