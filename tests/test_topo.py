"TOPO against its plain definition, the published numbers, and bad input; walks on networks."
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import geopandas as gpd
import matplotlib
import numpy as np
import pytest
import shapely
from affine import Affine
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles.topo import Frame, inside, topo_plain
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra

from aerial_nb.data.raster import DataError
from aerial_nb.roads.files import read_graph, write_graph
from aerial_nb.roads.graph import RoadGraph
from aerial_nb.roads.marbles import DEGREE_M, TopoParameters, lay_starts, sides
from aerial_nb.roads.topo import aerial_topo, topo, topo_many, topo_means
from aerial_nb.roads.walks import chains, clean, network, scratch, spread, walk_shortest

matplotlib.use("Agg")
calm = settings(deadline=None, max_examples=25)
EXAMPLES = Path(__file__).parents[1] / "../shared/data/roadgraphs/sat2graph_examples"
real = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the published example graphs are not on this machine")
SMALL = dict(reach_m=90., interval_m=7.3, match_m=9.1, start_every_m=43., thin_look_m=31.)
EMPTY = RoadGraph(np.zeros((0, 2)), np.zeros((0, 2), int))
CORNER = Affine(1, 0, 500_000, 0, -1, 5_000_000)


def jitter(nodes, seed, size):
    return np.asarray(nodes, float).reshape(-1, 2) + np.random.default_rng(seed).normal(0, size, (len(nodes), 2))


@st.composite
def roads(draw, most=9):
    "Small networks: nodes on a coarse grid moved off it, any edges between them, often a ring, often in parts."
    spots = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=most, unique=True))
    pair = st.tuples(st.integers(0, len(spots) - 1), st.integers(0, len(spots) - 1))
    edges = [(0, 1)] + draw(st.lists(pair, max_size=12))
    if draw(st.booleans()): edges += [(i, (i + 1) % len(spots)) for i in range(len(spots))]
    return RoadGraph(jitter(np.array(spots) * 37 + 20, draw(st.integers(0, 99)), 4), np.array(edges))


@st.composite
def pairs(draw):
    "A network and what was drawn of it: moved a little, edges lost, others invented; or another network altogether."
    truth = draw(roads())
    if draw(st.integers(0, 4)) == 0: return truth, draw(roads())
    keep = np.array(draw(st.lists(st.booleans(), min_size=len(truth), max_size=len(truth))))
    keep[0] = True
    more = draw(roads()).edges % len(truth.nodes)
    edges = np.concatenate([truth.edges[keep], more[:draw(st.integers(0, 2))]])
    return truth, RoadGraph(jitter(truth.nodes, 5, draw(st.sampled_from([0., 1., 3.]))), edges)


def plain(truth, proposal, gsd_m, p):
    "The plain definition on the same two networks."
    a, b, _ = sides(truth, proposal, gsd_m, None, p.rules == "published")
    unit, names = a.unit_m, dict(start_every="start_every_m", pair="pair_m", interval="interval_m", match="match_m",
                                 reach="reach_m", thin="thin_m")
    numbers = {k: getattr(p, v) / unit for k, v in names.items()}
    numbers |= dict(keep=p.thin_keep, pair_cos=math.cos(math.radians(p.pair_deg)), match_cos=math.cos(math.radians(p.match_deg)))
    numbers["look"] = p.thin_look_m / unit
    def net(side):
        lead = [side.net.node[i:j].tolist() for i, j in zip(side.net.start[:-1], side.net.start[1:])]
        return dict(enumerate(map(tuple, side.net.at.tolist()))), dict(enumerate(lead))
    region = None
    if a.degrees:
        at = np.concatenate([a.net.at, b.net.at])
        region = (min(41, at[:, 0].min()) - 300 / DEGREE_M, -71 - 500 / DEGREE_M, 41 + 300 / DEGREE_M,
                  max(-71, at[:, 1].max()) + 500 / DEGREE_M, p.border)
    return topo_plain(net(a), net(b), Frame(a.degrees), numbers, p.rules == "published", region)


def agree(truth, proposal, gsd_m, **changes):
    p = TopoParameters(**(SMALL | changes))
    fast, slow = topo(truth, proposal, gsd_m=gsd_m, parameters=p), plain(truth, proposal, gsd_m, p)
    counts = {k: v for k, v in fast.to_dict().items() if k in ("starts", "paired", "kept")}
    assert counts == {k: slow[k] for k in counts}
    rows = fast.starts[fast.starts.paired]
    assert np.allclose(rows[["precision", "recall"]], [r[3:] for r in slow["rows"]] or np.zeros((0, 2)), atol=1e-12)
    if not slow["starts"]: return   # what has no start is told of below
    for name in ("precision", "mean_recall", "coverage", "overall_recall"):
        assert getattr(fast, name) == pytest.approx(slow[name], abs=1e-12)


@calm
@given(pairs())
def test_published_rules_are_the_plain_walk_in_pixels(pair): agree(*pair, 1.)


@calm
@given(pairs())
def test_published_rules_are_the_plain_walk_on_a_map(pair):
    agree(*(RoadGraph(g.nodes, g.edges, "EPSG:32633", CORNER).to_map() for g in pair), None)


@calm
@given(pairs(), st.sampled_from([.5, 1.]))
def test_corrected_rules_are_the_plain_definition(pair, gsd_m): agree(*pair, gsd_m, rules="corrected")


@pytest.mark.parametrize("rules", ["published", "corrected"])
def test_a_shorter_way_that_is_found_late(rules):
    "The way with few vertices is searched first and is the longer one: all beyond its end is walked again."
    nodes = [(20, 100), (90, 103), (126, 174), (102, 104), (114, 99), (126, 103), (138, 101), (150, 103), (165, 104), (210, 99), (212, 180)]
    edges = [(0, 1), (1, 2), (2, 7), (1, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8), (8, 9), (8, 10)]
    g = RoadGraph(nodes, edges)
    for moved_by in (0., 2.): agree(g, RoadGraph(jitter(nodes, 1, moved_by), edges), 1., reach_m=170., rules=rules)


@settings(deadline=None, max_examples=12)
@given(roads(), st.sampled_from(["published", "corrected"]))
def test_a_network_agrees_with_itself_whatever_the_order_of_its_file(g, rules):
    order = np.random.default_rng(3).permutation(len(g.nodes))
    rank = np.argsort(order)
    shuffled = RoadGraph(g.nodes[order], rank[g.edges][::-1, ::-1])
    found = topo(g, shuffled, gsd_m=1, rules=rules, **SMALL)
    assert math.isnan(found.f1) or found.precision == found.mean_recall == 1


@settings(deadline=None, max_examples=12)
@given(pairs(), st.randoms(use_true_random=False))
def test_order_of_nodes_and_repeated_edges_change_nothing(pair, random):
    def mixed(g):
        order = np.array(random.sample(range(len(g.nodes)), len(g.nodes)))
        edges = np.argsort(order)[g.edges]
        return RoadGraph(g.nodes[order], np.concatenate([edges, edges[:3, ::-1]]))
    a, b = (topo(t, q, gsd_m=1, **SMALL).to_dict() for t, q in (pair, map(mixed, pair)))
    assert a == b


@settings(deadline=None, max_examples=12)
@given(pairs())
def test_looser_matches_fill_no_fewer_holes(pair):
    tight, loose = (topo(*pair, gsd_m=1, **SMALL | dict(match_m=m)).starts for m in (5., 12.))
    assert (loose.marbles_matched >= tight.marbles_matched).all() and (loose.holes_filled >= tight.holes_filled).all()
    assert (loose.marbles == tight.marbles).all()


@real
def test_published_numbers():
    truth, proposal = (read_graph(EXAMPLES / name) for name in ("gt.p", "prop.p"))
    found, swapped = topo(truth, proposal, gsd_m=1), topo(proposal, truth, gsd_m=1)
    assert found.precision == pytest.approx(.873418576596832, abs=.0005)
    assert found.overall_recall == pytest.approx(.858118939200804, abs=.0005)
    assert found.mean_recall == pytest.approx(.926738, abs=.001) and found.coverage == pytest.approx(.925956, abs=.001)
    assert (swapped.precision, swapped.overall_recall) == pytest.approx((.9480, .7439), abs=.0005)
    itself = topo(truth, truth, gsd_m=1)
    assert itself.precision == itself.overall_recall == itself.f1 == 1


STREET = RoadGraph([[0, 0], [150, 10], [300, 0], [450, 20]], [[0, 1], [1, 2], [2, 3]])
RING = RoadGraph(jitter([[0, 0], [200, 0], [200, 150], [0, 150]], 0, 2), [[0, 1], [1, 2], [2, 3], [3, 0]])


def moved(g, dx, dy): return replace(g, nodes=g.nodes + (dx, dy))


def five(result): return [getattr(result, n) for n in ("precision", "mean_recall", "coverage", "overall_recall", "f1")]


@pytest.mark.parametrize("rules", ["published", "corrected"])
def test_empty_networks(rules):
    assert five(topo(EMPTY, EMPTY, gsd_m=1, rules=rules)) == [1] * 5
    for pair in ((STREET, EMPTY), (EMPTY, STREET)): assert five(topo(*pair, gsd_m=1, rules=rules)) == [0] * 5
    found = topo(STREET, EMPTY, gsd_m=1, rules=rules)
    assert len(found.starts) and not found.starts.paired.any() and "TOPO" in found._repr_html_()
    lines = gpd.GeoSeries([], crs="EPSG:4326")
    assert topo(lines, lines, rules=rules).f1 == 1


def test_nothing_in_common_scores_nothing():
    assert five(topo(STREET, moved(STREET, 0, 300), gsd_m=1)) == [0] * 5


def test_rings_start_under_the_corrected_rules_only(caplog):
    published = topo(RING, RING, gsd_m=1)
    assert len(published.starts) == 0 and all(map(math.isnan, five(published)))
    assert "no place to start" in caplog.text and published.to_dict()["f1"] is None
    corrected = topo(RING, RING, gsd_m=1, rules="corrected")
    assert len(corrected.starts) == int(RING.length / TopoParameters().start_every_m) and corrected.f1 == 1
    both = RoadGraph(np.concatenate([RING.nodes, STREET.nodes + (0, 400)]), np.concatenate([RING.edges, STREET.edges + 4]))
    without = topo(both, moved(STREET, 0, 400), gsd_m=1)
    assert without.f1 == 1      # published: a ring that is missed costs nothing
    assert topo(both, moved(STREET, 0, 400), gsd_m=1, rules="corrected").coverage < .5


def test_a_spur_has_no_start_and_an_edge_between_ends_has_two():
    def starts(g, **changes):
        a, b, _ = sides(g, g, 1., None, True)
        return len(lay_starts(a, b, TopoParameters(**changes)))
    assert starts(RoadGraph([[0, 0], [27, 0]], [[0, 1]])) == 0
    assert starts(RoadGraph([[0, 0], [50, 0]], [[0, 1]])) == 2
    assert starts(RoadGraph([[0, 0], [20, 1], [50, 0]], [[0, 1], [1, 2]])) == 1


def test_walks_stay_in_their_part():
    apart = RoadGraph(np.concatenate([STREET.nodes, STREET.nodes + (0, 60)]), np.concatenate([STREET.edges, STREET.edges + 4]))
    found = topo(apart, apart, gsd_m=1)
    alone = topo(STREET, STREET, gsd_m=1)
    assert found.f1 == 1 and found.starts.holes.tolist() == alone.starts.holes.tolist() * 2


def test_a_broken_road_costs_recall_and_an_invented_one_precision():
    fine = RoadGraph(np.stack([np.arange(0, 601, 20), np.full(31, 7.)], 1), np.stack([np.arange(30), np.arange(1, 31)], 1))
    broken = replace(fine, edges=np.delete(fine.edges, 15, axis=0))
    lost = topo(fine, broken, gsd_m=1)
    assert lost.precision == 1 and lost.overall_recall < .85
    more = RoadGraph(np.concatenate([fine.nodes, [[300, 200]]]), np.concatenate([fine.edges, [[15, 31]]]))
    invented = topo(fine, more, gsd_m=1)
    assert invented.precision < .9 and invented.mean_recall == 1
    assert invented.proposal_found[~np.isnan(invented.proposal_found)].min() == 0


def test_doubled_roads_cost_precision_under_the_corrected_rules_only():
    links = np.array([[0, 4], [1, 5], [2, 6], [3, 7]])
    double = RoadGraph(np.concatenate([STREET.nodes, STREET.nodes + (0, 3)]),
                       np.concatenate([STREET.edges, STREET.edges + 4, links]))
    assert topo(STREET, double, gsd_m=1).precision > .9 > .6 > topo(STREET, double, gsd_m=1, rules="corrected").precision


def test_any_crs_gives_the_same_metres():
    near = RoadGraph(jitter(STREET.nodes, 2, 4), STREET.edges)
    placed = [RoadGraph(g.nodes, g.edges, "EPSG:32633", CORNER) for g in (STREET, near)]
    utm, kinds = [g.to_map().to_geodataframe() for g in placed], ("EPSG:4326", "EPSG:3857", "EPSG:32632")
    want = topo(*utm, rules="corrected")
    assert len(want.starts) and want.parameters["crs"] == "EPSG:32633" and want.parameters["gsd_m"] is None
    for crs in kinds:
        found = topo(utm[0].to_crs(crs), placed[1], rules="corrected")
        assert five(found) == pytest.approx(five(want), abs=.005)
        assert found.starts.holes.tolist() == want.starts.holes.tolist()
        where = gpd.GeoSeries.from_xy(found.starts.x, found.starts.y, crs=crs).to_crs(32633)
        back = gpd.GeoSeries.from_xy(want.starts.x, want.starts.y, crs=32633)
        assert (np.sort(where.x) - np.sort(back.x) < .5).all()
    assert five(topo(STREET, near, gsd_m=1, rules="corrected")) == pytest.approx(five(want), abs=.005)
    half = [replace(g, nodes=g.nodes * 2) for g in (STREET, near)]
    assert five(topo(*half, gsd_m=.5)) == pytest.approx(five(topo(STREET, near, gsd_m=1)))


def test_bad_input_is_refused(caplog):
    lines = gpd.GeoSeries([shapely.LineString([(0, 0), (90, 0)])])
    with pytest.raises(ValueError, match="lines without a CRS"): topo(lines, lines)
    with pytest.raises(ValueError, match="truth is in bare pixels"): topo(STREET, lines.set_crs(32633), gsd_m=1)
    with pytest.raises(ValueError, match="gsd_m is for graphs in bare pixels"): topo(*[lines.set_crs(32633)] * 2, gsd_m=1)
    with pytest.raises(ValueError, match="gsd_m is metres per pixel"): topo(STREET, STREET, gsd_m=-1)
    with pytest.raises(ValueError, match="must be lines"): topo(*[gpd.GeoSeries([shapely.Point(0, 0).buffer(1)], crs=32633)] * 2)
    with pytest.raises(ValueError, match="no parameter matching"): topo(STREET, STREET, gsd_m=1, matching=3)
    with pytest.raises(ValueError, match="'published' or 'corrected'"): topo(STREET, STREET, gsd_m=1, rules="mine")
    with pytest.raises(ValueError, match="not finite"): RoadGraph([[0, 0], [math.nan, 1]], [[0, 1]])
    with pytest.raises(ValueError, match="leave the 2 nodes"): RoadGraph([[0, 0], [9, 1]], [[0, 2]])
    with pytest.raises(ValueError, match="joins a node to itself"): network(STREET.nodes, [[1, 1]])
    assert "1 m per pixel" not in caplog.text
    assert topo(STREET, STREET).parameters["gsd_m"] == 1 and "1 m per pixel" in caplog.text


def test_nodes_in_one_place_are_one_node():
    split = RoadGraph(np.concatenate([STREET.nodes, STREET.nodes[1:2]]), [[0, 1], [1, 4], [4, 2], [2, 3]])
    assert topo(split, STREET, gsd_m=1).f1 == 1 and len(topo(split, STREET, gsd_m=1).truth) == 3


def test_result_is_shown_drawn_and_written():
    found = topo(STREET, RoadGraph(STREET.nodes, STREET.edges[:2]), gsd_m=1)
    assert found.truth_found[-1] < .1 and found.truth_found[0] > .9
    assert f"{found.f1:.4f}" in found._repr_html_() and "reach_m 166.7" in found._repr_html_()
    ax = found.plot(starts=False)
    lines = {c.get_label(): len(c.get_paths()) for c in ax.collections if not c.get_label().startswith("_")}
    assert lines == {"found": 2, "missed": 1} and ax.yaxis_inverted()
    assert json.loads(json.dumps(found.to_dict()))["match_m"] == pytest.approx(11.1111)
    assert set(found.to_dict()) >= {f for f in TopoParameters.__dataclass_fields__} | {"gsd_m", "crs", "starts"}


def test_reach_follows_the_size_of_the_tile():
    tall = moved(STREET, 0, 1200)
    assert topo(STREET, STREET, gsd_m=1).parameters["reach_m"] == pytest.approx(166.6665)
    assert topo(STREET, tall, gsd_m=1).parameters["reach_m"] == pytest.approx(333.333)
    assert topo(STREET, STREET, gsd_m=1, reach_m=50).parameters["reach_m"] == 50


def test_many_pairs_in_parallel_keep_their_order():
    several = [(STREET, RoadGraph(jitter(STREET.nodes, i, 4), STREET.edges[:3 - i])) for i in range(3)]
    one, two = (topo_many(several, workers=w, gsd_m=1, match_m=9) for w in (1, 2))
    assert [r.to_dict() for r in one] == [r.to_dict() for r in two] and one[0].parameters["match_m"] == 9
    means = topo_means([*one, topo(RING, RING, gsd_m=1)])
    assert means["tiles"] == 3 and means["without_score"] == 1
    assert means["mean_of_f1"] == pytest.approx(np.mean([r.f1 for r in one]))
    for workers in (1, 2):
        with pytest.raises(ValueError, match="pair 2 of 2: .*no such file"):
            topo_many([several[0], ("nowhere.p", "nowhere.p")], workers=workers, gsd_m=1)


def command(capsys, *argv):
    "Exit code, standard output, standard error of the command line."
    old, sys.argv = sys.argv, ["aerial_topo", *map(str, argv)]
    try: aerial_topo(); code = 0
    except SystemExit as stop: code = stop.code
    finally: sys.argv = old
    return code, *capsys.readouterr()


def test_command_line_prints_one_object(tmp_path, capsys):
    table = RoadGraph(STREET.nodes, STREET.edges, "EPSG:32633", CORNER).to_map()
    for name in ("a.geojson", "a.gpkg"): write_graph(table, tmp_path / name)
    write_graph(STREET, tmp_path / "a.p"); write_graph(STREET, tmp_path / "a.csv")
    code, out, _ = command(capsys, tmp_path / "a.geojson", tmp_path / "a.gpkg", "--rules", "corrected", "--match-m", "7")
    found = json.loads(out)
    assert code == 0 and found["f1"] == 1 and found["match_m"] == 7 and found["rules"] == "corrected"
    assert list(found)[:5] == ["precision", "mean_recall", "coverage", "overall_recall", "f1"]
    code, out, _ = command(capsys, tmp_path / "a.p", tmp_path / "a.csv", "--gsd_m", "1")
    assert code == 0 and json.loads(out)["f1"] > .99 and out.count("\n") == 1
    code, out, _ = command(capsys, tmp_path / "a.p", tmp_path / "a.p")
    assert code == 0 and json.loads(out)["gsd_m"] == 1


def test_command_line_in_a_process_of_its_own(tmp_path):
    write_graph(STREET, tmp_path / "a.p")
    run = subprocess.run([Path(sys.executable).parent / "aerial_topo", tmp_path / "a.p", "nowhere.gpkg"],
                         capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == "" and run.stderr == "aerial_topo: nowhere.gpkg: no such file; check the path\n"


def test_command_line_refuses_with_one_message(tmp_path, capsys):
    write_graph(STREET, tmp_path / "a.csv")
    (tmp_path / "bad.p").write_bytes(b"cos\nsystem\n(S'echo'\ntR.")
    cases = [((tmp_path / "none.gpkg", tmp_path / "a.csv"), "no such file"), ((tmp_path / "a.csv",) * 2, "--gsd_m"),
             ((tmp_path / "bad.p",) * 2, "bad.p"), ((tmp_path / "a.csv", tmp_path / "a.csv", "--gsd_m", 1, "--match_m", -3), "match_m must be"),
             ((tmp_path / "a.csv", tmp_path / "a.csv", "--gsd_m", 1, "--rules", "x"), "rules are")]
    for argv, words in cases:
        code, out, err = command(capsys, *argv)
        assert code == 2 and out == "" and words in err and "Traceback" not in err
        assert len(err.strip().splitlines()) == 1 and err.startswith("aerial_topo: ")
    with pytest.raises(DataError): read_graph(tmp_path / "bad.p")


@calm
@given(roads(12))
def test_chains_hold_every_edge_once(g):
    g = g.tidy()
    assume(len(g))
    net = network(g.nodes, g.edges)
    path, begin = chains(net)
    lines = [path[i:j].tolist() for i, j in zip(begin[:-1], begin[1:])]
    steps = [tuple(sorted(step)) for line in lines for step in zip(line, line[1:])]
    assert sorted(steps) == sorted(map(tuple, g.edges.tolist()))
    assert all(g.degrees[n] == 2 for line in lines for n in line[1:-1])
    assert all(line[0] == line[-1] or (g.degrees[[line[0], line[-1]]] != 2).all() for line in lines)


@calm
@given(roads(12), st.floats(0, 1), st.floats(20, 400))
def test_spread_is_dijkstra_with_a_limit(g, share, limit):
    g = g.tidy()
    assume(len(g))
    net, work = network(g.nodes, g.edges), scratch(network(g.nodes, g.edges))
    (u, v), size = g.edges[0], g.lengths[0]
    count = spread(net, work, (u, v, share * size, (1 - share) * size), limit)
    n, (i, j) = len(g.nodes), g.edges.T
    start = csr_matrix((np.r_[g.lengths, max(share * size, 1e-12), max((1 - share) * size, 1e-12)],
                        (np.r_[i, n, n], np.r_[j, u, v])), shape=(n + 1, n + 1))
    want = dijkstra(start, directed=False, indices=n)[:n]
    got = work.label.copy()
    clear = np.abs(want - limit) > 1e-6
    assert np.allclose(got[clear], np.where(want <= limit, want, np.inf)[clear], atol=1e-9)
    clean(work, count)
    assert np.isinf(work.label).all() and not work.queued.any()


def test_points_lie_a_whole_number_of_intervals_away_and_are_laid_once():
    net = network(RING.nodes, RING.edges)
    size = net.length[net.edge == 0][0]
    points, slots, n = walk_shortest(net, scratch(net), (0, 1, 30., size - 30.), 7., 1000., np.empty((4, 2)), np.empty(4, int), 0)
    around = RING.length / 2
    assert n == 2 * int(around / 7) + 1     # both ways to the far side, and the start
    assert len(np.unique(points[:n].round(6), axis=0)) == n


def test_region_keeps_starts_off_the_border_of_a_large_tile():
    assert inside((5, 5), 0, 0, 10, 10, .07) and not inside((.5, 5), 0, 0, 10, 10, .07)
    long = RoadGraph(np.stack([np.full(301, 40.), np.arange(0, 6001, 20)], 1), np.stack([np.arange(300), np.arange(1, 301)], 1))
    rows = topo(long, long, gsd_m=1).starts.y
    assert rows.min() > 150 and rows.max() < 5850 and topo(long, long, gsd_m=1, border=0).starts.y.min() < 60


@pytest.mark.slow
def test_a_hundred_thousand_edges():
    n = 225
    grid = np.arange(n * n).reshape(n, n)
    edges = np.concatenate([np.stack([grid[:, :-1].ravel(), grid[:, 1:].ravel()], 1), np.stack([grid[:-1].ravel(), grid[1:].ravel()], 1)])
    nodes = jitter(np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1).reshape(-1, 2) * 60., 0, 3)
    found = topo(RoadGraph(nodes, edges), RoadGraph(nodes + 2, edges), gsd_m=1, rules="corrected", reach_m=150)
    assert len(edges) > 100_000 and found.precision > .95
