"""A saved model on a samples table: pixel sizes, what it has seen, scores, the cross table, and the notebook."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from aerial_nb.data.catalog import samples_from, synthetic_samples
from aerial_nb.data.loaders import Stats
from aerial_nb.data.raster import DataError, write_raster
from aerial_nb.data.splits import ensure_split, split_hash
from aerial_nb.models.zoo import build
from aerial_nb.scenes import evaluate as module
from aerial_nb.scenes.crosstable import cross_table, plot_cross, read_cell, to_markdown, transfer
from aerial_nb.scenes.evaluate import How, count_one, evaluate, read_map
from aerial_nb.scenes.predict import predictor
from aerial_nb.scenes.provenance import division_of, doubts, find_model, part_of, same_files, with_seen
from aerial_nb.scenes.scale import bring_back, predict_scaled, rescale, scale_factor, wanted_gsd
from aerial_nb.scenes.scoring import empty_images, expected_error, reliability, score_intervals, with_rates
from aerial_nb.training.metrics import ThresholdCurve
from aerial_nb.training.runs import RunFolder
from aerial_nb.training.recipes import divide
from aerial_nb.training.saved import ModelCard, save_model
from aerial_nb.training.tasks import Judged

matplotlib.use("Agg")
ROOT = Path(__file__).parents[1]
SIZES = dict(width=4, depth=2)


def save(folder, bands=3, **card):
    torch.manual_seed(1)
    values = dict(stats=((100.,) * bands, (50.,) * bands), threshold=0.5, gsd_m=0.5, data="elsewhere", extra=dict(size=64)) | card
    save_model(folder, build("unet", bands=bands, **SIZES), "unet", SIZES | dict(bands=bands), **values)
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    return synthetic_samples(folder, n=5, size=96, gsd_m=0.5, progress=False)


def tiles(folder: Path, masks: list, bands: int = 3, gsd_m=0.5) -> pd.DataFrame:
    dice = np.random.default_rng(0)
    for part in ("images", "masks"): (folder / part).mkdir(parents=True)
    for i, mask in enumerate(masks):
        write_raster(folder / f"images/{i}.tif", dice.integers(1, 250, (bands, *mask.shape), dtype="uint8"))
        write_raster(folder / f"masks/{i}.tif", mask[None].astype("uint8"))
    return samples_from(folder / "images", folder / "masks", gsd_m=gsd_m)


# pixel sizes

@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.13, 7.9), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_there_and_back_keeps_size_range_and_validity(rows, cols, factor, seed):
    dice = np.random.default_rng(seed)
    pixels, valid = dice.integers(50, 200, (2, rows, cols), dtype="uint8"), dice.random((rows, cols)) > .3
    small, seen = rescale(pixels, valid, factor)
    assert small.dtype == np.uint8 and small.shape[1:] == seen.shape == tuple(max(1, round(n * factor)) for n in (rows, cols))
    assert not seen.any() or (small[:, seen].min() >= 50 and small[:, seen].max() < 200)   # no zeros from invalid pixels
    probs = np.where(seen, dice.random(seen.shape), np.nan).astype("float32")
    back = bring_back(probs, valid)
    assert back.shape == valid.shape and np.isnan(back[~valid]).all()
    assert np.isfinite(back[valid]).all() and (back[valid] >= 0).all() and (back[valid] <= 1).all()


def test_the_network_sees_the_pixel_size_it_knows():
    shapes = []
    def spy(pixels, valid):
        shapes.append(pixels.shape[2:])
        return np.full(pixels.shape[:1] + pixels.shape[2:], .25, "float32")
    pixels, valid = np.ones((3, 60, 90), "uint8"), np.ones((60, 90), bool)
    out = predict_scaled(spy, pixels, valid, 500, scale_factor(0.5, wanted_gsd(type("C", (), dict(gsd_m=1.)))))
    assert shapes == [(30, 45)] and out.shape == (60, 90) and np.allclose(out, .25)


def test_a_wide_stripe_stays_where_it_was():
    mask = np.zeros((64, 64), bool); mask[:, 20:36] = True
    pixels = np.repeat((mask * 200).astype("uint8")[None], 3, 0)
    answer = lambda x, ok: (x.mean(1) / 200).astype("float32")
    for factor in (0.5, 0.37, 2.):
        found = predict_scaled(answer, pixels, np.ones((64, 64), bool), 64, factor) >= .5
        assert (found & mask).sum() / (found | mask).sum() > .85, factor


@pytest.mark.parametrize("gsd,known,says", [("match", None, "data_gsd_m"), ("match", float("nan"), "data_gsd_m"),
                                            ("mach", 0.5, "'match', 'native' or metres"), (-1, .5, "metres a pixel"), ("match", 60., "wrong unit")])
def test_unknown_and_absurd_pixel_sizes_are_refused(gsd, known, says):
    with pytest.raises(DataError, match=says): scale_factor(known, wanted_gsd(type("C", (), dict(gsd_m=1.)), gsd), "tile")


def test_a_card_without_a_pixel_size_asks_for_one():
    with pytest.raises(DataError, match="native"): wanted_gsd(type("C", (), dict(gsd_m=None)))
    assert wanted_gsd(type("C", (), dict(gsd_m=None)), "0.3") == 0.3


# which model, and what it has seen

def test_models_are_found_by_folder_run_and_arm(tmp_path):
    run = RunFolder.create("train_x", {}, tmp_path / "runs", id="one")
    save(run.arm("a-seed0").path)
    assert find_model("one", tmp_path / "runs").arm == "a-seed0" == find_model(str(run.path)).arm
    save(run.arm("b-seed0").path)
    with pytest.raises(ValueError, match="one/a-seed0, one/b-seed0"): find_model("train_x/one", tmp_path / "runs")
    assert find_model("train_x/one/b-seed0", tmp_path / "runs").name == "train_x/one/b-seed0" == find_model("one/b", tmp_path / "runs").name
    with pytest.raises(FileNotFoundError, match="no model 'c'.*a-seed0, b-seed0"): find_model("one/c", tmp_path / "runs")
    inside = find_model(run.arm("b-seed0").path)
    assert inside.run.id == "one" and inside.name == "train_x/one/b-seed0"


def test_no_model_and_damaged_models(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder with model.safetensors"): find_model("nowhere", tmp_path)
    with pytest.raises(ValueError, match="no model was named"): find_model(" ")
    run = RunFolder.create("train_x", {}, tmp_path / "runs", id="bare")
    with pytest.raises(FileNotFoundError, match=r"bare \(unfinished\) has no saved model"): find_model("bare", tmp_path / "runs")
    run.release()
    folder = save(tmp_path / "cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged or cut off"): find_model(folder)
    other = save(tmp_path / "changed")
    data = bytearray((other / "model.safetensors").read_bytes()); data[-3] ^= 255
    (other / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="changed after it was saved"): find_model(other)


def test_copies_under_other_names_are_recognised(tmp_path, scenes):
    divided = ensure_split(scenes)
    home = Path(scenes.image[0]).parents[1]
    model = find_model(save(tmp_path / "model", data=str(home), split_hash=split_hash(divided)))
    copies = tmp_path / "copies"; copies.mkdir()
    for k, path in enumerate(scenes.image): shutil.copy(path, copies / f"image_{9 - k}.tif")
    own, _ = with_seen(samples_from(copies), model)
    by_name = {Path(p).name: s for p, s in zip(own.image, own.seen)}
    truth = {f"image_{9 - k}.tif": divided.set_index("image").split[p] for k, p in enumerate(scenes.image)}
    assert by_name == truth
    assert len(part_of(own, "test")) == sum(v == "test" for v in truth.values()) < 5
    assert any("trained on" in d for d in doubts(own, model))


def test_neighbours_and_copies_in_another_format_are_in_doubt(tmp_path, scenes):
    home = Path(scenes.image[0]).parents[1]
    divided = ensure_split(scenes)
    model = find_model(save(tmp_path / "model", data=str(home), split_hash=split_hash(divided)))
    trained = divided[divided.split == "train"].reset_index(drop=True)
    (tmp_path / "again").mkdir()
    again = tmp_path / "again" / Path(trained.image[0]).name
    write_raster(again, np.full((3, 96, 96), 7, "uint8"))
    beside = tmp_path / "again/beside.tif"; write_raster(beside, np.full((3, 96, 96), 9, "uint8"))
    rows = pd.concat([trained.tail(1), trained.tail(1).assign(image=str(beside)), trained.tail(1).assign(image=str(again), scene="other")])
    seen = with_seen(rows.assign(split="").reset_index(drop=True), model)[0]
    assert list(seen.seen) == ["train", "near", "name"] and len(doubts(seen, model)) == 3
    assert list(part_of(seen, "test").seen) == ["name"]


def test_files_of_one_size_are_told_apart(tmp_path):
    for name, text in dict(a="one", b="two", c="one").items(): (tmp_path / name).write_text(text)
    assert same_files([tmp_path / "c", tmp_path / "b", tmp_path / "none"], [tmp_path / "a"]) == [0, -1, -1]


def test_data_of_the_model_whose_division_is_lost_is_in_doubt(tmp_path, scenes):
    home = Path(scenes.image[0]).parents[1]
    model = find_model(save(tmp_path / "model", data=str(home)))
    seen, division = with_seen(scenes, model)
    assert set(seen.seen) == {"?"} and division is None and "cannot be made again" in doubts(seen, model)[0]
    with pytest.raises(DataError, match="split is one of"): part_of(seen, "train")
    with pytest.raises(DataError, match="none of the 5 images are in split valid"): part_of(seen, "valid")


# the evaluation

def test_an_evaluation_scores_what_was_predicted(tmp_path, scenes):
    found = evaluate(find_model(save(tmp_path / "model", gsd_m=1.)), scenes, tmp_path / "run", How(), "drawn", cache=tmp_path / "cache")
    assert set(found.counts.factor) == {.5} and len(found.counts) == 5 and found.how.buffer_m == 3
    assert set(found.counts.buffer_px) == {6.} and set(found.counts.boundary_px) == {4}
    for row in found.counts.itertuples():
        judged, probs = found.tiles[row.image], read_map(found.folder, row.image)
        pred = probs >= .5
        assert row.tp == (pred & (judged.target == 1)).sum() and row.tp + row.fp + row.fn + row.tn == 96 * 96
    network, card = find_model(tmp_path / "model").load(), find_model(tmp_path / "model").card
    answer = predictor(network, Stats(card.mean, card.std))
    judged = found.tiles["scene_0_000"]
    direct = predict_scaled(answer, np.asarray(judged.pixels), np.asarray(judged.valid), 64, .5)
    np.testing.assert_allclose(read_map(found.folder, "scene_0_000"), direct, atol=1 / 254)   # the saved normalisation, 8 bits
    at = found.curve.table(.5).set_index("image")
    assert (at.tp == found.counts.set_index("image").tp).all()
    record = json.loads(json.dumps(found.record()))
    assert record["is_result"] and record["counted_in"] == "this run" and record["scores"]["iou"]["scenes"] == 5
    assert "best_threshold_not_used" in record and found.threshold == record["threshold"] == .5
    assert len(pd.read_csv(tmp_path / "run/images.csv")) == 5 == len(pd.read_csv(tmp_path / "run/scenes.csv"))


def test_reading_ones_own_test_images_is_counted_in_the_run_that_trained(tmp_path, scenes):
    divided = ensure_split(scenes)
    run = RunFolder.create("train_x", {}, tmp_path / "runs", id="own")
    save(run.arm("a").path, split_hash=split_hash(divided))
    model = find_model("own", tmp_path / "runs")
    found = evaluate(model, scenes, tmp_path / "ev", How(), "drawn", cache=tmp_path / "cache")
    kept = json.loads((run.path / "test_read.json").read_text())["readings"]
    assert found.counted_in == "run train_x/own" and len(kept) == 1 and kept[0]["reader"] == "a"
    assert list(found.counts.seen.unique()) == ["test"] and not found.doubts
    evaluate(model, scenes, tmp_path / "ev2", How(), "drawn", cache=tmp_path / "cache")
    assert len(json.loads((run.path / "test_read.json").read_text())["readings"][0]["again"]) == 1
    assert "was counted in run train_x/own" in " ".join(found.remarks())
    everything = evaluate(model, scenes, tmp_path / "ev3", How(split="all"), "drawn", cache=tmp_path / "cache")
    assert any(r.startswith("**No result:**") for r in everything.remarks())
    assert not everything.record()["is_result"] and "were trained on" in everything.doubts[0]
    chosen = evaluate(model, scenes, tmp_path / "ev4", How(split="valid"), "drawn", cache=tmp_path / "cache")
    assert chosen.counted_in == "" and "choose" in chosen.doubts[0]


@pytest.mark.parametrize("card,says", [(dict(bands=4), "trained on 4 bands and the images have 3"),
                                       (dict(classes=("background", "road", "water")), "3 classes apart .background, road, water"),
                                       (dict(gsd_m=None), "gsd='native'"),
                                       (dict(gsd_m=1., extra=dict(size=64, squeeze=64)), "squeezed to 64 px")])
def test_models_that_do_not_fit_are_refused_before_anything_is_read(tmp_path, scenes, card, says):
    with pytest.raises(DataError, match=says):
        evaluate(find_model(save(tmp_path / "model", **card)), scenes, tmp_path / "run", cache=tmp_path / "cache")
    assert not (tmp_path / "run").exists()


def test_a_squeezed_model_is_squeezed_where_the_pixels_agree(tmp_path, scenes, monkeypatch):
    asked = []
    real = module.predict_squeezed
    monkeypatch.setattr(module, "predict_squeezed", lambda *a: asked.append(a[3]) or real(*a))
    model = find_model(save(tmp_path / "model", extra=dict(size=64, squeeze=48)))
    evaluate(model, scenes.head(1), tmp_path / "run", cache=tmp_path / "cache")
    assert asked == [48]


def test_images_without_labels_or_pixel_size(tmp_path, scenes):
    model = find_model(save(tmp_path / "model"))
    with pytest.raises(DataError, match="no label"): evaluate(model, scenes.assign(label=""), tmp_path / "a", cache=tmp_path / "cache")
    bare = scenes.assign(gsd_m=np.nan)
    with pytest.raises(DataError, match="data_gsd_m"): evaluate(model, bare, tmp_path / "b", cache=tmp_path / "cache")
    assert set(evaluate(model, bare, tmp_path / "c", How(data_gsd_m=1.), cache=tmp_path / "cache").counts.factor) == {2.}
    native = evaluate(model, bare, tmp_path / "d", How(gsd="native"), cache=tmp_path / "cache")
    assert set(native.counts.factor) == {1.} and set(native.counts.buffer_px) == {3.}
    assert "unknown: lengths count pixels" in native.remarks()[0] and "own pixel size" in native.remarks()[1]


def test_labels_of_one_class_are_said_and_never_a_silent_nan(tmp_path):
    samples = tiles(tmp_path / "fields", [np.zeros((64, 64))] * 3)
    found = evaluate(find_model(save(tmp_path / "model", threshold=1.)), samples, tmp_path / "run", cache=tmp_path / "cache")
    record = found.record()
    assert "No label holds a positive pixel" in record["empty"][0] and record["scores"]["iou"]["reason"] == "the score is undefined"
    assert "3 of 3 images are empty in label and prediction" in record["empty"][1]
    full = tiles(tmp_path / "full", [np.ones((64, 64))] * 3)
    assert any("Every labelled pixel is positive" in s for s in
               evaluate(find_model(tmp_path / "model"), full, tmp_path / "run2", cache=tmp_path / "cache").record()["empty"])
    found.plot()


def test_objects_and_graphs_of_one_image():
    target = np.zeros((128, 128), "uint8"); target[60:68] = 1; target[:, 60:68] = 1; target[:16] = 255
    probs = np.where(target == 1, .9, .1).astype("float32"); probs[target == 255] = np.nan
    one = Judged("cross", "here", np.zeros((3, 128, 128), "uint8"), target != 255, target)
    row = count_one(probs, one, .5, How(objects=True, graphs=True), 1.)
    assert row["topo_f1"] == row["apls"] == 1 and (row["object_tp"], row["object_fp"], row["object_fn"]) == (1, 0, 0)
    probs[:, 60:68] = .1; probs[60:68] = .9
    worse = count_one(probs, one, .5, How(objects=True, graphs=True), 1.)
    assert worse["topo_recall"] < 1 and worse["apls"] < 1
    empty = Judged("field", "there", one.pixels, one.valid, np.zeros_like(target))
    assert np.isnan(count_one(np.zeros((128, 128), "float32"), empty, .5, How(graphs=True), 1.)["apls"])
    table = pd.DataFrame([row, worse | dict(image="b", scene="b"), worse | dict(image="c", scene="c")])
    scores = score_intervals(table)
    assert all(0 <= i.low <= i.value <= i.high <= 1 for i in scores.values() if np.isfinite(i.low))
    assert scores["topo_f1"].value < 1 and 0 <= scores["object_f1"].value <= 1 and {"topo_f1", "iou"} <= set(with_rates(table))
    with pytest.raises(DataError, match="lengths"): How(buffer_m=-1)


def test_calibration_of_sure_and_of_honest_probabilities():
    dice, honest = np.random.default_rng(0), ThresholdCurve(bins=256)
    probs = dice.random((300, 300)).astype("float32")
    honest.add(probs, (dice.random(probs.shape) < probs).astype("uint8"), "a")
    assert expected_error(honest) < .02 and reliability(honest).pixels.sum() == probs.size
    wrong = ThresholdCurve(bins=256); wrong.add(np.ones((30, 30)), np.zeros((30, 30), "uint8"), "a")
    assert expected_error(wrong) > .95
    assert empty_images(pd.DataFrame([dict(tp=1, fp=1, fn=1, tn=1)])) == ["Every image (1) holds positive pixels."]


# the cross table

def finished(folder: Path, model, samples, data, **changes) -> Path:
    run = RunFolder.create("evaluate", {}, folder)
    run.finish(evaluate(model, samples, run, How(**changes), data, cache=folder / "cache").record())
    return run.path


def test_a_cross_table_says_what_the_evaluations_said(tmp_path, scenes):
    one, two = find_model(save(tmp_path / "one", data="one")), find_model(save(tmp_path / "two", data="two", gsd_m=1.))
    runs = [finished(tmp_path / "runs", m, scenes.iloc[rows].reset_index(drop=True), d)
            for m in (one, two) for d, rows in (("one", slice(0, 3)), ("two", slice(2, 5)))]
    table = cross_table(runs)
    for path in runs:
        record = read_cell(path)
        cell = table.cell((record["trained_on"], "unet"), record["tested_on"])
        assert cell.interval.value == pytest.approx(record["scores"]["iou"]["value"])
        assert cell.interval.low == pytest.approx(record["scores"]["iou"]["low"], nan_ok=True)
    assert table.rows == [("one", "unet"), ("two", "unet")] and table.columns == ["one", "two"]
    assert len(transfer(table)) == 2 and "| two |" in to_markdown(table) and "<table>" in table._repr_html_()
    assert len(plot_cross(table).axes) == 1
    assert cross_table(runs, "relaxed_f1").cell(("one", "unet"), "two").interval.value > 0


def test_seeds_are_pooled_repetitions_are_not_and_no_results_are_marked(tmp_path, scenes):
    seeds = [find_model(save(tmp_path / f"m{k}", data="one", extra=dict(size=64, arm="net", seed=k))) for k in (0, 1)]
    runs = [finished(tmp_path / "runs", m, scenes, "two") for m in (*seeds, seeds[0])]
    cell = cross_table(runs).cells.iloc[0]
    assert cell.seeds == 2 and cell.interval.seeds == 2
    bad = find_model(save(tmp_path / "bad", data="one", threshold=None, extra=dict(size=64, arm="net")))
    marked = cross_table([finished(tmp_path / "runs", bad, scenes, "two")])
    assert not marked.cells.is_result.any() and "is no result: the model has no threshold" in to_markdown(marked)
    fewer = finished(tmp_path / "runs", seeds[1], scenes.head(3), "two")
    with pytest.raises(ValueError, match="other images of two with each seed"): cross_table([runs[0], fewer])


def test_what_is_no_evaluation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one"): cross_table([])
    run = RunFolder.create("train_x", {}, tmp_path, id="other")
    with pytest.raises(ValueError, match="not finished"): read_cell(run)
    run.finish(dict(iou=1))
    with pytest.raises(ValueError, match="is no evaluation"): read_cell("other", tmp_path)


# the notebook

def run_notebook(folder: Path, *params) -> subprocess.CompletedProcess:
    environ = os.environ | dict(AERIAL_CACHE=str(folder / "cache"), OMP_NUM_THREADS="1")
    command = [str(Path(sys.executable).parent / "aerial_run"), str(ROOT / "nbs/evaluate.ipynb"), "--runs", str(folder / "runs"), *params]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=400)


def test_the_notebook_runs_and_leaves_tables_figures_and_a_record(tmp_path, scenes):
    save(tmp_path / "model", gsd_m=1.)
    home = Path(scenes.image[0]).parents[1]
    done = run_notebook(tmp_path, "-p", "model", str(tmp_path / "model"), "-p", "data", str(home), "-p", "gsd", "0.5", "-p", "limit", "3")
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "runs/evaluate").iterdir()
    run = RunFolder.open(path)
    assert run.status == "finished" and run.metrics["is_result"] and run.metrics["factors"] == [1.0] and run.metrics["gsd"] == .5
    assert {"images.csv", "scenes.csv", "predictions", "test_read.json", "evaluate.ipynb"} <= {p.name for p in path.iterdir()}
    assert {"threshold", "scenes", "gallery", "errors", "cross_table"} <= {p.stem for p in (path / "figures").glob("*.png")}
    assert "smoke" not in run.metrics["model"]


def test_the_division_of_each_experiment_is_found_again(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("images", "masks"): (tmp_path / part).mkdir()
    for i in range(10):
        write_raster(tmp_path / f"images/tile_{i:04}.tif", rng.integers(1, 250, (3, 32, 32), dtype="uint8"))
        write_raster(tmp_path / f"masks/tile_{i:04}.tif", rng.integers(0, 2, (1, 32, 32), dtype="uint8"))
    samples = samples_from(tmp_path / "images", tmp_path / "masks")
    for way in (ensure_split, divide):
        table = way(samples)
        found = division_of(ModelCard("unet", split_hash=split_hash(table)), samples)
        assert found is not None and found.split.tolist() == table.split.tolist()
    assert division_of(ModelCard("unet", split_hash="0" * 16), samples) is None
    assert division_of(ModelCard("unet"), samples) is None
