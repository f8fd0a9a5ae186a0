"""The losses of a graph-tensor against plain loops over pixels, and what they refuse."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerial_nb.training.graphloss import GraphLoss, GraphWeights, graph_losses


def drawn(seed, channels=28, b=2, h=5, w=6):
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(b, channels, h, w)).astype("float32")
    for k in (0, *range(2, 26, 4), *((26,) if channels == 28 else ())):
        target[:, k] = rng.random((b, h, w)) < .3
        target[:, k + 1] = 1 - target[:, k]
    return rng.normal(0, 2, (b, channels, h, w)).astype("float32"), target, rng.random((b, h, w)) < .7


def plain(logits, target, valid, away=.01):
    "The published formulas, a pixel at a time."
    sums, n = dict(vertex=0., edge=0., vector=0., road=0.), 0
    def ce(x, t): return -(t[0] * (x[0] - np.logaddexp(*x)) + t[1] * (x[1] - np.logaddexp(*x)))
    for i, r, c in np.argwhere(valid):
        x, t = logits[i, :, r, c].astype(float), target[i, :, r, c].astype(float)
        m = np.clip(t[0] - away, 0, 1 - away) + away
        n += 1
        sums["vertex"] += ce(x[:2], t[:2])
        for k in range(2, 26, 4):
            sums["edge"] += m * ce(x[k:k + 2], t[k:k + 2]) / 6
            sums["vector"] += m * ((x[k + 2:k + 4] - t[k + 2:k + 4]) ** 2).mean() / 6
        if len(x) == 28: sums["road"] += ce(x[26:], t[26:])
    return {k: v / max(n, 1) for k, v in sums.items()}


@given(seed=st.integers(0, 10**6), channels=st.sampled_from([26, 28]))
@settings(max_examples=12, deadline=None)
def test_as_the_formulas(seed, channels):
    logits, target, valid = drawn(seed, channels)
    got = graph_losses(*map(torch.from_numpy, (logits, target, valid)))
    for name, value in plain(logits, target, valid).items(): assert got[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name
    total = GraphLoss()(*map(torch.from_numpy, (logits, target, valid))).item()
    assert total == pytest.approx(sum(w * got[k].item() for k, w in dict(vertex=1, edge=10, vector=1000, road=.1).items()), rel=1e-5)


def test_invalid_pixels_send_no_gradient():
    logits, target, valid = map(torch.from_numpy, drawn(3))
    logits.requires_grad_()
    GraphLoss()(logits, target, valid).backward()
    assert (logits.grad.abs().sum(1)[~valid] == 0).all() and (logits.grad.abs().sum(1)[valid] > 0).all()


def test_nothing_valid_is_zero_and_has_a_gradient():
    logits, target, valid = map(torch.from_numpy, drawn(4))
    logits.requires_grad_()
    loss = GraphLoss()(logits, target, valid & False)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_a_network_without_road_takes_a_target_with_it_and_not_the_other_way():
    logits, target, _ = map(torch.from_numpy, drawn(5))
    assert graph_losses(logits[:, :26], target)["road"].item() == 0
    with pytest.raises(ValueError, match="road channels"): graph_losses(logits, target[:, :26])


def test_what_does_not_fit_is_refused():
    logits, target, valid = map(torch.from_numpy, drawn(6))
    for wrong in ((logits[..., :-1], target, valid), (logits, target, valid[..., :-1]), (logits[:, :2], target, valid), (logits[0], target, None)):
        with pytest.raises(ValueError): graph_losses(*wrong)
    with pytest.raises(ValueError, match="vector -1"): GraphWeights(vector=-1)


def test_the_parts_are_kept():
    logits, target, valid = map(torch.from_numpy, drawn(7))
    loss = GraphLoss(GraphWeights(vector=0))
    total = loss(logits.requires_grad_(), target, valid)
    assert loss.last.keys() == {"vertex", "edge", "vector", "road"} and not any(v.requires_grad for v in loss.last.values())
    assert total.item() == pytest.approx(loss.last["vertex"].item() + 10 * loss.last["edge"].item() + .1 * loss.last["road"].item(), rel=1e-5)
