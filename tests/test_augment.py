"""Behaviour of aerial_nb.data.augment: the group laws, and that every layer moves alike."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from aerial_nb.data.augment import compose, d4, inverse

K = st.integers(0, 7)
SIDE = st.integers(1, 9)  # odd and even
LAYERS = st.tuples(st.integers(1, 3), SIDE, SIDE)
ARRAYS = LAYERS.flatmap(lambda shape: arrays("uint8", shape))


def distinct(rows, cols):
    "An array in which no two pixels are equal, so that a lost or doubled one shows."
    return np.arange(rows * cols, dtype="int32").reshape(rows, cols)


@given(ARRAYS, K)
def test_inverse_round_trips(array, k):
    back = d4(d4(array, k), inverse(k))
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


@given(SIDE, SIDE, K, K)
def test_composition_is_one_element(rows, cols, first, second):
    array = distinct(rows, cols)
    np.testing.assert_array_equal(d4(d4(array, first), second), d4(array, compose(first, second)))


@given(K, K, K)
def test_group_laws(a, b, c):
    assert compose(compose(a, b), c) == compose(a, compose(b, c))
    assert compose(a, 0) == compose(0, a) == a
    assert compose(a, inverse(a)) == compose(inverse(a), a) == 0


def test_not_commutative_and_each_element_once():
    table = [[compose(a, b) for b in range(8)] for a in range(8)]
    assert all(sorted(line) == list(range(8)) for line in (*table, *zip(*table, strict=True)))
    assert compose(1, 4) != compose(4, 1)


@given(SIDE, SIDE, K)
def test_no_blank_row_every_pixel_once(rows, cols, k):
    turned = d4(distinct(rows, cols), k)
    assert turned.shape == ((cols, rows) if k % 2 else (rows, cols))
    np.testing.assert_array_equal(np.sort(turned.ravel()), np.arange(rows * cols))


def test_eight_different_views():
    views = {d4(distinct(3, 3), k).tobytes() for k in range(8)}
    assert len(views) == 8


@given(SIDE, K)
def test_image_mask_and_valid_move_together(side, k):
    image = np.stack([distinct(side, side)] * 3)
    mask, valid = image[0] % 3, image[0] % 2 == 0
    turned = d4(image, k)
    np.testing.assert_array_equal(d4(mask, k), turned[0] % 3)
    np.testing.assert_array_equal(d4(valid, k), turned[2] % 2 == 0)


@settings(max_examples=40)
@given(ARRAYS, K)
def test_torch_agrees_with_numpy(array, k):
    turned = d4(torch.from_numpy(array.copy()), k)
    assert turned.dtype == torch.uint8
    np.testing.assert_array_equal(turned.numpy(), d4(array, k))


@pytest.mark.parametrize("k", range(8))
def test_quarter_turns_as_numpy_and_input_untouched(k):
    array = np.random.default_rng(0).integers(0, 9, (2, 5, 6))
    before = array.copy()
    np.testing.assert_array_equal(d4(array, k), np.rot90(array[..., ::-1] if k > 3 else array, k % 4, (-2, -1)))
    np.testing.assert_array_equal(array, before)
    assert np.shares_memory(d4(array, k), array)


@pytest.mark.parametrize("k", [-1, 8, 1.5, "1", None])
def test_other_elements_are_refused(k):
    for call in (lambda: d4(np.eye(2), k), lambda: inverse(k), lambda: compose(0, k)):
        with pytest.raises(ValueError, match="from 0 to 7"):
            call()


def test_a_line_has_no_rows_and_columns():
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        d4(np.zeros(3), 1)


def test_import_stays_light():
    code = "import sys, aerial_nb.data.augment; sys.exit('torch' in sys.modules or 'fastai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
