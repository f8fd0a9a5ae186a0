"""Behaviour of aerial_nb.data.warp: every layer goes to the same place, nothing made up is counted."""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aerial_nb.data.augment import d4, inverse
from aerial_nb.data.raster import DataError
from aerial_nb.data.warp import Extra, Layers, Move, cut, ground, turn_classes, turned_deg

K = st.integers(0, 7)
MOVES = st.builds(Move, K, st.floats(-180, 180), st.floats(0.6, 1.7), st.tuples(st.floats(-0.3, 0.3), st.floats(-0.3, 0.3)),
                  st.sampled_from([0, 0, 2.5]), st.integers(0, 99))
EXACT = st.builds(Move, K)
ROWS, COLS = 90, 80


def blobs(seed=0, rows=ROWS, cols=COLS):
    "A mask of a few discs, large enough to be seen at any zoom."
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:rows, :cols]
    discs = [np.hypot(y - rng.uniform(0, rows), x - rng.uniform(0, cols)) < rng.uniform(8, 16) for _ in range(5)]
    return np.any(discs, axis=0).astype("uint8")


def tile(seed=0, dtype="uint8", valid=None, **extras):
    image = np.random.default_rng(seed).integers(0, 120, (3, ROWS, COLS)).astype(dtype)
    valid = np.ones((ROWS, COLS), bool) if valid is None else valid
    return Layers(image, np.where(valid, blobs(seed), 255).astype("uint8"), valid, extras)


def looked_at(move, row, col, size):
    "Row and column in the tile that each pixel of the result looks at, by the definition, without a bend."
    y, x = np.mgrid[:size, :size]
    xy = np.stack([x.ravel(), y.ravel(), np.ones(size**2)])
    source = move.matrix(size) @ xy + np.array([[col], [row]])
    return source[1].reshape(size, size), source[0].reshape(size, size)


# ---- the map

@given(K, st.integers(0, 50), st.integers(0, 40), st.integers(1, 40))
def test_exact_moves_are_those_of_d4(k, row, col, size):
    t = tile()
    out = cut(t, Move(k), row, col, size)
    for name in ("image", "mask", "valid"):
        np.testing.assert_array_equal(getattr(out, name), d4(getattr(t, name)[..., row:row + size, col:col + size], k))
    assert out.shown.all() and out.image.flags.c_contiguous


@settings(max_examples=50, deadline=None)
@given(K, st.integers(3, 45), st.integers(3, 35), st.integers(1, 40))
def test_interpolation_agrees_with_slicing(k, row, col, size):
    "A turn too small to be seen goes the other way through the code, and must find the same pixels."
    t = tile()
    exact, looked = cut(t, Move(k), row, col, size), cut(t, Move(k, 1e-7), row, col, size)
    np.testing.assert_array_equal(looked.image, exact.image)
    np.testing.assert_array_equal(looked.mask, exact.mask)


@settings(max_examples=60, deadline=None)
@given(MOVES, st.integers(-10, 60), st.integers(-10, 50), st.integers(11, 40))
def test_every_pixel_looks_where_the_matrix_says(move, row, col, size):
    move = replace(move, bend_px=0)
    ids = np.arange(ROWS * COLS, dtype="int32").reshape(ROWS, COLS) + 1
    out = cut(tile(ids=Extra(ids)), move, row, col, size)
    y, x = looked_at(move, row, col, size)
    got = out.extras["ids"].array.astype("int64")
    inside = got > 0
    np.testing.assert_array_less(np.abs((got - 1) // COLS - y)[inside], 0.55)
    np.testing.assert_array_less(np.abs((got - 1) % COLS - x)[inside], 0.55)
    beyond = np.maximum.reduce([-y, -x, y - ROWS + 1, x - COLS + 1])  # pixels outside the outermost centres
    assert inside[beyond < -0.05].all() and not inside[beyond > 0.05].any()


def test_the_order_is_that_of_the_docstring():
    dot = np.zeros((65, 65), "uint8")
    dot[32, 48] = 1  # 16 px right of the centre
    where = lambda move: tuple(np.argwhere(cut(Layers(dot[None], dot, dot == dot), move).mask == 1).mean(0).round().astype(int) - 32)
    assert where(Move(1)) == (-16, 0) and where(Move(4)) == (0, -16)
    assert where(Move(angle_deg=90)) == (-16, 0), "against the clock"
    assert where(Move(5)) == (16, 0), "first the flip, then the turn"
    assert where(Move(angle_deg=90, shift=(8 / 65, 0))) == (-16, 8), "the shift comes last"
    assert where(Move(scale=0.5, shift=(0, 8 / 65))) == (8, 8)


# ---- together

@settings(max_examples=60, deadline=None)
@given(MOVES, st.integers(0, 9))
def test_a_band_that_is_the_mask_stays_the_mask(move, seed):
    mask = blobs(seed, 128, 128)
    out = cut(Layers(np.stack([mask * 250, mask, mask]), mask, mask == mask), move, 30, 30, 64)
    counted = out.mask != 255
    red, label = out.image[0] > 125, out.mask == 1
    assert (red == label)[counted].mean() > 0.97 or counted.sum() < 200
    if min(label.sum(), (counted & ~label).sum()) > 300:  # not shifted either: the borders agree on all sides
        assert max(((np.roll(red, step, axis) == label) & counted).sum() for step in (-2, 2) for axis in (0, 1)) < ((red == label) & counted).sum()


@settings(max_examples=60, deadline=None)
@given(MOVES, st.sampled_from(["uint8", "int16", "int32", "int64", "uint16", "uint32"]))
def test_classes_and_ids_stay_themselves(move, dtype):
    ids = (np.arange(ROWS * COLS).reshape(ROWS, COLS) // 997 * 17).astype(dtype)
    t = replace(tile(), mask=np.choose(blobs() + blobs(1), [0, 7, 200]).astype("uint8"), extras={"ids": Extra(ids, fill=3)})
    out = cut(t, move, 20, 10, 50)
    assert set(np.unique(out.mask)) <= {0, 7, 200, 255} and out.mask.dtype == np.uint8
    assert out.extras["ids"].array.dtype == dtype and set(np.unique(out.extras["ids"].array)) <= {3, *np.unique(ids)}


# ---- what is counted

@settings(max_examples=60, deadline=None)
@given(MOVES, st.integers(-20, 80), st.integers(-20, 70))
def test_nothing_beyond_the_tile_is_counted_and_the_picture_goes_on(move, row, col):
    t = tile()
    out = cut(t, move, row, col, 30)
    assert ((out.mask == 255) == ~out.valid).all()
    assert out.shown.all()  # all of it is photographed ground or its mirror
    if not move.bend_px:
        y, x = looked_at(move, row, col, 30)
        beyond = np.maximum.reduce([-y, -x, y - ROWS + 1, x - COLS + 1])
        assert not out.valid[beyond > 0.05].any() and out.valid[beyond < -0.05].all()


@settings(max_examples=60, deadline=None)
@given(MOVES, st.integers(-10, 70), st.integers(-10, 60), st.sampled_from(["uint8", "uint16", "float32"]))
def test_no_data_never_mixes_into_what_is_shown(move, row, col, dtype):
    valid = np.ones((ROWS, COLS), bool)
    valid[:30] = valid[:, 60:] = valid[50, 20] = False
    results = []
    for nothing in (0, 255, np.nan if dtype == "float32" else 77):
        t = tile(dtype=dtype, valid=valid)
        t.image[:, ~valid] = nothing
        results.append(cut(t, move, row, col, 30, fill=9))
    for other in results[1:]:
        np.testing.assert_array_equal(other.image, results[0].image)
        np.testing.assert_array_equal(other.shown, results[0].shown)
    out = results[0]
    assert (out.image[:, ~out.shown] == 9).all() and (out.mask[~out.valid] == 255).all() and not (out.valid & ~out.shown).any()


def test_a_single_lost_pixel_stays_lost():
    valid = np.ones((ROWS, COLS), bool)
    valid[45, 40] = False
    for angle in range(0, 90, 7): assert not cut(tile(valid=valid), Move(angle_deg=angle), 25, 20, 40).valid.all()


def test_a_pixel_without_a_label_is_shown_and_not_counted():
    t = tile()
    t.mask[:] = 255
    out = cut(t, Move(2, 20), 20, 20, 30)
    assert out.valid.all() and (out.mask == 255).all() and out.image.any()


# ---- the window

@settings(max_examples=60, deadline=None)
@given(MOVES, st.integers(-10, 70), st.integers(-10, 60))
def test_nothing_outside_the_window_matters(move, row, col):
    top, left, bottom, right = (o + e for o, e in zip((row, col) * 2, ground(move, 30)))
    t, spoilt = tile(), tile()
    keep = np.zeros((ROWS, COLS), bool)
    keep[max(top, 0):max(bottom, 0), max(left, 0):max(right, 0)] = True
    spoilt.image[:, ~keep], spoilt.mask[~keep], spoilt.valid[~keep] = 255, 9, False
    if top < 0 or left < 0 or bottom > ROWS or right > COLS: return  # the mirror may look elsewhere
    for name in ("image", "mask", "valid"):
        np.testing.assert_array_equal(getattr(cut(t, move, row, col, 30), name), getattr(cut(spoilt, move, row, col, 30), name))


def test_corners_are_real_where_the_tile_has_them():
    big = Layers(np.zeros((1, 200, 200), "uint8"), np.zeros((200, 200), "uint8"), np.ones((200, 200), bool))
    small = Layers(*(a[..., 60:140, 60:140] for a in (big.image, big.mask, big.valid)))
    move = Move(angle_deg=45, scale=0.8)
    assert cut(big, move, 60, 60, 80).valid.all() and cut(small, move).valid.mean() < 0.7


def test_memory_maps_are_read_only_where_needed(tmp_path):
    made = np.memmap(tmp_path / "a", "uint8", "w+", shape=(3, ROWS, COLS))
    made[:] = tile().image
    made.flush()
    image = np.memmap(tmp_path / "a", "uint8", "r", shape=(3, ROWS, COLS))
    for move in (Move(3), Move(3, 30)):
        out = cut(Layers(image, tile().mask, tile().valid), move, 20, 20, 30)
        np.testing.assert_array_equal(out.image, cut(tile(), move, 20, 20, 30).image)
        assert type(out.image) is np.ndarray and out.image.flags.writeable


# ---- types

@pytest.mark.parametrize(("dtype", "value"), [("uint8", 255), ("int8", -100), ("uint16", 65535), ("int16", -32768), ("int32", -2**31), ("uint32", 2**32 - 1),
                                              ("int64", 2**40), ("float16", 0.5), ("float32", 1e30), ("float64", -1e300)])
def test_any_type_and_number_of_bands(dtype, value):
    image = np.full((9, 40, 40), value, dtype)
    out = cut(Layers(image, np.zeros((40, 40), "uint8"), image[0] == image[0]), Move(1, 30, 0.9, bend_px=1), 10, 10, 20)
    assert out.image.dtype == dtype and out.image.shape == (9, 20, 20)
    np.testing.assert_allclose(out.image.astype("float64"), float(np.array(value, dtype)), rtol=1e-6)


def test_ids_of_any_size_survive():
    ids = np.full((ROWS, COLS), 2**60 + 1)
    for move in (Move(1), Move(1, 3)): assert (cut(tile(ids=Extra(ids)), move, 20, 20, 30).extras["ids"].array == 2**60 + 1).all()


@settings(max_examples=40, deadline=None)
@given(MOVES, st.integers(-10, 60), st.integers(-10, 50))
def test_a_copy_of_the_mask_in_another_type_stays_a_copy(move, row, col):
    t = tile()
    out = cut(replace(t, extras={"copy": Extra(t.mask.astype("int64"), fill=255)}), move, row, col, 30)
    np.testing.assert_array_equal(out.extras["copy"].array, out.mask)


def test_a_bend_is_drawn_from_its_seed_and_stays_small():
    x = np.tile(np.arange(ROWS * 4, dtype="float32"), (ROWS * 4, 1))
    t = Layers(x[None], np.zeros(x.shape, "uint8"), x == x)
    bent = [cut(t, Move(bend_px=3, bend_seed=s), 60, 60, 160).image[0] for s in (1, 1, 2)]
    assert np.array_equal(bent[0], bent[1]) and not np.array_equal(bent[0], bent[2])
    off = bent[0] - x[60:220, 60:220]
    assert 1 < np.abs(off).max() <= 3.1
    assert np.diff(bent[0], axis=1).min() > 0.3  # it never folds


# ---- labels that point

@settings(deadline=None)
@given(MOVES, st.floats(0, 360), st.booleans())
def test_directions_turn_like_the_ground(move, angle, clockwise):
    forward = np.linalg.inv(move.matrix(9)[:, :2])  # on (column, row)
    a = np.radians(angle)
    x, y = forward @ (np.cos(a), np.sin(a) if clockwise else -np.sin(a))
    expected = np.degrees(np.arctan2(y if clockwise else -y, x))
    found = turned_deg(move, angle, clockwise)
    assert abs((found - expected + 180) % 360 - 180) < 1e-6 and 0 <= found <= 360


@given(K, st.sampled_from([4, 8, 12, 36, 72]), st.booleans(), st.sampled_from([180, 360]))
def test_classes_of_direction_are_permuted_by_d4_and_come_back(k, bins, clockwise, period):
    if period == 180 and 90 % (180 / bins): return
    classes = np.array([[*range(bins), bins, 255]], "uint8").repeat(2, 0)
    turned = turn_classes(classes, Move(k), bins, period, clockwise)
    assert sorted(turned[0]) == sorted(classes[0]) and (turned[:, bins:] == classes[:, bins:]).all() and turned.dtype == np.uint8
    np.testing.assert_array_equal(turn_classes(turned, Move(inverse(k)), bins, period, clockwise), classes)


@settings(deadline=None)
@given(K, st.floats(-180, 180))
def test_classes_of_direction_are_half_a_class_off_at_most(k, angle):
    move, centres = Move(k, angle), np.arange(36) * 10 + 5
    got = turn_classes(np.arange(36), move) * 10 + 5
    assert np.abs((got - turned_deg(move, centres, clockwise=True) + 180) % 360 - 180).max() <= 5.001


def test_the_hook_gets_the_move():
    seen = []
    t = tile(way=Extra(np.zeros((ROWS, COLS), "uint8"), 255, lambda a, m: seen.append(m) or turn_classes(a, m)))
    out = cut(t, Move(1, 20), 20, 20, 30)
    assert seen == [Move(1, 20)] and set(np.unique(out.extras["way"].array)) <= {25, 255}  # 0 + 5 degrees, up by 110, clockwise


# ---- bad input

def test_what_is_refused():
    t = tile()
    with pytest.raises(DataError, match=r"90 x 80 px is no square crop"): cut(t)
    for row, col in ((90, 0), (0, 80), (-30, 0)):
        with pytest.raises(DataError, match="lies outside a tile of 90 x 80"): cut(t, Move(), row, col, 30)
    with pytest.raises(DataError, match="must have one size"): Layers(t.image, t.mask[1:], t.valid)
    with pytest.raises(DataError, match="bands first"): Layers(t.image[0], t.mask, t.valid)
    with pytest.raises(DataError, match="uint8 with 255.*got bool"): Layers(t.image, t.mask == 1, t.valid)
    for bad in (dict(k=8), dict(scale=0), dict(scale=float("nan")), dict(bend_px=-1)):
        with pytest.raises(ValueError): Move(**bad)


def test_input_is_left_alone():
    t = tile(valid=blobs(3) == 0)
    before = [a.copy() for a in (t.image, t.mask, t.valid)]
    for move in (Move(2), Move(2, 9)): cut(t, move, 60, 50, 30, fill=1).image[:] = 0
    for a, b in zip(before, (t.image, t.mask, t.valid), strict=True): np.testing.assert_array_equal(a, b)
