"""Behaviour of aerial_nb.data.sampling: which tiles are drawn, how often, and that it is said."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aerial_nb.data.raster import DataError, write_raster
from aerial_nb.data.sampling import DENSITY, density_table, draw_tiles, draw_weighted, epoch_crops, tile_weights
from aerial_nb.data.tiles import CropRule, TileStore

WIDTHS = [0, 0, 0, 1, 1, 2, 9, 30, 64]  # of a road in 64 columns
SHARES = [w / 64 for w in WIDTHS]


def make_store(folder, masks, valid=None):
    rows = []
    for i, mask in enumerate(masks):
        image = np.full((1, *mask.shape), 7, "uint8")
        row = {"image": write_raster(folder / f"t{i}.png", image), "label": write_raster(folder / f"m{i}.png", mask)}
        rows.append(row | ({"valid": write_raster(folder / f"v{i}.png", valid[i].astype("uint8"))} if valid is not None else {}))
    return TileStore(pd.DataFrame(rows), cache=folder / "cache", progress=False)


def road(width, rows=48): return np.tile((np.arange(64) < width).astype("uint8"), (rows, 1))


@pytest.fixture(scope="module")
def store(tmp_path_factory): return make_store(tmp_path_factory.mktemp("s"), [road(w) for w in WIDTHS])


def test_table(store):
    table = density_table(store)
    np.testing.assert_allclose(table["positive"], SHARES)
    assert (table["counted_px"] == 48 * 64).all()
    groups = [0, 0, 0, 2, 2, 3, 4, 5, 5]
    assert table["group"].tolist() == groups
    for share, group in zip(SHARES, groups, strict=True):
        assert group == 0 and share == 0 or DENSITY[group - 1] <= share < (*DENSITY, 2)[group]


def test_the_share_is_of_counted_pixels(tmp_path):
    valid = np.ones((2, 48, 64), bool)
    valid[0, :, 32:] = False
    table = density_table(make_store(tmp_path, [road(8), road(8)], valid))
    assert table["positive"].tolist() == [0.25, 0.125] and table["counted_px"].tolist() == [48 * 32, 48 * 64]


def test_empty_tiles_are_dropped_counted_and_said(store, caplog):
    weights = tile_weights(store)
    assert (weights[:3] == 0).all() and np.allclose(weights[3:], 1 / 6)
    assert "3 of 9 training tiles hold no positive pixel and are not drawn: t0, t1, t2" in caplog.text
    caplog.clear()
    assert np.allclose(tile_weights(store, drop_empty=False), 1 / 9) and not caplog.text


def test_groups_of_density_are_equally_likely(store):
    weights, group = tile_weights(store, density=True), density_table(store)["group"].to_numpy()
    np.testing.assert_allclose(np.bincount(group, weights)[2:], 0.25)
    weights = tile_weights(store, drop_empty=False, density=True)
    np.testing.assert_allclose(np.bincount(group, weights)[[0, 2, 3, 4, 5]], 0.2)


def test_no_tile_becomes_half_of_the_epoch(tmp_path):
    store = make_store(tmp_path, [road(1, 8)] * 60 + [road(40, 8)])
    even, capped = tile_weights(store, density=True, most=1e9), tile_weights(store, density=True, most=5)
    assert even[-1] == pytest.approx(0.5) and 0.07 < capped[-1] < 0.15 and capped.sum() == pytest.approx(1)


def test_larger_tiles_are_drawn_more_often(tmp_path):
    assert np.allclose(tile_weights(make_store(tmp_path, [road(4, 10), road(4, 30)])), [0.25, 0.75])


def test_nothing_to_draw(tmp_path):
    store = make_store(tmp_path, [road(0)] * 2)
    with pytest.raises(DataError, match="none of the 2 tiles has a positive pixel.*drop_empty=False"): tile_weights(store)
    assert tile_weights(store, drop_empty=False).tolist() == [0.5, 0.5]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 5), st.integers(1, 60))
def test_draws_repeat_and_obey_the_rule(store, seed, epoch, n):
    weights, rules = tile_weights(store, density=True), {CropRule(24): 0.5, CropRule(24, min_positive=0.1): 0.5}
    plan = draw_weighted(store, n, rules, weights, seed, epoch)
    np.testing.assert_array_equal(plan, draw_weighted(store, n, rules, weights, seed, epoch))
    assert len(plan) == n and (weights[plan["tile"]] > 0).all()
    assert (plan["row"] >= 0).all() and (plan["row"] <= 24).all() and (plan["col"] <= 40).all() and set(plan["d4"]) <= set(range(8))
    assert not draw_weighted(store, n, rules, weights, seed, epoch, d4=False)["d4"].any()


def test_draws_follow_the_weights_and_the_shares(store):
    weights = tile_weights(store, density=True)
    plan = draw_weighted(store, 4000, {CropRule(24): 1.0}, weights, seed=3)
    np.testing.assert_allclose(np.bincount(plan["tile"], minlength=9) / 4000, weights, atol=0.03)
    strict = CropRule(24, min_positive=0.3)
    plan = draw_weighted(store, 1000, {CropRule(24): 0.4, strict: 0.6}, weights, seed=3)
    dense = [(store.mask(t)[r:r + 24, c:c + 24] == 1).mean() >= 0.3 for t, r, c, _ in plan.tolist()]
    assert np.mean(dense) > 0.6
    epochs = {draw_weighted(store, 50, {CropRule(24): 1.0}, weights, 3, e).tobytes() for e in range(5)}
    assert len(epochs) == 5


def test_tiles_without_a_place_are_passed_over(store, caplog):
    rule = CropRule(24, min_positive=0.9)
    plan = draw_weighted(store, 30, {rule: 1.0}, tile_weights(store), 0)
    assert set(plan["tile"]) <= {7, 8}
    with pytest.raises(DataError, match="no tile with a weight has a place.*min_positive=0.9"):
        draw_weighted(store, 30, {rule: 1.0}, np.array([1.0] * 7 + [0, 0]), 0)


def test_oversampled_epochs_of_whole_tiles(store):
    weights = tile_weights(store)
    plan = draw_tiles(store, 600, weights, seed=1)
    assert not plan["row"].any() and not plan["d4"].any() and set(plan["tile"]) == set(range(3, 9))
    np.testing.assert_allclose(np.bincount(plan["tile"], minlength=9) / 600, weights, atol=0.06)
    np.testing.assert_array_equal(plan, draw_tiles(store, 600, weights, seed=1))
    assert not np.array_equal(plan, draw_tiles(store, 600, weights, seed=1, epoch=1))


def test_length_of_an_epoch(store):
    assert epoch_crops(store, 24, tile_weights(store)) == -(-6 * 48 * 64 // 24**2) == 32
    assert epoch_crops(store, 24, tile_weights(store, drop_empty=False), times=2) == 96
    assert epoch_crops(store, 5000, tile_weights(store)) == 1


def test_what_is_refused(store):
    weights, rule = tile_weights(store), CropRule(24)
    for bad in (dict(n=0), dict(rules={}), dict(rules={rule: 0.5}), dict(seed=-1), dict(epoch=-1)):
        with pytest.raises(ValueError, match="n >= 1"):
            draw_weighted(**{**dict(store=store, n=5, rules={rule: 1.0}, weights=weights, seed=0), **bad})
    for wrong in (weights[:3], -weights, weights * np.nan):
        with pytest.raises(ValueError, match="one weight of 0 or more for each of 9 tiles"): draw_tiles(store, 5, wrong, 0)
    with pytest.raises(ValueError, match="n >= 1"): draw_tiles(store, 0, weights, 0)
