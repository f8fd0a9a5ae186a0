import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion

from aerial_nb.training.boundary import (
    boundary_iou,
    boundary_pixels,
    boundary_score,
    boundary_width,
    pair_boundary_iou,
)
from aerial_nb.training.counts import IGNORE, boundary_band, boundary_counts


def draw(seed, h=13, w=17, labels=2, ignored=0.1):
    "Blocky labels (h, w), some pixels not to be judged, and another map that is mostly the same."
    rng = np.random.default_rng(seed)
    def coarse(n): return np.kron(rng.integers(0, n, (h // 3 + 1, w // 3 + 1)), np.ones((3, 3), int))[:h, :w]
    target = coarse(labels)
    other = np.where(rng.random((h, w)) < 0.2, coarse(labels), target)
    return other, target, coarse(8) != 0 if ignored else np.ones((h, w), bool)


def plain_band(mask, valid, d):
    "By the definition: a pixel of the mask with a valid background pixel, or the outside, at Chebyshev distance up to d."
    out = np.zeros_like(mask)
    for r, c in np.argwhere(mask):
        for y in range(r - d, r + d + 1):
            for x in range(c - d, c + d + 1):
                inside = 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]
                if not inside or valid[y, x] and not mask[y, x]: out[r, c] = True
    return out


@given(seed=st.integers(0, 10**6), d=st.integers(1, 5), h=st.integers(1, 14), w=st.integers(1, 14))
@settings(max_examples=40, deadline=None)
def test_bands_follow_the_definition(seed, d, h, w):
    pred, target, valid = draw(seed, h, w)
    mask = (target == 1) & valid
    expected = plain_band(mask, valid, d)
    assert np.array_equal(boundary_pixels(mask, d, valid) & mask, expected)
    assert np.array_equal(boundary_band(mask, valid, d), expected)
    class_map = np.where(valid, target, IGNORE).astype(np.uint8)
    other = plain_band((pred == 1) & valid, valid, d)
    union = (expected | other).sum()
    score = boundary_iou(pred == 1, class_map, d)
    assert score == pytest.approx((expected & other).sum() / union) if union else np.isnan(score)
    for width in (d, 40):   # wide bands are made another way
        assert boundary_score(pred == 1, class_map, width) == boundary_counts(pred == 1, class_map, width)


def test_the_edge_of_the_image_is_an_outline_as_in_the_paper():
    full = np.ones((20, 20), np.uint8)
    band = boundary_pixels(full == 1, 3)
    assert band.sum() == 20**2 - 14**2 and not band[3:-3, 3:-3].any()
    mask = np.zeros((20, 30), bool); mask[:9, 4:22] = True
    for d in (1, 2, 4):   # the published code: a rim of background, then d erosions with a 3 x 3 square
        left = binary_erosion(np.pad(mask, 1), np.ones((3, 3)), iterations=d)[1:-1, 1:-1]
        assert np.array_equal(boundary_pixels(mask, d) & mask, mask & ~left)


def test_the_rim_of_blank_pixels_is_no_outline():
    mask, valid = np.ones((30, 30), bool), np.ones((30, 30), bool)
    valid[:, 12:18] = False
    band = boundary_pixels(mask & valid, 2, valid)
    assert not band[5:25, 8:22].any() and band[0].sum() == 24


def test_widths():
    assert boundary_width((300, 400)) == 10 and boundary_width((10, 10)) == 1 and boundary_width((3, 300, 400), 0.01) == 5
    mask = np.zeros((300, 400), np.uint8); mask[50:150, 50:150] = 1
    moved = np.roll(mask, 4, 0) == 1
    assert boundary_iou(moved, mask) == boundary_iou(moved, mask, 10) != boundary_iou(moved, mask, 9)
    assert boundary_iou(moved, mask, 300) == pytest.approx((moved & (mask == 1)).sum() / (moved | (mask == 1)).sum())


@given(seed=st.integers(0, 10**6), d=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_mean_over_classes_is_the_mean_of_each(seed, d):
    pred, target, valid = draw(seed, labels=4)
    class_map = np.where(valid, target, IGNORE).astype(np.uint8)
    each = [boundary_iou(pred == k, (np.where(class_map == IGNORE, IGNORE, class_map == k)).astype(np.uint8), d)
            for k in range(1, 5)]
    assert boundary_iou(pred, class_map, d, classes=range(1, 5)) == pytest.approx(np.nanmean(each))


@given(seed=st.integers(0, 10**6), d=st.integers(1, 3), blank=st.booleans())
@settings(max_examples=25, deadline=None)
def test_single_objects_score_as_masks_of_their_own(seed, d, blank):
    rng = np.random.default_rng(seed)
    proposal, truth, valid = draw(seed, labels=7, ignored=blank)
    pairs = rng.integers(1, 9, (6, 2))
    found = pair_boundary_iou(truth, proposal, pairs, d, valid if blank else None)
    for (t, p), value in zip(pairs, found, strict=True):
        bands = [plain_band((x == k) & valid, valid, d) for x, k in ((truth, t), (proposal, p))]
        union = (bands[0] | bands[1]).sum()
        assert value == pytest.approx((bands[0] & bands[1]).sum() / union) if union else np.isnan(value)


def test_no_pairs_and_nothing_to_compare():
    empty = np.zeros((9, 9), int)
    assert pair_boundary_iou(empty, empty, np.zeros((0, 2), int), 2).shape == (0,)
    assert np.isnan(pair_boundary_iou(empty, empty, [[1, 1]], 2)).all()
    assert np.isnan(boundary_iou(empty == 1, empty))
    assert np.isnan(boundary_iou(empty == 1, np.full((9, 9), 255, np.uint8), 2))
    assert boundary_iou(empty == 0, empty, 2) == 0


def test_bad_input_says_what_to_do():
    mask = np.zeros((8, 8), np.uint8)
    with pytest.raises(ValueError, match="at least 1"): boundary_iou(mask == 1, mask, 0)
    with pytest.raises(ValueError, match="whole number of pixels"): boundary_iou(mask == 1, mask, 1.5)
    with pytest.raises(ValueError, match="share of the diagonal"): boundary_width((8, 8), 0)
    with pytest.raises(TypeError, match="mask of booleans"): boundary_iou(mask * 0.3, mask)
    with pytest.raises(ValueError, match="one size"): boundary_iou(mask[:, :4] == 1, mask)
    with pytest.raises(ValueError, match="one size"): boundary_iou(mask[:4] == 1, mask)
    with pytest.raises(ValueError, match="whole numbers"): boundary_pixels(np.zeros((4, 4)), 1)
