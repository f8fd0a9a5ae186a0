"""Whole rasters to GeoTIFFs: cover, seam, resuming, bad input, and the command aerial_predict."""
import errno
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings, strategies as st
from rasterio.transform import Affine, from_origin
from rasterio.windows import Window

from aerial_nb.data.grid import as_slices, blended_rows, put_back
from aerial_nb.data.raster import DataError, write_raster
from aerial_nb.models.zoo import build
from aerial_nb.scenes import rasters, rowfile
from aerial_nb.scenes.provenance import find_model
from aerial_nb.scenes.eyes import Eye, Look, eye_of, to_levels
from aerial_nb.scenes.rasters import Seer, aerial_predict, predict_raster
from aerial_nb.scenes.rowfile import open_rows
from aerial_nb.scenes.scale import predict_scaled, rescale
from aerial_nb.scenes.windowmap import batches, cover, map_windows, resample, taps
from aerial_nb.training.records import DiskFull
from aerial_nb.training.saved import ModelCard, save_model

UTM = {"crs": "EPSG:32633", "transform": from_origin(5e5, 5e6, 0.5, 0.5)}
SIZES = dict(width=8, depth=2)


def bright(pixels, valid):
    "A stand-in for a network: probability by brightness."
    return (1 / (1 + np.exp(-(pixels.astype("float32").mean(1) - 120) / 30))).astype("float32")


def give_bright(device): return bright


EYE = Eye("bright", ModelCard("none", gsd_m=0.5, mean=(120,) * 3, std=(50,) * 3), "1", give_bright)


def save(folder, seed=1, bands=3, **card):
    torch.manual_seed(seed)
    values = dict(stats=((120.,) * bands, (50.,) * bands), threshold=0.5, gsd_m=0.5, data="elsewhere", extra=dict(size=128)) | card
    model = build("unet", bands=bands, **SIZES).eval()
    with torch.no_grad(): model.score.weight *= 60   # answers that differ from place to place
    save_model(folder, model, "unet", SIZES | dict(bands=bands), **values)
    return folder


def smooth(shape, seed=0, bands=3):
    "Noise with structure of several pixels."
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, bands, *shape)))
    soft = torch.nn.functional.avg_pool2d(noise, 5, 1, 2, count_include_pad=False)[0].numpy()
    return (120 + 150 * soft).clip(1, 254).astype("uint8")


def picture(folder, shape=(300, 340), name="image.tif", seed=0, bands=3, **more):
    return write_raster(folder / name, smooth(shape, seed, bands), **(UTM | more))


def read(path):
    with rasterio.open(path) as d: return d.read(1)


def make(image, models, out, look=None, **options):
    return predict_raster(image, models, out, look or Look(size=128), progress=False, **options)


# ---- windows

@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([(64, 16, 4, 8), (96, 32, 0, 32), (64, 0, 0, 16), (128, 80, 32, 4)]))
@settings(max_examples=60, deadline=None)
def test_every_pixel_is_kept_and_every_window_is_in_phase(rows, cols, how):
    size, overlap, margin, stride = how
    plan = cover((rows, cols), size, overlap, margin, stride)
    times = np.zeros((rows, cols), int)
    for seen, kept in zip(plan.seen, plan.kept):
        (sr, sc, sh, sw), (kr, kc, kh, kw) = map(tuple, (seen, kept))
        assert sr % stride == sc % stride == 0 and sh <= size and sw <= size and sr + sh <= rows and sc + sw <= cols
        assert sr <= kr and kr + kh <= sr + sh and kr - sr >= margin * (sr > 0) and kh > 0 and kw > 0
        assert (kr > 0) == (sr > 0) and kr + kh <= sr + sh - margin * (sr + sh < rows)
        times[as_slices(kept)] += 1
    assert times.min() >= 1
    image = np.random.default_rng(rows).random((rows, cols))
    parts = [image[as_slices(w)] for w in plan.kept]
    np.testing.assert_allclose(put_back(parts, plan.kept, (rows, cols), overlap=plan.blend), image, rtol=0, atol=1e-12)
    strips = [s for _, s in blended_rows(iter(parts), plan.kept, (rows, cols), overlap=plan.blend)]
    assert np.concatenate(strips).shape == (rows, cols)
    groups = batches(plan.seen, 3)
    assert np.concatenate(groups).tolist() == list(range(len(plan.seen)))
    assert all(len(set(plan.seen[g][["row", "height", "width"]].tolist())) == 1 for g in groups)


@pytest.mark.parametrize("wrong", [dict(size=100), dict(overlap=250), dict(margin=40), dict(shape=(0, 5)), dict(overlap=-1), dict(stride=0)])
def test_impossible_covers_are_refused(wrong):
    with pytest.raises(ValueError): cover(**dict(shape=(500, 500), size=256, overlap=64) | wrong)


def test_results_come_in_order_and_few_are_held():
    started = []
    def slow(i):
        time.sleep(0.002 * (i % 3)); return i
    def windows():
        for i in range(40): started.append(i); yield i
    for i, out in enumerate(map_windows(slow, windows(), workers=3, ahead=5)):
        assert out == i and len(started) <= i + 5
    assert list(map_windows(slow, [])) == []
    with pytest.raises(ZeroDivisionError): list(map_windows(lambda i: 1 // i, [2, 1, 0, 5]))
    for wrong in (dict(backend="cloud"), dict(workers=0)):
        with pytest.raises(ValueError, match="no backend|workers"): map_windows(abs, [1], **wrong)


def test_a_travelled_function_gives_the_same_bytes(tmp_path):
    image, eye = picture(tmp_path), eye_of(find_model(save(tmp_path / "model")))
    here = Seer(image, [eye], Look(turns=True), (300, 340), (300, 340))
    there = pickle.loads(pickle.dumps(here))
    windows = cover((300, 340), 128).seen[:2]
    first, second = here(windows), there(windows)
    here.close(); there.close()
    assert first.probs.tobytes() == second.probs.tobytes() and np.ptp(first.probs) > 0


@given(st.integers(2, 90), st.floats(0.15, 6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_resampled_windows_are_those_of_the_whole(n, factor, seed):
    rng = np.random.default_rng(seed)
    pixels, valid = rng.integers(0, 250, (2, n, 70)).astype("uint8"), rng.random((n, 70)) > 0.3
    high, wide = max(1, round(n * factor)), max(1, round(70 * factor))
    whole, known = resample(pixels, valid, taps(n, high, 0, high), taps(70, wide, 0, wide))
    theirs, seen = rescale(pixels, valid, high / n) if round(70 * (high / n)) == wide else (None, None)
    if theirs is not None and theirs.shape[1:] == (high, wide):
        both = known & seen
        assert both.sum() >= 0.98 * seen.sum() and np.abs(whole.round() - theirs)[:, both].max(initial=0) <= 2
    a, b = sorted(rng.integers(0, high + 1, 2))
    if a == b: return
    down, along = taps(n, high, a, b), taps(70, wide, 3, wide)
    part, ok = resample(pixels[:, down.first:down.last, along.first:along.last], valid[down.first:down.last, along.first:along.last], down, along)
    assert (part == whole[:, a:b, 3:]).all() and (ok == known[a:b, 3:]).all()


# ---- the map

def test_the_map_lies_on_the_image_and_says_what_it_is(tmp_path):
    hole = np.ones((300, 340), bool); hole[50:90, 100:200] = False
    image, model = picture(tmp_path, valid=hole), save(tmp_path / "model")
    made = make(image, str(model), tmp_path / "out.tif")
    with rasterio.open(made.path) as d, rasterio.open(image) as source:
        assert (d.shape, d.crs, d.transform) == (source.shape, source.crs, source.transform)
        assert d.dtypes == ("uint8",) and d.nodata == 255 and abs(d.scales[0] - 1 / 254) < 1e-9
        assert d.tags(ns="IMAGE_STRUCTURE")["COMPRESSION"] == "DEFLATE" and d.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert d.block_shapes[0] == (512, 512) and d.tags()["AERIAL_THRESHOLD"] == "0.5" and "model" in d.tags()["AERIAL_MODEL"]
        np.testing.assert_array_equal(d.read(1) == 255, ~hole)
    assert sorted(os.listdir(tmp_path)) == ["image.tif", "model", "out.tif"]


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_other_numbers_mean_the_same(tmp_path, dtype):
    hole = np.ones((90, 80), bool); hole[:9] = False
    image = picture(tmp_path, (90, 80), valid=hole)
    stored = read(make(image, [EYE], tmp_path / "o.tif", Look(dtype=dtype)).path)
    want = bright(smooth((90, 80))[None], None)[0]
    np.testing.assert_allclose(stored[9:] / rasters.LEVELS[dtype], want[9:], atol=1e-4)
    assert (np.isnan(stored[:9]) if dtype == "float32" else stored[:9] == 65535).all()


def test_no_seam(tmp_path):
    model, image = save(tmp_path / "model"), picture(tmp_path)
    probabilities = eye_of(find_model(model)).make("cpu")
    def one_piece(pixels): return probabilities(pixels[None], np.ones((1, *pixels.shape[1:]), bool))[0]
    whole = one_piece(smooth((300, 340)))
    shifted = np.abs(whole[:, 1:] - one_piece(smooth((300, 340))[:, :, 1:])).mean()
    apart = read(make(image, [str(model)], tmp_path / "a.tif", Look(size=96, dtype="float32")).path)
    assert np.abs(apart - whole).mean() < 0.1 * shifted
    # a margin as wide as the network's view: the same numbers as in one piece
    exact = read(make(image, [str(model)], tmp_path / "b.tif", Look(size=128, overlap=64, margin=32, dtype="float32")).path)
    np.testing.assert_allclose(exact, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("move", [(4, 8), (32, 0), (64, 60)])
def test_a_translation_by_the_stride_gives_the_same_bytes(tmp_path, move):
    model, pixels, look = save(tmp_path / "model"), smooth((400, 400)), Look(size=128, overlap=64, margin=32)
    maps = []
    for name, (row, col) in (("a", (0, 0)), ("b", move)):
        image = write_raster(tmp_path / f"{name}.tif", pixels[:, row:row + 300, col:col + 300], **UTM)
        maps.append(read(make(image, [str(model)], tmp_path / f"{name}_out.tif", look).path))
    row, col = move
    here, there = maps[0][row:, col:][32:-32, 32:-32], maps[1][:300 - row, :300 - col][32:-32, 32:-32]
    assert here.tobytes() == there.tobytes() and np.ptp(here) > 10


def test_turns_and_ensembles_are_means(tmp_path):
    image = picture(tmp_path, (64, 96))
    models, pixels = [str(save(tmp_path / f"m{i}", seed=i)) for i in (1, 2)], smooth((64, 96))[None]
    yes = np.ones((1, 64, 96), bool)
    singles = [eye_of(find_model(m)).make("cpu") for m in models]
    both = read(make(image, ",".join(models), tmp_path / "e.tif", Look(dtype="float32")).path)
    np.testing.assert_allclose(both, np.mean([p(pixels, yes)[0] for p in singles], 0), atol=1e-6)
    turned = read(make(image, models[0], tmp_path / "t.tif", Look(dtype="float32", turns=True)).path)
    flips = []
    for flip in (False, True):
        for k in range(4):
            x, v = (pixels[..., ::-1], yes[..., ::-1]) if flip else (pixels, yes)
            p = np.rot90(singles[0](np.rot90(x, k, (2, 3)).copy(), np.rot90(v, k, (1, 2)).copy()), -k, (1, 2))
            flips.append(p[..., ::-1] if flip else p)
    np.testing.assert_allclose(turned, np.mean(flips, 0)[0], atol=1e-6)


@pytest.mark.parametrize("gsd", [1.0, 0.83, 0.3])
def test_another_pixel_size_is_seen_and_brought_back(tmp_path, gsd):
    hole = np.ones((230, 260), bool); hole[100:140, 60:120] = False
    image = picture(tmp_path, (230, 260), valid=hole)
    made = make(image, [EYE], tmp_path / "o.tif", Look(size=64, overlap=32, gsd=gsd, dtype="float32"))
    stored, want = read(made.path), predict_scaled(bright, smooth((230, 260)), hole, 64, 0.5 / gsd)
    assert made.factor == 0.5 / gsd and (np.isnan(stored) == ~hole).all()
    far = hole.copy(); far[96:144, 56:124] = False
    assert np.abs(stored - want)[far].max() < 0.02 and np.abs(stored - want)[hole].mean() < 0.002


# ---- interrupted

def interrupted(tmp_path, monkeypatch, look, after, error):
    "A job whose disk fails after some appends, and the same job repeated."
    image = picture(tmp_path)
    straight = make(image, [EYE], tmp_path / "straight.tif", look)
    calls, on_disk = [], rowfile._on_disk
    def failing(path, content):
        calls.append(path)
        if len(calls) > after:
            on_disk(path, bytes(content)[:7]); raise error
        on_disk(path, content)
    monkeypatch.setattr(rowfile, "_on_disk", failing)
    with pytest.raises(type(error)) as seen: make(image, [EYE], tmp_path / "out.tif", look)
    monkeypatch.undo()
    assert not (tmp_path / "out.tif").exists()
    made = make(image, [EYE], tmp_path / "out.tif", look)
    assert made.path.read_bytes() == straight.path.read_bytes()
    return made, str(seen.value)


@pytest.mark.parametrize("after", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("gsd", ["match", 0.83])
def test_a_full_disk_in_the_middle_then_the_same_command(tmp_path, monkeypatch, after, gsd):
    made, said = interrupted(tmp_path, monkeypatch, Look(size=96, gsd=gsd), after, OSError(errno.ENOSPC, "No space left on device"))
    assert (made.earlier > 0) == (after > 1)
    assert "no space left for" in said and "repeat the command" in said


def test_an_interrupt_then_the_same_command_also_with_a_network(tmp_path, monkeypatch):
    image, model = picture(tmp_path), str(save(tmp_path / "model"))
    straight = make(image, model, tmp_path / "straight.tif")
    on_disk, calls = rowfile._on_disk, []
    def failing(path, content):
        calls.append(path)
        if len(calls) > 2: raise KeyboardInterrupt
        on_disk(path, content)
    monkeypatch.setattr(rowfile, "_on_disk", failing)
    with pytest.raises(KeyboardInterrupt): make(image, model, tmp_path / "out.tif")
    monkeypatch.undo()
    with pytest.raises(DataError, match="unfinished rows of another job(?s:.*)look"): make(image, model, tmp_path / "out.tif", Look(size=64))
    made = make(image, model, tmp_path / "out.tif")
    assert 0 < made.earlier < 300 and made.path.read_bytes() == straight.path.read_bytes()


def test_rows_of_another_job_go_when_told(tmp_path):
    image, out = picture(tmp_path, (90, 80)), tmp_path / "out.tif"
    with open_rows(out, (90, 80), "uint8", dict(other=1)) as rows: rowfile.append_rows(rows, np.zeros((50, 80), "uint8"))
    with pytest.raises(DataError, match="other: 1, now None"): make(image, [EYE], out)
    assert make(image, [EYE], out, overwrite=True).earlier == 0
    with open_rows(tmp_path / "p.tif", (90, 80), "uint8", dict(other=1)): pass   # nothing finished: nothing to lose
    make(image, [EYE], tmp_path / "p.tif")
    assert (read(out) == to_levels(bright(smooth((90, 80))[None], None)[0], "uint8")).all()


def test_a_disk_that_lies_is_found_out(tmp_path, monkeypatch):
    image, copied = picture(tmp_path, (90, 80)), rowfile._copied
    def lossy(source, made, kind):
        copied(source, made, kind)
        with rasterio.open(made, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as d: d.write(np.full((1, 9, 9), 3, "uint8"), window=Window(0, 0, 9, 9))
    monkeypatch.setattr(rowfile, "_copied", lossy)
    with pytest.raises(DataError, match="reads back other"): make(image, [EYE], tmp_path / "out.tif")
    monkeypatch.undo()
    assert not (tmp_path / "out.tif").exists() and make(image, [EYE], tmp_path / "out.tif").earlier == 90


# ---- bad input

def test_models_that_do_not_fit_are_refused(tmp_path):
    image = picture(tmp_path, (70, 70))
    def card(**more): return [Eye("e", ModelCard("none", **dict(gsd_m=0.5) | more), "1", give_bright)]
    for models, said in ((card(bands=4), "3 bands, and the model was trained on 4"), (card(gsd_m=30.), "a wrong unit"),
                         (card(gsd_m=None), "names no pixel size"), ([*card(), *card(classes=("background", "building", "border"))], "other classes cannot be averaged"),
                         (card(mean=(300.,) * 3, std=(200.,) * 3), "values of type uint8, and the model was trained on 16 bit"),
                         (card(mean=(.4,) * 3, std=(.2,) * 3), "trained on values of 0 to 1"),
                         (card(extra=dict(squeeze=256)), "squeezed to 256 px"), (card() + card(gsd_m=1.), "cannot be averaged")):
        with pytest.raises(DataError, match=said): make(image, models, tmp_path / "o.tif")
    deep = write_raster(tmp_path / "d.tif", np.full((3, 70, 70), 0.5, "float32"), **UTM)
    make(deep, card(), tmp_path / "d_out.tif")
    for wrong in (dict(size=-1), dict(batch=0), dict(dtype="int8"), dict(overlap=-2), dict(data_gsd_m=-1)):
        with pytest.raises(DataError): Look(**wrong)
    for wrong in (dict(size=100), dict(overlap=127), dict(margin=60)):
        with pytest.raises(DataError): make(image, [EYE], tmp_path / "o.tif", Look(**dict(size=128) | wrong))
    with pytest.raises(DataError, match="name it .tif"): make(image, [EYE], tmp_path / "o.png")
    with pytest.raises(DataError, match="image itself"): make(image, [EYE], image, overwrite=True)
    assert not list(tmp_path.glob("o.*"))


def test_pixel_space_is_said(tmp_path, caplog):
    image = write_raster(tmp_path / "p.png", smooth((70, 60)))
    with pytest.raises(DataError, match="data_gsd_m"): make(image, [EYE], tmp_path / "o.tif")
    made = make(image, [EYE], tmp_path / "o.tif", Look(data_gsd_m=0.5))
    assert "pixel space" in caplog.text
    with rasterio.open(made.path) as d: assert d.crs is None and d.transform.is_identity
    assert (read(made.path) == to_levels(bright(smooth((70, 60))[None], None)[0], "uint8")).all()


def test_one_pixel_and_no_pixel(tmp_path):
    one = write_raster(tmp_path / "one.tif", smooth((1, 1)), **UTM)
    assert read(make(one, [str(save(tmp_path / "model"))], tmp_path / "a.tif").path).shape == (1, 1)
    blank = write_raster(tmp_path / "blank.tif", np.zeros((3, 200, 90), "uint8"), nodata=0, **UTM)
    def never(device): raise AssertionError("a blank window was predicted")
    for gsd in ("native", 0.9):
        assert (read(make(blank, [Eye("e", EYE.card, "1", never)], tmp_path / f"{gsd}.tif", Look(gsd=gsd)).path) == 255).all()


def broken(path, shape=(300, 340), layout=None):
    "A tiled image with one block whose bytes are noise; its place as (row, col, height, width)."
    with rasterio.open(path, "w", driver="GTiff", count=3, dtype="uint8", height=shape[0], width=shape[1], compress="deflate",
                       **(layout or dict(tiled=True, blockxsize=64, blockysize=64)), **UTM) as d: d.write(smooth(shape))
    with rasterio.open(path) as d:
        (high, wide), at = d.block_shapes[0], (2, 2 if layout is None else 0)
        offset, size = (int(d.get_tag_item(f"BLOCK_{k}_{at[1]}_{at[0]}", "TIFF", bidx=1)) for k in ("OFFSET", "SIZE"))
    with path.open("r+b") as file: file.seek(offset); file.write(b"\xa5" * size)
    return at[0] * high, at[1] * wide, high, wide


@pytest.mark.parametrize("layout", [None, dict(tiled=False, blockysize=16)])
def test_a_corrupt_block_is_named_and_the_rest_written(tmp_path, caplog, layout):
    row, col, high, wide = block = broken(tmp_path / "b.tif", layout=layout)
    made = make(tmp_path / "b.tif", [EYE], tmp_path / "o.tif", Look(size=96))
    assert made.damaged == [block] and f"rows {row}..{row + high}, columns {col}..{col + wide}" in caplog.text
    want = to_levels(bright(smooth((300, 340))[None], None)[0], "uint8")
    want[row:row + high, col:col + wide] = 255
    np.testing.assert_array_equal(read(made.path), want)
    with rasterio.open(made.path) as d: assert d.tags()["AERIAL_DAMAGED"] == " ".join(map(str, block))
    scaled = make(tmp_path / "b.tif", [EYE], tmp_path / "s.tif", Look(size=96, gsd=0.9))
    assert scaled.damaged == [block] and ((read(scaled.path) == 255) == (want == 255)).all()


def test_files_that_are_no_model_of_ours(tmp_path):
    image, model = picture(tmp_path, (70, 70)), save(tmp_path / "model")
    torch.save({"a": torch.zeros(3)}, tmp_path / "m.pth")
    (tmp_path / "evil").mkdir()
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "ran"),)
    (tmp_path / "evil/model.safetensors").write_bytes(pickle.dumps(Evil()))
    cut = save(tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-50])
    bare = save(tmp_path / "bare"); (bare / "model.safetensors").unlink()
    for name, said in ((tmp_path / "m.pth", "Pickles"), (tmp_path / "evil", "damaged or cut off"), (cut.parent, "damaged or cut off|checksum"),
                       (bare, "no saved model"), (tmp_path / "nothing", "no model"), ("", "no model")):
        with pytest.raises(DataError, match=said): make(image, str(name), tmp_path / "o.tif")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "o.tif").exists()
    make(image, str(model / "model.safetensors"), tmp_path / "o.tif")


def test_an_output_that_exists_is_refused_unless_told(tmp_path):
    image, out = picture(tmp_path, (70, 70)), tmp_path / "o.tif"
    out.write_bytes(b"mine")
    with pytest.raises(DataError, match="exists"): make(image, [EYE], out)
    assert out.read_bytes() == b"mine" and sorted(os.listdir(tmp_path)) == ["image.tif", "o.tif"]
    make(image, [EYE], out, overwrite=True)
    assert read(out).shape == (70, 70)
    with pytest.raises(DataError, match="cannot write there"): make(image, [EYE], out / "deeper.tif")


def like_ours(path, pixels=None, **more):
    "An image written with rasterio alone."
    pixels = smooth((100, 100)) if pixels is None else pixels
    with rasterio.open(path, "w", driver="GTiff", count=len(pixels), height=pixels.shape[1], width=pixels.shape[2], dtype=pixels.dtype, **UTM | more) as d:
        d.write(pixels)
    return path


KNOWS_BYTES = Eye("bytes", ModelCard("none", gsd_m=0.5, mean=(120,) * 3, std=(50,) * 3), "1", give_bright)
SEEN = to_levels(bright(smooth((100, 100))[None], None)[0], "uint8")


def test_numbers_of_another_kind(tmp_path, caplog):
    bytes_, few = smooth((100, 100)), np.full((3, 100, 100), 0.5, "float32")
    for k, (pixels, said) in enumerate(((bytes_.astype("uint16") * 200, "values of 200 to .* was trained on bytes"), (few, "values of 0.5 to 0.5, .* trained on bytes"),
                                        (bytes_ * 1e4, "trained on bytes"), (bytes_.astype("complex64"), "complex"))):
        with pytest.raises(DataError, match=said): make(like_ours(tmp_path / f"{k}.tif", pixels), [KNOWS_BYTES], tmp_path / "o.tif")
    share = Eye("s", ModelCard("none", gsd_m=0.5, mean=(.4,) * 3, std=(.2,) * 3), "1", give_bright)
    with pytest.raises(DataError, match="values of 0 to 1"): make(like_ours(tmp_path / "f.tif", bytes_.astype("float32")), [share], tmp_path / "o.tif")
    # bytes in another type are bytes
    for dtype in ("uint16", "float32", "int16"):
        out = make(like_ours(tmp_path / f"{dtype}.tif", bytes_.astype(dtype)), [KNOWS_BYTES], tmp_path / f"{dtype}_o.tif").path
        np.testing.assert_array_equal(read(out), SEEN)
    deep = Eye("d", ModelCard("none", gsd_m=0.5, mean=(900,) * 3, std=(300,) * 3), "1", give_bright)
    make(tmp_path / "0.tif", [deep], tmp_path / "d.tif")
    assert "far above what the model knows" in caplog.text


@pytest.mark.parametrize("value", [np.nan, np.inf, -3.4e38])
def test_values_that_nobody_measures_are_no_data(tmp_path, caplog, value):
    pixels = smooth((100, 100)).astype("float32"); pixels[1, 20:30, 20:40] = value
    stored = read(make(like_ours(tmp_path / "f.tif", pixels), [KNOWS_BYTES], tmp_path / "o.tif").path)
    assert (stored[20:30, 20:40] == 255).all() and (stored == 255).sum() == 200
    assert ("does not declare it" in caplog.text) == (value == -3.4e38)


def test_pictures_with_palette_alpha_and_mask(tmp_path):
    from PIL import Image
    pixels, known = smooth((100, 100)), np.ones((100, 100), bool); known[:30] = False
    Image.fromarray(pixels.transpose(1, 2, 0)).quantize(64).save(tmp_path / "p.png")
    Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "p.jpg", quality=95)
    for name, near in (("p.png", 60), ("p.jpg", 25)):
        stored = read(make(tmp_path / name, [KNOWS_BYTES], tmp_path / f"{name}.tif", Look(gsd="native")).path)
        assert (stored != 255).all() and np.abs(stored.astype(int) - SEEN).mean() < near
    alpha = like_ours(tmp_path / "alpha.tif", np.concatenate([pixels, known[None] * np.uint8(255)]), photometric="RGB", alpha="yes")
    masked = like_ours(tmp_path / "masked.tif")
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(masked, "r+") as d: d.write_mask(known)
    assert (tmp_path / "masked.tif.msk").exists()
    for image in (alpha, masked):
        np.testing.assert_array_equal(read(make(image, [KNOWS_BYTES], image.with_suffix(".map.tif")).path), np.where(known, SEEN, 255))


def test_a_rotated_image_keeps_its_place(tmp_path):
    turned = Affine(0.4, 0.3, 5e5, 0.3, -0.4, 5e6)
    with rasterio.open(make(like_ours(tmp_path / "r.tif", transform=turned), [KNOWS_BYTES], tmp_path / "o.tif").path) as d:
        assert d.transform.almost_equals(turned, 1e-9) and (d.read(1) == SEEN).all()


def mosaic(path, *names):
    "A VRT of images of 100 x 100 side by side."
    def source(k, band): return (f'<SimpleSource><SourceFilename relativeToVRT="1">{names[k]}</SourceFilename><SourceBand>{band}</SourceBand><SrcRect xOff="0" '
                                 f'yOff="0" xSize="100" ySize="100"/><DstRect xOff="{100 * k}" yOff="0" xSize="100" ySize="100"/></SimpleSource>')
    bands = "".join(f'<VRTRasterBand dataType="Byte" band="{b}">{"".join(source(k, b) for k in range(len(names)))}</VRTRasterBand>' for b in (1, 2, 3))
    path.write_text(f'<VRTDataset rasterXSize="{100 * len(names)}" rasterYSize="100">{bands}</VRTDataset>')
    return path


def test_a_mosaic_with_a_part_missing(tmp_path):
    like_ours(tmp_path / "a.tif")
    made = make(mosaic(tmp_path / "whole.vrt", "a.tif", "a.tif"), [KNOWS_BYTES], tmp_path / "o.tif", Look(size=96, gsd="native"))
    np.testing.assert_array_equal(read(made.path), np.concatenate([SEEN, SEEN], 1))
    mosaic(tmp_path / "inner.vrt", "a.tif", "gone.tif")
    for image in (tmp_path / "inner.vrt", mosaic(tmp_path / "outer.vrt", "inner.vrt")):
        with pytest.raises(DataError, match="1 of the . files it is made of are not there .*gone.tif"): make(image, [KNOWS_BYTES], tmp_path / "p.tif", Look(gsd="native"))
    with pytest.raises(DataError, match="a part of it"): make(tmp_path / "whole.vrt", [KNOWS_BYTES], tmp_path / "a.tif", Look(gsd="native"), overwrite=True)


def test_places_that_cannot_be_written_or_read(tmp_path, caplog):
    image = like_ours(tmp_path / "i.tif")
    os.symlink(image, tmp_path / "link.tif"); os.link(image, tmp_path / "hard.tif"); (tmp_path / "folder.tif").mkdir()
    before = image.read_bytes()
    for out, said in (("link.tif", "is the image itself"), ("hard.tif", "is the image itself"), ("folder.tif", "is a folder"), ("i.tif/o.tif", "cannot write there")):
        with pytest.raises(DataError, match=said): make(image, [KNOWS_BYTES], tmp_path / out, overwrite=True)
    for wrong, said in ((tmp_path, "is a folder: give one image"), (tmp_path / "none.tif", "none.tif: no such file$")):
        with pytest.raises(DataError, match=said): make(wrong, [KNOWS_BYTES], tmp_path / "o.tif")
    for name, content in (("cut.tif", before[:200]), ("text.tif", b"hello"), ("empty.tif", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: a truncated or corrupt file.*again$"): make(tmp_path / name, [KNOWS_BYTES], tmp_path / "o.tif")
    with pytest.raises(DataError, match="has 2 values, and .* has 3 bands"): make(image, [KNOWS_BYTES], tmp_path / "o.tif", Look(fill=(1, 2)))
    with pytest.raises(DataError, match="workers"): make(image, [KNOWS_BYTES], tmp_path / "o.tif", workers=0)
    assert image.read_bytes() == before and not list(tmp_path.glob("*.part"))
    assert read(make(image, [KNOWS_BYTES], tmp_path / "new/deep/o.tif").path).shape == (100, 100)
    blank = make(like_ours(tmp_path / "blank.tif", nodata=0, pixels=np.zeros((3, 70, 70), "uint8")), [KNOWS_BYTES], tmp_path / "b.tif")
    assert blank.no_data == 1 and "no data at all" in caplog.text


def test_no_room_for_a_batch_is_said(tmp_path):
    def full(pixels, valid): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
    with pytest.raises(DataError, match="no room for 1 windows of 100 x 100 pixels: take a smaller batch"):
        make(like_ours(tmp_path / "i.tif"), [Eye("M", KNOWS_BYTES.card, "1", lambda device: full)], tmp_path / "o.tif")
    def buggy(pixels, valid): raise RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        make(tmp_path / "i.tif", [Eye("M", KNOWS_BYTES.card, "1", lambda device: buggy)], tmp_path / "o.tif")


def test_the_bar_of_a_job_that_goes_on_begins_where_it_stopped(tmp_path, monkeypatch):
    bars, image = [], picture(tmp_path, (300, 200))
    class Bar(rasters.tqdm):
        def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs | dict(disable=False, file=io.StringIO())); bars.append(self)
        def refresh(self, *args, **kwargs):
            if self.n and not hasattr(self, "began"): self.began = self.n, self.initial, self.last_print_n
            return super().refresh(*args, **kwargs)
    monkeypatch.setattr(rasters, "tqdm", Bar)
    def stops(device):
        calls = []
        def answer(pixels, valid):
            calls.append(1)
            if len(calls) > 16: raise KeyboardInterrupt
            return bright(pixels, valid)
        return answer
    with pytest.raises(KeyboardInterrupt): make(image, [Eye("bright", EYE.card, "1", stops)], tmp_path / "o.tif", Look(size=64, batch=2), workers=1)
    made = make(image, [EYE], tmp_path / "o.tif", Look(size=64, batch=2))
    total = len(cover((300, 200), 64).seen)
    assert made.earlier > 0 and bars[1].total == total == bars[1].n
    began, initial, shown = bars[1].began
    assert 0 < began == initial == shown < total


def _hold(out, ready, leave):
    with open_rows(out, (70, 70), "uint8", {}):
        ready.set(); leave.wait(20)


def test_two_processes_with_one_output(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "o.tif", ready, leave))
    other.start(); assert ready.wait(20)
    try:
        with pytest.raises(DataError, match="another command is writing"): make(picture(tmp_path, (70, 70)), [EYE], tmp_path / "o.tif")
    finally: leave.set(); other.join()
    assert make(tmp_path / "image.tif", [EYE], tmp_path / "o.tif", overwrite=True).earlier == 0


def test_the_command(tmp_path, caplog, monkeypatch):
    model, image, out = save(tmp_path / "model"), picture(tmp_path, (150, 130)), tmp_path / "o.tif"
    def code(*arguments, **options):
        with pytest.raises(SystemExit) as end: aerial_predict(*map(str, arguments), **options)
        return end.value.code
    assert code(image, model, out, device="cpu") == 0 and read(out).shape == (150, 130)
    assert code(image, model, out, device="cpu") == 2 and "exists" in caplog.text
    assert code(image, model, out, device="cpu", overwrite=True, gsd="1.0") == 0
    assert code(image, model, tmp_path / "p.tif", device="cpu", fill="red") == 2
    assert code(tmp_path / "none.tif", model, tmp_path / "p.tif", device="cpu") == 2 and "no such file" in caplog.text
    assert code(image, model, tmp_path / "p.tif", device="abacus") == 2 and "device 'abacus' is unknown" in caplog.text
    assert code(image, model, tmp_path / "p.tif", device="cpu", workers=0) == 2
    broken(tmp_path / "b.tif")
    assert code(tmp_path / "b.tif", model, tmp_path / "b_out.tif", device="cpu") == 1
    def full(*args): raise DiskFull(errno.ENOSPC, "no space left for it")
    monkeypatch.setattr(rasters, "append_rows", full)
    assert code(image, model, tmp_path / "p.tif", device="cpu") == 3
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(rasters, "append_rows", stop)
    assert code(image, model, tmp_path / "q.tif", device="cpu") == 130 and "repeat the command" in caplog.text


# ---- size

PEAK = """
import resource, sys, time
import numpy as np
from aerial_nb.scenes.eyes import Eye, Look
from aerial_nb.scenes.rasters import predict_raster
from aerial_nb.training.saved import ModelCard
eye = Eye("mean", ModelCard("none"), "1", lambda device: lambda pixels, valid: (pixels.mean(1, dtype="float32") / 255))
start = time.process_time()
predict_raster(sys.argv[1], [eye], sys.argv[2], Look(size=256, gsd="native"), progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, time.process_time() - start)
"""


@pytest.mark.slow
def test_memory_is_flat(tmp_path):
    peaks, times = [], []
    for rows in (2000, 6000):
        with rasterio.open(tmp_path / f"{rows}.tif", "w", driver="GTiff", count=3, dtype="uint8", height=rows, width=6000, tiled=True,
                           blockxsize=256, blockysize=256, compress="deflate", **UTM) as d:
            for top in range(0, rows, 500): d.write(np.full((3, 500, 6000), 1 + top // 100, "uint8"), window=Window(0, top, 6000, 500))
        done = subprocess.run([sys.executable, "-c", PEAK, tmp_path / f"{rows}.tif", tmp_path / f"{rows}_out.tif"],
                              capture_output=True, text=True, check=True)
        peak, seconds = map(float, done.stdout.split()); peaks.append(peak); times.append(seconds / rows)
    assert peaks[1] < peaks[0] + 150 and peaks[1] < 2048 and times[1] < 1.5 * times[0], (peaks, times)
