"Behaviour of road graphs: validation, spaces, lines, files."
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.transform import from_origin

from aerial_nb.roads.graph import RoadGraph, svg_scale_bar

calm = settings(deadline=None, max_examples=40)    # the first call imports geopandas
UTM = from_origin(500_000, 5_000_000, 0.5, 0.5)


@st.composite
def graphs(draw):
    n = draw(st.integers(2, 12))
    nodes = draw(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), min_size=n, max_size=n, unique=True))
    pair = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1))
    return RoadGraph(nodes, np.array(draw(st.lists(pair, max_size=20)), np.int64).reshape(-1, 2))


def edge_set(g):
    return {frozenset(map(tuple, g.nodes[e].tolist())) for e in g.edges if e[0] != e[1]}


@calm
@given(graphs())
def test_tidy_keeps_the_lines_and_nothing_else(g):
    t = g.tidy()
    assert edge_set(t) == edge_set(g)
    assert len(t) == len(edge_set(g)) and (t.degrees > 0).all()
    assert t.tidy() == t


@calm
@given(graphs())
def test_lines_give_the_graph_back(g):
    back = RoadGraph.from_lines(g.tidy().to_geodataframe())
    assert edge_set(back) == edge_set(g) and back.n_parts == g.tidy().n_parts


@calm
@given(graphs())
def test_merged_lines_have_the_same_length(g):
    t = g.tidy()
    assert t.to_geodataframe(merge=True)["length"].sum() == pytest.approx(t.length)


@calm
@given(graphs())
def test_networkx_agrees_on_parts_degrees_and_back(g):
    nx = pytest.importorskip("networkx")
    t = g.tidy()
    graph = t.to_networkx()
    assert nx.number_connected_components(graph) == t.n_parts if len(t.nodes) else t.n_parts == 0
    assert [d for _, d in graph.degree] == t.degrees.tolist()
    assert RoadGraph.from_networkx(graph) == t


@calm
@given(graphs())
def test_map_and_back(g):
    placed = RoadGraph(g.nodes, g.edges, "EPSG:32633", UTM)
    assert placed.space == "pixel" and placed.to_map().space == "map"
    assert np.allclose(placed.to_map().to_pixels(UTM).nodes, g.nodes)
    assert placed.length_m == pytest.approx(placed.length / 2)


def test_arrays_are_checked():
    with pytest.raises(ValueError, match=r"nodes must be \(n, 2\)"):
        RoadGraph(np.zeros((3, 3)), [])
    with pytest.raises(ValueError, match="not finite, first is node 1"):
        RoadGraph([(0, 0), (np.nan, 0)], [(0, 1)])
    with pytest.raises(ValueError, match=r"first is edge 0: \[-1, 0\]"):
        RoadGraph([(0, 0)], [(-1, 0)])
    with pytest.raises(ValueError, match="whole numbers"):
        RoadGraph([(0, 0), (1, 1)], [(0., 1.)])
    with pytest.raises(ValueError, match="pairs"):
        RoadGraph([(0, 0), (1, 1)], [0, 1])
    with pytest.raises(ValueError, match="without a crs"):
        RoadGraph([(0, 0)], [], transform=UTM)
    g = RoadGraph([(0, 0), (1, 1)], np.array([(0, 1)], np.uint8))
    assert g.edges.dtype == np.int64 and g.nodes.dtype == np.float64


def test_empty_graph_is_a_graph(tmp_path):
    g = RoadGraph([], [])
    assert len(g) == 0 and g.n_parts == 0 and g.length == 0 and g.tidy() == g
    assert len(g.to_geodataframe()) == 0 and len(g.to_geodataframe(merge=True)) == 0
    assert RoadGraph.from_lines([]) == g and RoadGraph.from_networkx(g.to_networkx()) == g
    assert RoadGraph.load(g.save(tmp_path / "empty.npz")) == g
    assert "RoadGraph" in g._repr_html_()
    g.plot()


def test_length_of_a_degree_follows_the_ellipsoid():
    degree = RoadGraph([(10., 0.), (11., 0.)], [(0, 1)], "EPSG:4326")
    assert degree.length_m == pytest.approx(111_319.49, abs=.01)
    feet = RoadGraph([(0, 0), (1000, 0)], [(0, 1)], "EPSG:2263")
    assert feet.length_m == pytest.approx(304.8006, abs=1e-3)


def test_bare_pixels_know_no_metres():
    g = RoadGraph([(0, 0), (3, 4)], [(0, 1)])
    assert g.length == 5
    for ask in (lambda: g.length_m, g.to_map, lambda: g.to_pixels(UTM)):
        with pytest.raises(ValueError, match="bare pixels"):
            ask()


def test_lines_join_at_shared_vertices_only():
    street, side = shapely.linestrings([[(0, 0), (50, 0), (100, 0)], [(50, 0), (50, 30), (60, 40)]])
    over = shapely.linestrings([(80, -9, 6.), (80, 9, 6.)])
    g = RoadGraph.from_lines([street, side, over, None, shapely.LineString()])
    assert g.n_parts == 2 and sorted(g.degrees.tolist()) == [1, 1, 1, 1, 1, 2, 3]
    both = RoadGraph.from_lines(shapely.multilinestrings([street, side]))
    assert both.n_parts == 1 and both.length == pytest.approx(street.length + side.length)


def test_snap_closes_small_gaps():
    lines = shapely.linestrings([[(0, 0), (10.04, 0)], [(9.98, 0.03), (20, 0)]])
    assert RoadGraph.from_lines(lines).n_parts == 2
    assert RoadGraph.from_lines(lines, snap=.5).n_parts == 1


def test_polygons_are_refused():
    with pytest.raises(ValueError, match="found Polygon.*skeletonised"):
        RoadGraph.from_lines([shapely.box(0, 0, 1, 1)])


def test_networkx_nodes_need_positions():
    nx = pytest.importorskip("networkx")
    with pytest.raises(ValueError, match="first is 'b'"):
        g = nx.Graph([("a", "b")])
        g.nodes["a"].update(x=0, y=0)
        RoadGraph.from_networkx(g)


def test_files_hold_no_pickles(tmp_path):
    g = RoadGraph([(0, 0), (1 / 3, 4)], [(0, 1)], "EPSG:32633", UTM)
    assert RoadGraph.load(g.save(tmp_path / "g.npz")) == g
    with pytest.raises(ValueError, match=r"saved as \.npz"):
        g.save(tmp_path / "g.pkl")
    np.savez(tmp_path / "other.npz", nodes=g.nodes)
    with pytest.raises(ValueError, match="no road graph: it has no crs, edges, transform"):
        RoadGraph.load(tmp_path / "other.npz")


def test_a_map_graph_is_not_drawn_over_pixels():
    g = RoadGraph([(0, 0), (1, 1)], [(0, 1)], "EPSG:32633")
    with pytest.raises(ValueError, match="to_pixels"):
        g.plot(image=np.zeros((3, 8, 8), np.uint8))


def bar_of(html):
    "Metres that a scale bar says, and its length in pixels of the drawing; None where there is none."
    found = re.search(r'class="scale-bar".*?v4h([\d.]+)v-4.*?>([\d.]+) (k?m)</text>', html)
    return found and (float(found[2]) * (1000 if found[3] == "km" else 1), float(found[1]))


@given(st.floats(1e-4, 1e5), st.integers(60, 600))
def test_a_scale_bar_is_round_and_fits(m_per_px, width):
    drawn = svg_scale_bar(m_per_px, width, 150)
    ElementTree.fromstring(drawn)
    metres, long = bar_of(drawn)
    assert f"{metres:.0e}"[0] in "125" and float(f"{metres:.0e}") == pytest.approx(metres)
    assert .15 * width < long < .4 * width and long * m_per_px == pytest.approx(metres, rel=.01, abs=.06 * m_per_px)


@pytest.mark.parametrize("size", [0, -1., np.nan, np.inf])
def test_no_scale_no_bar(size): assert svg_scale_bar(size, 150, 150) == ""


def test_a_drawing_says_how_large_things_are():
    nodes, edges = [(0, 0), (1000, 0), (1000, 800)], [(0, 1), (1, 2)]
    placed = RoadGraph(nodes, edges, "EPSG:32633", from_origin(5e5, 5e6, .5, .5))
    north = placed.to_map()
    for graph in (placed, north, north.to_crs("EPSG:4326"), north.to_crs("EPSG:3857")):   # 500 m on 140 pixels
        metres, long = bar_of(graph._repr_html_())
        assert metres == 100 and long == pytest.approx(28, abs=.3), graph.crs
    assert north.to_crs("EPSG:3857").m_across() == pytest.approx(np.cos(np.radians(45.15)), abs=.005)
    assert bar_of(RoadGraph(nodes, edges)._repr_html_()) is None and np.isnan(RoadGraph(nodes, edges).m_across())
    for empty in (RoadGraph([], [], "EPSG:32633"), RoadGraph([(5, 5)], [], "EPSG:32633")): assert bar_of(empty._repr_html_()) is None
