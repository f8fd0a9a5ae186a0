"Road graphs of whole scenes: in parts as in one piece, right at the borders, measured in metres."
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracles.drawn_roads import apart, drawn, loops, network
from rasterio.transform import from_origin
from scipy import ndimage

from aerial_nb.data.raster import DataError, write_raster
from aerial_nb.roads.apls import apls
from aerial_nb.roads.graph import RoadGraph
from aerial_nb.roads.skeleton import road_widths, skeleton_graph
from aerial_nb.roads.topo import topo
from aerial_nb.scenes.centrelines import RoadRules, Skeleton, map_roads
from aerial_nb.scenes.joining import cores, join_parts, joined, widened
from aerial_nb.scenes.probmap import open_map
from aerial_nb.scenes.rowruns import row_runs

calm = settings(deadline=None, max_examples=40)
DATA = Path(__file__).parents[1] / "../shared/data"
UTM = "EPSG:32619"
PLAIN = dict(min_area_m2=0, min_length_m=0, prune_m=0, gap_m=0)


class Held:
    "Probabilities in memory, read like a map; remembers how much was read at a time."
    def __init__(self, probs):
        self.probs, self.shape, self.most = np.asarray(probs, np.float32), np.shape(probs), 0

    def read(self, window, band=1):
        row, col, height, width = window
        self.most = max(self.most, height * width)
        return self.probs[row:row + height, col:col + width]


def write(folder, probs, gsd=1., crs=UTM, name="map.tif", at=(300000, 4600000)):
    place = from_origin(*at, gsd, gsd) if np.isscalar(gsd) else from_origin(*at, *gsd)
    return write_raster(folder / name, np.asarray(probs, np.float32), crs, place if crs else None)


def shape_of(graph):
    return graph.n_parts, loops(graph), int((graph.degrees > 2).sum()), int((graph.degrees == 1).sum())


def same(a, b):
    return np.allclose(a.nodes, b.nodes, rtol=0, atol=1e-5) and np.array_equal(a.edges, b.edges)


def real_mask(name, size=1500):
    path = DATA / "massachusetts_roads/masks" / name
    if not path.exists(): pytest.skip("the real road masks are not on this machine")
    with rasterio.open(path) as file: return file.read(1)[:size, :size] > 0


# ---- which pixels

fields = hnp.arrays(np.float32, st.tuples(st.integers(1, 24), st.integers(1, 24)),
                    elements=st.sampled_from(np.float32([0, .2, .4, .6, .8, np.nan])))


def hysteresis(probs, high, low, least):
    "In one piece, by scipy."
    names, _ = ndimage.label(probs >= np.float32(low), np.ones((3, 3)))
    size, seeds = np.bincount(names.ravel()), np.unique(names[probs >= np.float32(high)])
    return np.isin(names, seeds) & (size[names] >= least) & (names > 0)


@calm
@given(fields, st.integers(1, 30), st.integers(1, 30), st.sampled_from([0, 3, 10]))
def test_hysteresis_over_strips_is_that_of_one_piece(probs, rows, cols, least):
    runs = row_runs(Held(probs), .8, .4, least, strip_rows=rows, chunk_cols=cols)
    assert np.array_equal(runs.mask(), hysteresis(probs, .8, .4, least))
    assert runs.count_px == runs.mask().sum() and runs.data_px == (~np.isnan(probs)).sum()


@calm
@given(fields, st.data())
def test_a_window_of_runs_is_a_window_of_the_mask(probs, data):
    runs, (rows, cols) = row_runs(Held(probs), .6), probs.shape
    row, col = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    height, width = data.draw(st.integers(1, rows - row)), data.draw(st.integers(1, cols - col))
    with np.errstate(invalid="ignore"): whole = probs >= np.float32(.6)
    assert np.array_equal(runs.mask((row, col, height, width)), whole[row:row + height, col:col + width])


def test_a_faint_road_counts_when_it_is_sure_far_away_in_another_part(tmp_path):
    probs = np.zeros((300, 900))
    probs[100:106] = .4
    probs[100:106, 880:] = .9
    probs[200:206, :800] = .4
    found = map_roads(write(tmp_path, probs), .8, low=.3, part_px=128, halo_px=32, **PLAIN)
    assert found.graph.n_parts == 1 and found.graph.length_m == pytest.approx(900, abs=1)
    assert len(map_roads(write(tmp_path, probs), .8, **PLAIN).lines) == 1
    assert map_roads(write(tmp_path, probs), .8, **PLAIN).graph.length_m == pytest.approx(20, abs=1)


def test_small_pieces_go_by_their_ground(tmp_path):
    probs = np.zeros((200, 200))
    probs[20:26, 20:60] = probs[100:106, 20:180] = 1        # 240 and 960 pixels; of half a metre: 60 and 240 m2
    path = write(tmp_path, probs, gsd=.5)
    rules = PLAIN | dict(min_area_m2=100)
    assert (len(map_roads(path, .5, **PLAIN)), len(map_roads(path, .5, **rules))) == (2, 1)


# ---- parts

@calm
@given(st.integers(1, 300), st.integers(1, 300), st.integers(20, 300))
def test_every_place_has_one_core(rows, cols, side):
    times = np.zeros((rows, cols), np.int64)
    for row, col, height, width in cores((rows, cols), side): times[row:row + height, col:col + width] += 1
    assert (times == 1).all()


def twice(graph):
    "Whether two roads lie on each other for a way: cut at borders, their equal pieces are one road."
    lines = shapely.linestrings(graph.nodes[graph.edges]) if len(graph) else np.zeros(0, object)
    a, b = np.triu_indices(len(lines), 1)
    return bool((shapely.length(shapely.intersection(shapely.buffer(lines[a], 1e-4), lines[b])) > .1).any())


@calm
@given(st.integers(0, 10**6), st.integers(13, 90), st.integers(0, 15))
@example(104, 13, 13)
@example(1865, 89, 15)
def test_any_graph_comes_back_from_its_parts(seed, side, nodes):
    "Whole numbers put nodes and edges on borders and corners, and crossings of edges have no node."
    dice = np.random.default_rng(seed)
    at = np.unique(dice.integers(0, 121, (nodes + 2, 2)) * (1 if seed % 2 else .917), axis=0)
    pairs = dice.integers(0, len(at), (nodes + 1, 2))
    graph = RoadGraph(at, pairs).tidy()
    back = joined([graph] * len(cores((121, 121), side)), cores((121, 121), side), (121, 121))
    if twice(graph):
        lines, again = (shapely.union_all(shapely.linestrings(g.nodes[g.edges])) for g in (graph, back))
        assert shapely.hausdorff_distance(lines, again, densify=.01) < 1e-3
        return
    assert back.length == pytest.approx(graph.length, abs=1e-6)
    assert back.n_parts <= graph.n_parts
    if len(graph): assert apart(graph, back).max() < 1e-6


def test_a_road_along_a_border_is_there_once():
    line = RoadGraph([(10, 50), (90, 50), (50, 10), (50, 90)], [(0, 1), (2, 3)])
    parts = cores((100, 100), 50)
    assert joined([line] * 4, parts, (100, 100)).length == pytest.approx(160)
    alone = RoadGraph([(10, 50), (90, 50)], [(0, 1)])
    assert joined([alone] * 4, parts, (100, 100)) == alone


def test_ends_that_do_not_quite_meet_become_one_and_others_stay():
    left, right = RoadGraph([(10, 10), (60, 10)], [(0, 1)]), RoadGraph([(40, 11.5), (100, 11.5)], [(0, 1)])
    parts = cores((50, 100), 50)
    near = joined([left, right], parts, (50, 100), snap_px=2)
    assert near.n_parts == 1 and near.nodes[near.degrees == 2].tolist() == [[50, 10.75]]
    assert joined([left, right], parts, (50, 100), snap_px=1).n_parts == 2


def test_each_end_has_one_partner():
    left = RoadGraph([(0, 10), (60, 10), (0, 12), (60, 12)], [(0, 1), (2, 3)])
    right = RoadGraph([(40, 10.9), (100, 10.9), (40, 12.9), (100, 12.9)], [(0, 1), (2, 3)])
    both = joined([left, right], cores((50, 100), 50), (50, 100), snap_px=2)
    assert shape_of(both) == (2, 0, 0, 4)


def test_a_graph_on_the_map_is_no_part():
    on_map = RoadGraph([(0, 0), (1, 1)], [(0, 1)], UTM)
    with pytest.raises(DataError, match="pixels of the scene"): join_parts(lambda core: on_map, (10, 10))


def _grid_of(core): return RoadGraph([(0, 20), (90, 20), (45, 0), (45, 70)], [(0, 1), (2, 3)])


def test_several_processes_give_the_same():
    one, two = (join_parts(_grid_of, (70, 90), 16, workers=n, progress=False) for n in (1, 2))
    assert one == two and one.length == 160


# ---- roads of parts are the roads of one piece

@pytest.mark.parametrize("seed", range(12))
def test_drawn_networks_in_parts_and_in_one_piece(seed, tmp_path):
    truth, width, side = network(seed), 3 + seed % 10, (128, 160, 230)[seed % 3]
    path = write(tmp_path, drawn(truth, width, (600, 600)))
    one, parts = map_roads(path, .5, **PLAIN), map_roads(path, .5, part_px=side, halo_px=32, **PLAIN)
    assert shape_of(one.graph) == shape_of(parts.graph)
    assert shape_of(parts.graph)[:2] == (truth.n_parts, loops(truth))
    assert parts.graph.length_m == pytest.approx(one.graph.length_m, rel=2e-3)
    assert apart(one.pixels, parts.pixels).max() < 3
    assert topo(one.graph, parts.graph, match_m=5).f1 > .99
    assert one.lines.length_m.sum() == pytest.approx(truth.length, rel=.02)


@pytest.mark.parametrize("name", ["10078735_15.png", "10978945_15.png", "15628870_15.png"])
def test_real_masks_in_parts_and_in_one_piece(name, tmp_path):
    path = write(tmp_path, real_mask(name))
    one, parts = map_roads(path), map_roads(path, part_px=512, halo_px=128)
    assert same(one.pixels, parts.pixels)
    assert np.allclose(one.lines.length_m, parts.lines.length_m) and np.allclose(one.lines.width_m, parts.lines.width_m)
    assert topo(one.graph, parts.graph, match_m=5).f1 > .99


def test_one_piece_is_the_skeleton_graph_of_the_mask(tmp_path):
    mask = real_mask("10078735_15.png", 700)
    one = skeleton_graph(mask, gsd_m=1, spur_m=10, part_m=30, gap_m=20)
    found = map_roads(write(tmp_path, mask), min_area_m2=0, min_length_m=30, prune_m=10, gap_m=20)
    assert shape_of(one) == shape_of(found.graph)
    assert found.graph.length_m == pytest.approx(one.length, rel=1e-3)
    assert apart(one, found.pixels).max() < 2


@pytest.mark.parametrize("smooth, halo", [(2, 32), (6, 64)])
def test_noise_in_parts_and_in_one_piece(smooth, halo):
    noise = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=(700, 640)), smooth)
    runs = row_runs(Held(noise > noise.std() * .7), .5)
    one = join_parts(Skeleton(runs, 64, 4096), runs.shape, 4096)
    parts = join_parts(Skeleton(runs, halo, 4096), runs.shape, 256, progress=False)
    assert shape_of(one) == shape_of(parts) and apart(one, parts).max() < 1.5


def test_a_road_wider_than_the_halo_looks_farther(tmp_path):
    mask = np.zeros((700, 900), bool)
    mask[300:370] = mask[:, 420:480] = True
    for side in (256, 300):
        found = map_roads(write(tmp_path, mask), .5, part_px=side, halo_px=32, **PLAIN)
        assert shape_of(found.graph) == (1, 0, 1, 4)
        assert found.graph.length_m == pytest.approx(1600, abs=2)


def test_rings_and_roundabouts_over_borders_stay_rings(tmp_path):
    y, x = np.mgrid[:512, :512] - 255.5
    mask = np.abs(np.hypot(x, y) - 150) < 3
    found = map_roads(write(tmp_path, mask), .5, part_px=256, halo_px=64)
    assert shape_of(found.graph) == (1, 1, 0, 0) and len(found.lines) == 1
    assert found.lines.length_m[0] == pytest.approx(2 * np.pi * 150, rel=.02)


def test_processes_and_part_sizes_make_no_difference(tmp_path):
    path = write(tmp_path, drawn(network(5), 6, (600, 600)))
    one, two = (map_roads(path, .5, part_px=256, halo_px=64, workers=n) for n in (1, 2))
    assert one.graph == two.graph and one.lines.equals(two.lines)


def test_memory_is_that_of_a_part():
    held = Held(np.zeros((3000, 500)))
    row_runs(held, .5, strip_rows=200, chunk_cols=300)
    assert held.most <= 200 * 300
    wide = Held(np.zeros((600, 9000)))
    row_runs(wide, .5)
    assert wide.most <= 512 * 8192


# ---- what is measured

def test_lines_have_length_width_probability_and_component(tmp_path):
    probs = np.zeros((300, 400))
    probs[50:56], probs[100:110, :200] = .9, .7
    found = map_roads(write(tmp_path, probs, gsd=.5), .5, gap_m=0)
    lines = found.lines.sort_values("length_m", ascending=False)
    assert lines.length_m.tolist() == pytest.approx([200, 100], abs=1)
    assert lines.width_m.tolist() == pytest.approx([3, 5], abs=.15)
    assert lines.mean_prob.tolist() == pytest.approx([.9, .7], abs=1e-6)
    assert lines.component.tolist() == [0, 1]
    assert lines.crs == UTM and lines.geometry.length.to_numpy() == pytest.approx(lines.length_m.to_numpy())


def test_arrays_of_edges_agree_with_the_lines(tmp_path):
    truth = network(2)
    found = map_roads(write(tmp_path, drawn(truth, 7, (600, 600)) * .8, gsd=.5), .5, part_px=256, halo_px=64, gap_m=0)
    m = len(found.graph)
    assert all(len(a) == m for a in (found.edge_line, found.edge_length_m, found.edge_width_m, found.edge_prob))
    total = np.bincount(found.edge_line, found.edge_length_m, len(found.lines))
    assert np.allclose(total, found.lines.length_m) and np.allclose(found.edge_length_m, found.graph.lengths_m)
    assert np.allclose(found.edge_prob, .8, atol=.05)
    plain = road_widths(found.pixels, drawn(truth, 7, (600, 600)))
    assert np.allclose(plain, found.lines.width_m.to_numpy()[found.edge_line], atol=.07)


def test_a_joined_gap_is_in_the_line_and_in_its_probability(tmp_path):
    probs = np.zeros((100, 300))
    probs[50:56] = .9
    probs[:, 140:152] = 0
    path = write(tmp_path, probs)
    assert len(map_roads(path, .5, gap_m=0)) == 2
    found = map_roads(path, .5, gap_m=20)
    assert len(found) == 1 and found.lines.mean_prob[0] == pytest.approx(.9 * 288 / 300, abs=.01)
    assert found.lines.width_m[0] == pytest.approx(6, abs=.2)


def test_degrees_measure_as_metres_do(tmp_path):
    "Pixels of 2e-5 degrees at 60 degrees north: 2.23 m high, 1.12 m wide."
    mask = np.zeros((300, 300), bool)
    mask[100:105], mask[:, 200:209] = True, True
    path = write(tmp_path, mask, gsd=2e-5, crs="EPSG:4326", at=(10, 60))
    found = map_roads(path, .5, part_px=128, halo_px=32, min_length_m=0)
    east, north = 2e-5 * 55_800, 2e-5 * 111_412
    assert found.gsd_m == pytest.approx(np.sqrt(east * north), rel=.01)
    assert found.lines.length_m.sum() == pytest.approx(300 * (east + north), rel=.02)
    flat = np.array([np.ptp(g.xy[0]) > np.ptp(g.xy[1]) for g in found.lines.geometry])
    assert found.lines.width_m[flat].to_numpy() == pytest.approx(5 * north, rel=.05)
    assert found.lines.width_m[~flat].to_numpy() == pytest.approx(9 * east, rel=.05)
    assert found.lines.crs == "EPSG:4326" and found.graph.space == "map"
    most = map_roads(path, .5, min_length_m=300 * (east + north) * 1.1)
    assert not len(most)


def test_web_mercator_is_measured_on_the_ground(tmp_path):
    mask = np.zeros((100, 400), bool)
    mask[50:56] = True
    found = map_roads(write(tmp_path, mask, crs="EPSG:3857", at=(1_000_000, 8_399_738)), .5)      # 60 degrees north
    assert found.lines.length_m.sum() == pytest.approx(200, rel=.02)
    assert found.lines.width_m[0] == pytest.approx(3, rel=.05)


def test_the_graph_is_ready_to_be_scored_and_lies_on_its_map(tmp_path):
    truth, place = network(1), from_origin(300000, 4600000, .5, .5)
    found = map_roads(write(tmp_path, drawn(truth, 6, (600, 600)), gsd=.5), .5, part_px=256, halo_px=64)
    placed = RoadGraph(truth.nodes, truth.edges, UTM, place).to_map()
    assert topo(placed, found.graph).f1 > .97 and apls(placed, found.graph).apls > .95
    assert apart(found.pixels, truth).max() < 10 and found.graph.space == "map"


def test_no_data_is_no_road(tmp_path):
    probs = np.zeros((60, 300), np.float32)
    probs[30:36] = .9
    probs[:, 100:200] = np.nan
    found = map_roads(write(tmp_path, probs), .5, gap_m=0)
    assert found.graph.n_parts == 2 and found.lines.mean_prob.tolist() == pytest.approx([.9, .9])


def test_bytes_and_the_threshold_of_the_file(tmp_path):
    path = tmp_path / "bytes.tif"
    with rasterio.open(path, "w", driver="GTiff", height=80, width=200, count=1, dtype="uint8", nodata=255, crs=UTM,
                       transform=from_origin(0, 80, 1, 1)) as file:
        stored = np.zeros((80, 200), np.uint8)
        stored[20:26], stored[60:66] = 200, 120
        file.write(stored, 1)
        file.scales = [1 / 254]
        file.update_tags(AERIAL_THRESHOLD="0.4")
    assert (map_roads(path).threshold, len(map_roads(path)), len(map_roads(path, .6))) == (.4, 2, 1)
    assert map_roads(open_map(path, .6)).lines.mean_prob.tolist() == pytest.approx([200 / 254], abs=1e-6)


# ---- bad input

def test_no_roads_are_an_empty_graph_in_its_place(tmp_path, caplog):
    with caplog.at_level(logging.WARNING): found = map_roads(write(tmp_path, np.full((50, 60), .1)), .5)
    assert (len(found), len(found.graph.nodes), found.graph.crs, found.lines.crs) == (0, 0, UTM, UTM)
    assert {"length_m", "width_m", "mean_prob", "component"} < set(found.lines.columns)
    assert "no piece of road reaches the threshold of 0.5" in caplog.text and "0.00 km" in found._repr_html_()
    assert "scale-bar" not in found._repr_html_()


@pytest.mark.parametrize("place", [True, False], ids=["on the ground", "bare pixels"])
def test_the_drawing_has_a_scale(tmp_path, place):
    probs = np.zeros((300, 300)); probs[145:155] = 1; probs[:, 145:155] = 1   # 300 m on 210 pixels
    path = write(tmp_path, probs) if place else write_raster(tmp_path / "bare.tif", (probs * 255).astype("uint8"))
    html = map_roads(path, .5, gsd_m=None if place else 1.)._repr_html_()
    said = re.search(r'class="scale-bar".*?v4h([\d.]+)v-4.*?>(\d+) m</text>', html)
    metres = 1 if not place else open_map(path, .5).gsd_m
    assert float(said[1]) == pytest.approx(float(said[2]) * 210 / (300 * metres), rel=.03)


def test_a_map_without_data_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING): found = map_roads(write(tmp_path, np.full((50, 60), np.nan)), .5)
    assert len(found) == 0 and "no data at all" in caplog.text


def test_pixels_without_a_place_need_their_size(tmp_path):
    mask = np.zeros((100, 300))
    mask[50:56] = 1
    path = write(tmp_path, mask, crs=None)
    with pytest.raises(DataError, match="gsd_m="): map_roads(path, .5)
    with pytest.raises(DataError, match="gsd_m="): map_roads(path, .5, gsd_m=-1)
    found = map_roads(path, .5, gsd_m=.5)
    assert found.lines.length_m[0] == pytest.approx(150, abs=1) and found.lines.width_m[0] == pytest.approx(3, abs=.1)
    assert found.graph.space == "pixel" and found.lines.crs is None and found.pixels is found.graph


@pytest.mark.parametrize("rules, message", [
    (dict(gap_m=-1), "gap_m is 0 or more"), (dict(prune_m=np.nan), "prune_m is 0 or more"),
    (dict(part_px=300), "part_px=300 is too small for halo_px=128"), (dict(part_px=512, halo_px=200), "part_px=800"),
    (dict(halo_px=4), "32 pixels"), (dict(low=.7), "low <= threshold"), (dict(low=0), "low <= threshold"),
    (dict(gaps=3), "no rule gaps; it has low"), (dict(threshold=1.5), "0..1"), (dict(threshold=0), "0..1"),
    (dict(band=2), "no band 2"),
])
def test_what_cannot_be_is_refused(rules, message, tmp_path):
    rules = dict(threshold=.5) | rules
    with pytest.raises(DataError, match=message): map_roads(write(tmp_path, np.full((40, 40), .2)), **rules)


def test_rules_can_be_kept_and_changed(tmp_path):
    rules = RoadRules(gap_m=0, min_length_m=0)
    found = map_roads(write(tmp_path, drawn(network(0), 5, (600, 600))), .5, rules=rules, prune_m=3)
    assert (found.rules.gap_m, found.rules.prune_m) == (0, 3)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere.tif"): map_roads(tmp_path / "nowhere.tif", .5)


def test_a_halo_ends_with_the_scene():
    assert widened((0, 0, 10, 10), 5, (12, 30)) == (0, 0, 12, 15)
    assert widened((6, 20, 6, 10), 5, (12, 30)) == (1, 15, 11, 15)
