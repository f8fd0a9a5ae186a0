"""Callbacks, learner, arms and prediction: what must hold whatever the model."""
import json
import logging

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from aerial_nb.data.catalog import synthetic_samples
from aerial_nb.data.loaders import CropDataset, Stats, loaders
from aerial_nb.data.raster import DataError, write_raster
from aerial_nb.data.splits import split_by_scene
from aerial_nb.data.tiles import TileStore, draw_crops, fixed_crops
from aerial_nb.models.zoo import build
from aerial_nb.scenes.predict import blend, predict_pixels, windows
from aerial_nb.training import arms as arms_module
from aerial_nb.training.arms import model_hash, run_arm
from aerial_nb.training.tasks import overfit_task, split_task
from aerial_nb.training.callbacks import NotFinite, Precision
from aerial_nb.training.learner import Recipe, fit, learner_for, pick_precision
from aerial_nb.training.records import Folder

TINY = dict(width=16, blocks=1, tasks="road")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return split_by_scene(synthetic_samples(tmp_path_factory.mktemp("scenes"), n=5, size=160, gsd_m=1, progress=False))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("AERIAL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


# ---- what two arms share

def test_two_arms_see_the_same_crops_in_the_same_order(samples, tmp_path):
    seen = {}
    for name in ("hourglass", "spin"):
        task = split_task(samples, 64, 2, 4, Recipe(epochs=2), TINY, dict(n_valid=2))
        torch.manual_seed(hash(name) % 1000); np.random.seed(len(name))
        model = build(name, **task.arguments)
        model.register_forward_pre_hook(lambda m, x, name=name: seen.setdefault(name, []).append(x[0].sum().item()) if m.training else None)
        fit(learner_for(model, task.dls, task.recipe, Folder(tmp_path / name), quiet=True), task.recipe)
    assert seen["hourglass"] == seen["spin"] and len(set(seen["spin"])) == 4


def test_overfit_trains_and_scores_on_the_same_five_crops(samples, tmp_path):
    task = overfit_task(samples, 64, Recipe(epochs=1), TINY)
    x, y = task.dls.train.one_batch()
    assert len(task.score_on) == 5 and torch.equal(y, torch.stack([torch.from_numpy(j.target) for j in task.score_on]))
    assert not task.choose_on
    result = run_arm(task, "hourglass", 0, Folder(tmp_path / "arm"), quiet=True)
    assert len(result.counts) == 5 and result.threshold == 0.5


def test_a_network_learns_five_crops_by_heart(samples, tmp_path):
    task = overfit_task(samples, 64, Recipe(epochs=60, lr=3e-3, valid_every=20), TINY | dict(width=32))
    counts = run_arm(task, "spin", 0, Folder(tmp_path / "arm"), quiet=True).counts
    assert counts.tp.sum() / (counts.tp + counts.fp + counts.fn).sum() > 0.6


# ---- a loss that is not finite, precision, accumulation

def test_a_nan_stops_and_names_the_crops(samples, tmp_path):
    store = TileStore(samples)
    crops = CropDataset(store, fixed_crops(store, 4, 64), 64)
    dls = loaders(crops, crops, 2, Stats((100,) * 3, (50,) * 3))
    model = build("hourglass", **TINY)
    calls = []
    def poison(module, inputs, outputs):
        calls.append(1)
        return [o * torch.nan for o in outputs] if len(calls) == 2 else outputs
    model.register_forward_hook(poison)
    folder = Folder(tmp_path / "arm")
    with pytest.raises(NotFinite, match="epoch 1, batch 2") as error: fit(learner_for(model, dls, Recipe(epochs=2), folder, quiet=True), Recipe(epochs=2))
    assert crops.describe(2) in str(error.value) and crops.describe(3) in str(error.value) and crops.describe(0) not in str(error.value)
    assert not (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize("amp, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("", torch.float32)])
def test_precision_is_really_on(samples, tmp_path, amp, dtype):
    task, found = overfit_task(samples, 32, Recipe(epochs=1, amp=amp), TINY), set()
    model = build("spin", **task.arguments)
    model.hourglass[0].skip[0][0].body[0].register_forward_hook(lambda m, i, o: found.add(o.dtype))
    learn = learner_for(model, task.dls, task.recipe, Folder(tmp_path / "arm"), quiet=True)
    assert any(isinstance(cb, Precision) for cb in learn.cbs) == bool(amp)
    fit(learn, task.recipe)
    assert found == {dtype} and {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_auto_precision_knows_the_device():
    assert pick_precision("auto", "cpu") in ("", "bf16") and pick_precision("fp16", "cpu") == "fp16" and pick_precision("no", "cpu") == "no"


@pytest.mark.parametrize("field, value", [("lr", 0), ("epochs", -1), ("loss", "mse"), ("schedule", "step"), ("amp", "fp8"), ("accum", 0)])
def test_an_impossible_recipe_is_refused(field, value):
    with pytest.raises(ValueError, match=field): Recipe(**{field: value})


# ---- an honest split

def test_a_split_without_a_part_is_refused(samples):
    with pytest.raises(DataError, match="no tiles in split valid"):
        split_task(samples[samples.split != "valid"], 64, 2, 4, Recipe(), TINY)


def test_different_pixel_sizes_are_said(samples, caplog):
    mixed = samples.assign(gsd_m=[0.5, 1, 1, 1, 1])
    with caplog.at_level(logging.WARNING): split_task(mixed, 64, 2, 4, Recipe(), TINY)
    assert "pixel sizes from 0.5 to 1" in caplog.text


def test_blank_pixels_are_neither_trained_nor_scored_on(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(3):
        image = rng.integers(1, 200, (3, 128, 128), dtype="uint8"); image[:, :, :60] = 255
        mask = np.zeros((1, 128, 128), "uint8"); mask[:, 40:50] = 1      # the road goes on across the blank part
        write_raster(tmp_path / f"{i}.tif", image); write_raster(tmp_path / f"{i}_mask.tif", mask)
        rows.append(dict(image=str(tmp_path / f"{i}.tif"), label=str(tmp_path / f"{i}_mask.tif"), scene=str(i),
                         split=("train", "valid", "test")[i], gsd_m=1.0, fill=(255, 255, 255)))
    task = split_task(pd.DataFrame(rows), 64, 2, 2, Recipe(epochs=1), TINY)
    result = run_arm(task, "hourglass", 0, Folder(tmp_path / "arm"), quiet=True)
    assert result.counts[["tp", "fp", "fn", "tn"]].sum(axis=1).tolist() == [128 * 68]
    assert (result.counts.tp + result.counts.fn).tolist() == [10 * 68]
    x, y = task.dls.train.one_batch()
    assert (y == 255).any() and (x.abs().sum(1)[y == 255] == 0).all()


# ---- the door to the test tiles

def reading_of(folder): return json.loads((folder / "test_read.json").read_text())["readings"]


def test_each_arm_reads_the_test_tiles_once_through_the_door(samples, tmp_path):
    task = split_task(samples, 64, 2, 2, Recipe(epochs=1), TINY, dict(n_valid=2))
    assert len(task.score_on) == (samples.split == "test").sum()
    with pytest.raises(DataError, match="behind their door"): task.score_on[0]
    results = [run_arm(task, "hourglass", seed, Folder(tmp_path / f"arms/hourglass-seed{seed}"), quiet=True) for seed in (0, 1)]
    assert [r["reader"] for r in reading_of(tmp_path)] == ["hourglass-seed0", "hourglass-seed1"]
    assert len({r["model"] for r in reading_of(tmp_path)}) == 2 and {r["split_hash"] for r in reading_of(tmp_path)} == {task.split_hash}
    assert {j.name for j in task.score_on} == set(results[0].counts.image)
    assert not (tmp_path / "arms/hourglass-seed0/test_read.json").exists()


def test_an_arm_that_died_while_it_scored_goes_on_with_the_same_model(samples, tmp_path, monkeypatch):
    folder, recipe = Folder(tmp_path / "arms/hourglass-seed0"), Recipe(epochs=1)
    arguments = (samples, 64, 2, 2, recipe, TINY, dict(n_valid=2))
    def killed(*_): raise KeyboardInterrupt
    monkeypatch.setattr(arms_module, "score_arm", killed)
    with pytest.raises(KeyboardInterrupt): run_arm(split_task(*arguments), "hourglass", 0, folder, quiet=True)
    monkeypatch.undo()
    assert len(reading_of(tmp_path)) == 1 and not (folder / "scores.csv").exists()
    def trained_again(*_, **__): raise AssertionError("trained again after its test tiles were read")
    monkeypatch.setattr(arms_module, "train_arm", trained_again)
    task = split_task(*arguments)
    result = run_arm(task, "hourglass", 0, folder, quiet=True)
    (entry,) = reading_of(tmp_path)
    assert len(entry["again"]) == 1 and len(result.counts) == len(task.score_on) and not (folder / "checkpoint.pt").exists()
    again = split_task(*arguments)      # the run goes on in a third process, to draw its pictures
    assert run_arm(again, "hourglass", 0, folder, quiet=True).counts.equals(pd.read_csv(folder / "scores.csv"))
    assert [j.name for j in again.score_on] == [j.name for j in task.score_on]


def test_a_model_trained_after_the_look_is_not_let_in(samples, tmp_path, monkeypatch):
    folder, arguments = Folder(tmp_path / "arms/hourglass-seed0"), (samples, 64, 2, 2, Recipe(epochs=1), TINY, dict(n_valid=2))
    run_arm(split_task(*arguments), "hourglass", 0, folder, quiet=True)
    for name in ("scores.csv", "arm.json"): (folder / name).unlink()
    with pytest.raises(DataError, match="another model or threshold"): run_arm(split_task(*arguments), "hourglass", 1, folder, quiet=True)


def test_the_hash_of_a_model_sees_weights_and_threshold():
    torch.manual_seed(0)
    one = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    name = model_hash(one, 0.5)
    assert model_hash(one.to(memory_format=torch.channels_last), 0.5) == name != model_hash(one, 0.5001)
    with torch.no_grad(): one[0].bias[0] += 1e-6
    assert model_hash(one, 0.5) != name


# ---- windows

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 130), st.integers(1, 130), st.integers(8, 64), st.data())
def test_windows_cover_and_weights_sum_to_one(rows, cols, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    truth = np.random.default_rng(0).random((rows, cols))
    parts = [(r, c, truth[r, c]) for r, c in windows((rows, cols), size, overlap)]
    assert np.allclose(blend((rows, cols), iter(parts), overlap), truth, atol=1e-6)
    assert all((r.stop - r.start) == min(size, rows) and (c.stop - c.start) == min(size, cols) for r, c, _ in parts)


def test_a_seam_is_less_than_a_shift_by_a_pixel():
    torch.manual_seed(0)
    blur = nn.Conv2d(1, 1, 9, padding=4, bias=False); nn.init.constant_(blur.weight, 1 / 81)
    field = np.kron(np.random.default_rng(0).random((20, 20)), np.ones((8, 8)))[None]
    def probabilities(pixels, valid):
        with torch.no_grad(): return blur(torch.from_numpy(pixels).float())[:, 0].numpy()
    whole, valid = probabilities(field[None], None)[0], np.ones(field.shape[1:], bool)
    inside = (slice(8, -8),) * 2
    seam = np.abs(predict_pixels(probabilities, field, valid, 64, 32) - whole)[inside]
    shift = np.abs(whole - np.roll(whole, 1, 0))[inside]
    assert seam.mean() < shift.mean() / 2


def test_plans_do_not_depend_on_what_was_drawn_before(samples):
    store = TileStore(samples)
    first = draw_crops(store, 6, 64, seed=1, epoch=3)
    np.random.seed(5); torch.manual_seed(5); draw_crops(store, 6, 64, seed=2)
    assert (draw_crops(store, 6, 64, seed=1, epoch=3) == first).all()
