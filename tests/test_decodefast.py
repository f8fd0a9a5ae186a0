"The fast parts of decoding are the plain ones, to the bit."
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, maximum_filter

from aerial_nb.roads.decode import _blur, _middle, _own_pixels, _peaks, _weights


def test_the_median_of_nine():
    "A network of exchanges that sorts out the middle of all noughts and ones does so for all numbers."
    for nine in product((0., 1.), repeat=9): assert _middle(*nine) == sorted(nine)[4]
    for nine in np.random.default_rng(0).normal(size=(200, 9)): assert _middle(*nine) == np.median(nine)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (3, 40), (40, 2), (33, 57)])
@pytest.mark.parametrize("sigma", [1, 3])
def test_blur_and_peaks_are_scipys(shape, sigma):
    rng = np.random.default_rng(sum(shape))
    for dense in (.05, 1.):
        picture = rng.random(shape) * (rng.random(shape) < dense)
        smooth = _blur(picture, _weights(sigma))
        assert np.array_equal(smooth, gaussian_filter(picture, sigma))
        for flat in (smooth, np.round(smooth, 1)):
            assert np.array_equal(_peaks(flat, .05), np.argwhere((maximum_filter(flat, 3) == flat) & (flat > .05)))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_own_pixels_are_those_that_no_other_vertex_is_nearer_to(seed):
    rng = np.random.default_rng(seed)
    ids = np.where(rng.random((7, 8)) < .25, np.arange(56).reshape(7, 8), -1).astype(np.int32)
    own, near = np.empty((9, 2), np.int64), np.empty((24, 2), np.int64)
    for r, c in np.argwhere(ids >= 0):
        n = _own_pixels(ids, ids[r, c], r, c, own, near)
        want = [(y, x) for y in range(max(r - 1, 0), min(r + 2, 7)) for x in range(max(c - 1, 0), min(c + 2, 8))
                if not any(ids[v, u] >= 0 and (v, u) != (r, c) and (v - y)**2 + (u - x)**2 < (y - r)**2 + (x - c)**2
                           for v in range(max(y - 1, 0), min(y + 2, 7)) for u in range(max(x - 1, 0), min(x + 2, 8)))]
        assert own[:n].tolist() == [list(map(int, w)) for w in want]
