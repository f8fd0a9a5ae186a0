"Road files: every format gives back what was written, and a stranger's file runs nothing."
import os
import pickle
import struct
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.transform import from_origin

from aerial_nb.data.raster import DataError
from aerial_nb.roads.files import read_graph, read_graphs, write_graph, write_wkt
from aerial_nb.roads.graph import RoadGraph

calm = settings(deadline=None, max_examples=40)
UTM = from_origin(500_000, 5_000_000, .5, .5)
DATA = Path(__file__).parents[1] / "../shared/data/roadgraphs"
real = pytest.mark.skipif(not DATA.is_dir(), reason="needs the road graphs beside the project")
TEE = RoadGraph([(0, 10), (20.25, 10), (40, 1 / 3), (20, 40)], [(0, 1), (1, 2), (1, 3)])
PLACED = RoadGraph(TEE.nodes, TEE.edges, "EPSG:32633", UTM)


@st.composite
def graphs(draw):
    n = draw(st.integers(2, 10))
    number = st.floats(0, 500, allow_subnormal=False) | st.integers(0, 500)
    nodes = draw(st.lists(st.tuples(number, number), min_size=n, max_size=n, unique=True))
    pair = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1))
    return RoadGraph(nodes, np.array(draw(st.lists(pair, min_size=1, max_size=15)), np.int64).reshape(-1, 2)).tidy()


def edge_set(g, digits=None):
    nodes = g.nodes if digits is None else g.nodes.round(digits) + 0.
    return {frozenset(map(tuple, nodes[e].tolist())) for e in g.edges}


def put(folder, data, protocol=2, name="roads.p"):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else pickle.dumps(data, protocol))
    return path


# ---- there and back

@calm
@given(graphs())
@pytest.mark.parametrize("ending", ["p", "csv", "npz"])
def test_pixels_come_back_exactly(tmp_path_factory, ending, g):
    back = read_graph(write_graph(g, tmp_path_factory.mktemp("f") / f"roads.{ending}"))
    assert edge_set(back) == edge_set(g) and back.space == "pixel"


@settings(deadline=None, max_examples=12)
@given(graphs())
@pytest.mark.parametrize("ending", ["gpkg", "shp", "parquet", "fgb"])
@pytest.mark.parametrize("merge", [True, False])
def test_maps_come_back_exactly(tmp_path_factory, ending, merge, g):
    if not len(g): return
    placed = RoadGraph(g.nodes, g.edges, "EPSG:32633", UTM)
    back = read_graph(write_graph(placed, tmp_path_factory.mktemp("f") / f"roads.{ending}", merge=merge))
    assert edge_set(back) == edge_set(placed.to_map()) and back.crs == "EPSG:32633" and back.space == "map"


@calm
@given(graphs())
def test_geojson_is_in_degrees(tmp_path_factory, g):
    if not len(g): return
    path = write_graph(RoadGraph(g.nodes, g.edges, "EPSG:32633", UTM), tmp_path_factory.mktemp("f") / "roads.geojson")
    back = read_graph(path)
    assert back.crs == "EPSG:4326" and np.abs(back.nodes - (15, 45)).max() < .3
    assert len(back) == len(g)
    assert back.to_crs("EPSG:32633").length_m == pytest.approx(g.length / 2, abs=1e-5)


def test_the_same_lines_in_every_crs(tmp_path):
    for crs in ("EPSG:4326", "EPSG:3857", "EPSG:2263", "EPSG:32633"):
        path = write_graph(PLACED.to_crs(crs), tmp_path / "roads.gpkg")
        assert read_graph(path).to_crs("EPSG:32633").length_m == pytest.approx(PLACED.length_m, abs=1e-4)
        path.unlink()


def test_python_2_opens_what_is_written(tmp_path):
    path = write_graph(TEE, tmp_path / "roads.p")
    assert path.read_bytes()[:2] == b"\x80\x02"
    roads = pickle.loads(path.read_bytes())
    assert set(roads) == {(10, 0), (10, 20.25), (1 / 3, 40), (40, 20)}
    assert sorted(roads[10, 20.25]) == sorted([(10, 0), (1 / 3, 40), (40, 20)])
    assert all(a in roads[b] for a in roads for b in roads[a])
    assert {type(v) for at in roads for v in at} == {int, float}


def test_empty_graphs_are_files_too(tmp_path):
    empty = RoadGraph([], [], "EPSG:32633", UTM)
    for ending in ("p", "csv", "npz", "gpkg", "geojson", "parquet"):
        assert len(read_graph(write_graph(empty, tmp_path / f"none.{ending}"))) == 0


def test_formats_refuse_what_they_cannot_hold(tmp_path):
    for ending in ("gpkg", "geojson", "shp", "parquet"):
        with pytest.raises(DataError, match="bare pixels.*give it crs= and transform="):
            write_graph(TEE, tmp_path / f"roads.{ending}")
    for ending in ("csv", "p"):
        with pytest.raises(DataError, match=r"to_pixels\(transform\)"):
            write_graph(PLACED.to_map(), tmp_path / f"roads.{ending}")
    with pytest.raises(DataError, match="no writer for .dxf"):
        write_graph(PLACED, tmp_path / "roads.dxf")
    assert not list(tmp_path.iterdir())


def test_nodes_at_one_place_are_said_to_be_one(tmp_path, caplog):
    bridge = RoadGraph([(0, 5), (5, 5), (10, 5), (5, 0), (5, 5), (5, 10)], [(0, 1), (1, 2), (3, 4), (4, 5)])
    back = read_graph(write_graph(bridge, tmp_path / "roads.p"))
    assert "1 nodes lie on others" in caplog.text and back.n_parts == 1
    assert read_graph(write_graph(bridge, tmp_path / "roads.npz")).n_parts == 2


# ---- pickles

@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [int, float, np.int64, np.float64, np.int32, np.float32, np.uint8])
def test_numbers_of_every_kind_and_protocol(tmp_path, protocol, kind):
    roads = {(kind(3), kind(7)): [(kind(3), kind(90))], (kind(3), kind(90)): [(kind(3), kind(7))]}
    g = read_graph(put(tmp_path, roads, protocol))
    assert g.nodes.tolist() == [[7, 3], [90, 3]] and len(g) == 1


def test_big_endian_numbers_of_python_2(tmp_path):
    scalar = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'%c'\nNNNI-1\nI-1\nI0\ntbS'%s'\ntR"
    def number(v, order):
        text = "".join(f"\\x{b:02x}" for b in struct.pack(order + "d", v)).encode()
        return scalar % (order.encode(), text)
    for order in "<>":
        at = [b"(" + number(3.5, order) + number(v, order) + b"t" for v in (7.25, 90.)]
        g = read_graph(put(tmp_path, b"(d" + at[0] + b"(l" + at[1] + b"as" + at[1] + b"(ls."))
        assert g.nodes.tolist() == [[7.25, 3.5], [90, 3.5]] and len(g) == 1


class Trap:
    def __init__(self, call, *arguments): self.way = call, arguments
    def __reduce__(self): return self.way


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("make", [
    lambda path: Trap(os.system, f"touch {path}"),
    lambda path: Trap(eval, f"open({str(path)!r}, 'w')"),
    lambda path: Trap(open, str(path), "w"),
    lambda path: Trap(getattr, dict, "clear"),
    lambda path: Trap(bytearray, 10 ** 9),
    lambda path: Trap(np.frombuffer, b"1234"),
    lambda path: np.arange(3),
    lambda path: frozenset,
    lambda path: Path("x"),
])
def test_pickles_with_code_are_refused_and_run_nothing(tmp_path, protocol, make):
    mark = tmp_path / "was_here"
    path = put(tmp_path, {(0, 0): [(0, 0)], (1, 1): make(mark)}, protocol)
    with pytest.raises(DataError, match="nothing was run"):
        read_graph(path)
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_set_of_neighbours_is_refused(tmp_path, protocol):
    """From protocol 4 on a set needs no code to load; it is still not what Sat2Graph writes."""
    with pytest.raises(DataError, match="nothing was run" if protocol < 4 else "a dict of something else"):
        read_graph(put(tmp_path, {(0, 0): [(0, 0)], (1, 1): {1, 2}}, protocol))


@pytest.mark.parametrize("data", [
    b"cos\nsystem\n(S'true'\ntR.", b"(S'true'\nios\nsystem\n.", b"(cos\nsystem\nS'true'\no.",
    b"\x80\x02cos\nsystem\n\x81.", b"cnumpy\ndtype\n(S'O'\nI0\nI1\ntR.", b"cnumpy\ndtype\n(S'V8'\nI0\nI1\ntR.",
    b"cnumpy.core.multiarray\nscalar\n}S'__defaults__'\nNs\x86b.", b"cnumpy.core.multiarray\nscalar\n}b.",
    b"cbuiltins\ngetattr\n.", b"caerial_nb.roads.files\nos\n.", b"Pwhere\n.", b"\x80\x02\x82\x01.",
])
def test_hand_made_traps_are_refused(tmp_path, data):
    with pytest.raises(DataError):
        read_graph(put(tmp_path, data))
    back = read_graph(put(tmp_path, {(np.float64(1), 2): [], (1, 3): [(1, 2)]}))      # and nothing was changed
    assert len(back) == 1


@pytest.mark.parametrize("data", [b"", b"no pickle", b"\x80\x02}", b"(((((", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
                                  b"\x80\x02]r\xff\xff\xff\xff.", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.",
                                  pickle.dumps({(0, 0): [(1, 1)], (1, 1): []})[:-9]])
def test_damaged_pickles_are_named(tmp_path, data):
    with pytest.raises(DataError, match="roads.p"):
        read_graph(put(tmp_path, data))


@pytest.mark.parametrize("roads, message", [
    ({(0, 0): [(1, 1)]}, r"1 of 1 neighbours are no node.*\(1, 1\) of \(0, 0\)"),
    ({(0, np.nan): [], (1, 1): []}, "not finite"),
    ({(0, 0): [(0, float("inf"))]}, "not finite"),
    ({1: {2: {"nid": 3, "lat": 4., "lon": 5.}}}, "a dict of something else"),
    ({1: [2], 2: [1]}, r"must be \(row, col\) pairs"),
    ({(0, 0, 0): []}, r"must be \(row, col\) pairs"),
    ({("a", "b"): []}, r"must be \(row, col\) pairs"),
    ([(0, 0), (1, 1)], "a list of something else"),
    (5, "a int of something else"),
])
def test_other_contents_are_refused(tmp_path, roads, message):
    with pytest.raises(DataError, match=message):
        read_graph(put(tmp_path, roads))


def test_published_cuts_and_merges(tmp_path):
    roads = {(1.9, -.5): [(8.2, 3.)], (8.2, 3.): [(1.9, -.5), (8.7, 3.9)], (8.7, 3.9): [(8.2, 3.)]}
    path = put(tmp_path, roads)
    assert read_graph(path).nodes.tolist() == [[-.5, 1.9], [3, 8.2], [3.9, 8.7]]
    cut = read_graph(path, published=True)
    assert cut.nodes.tolist() == [[0, 1], [3, 8]]
    assert cut.edges.tolist() == [[0, 1], [1, 1]]       # a road within one pixel stays, as published


@real
def test_the_published_example_is_what_it_is():
    truth = read_graph(DATA / "sat2graph_examples/gt.p")
    assert (len(truth.nodes), len(truth), truth.n_parts) == (3696, 3975, 4)
    assert np.bincount(truth.degrees).tolist() == [0, 114, 3152, 198, 223, 8, 1]
    assert truth.length == pytest.approx(78_511, abs=1)
    assert truth.nodes[:, 1].min() == 37 and truth.nodes[:, 0].max() == 2013          # y is the row
    found = read_graph(DATA / "sat2graph_examples/prop.p")
    assert (len(found.nodes), len(found)) == (4518, 4845)
    assert read_graph(DATA / "sat2graph_examples/gt.p", published=True) == truth


@real
def test_pickled_objects_of_networkx_are_refused(tmp_path):
    data = (DATA / "apls/vegas_img0/gt.gpickle").read_bytes()
    with pytest.raises(DataError, match="networkx.*nothing was run"):
        read_graph(put(tmp_path, data))


@real
def test_spacenet_files():
    table = read_graph(DATA / "apls/vegas_img0/proposal_pixels_wkt.csv")
    assert table.crs is None and table.nodes.max() <= 1300 and len(table) > 150
    truth = read_graph(DATA / "apls/vegas_img0/gt.geojson")
    assert truth.crs == "OGC:CRS84" or truth.crs == "EPSG:4326"
    assert truth.length_m == pytest.approx(4461, abs=1)


# ---- lines

def write_lines(path, lines, crs=None, **options):
    gpd.GeoDataFrame(geometry=list(lines), crs=crs).to_file(path, engine="pyogrio", **options)
    return path


LINE = shapely.LineString([(0, 0), (30, 0), (30, 40)])


def test_lines_without_crs_are_refused(tmp_path):
    path = write_lines(tmp_path / "roads.shp", [LINE])
    with pytest.raises(DataError, match=r"without a CRS; say where they are with crs='EPSG:...', or crs='pixels'"):
        read_graph(path)
    assert read_graph(path, crs="EPSG:32633").length_m == pytest.approx(70)
    assert read_graph(path, crs="pixels").crs is None
    with pytest.raises(DataError, match="'EPSG:nowhere' is no CRS"):
        read_graph(path, crs="EPSG:nowhere")
    placed = read_graph(path, crs="EPSG:32633", transform=UTM)
    assert placed.length_m == pytest.approx(35) and placed.space == "pixel"
    with pytest.raises(DataError, match="give both"):
        read_graph(path, transform=UTM)


def test_a_crs_that_contradicts_the_file_is_refused(tmp_path):
    path = write_lines(tmp_path / "roads.gpkg", [LINE], "EPSG:32633")
    assert read_graph(path, crs="EPSG:32633").crs == "EPSG:32633"
    for crs in ("EPSG:32634", "pixels"):
        with pytest.raises(DataError, match="the file says it is in EPSG:32633"):
            read_graph(path, crs=crs)


def test_pixels_in_geojson_have_to_be_said(tmp_path):
    path = write_lines(tmp_path / "roads.geojson", [shapely.LineString([(3, 405), (125, 409)])])
    with pytest.raises(DataError, match=r"\[3.0, 405.0\] is no place in degrees.*crs='pixels'"):
        read_graph(path)
    assert read_graph(path, crs="pixels").nodes.tolist() == [[3, 405], [125, 409]]


def test_faults_in_lines_are_named(tmp_path, caplog):
    path = tmp_path / "roads.parquet"
    gpd.GeoDataFrame(geometry=[LINE, shapely.linestrings([(0, 0), (np.nan, 1)])], crs="EPSG:32633").to_parquet(path)
    with pytest.raises(DataError, match="1 of 5 coordinates are not finite, first is in line 2"):
        read_graph(path)
    gpd.GeoDataFrame(geometry=[LINE, None, shapely.LineString()], crs="EPSG:32633").to_parquet(path)
    assert len(read_graph(path)) == 2 and "2 of 3 features have no geometry" in caplog.text
    gpd.GeoDataFrame(geometry=[LINE.buffer(3)], crs="EPSG:32633").to_parquet(path)
    with pytest.raises(DataError, match="found Polygon"):
        read_graph(path)
    gpd.GeoDataFrame(geometry=[], crs="EPSG:32633").to_parquet(path)
    assert len(read_graph(path)) == 0 and "no lines" in caplog.text


def test_layers_have_to_be_named_when_there_are_several(tmp_path):
    path = tmp_path / "town.gpkg"
    for name in ("streets", "paths"): write_lines(path, [LINE], "EPSG:32633", layer=name)
    with pytest.raises(DataError, match=r"2 layers \(streets, paths\); say which with layer="):
        read_graph(path)
    assert len(read_graph(path, layer="paths")) == 2
    with pytest.raises(DataError, match="no layer 'rails'; it holds streets, paths"):
        read_graph(path, layer="rails")


@pytest.mark.parametrize("ending", ["gpkg", "shp", "geojson", "parquet", "fgb", "npz"])
def test_damaged_files_are_named(tmp_path, ending):
    path = tmp_path / f"roads.{ending}"
    path.write_bytes(b"this is no such file, and never was" * 9)
    with pytest.raises(DataError, match=f"roads.{ending}"):
        read_graph(path)


def test_unknown_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_graph(tmp_path / "roads.gpkg")
    (tmp_path / "roads.dxf").write_text("x")
    with pytest.raises(DataError, match="no reader for .dxf; roads are read from .gpkg"):
        read_graph(tmp_path / "roads.dxf")


# ---- tables

def test_tables_of_several_images(tmp_path):
    other = RoadGraph([(1, 2), (3, 4.5)], [(0, 1)])
    path = write_wkt({"a": TEE, "none": RoadGraph([], []), "b": other}, tmp_path / "roads.csv")
    back = read_graphs(path)
    assert list(back) == ["a", "none", "b"] and [len(g) for g in back.values()] == [3, 0, 1]
    assert edge_set(back["a"]) == edge_set(TEE) and read_graph(path, image="b") == other
    with pytest.raises(DataError, match=r"holds 3 images \(a, none, b, ...\); pick one with image="):
        read_graph(path)
    with pytest.raises(DataError, match="no image 'c' among its 3"):
        read_graph(path, image="c")


@pytest.mark.parametrize("text, message", [
    ("ImageId,WKT_Pix\na,LINESTRING (0 0 1 1\n", "1 of 1 rows are no WKT, first is row 2"),
    ("ImageId,Line\na,b\n", "has the columns ImageId, Line; it needs WKT_Pix"),
    ("", "no table of lines"),
    ("ImageId,WKT\na,\"LINESTRING (0 0, 1 1)\"\n", "without a CRS"),
    ("ImageId,WKT_Pix\na,\"LINESTRING (0 0, nan 1)\"\n", "not finite|no WKT"),
    ("ImageId,WKT_Pix\na,POINT (1 1)\n", "found Point"),
])
def test_tables_that_are_none(tmp_path, text, message):
    (tmp_path / "roads.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_graph(tmp_path / "roads.csv")


def test_tables_on_the_map_say_so(tmp_path):
    (tmp_path / "roads.csv").write_text("ImageId,WKT\na,\"LINESTRING (0 0, 30 40)\"\n")
    assert read_graph(tmp_path / "roads.csv", crs="EPSG:32633").length_m == pytest.approx(50)
    assert read_graph(tmp_path / "roads.csv", crs="pixels").crs is None
