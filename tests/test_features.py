"""Cached features: exact up to half precision, never somebody else's, and the encoder rests."""
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from aerial_nb.data.batches import Sampling, dataloaders
from aerial_nb.data.catalog import synthetic_samples
from aerial_nb.data.loaders import CropDataset, channel_stats, loaders
from aerial_nb.data.splits import split_by_scene
from aerial_nb.data.tiles import TileStore, fixed_crops
from aerial_nb.models.sam import sam_conv, sam_unet
from aerial_nb.training.features import CachedFeatures, FeatureCache, Features, compute_ahead, fingerprint, item_keys, views
from aerial_nb.training.learner import Recipe, fit, learner_for
from aerial_nb.training.records import Folder

WHOLE = Sampling(whole="exact", drop_empty=False)
RECIPE = Recipe(epochs=3, lr=1e-3, loss="bce")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    drawn = synthetic_samples(tmp_path_factory.mktemp("scenes"), n=4, size=64, gsd_m=1, task="buildings", progress=False)
    return split_by_scene(drawn, (0.5, 0.5, 0))


@pytest.fixture(scope="module")
def loaded(samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiles")
    return lambda preset=None, sampling=WHOLE, **o: dataloaders(samples, size=o.pop("size", 64), bs=2, preset=preset, sampling=sampling,
                                                                 cache=folder, progress=False, **o)


def tiny(make=sam_conv, **arguments):
    torch.manual_seed(0)
    return make(**dict(weights=None, variant="tiny", decoder_dropout=0.0) | arguments)


def counted(model):
    "Images that the encoder was given, call by call."
    calls = []
    model.encoder.register_forward_pre_hook(lambda m, x: calls.append(len(x[0])))
    return calls


def history(model, dls, folder, cbs=(), recipe=RECIPE):
    learn = learner_for(model, dls, recipe, Folder(folder), quiet=True, cbs=cbs)
    fit(learn, recipe)
    return Folder(folder).history


# ---- keys

@settings(max_examples=20, deadline=None)
@given(i=st.integers(0, 3 * 16 * 16 - 1), item=st.integers(0, 2))
def test_a_key_changes_with_any_pixel_and_with_no_other_image(i, item):
    x = torch.zeros(3, 3, 16, 16)
    before = item_keys(x)
    x[item].view(-1)[i] = 1e-30
    assert [a == b for a, b in zip(before, item_keys(x))] == [j != item for j in range(3)]
    assert item_keys(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)) == item_keys(x)
    assert item_keys(torch.zeros(1, 3, 16, 16)) != item_keys(torch.zeros(1, 3, 8, 32))


def test_a_fingerprint_changes_with_weights_and_settings():
    names = {fingerprint(tiny(**a).encoder) for a in ({}, dict(encoder_amp="bf16"), dict(make=sam_unet), dict(bands=4))}
    assert len(names) == 4 and fingerprint(tiny().encoder) == fingerprint(tiny().encoder)
    model = tiny()
    before = fingerprint(model.encoder)
    with torch.no_grad(): model.encoder.vit.neck[3].bias[5] += 1e-6
    assert fingerprint(model.encoder) != before


# ---- the store

@pytest.mark.parametrize("folder, memory_mb", [("kept", 0), ("kept", 10), (None, 10)])
def test_what_is_put_comes_back(tmp_path, folder, memory_mb):
    cache = FeatureCache(folder and tmp_path / folder, memory_mb)
    maps = np.random.default_rng(0).normal(size=(5, 3, 2)).astype("float32"), np.ones((2, 2, 2), "float32")
    assert cache.get("state", "key", ["a", "b"]) is None
    for back in (cache.put("state", "key", ["a", "b"], maps), cache.get("state", "key", ["a", "b"])):
        for m, was in zip(back, maps, strict=True):
            assert m.dtype == np.float16 and np.array_equal(m, was.astype("float16"))
    assert cache.get("other", "key", ["a", "b"]) is None and cache.get("state", "key2", ["a", "b"]) is None
    if folder and not memory_mb: assert isinstance(cache.get("state", "key", ["a", "b"])[0], np.memmap) and not cache.bytes


def test_memory_has_a_limit(tmp_path):
    cache = FeatureCache(tmp_path, memory_mb=0.01)
    for i in range(20): cache.put("s", str(i), ["a"], (np.zeros((1, 32, 32), "float32"),))
    assert cache.bytes <= 0.01 * 2**20 and 0 < len(cache.kept) < 20 and all(cache.get("s", str(i), ["a"]) for i in range(20))


def test_a_damaged_file_is_computed_again(tmp_path, caplog):
    model, x = tiny(), torch.randn(1, 3, 32, 32)
    first, = Features(model.encoder, FeatureCache(tmp_path))(x)
    file, = tmp_path.rglob("*.npy")
    for damage in (file.read_bytes()[:-10], b""):
        file.write_bytes(damage)
        ask = Features(model.encoder, FeatureCache(tmp_path))
        with caplog.at_level(logging.WARNING): again, = ask(x)
        assert torch.equal(first, again) and ask.cache.computed == 1 and "computed again" in caplog.text


def test_values_beyond_half_precision_are_refused():
    with pytest.raises(ValueError, match="dtype='float32'"): FeatureCache().put("s", "k", ["neck"], (np.full((1, 1, 1), 1e5, "float32"),))
    assert FeatureCache(dtype="float32").put("s", "k", ["neck"], (np.full((1, 1, 1), 1e5, "float32"),))[0] == 1e5


# ---- asking

@pytest.mark.parametrize("make", [sam_conv, sam_unet])
def test_features_are_exact_up_to_half_precision(make, tmp_path):
    model, x = tiny(make).eval(), torch.randn(3, 3, 48, 40)
    ask = Features(model.encoder, FeatureCache(tmp_path))
    for maps in (ask(x), ask(x), Features(model.encoder, FeatureCache(tmp_path))(x)):
        for m, straight in zip(maps, model.features(x), strict=True):
            assert m.dtype == torch.float16 and (m - straight).abs().max() <= 2**-11 * straight.abs().max() * 1.001
    assert (ask.cache.computed, ask.cache.found) == (3, 3)
    kept = Features(model.encoder, FeatureCache(dtype="float32"))(x)
    for m, straight in zip(kept, model.features(x)): assert torch.equal(m, straight)


def test_an_image_twice_in_a_batch_is_computed_once():
    model, calls = tiny(), []
    model.encoder.register_forward_pre_hook(lambda m, x: calls.append(len(x[0])))
    x = torch.randn(1, 3, 32, 32).expand(4, 3, 32, 32)
    maps, = Features(model.encoder, FeatureCache())(x)
    assert calls == [1] and len(maps) == 4 and torch.equal(maps[0], maps[3])


def test_a_changed_encoder_is_asked_again():
    model, x = tiny(), torch.randn(1, 3, 32, 32)
    ask = Features(model.encoder, FeatureCache())
    before, = ask(x)
    with torch.no_grad(): model.encoder.vit.neck[3].weight.mul_(2.0)
    after, = ask(x)
    assert ask.cache.computed == 2 and not torch.equal(before, after)
    model.encoder.load_state_dict({k: v.clone() for k, v in model.encoder.state_dict().items()})   # the same values, written again
    ask(x)
    assert ask.cache.computed == 2


@pytest.mark.parametrize("arguments", [dict(frozen=False), dict(unfreeze_blocks=1), dict(lora_rank=1)])
def test_a_trained_encoder_is_refused(arguments):
    with pytest.raises(ValueError, match="freeze it"): Features(tiny(**arguments).encoder, FeatureCache())


# ---- what comes again

def test_views_are_counted_and_endless_ones_refused(loaded, samples, tmp_path):
    assert [views(loaded(p).train.dataset) for p in (None, "LIGHT")] == [2, 16]
    for preset, sampling, told in (("MEDIUM", WHOLE, "light of preset MEDIUM, turns of preset MEDIUM"), (None, Sampling(), "crops anywhere"),
                                   ("LIGHT", Sampling(), "crops anywhere")):
        with pytest.raises(ValueError, match=told): views(loaded(preset, sampling, size=64 if sampling is WHOLE else 32).train.dataset)
    store = TileStore(samples, cache=tmp_path, progress=False)
    fixed = CropDataset(store, fixed_crops(store, 5, 32, 0), 32)
    assert views(fixed) == len(np.unique(fixed.plan)) <= 5


def test_all_eight_views_ahead_are_those_of_the_training(loaded):
    dls, model = loaded("LIGHT"), tiny()
    ask, calls = Features(model.encoder, FeatureCache()), counted(model)
    assert compute_ahead(ask, dls, progress=False) == 2 * 8 + 2 and sum(calls) == 18
    seen = set()
    for epoch in range(30):
        dls.train.dataset.set_epoch(epoch)
        for batch in dls.train: seen |= set(item_keys(batch[0])); ask(batch[0])
    for batch in dls.valid: ask(batch[0])
    assert sum(calls) == 18 and len(seen) == 16


# ---- training

@pytest.mark.parametrize("make", [sam_conv, sam_unet])
def test_the_encoder_rests_from_the_second_epoch_on(make, loaded, tmp_path):
    dls, plain, model = loaded(), tiny(make), tiny(make)
    calls, without = counted(model), counted(plain)
    want = history(plain, dls, tmp_path / "plain")
    got = history(model, dls, tmp_path / "cached", (CachedFeatures(tmp_path / "features"),))
    assert sum(calls) <= 4 and sum(without) == 3 * 4          # two tiles of each split, each at most once
    for column in ("train_loss", "valid_loss"): assert np.allclose(got[column], want[column], atol=3e-3)
    assert got.train_loss.iloc[-1] < got.train_loss.iloc[0]
    again = tiny(make); calls = counted(again)
    history(again, dls, tmp_path / "again", (CachedFeatures(tmp_path / "features"),))
    assert not calls                                          # another run, the same folder
    x = next(iter(dls.valid))[0]
    with torch.no_grad(): assert again(x).shape == (2, 1, 64, 64) and len(calls) == 1   # prediction sees images


@pytest.mark.parametrize("options", [dict(amp="bf16"), dict(accum=2), dict(ema=0.5)])
def test_with_mixed_precision_accumulation_and_averages(options, loaded, tmp_path):
    model, recipe, cbs = tiny(), Recipe(epochs=6, lr=1e-3, loss="bce", **options), (CachedFeatures(tmp_path / "features"),)
    calls = counted(model)
    history(model, loaded(), tmp_path / "run", cbs, recipe)
    assert sum(calls) == len(cbs[0].cache.kept) <= 4 and cbs[0].cache.found == 6 * 4 - sum(calls)


def test_ahead_leaves_nothing_to_the_training(loaded, tmp_path):
    model, cbs = tiny(), (CachedFeatures(ahead=True, progress=False),)
    calls = counted(model)
    history(model, loaded("LIGHT"), tmp_path, cbs)
    assert sum(calls) == 18 == cbs[0].cache.computed


def test_a_fixed_plan_of_crops(samples, tmp_path):
    store = TileStore(samples, cache=tmp_path / "tiles", progress=False)
    used = CropDataset(store, fixed_crops(store, 4, 32, 0), 32)
    model, dls = tiny(), loaders(used, used, 2, channel_stats(store))
    calls = counted(model)
    history(model, dls, tmp_path / "run", (CachedFeatures(ahead=True, progress=False),))
    assert sum(calls) == views(used)


def test_what_cannot_be_cached_stops_before_the_first_batch(loaded, tmp_path):
    with pytest.raises(ValueError, match="no image comes twice"):
        history(tiny(), loaded("MEDIUM"), tmp_path / "a", (CachedFeatures(),))
    with pytest.raises(ValueError, match="freeze it"):
        history(tiny(lora_rank=1), loaded(), tmp_path / "b", (CachedFeatures(),))
    with pytest.raises(ValueError, match="cannot be called with features"):
        history(torch.nn.Conv2d(3, 1, 1), loaded(), tmp_path / "c", (CachedFeatures(),))
