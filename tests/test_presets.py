"""Behaviour of aerial_nb.data.presets: what each recipe draws, that labels stay labels, and that seeds repeat."""
import math
import pickle
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aerial_nb.data.presets import (
    IMAGENET, PRESETS, Augment, Moves, Preset, Step, borrow, brightness_contrast, fastai_light, gamma, haze, preset, sample_stream)
from aerial_nb.data.raster import DataError
from aerial_nb.data.synthetic import scene
from aerial_nb.data.warp import Extra, Layers

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # albumentations only warns of arguments it does not know
PHOTO = [n for n, p in PRESETS.items() if any(s.photo for s in p.steps)]
BANDS = [n for n in PRESETS if n not in PHOTO]


@pytest.fixture(scope="module")
def tile():
    drawn = scene(256, 1)
    return Layers(drawn.image, drawn.roads, drawn.valid)


def photo(size=64, seed=0): return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype="uint8")


def certain(name):
    "A preset in which every step happens."
    return replace(preset(name), steps=tuple(replace(s, p=1.0) for s in preset(name).steps))


# ---- on a crop

@pytest.mark.parametrize("name", PRESETS)
def test_every_step_of_every_preset_keeps_type_and_classes(name, tile):
    augment = Augment(certain(name), seed=2)
    before = [a.copy() for a in (tile.image, tile.mask, tile.valid)]
    for index in range(4):
        out = augment(tile, 0, index, 60, 70, 128)
        assert out.image.shape == (3, 128, 128) and out.image.dtype == np.uint8 and out.image.flags.c_contiguous
        assert set(np.unique(out.mask)) <= set(np.unique(tile.mask)) | {255} and (out.mask[~out.valid] == 255).all()
        assert 5 < out.image.std() and out.shown.all()
    for a, b in zip(before, (tile.image, tile.mask, tile.valid), strict=True): np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", PRESETS)
def test_the_same_for_the_same_seed_epoch_and_index(name, tile):
    first = Augment(certain(name), seed=5)(tile, 2, 3, 60, 60, 100)
    for _ in range(2):
        np.random.seed(None)
        Augment("EXTREME", seed=9)(tile, 0, 0, 60, 60, 100)  # another use of the same transforms in between
        again = pickle.loads(pickle.dumps(Augment(certain(name), seed=5)))(tile, 2, 3, 60, 60, 100)
        for layer in ("image", "mask", "valid", "shown"):
            np.testing.assert_array_equal(getattr(again, layer), getattr(first, layer))


@pytest.mark.parametrize("name", PRESETS)
def test_samples_epochs_and_seeds_differ(name, tile):
    found = Counter(Augment(name, seed=seed)(tile, epoch, index, 60, 60, 96).image.tobytes()
                    for seed in range(2) for epoch in range(3) for index in range(4))
    if name == "LIGHT": assert len(found) >= 6 and set(found) == {Augment(name)(tile, 0, i, 60, 60, 96).image.tobytes() for i in range(60)}
    elif name == "FASTAI": assert len(found) >= 23
    else: assert len(found) >= 20  # three in ten are not moved but by D4, and half of those keep their light


@pytest.mark.parametrize("name", PRESETS)
def test_a_red_band_that_is_the_mask_moves_with_it(name, tile):
    mask = (tile.mask == 1).astype("uint8")
    coded = Layers(np.stack([mask * 255] * 3), mask, mask == mask, {"copy": Extra(mask.astype("int32"), fill=-1)})
    augment = Augment(replace(preset(name), steps=()))
    agree = [((out.image[0] > 127) == (out.mask == 1))[out.mask != 255].mean() for out in (augment(coded, 0, i, 80, 80, 128) for i in range(12))]
    assert min(agree) > 0.985
    out = augment(coded, 0, 3, 80, 80, 128)
    np.testing.assert_array_equal(np.where(out.mask == 255, -1, out.mask.astype(int)), out.extras["copy"].array)


@pytest.mark.parametrize("name", PHOTO + ["EXTREME_BANDS"])
def test_light_leaves_the_pixels_without_data_alone(name, tile):
    "What no-data pixels hold must not show, neither there nor beside them."
    valid = tile.valid.copy()
    valid[:, :120] = False
    results = []
    for nothing in (255, 0, 90):
        image = tile.image.copy()
        image[:, ~valid] = nothing
        made = Layers(image, np.where(valid, tile.mask, 255).astype("uint8"), valid)
        results.append([Augment(certain(name), fill=7)(made, 0, i, 60, 60, 128) for i in range(3)])
    for crops in zip(*results, strict=True):
        for crop in crops:
            np.testing.assert_array_equal(crop.image, crops[0].image)
            assert (crop.image[:, ~crop.shown] == 7).all() and (crop.mask[~crop.shown] == 255).all()
        assert crops[0].shown.any() and not crops[0].shown.all()


def test_a_crop_without_any_data_is_all_fill():
    nothing = Layers(np.full((3, 40, 40), 255, "uint8"), np.full((40, 40), 255, "uint8"), np.zeros((40, 40), bool))
    for i in range(5): assert (Augment(certain("HEAVY"), fill=3)(nothing, 0, i).image == 3).all()


# ---- what is drawn

def draws(name, n=1500): return [Augment(name).move(0, i) for i in range(n)]


def near(share, p, n): return abs(share - p) < 4 * math.sqrt(p * (1 - p) / n) + 1e-9


@pytest.mark.parametrize("name", ["MEDIUM", "HEAVY", "EXTREME"])
def test_moves_of_the_published_recipe(name):
    moves = draws(name)
    moved = [m for m in moves if m.angle_deg]
    assert near(len(moved) / 1500, 0.7, 1500) and all((m.scale != 1) == any(m.shift) == bool(m.angle_deg) for m in moves)
    for values, low, high in (([m.angle_deg for m in moved], -45, 45), ([m.scale for m in moved], 0.7, 1.3),
                              ([m.shift[0] for m in moved], -0.2, 0.2), ([m.shift[1] for m in moved], -0.2, 0.2)):
        span = high - low
        assert low <= min(values) < low + 0.05 * span and high - 0.05 * span < max(values) <= high
        assert abs(np.mean(values) - (low + high) / 2) < 0.05 * span
    assert min(Counter(m.k for m in moves).values()) > 130
    assert abs(np.corrcoef([m.angle_deg for m in moved], [m.scale for m in moved])[0, 1]) < 0.15


def test_light_moves_exactly_and_fastai_as_published():
    assert all(m.exact for m in draws("LIGHT", 200))
    moves = draws("FASTAI")
    assert near(sum(m.angle_deg != 0 for m in moves) / 1500, 0.9, 1500) and all(m.scale == 1 and not any(m.shift) for m in moves)
    assert min(m.angle_deg for m in moves) < -170 and max(m.angle_deg for m in moves) > 170
    assert near(sum(m.k != 0 for m in moves) / 1500, 0.5 * 7 / 8, 1500)
    assert preset("FASTAI").stats == IMAGENET


def test_a_rougher_preset_sees_the_same_moves():
    for medium, heavy, extreme in zip(*(draws(n, 60) for n in ("MEDIUM", "HEAVY", "EXTREME")), strict=True):
        assert medium == heavy == replace(extreme, bend_px=0.0, bend_seed=0)
    assert near(sum(m.bend_px > 0 for m in draws("EXTREME")) / 1500, 0.3, 1500)


def test_steps_are_drawn_apart(tile):
    "With their probabilities and independent of each other, unlike a Compose with one seed."
    happened = []
    note = lambda image, stream, limits, name: happened[-1].add(name) or image
    recipe = replace(preset("HEAVY"), steps=tuple(replace(s, apply=partial(note, name=s.name)) for s in preset("HEAVY").steps))
    for i in range(1200):
        happened.append(set())
        Augment(recipe)(Layers(tile.image[:, :8, :8], tile.mask[:8, :8], tile.valid[:8, :8]), 0, i)
    for step in recipe.steps: assert near(sum(step.name in h for h in happened) / 1200, step.p, 1200), step.name
    both = sum({"brightness_contrast", "hue_saturation_value"} <= h for h in happened) / 1200
    assert near(both, 0.5 * 0.3, 1200)


def test_what_is_in_each_preset():
    names = {n: [s.name for s in p.steps] for n, p in PRESETS.items()}
    assert names["LIGHT"] == [] and names["MEDIUM"] == ["brightness_contrast", "hue_saturation_value"]
    assert set(names["HEAVY"]) == {*names["MEDIUM"], "shadow", "gamma", "clahe", "jpeg"}
    assert set(names["EXTREME"]) == {*names["HEAVY"], "haze", "dropout"}
    assert names["MEDIUM_BANDS"] == ["brightness_contrast"] and names["HEAVY_BANDS"] == ["brightness_contrast", "gamma"]
    assert names["EXTREME_BANDS"] == ["brightness_contrast", "gamma", "dropout"]
    assert {s.name: s.p for s in preset("MEDIUM").steps} == {"brightness_contrast": 0.5, "hue_saturation_value": 0.3}


def test_streams():
    keys = [(s, e, i) for s in range(3) for e in range(3) for i in range(3)]
    assert len({sample_stream(*key).random() for key in keys}) == 27
    plans = np.random.Generator(np.random.PCG64(np.random.SeedSequence([0, 0]))).random()  # of draw_crops
    assert sample_stream(0, 0, 0).random() != plans
    with pytest.raises(ValueError, match="numbers of 0 or more"): sample_stream(0, -1, 0)


# ---- light against other implementations

@pytest.mark.parametrize("seed", range(4))
def test_brightness_contrast_and_gamma_as_albumentations(seed):
    import albumentations as A
    image, draw = photo(), sample_stream(seed, 0, 0).random(2)
    contrast, brightness = (2 * draw - 1) * (0.3, 0.2)
    theirs = A.RandomBrightnessContrast((brightness, brightness), (contrast, contrast), p=1)(image=image)["image"]
    ours = brightness_contrast(image, sample_stream(seed, 0, 0), (0, 255))
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    power = (0.8 + 0.4 * draw[0]) * 100
    theirs = A.RandomGamma((power, power), p=1)(image=image)["image"]
    assert np.abs(gamma(image, sample_stream(seed, 0, 0), (0, 255)).astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("seed", range(6))
def test_fastai_light_by_its_definition(seed):
    "sigmoid(saturate(contrast * (logit(x) + logit(brightness)))), as in fastai.vision.augment."
    image, stream = photo(), sample_stream(seed, 0, 0)
    some, u = stream.random(3) < 0.75, stream.random(3)
    x = np.log(np.clip(image / 255, 1e-7, 1 - 1e-7)) - np.log(1 - np.clip(image / 255, 1e-7, 1 - 1e-7))
    if some[0]: x = x + np.log((b := 0.4 + 0.2 * u[0]) / (1 - b))
    if some[1]: x = x * 0.8 ** (2 * u[1] - 1)
    if some[2]:
        change, grey = 0.8 ** (2 * u[2] - 1), x @ np.array([0.2989, 0.5870, 0.1140])
        x = change * x + (1 - change) * grey[..., None]
    assert np.abs(255 / (1 + np.exp(-x)) - fastai_light(image, sample_stream(seed, 0, 0), (0, 255))).max() < 0.51


@pytest.mark.slow  # its import takes longer than all other tests here
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("seed", range(4))
def test_fastai_light_as_fastai(seed):
    import torch
    from fastai.vision.augment import Brightness, Contrast, Saturation
    from fastai.vision.core import TensorImage
    image, stream = photo(), sample_stream(seed, 0, 0)
    some, u = stream.random(3) < 0.75, stream.random(3)
    bright = 0.4 + 0.2 * u[0] if some[0] else 0.5
    contrast, colour = (0.8 ** (2 * v - 1) if yes else 1.0 for v, yes in zip(u[1:], some[1:], strict=True))
    batch = TensorImage(torch.from_numpy(image.transpose(2, 0, 1)[None] / np.float32(255)))
    fs = [f.fs[0] if isinstance(f.fs, (list, tuple)) or hasattr(f.fs, "__getitem__") else f.fs
          for f in (Brightness(draw=bright, p=1), Contrast(draw=contrast, p=1), Saturation(draw=colour, p=1))]
    for f in fs: f.before_call(batch)
    theirs = batch.clone()
    theirs = theirs.lighting(lambda x: fs[2](fs[1](fs[0](x)))).numpy()[0].transpose(1, 2, 0) * 255
    ours = fastai_light(image, sample_stream(seed, 0, 0), (0, 255))
    inner = (image > 0).all(-1) & (image < 255).all(-1)  # fastai clamps the ends before each step
    assert np.abs(ours - theirs)[inner].max() < 0.51


def test_haze_brightens_smoothly_and_stays_in_range():
    image = np.zeros((64, 64, 3), "uint8")
    for seed in range(5):
        out = haze(image, sample_stream(seed, 0, 0), (0, 255)).astype(int)
        assert 0 < out.max() <= 0.35 * 0.9 * 255 + 1 and np.abs(np.diff(out, axis=0)).max() <= 6
    assert haze(image + np.uint8(255), sample_stream(0, 0, 0), (0, 255)).min() >= 229


# ---- 16 bits, many bands

@pytest.mark.parametrize("name", PHOTO)
@pytest.mark.parametrize(("bands", "dtype"), [(3, "uint16"), (4, "uint8"), (1, "uint8"), (8, "float32")])
def test_presets_for_photographs_say_so(name, bands, dtype):
    with pytest.raises(DataError) as said: Augment(name, bands, dtype, limits=(0, 1000))
    for word in (f"preset {name} ", next(s.name for s in preset(name).steps if s.photo), f"{bands} bands of {dtype}", "_BANDS"):
        assert word in str(said.value)


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize(("bands", "dtype"), [(1, "uint8"), (3, "uint16"), (8, "uint16"), (4, "int16"), (5, "float32"), (2, "int32")])
def test_presets_for_any_bands(name, bands, dtype, tile):
    image = np.resize(tile.image, (bands, 256, 256)).astype(dtype) * (10 if dtype != "uint8" else 1)
    limits = None if dtype == "uint8" else (0, 2550)
    augment = Augment(certain(name), bands, dtype, limits)
    for i in range(3):
        out = augment(Layers(image, tile.mask, tile.valid), 0, i, 50, 50, 96)
        assert out.image.dtype == dtype and out.image.shape == (bands, 96, 96) and np.isfinite(out.image).all()
        assert 0.3 < out.image.mean() / image.mean() < 2.5


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["MEDIUM_BANDS", "HEAVY_BANDS"]))
def test_a_wide_copy_is_changed_like_its_original(index, name):
    small = photo(48).transpose(2, 0, 1)
    mask = np.zeros((48, 48), "uint8")
    eight = Augment(certain(name))(Layers(small, mask, mask == 0), 0, index, size=40)
    sixteen = Augment(certain(name), 3, "uint16", (0, 65535))(Layers(small.astype("uint16") * 257, mask, mask == 0), 0, index, size=40)
    assert np.abs(sixteen.image / 257 - eight.image).max() < 2.6  # each rounding to bytes is up to half, and contrast and gamma widen it


@pytest.mark.parametrize("name", BANDS)
def test_every_band_has_its_own_limits(name, tile):
    "Bands that are multiples of one band stay multiples of it, whatever happens to the light."
    factors = np.array([1, 2, 5, 9])
    image = (tile.image[:1].astype("uint16") * 20 * factors[:, None, None]).astype("uint16")
    augment = Augment(certain(name), 4, "uint16", ((0, 0, 0, 0), tuple(int(v) for v in 5100 * factors)))
    for i in range(4):
        out = augment(Layers(image, tile.mask, tile.valid), 0, i, 50, 50, 96).image / factors[:, None, None]
        assert np.abs(out - out[3]).max() < 2


def test_sixteen_bits_do_not_wrap_around():
    for high in (60000, 2000):
        image = np.full((16, 16, 2), 65535, "uint16")
        out = np.stack([brightness_contrast(image, sample_stream(s, 0, 0), (0, high)) for s in range(20)])
        assert out.min() > 20000
        dark = np.stack([brightness_contrast(image * 0, sample_stream(s, 0, 0), (0, high)) for s in range(20)])
        assert dark.max() < 0.3 * high + 1


def test_limits():
    with pytest.raises(DataError, match=r"uint16 images and needs limits=\(low, high\).*got None for 4 bands; `value_limits` measures"): Augment("MEDIUM_BANDS", 4, "uint16")
    with pytest.raises(DataError, match=r"got \(5, 5\) for 4 bands"): Augment("MEDIUM_BANDS", 4, "uint16", (5, 5))
    for wrong in (((0, 0), (9, 9)), ((0,) * 4, (9, 9, 9, 0)), (0, 1, 2)):
        with pytest.raises(DataError, match="needs limits"): Augment("MEDIUM_BANDS", 4, "uint16", wrong)
    assert Augment("LIGHT", 4, "uint16").limits is None and Augment("MEDIUM").limits == (0, 255)


def test_an_image_of_another_kind_is_refused(tile):
    with pytest.raises(DataError, match="4 bands of uint16, augmentation for 3 of uint8"):
        Augment("MEDIUM")(Layers(np.zeros((4, 9, 9), "uint16"), tile.mask[:9, :9], tile.valid[:9, :9]), 0, 0)


# ---- names, warnings, the network

def test_names():
    with pytest.raises(ValueError, match="no preset 'medium'; there are LIGHT, MEDIUM, HEAVY"): Augment("medium")
    own = Preset("MINE", Moves(d4=1), (Step("darker", 1.0, lambda image, stream, limits: image // 2, photo=False),))
    assert preset(own) is own and own.for_bands().name == "MINE_BANDS" and len(own.for_bands().steps) == 1


@pytest.mark.parametrize("arguments", [dict(gama_limit=(80, 120)), dict(gamma_limit=(80, 120), always_apply=True)])
def test_wrong_arguments_of_albumentations_are_errors(arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever the user's filters say
        with pytest.raises(ValueError, match="albumentations.RandomGamma.*not valid"):
            borrow(photo(), sample_stream(0, 0, 0), (0, 255), "RandomGamma", **arguments)


def test_imports_are_light_and_albumentations_never_asks_the_network():
    code = ("import os, sys, urllib.request\n"
            "os.environ.pop('NO_ALBUMENTATIONS_UPDATE', None)\n"
            "def asked(*a, **k): os._exit(3)\n"
            "urllib.request.OpenerDirector.open = asked\n"
            "from aerial_nb.data import presets, sampling, warp\n"
            "if {'torch', 'fastai', 'albumentations'} & set(sys.modules): os._exit(4)\n"
            "sys.modules['torch'] = None\n"  # albumentations then does without, which is quicker
            "import numpy as np\n"
            "presets.borrow(np.zeros((8, 8, 3), 'uint8'), presets.sample_stream(0, 0, 0), (0, 255), 'RandomGamma')\n"
            "sys.exit(0 if 'albumentations' in sys.modules else 5)")
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0
