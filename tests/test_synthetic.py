"Synthetic scenes: the same bytes everywhere, exact labels, hard enough."
import hashlib
import json
import subprocess
import sys
import time
from functools import lru_cache

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
from rasterio.features import rasterize

from aerial_nb.data.synthetic import scene, scenes, threshold_iou, write_scene
from aerial_nb.data.terrain import Dice, land, noise
from aerial_nb.roads.graph import RoadGraph

cached = lru_cache(maxsize=None)(scene)


def digest(s):
    arrays = (s.image, s.valid, s.roads, s.buildings, s.hidden, s.graph.nodes, s.graph.edges)
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:16]


def iou(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


KNOWN = {    # (size, seed, gsd_m, blank): taken with numpy 2.4, equal with numpy 1.26 and with vector instructions off
    (64, 0, .5, False): "497eef11638e95fd", (160, 1, 2., True): "905cf2257aa7f37b",
    (96, 2, 1., False): "040d316253a5987d", (80, 3, .3, False): "312c3415f9e4ebec",
}


@pytest.mark.parametrize("arguments", KNOWN)
def test_same_bytes_on_every_machine(arguments):
    size, seed, gsd_m, blank = arguments
    assert digest(scene(size, seed, gsd_m, blank=blank)) == KNOWN[arguments]


def test_seeds_and_kinds_differ():
    first = [cached(96, seed, 1.) for seed in range(8)]
    assert len({digest(s) for s in first}) == 8
    assert [s.kind for s in first] == ["grid", "curved", "rural", "town"] * 2
    assert len({s.transform.c for s in first}) == 8
    assert [digest(s) for s in scenes(2, 96, 3, gsd_m=1.)] == [digest(s) for s in first[3:5]]


def test_shapes_and_types():
    s = cached(101, 5, .7)
    assert s.image.shape == (3, 101, 101) and s.image.dtype == np.uint8
    for mask in (s.roads, s.buildings):
        assert mask.shape == (101, 101) and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1}
    assert s.valid.dtype == bool and s.valid.all() and s.image.max() < 255
    assert s.crs.startswith("EPSG:326") and s.transform.a == .7 and s.graph.space == "pixel"


@pytest.mark.parametrize(("size", "gsd_m"), [(16, .1), (64, 2.), (64, .1), (200, .25), (257, 1.3)])
def test_any_size_and_resolution_shows_a_road(size, gsd_m):
    s = cached(size, 3, gsd_m)
    assert s.image.shape == (3, size, size) and (s.roads == 1).any() and len(s.graph) > 0


def test_resolution_changes_pixels_not_the_world():
    fine, coarse = cached(512, 6, 1.), cached(256, 6, 2.)
    blocks = fine.roads.reshape(256, 2, 256, 2).mean((1, 3)) >= .5
    assert iou(blocks, coarse.roads == 1) > .9
    assert coarse.graph.length_m == pytest.approx(fine.graph.length_m, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_lines_and_polygons_burn_to_the_masks(seed):
    s = cached(512, seed, 1.)
    assert s.road_lines.crs.to_epsg() == s.building_polygons.crs.to_epsg() == 4326
    lines, homes = s.road_lines.to_crs(s.crs), s.building_polygons.to_crs(s.crs)
    road = rasterize(lines.buffer(lines["width_m"] / 2), s.roads.shape, transform=s.transform)
    roof = rasterize(homes.geometry, s.buildings.shape, transform=s.transform)
    assert iou(road == 1, s.roads == 1) > .99
    assert iou(roof == 1, s.buildings == 1) > .98
    assert homes.is_valid.all()


@pytest.mark.parametrize("seed", range(4))
def test_graph_lies_on_the_roads(seed):
    s = cached(512, seed, 1.)
    ends = s.graph.nodes[s.graph.edges]
    for t in (.02, .25, .5, .75, .98):
        col, row = np.floor(ends[:, 0] + (ends[:, 1] - ends[:, 0]) * t).astype(int).clip(0, 511).T
        assert (s.roads[row, col] == 1).all()
    assert ((s.graph.nodes >= 0) & (s.graph.nodes <= 512)).all()
    inside = shapely.clip_by_rect(s.road_lines.to_crs(s.crs).geometry.values, *rasterio.transform.array_bounds(512, 512, s.transform))
    assert s.graph.length_m == pytest.approx(shapely.length(inside).sum(), rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_the_network_has_what_roads_have(seed):
    s = cached(512, seed, 1.)
    degrees = np.bincount(s.graph.degrees, minlength=5)
    assert degrees[1] and degrees[3] and (degrees[4] or seed == 2)
    assert {12., 8., 15., 7.} <= set(s.road_lines["width_m"])      # trunk, main, turning circle, roundabout
    assert {5., 3.5} & set(s.road_lines["width_m"])
    ring = RoadGraph.from_lines(s.road_lines[s.road_lines["width_m"] == 7.].to_crs(s.crs), snap=.01)
    loops = [line for line in ring.to_geodataframe(merge=True).geometry if line.is_ring]
    assert loops and loops[0].length == pytest.approx(2 * np.pi * 16, rel=.02)


@pytest.mark.parametrize("seed", range(4))
def test_an_overpass_crosses_without_a_node(seed):
    s = cached(512, seed, 1.)
    lines = s.road_lines.to_crs(s.crs)
    trunk = lines[~lines["bridge"] & (lines["width_m"] == 12)].geometry
    crossings = [c for bridge in lines[lines["bridge"]].geometry for road in trunk
                 if not bridge.touches(road) and not (c := bridge.intersection(road)).is_empty]
    assert crossings
    nodes = shapely.points(s.graph.to_map().nodes)
    for c in crossings:
        far = shapely.distance(nodes, c)
        assert far.min() > .02 and (s.graph.degrees[far < 12] <= 2).all()


def test_buildings_touch_are_tiny_and_huge():
    homes = cached(512, 3, 1.).building_polygons.to_crs(cached(512, 3, 1.).crs)
    halls = cached(512, 0, 1.).building_polygons.to_crs(cached(512, 0, 1.).crs)
    a, b = homes.sindex.query(homes.buffer(.05), predicate="intersects")
    assert (a < b).sum() > 30
    overlap = homes.geometry.values[a].intersection(homes.geometry.values[b]).area[a < b]
    assert overlap.max() < .5                       # walls are shared, ground is not
    assert homes.area.min() < 20 and halls.area.max() > 800
    assert set(cached(512, 1, 1.).building_polygons["roof"]) == {"flat", "gable", "hip"}
    assert any(len(g.exterior.coords) == 7 for g in cached(512, 1, 1.).building_polygons.geometry)


def test_crowns_hide_roads_that_stay_labelled():
    for seed in range(4):
        s = cached(512, seed, 1.)
        assert .02 < s.hidden.sum() / (s.roads == 1).sum() < .3
        assert (s.roads[s.hidden] == 1).all()


@pytest.mark.parametrize("seed", range(12))
def test_no_threshold_finds_the_roads(seed):
    s = cached(512, seed, 1.) if seed < 4 else scene(512, seed, 1.)
    assert threshold_iou(s.image, s.roads)[0] < .4


def test_threshold_search_is_exhaustive():
    image = np.zeros((3, 8, 8), np.uint8)
    image[:, :, :4], image[0, :4], image[:, 7] = 100, 180, 20
    mask = np.zeros((8, 8), np.uint8)
    mask[4:7, :4] = 1                              # grey 100, no colour
    assert threshold_iou(image, mask)[0] == 1
    mask[0, 0] = 255                               # ignored
    assert threshold_iou(image, mask)[0] == 1
    mask[7, :3] = 1                                # three more that look like nothing else but the rest of their row
    best = max(iou((image[0] >= a) & (image[0] <= b) & (np.ptp(image, 0) <= 7), mask == 1)
               for a in range(256) for b in range(a, 256) if mask.any())
    assert threshold_iou(image, mask)[0] >= best - 1e-9


def test_roads_can_be_told_by_eye():
    "Along a road colour changes less than across its edge: there is something to learn."
    s = cached(512, 1, 1.)
    grey = s.image.mean(0)
    seen = (s.roads == 1) & ~s.hidden
    inner = seen[:, 1:] & seen[:, :-1]
    edge = seen[:, 1:] ^ seen[:, :-1]
    step = np.abs(np.diff(grey, axis=1))
    assert step[edge].mean() > 1.5 * step[inner].mean()


def test_blank_corner():
    plain, s = cached(128, 9, 1.), scene(128, 9, 1., blank=True)
    assert .02 < (~s.valid).mean() < .5
    assert (s.image[:, ~s.valid] == 255).all() and (s.image[:, s.valid] == plain.image[:, s.valid]).all()
    for blank, whole in ((s.roads, plain.roads), (s.buildings, plain.buildings)):
        assert (blank[~s.valid] == 255).all() and (blank[s.valid] == whole[s.valid]).all()


def test_written_and_read_back(tmp_path):
    s = scene(96, 2, 1.2, blank=True)
    paths = write_scene(s, tmp_path / "new" / "set", "tile_2")
    names = {p.relative_to(tmp_path / "new" / "set").as_posix() for p in paths.values()}
    assert {"images/tile_2.tif", "masks/tile_2.tif", "masks_buildings/tile_2.tif", "labels/tile_2_roads.geojson",
            "labels/tile_2_buildings.geojson", "labels/tile_2_graph.npz"} == names
    for key, value in (("image", s.image), ("roads", s.roads[None]), ("buildings", s.buildings[None])):
        with rasterio.open(paths[key]) as file:
            assert (file.read() == value).all() and str(file.crs) == s.crs and file.transform == s.transform
            assert file.compression.name == "deflate" and file.profile["tiled"]
    assert RoadGraph.load(paths["graph"]) == s.graph
    lines = gpd.read_file(paths["road_lines"])
    assert len(lines) == len(s.road_lines) and {"class", "width_m", "bridge"} <= set(lines)
    text = json.loads(paths["building_polygons"].read_text())
    assert "crs" not in text                       # RFC 7946 knows one crs
    for feature in text["features"]:
        assert shapely.LinearRing(feature["geometry"]["coordinates"][0]).is_ccw
    write_scene(s, tmp_path / "new" / "set", "tile_2")     # again, over itself


def test_a_scene_without_buildings_is_written(tmp_path):
    s = scene(16, 2, .1)
    assert len(s.building_polygons) == 0
    paths = write_scene(s, tmp_path, "bare")
    assert len(gpd.read_file(paths["building_polygons"])) == 0


@pytest.mark.parametrize(("arguments", "message"), [
    ({"size": 8}, "16 pixels or more"), ({"size": 64, "gsd_m": 3}, "between 0.1 and 2"),
    ({"size": 64, "gsd_m": float("nan")}, "between 0.1 and 2"), ({"size": 64, "seed": -1}, "0 or more"),
    ({"size": 64, "kind": "city"}, "use grid, curved, rural, town")])
def test_impossible_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        scene(**arguments)


def test_dice_are_raw_bits():
    assert Dice(7, "a").random(3).tolist() == [Dice(7, "a").random(3)[i] for i in range(3)]
    one = Dice(7, "a")
    assert [one.random() for _ in range(3)] == Dice(7, "a").random(3).tolist()
    assert sorted(Dice(7, "a").shuffled(list("abcdef"))) == list("abcdef") and Dice(7, "a").shuffled([]) == []
    assert Dice(1, "b").bytes(3, 5).shape == (3, 5)
    values = Dice(1, "c").whole(2, 6, 500)
    assert set(values.tolist()) == {2, 3, 4, 5}


def test_noise_is_smooth_and_level_outside():
    z = noise(Dice(0, "n"), 10., 0., 100.)
    x = np.linspace(-500, 600, 4001)
    line = z.at(x, np.full_like(x, 33.))
    assert np.abs(np.diff(line)).max() < .15 and np.abs(line).max() <= 1


@pytest.mark.parametrize("seed", range(5))
def test_the_way_back_from_the_plan(seed):
    ground = land(seed, 600., 20.)
    x, y = np.meshgrid(np.linspace(0, 600, 40), np.linspace(0, 600, 40))
    bx, by = ground.to_ground(*ground.to_plan(x, y))
    assert np.abs(bx - x).max() < 1e-4 and np.abs(by - y).max() < 1e-4


def test_import_is_light():
    code = "import sys, aerial_nb.data.synthetic; print({'torch', 'fastai'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


@pytest.mark.slow
def test_a_scene_takes_under_two_seconds():
    scene(64, 0)
    start = time.process_time()
    scene(1024, 0)
    assert time.process_time() - start < 2


def test_the_picture_has_a_scale():
    html = scene(64, 3, .5)._repr_html_()
    assert '<image width="220"' in html and "10 m</text>" in html and "v4h68.8v-4" in html   # 32 m on 220 pixels
