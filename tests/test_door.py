"""The door to the test set: once per run, written down first, never for tuning, and open again to the very same model only."""
import json
import logging
import multiprocessing
import os

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aerial_nb.data import door as module
from aerial_nb.data.door import RECORD, TestDoor, test_readings as readings_below
from aerial_nb.data.raster import DataError
from aerial_nb.data.splits import split_by_scene, split_hash


def table(n=10, seed=0):
    plain = pd.DataFrame(dict(image=[f"tiles/{i:02}.tif" for i in range(n)], label="", scene=[f"s{i}" for i in range(n)], split="", gsd_m=1.0))
    return split_by_scene(plain, seed=seed)


def record(folder):
    return json.loads((folder / RECORD).read_text())["readings"]


# ---- two sides

def test_tuning_never_holds_a_test_row_and_nothing_is_lost(tmp_path):
    samples = table(20)
    door = TestDoor(samples, tmp_path)
    tuning, test = door.tuning, door.open("score")
    assert set(tuning["split"]) == {"train", "valid"} and set(test["split"]) == {"test"}
    assert set(tuning["image"]) | set(test["image"]) == set(samples["image"]) and len(tuning) + len(test) == 20 == len(tuning) + door.rows


def test_changing_what_was_handed_out_does_not_change_the_door(tmp_path):
    samples = table()
    door = TestDoor(samples, tmp_path)
    handed = door.tuning
    handed.loc[:, "split"] = "test"
    assert set(door.tuning["split"]) == {"train", "valid"}


def test_the_record_says_who_what_when_and_how_many(tmp_path):
    samples = table()
    TestDoor(samples, tmp_path, reader="spin-seed0").open("score", model="abc")
    (entry,) = record(tmp_path)
    assert entry["reader"] == "spin-seed0" and entry["purpose"] == "score" and entry["model"] == "abc" and entry["program"]
    assert entry["rows"] == (samples["split"] == "test").sum() and entry["split_hash"] == split_hash(samples)
    assert abs(pd.Timestamp(entry["when"]) - pd.Timestamp.now("UTC")) < pd.Timedelta("1min")
    assert "/" not in entry["program"]


def test_the_folder_may_be_a_run_folder_or_not_there_yet(tmp_path):
    class Run: path = tmp_path / "a" / "run"
    TestDoor(table(), Run()).open("score")
    assert (tmp_path / "a/run" / RECORD).is_file()


# ---- once

def test_the_second_reading_says_when_the_first_was_and_what_to_do(tmp_path):
    door = TestDoor(table(), tmp_path)
    door.open("score")
    when = record(tmp_path)[0]["when"]
    for again in (door, TestDoor(table(), tmp_path)):
        with pytest.raises(DataError, match="was read on") as error: again.open("score")
        assert when in str(error.value) and "new run" in str(error.value) and "'score'" in str(error.value)
    assert len(record(tmp_path)) == 1 and record(tmp_path)[0]["again"] == []


def test_a_resumed_run_with_the_same_model_reads_again_and_it_is_noted(tmp_path):
    first = TestDoor(table(), tmp_path).open("score", model="m1")
    again = TestDoor(table(), tmp_path)
    pd.testing.assert_frame_equal(again.open("score", model="m1"), first)
    assert len(record(tmp_path)) == 1 and len(record(tmp_path)[0]["again"]) == 1
    with pytest.raises(DataError, match="one too many"): again.open("score", model="m1")   # the same door, twice


@pytest.mark.parametrize("then, now, says", [
    (dict(purpose="score", model="m1"), dict(purpose="score", model="m2"), "another model or threshold"),
    (dict(purpose="score", model="m1"), dict(purpose="figures", model="m1"), "another purpose"),
    (dict(purpose="score", model="m1"), dict(purpose="score"), "another model"),
    (dict(purpose="score"), dict(purpose="score"), "one too many"),
])
def test_whatever_differs_is_refused(tmp_path, then, now, says):
    TestDoor(table(), tmp_path).open(**then)
    with pytest.raises(DataError, match=says): TestDoor(table(), tmp_path).open(**now)
    assert record(tmp_path)[0]["again"] == []


def test_another_split_in_the_same_run_is_refused_for_every_reader(tmp_path):
    TestDoor(table(), tmp_path, "one").open("score", model="m")
    for reader in ("one", "two"):
        with pytest.raises(DataError, match="another split"): TestDoor(table(seed=1), tmp_path, reader).open("score", model="m")
    TestDoor(table(), tmp_path, "two").open("score", model="n")
    assert [r["reader"] for r in record(tmp_path)] == ["one", "two"]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["", "m1", "m2"]), st.integers(0, 1)), max_size=8))
def test_however_it_is_asked_no_reader_sees_it_with_two_models(tmp_path_factory, calls):
    folder = tmp_path_factory.mktemp("run")
    seen = {}
    for reader, model, seed in calls:
        try: TestDoor(table(seed=seed), folder, reader).open("score", model)
        except DataError: continue
        seen.setdefault(reader, []).append((model, seed))
    assert all(len(set(v)) == 1 and (len(v) == 1 or v[0][0]) for v in seen.values())
    assert len({seed for v in seen.values() for _, seed in v}) <= 1


# ---- never for tuning, never nowhere

@pytest.mark.parametrize("purpose", ["tuning", "threshold", "Threshold search", "early stopping", "choose a model", "training", "validation", "sweep"])
def test_tuning_is_refused_and_leaves_no_record(tmp_path, purpose):
    with pytest.raises(DataError, match="door.tuning"): TestDoor(table(), tmp_path).open(purpose)
    assert not (tmp_path / RECORD).exists()


@pytest.mark.parametrize("purpose", ["", "  "])
def test_a_reading_has_a_purpose(tmp_path, purpose):
    with pytest.raises(DataError, match="say what"): TestDoor(table(), tmp_path).open(purpose)


def test_no_folder_no_rows_no_split(tmp_path):
    with pytest.raises(DataError, match="needs a run folder"): TestDoor(table()).open("score")
    samples = table()
    with pytest.raises(DataError, match="no rows in split test"): TestDoor(samples[samples["split"] != "test"], tmp_path).open("score")
    with pytest.raises(DataError, match="'holdout' is not one of"): TestDoor(samples.assign(split="holdout"), tmp_path)


# ---- trouble

def test_a_damaged_record_is_no_permission(tmp_path):
    TestDoor(table(), tmp_path).open("score", model="m")
    (tmp_path / RECORD).write_text((tmp_path / RECORD).read_text()[:40])
    with pytest.raises(DataError, match="damaged"): TestDoor(table(), tmp_path).open("score", model="m")


def test_nothing_is_read_when_the_record_cannot_be_written(tmp_path, monkeypatch):
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(module, "write_bytes", full)
    door = TestDoor(table(), tmp_path)
    with pytest.raises(OSError, match="No space"): door.open("score")
    monkeypatch.undo()
    assert len(door.open("score")) == door.rows          # it was not read, so it may be


def _try(folder, queue):
    try: TestDoor(table(), folder).open("score"); queue.put("read")
    except DataError: queue.put("refused")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_of_processes_at_the_same_time_one_reads(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_try, args=(tmp_path, queue)) for _ in range(4)]
    for w in workers: w.start()
    for w in workers: w.join(30)
    assert sorted(queue.get(timeout=5) for _ in workers) == ["read", "refused", "refused", "refused"]


# ---- all runs

def test_readings_of_all_runs(tmp_path, caplog):
    TestDoor(table(), tmp_path / "exp/run1", "a").open("score", "m")
    TestDoor(table(), tmp_path / "exp/run1", "a").open("score", "m")
    TestDoor(table(), tmp_path / "exp/run2").open("score")
    (tmp_path / "exp/run3").mkdir(); (tmp_path / "exp/run3" / RECORD).write_text("{")
    with caplog.at_level(logging.WARNING): found = readings_below(tmp_path)
    assert found[["run", "reader", "times"]].values.tolist() == [["exp/run1", "a", 2], ["exp/run2", "", 1]]
    assert "damaged" in caplog.text and list(readings_below(tmp_path / "exp/run3" / "none").columns) == list(found.columns)


def test_the_page_says_what_was_read(tmp_path):
    door = TestDoor(table(), tmp_path, "<b>")
    assert "not read" in door._repr_html_()
    door.open("score")
    assert "&lt;b&gt;" in door._repr_html_() and split_hash(table()) in door._repr_html_()
