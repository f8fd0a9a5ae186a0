"""Metrics written from their definitions, slowly, to check the fast ones against."""
import math

import numpy as np
from scipy import ndimage
from skimage.morphology import skeletonize

IGNORE = 255


def counts(pred, target):
    found = dict.fromkeys(("tp", "fp", "fn", "tn"), 0)
    for p, t in zip(pred.ravel().tolist(), target.ravel().tolist(), strict=True):
        if t == IGNORE: continue
        found[("t" if p == (t == 1) else "f") + ("p" if p else "n")] += 1
    return found


def relaxed_pixels(pred, target, buffer_px):
    "Matched and all road pixels of prediction and label, by the distance of every pair."
    a = np.argwhere(pred & (target != IGNORE))
    b = np.argwhere(target == 1)
    def matched(x, y): return sum(any(math.dist(i, j) <= buffer_px for j in y) for i in x)
    return matched(a, b), len(a), matched(b, a), len(b)


def relaxed_skeleton(pred, target, buffer_px, published=False):
    "The same over skeletons with a square window; published: windows as Python slices, precision over true pixels."
    valid = target != IGNORE
    a, b = skeletonize(pred & valid), skeletonize(target == 1)
    def matched(x, y):
        n = 0
        for r, c in np.argwhere(x):
            top, left = (r - buffer_px, c - buffer_px) if published else (max(r - buffer_px, 0), max(c - buffer_px, 0))
            n += bool(y[top:r + buffer_px + 1, left:c + buffer_px + 1].any())
        return n
    n_true = int(b.sum())
    return matched(a, b), n_true if published else int(a.sum()), matched(b, a), n_true


def boundary_iou(pred, truth, width_px):
    "Cheng et al. 2021: masks minus their erosions by a 3 x 3 square, on a padded image."
    def band(mask):
        padded = np.pad(mask, 1)
        eroded = ndimage.binary_erosion(padded, np.ones((3, 3)), iterations=width_px)
        return mask & ~eroded[1:-1, 1:-1]
    a, b = band(pred), band(truth)
    return (a & b).sum() / (a | b).sum() if (a | b).any() else float("nan")
