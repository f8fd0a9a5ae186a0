"""Behaviour of aerial_nb.data.batches: DataLoaders from a table, whole tiles, and what show_batch says."""
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

from aerial_nb.data.batches import Sampling, dataloaders, fit, tinted
from aerial_nb.data.catalog import open_samples
from aerial_nb.data.loaders import channel_stats
from aerial_nb.data.presets import PRESETS
from aerial_nb.data.raster import DataError, read_pixels, write_raster
from aerial_nb.data.splits import split_by_scene
from aerial_nb.data.warp import Extra, Layers

matplotlib.use("Agg")
REAL = Path(__file__).parents[1] / "../shared/data"
SPLITS = ["train"] * 4 + ["valid"] * 2 + ["test"]


def make_table(folder, dtype="uint8", bands=3, shape=(80, 72), classes=2):
    "Seven tiles, the first without a class and half blank, the last a file that cannot be read."
    rng, rows = np.random.default_rng(0), []
    for i, split in enumerate(SPLITS):
        mask, valid = np.zeros(shape, "uint8"), np.ones(shape, "uint8")
        if i: mask[10 + i:40, 20:44] = 1 + i % classes
        else: valid[:, :36] = 0
        image = (rng.integers(20, 200, (bands, *shape)) + 40 * mask).astype(dtype) * (30 if dtype != "uint8" else 1)
        files = {c: write_raster(folder / f"{c}{i}.tif", a) for c, a in (("image", image), ("label", mask), ("valid", valid))}
        rows.append(files | dict(scene=f"s{i}", split=split, gsd_m=0.5))
    Path(rows[-1]["image"]).write_bytes(b"not a picture")
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def table(tmp_path_factory): return make_table(tmp_path_factory.mktemp("t"))


@pytest.fixture(scope="module")
def make(table, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return lambda samples=None, size=32, bs=4, **options: dataloaders(
        table if samples is None else samples, size, bs, cache=cache, progress=False, labels={"classes": {0: 0, 1: 1, 2: 2}}, **options)


def contents(dls, epochs=(0, 1)):
    found = []
    for epoch in epochs:
        dls.train.dataset.set_epoch(epoch)
        found += [(x.numpy().tobytes(), y.numpy().tobytes()) for x, y in dls.train]
    return found


# ---- one call

def test_batches_of_a_table(make, caplog):
    dls = make()
    xb, yb = dls.one_batch()
    assert xb.shape == (4, 3, 32, 32) and xb.dtype == torch.float32 and yb.shape == (4, 32, 32) and yb.dtype == torch.uint8
    assert set(yb.unique().tolist()) <= {0, 1, 2, 255}
    assert [s.name for s in dls.train.dataset.store.sources] == [f"image{i}" for i in range(4)] and len(dls.valid.dataset.store) == 2
    assert "1 of 4 training tiles hold no positive pixel and are not drawn: image0" in caplog.text
    assert len(dls.train.dataset) == -(-3 * 80 * 72 // 32**2) and dls.c == 2
    assert len(dls.valid.dataset) == 18 and len(dls.valid) == 5  # every tile of the validation, whole
    assert dls.stats == channel_stats(dls.train.dataset.store)


@pytest.mark.parametrize("whole", ["", "pad"])
def test_the_same_bytes_on_any_number_of_workers(make, whole):
    options = dict(size=96 if whole else 32, preset="EXTREME", sampling=Sampling(n_train=13, whole=whole), seed=3)
    alone = contents(make(workers=0, **options))
    assert len(alone) == 6 and len(set(alone)) == 6
    for workers in (1, 2):
        np.random.seed(workers)
        torch.manual_seed(workers)
        assert contents(make(workers=workers, **options)) == alone
    assert contents(make(workers=0, **options | dict(seed=4)))[0] != alone[0]


def test_validation_is_never_augmented(make):
    dls = make(preset="EXTREME")
    first, again = ([x.clone() for x, _ in dls.valid] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and dls.valid.dataset.augment is None
    plain = make(preset=None)
    assert all(torch.equal(a, b) for a, b in zip(first, [x for x, _ in plain.valid], strict=True)) and plain.train.dataset.augment is None


def test_sampling_is_heard(make, caplog):
    dls = make(sampling=Sampling(n_train=50, n_valid=3, drop_empty=False, balance=(1.0, 0.2)))
    ds = dls.train.dataset
    assert len(ds) == 50 and len(dls.valid.dataset) == 3 and "not drawn" not in caplog.text
    assert min((ds.store.mask(t)[r:r + 32, c:c + 32] % 255 > 0).mean() for t, r, c, _ in ds.plan.tolist()) >= 0.2
    everything = make(sampling=Sampling(n_train=80, drop_empty=False, min_valid=0.1)).train.dataset.plan["tile"]
    assert set(everything) == {0, 1, 2, 3}


def test_fastai_preset_brings_its_statistics(make):
    dls = make(preset="FASTAI")
    np.testing.assert_allclose(dls.stats.mean, np.multiply([0.485, 0.456, 0.406], 255))
    np.testing.assert_allclose(dls.stats.std, np.multiply([0.229, 0.224, 0.225], 255))


def test_sixteen_bits_and_five_bands(tmp_path):
    samples = make_table(tmp_path, "uint16", 5)
    options = dict(cache=tmp_path / "c", progress=False, labels={"classes": {0: 0, 1: 1, 2: 2}})
    with pytest.raises(DataError, match="preset MEDIUM has hue_saturation_value.*5 bands of uint16; use MEDIUM_BANDS"):
        dataloaders(samples, 32, 4, "MEDIUM", **options)
    dls = dataloaders(samples, 32, 4, "HEAVY_BANDS", **options)
    low, high = dls.train.dataset.augment.limits
    assert len(low) == 5 and 590 <= min(low) <= max(low) < 700 and 6000 < min(high) <= max(high) <= 280 * 30
    xb, _ = dls.one_batch()
    assert xb.shape == (4, 5, 32, 32) and 0.3 < xb.std() < 2
    assert dls.show_batch(n=2) is not None


def test_a_split_is_drawn_by_scene_where_there_is_none(table, make):
    unsplit = table.iloc[:6].assign(split="")
    dls = make(unsplit, size=32, bs=2, sampling=Sampling(drop_empty=False))
    expected = split_by_scene(unsplit)
    for split, ds in (("train", dls.train.dataset), ("valid", dls.valid.dataset)):
        assert [s.image for s in ds.store.sources] == expected.loc[expected["split"] == split, "image"].astype(str).tolist()
    with pytest.raises(DataError, match="no row for valid"): make(table[table["split"] == "train"])


def test_what_is_refused(make):
    with pytest.raises(ValueError, match="there is no preset 'STRONG'"): make(preset="STRONG")
    with pytest.raises(ValueError, match="whole is one of"): Sampling(whole="squash")
    with pytest.raises(ValueError, match="balance is for crops"): Sampling(whole="pad", balance=(0.5, 0.1))


# ---- further targets

def test_further_targets_come_with_the_class_map(make):
    dls = make(preset="MEDIUM")
    ds = dls.train.dataset
    ds.extras = lambda tile: {"copy": Extra(np.asarray(ds.store.mask(tile)).astype("int32"), fill=255)}
    xb, (yb, copy) = dls.one_batch()
    assert copy.dtype == torch.int32 and torch.equal(copy, yb.int())
    image, (mask, again) = ds[3]
    assert torch.equal(mask.int(), again) and image.shape == (3, 32, 32)
    ds.augment = None
    assert torch.equal(ds[3][1][0].int(), ds[3][1][1])


# ---- whole tiles

def test_whole_tiles(make, table):
    dls = make(size=96, sampling=Sampling(n_train=9, whole="pad"), preset=None)
    ds = dls.train.dataset
    assert len(ds) == 9 and [i for i, *_ in dls.valid.dataset.plan.tolist()] == [0, 1] and ds.describe(0).startswith("tile image")
    layers = ds.layers(0)
    t = ds.plan[0]["tile"]
    np.testing.assert_array_equal(layers.image[:, :80, :72], ds.store.image(t))
    assert not layers.shown[80:].any() and (layers.mask[:, 72:] == 255).all() and (layers.image[:, 80:] == 0).all()
    xb, yb = dls.valid.one_batch()
    assert (xb[:, :, 80:] == 0).all() and (yb[:, 80:] == 255).all()


def test_tiles_that_do_not_fit_are_named_before_training(make):
    with pytest.raises(DataError, match="3 of 4|4 of 4.*image0 with 80 x 72 px; use whole='resize'"): make(size=80, sampling=Sampling(whole="exact"))
    with pytest.raises(DataError, match="do not fit 64 px with whole='pad'"): make(size=64, sampling=Sampling(whole="pad"))
    assert make(size=40, sampling=Sampling(whole="resize")).one_batch()[0].shape == (4, 3, 40, 40)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int32", "float32", "float64"])
def test_fit(dtype):
    image = np.full((2, 60, 90), 50, dtype)
    mask = np.zeros((60, 90), "uint8")
    mask[:, 30:60] = 7
    valid = np.ones((60, 90), bool)
    valid[:, :12] = False
    if dtype[0] == "f": image[:, ~valid] = np.nan
    ids = Extra(np.arange(5400).reshape(60, 90), fill=-1)
    out = fit(Layers(image, mask, valid, {"ids": ids}), 45, "resize")
    assert out.image.shape == (2, 45, 45) and out.image.dtype == dtype and set(np.unique(out.mask)) == {0, 7, 255}
    assert (out.image[:, out.valid] == 50).all() and not out.valid[30:].any() and not out.valid[:, :6].any() and out.valid[:30, 7:].all()
    assert (out.mask[~out.valid] == 255).all() and (out.extras["ids"].array[30:] == -1).all()
    grown = fit(Layers(image, mask, valid), 120, "resize")
    assert grown.valid[:80, 17:].all() and (grown.mask[:80, 41:79] == 7).all()
    same = Layers(image[:, :, :60], mask[:, :60], valid[:, :60])
    assert fit(same, 60, "exact") is same
    with pytest.raises(DataError, match="60 x 90 px is not 60 x 60; use whole='resize', or crops"): fit(Layers(image, mask, valid), 60, "exact")
    with pytest.raises(DataError, match="use whole='resize', or whole='pad', or crops"): fit(Layers(image, mask, valid), 100, "exact")


# ---- the picture

def texts(fig): return [t.get_text() for ax in fig.axes for t in (ax.title, *ax.texts)]


def test_show_batch_says_where_and_how_large(make):
    dls = make(preset="MEDIUM", classes=("road", "roof"))
    fig = dls.show_batch(n=6)
    said, ds = texts(fig), dls.train.dataset
    assert sum("image" in t for t in said) == 6 and any(t.endswith(" m") for t in said) and any("°" in t for t in said)
    assert [t.get_text() for t in fig.legends[0].get_texts()][:2] == ["road", "roof"]
    for i in range(6): assert any(ds.store.sources[ds.plan[i]["tile"]].name in t for t in said)
    assert any("r 0..32" in t and "c 32..64" in t for t in texts(dls.show_batch(n=2, split="valid", first=1)))
    with pytest.raises(ValueError, match="holds 18 items, none from 18 on"): dls.show_batch(split="valid", first=18)
    matplotlib.pyplot.close("all")


def test_the_scale_bar_knows_zoom_and_resizing(make):
    from aerial_nb.data.batches import _gsd_m
    ds = make(preset="MEDIUM").train.dataset
    for i in range(4): assert _gsd_m(ds, i) == pytest.approx(0.5 / ds.augment.move(0, i).scale)
    ds = make(size=40, preset=None, bs=2, sampling=Sampling(whole="resize")).train.dataset
    assert _gsd_m(ds, 0) == pytest.approx(1.0)  # 80 rows in 40
    del ds.gsd_m
    assert _gsd_m(ds, 0) is None


def test_show_batch_shows_what_is_drawn(make):
    dls = make(preset="EXTREME", sampling=Sampling(n_train=8))
    shown = [np.asarray(ax.images[0].get_array()) for ax in dls.show_batch(n=4).axes if ax.images]
    for i, picture in enumerate(shown):
        crop = dls.train.dataset.layers(i)
        plain = (crop.mask == 0) & crop.shown
        np.testing.assert_array_equal(picture[plain], crop.image.transpose(1, 2, 0)[plain])
        xb, _, _ = dls.train.dataset.batch([i])
        np.testing.assert_array_equal(xb[0].numpy(), crop.image)
    matplotlib.pyplot.close("all")


def test_tint():
    picture, mask, shown = np.full((40, 40, 3), 100, "uint8"), np.zeros((40, 40), "uint8"), np.ones((40, 40), bool)
    mask[10:20, 10:20], mask[30:], shown[35:] = 1, 255, False
    out = tinted(picture, mask, shown)
    assert (out[mask == 0] == 100).all() and (out[10, 10] == (0, 155, 230)).all() and (out[15, 15] != 100).any()
    assert 0 < (out[30:35] != 100).any(-1).mean() < 0.5 and not (out[35:] == 100).any()
    assert (picture == 100).all()


# ---- real tiles

@pytest.mark.skipif(not (REAL / "massachusetts_roads").is_dir(), reason="the Massachusetts tiles are not on this machine")
def test_real_tiles_do_not_train_on_blank_ground(tmp_path):
    samples = split_by_scene(open_samples(REAL / "massachusetts_roads").iloc[:6].assign(split=""), (0.5, 0.5, 0))
    dls = dataloaders(samples, 192, 4, "MEDIUM", Sampling(n_train=8, n_valid=4), cache=tmp_path, progress=False)
    for xb, yb in dls.train:
        assert (yb != 255).any() and ((xb == 0).all(1) <= (yb == 255)).float().mean() > 0.99
        assert set(yb.unique().tolist()) <= {0, 1, 255}


@pytest.mark.skipif(not (REAL / "spacenet/vegas_buildings_16bit").is_dir(), reason="the SpaceNet tile is not on this machine")
def test_real_16_bit(tmp_path):
    folder = REAL / "spacenet/vegas_buildings_16bit"
    image, mask = read_pixels(folder / "image.tif").data, (read_pixels(folder / "mask.tif").data[0] == 1).astype("uint8")
    halves = (slice(None), slice(0, 200)), (slice(None), slice(200, 400))
    rows = [dict(image=write_raster(tmp_path / f"{s}.tif", image[:, *half]), label=write_raster(tmp_path / f"{s}.png", mask[half]), scene=s, split=s, gsd_m=0.3)
            for s, half in zip(("train", "valid"), halves, strict=True)]
    dls = dataloaders(pd.DataFrame(rows), 128, 4, "EXTREME_BANDS", Sampling(n_train=8), cache=tmp_path, progress=False)
    xb, _ = dls.one_batch()
    assert 0.3 < xb.std() < 2 and dls.train.dataset.augment.dtype == "uint16" and len(PRESETS) == 8
    dls.show_batch(n=4)
    matplotlib.pyplot.close("all")
