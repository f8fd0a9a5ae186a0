"""Recipes step by step: what each setup sees, what all are scored on, what weights start from, and what a step brought."""
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from aerial_nb.data.catalog import synthetic_samples
from aerial_nb.data.presets import sample_stream
from aerial_nb.data.raster import DataError, read_pixels, write_raster
from aerial_nb.data.tiles import TileStore
from aerial_nb.models import weights as weights_module
from aerial_nb.models.weights import WeightsError
from aerial_nb.models.zoo import build
from aerial_nb.training import recipes
from aerial_nb.training.arms import Arm, run_arm
from aerial_nb.training.learner import Recipe
from aerial_nb.training.metrics import count_image
from aerial_nb.training.records import Folder
from aerial_nb.training.recipes import (SETUPS, Flips, arm_task, both_thresholds, changes, divide, flips, plot_changes, settle_starts,
                                        setup_task, shuffled, without_masks)
from aerial_nb.training.saved import load_card

TINY = dict(width=8, depth=2)
ENCODER = dict(encoder="tu-test_efficientnet")
RECIPE = Recipe(1, 3e-3, optimiser="adam", weight_decay=0, loss="bce_dice", best_by="loss")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AERIAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return synthetic_samples(tmp_path_factory.mktemp("scenes"), n=10, size=128, gsd_m=1, progress=False)


@pytest.fixture(scope="module")
def half_blank(scenes, tmp_path_factory):
    "The right half of every tile is white, said by a mask file; the labels go on across it."
    home, rows = tmp_path_factory.mktemp("half"), []
    for i, row in enumerate(scenes.to_dict("records")):
        image = read_pixels(row["image"])
        seen = np.ones((1, 128, 128), "uint8"); seen[:, :, 64:] = 0
        write_raster(home / f"valid{i}.tif", seen)
        write_raster(home / f"image{i}.tif", np.where(seen, image.data, 255).astype("uint8"), image.crs, image.transform)
        rows.append(row | dict(image=str(home / f"image{i}.tif"), valid=str(home / f"valid{i}.tif")))
    return divide(pd.DataFrame(rows))


def task_of(samples, name, size=64, bs=2, items=0, **loading):
    return setup_task(samples, SETUPS[name], size, bs, RECIPE, TINY, items, dict(progress=False) | loading, buffer_px=3)


# ---- the chain

def test_each_setup_is_one_change_away_from_the_one_before():
    for before, after in pairwise(SETUPS.values()):
        differ = [f for f in ("masked", "native", "schedule", "tuned") if getattr(before, f) != getattr(after, f)]
        assert len(differ) == 1, (before.name, after.name, differ)
    assert list(SETUPS)[0] == "published" and list(SETUPS)[-1] == "ours"


# ---- the split

@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 50))
def test_the_test_does_not_depend_on_the_seed_of_the_rest(scenes, seed):
    one, two = divide(scenes), divide(scenes, seed)
    assert list(one.image[one.split == "test"]) == list(two.image[two.split == "test"])
    assert two.split.value_counts().to_dict() == dict(train=6, valid=2, test=2) and list(two.image) == list(scenes.image)


def test_a_place_stays_on_one_side(scenes):
    table = divide(scenes.assign(scene=[f"place {i // 2}" for i in range(10)]))
    assert table.groupby("scene").split.nunique().max() == 1 and set(table.split) == {"train", "valid", "test"}


def test_a_split_that_is_there_is_kept_and_an_empty_part_refused(scenes):
    given_split = scenes.assign(split=["test"] * 2 + ["valid"] * 3 + ["train"] * 5)
    assert list(divide(given_split).split) == list(given_split.split)
    for part in ("train", "valid", "test"):
        with pytest.raises(DataError, match=f"no tiles in split {part}.*give more tiles"): divide(given_split[given_split.split != part])
    with pytest.raises(DataError, match="in no split"): divide(given_split.assign(split=["", *given_split.split[1:]]))
    with pytest.raises(DataError, match="cannot be divided"): divide(scenes.head(2))


# ---- what is seen

def test_flips_never_exchange_rows_and_columns():
    moves = [Flips().draw(sample_stream(0, epoch, i)) for epoch in range(3) for i in range(100)]
    assert {m.k for m in moves} == {0, 2, 4, 6}
    assert all((m.angle_deg, m.scale, m.shift, m.bend_px) == (0, 1, (0, 0), 0) for m in moves)


def test_imagenets_statistics_are_for_colour_bytes_alone():
    assert flips(3, "uint8").stats and not flips(4, "uint8").stats and not flips(3, "uint16").stats


@settings(deadline=None)
@given(tiles=st.integers(1, 9), items=st.integers(1, 30), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_an_epoch_shows_every_tile_before_any_twice(tiles, items, seed, epoch):
    plan = shuffled(tiles, items, seed, epoch)
    times = np.bincount(plan["tile"], minlength=tiles)
    assert len(plan) == items and len(times) == tiles and times.max() - times.min() <= 1
    assert plan[["row", "col", "d4"]].tolist() == [(0, 0, 0)] * items
    assert (plan == shuffled(tiles, items, seed, epoch)).all()


def test_a_squeezed_epoch_is_all_tiles_and_anew_in_the_next(scenes):
    data = task_of(divide(scenes), "published").dls.train.dataset
    first = list(data.plan["tile"]); data.set_epoch(1)
    assert sorted(first) == sorted(data.plan["tile"]) == list(range(6)) and first != list(data.plan["tile"])


def test_both_ends_have_the_same_steps_and_size(scenes):
    samples = divide(scenes)
    one, two = (task_of(samples, name, items=items) for name, items in (("published", 0), ("ours", 0)))
    assert len(one.dls.train) == len(two.dls.train) == 3
    assert one.dls.train.one_batch()[0].shape == two.dls.train.one_batch()[0].shape == (2, 3, 64, 64)
    assert (one.squeeze, two.squeeze) == (64, 0) and (one.recipe.schedule, two.recipe.schedule) == ("flat", "one_cycle")
    assert len(task_of(samples, "ours", items=10).dls.train) == len(task_of(samples, "published", items=10).dls.train) == 5
    assert len(task_of(samples, "published", bs=8).dls.train) == 1, "a batch at least"


def test_seeds_draw_other_orders(scenes):
    samples = divide(scenes)
    plans = [list(task_of(samples, "published", seed=s).dls.train.dataset.plan["tile"]) for s in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


# ---- labels without an image

def test_published_learns_blank_labels_and_nobody_is_scored_on_them(half_blank, tmp_path):
    published, masked = (task_of(half_blank, name) for name in ("published", "masked"))
    counted = [float((t.dls.train.one_batch()[1] != 255).float().mean()) for t in (published, masked)]
    assert counted == pytest.approx([1, .5], abs=.02)
    white = published.dls.train.one_batch()[0]
    assert white.amax() == pytest.approx((1 - .406) / .225, abs=1e-4), "white as ImageNet's statistics have it"
    for ours, theirs in zip(published.choose_on, masked.choose_on, strict=True):
        assert (ours.target == theirs.target).all() and (ours.target[:, 64:] == 255).all() and ours.valid.all() and not theirs.valid[:, 64:].any()
    with pytest.raises(DataError, match="behind their door"): published.score_on[0]
    results = [run_arm(arm_task(t, SETUPS[n]), Arm(n, "unet"), 0, Folder(tmp_path / "run/arms" / n), quiet=True)
               for n, t in (("published", published), ("masked", masked))]
    one, two = (r.counts for r in results)
    assert ((one.tp + one.fn) == (two.tp + two.fn)).all() and (one[["tp", "fp", "fn", "tn"]].sum(1) == 128 * 64).all()
    assert published.score_on[0].valid.all() and not masked.score_on[0].valid[:, 64:].any()


def test_setting_masks_aside_touches_nothing_else(half_blank):
    bare = without_masks(half_blank)
    assert (bare.valid == "").all() and half_blank.valid.str.len().min() > 0
    assert TileStore(bare, progress=False).valid(0).all()
    assert bare.drop(columns=["valid", "fill"]).equals(half_blank.drop(columns=["valid", "fill"], errors="ignore"))


def test_labels_of_one_class_are_refused(scenes, tmp_path):
    empty = scenes.copy()
    for i in range(len(empty)):
        write_raster(tmp_path / f"{i}.tif", np.zeros((1, 128, 128), "uint8")); empty.loc[i, "label"] = str(tmp_path / f"{i}.tif")
    for name in ("published", "ours"):
        with pytest.raises(DataError, match="positive"): task_of(divide(empty), name)


# ---- thresholds

@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    task, folder = task_of(divide(scenes), "ours"), tmp_path_factory.mktemp("run") / "arms"
    made = {n: run_arm(arm_task(task, SETUPS[n]), Arm(n, "unet"), 0, Folder(folder / n), quiet=True) for n in ("one_cycle", "ours")}
    return task, made


def test_the_saved_threshold_is_that_of_the_setup(trained):
    task, made = trained
    cuts = both_thresholds(task, made["ours"])
    assert load_card(made["one_cycle"].folder.path).threshold == 0.5
    assert load_card(made["ours"].folder.path).threshold == cuts.threshold == cuts.curve.best("iou")


def test_one_training_is_cut_at_both(trained):
    task, made = trained
    fixed, tuned = (both_thresholds(task, made[n]) for n in ("one_cycle", "ours"))
    assert fixed.threshold == tuned.threshold, "the same weights, seed and crops"
    pd.testing.assert_frame_equal(fixed.half, made["one_cycle"].counts, check_dtype=False)
    pd.testing.assert_frame_equal(tuned.tuned, made["ours"].counts, check_dtype=False)
    pd.testing.assert_frame_equal(fixed.at(SETUPS["ours"]), tuned.tuned)
    pd.testing.assert_frame_equal(tuned.at(SETUPS["one_cycle"]), fixed.half)
    best = fixed.curve.frame()
    assert best.iou.iloc[1:-1].max() == pytest.approx(best.iou[best.threshold == fixed.threshold].item())


# ---- weights

@pytest.fixture
def no_hub(monkeypatch):
    def refuse(source, seconds=0): raise WeightsError(f"no {source.tag} weights for encoder {source.encoder}: no network")
    monkeypatch.setattr(weights_module, "fetch", refuse)


def test_auto_without_a_hub_is_random_and_says_so(no_hub, caplog):
    (start,) = settle_starts("auto", ENCODER)
    assert (start.label, start.weights) == ("random", "") and "could not be had" in start.says and "no network" in start.says
    assert "RANDOM" in caplog.text
    assert settle_starts("", ENCODER) == settle_starts("random", ENCODER) and "as asked for" in settle_starts("", ENCODER)[0].says


def test_imagenet_without_a_hub_is_an_error(no_hub):
    with pytest.raises(WeightsError, match="no imagenet weights for encoder"): settle_starts("random,imagenet", ENCODER)


def test_imagenet_where_it_can_be_had(monkeypatch, tmp_path):
    torch.save(build("smp", **ENCODER, weights="").encoder.state_dict(), tmp_path / "w.pth")
    monkeypatch.setattr(weights_module, "fetch", lambda source, seconds=0: tmp_path / "w.pth")
    starts = settle_starts("auto,random", ENCODER)
    assert [(s.label, s.weights) for s in starts] == [("imagenet", "imagenet"), ("random", "")] and "imagenet (tu-test_efficientnet" in starts[0].says


def test_files_by_their_names(tmp_path, no_hub, caplog):
    state = build("smp", **ENCODER, weights="").encoder.state_dict()
    for name in ("my weights.pth", "b.pth", "c/b.pth"): (tmp_path / name).parent.mkdir(exist_ok=True); torch.save(state, tmp_path / name)
    mine, chance = settle_starts(f"{tmp_path / 'my weights.pth'}, random", ENCODER)
    assert (mine.label, mine.weights, chance.label) == ("my_weights", str(tmp_path / "my weights.pth"), "random")
    assert "my weights.pth" in mine.says and str(tmp_path) not in mine.says
    with pytest.raises(WeightsError, match="no such file"): settle_starts(f"{tmp_path / 'none.pth'},random", ENCODER)
    with pytest.raises(WeightsError, match="is not for this encoder"): settle_starts(str(tmp_path / "b.pth"), dict(encoder="resnet18"))
    with pytest.raises(WeightsError, match="two starts of one name"): settle_starts(f"{tmp_path / 'b.pth'},{tmp_path / 'c/b.pth'}", ENCODER)
    assert [s.label for s in settle_starts(f"one={tmp_path / 'b.pth'},two={tmp_path / 'c/b.pth'}", ENCODER)] == ["one", "two"]
    assert len(settle_starts("auto,random", ENCODER)) == 1 and "twice" in caplog.text


def test_unknown_names_end_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr(weights_module, "fetch", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="did you mean 'unet'"): settle_starts("auto", dict(architecture="unett"))
    with pytest.raises(ValueError, match="did you mean 'resnet34'"): settle_starts("auto", dict(encoder="resnet43"))


# ---- what a step brought

def counts_of(shift: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(6):
        target = (rng.random((24, 24)) < .3).astype("uint8")
        rows.append(count_image(np.roll(target, shift, 1) == 1, target, f"i{i}", f"s{i}", buffer_px=3))
    return pd.DataFrame(rows)


def test_changes_are_paired_differences_and_add_up():
    chain = dict(a=counts_of(2), b=counts_of(1), c=counts_of(0))
    found = changes(chain)
    assert list(found) == ["a to b", "b to c", "a to c"] and set(found["a to b"]) == {"iou", "f1", "relaxed_f1"}
    total = lambda s: found["a to b"][s].value + found["b to c"][s].value
    for s in ("iou", "f1", "relaxed_f1"): assert total(s) == pytest.approx(found["a to c"][s].value)
    assert found["b to c"]["iou"].distinguishable and found["b to c"]["iou"].value > 0
    assert list(changes(dict(a=chain["a"], b=chain["b"]))) == ["a to b"] and changes(dict(a=chain["a"])) == {}
    with pytest.raises(ValueError): changes(dict(a=chain["a"], b=chain["b"].head(5)))


def test_the_picture_of_the_steps_shows_every_score(tmp_path):
    show = lambda v, low: recipes.Interval(v, low, v + .1, .95, "iou", 3, 3, 1)
    fig = plot_changes(dict(x=dict(a=show(.3, .2), b=show(.5, .4)), y=dict(a=show(.2, float("nan")), b=show(.4, .3))))
    said = {t.get_text() for t in fig.axes[0].texts}
    assert said == {"0.300", "0.500", "0.200", "0.400"} and [t.get_text() for t in fig.axes[0].get_xticklabels()] == ["a", "b"]
    fig.savefig(tmp_path / "a.png")
