"""Attempts, budgets, roofs by place, overlays and the leaderboard: behaviour and bad input, on tiny networks."""
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
from affine import Affine

from aerial_nb.data.checks import read_sample
from aerial_nb.data.raster import DataError, raster_info, write_raster
from aerial_nb.data.roofs import centre_samples, contact_sheet, known_places, roof_samples, split_places
from aerial_nb.data.splits import few_shot
from aerial_nb.training.arms import ArmResult
from aerial_nb.training.attempts import ATTEMPTS, Study, Tried, attempts_of, budgets_of, run_study, study_task
from aerial_nb.training.learner import Recipe
from aerial_nb.training.overlays import Overlays, overlay_epochs, overlay_strip, telling_items
from aerial_nb.training.parameters import ParameterError
from aerial_nb.training.records import Folder
from aerial_nb.training.runs import RunFolder
from aerial_nb.training.study import budget_curve, by_arm, compare_pairs, leaderboard, prediction_grid, verdicts

SHARED = Path(__file__).parents[1] / "../shared/data/roofs"
TINY = dict(size=32, epochs=2, draws=4, freeze_epochs=1, bs=2, amp="no")


def tiles(folder: Path, n: int, side: int = 64, roofs: bool = True, grounds: bool = True) -> pd.DataFrame:
    "Tiles with one bright square each, three places."
    for part in ("images", "masks"): (folder / part).mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        rng = np.random.default_rng(i)
        mask = np.full((side, side), 0 if grounds else 1, np.uint8)
        if roofs: r, c = rng.integers(2, side - 30, 2); mask[r:r + 24, c:c + 24] = 1
        image = (rng.normal(90, 9, (3, side, side)) + 90 * mask).clip(1, 254).astype("uint8")
        paths = [folder / part / f"t{i}.tif" for part in ("images", "masks")]
        for path, array in zip(paths, (image, mask[None]), strict=True): write_raster(path, array)
        rows.append(dict(image=str(paths[0]), label=str(paths[1]), scene=f"s{i}", gsd_m=.3, place="abc"[min(2, i * 3 // n)],
                         split="train" if i < n - 5 else "valid" if i < n - 3 else "test"))
    return pd.DataFrame(rows)


# --- roofs: places, crops, layouts

def test_places_and_scenes_may_both_be_named_and_faults_are_explained(tmp_path):
    table = tiles(tmp_path, 9)
    out = split_places(table, valid=["s3"], test=["c"])
    assert set(out.split[out.place == "c"]) == {"test"} and out.split[3] == "valid" and set(out.split[:3]) == {"train"}
    drawn = split_places(table, test=["c"])
    assert (drawn.split == "valid").sum() >= 1 and set(drawn.split[drawn.place == "c"]) == {"test"}
    with pytest.raises(DataError, match="no tile is of d; the places and scenes here are a, b, c"): split_places(table, test=["d"])
    with pytest.raises(DataError, match="would be in valid and in test"): split_places(table, valid=["a"], test=["s0"])


def test_a_split_without_one_part_is_refused(tmp_path, monkeypatch):
    table = tiles(tmp_path, 9)
    monkeypatch.setattr("aerial_nb.data.roofs.open_samples", lambda data, synthetic=None: table.assign(split="").copy())
    with pytest.raises(DataError, match="no tiles in split train of 9"): roof_samples("x", 0, valid=["a", "b"], test=["c"])
    with pytest.raises(DataError, match="no tiles in split test of 9"): roof_samples("x", 0, valid=["a"])


def test_a_centre_crop_keeps_pixels_place_and_uncounted_ground(tmp_path):
    rng, where = np.random.default_rng(0), Affine(.3, 0, 500000, 0, -.3, 4000000)
    image, mask, valid = rng.integers(1, 250, (3, 200, 180), dtype="uint8"), np.zeros((200, 180), np.uint8), np.ones((200, 180), bool)
    mask[150:190, 10:60] = 1; valid[:, :20] = False
    write_raster(tmp_path / "i.tif", image, "EPSG:32614", where, valid=valid)
    write_raster(tmp_path / "m.tif", mask, "EPSG:32614", where)
    table = pd.DataFrame([dict(image=str(tmp_path / "i.tif"), label=str(tmp_path / "m.tif"), scene="a", split="train", gsd_m=.3)])
    made = centre_samples(table, 64, tmp_path / "crops", .2, progress=False)
    pixels, labels = read_sample(made.iloc[0])
    col, row = (round(float(v)) for v in ~where @ (pixels.transform.c, pixels.transform.f))
    assert pixels.data.shape == (3, 64, 64) and (labels == 1).mean() >= .2
    np.testing.assert_array_equal(pixels.data, image[:, row:row + 64, col:col + 64])
    np.testing.assert_array_equal(pixels.valid, valid[row:row + 64, col:col + 64])
    expected = np.where(valid, mask, 255)[row:row + 64, col:col + 64]
    np.testing.assert_array_equal(labels, expected)
    before = Path(made.image[0]).stat().st_mtime_ns
    again = centre_samples(table, 64, tmp_path / "crops", .2, progress=False)
    assert again.equals(made) and Path(again.image[0]).stat().st_mtime_ns == before      # written once
    write_raster(tmp_path / "m.tif", mask[:, ::-1].copy(), "EPSG:32614", where)
    assert centre_samples(table, 64, tmp_path / "crops", .2, progress=False).image[0] != made.image[0]  # labels that changed


def test_a_crop_without_any_roof_says_so_and_one_by_no_share_is_refused(tmp_path, caplog):
    table = tiles(tmp_path, 1, side=96, roofs=False)
    with caplog.at_level(logging.WARNING): made = centre_samples(table, 48, tmp_path / "crops", progress=False)
    assert "the fullest has 0.0 %" in caplog.text and raster_info(made.image[0]).shape == (48, 48)
    assert not (read_sample(made.iloc[0])[1] == 1).any()
    for share in (0, -1, 1.5):
        with pytest.raises(DataError, match="share in"): centre_samples(table, 48, tmp_path, share)
    with pytest.raises(DataError, match="1 tiles have no label"): centre_samples(table.assign(label=""), 48, tmp_path)


def test_the_austin_tiles_are_divided_24_6_6_and_cut(tmp_path):
    folder = tmp_path / "AerialImageDataset/train"
    for i in range(1, 37):
        mask = np.zeros((80, 80), np.uint8); mask[30:50, 5:30] = 255
        for kind, array in (("images", np.full((3, 80, 80), 60 + i, np.uint8)), ("gt", mask[None])):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            with rasterio.open(folder / kind / f"austin{i}.tif", "w", driver="GTiff", width=80, height=80, count=len(array), dtype="uint8") as d: d.write(array)
    found = roof_samples(tmp_path, 32, folder=tmp_path / "crops", progress=False)
    assert found.split.value_counts().to_dict() == dict(train=24, valid=6, test=6)
    assert {raster_info(p).shape for p in found.image} == {(32, 32)} and found.scene.is_unique
    assert all((read_sample(r)[1] == 1).mean() >= .05 for r in found.to_dict("records"))
    assert len(contact_sheet(found).axes) == 36


def test_names_of_inria_give_city_and_pixel_size():
    table = pd.DataFrame(dict(scene=["austin1", "tyrol-w2"], gsd_m=[np.nan, .5]))
    assert known_places(table).gsd_m.tolist() == [.3, .5] and known_places(table).city.tolist() == ["austin", "tyrol-w"]
    assert "city" not in known_places(table.assign(scene=["austin1", "houston3"]))


@pytest.mark.skipif(not (SHARED / "oam_1024").is_dir(), reason="the shared roofs are not here")
def test_real_roofs_by_place():
    found = roof_samples(SHARED / "oam_1024", 0, valid=["kampala"], test=["nepal", "philippines"])
    assert found.groupby("split").place.unique().map(sorted).to_dict() == dict(test=["nepal", "philippines"], train=["zanzibar"], valid=["kampala"])
    strips = roof_samples(SHARED / "inria_256", 0, valid=["chicago1"], test=["austin3", "kitsap8", "tyrol-w2", "vienna2"])
    assert set(strips.scene[strips.split == "train"]) == {"austin1"} and set(strips.gsd_m) == {.3}
    assert strips.groupby("scene").split.nunique().max() == 1     # a strip is on one side


# --- attempts, budgets, settings

def test_attempts_by_number_and_what_is_refused():
    assert [a.number for a in attempts_of("all")] == [1, 2, 3, 4, 5] and [a.number for a in attempts_of(" 3, 1")] == [3, 1]
    for wrong, says in ((0, "unknown"), ("6", "5 SAM in a U-Net"), ("two", "whole number"), ("1,1", "twice"), (True, "whole number"), (1.5, "whole number")):
        with pytest.raises(ParameterError, match=says): attempts_of(wrong)
    named = attempts_of("1,2,4", encoder="mobilenet_v2", width=16)
    assert [a.title for a in named] == ["U-Net (16 channels)", "U-Net on mobilenet_v2", "SAM, frozen"]
    assert ATTEMPTS[2].arguments["encoder"] == "resnet34"       # the list itself is as it was


def test_budgets_are_sorted_and_never_more_than_there_are(tmp_path):
    table = tiles(tmp_path, 9)                                  # four to train on
    assert budgets_of("4,2", table) == [2, 4] and budgets_of("all", table) == [4]
    with pytest.raises(DataError, match="a budget of 5 tiles, and there are 4"): budgets_of("2,5", table)
    with pytest.raises(ParameterError, match="budget 0"): budgets_of(0, table)
    few = few_shot(table, (2, 4), seed=7)
    train = {b: set(t.image[t.split == "train"]) for b, t in few.items()}
    assert len(train[2]) == 2 and train[2] < train[4] and all((t.split == "test").sum() == 3 for t in few.values())


def test_the_recipe_is_the_published_one():
    for number, a in ATTEMPTS.items():
        recipe, arm = Study(epochs=60).recipe(a), Study(epochs=60).arm(a, 5)
        assert (recipe.loss, recipe.weight_decay, recipe.schedule, recipe.plateau, recipe.patience) == ("bce_dice", 1e-4, "plateau", 3, 10)
        assert recipe.lr == (1e-4 if number > 3 else 1e-3) and a.bs == (2 if number > 3 else 4)
        assert recipe.freeze_epochs == (20 if number in (2, 3, 5) else 0)
        assert arm.arguments["dropout" if number == 1 else "decoder_dropout"] == .3
    with pytest.raises(ValueError, match="never releases"): Study(epochs=20).recipe(ATTEMPTS[3])
    for wrong in (dict(augment="MUCH"), dict(whole="pad"), dict(dropout=1.)):
        with pytest.raises(ParameterError): Study(**wrong)


# --- data that cannot be learned from

@pytest.mark.parametrize("kind, says", [("no roof", "positive"), ("all roof", "nothing but positive"), ("no validation", "no tiles in split valid"),
                                        ("no roof in validation", "split valid")])
def test_data_of_one_class_or_without_a_part_are_refused(tmp_path, kind, says):
    table = tiles(tmp_path / "a", 9, roofs=kind != "no roof", grounds=kind != "all roof")
    if kind == "no validation": table = table[table.split != "valid"].reset_index(drop=True)
    if kind == "no roof in validation":
        bare = tiles(tmp_path / "b", 9, roofs=False)
        table = table.assign(image=np.where(table.split == "valid", bare.image, table.image), label=np.where(table.split == "valid", bare.label, table.label))
    with pytest.raises(DataError, match=says): study_task(table, Study(**TINY))


# --- a whole study on tiny networks

@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    table, study = tiles(folder, 10), Study(**TINY)
    task, run = study_task(table, study), RunFolder.create("study", {}, folder / "runs")
    watch = lambda arm: [Overlays(arm, 1, items=2, side=40)]
    tried = run_study(task, table, study, attempts_of("1,2", tiny=True), [2, 4], [42], run, watch, quiet=True)
    return task, table, study, run, tried


def test_each_arm_reads_the_test_once_and_sees_its_own_tiles(studied):
    task, table, _, run, tried = studied
    assert [(t.attempt.number, t.budget) for t in tried] == [(1, 2), (2, 2), (1, 4), (2, 4)]
    readings = task.score_on.door.at(run).readings
    assert len(readings) == 4 and len({r["reader"] for r in readings}) == 4 and not any(r["again"] for r in readings)
    assert tried[0].tiles == tried[1].tiles and set(tried[0].tiles) < set(tried[2].tiles) and len(tried[2].tiles) == 4
    assert all(set(t.tiles) <= {Path(p).stem for p in table.image[table.split == "train"]} for t in tried)


def test_a_finished_study_is_read_back(studied):
    task, table, study, run, tried = studied
    again = run_study(task, table, study, attempts_of("1,2", tiny=True), [2, 4], [42], run, quiet=True)
    assert [t.result.threshold for t in again] == [t.result.threshold for t in tried]
    for a, b in zip(again, tried, strict=True): pd.testing.assert_frame_equal(a.result.counts, b.result.counts, check_dtype=False)


def test_overlays_lie_in_the_arm_and_make_a_strip(studied):
    task, *_, tried = studied
    drawn = overlay_epochs(tried[0].result.folder)
    assert list(drawn) == [1, 2] and len(overlay_strip(tried[0].result.folder).axes) == 2
    data = task.dls.valid.dataset
    items = telling_items(data, 2)
    assert len({int(data.plan[i]["tile"]) for i in items}) == 2 and all((data.layers(i).mask == 1).any() for i in items)
    assert len(telling_items(data, 3)) == 3 and len(telling_items(data, 99)) == len(data)
    for wrong in (dict(every=0), dict(items=0), dict(side=0)):
        with pytest.raises(ValueError, match="start at 1"): Overlays(Folder("x"), **wrong)
    with pytest.raises(FileNotFoundError, match="no overlay was drawn"): overlay_strip(Folder(tried[0].result.folder.path.parent))


def test_the_leaderboard_keeps_validation_and_test_apart(studied):
    task, *_, tried = studied
    board = leaderboard(task, tried)
    assert list(board.budget) == [2, 2, 4, 4] and {"valid_iou", "test_iou", "minutes", "parameters", "weights"} <= set(board)
    one = tried[0]
    row = board[(board.attempt == 1) & (board.budget == 2)].iloc[0]
    total = one.result.counts[["tp", "fp", "fn"]].sum()
    assert row.test_iou.value == pytest.approx(total.tp / total.sum()) and row.test_iou.images == 3 and row.valid_iou.images == 2
    if one.result.curve is not None:   # the curve that chose the threshold counts the same validation pixels
        there = one.result.curve.table(one.result.threshold)[["tp", "fp", "fn"]].sum()
        assert row.valid_iou.value == pytest.approx(there.tp / there.sum(), abs=.02)
    for _, rows in board.groupby("budget"): assert rows.valid_iou.map(lambda i: i.value).is_monotonic_decreasing
    assert len(prediction_grid(task.score_on, tried).axes) == 9 and len(budget_curve(board).axes) == 1
    with pytest.raises(ValueError, match="no curve"): budget_curve(board[board.budget == 2])


# --- which can be told apart

def drawn(number: int, budget: int, seed: int, iou: float, scenes: int = 10) -> Tried:
    rng = np.random.default_rng([budget, seed])
    hits = (1000 * np.clip(iou + rng.normal(0, .02, scenes), 0, 1)).astype(int)
    counts = pd.DataFrame(dict(image=[f"i{k}" for k in range(scenes)], scene=[f"s{k}" for k in range(scenes)], seed=seed, tp=hits, fp=0, fn=1000 - hits, tn=5000))
    return Tried(ATTEMPTS[number], budget, ArmResult(f"a{number}", seed, None, counts, .5, {}), ())


def test_equal_attempts_are_named_and_unequal_ones_ordered():
    tried = [drawn(n, 5, s, q + .001 * s) for n, q in ((1, .5), (2, .5), (3, .7)) for s in (0, 1)]
    pairs = compare_pairs(tried)
    assert pairs.apart.tolist() == [False, True, True] and len(by_arm(tried)) == 3
    said = "\n".join(verdicts(pairs))
    assert "1 U-Net, 5 tiles and 2 U-Net on ResNet34, 5 tiles: cannot be told apart" in said
    assert "3 DeepLabV3+ on ResNet34, 5 tiles is above 1 U-Net, 5 tiles by 0.2" in said and "One seed" not in said
    assert pairs.difference[0].level == pytest.approx(1 - .05 / 3)


def test_budgets_of_an_attempt_are_compared_and_few_scenes_say_nothing():
    pairs = compare_pairs([drawn(1, 5, 0, .5), drawn(1, 12, 0, .7), drawn(1, 24, 0, .71)])
    assert list(zip(pairs.a, pairs.b)) == [("1 U-Net, 12 tiles", "1 U-Net, 5 tiles"), ("1 U-Net, 24 tiles", "1 U-Net, 12 tiles")]
    assert pairs.apart[0] and "One seed each" in verdicts(pairs)[-1]
    two = compare_pairs([drawn(n, 5, 0, .2 * n, scenes=2) for n in (1, 2)])
    assert not two.apart.any() and "nothing can be said (2 scenes" in verdicts(two)[1]
    assert verdicts(compare_pairs([drawn(1, 5, 0, .5)])) == ["One model on one budget: there is nothing to compare."]


def test_no_attempt_is_shown_to_be_better_by_bonferroni_than_alone():
    tried = [drawn(n, 5, 0, .5 + .012 * n) for n in (1, 2, 3, 4)]
    all_of_them = compare_pairs(tried)
    alone = compare_pairs(tried[:2])
    assert alone.difference[0].high - alone.difference[0].low < all_of_them.difference[0].high - all_of_them.difference[0].low


def test_recipes_of_attempts_survive_a_record():
    recipe = Study(epochs=40).recipe(ATTEMPTS[5])
    assert replace(recipe) == Recipe(**vars(recipe))
