"""Shortest ways between places, and APLS by both definitions."""
import json
import subprocess
import sys
from pathlib import Path

import geopandas as gpd
import networkx as nx
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from aerial_nb.roads.apls import SpaceNetApls, apls, small_tile
from aerial_nb.roads.files import read_graph
from aerial_nb.roads.graph import RoadGraph
from aerial_nb.roads.travel import Places, Ways, on_one_plane
from oracles import apls as plain

DATA = Path(__file__).parents[1] / "../shared/data/roadgraphs"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no road graphs beside the project")
EMPTY = RoadGraph(np.zeros((0, 2)), np.zeros((0, 2), int))


def town(seed: int, n: int = 14, side: float = 300.) -> RoadGraph:
    "A random network: points joined to near ones; parts, ends, junctions, rings."
    dice = np.random.default_rng(seed)
    xy = dice.uniform(0, side, (n, 2)).round(2)
    far = np.hypot(*(xy[:, None] - xy).transpose(2, 0, 1))
    near = np.argsort(far, 1)[:, 1:3]
    edges = [(i, j) for i in range(n) for j in near[i] if dice.random() < .8]
    return RoadGraph(xy, edges).tidy() if edges else town(seed + 1, n, side)


def moved(graph: RoadGraph, seed: int, by: float = 2.) -> RoadGraph:
    dice = np.random.default_rng(seed + 1000)
    keep = dice.random(len(graph)) < .85
    return RoadGraph(graph.nodes + dice.normal(0, by, graph.nodes.shape).clip(-3 * by, 3 * by), graph.edges[keep]).tidy()


# ---- shortest ways

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_distances_are_those_of_networkx(seed):
    graph = town(seed)
    table = Ways(graph).distances(Ways(graph).at_nodes(np.arange(len(graph.nodes))), Ways(graph).at_nodes(np.arange(len(graph.nodes))))
    lengths = dict(nx.all_pairs_dijkstra_path_length(graph.to_networkx(), weight="length"))
    for u in range(len(graph.nodes)):
        for v in range(len(graph.nodes)): assert table[u, v] == pytest.approx(lengths[u].get(v, np.inf), rel=1e-9, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_a_point_on_a_road_is_its_own_place(seed):
    ways = Ways(town(seed))
    dice = np.random.default_rng(seed)
    chain = dice.integers(0, len(ways), 20)
    places = Places(chain, dice.random(20) * ways.size[chain])
    found = ways.nearest(ways.points(places), 1e-3)
    assert np.allclose(ways.points(found), ways.points(places), atol=1e-6)


def test_loops_rings_and_parallel_roads():
    ring = Ways(RoadGraph([(0, 0), (10, 0), (10, 10), (0, 10)], [(0, 1), (1, 2), (2, 3), (3, 0)]))
    assert ring.size.tolist() == [40]
    some = ring.at_nodes(np.arange(4))
    assert ring.distances(some, some)[0].tolist() == [0, 10, 20, 10]
    eye = Ways(RoadGraph([(0, 0), (5, 4), (5, -1), (10, 0), (20, 0), (-9, 0)], [(0, 1), (1, 3), (0, 2), (2, 3), (3, 4), (0, 5)]))
    ends = eye.at_nodes(np.array([5, 4]))
    assert eye.distances(ends, ends)[0, 1] == pytest.approx(19 + 2 * np.hypot(5, 1))


def test_networks_in_degrees_and_metres_meet_on_one_plane():
    lines = gpd.GeoSeries([shapely.LineString([(11.0, 48.0), (11.01, 48.0)])], crs="EPSG:4326")
    a, b, bare = on_one_plane(lines, lines.to_crs("EPSG:25832"))
    assert not bare and np.abs(a.nodes - b.nodes).max() < .01 and a.length == pytest.approx(745.9, abs=.5)


# ---- APLS against the plain definitions

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_the_original_definition_is_the_plain_one(seed):
    a = town(seed); b = moved(a, seed)
    if not len(b): return
    ours = apls(a, b, "spacenet", gsd_m=1, rules="corrected", min_part_m=0, max_nodes=0)
    for one, x, y in ((ours.truth_to_proposal, a, b), (ours.proposal_to_truth, b, a)):
        # junction-free rings have a control point of ours, so only networks without them are compared
        if any(all(x.degrees[n] == 2 for n in part) for part in nx.connected_components(x.to_networkx())): continue
        want = plain.spacenet_one_way((x.nodes, x.edges), (y.nodes, y.edges), 4.)
        assert np.isnan(want) and np.isnan(one) or one == pytest.approx(want, abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["corrected", "published"]))
def test_the_papers_definition_is_the_plain_one(seed, rules):
    a = town(seed, n=9, side=200); b = moved(a, seed)
    if not len(b): return
    # the published numbers of control points hang on the other network's node numbers: cover nothing to compare
    hops = 4 if rules == "corrected" else 0
    ours = apls(a, b, gsd_m=1, rules=rules, region_m=0, margin_m=0, chain_hops=10_000, cover_hops=hops, min_path_m=30, hop_m=2.)
    for one, x, y in ((ours.truth_to_proposal, a, b), (ours.proposal_to_truth, b, a)):
        if any(all(x.degrees[n] == 2 for n in part) for part in nx.connected_components(x.to_networkx())): continue
        if rules == "published" and np.min(np.hypot(*(x.nodes[:, None] - x.nodes).T) + 9 * np.eye(len(x.nodes))) < 3: continue
        want = plain.sat2graph_one_way((x.nodes, x.edges), (y.nodes, y.edges), cover_hops=hops, shortest=30, always_lost=rules == "published")
        if np.isnan(want): assert np.isnan(one)
        else: assert one == pytest.approx(want, abs=1e-6 if rules == "corrected" else .03)  # whole centimetres, raw degrees


# ---- published numbers

@needs_data
def test_sat2graph_example_is_inside_the_published_band():
    truth, proposal = (read_graph(DATA / "sat2graph_examples" / name) for name in ("gt.p", "prop.p"))
    ours = apls(truth, proposal, gsd_m=1)
    assert 0.8128 <= ours.apls <= 0.8162
    assert ours.truth_to_proposal == pytest.approx(.8512, abs=.005) and ours.proposal_to_truth == pytest.approx(.7778, abs=.005)
    back = apls(proposal, truth, gsd_m=1)
    assert (back.apls, back.truth_to_proposal) == (ours.apls, ours.proposal_to_truth)
    assert apls(truth, truth, gsd_m=1).apls == pytest.approx(1, abs=1e-5)
    assert apls(truth, truth, gsd_m=1, rules="corrected").apls == 1


@needs_data
@pytest.mark.parametrize("name, want", [("img99", .734504), ("img990", .438744), ("img991", .620218), ("img995", .614065), ("img997", .562576)])
def test_the_original_programs_scores_come_out(name, want):
    folder, file = DATA / "apls/vegas_osm_vs_spacenet", f"AOI_2_Vegas_{name}.geojson"
    assert apls(folder / "gt_spacenet" / file, folder / "prop_osm" / file, "spacenet").apls == pytest.approx(want, abs=5e-4)


@needs_data
@pytest.mark.parametrize("spacing, want", [(50, .6305515), (200, .4975258)])
def test_the_toy_case_and_its_spacing(spacing, want):
    folder = DATA / "apls/test0"
    assert apls(folder / "gt.geojson", folder / "prop.geojson", "spacenet", spacing_m=spacing).apls == pytest.approx(want, abs=2e-3)


def test_a_road_drawn_twice_disappears_as_published(tmp_path):
    lines = [[(0, 0), (100, 0)], [(100, 0), (200, 0)], [(100, 0), (200, 0), (200, 100)], [(100, 0), (100, 90)], [(200, 0), (300, 0)]]
    file = tmp_path / "roads.gpkg"
    gpd.GeoSeries([shapely.LineString(np.array(c) + (500_000, 5_000_000)) for c in lines], crs="EPSG:32632").to_frame("geometry").to_file(file)
    once = read_graph(file)
    assert apls(once, once, "spacenet").apls == 1
    assert apls(file, once, "spacenet", rules="corrected").apls == 1
    assert apls(file, once, "spacenet").apls < 1


# ---- edges of the definition

def test_empty_networks():
    a = town(3)
    for variant in ("spacenet", "sat2graph"):
        assert apls(a, EMPTY, variant, gsd_m=1).apls == 0 and apls(EMPTY, a, variant, gsd_m=1).apls == 0
        assert np.isnan(apls(EMPTY, EMPTY, variant, gsd_m=1).apls)


@pytest.mark.parametrize("variant", ["spacenet", "sat2graph"])
def test_rings_duplicates_and_parts(variant):
    ring = RoadGraph([(0, 0), (80, 0), (80, 80), (0, 80)], [(0, 1), (1, 2), (2, 3), (3, 0)])
    options = dict(gsd_m=1, rules="corrected") | (dict(margin_m=0, region_m=0, min_path_m=10) if variant == "sat2graph" else dict(spacing_m=50, curved=0))
    assert apls(ring, ring, variant, **options).apls == 1
    twice = RoadGraph(ring.nodes, np.concatenate([ring.edges, ring.edges[:, ::-1]]))
    assert apls(ring, twice, variant, **options).apls == 1
    parts = RoadGraph(np.concatenate([ring.nodes, ring.nodes + 500]), np.concatenate([ring.edges, ring.edges + 4]))
    assert apls(parts, ring, variant, **options).truth_to_proposal < 1 and apls(parts, parts, variant, **options).apls == pytest.approx(1)


def test_what_cannot_be_compared_is_refused():
    a = town(1)
    with pytest.raises(ValueError, match="give gsd_m"): apls(a, a)
    with pytest.raises(ValueError, match="on the map"): apls(a, RoadGraph(a.nodes, a.edges, "EPSG:32632"), gsd_m=1)
    with pytest.raises(ValueError, match="lines without a CRS"): apls(gpd.GeoSeries([shapely.LineString([(0, 0), (1, 1)])]), a)
    with pytest.raises(ValueError, match="no parameter snap"): apls(a, a, gsd_m=1, snap=3)
    with pytest.raises(ValueError, match="snap_m must be a positive"): apls(a, a, gsd_m=1, snap_m=-3)
    with pytest.raises(ValueError, match="those of 'spacenet'"): apls(a, a, gsd_m=1, parameters=SpaceNetApls())
    with pytest.raises(ValueError, match="not finite"): RoadGraph([(0, np.nan)], np.zeros((0, 2), int))


def test_small_tiles_have_their_own_numbers():
    used = apls(town(2), town(2), gsd_m=1).parameters
    assert used["chain_hops"] == 22 and used["margin_m"] == 30 and used["region_m"] == small_tile().region_m


def test_many_control_points_are_sampled_and_said(caplog):
    a = town(5, n=60, side=900)
    full = apls(a, moved(a, 5), "spacenet", gsd_m=1)
    some = apls(a, moved(a, 5), "spacenet", gsd_m=1, most_sources=10)
    assert "routes start from 10" in caplog.text and abs(full.apls - some.apls) < .15


@pytest.mark.slow
def test_a_hundred_thousand_edges():
    side = 224
    xy = np.stack(np.meshgrid(np.arange(side) * 50., np.arange(side) * 50.), -1).reshape(-1, 2)
    node = np.arange(side * side).reshape(side, side)
    grid = RoadGraph(xy, np.concatenate([np.stack([node[:, :-1], node[:, 1:]], -1).reshape(-1, 2), np.stack([node[:-1], node[1:]], -1).reshape(-1, 2)]))
    assert len(grid) > 99_000
    for variant in ("spacenet", "sat2graph"):
        options = dict(region_m=0) if variant == "sat2graph" else {}
        assert apls(grid, grid, variant, gsd_m=1, most_sources=50, rules="corrected", **options).apls == 1


# ---- command line

def run(*arguments):
    return subprocess.run([Path(sys.executable).parent / "aerial_apls", *map(str, arguments)], capture_output=True, text=True)


def test_the_command_prints_one_json_object(tmp_path):
    lines = gpd.GeoSeries([shapely.LineString(np.array(c) + (500_000, 5_000_000)) for c in ([(0, 0), (400, 0)], [(200, 0), (200, 300)])], crs="EPSG:32632")
    lines.to_frame("geometry").to_file(tmp_path / "truth.gpkg"); lines.to_crs("EPSG:4326").to_frame("geometry").to_file(tmp_path / "prop.geojson")
    found = run(tmp_path / "truth.gpkg", tmp_path / "prop.geojson", "--variant", "spacenet", "--parameters", "spacing_m=50")
    answer = json.loads(found.stdout)
    assert found.returncode == 0 and answer["apls"] == pytest.approx(1, abs=1e-3)
    assert answer["spacing_m"] == 50 and {"truth_to_proposal", "proposal_to_truth", "snap_m", "variant", "rules"} <= set(answer)


def test_the_command_says_what_is_wrong(tmp_path):
    (tmp_path / "bad.p").write_bytes(b"cos\nsystem\n(S'echo hi'\ntR.")
    for arguments, words in (((tmp_path / "none.geojson",) * 2, "no such file"), ((tmp_path / "bad.p",) * 2, "nothing was run")):
        found = run(*arguments)
        assert found.returncode == 2 and words in found.stderr and "Traceback" not in found.stderr and not found.stdout
