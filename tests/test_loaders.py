"""Behaviour of aerial_nb.data.loaders: what reaches the network, in which order, on any number of workers."""
import json
import random
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner

from aerial_nb.data.loaders import (
    CropDataset, EpochCrops, Stats, batch_rgb, channel_stats, crop_loaders, loaders, to_rgb, value_limits)
from aerial_nb.data.presets import Augment
from aerial_nb.data.raster import DataError, write_raster
from aerial_nb.data.tiles import TileStore, draw_crops, fixed_crops, grid_crops, read_crop
from aerial_nb.data.warp import Layers

REAL = Path(__file__).parents[1] / "../shared/data"


def make_store(folder, images, masks=None, valid=None, **options):
    folder.mkdir(exist_ok=True)
    rows = []
    for i, image in enumerate(images):
        mask = np.zeros(image.shape[1:], "uint8") if masks is None else masks[i]
        row = {"image": write_raster(folder / f"t{i}.tif", image), "label": write_raster(folder / f"t{i}.png", mask)}
        rows.append(row | ({"valid": write_raster(folder / f"v{i}.png", valid[i].astype("uint8"))} if valid is not None else {}))
    return TileStore(pd.DataFrame(rows), cache=folder / "cache", progress=False, **options)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 250, (3, 3, 90, 80), dtype="uint8")
    images[1, :, :, :30] = 255
    return make_store(tmp_path_factory.mktemp("s"), images, (rng.random((3, 90, 80)) < 0.2).astype("uint8"), fill=255)


@pytest.fixture(scope="module")
def stats(store): return channel_stats(store)


def drawn(store, n=20, size=32, seed=4, **draw):
    return CropDataset(store, partial(draw_crops, store, n, size, seed, **draw), size)


# ---- statistics

@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_stats_over_valid_pixels_only(tmp_path, dtype):
    rng = np.random.default_rng(1)
    images = (rng.normal(100, 20, (2, 4, 50, 60)) + np.arange(4)[:, None, None] * 9).astype(dtype)
    valid = rng.random((2, 50, 60)) < 0.6
    images[:, :, 0] = 255
    valid[:, 0] = False
    if dtype == "float32": images[0, :, 0, 0] = np.nan
    found = channel_stats(make_store(tmp_path, images, valid=valid))
    seen = images.transpose(1, 0, 2, 3)[:, valid].astype("float64")
    np.testing.assert_allclose(found.mean, seen.mean(1), rtol=1e-12 if dtype[0] != "f" else 1e-6)
    np.testing.assert_allclose(found.std, seen.std(1), rtol=1e-12 if dtype[0] != "f" else 1e-6)
    assert found.dtype == dtype and len(found.mean) == 4


def test_stats_do_not_overflow(tmp_path):
    image = np.full((1, 700, 700), 65535, "uint16")
    image[0, 0] = 65534
    found = channel_stats(make_store(tmp_path, [image]))
    assert abs(found.mean[0] - (65535 - 1 / 700)) < 1e-9 and abs(found.std[0] - (699**0.5 / 700)) < 1e-9


def test_stats_of_nothing_and_of_one_value(tmp_path, caplog):
    with pytest.raises(DataError, match="none of the 1 tiles has a valid pixel"):
        channel_stats(make_store(tmp_path / "blank", [np.full((3, 9, 9), 255, "uint8")], fill=255))
    flat = channel_stats(make_store(tmp_path / "flat", [np.full((1, 9, 9), 7, "uint8")]))
    assert (flat.mean, flat.std) == ((7.0,), (1.0,)) and "one value throughout" in caplog.text


def test_stats_survive_json_and_refuse_nonsense(stats):
    assert Stats(**json.loads(json.dumps(asdict(stats)))) == stats
    for mean, std in (((1, 2), (1,)), ((1,), (0,)), ((1,), (-1,)), ((float("nan"),), (1,)), ((), ())):
        with pytest.raises(ValueError, match="one finite mean and one positive std"):
            Stats(mean, std)


# ---- normalisation

@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float32, torch.float64])
def test_normalise_and_back(dtype):
    raw = torch.randint(0, 250, (2, 3, 5, 6)).to(dtype)
    stats = Stats((10, 100, 50), (5, 20, 60))
    out = stats.normalise(raw)
    expected = (raw.double() - torch.tensor([10.0, 100, 50])[:, None, None]) / torch.tensor([5.0, 20, 60])[:, None, None]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.denormalise(out).double(), raw.double(), rtol=1e-4, atol=1e-3)
    assert stats.normalise(raw[0]).shape == (3, 5, 6)


@pytest.mark.parametrize("nothing", [255.0, float("nan"), float("inf"), -1e38])
def test_no_data_becomes_the_mean_whatever_it_held(nothing):
    raw, valid = torch.full((2, 1, 4, 4), 3.0), torch.ones(2, 4, 4, dtype=torch.bool)
    valid[0, 0], raw[0, :, 0] = False, nothing
    before = raw.clone()
    out = Stats((1,), (2,)).normalise(raw, valid)
    assert (out[0, :, 0] == 0).all() and (out[0, :, 1:] == 1).all()
    torch.testing.assert_close(raw, before, equal_nan=True)


def test_bands_must_agree(stats):
    with pytest.raises(DataError, match="4 bands, normalisation for 3"):
        stats.normalise(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


def test_white_does_not_leak_into_batches(store, stats):
    ds = drawn(store, min_valid=0.1)
    for xb, yb in loaders(ds, ds, 4, stats).train:
        blank = (yb == 255)[:, None].expand_as(xb)
        assert (xb[blank] == 0).all() and xb[~blank].std() > 0.5
        assert xb.dtype == torch.float32 and yb.dtype == torch.uint8 and type(xb) is torch.Tensor


def test_a_picture_without_a_label_is_seen_and_not_counted(tmp_path):
    mask = np.zeros((20, 20), "uint8")
    mask[:10] = 9
    st = make_store(tmp_path, [np.random.default_rng(0).integers(0, 99, (3, 20, 20), dtype="uint8")], [mask], labels={"classes": {0: 0, 9: 255}})
    xb, yb = loaders(CropDataset(st, grid_crops(st, 20), 20), CropDataset(st, grid_crops(st, 20), 20), 1, channel_stats(st)).valid.one_batch()
    assert (yb[0, :10] == 255).all() and (xb[0, :, :10] != 0).any()


# ---- crops as tensors

@pytest.mark.parametrize(("dtype", "tensor"), [("uint8", torch.uint8), ("uint16", torch.int32), ("int16", torch.int16), ("float32", torch.float32)])
def test_item_is_the_crop(tmp_path, dtype, tensor):
    image = np.random.default_rng(0).integers(0, 30000, (5, 40, 41)).astype(dtype)
    st = make_store(tmp_path, [image])
    ds = drawn(st, 10)
    for i in range(10):
        item, mask = ds[i]
        assert item.dtype == tensor and mask.dtype == torch.uint8 and item.shape == (5, 32, 32)
        np.testing.assert_array_equal(item.numpy(), read_crop(st, ds.plan[i], 32)[0])
    crop = ds.plan[3]
    assert ds.describe(3) == f"tile t0, rows {crop['row']}..{crop['row'] + 32}, columns {crop['col']}..{crop['col'] + 32}"
    with pytest.raises(IndexError):
        ds[10]


def test_epochs(store):
    ds, fixed = drawn(store), CropDataset(store, fixed_crops(store, 5, 32), 32)
    plans = []
    for epoch in (0, 1, 2, 1):
        ds.set_epoch(epoch)
        fixed.set_epoch(epoch)
        plans.append(ds.plan)
    np.testing.assert_array_equal(plans[1], plans[3])
    assert not np.array_equal(plans[0], plans[1])
    np.testing.assert_array_equal(fixed.plan, fixed_crops(store, 5, 32))
    with pytest.raises(DataError, match="no crop"):
        CropDataset(store, fixed.plan[:0], 32)


# ---- loaders

def all_bytes(store, stats, workers):
    "Batches of two epochs, with every global random state disturbed first."
    state = np.random.default_rng(None).integers(2**31)
    torch.manual_seed(state)
    np.random.seed(state)
    random.seed(int(state))
    ds = drawn(store, 22)
    dls, found = loaders(ds, ds, 4, stats, workers), []
    for epoch in (1, 2):
        dls.train.dataset.set_epoch(epoch)
        found += [(x.numpy().tobytes(), y.numpy().tobytes()) for x, y in dls.train]
    return found


def test_same_bytes_on_any_number_of_workers_and_any_random_state(store, stats):
    alone = all_bytes(store, stats, 0)
    assert len(alone) == 10 and len(set(alone)) == 10
    assert all_bytes(store, stats, 0) == alone
    assert all_bytes(store, stats, 2) == alone


def test_loading_leaves_the_random_state_of_numpy_alone(store, stats):
    np.random.seed(1)
    expected = np.random.random()
    np.random.seed(1)
    drawn(store).set_epoch(3)
    assert np.random.random() == expected


def test_last_batch(store, stats):
    ds, fixed = drawn(store, 22), CropDataset(store, fixed_crops(store, 5, 32), 32)
    dls = loaders(ds, fixed, 4, stats)
    assert [len(dls.train), len(dls.valid)] == [5, 2]
    assert [len(y) for _, y in dls.train] == [4] * 5 and [len(y) for _, y in dls.valid] == [4, 1]
    assert [len(y) for _, y in loaders(fixed, fixed, 4, stats).train] == [4, 1]
    with pytest.raises(ValueError, match="3 training crops do not fill one batch of 4"):
        loaders(drawn(store, 3), fixed, 4, stats)
    for bs, workers in ((0, 0), (4, -1)):
        with pytest.raises(ValueError, match="bs >= 1 and workers >= 0"):
            loaders(ds, fixed, bs, stats, workers)


def test_batches_follow_the_plan(store, stats):
    ds = drawn(store, 12)
    for b, (xb, _) in enumerate(loaders(ds, ds, 4, stats).train):
        for j in range(4):
            image, _, valid = read_crop(store, ds.plan[b * 4 + j], 32)
            expected = stats.normalise(torch.from_numpy(image), torch.from_numpy(valid))
            torch.testing.assert_close(xb[j], expected)


def test_crop_loaders(store):
    dls = crop_loaders(store, store, size=32, bs=4, n_train=8, n_valid=7, seed=1, min_valid=0.9, d4=False)
    assert len(dls.train.dataset) == 8 and len(dls.valid.dataset) == 7
    assert not dls.train.dataset.plan["d4"].any()
    whole = grid_crops(store, 32)
    assert len(np.unique(dls.valid.dataset.plan)) == 7 and set(dls.valid.dataset.plan.tolist()) <= set(whole.tolist())
    assert len(crop_loaders(store, store, 32, 4, 8).valid.dataset) == len(whole)
    with pytest.raises(ValueError, match="n_valid must be 1 or more"):
        crop_loaders(store, store, 32, 4, 8, n_valid=0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        crop_loaders(store, store, 32, 4, 8, min_vaild=0.9)


# ---- augmented crops

def test_limits_of_brightness(tmp_path, store):
    assert value_limits(store) == (0, 255)
    rng = np.random.default_rng(0)
    images = rng.integers(500, 2000, (2, 4, 50, 60)).astype("uint16") * np.array([1, 2, 3, 4], "uint16")[:, None, None]
    valid = np.ones((2, 50, 60), bool)
    valid[:, :20], images[:, :, :20] = False, 65535
    low, high = value_limits(make_store(tmp_path, images, valid=valid))
    for k in range(4): assert 500 * (k + 1) <= low[k] < 510 * (k + 1) and 1990 * (k + 1) < high[k] < 2000 * (k + 1)
    for folder, image, said in (("flat", np.full((1, 9, 9), 7, "uint16"), "one value throughout"), ("none", np.zeros((1, 9, 9), "uint16"), "a valid pixel")):
        with pytest.raises(DataError, match=said): value_limits(make_store(tmp_path / folder, [image], valid=[image[0] > 0]))


def test_crops_are_looked_up_in_their_tile(store):
    ds = CropDataset(store, partial(draw_crops, store, 12, 32, 4, d4=False), 32, Augment("MEDIUM", seed=1))
    for epoch in (0, 2):
        ds.set_epoch(epoch)
        for i in range(12):
            t, row, col, _ = ds.plan[i].item()
            whole = Layers(store.image(t), store.mask(t), store.valid(t))
            expected = Augment("MEDIUM", seed=1)(whole, epoch, i, row, col, 32)
            image, mask = ds[i]
            np.testing.assert_array_equal(image.numpy(), expected.image)
            np.testing.assert_array_equal(mask.numpy(), expected.mask)


def test_a_fixed_plan_is_augmented_anew_each_epoch(store):
    ds = CropDataset(store, fixed_crops(store, 4, 32), 32, Augment("FASTAI"))
    first = ds.batch(range(4))[0].clone()
    ds.set_epoch(1)
    assert not torch.equal(ds.batch(range(4))[0], first)
    ds.set_epoch(0)
    assert torch.equal(ds.batch(range(4))[0], first)


def test_crop_loaders_with_a_preset(store):
    dls = crop_loaders(store, store, 32, 4, 8, augment=Augment("HEAVY"))
    assert not dls.train.dataset.plan["d4"].any() and dls.valid.dataset.augment is None
    assert dls.train.one_batch()[0].shape == (4, 3, 32, 32)
    with pytest.raises(ValueError, match="draw the plan with d4=False"): CropDataset(store, draw_crops(store, 20, 32, 0), 32, Augment("LIGHT"))
    with pytest.raises(DataError, match="augmentation for 4 of uint8"):
        CropDataset(store, fixed_crops(store, 4, 32), 32, Augment("MEDIUM_BANDS", bands=4))[0]


# ---- the callback

class Notes(Callback):
    order = 90
    def __init__(self): self.plans, self.batches = [], []
    def before_train(self): self.plans.append(self.dls.train.dataset.plan.copy())
    def before_batch(self):
        if self.training: self.batches.append(self.xb[0].sum().item())


def fit(store, stats, epochs, start=0, **callback):
    ds, notes = drawn(store, 8), Notes()
    learn = Learner(loaders(ds, ds, 4, stats), torch.nn.Conv2d(3, 2, 1), loss_func=lambda out, y: out.mean(), cbs=[EpochCrops(**callback), notes])
    with learn.removed_cbs(learn.cbs.filter(lambda cb: isinstance(cb, ProgressCallback))), learn.no_logging():
        learn.fit(epochs, start_epoch=start)
    return notes


def test_every_epoch_has_its_plan_and_a_resumed_training_goes_on(store, stats):
    whole, resumed = fit(store, stats, 4), fit(store, stats, 4, start=2)
    expected = [draw_crops(store, 8, 32, 4, epoch) for epoch in range(4)]
    np.testing.assert_array_equal(whole.plans, expected)
    np.testing.assert_array_equal(resumed.plans, expected[2:])
    assert resumed.batches == whole.batches[4:]
    np.testing.assert_array_equal(fit(store, stats, 2, first=2).plans, expected[2:])


def test_skipped_epochs_are_not_drawn(store, stats):
    asked = []
    ds = CropDataset(store, lambda epoch: asked.append(epoch) or draw_crops(store, 8, 32, 4, epoch), 32)
    learn = Learner(loaders(ds, ds, 4, stats), torch.nn.Conv2d(3, 2, 1), loss_func=lambda out, y: out.mean(), cbs=EpochCrops())
    with learn.removed_cbs(learn.cbs.filter(lambda cb: isinstance(cb, ProgressCallback))), learn.no_logging():
        learn.fit(5, start_epoch=3)
    assert asked == [0, 3, 4]  # the first when the data set is made


# ---- pictures

def test_pictures_of_bytes_come_back(store, stats):
    ds = drawn(store, 4, min_valid=1)
    xb, yb = loaders(ds, ds, 4, stats).train.one_batch()
    pictures = batch_rgb(xb, stats)
    assert pictures.shape == (4, 32, 32, 3) and (yb != 255).all()
    for j in range(4):
        np.testing.assert_array_equal(pictures[j].transpose(2, 0, 1), ds[j][0])


def test_sixteen_bit_is_stretched(tmp_path):
    image = (np.arange(10000, dtype="uint16").reshape(1, 100, 100) * 6)
    picture = to_rgb(image)
    assert picture.shape == (100, 100, 3) and (picture[..., 0] == picture[..., 2]).all()
    assert abs((picture == 0).mean() - 0.02) < 0.004 and abs((picture == 255).mean() - 0.02) < 0.004
    valid = np.ones((100, 100), bool)
    valid[90:] = False
    assert (to_rgb(image, valid)[90:] == 255).all() and (to_rgb(image, valid)[80, :, 0] < 255).any()
    blank = to_rgb(image, np.zeros((100, 100), bool))
    assert (blank == 255).all()


def test_bands_to_show():
    image = np.arange(4, dtype="uint8")[:, None, None] * np.ones((4, 2, 2), "uint8")
    assert to_rgb(image, bands=(3, 0, 1))[0, 0].tolist() == [3, 0, 1]
    assert to_rgb(image[:2])[0, 0].tolist() == [0, 0, 0]


# ---- real tiles

@pytest.mark.skipif(not (REAL / "spacenet").is_dir(), reason="the SpaceNet tiles are not on this machine")
def test_real_16_bit(tmp_path):
    folder = REAL / "spacenet/vegas_buildings_16bit"
    files = sorted(p for p in folder.rglob("*.tif"))
    image, label = (next(p for p in files if ("mask" in str(p)) is is_mask) for is_mask in (False, True))
    st = TileStore(pd.DataFrame([{"image": image, "label": label}]), cache=tmp_path, progress=False)
    xb, yb = crop_loaders(st, st, 256, 2, 4).train.one_batch()
    assert str(st.dtype) == "uint16" and 0.5 < xb.std() < 2 and set(yb.unique().tolist()) <= {0, 1, 255}
    assert batch_rgb(xb, channel_stats(st)).std() > 20
