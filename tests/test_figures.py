import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

from aerial_nb.report.figures import (
    FALSE_POSITIVE,
    MISS,
    TRUE_POSITIVE,
    add_scale_bar,
    bar_length,
    error_overlay,
    gallery,
    outline,
    pick_tiles,
    plot_history,
    plot_thresholds,
    save_figure,
    show_crops,
    show_errors,
    to_picture,
)
from aerial_nb.report.tables import compare_sentence, heading, number, score_table
from aerial_nb.training.metrics import Interval, ThresholdCurve, count_image

matplotlib.use("Agg")

# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB
SIGHT = {"normal": np.eye(3),
         "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                                 [-0.003882, -0.048116, 1.051998]]),
         "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                                   [-0.011820, 0.042940, 0.968881]]),
         "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                                 [0.004733, 0.691367, 0.303900]])}


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def scene(h=40, w=50, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (3, h, w), dtype=np.uint8)
    target = rng.choice([0, 0, 1, 255], (h, w)).astype(np.uint8)
    return image, rng.random((h, w)) < .4, target


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_differ_from_each_other_and_from_grey_for_all_eyes(sight):
    def seen(colour):
        c = np.array(to_rgb(colour))
        linear = SIGHT[sight] @ np.where(c <= .04045, c / 12.92, ((c + .055) / 1.055) ** 2.4)
        linear = linear.clip(0, 1)
        return rgb2lab(np.where(linear <= .0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - .055)[None, None])[0, 0]
    ours = [seen(c) for c in (TRUE_POSITIVE, FALSE_POSITIVE, MISS)]
    greys = [seen((g, g, g)) for g in (.5, .6, .7, .8, .95)]
    for i, a in enumerate(ours):
        assert all(deltaE_ciede2000(a, b) > 20 for b in ours[i + 1:])
        assert all(deltaE_ciede2000(a, b) > 11 for b in greys)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_overlay_paints_each_error_in_its_colour_and_never_ignored_pixels(seed):
    image, pred, target = scene(12, 15, seed)
    out = error_overlay(image, pred, target, strength=1)
    valid, truth = target != 255, target == 1
    for where, colour in ((pred & truth, TRUE_POSITIVE), (pred & valid & ~truth, FALSE_POSITIVE), (~pred & truth, MISS)):
        assert np.abs(out[where].astype(int) - np.round(255 * np.array(to_rgb(colour)))).max(initial=0) <= 1
    grey = ~valid | (~pred & ~truth)
    assert (out[grey].max(1) - out[grey].min(1)).max(initial=0) <= 1
    assert out.dtype == np.uint8 and out.shape == (12, 15, 3)


def test_overlay_takes_tensors_other_classes_and_refuses_sizes():
    image, pred, target = scene()
    plain = error_overlay(image, pred, target)
    as_tensors = error_overlay(torch.from_numpy(image), torch.from_numpy(pred), torch.from_numpy(target).long())
    assert np.array_equal(plain, as_tensors)
    assert np.array_equal(error_overlay(image, pred, np.where(target == 1, 3, target), positive=3), plain)
    with pytest.raises(ValueError, match=r"image \(40, 50\), pred \(39, 50\)"): error_overlay(image, pred[1:], target)


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_any_raster_becomes_a_picture(bands, dtype):
    image = (np.random.default_rng(0).random((bands, 20, 30)) * 100).astype(dtype)
    out = to_picture(image)
    assert out.shape == (20, 30, 3) and out.dtype == np.uint8
    if dtype == np.uint8: assert np.array_equal(out[..., 0], image[0])
    else: assert out.min() == 0 and out.max() == 255
    if bands < 3: assert (out[..., 0] == out[..., 2]).all()


def test_stretch_looks_at_valid_pixels_and_survives_nan_and_flat_images():
    image = np.linspace(0, 1, 100, dtype=np.float32).reshape(1, 10, 10).copy()
    image[0, 0] = 1e6
    valid = np.ones((10, 10), bool)
    valid[0] = False
    assert np.unique(to_picture(image, valid)[1:]).size > 50 and np.unique(to_picture(image)[1:]).size < 5
    image[0, 1, 1] = np.nan
    assert to_picture(image, valid).dtype == np.uint8
    assert not to_picture(np.full((3, 4, 4), 7, np.uint16)).any()
    with pytest.raises(ValueError, match="transpose"): to_picture(np.zeros((64, 64, 3)))
    with pytest.raises(ValueError, match="bands, h, w"): to_picture(np.zeros((2, 3, 64, 64)))


@given(st.floats(1, 1e6))
@settings(deadline=None)
def test_scale_bar_is_round_and_near_its_share(extent):
    length = bar_length(extent)
    assert f"{length:e}"[0] in "125" and .09 < length / extent < .45


@pytest.mark.parametrize(("gsd_m", "text", "px"), [(.5, "20 m", 40), (None, "50 px", 50), (30, "2 km", 200 / 3), (.02, "1 m", 50)])
def test_scale_bar_measures_what_it_says(gsd_m, text, px):
    fig, ax = plt.subplots()
    ax.imshow(np.zeros((200, 200)))
    add_scale_bar(ax, gsd_m)
    assert [t.get_text() for t in ax.texts] == [text] and ax.patches[0].get_width() == pytest.approx(px)


def test_errors_are_shown_with_scores_and_scale():
    image, pred, target = scene()
    fig = show_errors(image, pred, target, np.random.default_rng(0).random(pred.shape), gsd_m=.5, title="tile 1")
    assert [ax.get_title() for ax in fig.axes] == ["image", "label", "probability", "errors"]
    from aerial_nb.training.metrics import count_pixels
    assert f"IoU {count_pixels(pred, target).iou:.2f}" in fig.get_suptitle() and "tile 1" in fig.get_suptitle()
    empty = show_errors(image, pred & False, target * 0)
    assert empty.get_suptitle() == "no road in label or prediction"
    grid, axes = plt.subplots(2, 4)
    for row in axes: show_errors(image, pred, target, axes=row)
    assert all("IoU" in row[0].get_ylabel() for row in axes)
    grid.savefig("/dev/null", format="png")


def test_batches_of_any_kind_are_shown():
    images, masks = torch.randn(5, 3, 16, 16), torch.randint(0, 2, (5, 16, 16), dtype=torch.uint8)
    fig = show_crops(images, masks, titles=list("abcde"), columns=3, gsd_m=1.)
    assert len(fig.axes) == 6 and [ax.get_title() for ax in fig.axes] == [*"abcde", ""]
    assert len(show_crops(images[:, :1], most=2).axes) == 2
    with pytest.raises(ValueError, match="no crops"): show_crops([])
    mask = np.zeros((9, 9), bool)
    mask[2:7, 2:7] = True
    assert outline(mask).sum() == 16 and not outline(np.ones((4, 4), bool)).any()


def test_histories_of_arms_and_seeds():
    one = pd.DataFrame({"epoch": range(5), "train_loss": range(5), "valid_loss": range(5), "iou": range(5)})
    many = pd.concat([one.assign(arm=a, seed=s, iou=one.iou + s) for a in ("x", "y") for s in (0, 2)])
    for history, lines in ((one, 1), ({"x": one, "y": [one, one]}, 4), (many, 6)):
        fig = plot_history(history)
        assert [ax.get_title() for ax in fig.axes] == ["loss", "IoU"] and len(fig.axes[1].lines) == lines
    thick = [line for line in plot_history(many).axes[1].lines if line.get_linewidth() > 1]
    assert thick[0].get_ydata().tolist() == [1, 2, 3, 4, 5]
    assert len(plot_history(one, panels=("iou", "apls")).axes) == 1
    with pytest.raises(ValueError, match="no column named apls; there are epoch"): plot_history(one, panels=("apls",))


def test_the_chosen_threshold_is_marked():
    curve = ThresholdCurve(16)
    curve.add(np.array([[.9, .2, .4]]), np.array([[1, 0, 0]]), "a")
    assert f"threshold {curve.best():.3f}" in plot_thresholds(curve).axes[0].get_title()
    assert "IoU 0.500 at threshold 0.250" in plot_thresholds(curve, .25).axes[0].get_title()


def counted(hits):
    "A table whose images have the given IoU in percent; None: nothing there."
    rows = []
    for i, hit in enumerate(hits):
        target, pred = np.zeros((10, 10), np.uint8), np.zeros((10, 10), bool)
        if hit is not None: target[:], pred.ravel()[:hit] = 1, True
        rows.append(count_image(pred, target, f"i{i}", "s"))
    return pd.DataFrame(rows)


def test_tiles_are_picked_by_rank():
    picked = pick_tiles(counted([50, None, 10, 90, 30, 70, 20, 80]), n=2)
    assert picked.group.tolist() == ["worst"] * 2 + ["median"] * 2 + ["best"] * 2
    assert picked.image.tolist() == ["i2", "i6", "i4", "i0", "i7", "i3"]
    assert picked.iou.tolist() == [.1, .2, .3, .5, .8, .9]


@pytest.mark.parametrize("n", range(1, 9))
def test_no_tile_is_shown_twice(n):
    picked = pick_tiles(counted(range(10, 10 + n)), n=3)
    assert picked.image.is_unique and len(picked) == min(n, 3 * max(1, min(3, n // 3)))
    assert picked.iou.is_monotonic_increasing and picked.iloc[-1].image == f"i{n - 1}"


def test_gallery_loads_only_what_it_shows():
    table, loaded = counted(range(5, 95, 3)), []
    def load(name):
        loaded.append(name)
        return scene()
    fig = gallery(table, load, n=1, gsd_m=.5)
    assert loaded == pick_tiles(table, n=1).image.tolist() and len(fig.axes) == 6
    with pytest.raises(ValueError, match="no image has a iou"): gallery(counted([None]), load)


def test_saved_figures_keep_their_limit(tmp_path):
    rng = np.random.default_rng(0)
    fig = plt.figure(figsize=(4, 2))
    for i in (1, 2): fig.add_subplot(1, 2, i).imshow(rng.random((150, 150, 3)))
    for limit in (60, 20):
        path = save_figure(fig, tmp_path / f"{limit}.png", max_kb=limit)
        assert 0 < path.stat().st_size <= limit * 1000 and Image.open(path).size[0] > 150
    with pytest.raises(ValueError, match="show fewer or smaller panels"):
        save_figure(fig, tmp_path / "no.png", max_kb=1, dpi=50)
    assert not (tmp_path / "no.png").exists()
    for i, colour in enumerate((TRUE_POSITIVE, FALSE_POSITIVE, MISS)): fig.text(.3 * i, .5, "mmm", color=colour, fontsize=30)
    shown = np.array(Image.open(save_figure(fig, tmp_path / "palette.png", max_kb=50)).convert("RGB")).reshape(-1, 3)
    for colour in (TRUE_POSITIVE, FALSE_POSITIVE, MISS):
        assert (shown == np.round(255 * np.array(to_rgb(colour)))).all(1).sum() > 200
    line, _ = plt.subplots(figsize=(3, 2))
    assert Image.open(save_figure(line, tmp_path / "line.png")).size == (432, 288)


# ---------------------------------------------------------------- tables


def interval(value, low=float("nan"), high=float("nan"), **more):
    return Interval(value, low, high, .95, **({"statistic": "iou", "scenes": 12, "images": 30, "seeds": 3} | more))


def test_numbers_are_written_for_people():
    assert number(interval(.61234, .5812, .6399)) == "0.612 [0.58, 0.64]"
    assert number(interval(.61234, reason="2 scenes")) == "0.612"
    assert [number(x) for x in (None, float("nan"), np.float32(.5), 12345, np.int64(3), "a", True)] == [
        "–", "–", "0.500", "12,345", "3", "a", "True"]
    assert [heading(x, 3) for x in ("iou", "f1_image", "relaxed_f1", "boundary_iou_image", "apls")] == [
        "IoU", "F1 per image", "relaxed F1 (3 px)", "boundary IoU per image", "apls"]


def test_tables_are_plain_and_say_what_they_rest_on():
    metrics = {"a|b": {"iou": interval(.6, .5, .7), "f1": .75}, "c": {"iou": interval(.5, reason="2 scenes", scenes=2)}}
    lines = score_table(metrics).splitlines()
    assert lines[0] == "| model | IoU | F1 |" and lines[2] == r"| a\|b | 0.600 [0.50, 0.70] | 0.750 |"
    assert lines[3] == "| c | 0.500 | – |"
    assert lines[-1] == ("95% intervals over 12 scenes, 30 images, 3 seeds or 2 scenes, 30 images, 3 seeds. "
                         "No interval: 2 scenes.")
    html = score_table({"<script>": {"iou": .5}}, html=True)
    assert "<script>" not in html and "&lt;script&gt;" in html and html.count("<tr>") == 2
    assert score_table({"a": {"iou": interval(.5, reason="x")}}).endswith("On 12 scenes, 30 images, 3 seeds. No interval: x.")
    with pytest.raises(ValueError, match="at least one row"): score_table({})


def test_sentences_follow_from_the_interval():
    assert compare_sentence("a", "b", interval(.02, -.01, .05)) == (
        "a and b are not distinguishable in IoU (+0.020, 95% interval [-0.010, +0.050], 12 scenes, 3 seeds).")
    assert compare_sentence("a", "b", interval(-.02, -.03, -.01)).startswith("b is above a in IoU by 0.020 (a minus b: 95%")
    assert "another training" in compare_sentence("a", "b", interval(.02, .01, .03, seeds=1))
    assert "nothing can be concluded" in compare_sentence("a", "b", interval(.2, reason="2 scenes"))
    assert "cannot be compared" in compare_sentence("a", "b", interval(float("nan"), reason="the score is undefined"))
