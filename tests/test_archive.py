"The archive of runs: every folder becomes an entry, whatever is in it, and says what it is."
import json
import os
import shlex
import shutil
import time
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from aerial_nb.report.archive import ARM_COLUMNS, choose, image_hash, read_archive
from aerial_nb.training.launch import _pairs
from aerial_nb.training.parameters import notebook_parameters
from aerial_nb.training.runs import RunFolder

ROOT = Path(__file__).parents[1]


def write(folder: Path, **files) -> Path:
    "A folder of JSON files; text is written as it is."
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items(): (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def scored(**arms) -> dict:
    "Metrics of train_spin with these IoUs."
    return dict(protocol="split", is_result=True, split_hash="ab12", finished=True,
                arms={a: dict(images=9, scenes=9, seeds=1, intervals=dict(iou=dict(value=v, low=None, high=None))) for a, v in arms.items()})


@pytest.fixture
def home(tmp_path): return tmp_path / "runs", tmp_path / "results"


def by_id(home) -> dict: return {e.id: e for e in read_archive(*home)}


# ---- what a folder is

def test_each_state_is_told(home):
    runs = home[0]
    RunFolder.create("train_spin", dict(a=1), runs, "done").finish(dict(x=1))
    RunFolder.create("train_spin", dict(a=1), runs, "busy")     # this process holds its lock
    RunFolder.create("train_spin", dict(a=1), runs, "left").release()
    broken = RunFolder.create("train_spin", dict(a=1), runs, "fell"); broken.fail("DiskFull", "no space left"); broken.release()
    write(runs / "train_spin/cut", params=dict(a=1), metrics='{"finished": tr')
    write(runs / "train_spin/list", params=dict(a=1), metrics=[1, 2])
    write(runs / "train_spin/bare", progress=dict(wall_s=3))
    (runs / "train_spin/empty").mkdir()
    found = by_id(home)
    assert {k: e.status for k, e in found.items()} == dict(done="finished", busy="running", left="unfinished", fell="failed", cut="unreadable",
                                                         list="unreadable", bare="unreadable", empty="unreadable")
    assert found["fell"].reason == "DiskFull: no space left" and "params.json is missing" in found["bare"].reason
    assert "metrics.json is damaged" in found["cut"].reason and str(runs) not in found["cut"].reason
    assert all(len(e.arms()) == 0 for e in found.values() if not e.finished)


def test_a_lock_of_a_dead_process_is_no_work(home):
    write(home[0] / "train_spin/old", params={})
    (home[0] / "train_spin/old/.lock").write_text(json.dumps(dict(pid=2**22 + 1, start=1, machine="elsewhere")))
    assert by_id(home)["old"].status == "running"      # nobody here can know of another machine
    (home[0] / "train_spin/old/.lock").write_text("{")
    assert by_id(home)["old"].status == "unfinished"


def test_strays_and_half_written_folders_are_no_runs(home):
    write(home[0] / "train_spin/.part-1", params={}); write(home[1] / "train_spin/.old-2", record={})
    (home[0] / "note.txt").write_text("x"); (home[0] / "train_spin/note.txt").write_text("x")
    assert read_archive(*home) == [] and read_archive(home[0] / "nowhere", home[1] / "nowhere") == []


def test_a_published_run_is_one_entry_with_both_places(home):
    files = dict(params=dict(a=1), metrics=scored(spin=.5), env=dict(started="2026-01-02T00:00:00"))
    run, record = write(home[0] / "train_spin/r1", **files), write(home[1] / "train_spin/best", record=dict(run="r1"), **files)
    (one,) = read_archive(*home)
    assert (one.name, one.id, one.source, one.folder, one.record) == ("best", "r1", "runs", run, record)
    (run / "params.json").write_text("{")             # the run is lost: its record is not
    (one,) = read_archive(*home)
    assert (one.status, one.source, one.folder) == ("finished", "results", record) and "params.json is damaged" in one.reason
    shutil.rmtree(run); write(home[1] / "train_spin/again", record=dict(run="r1"), **files)
    assert sorted(e.name for e in read_archive(*home)) == ["again", "best"]


def test_a_record_of_an_older_layout_is_read(home):
    old = dict(arms=dict(net=dict(iou=.4, scenes=3)))         # no intervals, no cost, no is_result
    folder = write(home[1] / "train_spin/first", params=dict(data="../somewhere/town/"), metrics=old)
    pd.DataFrame(dict(epoch=[1, 2], train_loss=[3., 2.])).to_csv(folder / "history.csv", index=False)
    (entry,) = read_archive(*home)
    assert entry.finished and "record.json is missing" in entry.reason and entry.hardware == entry.commit == entry.date == ""
    row = entry.arms().iloc[0]
    assert row.iou == .4 and pd.isna(row.iou_low) and row.data == "town" and row.is_result and row.weights == "random"
    assert entry.history()[["arm", "seed"]].values.tolist() == [["first", 0], ["first", 0]]


def test_scores_that_do_not_exist_are_nan(home):
    write(home[0] / "train_spin/a", params={}, metrics='{"finished": true, "arms": {"net": {"iou": NaN, "intervals": {"f1": {"value": null, "low": null, "high": null}}}}}')
    row = by_id(home)["a"].arms().iloc[0]
    assert pd.isna(row.iou) and pd.isna(row.f1) and pd.isna(row.parameters)


def test_a_hundred_runs_are_read_in_a_blink(home):
    for i in range(100): write(home[0] / f"train_spin/r{i:03}", params=dict(a=i), env={}, metrics=scored(spin=.5, hourglass=.4))
    begin = time.process_time()
    assert len(read_archive(*home)) == 100
    assert time.process_time() - begin < 1


keys = st.sampled_from("finished arms leaderboard scores intervals iou value low high cost thresholds model test_iou seen trained_on tested_on pairs "
                       "differences step_ms median rows crops_per_s git commit started cpu cores record run data truth seeds buildings iou_0.5 by_size all".split())
anything = st.recursive(st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.sampled_from(["", "x", "../a/b", "1"]),
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12)


@examples(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metrics=st.dictionaries(keys, anything, max_size=5), params=anything, env=anything, about=anything, experiment=st.sampled_from(["train_spin", "evaluate", "score_roads", "bench_x", "new"]))
def test_no_content_of_a_folder_makes_it_raise(tmp_path_factory, metrics, params, env, about, experiment):
    home = tmp_path_factory.mktemp("any")
    write(home / f"runs/{experiment}/a", params=params, env=env, metrics=metrics | dict(finished=True))
    write(home / f"results/{experiment}/b", params=params, env=env, metrics=metrics, record=about)
    for entry in read_archive(home / "runs", home / "results"):
        table = entry.arms()
        assert set(ARM_COLUMNS) <= set(table.columns) and (len(table) == 0 or not entry.finished or table.entry.eq(entry.title).all())
        assert isinstance(entry.command, str) and isinstance(entry.hardware, str) and isinstance(entry.commit, str) and isinstance(entry.date, str)
        assert len(entry.history()) == 0 and entry.counts() == {} and entry.figures() == []
    shutil.rmtree(home)


# ---- what is in it

@examples(max_examples=100, deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z_]{1,9}", fullmatch=True).filter(lambda n: n != "resume"),
                       st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.none() | st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=9)))
def test_a_command_gives_the_parameters_back(tmp_path_factory, params):
    home = tmp_path_factory.mktemp("cmd")
    write(home / "runs/no_such_notebook/a", params=params | dict(resume="x"))
    (entry,) = read_archive(home / "runs", home / "results")
    words = shlex.split(entry.command)
    assert words[:2] == ["aerial_run", "nbs/no_such_notebook.ipynb"]
    given, rest = _pairs(words[2:])
    assert not rest and given == params and all(type(given[k]) is type(params[k]) for k in params)
    shutil.rmtree(home)


def test_a_command_names_only_what_differs_from_the_defaults(home, monkeypatch):
    monkeypatch.chdir(ROOT)
    defaults = notebook_parameters(ROOT / "nbs/train_spin.ipynb")
    write(home[0] / "train_spin/a", params=defaults | dict(epochs=12, data="a folder", gone=1))
    assert by_id(home)["a"].command == "aerial_run nbs/train_spin.ipynb -p data 'a folder' -p epochs 12 -p gone 1"


def test_curves_of_an_unfinished_run_come_from_its_arms(home):
    run = RunFolder.create("train_spin", {}, home[0], "a")
    for seed in (0, 1): run.arm(f"spin-seed{seed}").log(dict(epoch=1, train_loss=.5 + seed))
    run.arm("odd").write_json("arm.json", dict(name="the odd one", seed="?")); run.arm("odd").log(dict(epoch=1, train_loss=9))
    assert sorted(by_id(home)["a"].history()[["arm", "seed", "train_loss"]].values.tolist()) == [["spin", 0, .5], ["spin", 1, 1.5], ["the odd one", 0, 9.]]
    (run.path / "arms/odd/history.csv").write_bytes(b"\xff\xfe\x00")
    assert len(by_id(home)["a"].history()) == 2


def test_counts_are_read_from_arms_and_from_evaluations(home):
    table = pd.DataFrame(dict(image=["x", "y"], scene=[1, 2], tp=[1, 2]))
    run = RunFolder.create("train_spin", {}, home[0], "a")
    for seed in (4, 5): run.arm(f"spin-seed{seed}").path.mkdir(parents=True); table.to_csv(run.path / f"arms/spin-seed{seed}/scores.csv", index=False)
    assert by_id(home)["a"].counts()["spin"].seed.tolist() == [4, 4, 5, 5]
    table.to_csv(write(home[1] / "evaluate/e", params={}, metrics={}, record={}) / "images.csv", index=False)
    assert by_id(home)["e"].counts()["e"].tp.tolist() == [1, 2]


def test_an_evaluation_elsewhere_is_named_by_its_images(home):
    metrics = dict(model="train_unet/x/arm", trained_on="town", tested_on="town", split_hash="ab12", seen=dict(test=2), scores=dict(iou=dict(value=.5, low=.4, high=.6, scenes=2)))
    for name, seen, tested in (("own", "test", "town"), ("new", "new", "village"), ("twin", "new", "village")):
        folder = write(home[1] / f"evaluate/{name}", params={}, record={}, metrics=metrics | dict(seen={seen: 2}, tested_on=tested))
        pd.DataFrame(dict(image=["p", "q"] if name != "new" else ["q", "p"])).to_csv(folder / "images.csv", index=False)
    hashes = {e.name: e.arms().split_hash.iloc[0] for e in read_archive(*home)}
    assert hashes == dict(own="ab12", new=image_hash("pq"), twin=image_hash("pq"))
    assert image_hash(["p"]) != image_hash(["p", "q"])


def test_why_a_score_is_no_result(home):
    def entry(name, params=None, experiment="train_roofs", **metrics):
        write(home[0] / experiment / name, params=params or dict(data="town"), metrics=scored(a=.5) | metrics)
    entry("over", protocol="overfit", is_result=False); entry("small", dict(data="town", tiny=True)); entry("drawn", dict(data="synthetic"))
    entry("said", is_result=False); entry("sam_mechanics"); entry("fine"); entry("timed", dict(data="synthetic"), "bench_x", step_ms=dict(a=3.))
    why = {e.name: e.arms().why_not.iloc[0] for e in read_archive(*home)}
    assert why == dict(over="scored on what it was trained on", small="tiny networks, to show the way", drawn="scenes drawn by the computer",
                       said="its experiment says that it is no result", sam_mechanics="published as a check of the mechanics", fine="", timed="")


# ---- naming some

def test_names_ids_beginnings_and_patterns(home):
    for name in ("20260101-aa", "20260101-ab", "20260202-cc"): write(home[0] / f"train_spin/{name}", params={}, metrics=dict(finished=True))
    write(home[0] / "train_unet/20260303-dd", params={})
    entries = read_archive(*home)
    picked = lambda names, **k: [e.id for e in choose(entries, names, **k)]
    assert picked("20260202-cc") == picked("202602") == picked("train_spin/20260202-cc") == picked("*cc") == ["20260202-cc"]
    assert picked("train_spin") == picked("train_spin/*") and len(picked("train_spin")) == 3
    assert picked("202602, 20260101-aa, 202602") == ["20260202-cc", "20260101-aa"]
    assert len(picked("")) == 3 and len(picked("*")) == 4 and len(picked("*", finished=True)) == 3


def test_names_that_mean_nothing_are_refused_all_at_once(home):
    write(home[0] / "train_spin/massachusetts_split", params={}, metrics=dict(finished=True)); write(home[0] / "train_spin/stopped", params={})
    entries = read_archive(*home)
    with pytest.raises(ValueError) as error: choose(entries, "massachusets_split,qqq")
    assert "did you mean massachusetts_split" in str(error.value) and "no run 'qqq'" in str(error.value)
    with pytest.raises(ValueError, match="stopped is unfinished and has no result.*-p resume stopped"): choose(entries, "stopped", finished=True)
    with pytest.raises(ValueError, match="none was made yet"): choose([], "x")


# ---- what is really there

def test_every_published_record_is_understood(tmp_path):
    entries = read_archive(tmp_path, ROOT / "results")
    assert len(entries) == len(list((ROOT / "results").glob("*/*/record.json"))) > 10
    for entry in entries:
        arms = entry.arms()
        assert entry.finished and not entry.reason and len(arms) and (arms.reason == "").all() and arms.arm.is_unique, entry.title
        measures = [c for c in ("iou", "topo_f1", "ms", "per_s") if c in arms]
        assert arms[measures].notna().any(axis=1).all(), f"{entry.title} has an arm without a score"
        assert len(entry.figures()) and len(entry.commit) >= 8 and entry.hardware and entry.command.startswith(f"aerial_run nbs/{entry.experiment}.ipynb")
        if entry.experiment.startswith("train_"): assert set(arms.arm) == set(entry.history().arm)
    assert os.path.sep not in "".join(a for e in entries for a in e.arms().data.dropna())
