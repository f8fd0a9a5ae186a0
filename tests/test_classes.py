"""Whole scenes by models of several classes: bands, blending, resuming, and what a card must say."""
import errno

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings, strategies as st
from rasterio.transform import from_origin
from torch import nn

from aerial_nb.data.catalog import synthetic_samples
from aerial_nb.data.loaders import Stats
from aerial_nb.data.masks import CLASS_MAP_TAG
from aerial_nb.data.raster import DataError, read_pixels, write_raster
from aerial_nb.data.splits import split_by_scene
from aerial_nb.models.zoo import build
from aerial_nb.scenes import rowfile
from aerial_nb.scenes.eyes import Eye, Look, eye_of, to_levels
from aerial_nb.scenes.made import Made, thumbnails
from aerial_nb.scenes.predict import predict_pixels, predict_squeezed, predictor
from aerial_nb.scenes.provenance import find_model
from aerial_nb.scenes.rasters import predict_raster
from aerial_nb.scenes.rowfile import append_rows, finish_rows, open_rows
from aerial_nb.training.arms import run_arm
from aerial_nb.training.learner import Recipe
from aerial_nb.training.records import Folder
from aerial_nb.training.saved import ModelCard, load_card, save_model
from aerial_nb.training.tasks import split_task

UTM = {"crs": "EPSG:32633", "transform": from_origin(5e5, 5e6, 0.5, 0.5)}
THREE = "background", "building", "border"
CARD = ModelCard("none", gsd_m=0.5, mean=(120,) * 3, std=(50,) * 3, classes=THREE)


def shades(pixels, valid):
    "A stand-in for a network of three classes, from colours."
    p = pixels.astype("float32")
    e = np.exp(np.stack([np.ones(valid.shape), (p[:, 0] - 120) / 30, (p[:, 1] - 120) / 20], 1))
    return (e / e.sum(1, keepdims=True))[:, 1:].astype("float32")


def give_shades(device): return shades


EYE = Eye("shades", CARD, "1", give_shades)


def smooth(shape, seed=0):
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 3, *shape)))
    return (120 + 150 * nn.functional.avg_pool2d(noise, 5, 1, 2)[0].numpy()).clip(1, 254).astype("uint8")


def picture(folder, shape=(150, 170), name="image.tif", **more): return write_raster(folder / name, smooth(shape), **(UTM | more))


def save(folder, seed=1, classes=3, names=THREE, **card):
    torch.manual_seed(seed)
    model = build("unet", bands=3, classes=classes, width=8, depth=2).eval()
    with torch.no_grad(): model.score.weight *= 60
    save_model(folder, model, "unet", dict(bands=3, classes=classes, width=8, depth=2), stats=((120.,) * 3, (50.,) * 3), gsd_m=0.5,
               classes=names, extra=dict(size=128), **card)
    return folder


def make(image, models, out, look=None, **options):
    return predict_raster(image, models, out, look or Look(size=96), progress=False, **options)


def read(made):
    with rasterio.open(getattr(made, "path", made)) as d: return d.read()


# ---- in memory

class Fixed(nn.Module):
    "Logits that grow with the channels; as many classes as asked for."
    def __init__(self, classes): super().__init__(); self.weight = nn.Parameter(torch.linspace(-1, 2, 3 * classes).view(classes, 3))
    def forward(self, x): return torch.einsum("ck,nkhw->nchw", self.weight, x)


@pytest.mark.parametrize("classes", [1, 2, 3, 5])
def test_logits_become_probabilities_of_what_is_not_background(classes):
    model, stats = Fixed(classes), Stats((120.,) * 3, (50.,) * 3)
    pixels, valid = smooth((20, 30))[None], np.ones((1, 20, 30), bool)
    got = predictor(model, stats)(pixels, valid)
    with torch.no_grad(): logits = model((torch.from_numpy(pixels).float() - 120) / 50)
    want = {1: lambda: logits[:, 0].sigmoid(), 2: lambda: (logits[:, 1] - logits[:, 0]).sigmoid()}.get(classes, lambda: logits.softmax(1)[:, 1:])()
    assert got.shape == ((1, 20, 30) if classes < 3 else (1, classes - 1, 20, 30)) and got.dtype == np.float32
    np.testing.assert_allclose(got, want.numpy(), atol=2e-6)


def test_windows_carry_the_classes_also_on_blank_ground():
    pixels, valid = smooth((130, 150)), np.ones((130, 150), bool)
    valid[:70, :80] = False
    got = predict_pixels(shades, pixels, valid, 48, 16)
    assert got.shape == (2, 130, 150) and (np.isnan(got) == ~valid).all()
    np.testing.assert_allclose(got[:, valid], shades(pixels[None], valid[None])[0][:, valid], atol=1e-6)
    blank = predict_pixels(shades, pixels, ~np.ones_like(valid), 48, 16)
    assert blank.shape == got.shape and np.isnan(blank).all()
    assert predict_squeezed(shades, pixels, valid, 75).shape == got.shape


# ---- rows with bands

@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 30), st.sampled_from(["uint8", "uint16", "float32"]), st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_rows_with_bands_read_back(tmp_path_factory, bands, rows, cols, dtype, seed):
    rng, out = np.random.default_rng(seed), tmp_path_factory.mktemp("rows") / "o.tif"
    values = rng.integers(0, 250, (bands, rows, cols)).astype(dtype)
    shown = values if bands > 1 else values[0]
    cuts = sorted({0, rows, *rng.integers(0, rows + 1, 3).tolist()})
    with open_rows(out, (rows, cols), dtype, {}, bands=bands) as file:
        for a, b in zip(cuts, cuts[1:]): append_rows(file, shown[..., a:b, :])
        finish_rows(file, nodata=249, names=tuple(f"c{i}" for i in range(bands)))
    with rasterio.open(out) as d:
        np.testing.assert_array_equal(d.read(), values)
        assert d.descriptions == tuple(f"c{i}" for i in range(bands)) and set(d.nodatavals) == {249}
    assert file.blank == ((values[0] == 249).sum() if dtype != "float32" else 0)


def test_rows_of_other_bands_do_not_fit(tmp_path):
    with open_rows(tmp_path / "o.tif", (9, 9), "uint8", {}, bands=2) as rows:
        for wrong in (np.zeros((5, 9), "uint8"), np.zeros((3, 5, 9), "uint8"), np.zeros((2, 5, 8), "uint8"), np.zeros((2, 10, 9), "uint8")):
            with pytest.raises(ValueError, match="in 2 bands"): append_rows(rows, wrong)
        append_rows(rows, np.zeros((2, 9, 9), "uint8"))
        with pytest.raises(ValueError, match="1 names for 2 bands"): finish_rows(rows, names="one")
    with pytest.raises(DataError, match="bands: 2, now 3"), open_rows(tmp_path / "o.tif", (9, 9), "uint8", {}, bands=3): pass


# ---- the map

@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_a_band_a_class(tmp_path, dtype):
    hole = np.ones((150, 170), bool); hole[50:90, 100:] = False
    made = make(picture(tmp_path, valid=hole), [EYE], tmp_path / "o.tif", Look(size=96, dtype=dtype))
    want = np.where(hole, shades(smooth((150, 170))[None], hole[None])[0], np.float32(np.nan))
    with rasterio.open(made.path) as d:
        assert d.descriptions == ("building", "border") and len({repr(v) for v in d.nodatavals}) == 1 and len(set(d.scales)) == 1
        assert d.tags()["AERIAL_CLASS"] == "building, border" and "AERIAL_THRESHOLD" not in d.tags()
        assert d.overviews(1) == d.overviews(2) and d.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
    stored = read(made)
    if dtype == "float32": np.testing.assert_allclose(stored, want, atol=1e-6)
    else: assert np.abs(stored.astype(int) - to_levels(want, dtype)).max() <= 1 and ((stored == np.iinfo(dtype).max) == ~hole).all()
    assert made.no_data == (~hole).mean()


def test_a_saved_model_of_three_classes_leaves_no_seam(tmp_path):
    model, image = save(tmp_path / "model", threshold=0.4), picture(tmp_path, (200, 230))
    whole = eye_of(find_model(model)).make("cpu")(smooth((200, 230))[None], np.ones((1, 200, 230), bool))[0]
    made = make(image, str(model), tmp_path / "o.tif", Look(size=128, overlap=64, margin=32, dtype="float32"))
    np.testing.assert_allclose(read(made), whole, rtol=0, atol=1e-5)
    assert np.ptp(whole[0]) > .1 and np.ptp(whole[1]) > .1 and (whole.sum(0) <= 1 + 1e-5).all()
    with rasterio.open(made.path) as d: assert d.tags()["AERIAL_THRESHOLD"] == "0.4"   # of the first class


def test_turns_and_ensembles_carry_the_classes(tmp_path):
    image, models = picture(tmp_path, (64, 96)), [str(save(tmp_path / f"m{i}", seed=i)) for i in (1, 2)]
    pixels, yes = smooth((64, 96))[None], np.ones((1, 64, 96), bool)
    singles = [eye_of(find_model(m)).make("cpu") for m in models]
    both = read(make(image, ",".join(models), tmp_path / "e.tif", Look(dtype="float32")))
    np.testing.assert_allclose(both, np.mean([p(pixels, yes)[0] for p in singles], 0), atol=1e-6)
    turned = read(make(image, models[0], tmp_path / "t.tif", Look(dtype="float32", turns=True)))
    answers = []
    for flip in (1, -1):
        for k in range(4):
            p = np.rot90(singles[0](np.rot90(pixels[..., ::flip], k, (2, 3)).copy(), np.rot90(yes, k, (1, 2)).copy()), -k, (2, 3))
            answers.append(p[..., ::flip])
    np.testing.assert_allclose(turned, np.mean(answers, 0)[0], atol=1e-6)


@pytest.mark.parametrize("gsd", [1.0, 0.3])
def test_each_class_is_resampled_as_it_would_be_alone(tmp_path, gsd):
    hole = np.ones((150, 170), bool); hole[60:90, 20:80] = False
    image, look = picture(tmp_path, valid=hole), Look(size=64, overlap=32, gsd=gsd, dtype="float32")
    both = read(make(image, [EYE], tmp_path / "o.tif", look))
    alone = ModelCard("none", gsd_m=0.5, mean=CARD.mean, std=CARD.std)
    for k in (0, 1):
        one = Eye("one", alone, "1", lambda device, k=k: lambda pixels, valid: shades(pixels, valid)[:, k])
        np.testing.assert_array_equal(both[k], read(make(image, [one], tmp_path / f"{k}.tif", look))[0])


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("gsd", ["match", 0.83])
def test_a_full_disk_in_the_middle_then_the_same_command(tmp_path, monkeypatch, after, gsd):
    image, look = picture(tmp_path, (260, 170)), Look(size=96, gsd=gsd)
    straight = make(image, [EYE], tmp_path / "straight.tif", look)
    calls, on_disk = [], rowfile._on_disk
    def failing(path, content):
        calls.append(path)
        if len(calls) > after:
            on_disk(path, bytes(content)[:7]); raise OSError(errno.ENOSPC, "No space left on device")
        on_disk(path, content)
    monkeypatch.setattr(rowfile, "_on_disk", failing)
    with pytest.raises(OSError, match="no space left for"): make(image, [EYE], tmp_path / "out.tif", look)
    monkeypatch.undo()
    made = make(image, [EYE], tmp_path / "out.tif", look)
    assert made.path.read_bytes() == straight.path.read_bytes() and (made.earlier > 0) == (after > 1)


# ---- what the card says

def test_classes_by_number_where_the_card_has_no_names(tmp_path):
    image = picture(tmp_path, (64, 64))
    for classes, names, want in ((4, ("background", "building"), ("building", "class 2", "class 3")), (1, ("roof",), ("roof",)), (2, (), ("class 1",))):
        made = make(image, str(save(tmp_path / f"m{classes}", classes=classes, names=names)), tmp_path / f"{classes}.tif")
        with rasterio.open(made.path) as d: assert d.descriptions == want


def test_answers_that_do_not_fit_the_card(tmp_path):
    image = picture(tmp_path, (64, 64))
    def eye(card, answer): return Eye("M", card, "1", lambda device: answer)
    one = ModelCard("none", gsd_m=0.5, mean=CARD.mean, std=CARD.std)
    def lost(pixels, valid): out = shades(pixels, valid); out[:, 1, 5, 6] = np.nan; return out
    for wrong, said in ((eye(one, shades), "does the card belong"), (eye(CARD, lambda p, v: shades(p, v)[:, 0]), "does the card belong"),
                        (eye(CARD, lost), "model M gives no probabilities .such as nan. for 1 pixels in rows 0..64, columns 0..64"),
                        (eye(CARD, lambda p, v: 3 * shades(p, v) + 1), "gives no probabilities")):
        with pytest.raises(DataError, match=said): make(image, [wrong], tmp_path / "o.tif")
        assert not (tmp_path / "o.tif").exists()
    two = Eye("N", ModelCard("none", gsd_m=0.5, mean=CARD.mean, std=CARD.std, classes=("background", "border", "building")), "2", give_shades)
    with pytest.raises(DataError, match="building, border and border, building"): make(image, [EYE, two], tmp_path / "o.tif")


def test_a_model_trained_on_three_classes_predicts_them(tmp_path, monkeypatch):
    monkeypatch.setenv("AERIAL_CACHE", str(tmp_path / "cache"))
    samples = split_by_scene(synthetic_samples(tmp_path, n=3, size=64, gsd_m=1, progress=False))
    for label in samples.label:
        classes = read_pixels(label).data.copy(); classes[0, :6, ::2] = 2; classes[0, :6, 1::2] = 1
        write_raster(label, classes)
        with rasterio.open(label, "r+") as d: d.update_tags(**{CLASS_MAP_TAG: "1 building; 2 border"})
    task = split_task(samples, 32, 2, 2, Recipe(epochs=1, loss="ce_dice", amp="no"), dict(width=8, depth=2, classes=3), dict(n_valid=2), classes=THREE)
    arm = run_arm(task, "unet", 0, Folder(tmp_path / "arm"), quiet=True)
    assert load_card(arm.folder.path).classes == THREE and arm.counts[["tp", "fn"]].sum().sum() > 0
    made = make(samples.image[0], str(arm.folder.path), tmp_path / "o.tif")
    with rasterio.open(made.path) as d: assert d.descriptions == THREE[1:] and (d.read() != 255).all()


# ---- the page

def test_the_page_of_a_map(tmp_path):
    hole = np.ones((900, 700), bool); hole[:300] = False
    noise = np.random.default_rng(0).integers(1, 255, (3, 900, 700), dtype="uint8")
    made = make(write_raster(tmp_path / "i.tif", noise, **UTM, valid=hole), [EYE], tmp_path / "a<b>.tif", Look(size=512, dtype="uint8"))
    page = made._repr_html_()
    for said in ("a&lt;b&gt;.tif", "900 rows x 700 columns", "EPSG:32633", "0.5 m", "shades (1)", "building, border", "none chosen", "33.3%", "none<"):
        assert said in page, said
    assert len(page) < 60_000 and page.count("<img") == 2 and str(tmp_path) not in page + repr(made)
    hurt = Made(made.path, 2., [(0, 0, 64, 64), (64, 0, 64, 64)], 0, .5)._repr_html_()
    assert "2 (rows 0..64, columns 0..64" in hurt and "pixels of 0.25 m" in hurt
    assert sum(map(len, thumbnails(made.path, limit=5000))) <= 5000
    made.path.unlink()
    assert "no longer there" in made._repr_html_()
