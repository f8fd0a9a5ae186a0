"""Directions of roads: the published maps class for class, and labels of our own that turn with the mask."""
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from oracles import orientation as plain
from skimage.io import imread
from skimage.morphology import skeletonize

from aerial_nb.data.augment import compose, d4, inverse
from aerial_nb.roads.orientation import (angular_error, orientation_classes, orientation_pyramid, orientation_rgb,
                                         orientation_vectors, turn_classes, turn_vectors)
from aerial_nb.roads.painted import published_classes, published_lines
from aerial_nb.roads.pixelgraph import pixel_graph, thin

DATA = Path(__file__).parents[1] / "../shared/data"
SCALES = {"": (1, 4), "half_": (2, 2), "quarter_": (4, 1)}
quick = settings(max_examples=40, deadline=None)


def need(path: Path) -> Path:
    if not path.exists(): pytest.skip(f"needs {path.name}, which is not part of the repository")
    return path


@pytest.fixture(scope="module")
def real_masks():
    found = [p for part in ("massachusetts_roads", "massachusetts_roads_full") for p in sorted(need(DATA / part).glob("masks/*.png"))]
    return [imread(p) > 0 for p in found[::3]]


def stroke(shape, a, b, radius) -> np.ndarray:
    "Pixels within radius of the segment from a to b, both (x, y)."
    y, x = np.mgrid[:shape[0], :shape[1]]
    (ax, ay), (dx, dy) = a, (b[0] - a[0], b[1] - a[1])
    t = (((x - ax) * dx + (y - ay) * dy) / max(dx * dx + dy * dy, 1e-9)).clip(0, 1)
    return (x - ax - t * dx) ** 2 + (y - ay - t * dy) ** 2 <= radius**2


def ring(shape, centre, radius, width) -> np.ndarray:
    y, x = np.mgrid[:shape[0], :shape[1]]
    return abs(np.hypot(x - centre[0], y - centre[1]) - radius) <= width / 2


@st.composite
def masks(draw, most=40):
    "Noise, single pixels, crossing strokes, rings, and masks that look the same from several sides."
    rows, cols = draw(st.integers(1, most)), draw(st.integers(1, most))
    kind = draw(st.sampled_from(("noise", "strokes", "ring", "same", "sparse")))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if kind == "sparse": return draw(arrays(bool, (rows, cols), elements=st.booleans(), fill=st.just(False)))
    if kind == "noise": return rng.random((rows, cols)) < draw(st.sampled_from((.1, .4, .6, .8, .95)))
    if kind == "ring": return ring((rows, cols), (cols / 2, rows / 2), min(rows, cols) / 3, draw(st.integers(1, 5)))
    mask = np.zeros((rows, cols), bool)
    for _ in range(draw(st.integers(1, 5))):
        mask |= stroke(mask.shape, rng.uniform(-5, most, 2), rng.uniform(-5, most, 2), draw(st.sampled_from((.6, 1.5, 3, 5))))
    if kind == "same":
        for k in draw(st.sampled_from(((2,), (4,), (6,), (2, 4)))): mask = mask | d4(mask, k)
        if rows == cols and draw(st.booleans()): mask = mask | mask.T
    return mask


# ---- the published maps

@pytest.fixture(scope="module")
def reference():
    folder = need(DATA / "reference" / "spin_orientation_ref.npz").parent
    lines = json.loads((folder / "spin_orientation_ref.json").read_text(encoding="utf-8"))
    return np.load(folder / "spin_orientation_ref.npz"), lines


@pytest.mark.parametrize("scale", SCALES)
def test_published_maps_class_for_class(reference, scale):
    arrays, lines = reference
    stride, eps = SCALES[scale]
    for name in lines:
        mask = arrays[f"mask_{name}"][::stride, ::stride]
        assert np.array_equal(thin(mask > 0), arrays[f"skel_{scale}{name}"] > 0), name
        got = orientation_classes(mask, rdp_eps_px=eps, published=True)
        assert got.dtype == np.uint8 and np.array_equal(got, arrays[f"angle_{scale}{name}"]), name
        found = [line.tolist() for line in published_lines(pixel_graph(mask > 0), eps)]
        assert found == lines[name][{1: "full", 2: "half", 4: "quarter"}[stride]]["lines_final_order"], name


def test_published_pyramid_and_other_band(reference):
    arrays, lines = reference
    for name in lines:
        quarter, half, full = orientation_pyramid(arrays[f"mask_{name}"], published=True)
        for got, scale in ((full, ""), (half, "half_"), (quarter, "quarter_")):
            assert np.array_equal(got, arrays[f"angle_{scale}{name}"]), (name, scale)
        narrow = orientation_classes(arrays[f"mask_{name}"], band_px=5, published=True)
        assert np.array_equal(narrow, arrays[f"angle_theta5_{name}"]), name


@quick
@given(masks(), st.sampled_from((1, 2, 4, 2.5)), st.sampled_from((3, 10)))
def test_published_classes_are_the_plain_ones(mask, eps, band):
    assert np.array_equal(published_classes(mask, eps, band), plain.published_classes(mask, eps, band))


def test_published_classes_on_real_masks_and_their_time(real_masks):
    rng, ours, theirs = np.random.default_rng(0), 0, 0
    published_classes(np.ones((5, 5), bool))
    for i, mask in enumerate(real_masks):
        top, left = rng.integers(0, 1244, 2)
        crop = mask[top:top + 256, left:left + 256] if i else mask[:, :700]
        start = time.process_time()
        got = published_classes(crop)
        middle = time.process_time()
        assert np.array_equal(got, plain.published_classes(crop, prefixes=True)), i
        ours, theirs = ours + middle - start, theirs + time.process_time() - middle
    assert theirs > 15 * ours, f"{theirs / ours:.1f} times faster than plain loops"


# ---- skeletons and threads

@quick
@given(masks(60))
def test_thinning_is_scikit_images(mask):
    assert np.array_equal(thin(mask), skeletonize(mask))


def test_thinning_of_every_neighbourhood_and_of_real_masks(real_masks):
    for code in range(256):
        mask = np.zeros((7, 7), bool)
        mask[2:5, 2:5] = np.insert([code >> k & 1 for k in range(8)], 4, 1).reshape(3, 3)
        assert np.array_equal(thin(mask), skeletonize(mask)), code
    for mask in real_masks: assert np.array_equal(thin(mask), skeletonize(mask))


@quick
@given(masks())
def test_threads_are_the_plain_ones(mask):
    graph = pixel_graph(mask)
    nodes, edges = plain.pixel_graph(skeletonize(mask))
    assert graph.nodes.tolist() == [[sum(p[k] for p in group) / len(group) for k in (0, 1)] for group in nodes]
    assert [(a, b) for a, b, _ in edges] == [tuple(e) for e in graph.ends.tolist()]
    assert [path for *_, path in edges] == [[tuple(p) for p in graph.thread(i).tolist()] for i in range(len(graph))]


@quick
@given(masks())
def test_every_skeleton_pixel_is_in_a_thread_a_ring_or_a_node(mask):
    graph, left = pixel_graph(mask), thin(mask)
    everything = [graph.thread(i) for i in range(len(graph) + graph.rings)]
    for points in everything:
        assert (abs(np.diff(points, axis=0)).max(1) <= 1).all()
        assert left[tuple(points.T)].all()
    for points in everything[len(graph):]: assert abs(points[0] - points[-1]).max() <= 1, "a ring closes"
    inner = [p[1:-1] for p in everything[:len(graph)]] + everything[len(graph):]
    seen = np.concatenate([np.zeros((0, 2), int), *inner])
    assert len(np.unique(seen, axis=0)) == len(seen)
    left[tuple(seen.T)] = False
    assert left.sum() >= len(graph.nodes) and (left.any() or not len(graph.nodes))


def test_thinning_wants_a_bool_mask():
    for bad in (np.ones((3, 3)), np.ones((3, 3), np.uint8), np.ones((2, 3, 3), bool)):
        with pytest.raises(ValueError, match="compare first"): thin(bad)
        with pytest.raises(ValueError, match="compare first"): pixel_graph(bad)


# ---- labels of our own

@settings(max_examples=80, deadline=None)
@given(masks(), st.integers(0, 7), st.sampled_from((4, 1.3)), st.sampled_from((36, 8, 60)))
def test_labels_turn_with_the_mask(mask, k, eps, bins):
    here = orientation_classes(mask, eps, bins=bins)
    assert np.array_equal(orientation_classes(d4(mask, k), eps, bins=bins), turn_classes(here, k, bins))
    assert np.array_equal(orientation_vectors(d4(mask, k), eps), turn_vectors(orientation_vectors(mask, eps), k))


def test_turning_names_is_what_happens_to_a_road():
    for degrees, k in ((20, 1), (20, 4), (20, 6), (20, 5), (20, 7)):
        a = np.radians(degrees)
        road = stroke((101, 101), (50 - 90 * np.cos(a), 50 - 90 * np.sin(a)), (50 + 90 * np.cos(a), 50 + 90 * np.sin(a)), 3)
        wanted = {1: 110, 4: 160, 6: 160, 5: 70, 7: 70}   # angles run with the clock, k = 1 turns against it
        assert orientation_classes(d4(road, k))[50, 50] == wanted[k] // 5, k


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 7), st.integers(0, 7), st.sampled_from((8, 36)))
def test_turning_twice_is_turning_once(first, second, bins):
    classes = np.random.default_rng(first).integers(0, bins + 1, (5, 7)).astype(np.uint8)
    classes[0, 0] = 255
    assert np.array_equal(turn_classes(turn_classes(classes, first, bins), second, bins),
                          turn_classes(classes, compose(first, second), bins))


@quick
@given(masks(), st.sampled_from((2, 5, 10)))
def test_labels_hold_to_the_road_and_to_the_band(mask, band):
    got = orientation_classes(mask, band_px=band)
    assert got.dtype == np.uint8 and got.max(initial=0) <= 36 and not (got < 36)[~mask].any()
    line = np.zeros(mask.shape, bool)
    for k in range(8): line |= d4(skeletonize(d4(mask, k)), inverse(k))   # that of any position of the mask
    y, x = np.nonzero(got < 36)
    if len(y):
        r, c = np.nonzero(line)
        assert np.hypot(y[:, None] - r, x[:, None] - c).min(1).max() <= band


def assert_none(classes, bins): assert (classes == bins).all()


@pytest.mark.parametrize("width", [2, 3, 5, 7, 12, 20])
def test_a_straight_road_gets_its_direction(width):
    off = []
    for degrees in np.random.default_rng(width).uniform(0, 180, 24):
        a = np.radians(degrees)
        road = stroke((160, 160), (80 - 60 * np.cos(a), 80 - 60 * np.sin(a)), (80 + 60 * np.cos(a), 80 + 60 * np.sin(a)), width / 2)
        vectors = orientation_vectors(road, band_px=15)
        found = np.hypot(*vectors) > 0
        assert found[road].all() and np.allclose(np.hypot(*vectors)[found], 1, atol=1e-6)
        got = np.degrees(np.arctan2(vectors[1], vectors[0]))[road] / 2
        off.append(abs((got - degrees + 90) % 180 - 90))
    assert np.concatenate(off).mean() < 1.5 and np.median(np.concatenate(off)) < 1


def test_axes_and_diagonals_are_in_the_middle_of_a_class():
    for (a, b), k in {((10, 50), (90, 50)): 0, ((10, 10), (90, 90)): 9, ((50, 10), (50, 90)): 18, ((10, 90), (90, 10)): 27}.items():
        road = stroke((101, 101), a, b, 3)
        assert set(np.unique(orientation_classes(road))) == {k, 36}, k
        for wiggle in (-1, 1):     # one pixel off over its length: most keep the class, none goes beyond the next
            road = stroke((101, 101), a, (b[0] + (wiggle if k else 0), b[1] + (0 if k else wiggle)), 3)
            got = orientation_classes(road)[road].astype(int)
            assert (got == k).mean() > .6 and abs((got - k + 18) % 36 - 18).max() <= 1, (k, wiggle)


def test_rings_are_labelled_all_round():
    for radius in (3, 8, 20, 40):
        mask = ring((101, 101), (50, 50), radius, 3)
        got = orientation_vectors(mask)
        y, x = np.nonzero(mask)
        tangent = np.degrees(np.arctan2(x - 50, 50 - y))
        off = abs((np.degrees(np.arctan2(got[1], got[0]))[mask] / 2 - tangent + 90) % 180 - 90)
        assert (np.hypot(*got)[mask] > 0).all() and off.mean() < (12 if radius < 8 else 4), radius


def test_two_roads_side_by_side_keep_their_own_directions():
    mask = stroke((120, 120), (5, 60), (115, 60), 2) | stroke((120, 120), (5, 66), (115, 110), 2)
    got = orientation_classes(mask, band_px=30)
    assert got[60, 40] == got[60, 100] == 0 and got[80, 40] == round(np.degrees(np.arctan2(44, 110)) / 5)


def test_a_road_cut_by_the_border_keeps_its_direction():
    rng, off = np.random.default_rng(0), []
    for degrees in rng.uniform(0, 180, 30):
        a, (x, y) = np.radians(degrees), rng.uniform(20, 76, 2)
        step = 200 * np.array([np.cos(a), np.sin(a)])
        road = stroke((96, 96), (x, y) - step, (x, y) + step, 9)
        got = orientation_vectors(road, band_px=40)[:, road]
        off.append(abs((np.degrees(np.arctan2(got[1], got[0])) / 2 - degrees + 90) % 180 - 90).mean())
    assert np.mean(off) < 1 and max(off) < 6, (np.mean(off), max(off))


def test_scaled_labels_are_picked_labels():
    mask = stroke((130, 90), (0, 0), (90, 130), 5)
    full = orientation_classes(mask)
    for level, s in zip(orientation_pyramid(mask), (4, 2, 1)):
        assert np.array_equal(level, full[::s, ::s]) and not (level < 36)[~mask[::s, ::s]].any()
    assert [a.shape for a in orientation_pyramid(mask, strides=(8, 1), published=True)] == [(17, 12), (130, 90)]


# ---- masks as they come, and what is none

def test_all_ways_to_write_a_mask_are_one():
    road = stroke((50, 60), (5, 5), (55, 40), 3)
    wanted = orientation_classes(road)
    for mask in (road.astype(np.uint8), road * np.uint8(255), road.astype(int), road[::-1][::-1]):
        assert np.array_equal(orientation_classes(mask), wanted)
    classes = road.astype(np.uint8)
    classes[:, 50:] = 255
    got = orientation_classes(classes)
    assert (got[:, 50:] == 255).all() and (got[:, :50] != 255).all() and (got[:, :50] < 36).any()
    again = orientation_classes(road, valid=np.arange(60) < np.full((50, 1), 50))
    assert np.array_equal(got, again) and np.isnan(orientation_vectors(classes)[:, :, 50:]).all()
    assert (orientation_pyramid(classes)[0][:, 13:] == 255).all()


def test_nothing_and_everything():
    for published in (False, True):
        assert_none(orientation_classes(np.zeros((9, 7), bool), published=published), 36)
        assert_none(orientation_classes(np.zeros((0, 7), bool), published=published), 36)
        assert orientation_classes(np.ones((30, 20), bool), published=published).shape == (30, 20)
    dot = np.zeros((9, 9), bool)
    dot[4, 4] = True
    assert_none(orientation_classes(dot), 36)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("mask, says", [
    (np.random.default_rng(0).random((8, 8)), "choose a threshold first"),
    (np.random.default_rng(0).random((8, 8)).astype(np.float32) > 2.0, None),
    (np.arange(64, dtype=np.uint8).reshape(8, 8), "neither 0, 1 nor 255"),
    (np.full((8, 8), 2), "neither 0, 1 nor 255"),
    (np.zeros((3, 8, 8), bool), "take one band"),
])
def test_what_is_no_mask_is_refused(mask, says, published):
    if says is None: return assert_none(orientation_classes(mask, published=published), 36)
    with pytest.raises(ValueError, match=says): orientation_classes(mask, published=published)
    with pytest.raises(ValueError, match=says): orientation_vectors(mask)


def test_other_bad_arguments_are_refused():
    mask = np.ones((8, 8), bool)
    with pytest.raises(ValueError, match="same window"): orientation_classes(mask, valid=np.ones((8, 9), bool))
    for bins in (0, 30, 37, 256, -4):
        with pytest.raises(ValueError, match="multiple of 4"): orientation_classes(mask, bins=bins)
    for lengths in ((0, 10), (4, 0), (float("nan"), 10)):
        with pytest.raises(ValueError, match="above 0"): orientation_classes(mask, *lengths)
        with pytest.raises(ValueError, match="above 0"): orientation_vectors(mask, *lengths)
    with pytest.raises(ValueError, match="one size"): angular_error(np.zeros((8, 8), np.uint8), np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="0 to 7"): turn_classes(np.zeros((8, 8), np.uint8), 8)


def test_angles_between_maps():
    a, b = np.array([[0, 35, 36, 255, 18]], np.uint8), np.array([[0, 1, 3, 3, 0]], np.uint8)
    assert angular_error(a, b).tolist() == [0, 10, 90]
    assert angular_error(a, b, published=True).tolist() == [0, 20, 0]   # a sense is no direction


def test_colours_tell_directions_and_what_is_none():
    colours = orientation_rgb(np.array([[0, 18, 9, 36, 255]], np.uint8))[0].tolist()
    assert len({tuple(c) for c in colours}) == 5 and colours[3] == [255, 255, 255]
    turned = orientation_rgb(np.array([[3, 21]], np.uint8), published=True)[0].tolist()
    assert turned[0] == turned[1]


def test_labels_need_no_torch():
    code = "import sys, aerial_nb.roads.orientation; print(sorted({'torch', 'fastai', 'matplotlib'} & {m.split('.')[0] for m in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert found.stdout.strip() == "[]", found.stderr
