"Grids, counts, the centre crop, weights and putting back."
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aerial_nb.data.grid import (EDGES, WINDOW, Mosaic, as_slices, blended_rows, centre_crop, grid_windows, integral, put_back, ramp,
                                 rings, shared_px, spiral_rank, window_counts, window_starts, window_weights)

KINDS = "ramp", "cosine", "rings", "flat"
quick = settings(max_examples=60, deadline=None)


@st.composite
def grids(draw, most=70):
    "A shape, windows over it, and the size and overlap they were made with."
    shape = draw(st.tuples(st.integers(1, most), st.integers(1, most)))
    size = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    overlap = tuple(draw(st.integers(0, side - 1)) for side in size)
    if max(shape) > 12 * min(size[0] - overlap[0], size[1] - overlap[1]): overlap = (0, 0)  # thousands of windows teach no more
    return shape, grid_windows(shape, size, overlap, draw(st.sampled_from(EDGES))), size, overlap


# ---- windows

@settings(max_examples=200, deadline=None)
@given(grids())
def test_a_grid_covers_every_pixel_and_stays_inside(grid):
    shape, windows, size, overlap = grid
    seen = np.zeros(shape, int)
    for window in windows:
        rows, cols = as_slices(window)
        assert 0 <= rows.start < rows.stop <= shape[0] and 0 <= cols.start < cols.stop <= shape[1]
        assert rows.stop - rows.start <= size[0] and cols.stop - cols.start <= size[1]
        seen[rows, cols] += 1
    assert seen.min() >= 1
    assert len(np.unique(windows)) == len(windows) and windows.dtype == WINDOW
    assert windows[["row", "col"]].tolist() == sorted(windows[["row", "col"]].tolist())
    assert all(now <= max(asked, 0) or len(np.unique(windows[axis])) == 2 or now == asked
               for axis, now, asked in zip(("row", "col"), shared_px(windows), overlap))


@pytest.mark.parametrize("shape", [(1024, 1023), (5000, 5000), (100, 90), (1, 900), (900, 1), (512, 512), (513, 512)])
def test_sizes_that_people_have(shape):
    for edge in EDGES:
        windows = grid_windows(shape, 512, 64, edge)
        plain = np.zeros(shape, np.uint8)
        for row, col, height, width in windows: plain[row:row + height, col:col + width] = 1
        assert plain.all()
        if edge == "shift": assert set(windows["height"]) == {min(512, shape[0])} and set(windows["width"]) == {min(512, shape[1])}


@given(st.integers(1, 90), st.integers(1, 60))
def test_cut_without_overlap_is_a_partition(length, size):
    starts = window_starts(length, size, 0, "cut")
    assert starts == list(range(0, length, size))


def test_no_window_lies_inside_its_neighbour():
    assert window_starts(100, 40, 30, "cut") == [0, 10, 20, 30, 40, 50, 60]
    assert window_starts(101, 40, 30, "cut")[-1] == 70


@pytest.mark.parametrize("wrong", [((10, 10), 0, 0), ((10, 10), 4, 4), ((10, 10), 4, -1), ((0, 10), 4, 0), ((10, 10), (4, 8), (3, 8))])
def test_impossible_grids_are_refused(wrong):
    with pytest.raises(ValueError, match="overlap must be|nothing to cover"):
        grid_windows(*wrong)
    with pytest.raises(ValueError, match="shift, cut"):
        grid_windows((9, 9), 4, 0, "pad")


# ---- counts

@quick
@given(grids(40), st.integers(0, 99), st.sampled_from(["bool", "uint8", "int16"]))
def test_counts_as_summed_plainly(grid, seed, dtype):
    shape, windows, *_ = grid
    plane = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)
    assert window_counts(plane, windows).tolist() == [plane[as_slices(w)].sum() for w in windows]


def test_counts_do_not_overflow():
    plane = np.full((300, 300), 60000, "uint16")
    assert integral(plane)[-1, -1] == 300 * 300 * 60000
    assert window_counts(plane, grid_windows(plane.shape, 300)) == [5_400_000_000]


def test_counts_outside_are_refused():
    with pytest.raises(ValueError, match="leaves the plane of 9 x 9"):
        window_counts(np.ones((9, 9), bool), grid_windows((10, 9), 5))
    assert window_counts(np.ones((9, 9), bool), np.empty(0, WINDOW)).shape == (0,)


# ---- the centre crop

def plain_spiral(rings):
    "Steps in the order of a square spiral, walked one by one."
    yield 0, 0
    for k in range(1, rings + 1):
        i, j = -k, -k
        for di, dj in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            for _ in range(2 * k):
                yield i, j
                i, j = i + di, j + dj


def test_the_spiral_as_walked():
    walk = list(plain_spiral(5))
    assert spiral_rank(*np.transpose(walk)).tolist() == list(range(len(walk))) == list(range(121))


def plain_centre(mask, size, least, step):
    height, width = (min(size, side) for side in mask.shape)
    last = mask.shape[0] - height, mask.shape[1] - width
    reach = [-(-max(n // 2, n - n // 2) // step) for n in last]
    best = (-1, None)
    for i, j in plain_spiral(max(reach)):
        places = []
        for at, n in zip((i, j), last):
            below, above = -(-(n // 2) // step), -(-(n - n // 2) // step)
            places.append(min(max(n // 2 + at * step, 0), n) if -below <= at <= above else None)
        if None in places: continue
        part = mask[places[0]:places[0] + height, places[1]:places[1] + width]
        share = ((part > 0) & (part != 255)).sum() / (height * width)
        if share >= least - 1e-12: return (*places, height, width), share, True
        if share > best[0]: best = share, (*places, height, width)
    return best[1], best[0], False


@quick
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.integers(1, 9), st.sampled_from([0.05, 0.3, 0.9]), st.integers(0, 99))
def test_the_crop_as_found_plainly(rows, cols, size, step, least, seed):
    mask = np.random.default_rng(seed).choice([0, 1, 2, 255], (rows, cols), p=[0.75, 0.1, 0.05, 0.1]).astype("uint8")
    mask[:, : cols // 2] = 0
    crop = centre_crop(mask, size, least, step)
    window, share, enough = plain_centre(mask, size, least, step)
    assert (crop.window, crop.share, crop.enough) == (window, pytest.approx(share), enough)


def test_the_centre_is_taken_when_it_is_enough():
    mask = np.zeros((101, 100), "uint8")
    mask[40:60, 40:60] = 1
    assert centre_crop(mask, 40) == centre_crop(mask > 0, 40)
    assert centre_crop(mask, 40).window == (30, 30, 40, 40) and centre_crop(mask, 40).rank == 0


def test_the_corner_is_reached():
    mask = np.zeros((500, 500), "uint8")
    mask[-20:, -20:] = 1
    crop = centre_crop(mask, 64, min_positive=400 / 4096, step=50)
    assert crop.window == (436, 436, 64, 64) and crop.enough


@pytest.mark.parametrize("wrong", [(0, None), (8, 0)])
def test_impossible_crops_are_refused(wrong):
    with pytest.raises(ValueError, match="1 pixel or more"):
        centre_crop(np.ones((20, 20), bool), wrong[0], step=wrong[1])


# ---- weights

@quick
@given(grids(), st.sampled_from(KINDS))
def test_weights_sum_to_one_everywhere(grid, kind):
    shape, windows, _, overlap = grid
    total = np.zeros(shape)
    for window in windows: total[as_slices(window)] += window_weights(window["height"], window["width"], overlap, kind)
    shares = np.zeros(shape)
    for window in windows:
        shares[as_slices(window)] += window_weights(window["height"], window["width"], overlap, kind) / total[as_slices(window)]
    np.testing.assert_allclose(shares, 1, rtol=0, atol=1e-12)


def test_the_published_rings():
    weights = rings(352, 352)
    assert weights[176, :90].tolist() == [0.001] * 32 + [0.5] * 24 + [1.0] * 32 + [1.5] * 2
    assert weights[40, 176] == 0.5 and weights[10, 60] == 0.001
    np.testing.assert_array_equal(weights, weights[::-1, ::-1])
    np.testing.assert_array_equal(rings(176, 176), weights[::2, ::2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_weights_are_symmetric_and_never_zero(kind, size):
    for overlap in (0, size // 2, size - 1, 10 * size):
        weights = window_weights(size, size, overlap, kind)
        assert weights.min() > 0
        np.testing.assert_allclose(weights, weights[::-1, ::-1], rtol=1e-12)
        np.testing.assert_allclose(weights, weights.T, rtol=1e-12)


def test_neighbouring_ramps_add_up_to_one():
    for overlap in (1, 5, 16):
        np.testing.assert_allclose(ramp(32, overlap)[-overlap:] + ramp(32, overlap)[:overlap], 1)
        np.testing.assert_allclose(np.sin(np.pi / 2 * ramp(32, overlap)[-overlap:]) ** 2 + np.sin(np.pi / 2 * ramp(32, overlap)[:overlap]) ** 2, 1)


@pytest.mark.parametrize("weights", ["hann", lambda h, w: np.zeros((h, w)), lambda h, w: np.ones((h, w + 1))])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="ramp, cosine|above zero everywhere"):
        put_back([np.ones((4, 4))], grid_windows((4, 4), 4), (4, 4), weights)


# ---- putting back

def extremes(dtype, shape, seed):
    "Values over the whole range of a type, with the largest, the smallest and the odd ones."
    rng, dtype = np.random.default_rng(seed), np.dtype(dtype)
    if dtype.kind == "f":
        image = rng.standard_normal(shape) * 10.0 ** rng.integers(-12, 12, shape)
        odd = [0.0, -0.0, np.inf, -np.inf, np.nan, np.finfo(dtype).tiny / 4, np.finfo(dtype).max, np.finfo(dtype).eps]
    elif dtype.kind == "b": return rng.random(shape) < 0.5
    else: image, odd = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, endpoint=True), [np.iinfo(dtype).min, np.iinfo(dtype).max]
    return np.where(rng.random(shape) < 0.3, rng.choice(odd, shape), image).astype(dtype)


@settings(max_examples=150, deadline=None)
@given(grids(), st.sampled_from(["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32"]), st.sampled_from(KINDS),
       st.booleans(), st.sampled_from([(), (1,), (3,)]), st.integers(0, 999))
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in cast")
def test_what_was_cut_comes_back_to_the_last_bit(grid, dtype, kind, pick, layers, seed):
    shape, windows, *_ = grid
    image = extremes(dtype, (*layers, *shape), seed)
    order = np.random.default_rng(seed).permutation(len(windows))
    parts = [image[..., *as_slices(w)].copy() for w in windows[order]]
    back = put_back(parts, windows[order], shape, kind, pick=pick)
    assert back.dtype == image.dtype and back.shape == image.shape
    np.testing.assert_array_equal(back, image)                                       # NaN where NaN was
    np.testing.assert_array_equal(np.signbit(back), np.signbit(image)) if dtype[0] == "f" else None  # -0.0, too


@quick
@given(grids(), st.sampled_from(KINDS), st.integers(0, 99))
def test_doubles_come_back_to_the_last_digits(grid, kind, seed):
    shape, windows, *_ = grid
    image = np.random.default_rng(seed).standard_normal(shape)
    np.testing.assert_allclose(put_back((image[as_slices(w)] for w in windows), windows, shape, kind), image, rtol=1e-14)
    np.testing.assert_array_equal(put_back((image[as_slices(w)] for w in windows), windows, shape, kind, pick=True), image)


@quick
@given(grids(), st.sampled_from(KINDS), st.booleans(), st.sampled_from([(), (2,)]), st.integers(0, 99))
def test_strips_are_the_same_pixels_in_order(grid, kind, pick, layers, seed):
    shape, windows, *_ = grid
    parts = [np.random.default_rng(seed + i).random((*layers, w["height"], w["width"]), "float32") for i, w in enumerate(windows)]
    whole = put_back(parts, windows, shape, kind, pick=pick)
    at = 0
    for row, strip in blended_rows(parts, windows, shape, kind, pick=pick):
        assert row == at and strip.shape[-2] <= windows["height"].max()
        np.testing.assert_array_equal(strip, whole[..., row:row + strip.shape[-2], :])
        at += strip.shape[-2]
    assert at == shape[0]


def test_the_mean_is_weighted_and_class_numbers_are_taken():
    windows = np.array([(0, 0, 1, 8), (0, 4, 1, 8)], WINDOW)
    parts = [np.zeros((1, 8), "float32"), np.ones((1, 8), "float32")]
    np.testing.assert_allclose(put_back(parts, windows, (1, 12), "flat")[0, 4:8], 0.5)
    np.testing.assert_allclose(put_back(parts, windows, (1, 12))[0], [0, 0, 0, 0, .2, .4, .6, .8, 1, 1, 1, 1], atol=1e-7)
    assert put_back(parts, windows, (1, 12), pick=True)[0].tolist() == [0] * 6 + [1] * 6


def test_parts_that_do_not_fit():
    windows, parts = grid_windows((8, 8), 4), [np.zeros((4, 4), "uint8")] * 4
    for parts_, windows_, shape, message in [
            (parts[:3], windows, (8, 8), "shorter"), (parts, windows[:3], (8, 8), "longer"),
            (parts, windows, (8, 9), "8 pixels of .8, 9. lie in no window"), (parts, windows, (7, 8), "lie inside"),
            ([*parts[:3], np.zeros((4, 3), "uint8")], windows, (8, 8), "size of its window"),
            ([*parts[:3], np.zeros((4, 4), "int16")], windows, (8, 8), "different kinds: int16"),
            ([*parts[:3], np.zeros((2, 4, 4), "uint8")], windows, (8, 8), "different kinds.*layers"),
            ([np.zeros((4, 4), "int64")] * 4, windows, (8, 8), "use int32"), ([], windows[:0], (8, 8), "64 pixels")]:
        with pytest.raises(ValueError, match=message):
            put_back(parts_, windows_, shape)
    big = np.array([[2**62 + 1]])
    assert put_back([big], grid_windows((1, 1), 1), (1, 1), pick=True) == big


def test_strips_need_windows_in_order_and_without_gaps():
    windows = grid_windows((12, 4), 4)
    parts = [np.zeros((4, 4), "uint8")] * 3
    with pytest.raises(ValueError, match="sort the windows by row"):
        list(blended_rows(parts, windows[::-1], (12, 4)))
    with pytest.raises(ValueError, match="lie in no window"):
        list(blended_rows(parts[:2], windows[[0, 2]], (12, 4)))
    with pytest.raises(ValueError, match="lie in no window"):
        list(blended_rows(parts[:2], windows[:2], (12, 4)))


def test_one_part_at_a_time():
    mosaic = Mosaic((4, 6), "flat")
    for window in grid_windows((4, 6), 4, 2)[::-1]: mosaic.add(window, np.full((4, 4), window["col"], "uint8"))
    assert mosaic.result()[0].tolist() == [0, 0, 1, 1, 2, 2]


def test_import_stays_light():
    code = "import sys, aerial_nb.data.grid; sys.exit(bool({'torch', 'fastai', 'rasterio', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
