"Behaviour of thinning, gaps and skeleton graphs: what is drawn comes back."
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import skimage.morphology
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracles.drawn_roads import apart, drawn, loops, network
from rasterio.transform import from_origin
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra

from aerial_nb.data.synthetic import scene
from aerial_nb.roads import gaps
from aerial_nb.roads.apls import apls
from aerial_nb.roads.graph import RoadGraph
from aerial_nb.roads.skeleton import road_widths, skeleton_graph
from aerial_nb.roads.thinning import fill_holes, road_pixels, thin, trace

calm = settings(deadline=None, max_examples=60)
DATA = Path(__file__).parents[1] / "../shared/data"
blobs = hnp.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40)),
                   elements=st.sampled_from([True, True, True, False]))


def parts_and_holes(road):
    "Parts of more than one pixel, holes, and holes of more than three pixels."
    padded = np.pad(road.astype(bool), 1)
    areas = [np.bincount(skimage.measure.label(x, connectivity=c).ravel())[1:] for x, c in ((padded, 2), (~padded, 1))]
    return (areas[0] > 1).sum(), len(areas[1]) - 1, (areas[1] > 3).sum() - (areas[1][0] > 3)


# ---- thinning

@calm
@given(blobs)
def test_thinning_is_that_of_guo_and_hall(road):
    assert np.array_equal(thin(road), skimage.morphology.thin(road))


@calm
@given(blobs)
def test_tracing_keeps_parts_and_rings(road):
    lines = thin(road)
    graph = trace(lines)
    parts, holes, wide_holes = parts_and_holes(lines)
    assert graph.n_parts == parts
    assert wide_holes <= loops(graph) <= holes


@pytest.mark.parametrize("radius, width", [(5, 3), (9, 4), (14, 5), (30, 9), (60, 15)])
def test_rings_come_back_as_rings(radius, width):
    y, x = np.mgrid[:160, :160] - 79.5
    graph = skeleton_graph(np.abs(np.hypot(x, y) - radius) < width / 2)
    assert (graph.degrees == 2).all() and graph.n_parts == 1 and loops(graph) == 1
    assert graph.length == pytest.approx(2 * np.pi * radius, rel=.06)


def test_parallel_roads_and_loops_stay_apart():
    one = RoadGraph([(20, 60), (100, 60), (60, 20), (60, 100), (140, 60), (170, 40), (170, 80)],
                    [(0, 2), (2, 1), (0, 3), (3, 1), (1, 4), (4, 5), (5, 6), (6, 4)])
    back = skeleton_graph(drawn(one, 6, (120, 200)))
    assert loops(back) == 2 and back.n_parts == 1
    assert sorted(back.degrees[back.degrees != 2].tolist()) == [3, 3]


def test_holes_are_filled_up_to_their_size_and_not_at_the_border():
    road = np.ones((12, 30), bool)
    road[3, 3:7] = road[7, 3:8] = road[0, 20] = road[5:7, 15:17] = False
    filled = fill_holes(road)
    assert filled[3, 3:7].all() and filled[5:7, 15:17].all()
    assert not filled[7, 3:8].any() and not filled[0, 20]
    assert not road[3, 3] and fill_holes(road, most=5)[7, 3:8].all()


# ---- what is road

def test_masks_are_read_as_found():
    for mask in ([[0, 1]], [[0, 255]], [[False, True]], [[0., 1.]]):
        for dtype in (np.uint8, np.int64, float) if mask[0][1] != 255 else (np.uint8, np.int32):
            assert road_pixels(np.array(mask, dtype)).tolist() == [[False, True]]
    assert road_pixels(np.array([[0, 1, 255]], np.uint8)).tolist() == [[False, True, False]]
    assert road_pixels(np.array([[.2, np.nan, .7]]), .5).tolist() == [[False, False, True]]
    assert road_pixels(np.array([[100, 200]], np.uint8), .5).tolist() == [[False, True]]
    assert road_pixels(np.array([[0, 1]], np.uint8), .5).tolist() == [[False, True]]


@pytest.mark.parametrize("mask, threshold, message", [
    (np.array([[0, 90, 255]], np.uint8), None, "needs threshold="),
    (np.array([[0, .3, 1]]), None, "1 of 3 values lie between 0 and 1.*threshold="),
    (np.array([[-3., 4.]]), .5, "logits need a sigmoid"),
    (np.array([[0, 3]], np.int64), None, "this mask has 2 values"),
    (np.array([[0, 300]], np.int64), None, "found int64 from 0 to 300"),
    (np.array([[0, .3]]), 128, "probability between 0 and 1"),
    (np.zeros((1, 4, 4), np.uint8), None, r"got shape \(1, 4, 4\)"),
    (np.zeros((0, 4), np.uint8), None, "shape"),
    (np.array([["a"]]), None, "mask"),
])
def test_what_is_no_mask_is_refused(mask, threshold, message):
    with pytest.raises(ValueError, match=message):
        skeleton_graph(mask, threshold)


# ---- what is drawn comes back

@pytest.mark.parametrize("seed", range(26))
def test_a_drawn_network_comes_back(seed):
    truth, width = network(seed), 3 + seed % 13
    back = skeleton_graph(drawn(truth, width, (600, 600), ("round", "flat")[seed % 2]))
    far = apart(truth, back)
    assert (back.n_parts, loops(back)) == (truth.n_parts, loops(truth))
    assert np.percentile(far, 99) < .35 * width + 1 and far.max() < width + 3
    assert back.length == pytest.approx(truth.length, rel=.02)


def test_routes_on_drawn_networks_are_as_long():
    scores = []
    for seed in range(26):
        truth = network(seed)
        back = skeleton_graph(drawn(truth, 3 + seed % 13, (600, 600)))
        scores.append(apls(truth, back, variant="sat2graph", gsd_m=1.).apls)
    assert np.mean(scores) > .985 and np.min(scores) > .975


@pytest.mark.parametrize("cap, ends", [("flat", (10, 90)), ("round", (10, 90))])
@pytest.mark.parametrize("width", [4, 7, 12])
@pytest.mark.parametrize("slope", [0., .3, 1.])
def test_ends_are_where_they_were_drawn(cap, ends, width, slope):
    line = RoadGraph([(x + 20, 30 + slope * x) for x in ends], [(0, 1)])
    back = skeleton_graph(drawn(line, width, (160, 130), cap))
    assert len(back.nodes) <= 4 and apart(line, back).max() < 1.5 + .3 * width


def test_roads_reach_the_border():
    line = RoadGraph([(-20, 10), (220, 95)], [(0, 1)])
    back = skeleton_graph(drawn(line, 9, (100, 200)))
    assert back.nodes[:, 0].min() == pytest.approx(0, abs=.6) and back.nodes[:, 0].max() == pytest.approx(200, abs=.6)
    assert apart(back, line.crop((0, 0, 200, 100))).max() < 3


def test_pixel_centres_are_at_a_half():
    mask = np.zeros((9, 30), bool)
    mask[4] = True
    assert set(skeleton_graph(mask).nodes[:, 1]) == {4.5}


@calm
@given(blobs)
def test_any_mask_gives_a_sound_graph(road):
    graph = skeleton_graph(road)
    h, w = road.shape
    assert (graph.nodes >= 0).all() and (graph.nodes <= (w, h)).all()
    assert graph.tidy() == graph


@pytest.mark.parametrize("mask", [np.zeros((40, 50), bool), np.ones((40, 50), bool), np.ones((1, 1), bool),
                                  np.eye(3, dtype=bool), np.ones((1, 60), bool), np.ones((60, 2), bool)])
def test_odd_masks_do_not_crash(mask):
    skeleton_graph(mask, gsd_m=1., gap_m=5, spur_m=2, part_m=2)


def test_turning_the_mask_turns_the_graph():
    mask = drawn(network(3), 7, (600, 600))
    here, turned = skeleton_graph(mask), skeleton_graph(np.rot90(mask).copy())
    back = RoadGraph(np.stack([600 - turned.nodes[:, 1], turned.nodes[:, 0]], 1), turned.edges)
    assert np.percentile(apart(here, back), 99) < 2.5 and loops(here) == loops(back)


def test_a_scene_comes_back_on_the_map():
    town = scene(512, seed=3)
    graph = skeleton_graph(town.roads, crs=town.crs, transform=town.transform)
    assert graph.crs == town.crs and graph.space == "pixel"
    assert np.mean(apart(town.graph, graph) > 6) < .02
    assert graph.to_map().length_m == pytest.approx(town.graph.length_m, rel=.05)


# ---- metres

def test_metres_need_a_scale():
    mask = drawn(network(1), 5, (600, 600))
    with pytest.raises(ValueError, match="say how many a pixel has"):
        skeleton_graph(mask, spur_m=5)
    with pytest.raises(ValueError, match="only together"):
        skeleton_graph(mask, crs="EPSG:32633")
    with pytest.raises(ValueError, match="only together"):
        skeleton_graph(mask, transform=from_origin(0, 0, 1, 1))


def test_spurs_and_parts_go_by_metres():
    town = RoadGraph([(10, 50), (100, 50), (190, 50), (100, 74), (20, 90), (50, 90)],
                     [(0, 1), (1, 2), (1, 3), (4, 5)])
    mask = drawn(town, 5, (110, 200))
    assert skeleton_graph(mask, gsd_m=.5, spur_m=8).degrees.max() == 3
    assert skeleton_graph(mask, gsd_m=.5, spur_m=20).degrees.max() < 3
    assert skeleton_graph(mask, gsd_m=.5, part_m=14).n_parts == 2
    assert skeleton_graph(mask, gsd_m=.5, part_m=20).n_parts == 1
    here = dict(crs="EPSG:32633", transform=from_origin(5e5, 5e6, .5, .5))
    assert skeleton_graph(mask, spur_m=20, part_m=20, **here).n_parts == 1


def test_gaps_close_by_distance_and_direction():
    lines = RoadGraph([(10, 20), (60, 20), (75, 21), (140, 22), (100, 40), (100, 90), (20, 60), (60, 60), (66, 66),
                       (66, 110)], [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)])
    assert lines.join_gaps(8, gsd_m=1.).n_parts == 5
    joined = lines.join_gaps(20, gsd_m=1.)
    assert joined.n_parts == 3                      # the bent pair at the lower left stays open
    assert sorted(np.bincount(joined.degrees).tolist())[-1] >= 4 and joined.degrees.max() == 3
    assert lines.join_gaps(10, gsd_m=.5) == joined
    assert lines.join_gaps(20, angle_deg=60, gsd_m=1.).n_parts == 2
    for wrong in (dict(gap_m=0), dict(gap_m=5, angle_deg=0)):
        with pytest.raises(ValueError):
            lines.join_gaps(**wrong, gsd_m=1.)
    with pytest.raises(ValueError, match="gsd_m="):
        lines.join_gaps(20)


def test_a_fork_is_not_closed():
    fork = RoadGraph([(0, 0), (40, 0), (60, 8), (60, -8), (52, 3)], [(0, 1), (1, 2), (1, 3)])
    assert loops(fork.join_gaps(25, gsd_m=1.)) == 0
    assert RoadGraph([], []).join_gaps(5, gsd_m=1.) == RoadGraph([], [])


def test_two_ends_at_one_road_split_it_twice():
    ladder = RoadGraph([(0, 0), (100, 0), (30, 50), (30, 6), (70, 50), (70, 6)], [(0, 1), (2, 3), (4, 5)])
    joined = ladder.join_gaps(10, gsd_m=1.)
    assert joined.n_parts == 1 and (joined.degrees == 3).sum() == 2
    assert joined.length == pytest.approx(ladder.length + 12)


# ---- widths and speed

@pytest.mark.parametrize("width", [3, 6, 9, 15])
def test_widths_are_those_drawn(width):
    truth = network(width)
    mask = drawn(truth, width, (600, 600))
    graph = skeleton_graph(mask)
    found = road_widths(graph, mask, gsd_m=.5)
    assert found.shape == (len(graph),)
    assert np.average(found, weights=graph.lengths) == pytest.approx(width / 2, abs=.15)
    assert road_widths(truth, np.zeros_like(mask), gsd_m=1.).max() == 0
    with pytest.raises(ValueError, match="to_pixels"):
        road_widths(RoadGraph(truth.nodes, truth.edges, "EPSG:32633"), mask)
    with pytest.raises(ValueError, match="gsd_m="):
        road_widths(graph, mask)


@pytest.mark.skipif(not (DATA / "massachusetts_roads").is_dir(), reason="needs the Massachusetts masks beside the project")
def test_a_real_tile_takes_milliseconds():
    took = []
    for path in sorted(DATA.glob("massachusetts_roads*/masks/*.png"))[::6]:
        with rasterio.open(path) as file: mask = file.read(1)
        skeleton_graph(mask[:64, :64] > 127)
        start = time.process_time()
        graph = skeleton_graph(mask > 127)
        took.append(time.process_time() - start)
        assert graph.length > 0
    assert np.median(took) < .06


def worth_by_scipy(graph, plane, tips, links):
    "The way round every link, from the distances of all pairs of nodes."
    size = np.hypot(*(plane[graph.edges[:, 0]] - plane[graph.edges[:, 1]]).T)
    roads = coo_array((size, graph.edges.T), shape=(len(graph.nodes),) * 2).tocsr()
    far, good = dijkstra(roads, directed=False), []
    for _, tip, other, where, length in links:
        row, other = far[tips[int(tip)]], int(other)
        way = row[tips[other]] if np.isnan(where) else min(row[graph.edges[other, 0]] + where * size[other], row[graph.edges[other, 1]] + (1 - where) * size[other])
        good.append(way >= gaps.DETOUR * length)
    return np.array(good, bool)


@calm
@given(st.integers(0, 10**6), st.floats(5, 120))
def test_ways_round_gaps_are_those_of_all_pairs(seed, gap):
    dice = np.random.default_rng(seed)
    at = dice.integers(0, 200, (dice.integers(4, 60), 2)) * 1.
    graph = RoadGraph(at, dice.integers(0, len(at), (len(at), 2))).tidy()
    if not len(graph): return
    tips, ways = gaps._pointing(graph, graph.nodes, max(gap / 2, 8.))
    if not len(tips): return
    links = np.concatenate([gaps._facing(graph.nodes[tips], ways, gap, .5), gaps._hitting(graph, graph.nodes, tips, ways, gap)])
    assert np.array_equal(gaps._worth(graph, graph.nodes, tips, links), worth_by_scipy(graph, graph.nodes, tips, links))
