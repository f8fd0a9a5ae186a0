"""Where a model errs, and why: kinds of places, sizes, calibration, seams, suspected labels, and all of it for a finished run."""
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import geopandas as gpd
import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from rasterio.transform import from_origin
from scipy.ndimage import gaussian_filter, label

from aerial_nb.data.catalog import open_samples, synthetic_samples
from aerial_nb.data.door import TestDoor
from aerial_nb.data.raster import DataError
from aerial_nb.data.splits import ensure_split
from aerial_nb.data.synthetic import scene
from aerial_nb.scenes.causes import (Case, against_rest, attribute_kinds, blank_kinds, border_kinds, burn_attribute, cause_table, count_causes,
                                     count_kinds, light_kinds, plot_causes, weaknesses)
from aerial_nb.scenes.confusions import rank_tiles, tile_losses
from aerial_nb.scenes.finished import open_finished
from aerial_nb.scenes.runerrors import aerial_errors, errors_of, read_errors, run_errors
from aerial_nb.scenes.seams import seam_distance, seam_positions, seams_of
from aerial_nb.scenes.sizes import object_rows, road_rows, size_table, width_table
from aerial_nb.scenes.suspects import ABSENT, MISSING, find_suspects, label_offset, write_suspects
from aerial_nb.scenes.trust import calibration, calibration_error, curve_of, threshold_table, trust_says
from aerial_nb.scenes.windowmap import cover
from aerial_nb.training.counts import count_pixels
from aerial_nb.training.runs import RunFolder

matplotlib.use("Agg")


def case_of(truth, probs=None, name="a", **options) -> Case:
    truth = np.asarray(truth, np.uint8)
    return Case(name, (truth % 255).astype("float32") if probs is None else np.asarray(probs, "float32"), truth, **options)


def noisy(mask, seed, amount=2.2):
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=mask.shape), 3)
    logit = 9 * (gaussian_filter((mask == 1).astype(float), 1.2) - .5) + amount * noise / noise.std()
    return (1 / (1 + np.exp(-logit))).astype("float32")


@pytest.fixture(scope="module")
def drawn():
    return [scene(192, 60 + i, gsd_m=.8) for i in range(6)]


# ---- kinds of places

def test_a_case_refuses_what_does_not_fit():
    with pytest.raises(DataError, match="all must have one size"): Case("a", np.zeros((4, 4)), np.zeros((4, 5)))
    with pytest.raises(DataError, match="image"): Case("a", np.zeros((4, 4)), np.zeros((4, 4)), np.zeros((3, 4, 5)))
    with pytest.raises(DataError, match="trees"): Case("a", np.zeros((4, 4)), np.zeros((4, 4)), attributes=dict(trees=np.zeros((2, 2))))
    with pytest.raises(DataError, match="sigmoid"): Case("a", np.full((4, 4), -3.), np.zeros((4, 4)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(5, 40), st.integers(5, 40))
def test_every_cause_counts_every_pixel_once(seed, rows, cols):
    dice = np.random.default_rng(seed)
    target = dice.choice([0, 1, 255], (rows, cols), p=(.6, .3, .1)).astype(np.uint8)
    probs = np.where(dice.random((rows, cols)) < .1, np.nan, dice.random((rows, cols)))
    case = Case("a", probs, target, dice.integers(0, 255, (3, rows, cols)).astype(np.uint8), attributes=dict(trees=dice.random((rows, cols)) < .5))
    whole = vars(count_pixels(case.pred, np.where(case.seen, target, 255).astype(np.uint8)))
    sums = count_causes(case).groupby("cause")[list(whole)].sum()
    for cause, row in sums.iterrows(): assert row.to_dict() == whole, cause
    assert len(sums) == 4 + bool(np.isnan(probs).any())


def test_distances_are_to_the_nearest_border_and_blank_pixel():
    probs = np.zeros((20, 30)); probs[:, :5] = np.nan
    border, blank = border_kinds(case_of(np.zeros((20, 30)), probs), (2, 4)), blank_kinds(case_of(np.zeros((20, 30)), probs), (2, 4))
    assert border.index[0].max() == 0 and border.index[10, 10] == 2 and border.index[2, 15] == 1 and border.index[10, 29] == 0
    assert blank.index[3, [5, 6, 7, 8, 9]].tolist() == [0, 0, 1, 1, 2]


def test_a_planted_weakness_is_found_and_an_innocent_layer_is_not(drawn):
    cases = []
    for i, s in enumerate(drawn):
        trees, calm = (gaussian_filter(np.random.default_rng(k + i).normal(size=s.roads.shape), 8) > .02 for k in (50, 90))
        probs = np.where(trees & (s.roads == 1), .2 * noisy(s.roads, i), noisy(s.roads, i))
        cases.append(Case(f"s{i}", probs, s.roads, attributes=dict(trees=trees, calm=calm)))
    counts = pd.concat([count_kinds(c, attribute_kinds(c, n)) for c in cases for n in ("trees", "calm")])
    weak = weaknesses(counts, "recall")
    assert weak.kind.tolist() == ["trees"] and weak.difference[0] < -.7 and weak.sure[0]
    assert not against_rest(counts, "calm", "calm", "recall").distinguishable
    table = cause_table(counts).set_index("kind")
    assert table.recall["trees"] < .05 < .8 < table.recall["not trees"] and table.recall_high["trees"] < table.recall_low["not trees"]
    assert (table.error_rate_low <= table.error_rate).all() and (table.error_rate <= table.error_rate_high).all()
    few = cause_table(counts[counts.scene.isin(["s0", "s1"])])
    assert few.iou_low.isna().all() and few.reason.str.contains("at least 3").all()
    assert len(plot_causes(table.reset_index()).axes) == 2


def test_layers_by_value_and_by_polygon():
    case = case_of(np.zeros((10, 10)), crs="EPSG:32631", transform=from_origin(500000, 4000, 1, 1), attributes=dict(
        land=(np.full((10, 10), 3, np.uint8), {1: "field", 3: "wood"}), odd=np.full((10, 10), 7)))
    assert (attribute_kinds(case, "land").index == 1).all()
    with pytest.raises(DataError, match="neither true nor false"): attribute_kinds(case, "odd")
    half = gpd.GeoDataFrame(geometry=gpd.GeoSeries.from_wkt(["POLYGON ((500000 4000, 500005 4000, 500005 3990, 500000 3990, 500000 4000))"]), crs="EPSG:32631")
    assert burn_attribute(half.to_crs("EPSG:4326"), case).sum() == 50
    with pytest.raises(DataError, match="no CRS"): burn_attribute(half, case_of(np.zeros((10, 10))))


def test_brightness_is_measured_beside_valid_pixels_only():
    image = np.tile(np.linspace(40, 200, 60), (60, 1))[None].repeat(3, 0)
    probs = np.zeros((60, 60)); probs[:, 50:] = np.nan
    bright = light_kinds(Case("a", probs, np.zeros((60, 60), np.uint8), image))[0]
    assert (np.diff(bright.index[30, :50]) >= 0).all() and bright.index[30, [0, 49]].tolist() == [0, 4]


# ---- tiles

def test_tiles_by_iou_leave_out_empty_ones():
    probs, target = np.zeros((32, 128)), np.zeros((32, 128), np.uint8)
    target[4:8, 4:8] = 1; target[4:8, 40:48] = 1; probs[4:8, 40:44] = .4; target[9, 70] = 1; probs[9, 70] = .3
    ranked = rank_tiles(tile_losses("a", probs, target, 32, threshold=.3), by="iou")
    assert ranked.iou.tolist() == [0, .5, 1] and ranked.group.tolist() == ["worst", "median", "best"]
    with pytest.raises(ValueError, match="none has a positive"): rank_tiles(tile_losses("a", probs * 0, target * 0, 32), by="iou")
    with pytest.raises(ValueError, match="by loss or by iou"): rank_tiles(ranked, by="luck")


# ---- sizes

def test_objects_are_matched_covered_and_cut():
    truth, probs = np.zeros((40, 60), np.uint8), np.zeros((40, 60))
    truth[5:11, 5:11] = 1; probs[5:11, 5:11] = 1            # found
    truth[20:26, 5:11] = 1; truth[20:26, 12:18] = 1; probs[20:26, 5:18] = 1   # two joined into one
    truth[5:11, 54:60] = 1                                  # cut by the border
    truth[30:36, 30:36] = 1                                 # missed
    rows = object_rows(case_of(truth, probs, gsd_m=2.))
    own = rows[rows.side == "label"].sort_values(["row", "col"])
    assert own.matched.tolist() == [True, False, False, False, False] and own.covered.tolist() == [True, False, True, True, False]
    assert own.cut.tolist() == [False, True, False, False, False] and set(own.area) == {144.}
    images = pd.DataFrame([dict(image=f"{n}", scene=f"{n}") for n in "abc"])
    table = size_table(pd.concat([rows.assign(image=n) for n in "abc"]), images, (100., 200.))
    assert table.kind.tolist() == ["100 to 200 m²", "200 m² and more"] and table.n.tolist() == [12, 0] and table.recall[0] == pytest.approx(.25)
    assert table.n_predicted.sum() == 6 and np.isnan(table.recall[1])


def test_where_all_scenes_agree_the_interval_is_not_a_point():
    truth = np.zeros((30, 30), np.uint8); truth[5:15, 5:15] = 1
    rows = pd.concat([object_rows(case_of(truth, np.zeros((30, 30)), n)) for n in "abcd"])
    table = size_table(rows, rows[["image", "scene"]].drop_duplicates(), (50.,), "px²")
    assert table.recall[0] == 0 and .4 < table.recall_high[0] < .8


def test_roads_by_width():
    truth, probs = np.zeros((90, 200), np.uint8), np.zeros((90, 200))
    truth[20:24] = 1; truth[60:72] = 1; probs[60:72] = 1; probs[20:24, :50] = 1
    rows = road_rows(case_of(truth, probs, gsd_m=.5), 2.)
    table = width_table(rows, pd.DataFrame([dict(image="a", scene="a")]), (4.,))
    assert table.length.tolist() == pytest.approx([99, 97], abs=5)
    assert table.recall.tolist() == pytest.approx([.27, 1], abs=.03) and (table.precision > .98).all()


# ---- what a probability is worth

def test_calibration_of_honest_and_of_bold_probabilities():
    dice = np.random.default_rng(0)
    honest, bold = [], []
    for i in range(6):
        p = dice.random((128, 128)); truth = dice.random(p.shape) < p
        honest.append(case_of(truth, p, f"{i}")); bold.append(case_of(truth, 1 / (1 + np.exp(-3 * np.log(p / (1 - p)))), f"{i}"))
    good, bad = curve_of(honest), curve_of(bold)
    table = calibration(good)
    assert calibration_error(good).value < .01 and ((table.low - .01 <= table.probability) & (table.probability <= table.high + .01)).all()
    assert calibration_error(bad, inner=True).low > .1 and table.pixels.sum() == 6 * 128**2
    assert "too sure" in trust_says(bad, .5)[0] and "too" not in trust_says(good, .5)[0]
    cuts = threshold_table(bad, .95).set_index("which")
    best = cuts.loc["best IoU here (hindsight)"]
    assert best.iou == cuts.iou.max() and best.gain == pytest.approx(best.iou - cuts.iou["chosen"]) and best.gain_low > 0
    assert "hindsight" in trust_says(bad, .95)[1]


# ---- seams

def test_seams_lie_between_kept_parts():
    rows, cols = seam_positions(cover((300, 200), 128, 32).kept)
    away = seam_distance((300, 200), cover((300, 200), 128, 32).kept)
    for r in rows: assert away[int(np.ceil(r)), 0] <= .5
    assert (away > 0).all() and np.isinf(seam_distance((90, 90), cover((90, 90), 128).kept)).all()


@pytest.mark.parametrize("scenes", [6, 2])
def test_an_artificial_seam_is_found_and_a_random_grid_is_not(scenes):
    plan, worse, sound = cover((256, 256), 96, 32), [], []
    for i in range(scenes):
        truth = np.zeros((256, 256), np.uint8); truth[20 + i::37] = 1; truth[:, 31 + i::41] = 1
        probs = noisy(truth, i, 3.)
        at = seam_distance(probs.shape, plan.kept) < 4
        sound.append(case_of(truth, probs, f"{i}")); worse.append(case_of(truth, np.where(at, noisy(truth, 77 + i, 8.), probs), f"{i}"))
    found = seams_of(worse, plan.kept)
    assert found.found and found.low > .1 and "more errors within 8 px" in found.says
    assert not seams_of(sound, plan.kept).found and "not distinguishable" in seams_of(sound, plan.kept).says
    assert not seams_of(sound, cover((256, 256), 128, 32).kept).found
    assert found.unit == ("scenes" if scenes > 4 else "cells between seams")


def test_without_seams_nothing_is_claimed():
    got = seams_of([case_of(np.eye(64))], cover((64, 64), 128).kept)
    assert not got.found and "cannot be said" in got.says


# ---- suspected labels

@pytest.fixture(scope="module")
def towns():
    cases, made = [], []
    for i, s in enumerate([scene(192, 60 + i, gsd_m=.5) for i in range(4)]):
        target, (parts, n) = s.buildings.copy(), label(s.buildings == 1)
        if n:
            k = np.argsort(-np.bincount(parts.ravel())[1:])[0] + 1
            if i < 2: target[parts == k] = 0; made.append((f"s{i}", MISSING, parts == k))
        if i >= 2:
            new = np.zeros(target.shape, bool); new[8:30, 150:180] = True
            if not (s.buildings[0:40, 140:190] == 1).any(): target[new] = 1; made.append((f"s{i}", ABSENT, new))
        cases.append(Case(f"s{i}", noisy(s.buildings, i, 1.), target, s.image, gsd_m=s.gsd_m, crs=s.crs, transform=s.transform))
    assert len(made) >= 3
    return cases, made


def test_planted_mistakes_come_first(towns, tmp_path):
    cases, made = towns
    found = find_suspects(cases)
    hits = [any(a == n and k == kind and where[int(r), int(c)] for n, kind, where in made) for a, k, r, c in found[["image", "kind", "row", "col"]].itertuples(index=False)]
    assert all(hits[:len(made)]) and sum(hits) == len(made)
    assert (found["rank"] == np.arange(1, len(found) + 1)).all() and found.score.is_monotonic_decreasing and (found.area_m2 >= 20).all()
    assert found.crs.to_epsg() == 4326 or found.crs == cases[0].crs, "images of two zones meet in degrees"
    back = gpd.read_file(write_suspects(found, tmp_path / "a.gpkg")).to_crs("EPSG:4326")
    globe = gpd.read_file(write_suspects(found, tmp_path / "a.geojson"))
    assert np.allclose(back.representative_point().x, found.lon, atol=1e-4) and np.allclose(globe.representative_point().y, found.lat, atol=1e-4)
    sheet = pd.read_csv(write_suspects(found, tmp_path / "a.csv"))
    assert len(sheet) == len(found) and sheet.decision.isna().all() and sheet.geometry.str.startswith(("POLYGON", "MULTIPOLYGON")).all()
    with pytest.raises(DataError, match="gpkg, .geojson or .csv"): write_suspects(found, tmp_path / "a.shp")


def test_slivers_and_a_known_offset_are_no_suspects(towns):
    cases = [replace(c, target=np.roll(s, (0, 3), (0, 1)), crs=None, transform=None) for c in towns[0] for s in [(c.probs > .5).astype(np.uint8)]]
    offset = label_offset(cases)
    assert offset is not None and offset.east_px == pytest.approx(3, abs=.5) and abs(offset.south_px) < .5
    assert not len(find_suspects(cases, 4.)) and len(find_suspects(cases, .5, min_area_m2=5)) > len(find_suspects(cases, .5, offset, min_area_m2=5))
    with pytest.raises(DataError, match="low below high"): find_suspects(cases, low=.9, high=.1)


def test_without_a_place_on_the_map_suspects_have_pixels(tmp_path):
    truth = np.zeros((60, 60), np.uint8); truth[20:40, 20:40] = 1
    found = find_suspects([case_of(truth, np.zeros((60, 60)))])
    assert found[["x", "y"]].iloc[0].tolist() == [30, 30] and np.isnan(found.lon[0]) and found.pixels[0] == 400 and np.isnan(found.area_m2[0])
    assert len(gpd.read_file(write_suspects(found, tmp_path / "a.gpkg"))) == 1
    with pytest.raises(DataError, match="no place on the map"): write_suspects(found, tmp_path / "a.geojson")
    assert len(find_suspects([case_of(truth)])) == 0 and write_suspects(find_suspects([case_of(truth)]), tmp_path / "none.gpkg").is_file()


# ---- a finished run

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A run of two arms that was trained for a second."
    from aerial_nb.training.arms import Arm, run_arm
    from aerial_nb.training.learner import Recipe
    from aerial_nb.training.tasks import split_task
    room = tmp_path_factory.mktemp("room")
    os.environ["AERIAL_CACHE"], before = str(room / "cache"), os.environ.get("AERIAL_CACHE")
    data = Path(synthetic_samples(room / "data", n=8, size=128, seed=5, gsd_m=1., progress=False).image[0]).parents[1]
    samples = ensure_split(open_samples(data), (.4, .2, .4))
    run = RunFolder.create("train_small", dict(data=str(data)), room / "runs", id="one")
    task = split_task(samples, 64, 8, 16, Recipe(epochs=1, lr=5e-3, amp=""), dict(width=4, depth=2), dict(n_valid=4, seed=0), data=str(data))
    for seed in (0, 1): run_arm(task, Arm("small", "unet"), seed, run.arm(f"small-seed{seed}"), quiet=True)
    with pytest.raises(DataError, match="is unfinished: only a finished run"): open_finished(run)
    run.finish(dict(is_result=False))
    yield run, data, samples
    if before is None: del os.environ["AERIAL_CACHE"]
    else: os.environ["AERIAL_CACHE"] = before


@pytest.fixture(scope="module")
def looked_at(finished):
    from aerial_nb.scenes import finished as module
    original, patch = module._divided, pytest.MonkeyPatch()
    patch.setattr(module, "_divided", lambda run, data: iter([ensure_split(open_samples(data), (.4, .2, .4)), *original(run, data)]))
    yield run_errors(finished[0])
    patch.undo()


def test_a_run_leaves_figures_tables_and_suspects(finished, looked_at):
    run, _, samples = finished
    home = run.path / "errors/small-seed0"
    assert looked_at.folder == home and {"causes.csv", "tiles.csv", "images.csv", "thresholds.csv", "calibration.csv", "suspects.gpkg", "suspects.csv",
                                         "summary.json", "trust.png", "causes.png", "tiles_loss.png"} <= {p.name for p in home.iterdir()}
    assert all(p.stat().st_size < 120_000 for p in home.glob("*.png")) and "small-seed1" in looked_at.says[-1]
    scores = pd.read_csv(run.path / "arms/small-seed0/scores.csv").set_index("image")
    images = pd.read_csv(home / "images.csv").set_index("image")
    assert (images[["tp", "fp", "fn"]] == scores.loc[images.index, ["tp", "fp", "fn"]]).all().all() and len(images) == (samples.split == "test").sum()
    again = read_errors(home)
    assert again.says == looked_at.says and len(again.suspects) == len(looked_at.suspects) and "<li>" in again._repr_html_() and "data:image/png" in again._repr_html_()


def test_the_door_keeps_count_and_other_models_are_refused(finished, looked_at):
    run, _, samples = finished
    first = TestDoor(samples, run).readings[0]
    open_finished(run)
    now = TestDoor(samples, run).readings
    assert [r["reader"] for r in now] == ["small-seed0", "small-seed1"] and len(now[0]["again"]) == len(first["again"]) + 1
    open_finished(run, part="valid")
    assert len(TestDoor(samples, run).readings[0]["again"]) == len(now[0]["again"]), "validation tiles have no door"
    file = run.path / "arms/small-seed0/arm.json"
    kept = file.read_text()
    file.write_text(json.dumps(json.loads(kept) | dict(threshold=.77)))
    try:
        with pytest.raises(DataError, match="another model or threshold"): open_finished(run)
    finally: file.write_text(kept)


def test_what_is_gone_or_changed_is_named(finished, looked_at, tmp_path):
    run, data, samples = finished
    with pytest.raises(DataError, match="no arm 'big'"): open_finished(run, "big")
    with pytest.raises(DataError, match="cannot be opened again.*data="): open_finished(run, data=str(tmp_path / "moved"))
    with pytest.raises(DataError, match="part is one of"): open_finished(run, part="train")
    with pytest.raises(DataError, match="no run"): open_finished("nothing", runs=tmp_path)
    name = pd.read_csv(run.path / "arms/small-seed0/scores.csv").image[0]
    for file, says in ((run.path / f"arms/small-seed0/predictions/{name}.tif", f"are gone.*{name}"), (data / f"masks/{name}.tif", "cannot be opened again|cannot be used|divided")):
        kept = file.read_bytes(); file.unlink()
        try:
            with pytest.raises(DataError, match=says): open_finished(run)
        finally: file.write_bytes(kept)
    bare = RunFolder.create("bench_small", {}, tmp_path, id="bare").finish({})
    with pytest.raises(DataError, match="trained no model"): open_finished(bare)


def test_the_command_refuses_in_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("AERIAL_RUNS", str(tmp_path)); monkeypatch.setattr(sys, "argv", ["aerial_errors", "nothing", "--min-area-m2", "5"])
    with pytest.raises(SystemExit) as end: aerial_errors()
    assert end.value.code == 2 and "no run 'nothing'" in caplog.text and not any(r.exc_info for r in caplog.records)


def test_the_command_ends_with_codes(finished, looked_at, tmp_path, caplog):
    run = finished[0]
    for arguments, code in ((dict(part="valid", out=str(tmp_path / "out"), what="buildings"), 0), (dict(attributes="trees"), 2), (dict(what="cars"), 2)):
        with pytest.raises(SystemExit) as end: aerial_errors(str(run.path), **arguments)
        assert end.value.code == code, caplog.text
    assert json.loads((tmp_path / "out/summary.json").read_text())["part"] == "valid images"


def test_maps_from_anywhere(drawn):
    cases = [Case(f"s{i}", noisy(s.roads, i), s.roads, gsd_m=.8) for i, s in enumerate(drawn[:3])]
    plan = cover((192, 192), 96, 32)
    found = errors_of(cases, "roads", windows=lambda c: plan.kept, tile=64)
    assert found.seams.errors > 0 and len(found.tables["tiles"]) == 27 and "distance to a seam" in set(found.tables["causes"].cause)
    with pytest.raises(DataError, match="no image has a pixel"): errors_of([case_of(np.full((8, 8), 255), np.zeros((8, 8)))])
