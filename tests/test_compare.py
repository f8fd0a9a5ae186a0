"Leaderboard, pairs and comparisons: what may be ranked, what may be said, and what is refused."
import itertools
import json
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from notebooks import ROOT, play

from aerial_nb.report.archive import read_archive
from aerial_nb.report.comparisons import budget_points, changed, learning_curves, plot_budget, plot_curves, plot_forest, speed_table, steps_per_epoch
from aerial_nb.report.leaderboard import TASKS, all_arms, board_rows, groups, leaderboard, overview, pick_task
from aerial_nb.report.pairs import Pair, counts_of, disagreements, pair_of, pairs_of, statements
from aerial_nb.training.parameters import ParameterError
from aerial_nb.training.uncertainty import Interval, bootstrap_ci, paired_difference

TILES = [f"tile{i}" for i in range(8)]


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def counts(gain=0., tiles=TILES, seed=0, size=4000) -> pd.DataFrame:
    "Counts of an arm that finds a share of the road, the same tiles hard for all."
    hit = np.clip(np.random.default_rng(7).beta(6, 3, len(tiles)) + gain + np.random.default_rng(seed).normal(0, .004, len(tiles)), 0, 1)
    tp = (size * hit).round()
    return pd.DataFrame(dict(image=tiles, scene=tiles, tp=tp, fp=800, fn=size - tp, tn=60_000))


def said(i: Interval) -> dict: return dict(value=i.value, low=i.low, high=i.high, scenes=i.scenes, seeds=i.seeds, reason=i.reason)


def train(home: Path, id: str, counted: dict, hash="ab12", experiment="train_spin", keep=True, record=False, params=None, env=None, **metrics) -> Path:
    "A finished run of these arms, {name: counts or one table per seed}, as experiments leave it; `metrics` overrides."
    folder = home / ("results" if record else "runs") / experiment / id
    folder.mkdir(parents=True)
    tables = {a: [t] if isinstance(t, pd.DataFrame) else t for a, t in counted.items()}
    joined = {a: pd.concat([t.assign(seed=s) for s, t in enumerate(ts)], ignore_index=True) for a, ts in tables.items()}
    for a, ts in tables.items():
        for s, t in enumerate(ts):
            if keep: (folder / f"arms/{a}-seed{s}").mkdir(parents=True); t.to_csv(folder / f"arms/{a}-seed{s}/scores.csv", index=False)
    scored = {a: dict(images=len(TILES), scenes=len(TILES), seeds=len(tables[a]), buffer_px=3.0, thresholds=[.4],
                      intervals={m: said(bootstrap_ci(t, m, n=200)) for m in ("iou", "f1", "iou_image")},
                      cost=[dict(parameters=1000, seconds=60., epochs=4, weights="", amp="no")]) for a, t in joined.items()}
    values = dict(params=dict(data="../x/town", size=128) | (params or {}), env=dict(started="2026-01-01T00:00:00", cpu="a core") | (env or {}),
                  metrics=dict(protocol="split", is_result=True, split_hash=hash, arms=scored, finished=True) | metrics)
    if record: values["record"] = dict(run=f"run-{id}")
    for name, value in values.items(): (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def evaluation(home: Path, id: str, table: pd.DataFrame, **metrics) -> None:
    "A record of nbs/evaluate.ipynb, with its table of images: rates and counts beside each other."
    folder = home / "results/evaluate" / id; folder.mkdir(parents=True)
    rates = {m: [bootstrap_ci(table.iloc[[i]], m, n=100).value for i in range(len(table))] for m in ("iou", "f1", "precision", "recall")}
    table.assign(**rates, seed=0).to_csv(folder / "images.csv", index=False)
    m = dict(model="train_unet/gone/unet-seed0", arm="unet", trained_on="town", tested_on="town", split_hash="ab12", seen=dict(test=len(table)), images=len(table),
             scenes=len(table), doubts=[], is_result=True, threshold=.3, scores={s: said(bootstrap_ci(table, s, n=200)) for s in ("iou", "f1")}, finished=True)
    for name, value in dict(params=dict(data="../x/town"), metrics=m | metrics, record=dict(run=id)).items(): (folder / f"{name}.json").write_text(json.dumps(value))


def read(home: Path): return read_archive(home / "runs", home / "results")


# ---- leaderboard

def test_ranks_stand_within_one_set_of_test_tiles(tmp_path):
    train(tmp_path, "a", dict(low=counts(-.2), mid=counts())); train(tmp_path, "b", dict(high=counts(.1)))
    train(tmp_path, "c", dict(other=counts(.2)), hash="ff00"); train(tmp_path, "d", dict(elsewhere=counts(.2)), params=dict(data="village"))
    train(tmp_path, "e", dict(unknown=counts(.2)), hash=None)
    board = leaderboard(read(tmp_path), "road masks")
    ranks = {g: dict(zip(r.arm, r["rank"], strict=True)) for g, r in groups(board).items()}
    assert ranks.pop("town, test tiles ab12") == dict(high=1, mid=2, low=3)
    assert len(ranks) == 3 and all(list(r.values()) == [1] for r in ranks.values())
    assert "town, test tiles not recorded (train_spin/e)" in ranks


@examples(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1) | st.none(), min_size=1, max_size=6))
def test_a_board_orders_by_score_and_leaves_what_has_none_unranked(tmp_path_factory, values):
    home = tmp_path_factory.mktemp("board")
    arms = {f"arm{i}": dict(intervals=dict(iou=dict(value=v, low=None, high=None))) for i, v in enumerate(values)}
    train(home, "a", {}, arms=arms)
    board = leaderboard(read(home), "road masks")
    scored = [v for v in values if v is not None]
    assert len(board) == len(values) and board["rank"].notna().sum() == len(scored)
    assert board.value.dropna().tolist() == sorted(scored, reverse=True)
    assert all(r == 1 + sum(v > x for v in scored) for r, x in zip(board["rank"], board.value, strict=True) if not pd.isna(r))
    assert len(board_rows(board)) == len(values)
    shutil.rmtree(home)


def test_checks_are_apart_and_unranked(tmp_path):
    train(tmp_path, "a", dict(net=counts())); train(tmp_path, "b", dict(net=counts(.3)), protocol="overfit", is_result=False, hash=None)
    entries = read(tmp_path)
    assert leaderboard(entries, "road masks").entry.tolist() == ["train_spin/a"]
    checks = leaderboard(entries, "road masks", checks=True)
    assert checks.entry.tolist() == ["train_spin/b"] and checks["rank"].isna().all() and board_rows(checks)[0]["note"] == "scored on what it was trained on"


def test_each_task_has_its_measures(tmp_path):
    found = dict(by_size=dict(all=dict(value=.4, low=.3, high=.5)))
    scored = dict(houses=dict(scenes=9, intervals=dict(iou=dict(value=.6, low=.5, high=.7)), buildings={"iou_0.5": found}))
    train(tmp_path, "b", {}, experiment="train_buildings", arms=scored)
    folder = tmp_path / "runs/my_experiment/x"; folder.mkdir(parents=True)
    for name, value in dict(params={}, metrics=dict(finished=True, dice=.7, wall_s=3)).items(): (folder / f"{name}.json").write_text(json.dumps(value))
    entries = read(tmp_path)
    assert overview(entries).task.tolist() == ["building masks", "building objects", "other"]
    assert leaderboard(entries, "building objects").value.tolist() == [.4] and leaderboard(entries, "building masks").value.tolist() == [.6]
    other = leaderboard(entries, "other")
    assert other.dice.tolist() == [.7] and other["rank"].isna().all() and len(board_rows(other)) == 1
    with pytest.raises(ValueError, match="unknown task 'masks'; one of: road masks"): leaderboard(entries, "masks")
    with pytest.raises(ValueError, match="building masks are not measured by 'apls'; one of: iou"): leaderboard(entries, "building masks", "apls")


def test_a_model_that_is_read_again_has_no_second_rank(tmp_path):
    train(tmp_path, "r1", dict(unet=counts()), experiment="train_unet")
    evaluation(tmp_path, "again", counts(), model="train_unet/r1/unet-seed0")
    evaluation(tmp_path, "away", counts(-.1), model="train_unet/r1/unet-seed0", tested_on="village", seen=dict(new=8))
    rows = leaderboard(read(tmp_path), "road masks").set_index("entry")
    assert rows["rank"].to_dict() == {"train_unet/r1": 1, "evaluate/away": 1} | {"evaluate/again": pytest.approx(np.nan, nan_ok=True)}
    assert rows.note["evaluate/again"] == "the model of train_unet/r1, read again"


def test_no_runs_give_empty_tables(tmp_path):
    for task in TASKS:
        board = leaderboard(read(tmp_path), task)
        assert len(board) == 0 and groups(board) == {} and board_rows(board) == [] and statements([], board) == {} and disagreements([], board) == ([], [])
    assert len(all_arms([])) == len(overview([])) == 0 and pick_task([]) in TASKS


def test_runs_without_a_common_task_are_refused(tmp_path):
    train(tmp_path, "a", dict(net=counts())); train(tmp_path, "b", dict(net=counts()), experiment="train_buildings")
    entries = read(tmp_path)
    with pytest.raises(ValueError, match="no common task: train_buildings/b: building masks; train_spin/a: road masks"): pick_task(entries, together=True)
    assert pick_task(entries[1:], together=True) == "road masks"


# ---- pairs

def test_two_runs_are_paired_by_their_counts(tmp_path):
    one, two = counts(), counts(.03, seed=1)
    train(tmp_path, "a", dict(first=one)); train(tmp_path, "b", dict(second=two))
    entries = read(tmp_path)
    for metric in ("iou", "f1", "iou_image"):
        ((_, pair),) = pairs_of(entries, leaderboard(entries, "road masks", metric))
        expected = paired_difference(two, one, metric)
        assert (pair.how, pair.a, pair.b) == ("computed", "second", "first")
        assert np.allclose([pair.difference.value, pair.difference.low, pair.difference.high], [expected.value, expected.low, expected.high])
        assert pair.apart and pair.sentence.startswith("second is above first")
        assert pair.one.low < pair.two.high      # their own intervals overlap


def test_an_evaluation_is_paired_with_a_training(tmp_path):
    train(tmp_path, "a", dict(net=counts())); evaluation(tmp_path, "e", counts(.05))
    entries = read(tmp_path)
    ((_, pair),) = pairs_of(entries, leaderboard(entries, "road masks"))
    assert pair.how == "computed" and abs(pair.difference.value - paired_difference(counts(.05), counts(), "iou").value) < 1e-9


def test_counts_of_another_threshold_are_not_used(tmp_path):
    train(tmp_path, "a", dict(net=counts())); folder = train(tmp_path, "b", dict(net=counts(.03)))
    counts(.01).to_csv(folder / "arms/net-seed0/scores.csv", index=False)
    entries = read(tmp_path)
    ((_, pair),) = pairs_of(entries, leaderboard(entries, "road masks"))
    assert pair.how == "intervals" and "no counts of single images were kept for one of them" in pair.sentence and not pair.apart
    assert {pair.a, pair.b} == {"net (a)", "net (b)"}


@pytest.mark.parametrize("other, why", [(counts(.03, tiles=[*TILES[:-1], "tile99"]), "the same images"), (counts(.03, size=5000), "different labels"),
                                        ([counts(.03), counts(.04)], "2 seeds of one and 1 of the other")])
def test_what_cannot_be_paired_says_why(tmp_path, other, why):
    train(tmp_path, "a", dict(first=counts())); train(tmp_path, "b", dict(second=other))
    entries = read(tmp_path)
    ((_, pair),) = pairs_of(entries, leaderboard(entries, "road masks"))
    assert pair.difference is None and why in pair.reason and pair.reason in pair.sentence


def test_seeds_of_two_runs_need_not_have_the_same_numbers(tmp_path):
    two = [counts(.03, seed=s) for s in (1, 2)]
    folder = train(tmp_path, "a", dict(first=two)); train(tmp_path, "b", dict(second=[counts(seed=s) for s in (3, 4)]))
    for old, new in ((0, 42), (1, 43)): (folder / f"arms/first-seed{old}").rename(folder / f"arms/first-seed{new}")
    entries = read(tmp_path)
    ((_, pair),) = pairs_of(entries, leaderboard(entries, "road masks"))
    assert pair.how == "computed" and pair.difference.seeds == 2


def test_a_recorded_difference_is_believed_only_of_its_measure(tmp_path):
    one, two = counts(), counts(.03, seed=1)
    d = paired_difference(two, one, "f1")
    train(tmp_path, "a", dict(first=one, second=two), keep=False, differences={"second - first": said(d)})
    entries = read(tmp_path)
    ((_, f1),) = pairs_of(entries, leaderboard(entries, "road masks", "f1"))
    assert f1.how == "recorded" and np.allclose([f1.difference.low, f1.difference.high], [d.low, d.high])
    ((_, iou),) = pairs_of(entries, leaderboard(entries, "road masks", "iou"))
    assert iou.how == "intervals"                # a difference in F1 is none in IoU
    board = leaderboard(entries, "road masks", "f1")
    turned = pair_of(entries, board.iloc[1], board.iloc[0])
    assert np.isclose(turned.difference.value, -d.value) and np.isclose(turned.difference.low, -d.high) and not np.isnan(turned.difference.high)


def test_rows_of_other_tiles_are_no_pair(tmp_path):
    train(tmp_path, "a", dict(net=counts())); train(tmp_path, "b", dict(net=counts(.1)), hash="ff00")
    entries = read(tmp_path); board = leaderboard(entries, "road masks")
    with pytest.raises(ValueError, match="other test scenes"): pair_of(entries, board.iloc[0], board.iloc[1])
    assert pairs_of(entries, board) == [] and all("nothing to compare" in s[0] for s in statements(entries, board).values())
    forbids, _ = disagreements(entries, board)
    assert len(forbids) == 1 and forbids[0].startswith("other test scenes: ") and "ab12" in forbids[0] and "ff00" in forbids[0]


def test_settings_that_differ_are_named(tmp_path):
    train(tmp_path, "a", dict(net=counts()), env=dict(git=dict(commit="a" * 40, dirty=True))); train(tmp_path, "b", dict(net=counts(.1)), params=dict(size=256))
    evaluation(tmp_path, "e", counts(.05))
    _, minds = disagreements(read(tmp_path), leaderboard(read(tmp_path), "road masks"))
    text = "\n".join(minds)
    assert "thresholds differ (chosen on validation, saved with the model)" in text and "size 128; size 256" in text and "train_spin/a ran with changes" in text


def test_a_baseline_is_held_against_all_others(tmp_path):
    train(tmp_path, "a", {f"arm{i}": counts(.02 * i, seed=i) for i in range(6)})
    entries = read(tmp_path); board = leaderboard(entries, "road masks")
    against = [p for _, p in pairs_of(entries, board, "arm2")]
    assert {p.b for p in against} == {"arm2"} and len(against) == 5
    assert all(np.isclose(p.difference.level, 1 - .05 / 5) for p in against)    # 95 % for the five together
    assert {p.a for _, p in pairs_of(entries, board)} == {"arm5"}               # six arms: the first against all
    with pytest.raises(ValueError, match="nothing here is called 'arm9': take one of arm5"): pairs_of(entries, board, "arm9")


ends = st.floats(-1, 1).flatmap(lambda v: st.floats(.001, .5).map(lambda w: (v, v - w, v + w)))


@examples(max_examples=60, deadline=None)
@given(ends, ends, st.none() | ends)
def test_a_sentence_claims_no_more_than_its_interval(a, b, d):
    made = lambda e: None if e is None else Interval(*e, .95, "iou", 9, 9, 1)
    pair = Pair("A", "B", "iou", made(a), made(b), made(d), "recorded")
    claims = " is above " in pair.sentence
    assert claims == (d is not None and (d[1] > 0 or d[2] < 0)) == pair.apart
    if claims: assert pair.sentence.startswith("A" if d[0] > 0 else "B")
    if d is None: assert ("do not overlap" in pair.sentence) == (a[1] > b[2] or b[1] > a[2])


def test_a_score_without_value_or_interval_concludes_nothing():
    whole, bare, none = (Interval(v, low, high, .95, "iou", 2, 2, 1, "") for v, low, high in ((.5, .4, .6), (.9, np.nan, np.nan), (np.nan,) * 3))
    assert "nothing can be concluded" in Pair("A", "B", "iou", whole, bare).sentence and "nothing can be said" in Pair("A", "B", "iou", whole, none).sentence


def test_graph_scores_and_buildings_are_counted_in_their_own_columns(tmp_path):
    home = tmp_path / "results/evaluate/g"; home.mkdir(parents=True)
    table = counts().assign(topo_f1=np.linspace(.3, .7, 8), apls=.5, object_tp=5, object_fp=1, object_fn=2)
    table.to_csv(home / "images.csv", index=False)
    (home / "params.json").write_text("{}"); (home / "metrics.json").write_text("{}"); (home / "record.json").write_text("{}")
    (entry,) = read(tmp_path)
    score = lambda v: Interval(v, 0, 1, .95, "", 8, 8, 1)
    assert counts_of(entry, score(.5), "topo_f1")[1] == "topo_f1" and counts_of(entry, score(10 / 13), "object_f1")[1] == "f1"
    assert counts_of(entry, score(.4), "topo_f1") is None


# ---- comparisons

def test_curves_know_epochs_steps_and_minutes(tmp_path):
    folder = train(tmp_path, "a", dict(net=counts()), params=dict(crops=43, bs=4, accum=2))
    rows = [dict(epoch=e, seconds=30., valid_iou=np.nan if e == 2 else .1 * e, arm="net", seed=s) for s in (0, 1) for e in (1, 2, 3)]
    pd.DataFrame(rows).to_csv(folder / "history.csv", index=False)
    entries = read(tmp_path)
    curves = learning_curves(entries)
    assert curves[["seed", "epoch", "step", "minutes"]].values.tolist() == [[0, 1, 5, .5], [0, 3, 15, 1.5], [1, 1, 5, .5], [1, 3, 15, 1.5]]
    assert len(learning_curves(entries, "nothing")) == 0
    with pytest.raises(ValueError, match="none of these runs kept a curve of nothing"): plot_curves(learning_curves(entries, "nothing"), "nothing")
    entries[0].params["bs"] = 0
    assert np.isnan(steps_per_epoch(entries[0]))


def test_figures_are_small_and_hold_every_line(tmp_path):
    budgets = [dict(model=f"{a}, {b} tiles", attempt=k, budget=b, seeds=1, minutes=b, parameters=10, test_iou=dict(value=.4 + .01 * b + .05 * k, low=.3, high=.8, scenes=9))
               for k, a in enumerate(("unet", "deeplab")) for b in (5, 12, 24)]
    folder = tmp_path / "runs/train_roofs/a"; folder.mkdir(parents=True)
    for name, value in dict(params=dict(data="roofs"), metrics=dict(finished=True, split_hash="ab", leaderboard=budgets)).items(): (folder / f"{name}.json").write_text(json.dumps(value))
    pd.DataFrame([dict(epoch=e, valid_iou=.1 * e, arm=r["model"], seed=0) for r in budgets for e in range(1, 30)]).to_csv(folder / "history.csv", index=False)
    entries = read(tmp_path); board = leaderboard(entries, "building masks")
    points = budget_points(entries, board)
    drawn = [plot_curves(learning_curves(entries)), plot_budget(points), plot_budget(points, "minutes"), plot_forest([p for _, p in pairs_of(entries, board)])]
    for fig in drawn:
        raw = BytesIO(); fig.savefig(raw, dpi=144); assert len(raw.getvalue()) < 150_000
    assert len(drawn[0].axes) == 1 and len(drawn[0].axes[0].lines) == 6      # neither steps nor minutes are known
    assert len(drawn[1].axes[0].containers) == 2 and [len(c.lines[0].get_xdata()) for c in drawn[1].axes[0].containers] == [3, 3]
    with pytest.raises(ValueError, match="'steps' was not recorded by these runs; known costs: tiles, minutes"): plot_budget(points, "steps")
    with pytest.raises(ValueError, match="two arms on the same test tiles"): plot_forest([])


@examples(max_examples=40, deadline=None)
@given(*[st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 2) | st.none() | st.just("") | st.dictionaries(st.sampled_from("xy"), st.integers(0, 2), max_size=2), max_size=5)] * 2)
def test_what_changed_is_what_differs(tmp_path_factory, one, two):
    home = tmp_path_factory.mktemp("two")
    for name, params in (("a", one), ("b", two)):
        folder = home / f"runs/train_spin/{name}"; folder.mkdir(parents=True); (folder / "params.json").write_text(json.dumps(params))
    a, b = read(home)
    there, back = changed(a, b), changed(b, a)
    assert len(there) == len(back) and set(there.name) == set(back.name) and len(changed(a, a)) == 0
    for n in set(one) | set(two):
        if isinstance(one.get(n), dict) or isinstance(two.get(n), dict): continue
        assert (n in set(there.name)) == (n not in one or n not in two or one[n] != two[n])
    shutil.rmtree(home)


def test_timings_stand_side_by_side_with_their_machine(tmp_path):
    for name, cpu, factor in (("a", "slow core", 2), ("b", "fast core", 1)):
        folder = tmp_path / f"runs/bench_spin/{name}"; folder.mkdir(parents=True)
        for file, value in dict(params=dict(size=64), env=dict(cpu=cpu), metrics=dict(finished=True, step_ms=dict(spin=10. * factor, plain=5. * factor))).items():
            (folder / f"{file}.json").write_text(json.dumps(value))
    entries = read(tmp_path)
    table = speed_table(entries, "bench_spin")
    assert table.columns.get_level_values("hardware").tolist() == ["slow core", "fast core"] and table.loc["spin"].tolist() == [20, 10]
    assert len(groups(leaderboard(entries, "speed"))) == 2 and leaderboard(entries, "speed")["rank"].isna().all()
    assert len(speed_table(entries, "bench_none")) == 0


# ---- the notebook

def compare(folder: Path, until="run.finish(", **params) -> dict: return play("compare.ipynb", folder, until, **params)


def test_the_notebook_compares_and_records(tmp_path):
    train(tmp_path, "a", dict(first=counts())); train(tmp_path, "b", dict(second=counts(.03, seed=1)))
    done = compare(tmp_path, runs="a,b", baseline="first", out=str(tmp_path / "kept"))["run"]
    m = done.metrics
    assert done.status == "finished" and (m["task"], m["metric"], m["compared"]) == ("road masks", "iou", ["train_spin/a", "train_spin/b"])
    (only,) = m["comparisons"]
    assert (only["a"], only["b"], only["how"]) == ("second", "first", "computed") and only["difference"]["low"] > 0
    assert m["sentences"]["town, test tiles ab12"][0].startswith("second is above first")
    assert {p.name for p in (tmp_path / "kept").iterdir()} >= {"board.csv", "changed.csv", "metrics.json", "differences.png"}
    again = read(tmp_path)
    assert len(leaderboard(again, "road masks")) == 2 and "compare" not in set(all_arms(again).experiment)   # a comparison is no result


def test_the_notebook_shows_the_published_records(tmp_path):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    done = compare(tmp_path)["run"]
    assert done.metrics["task"] == "road masks" and len(done.metrics["compared"]) > 10 and done.metrics["comparisons"]


def test_the_notebook_says_how_to_begin(tmp_path, capsys):
    space = compare(tmp_path)
    assert space["run"].status == "finished" and space["run"].metrics["compared"] == []


def test_the_notebook_refuses_what_cannot_be_compared(tmp_path):
    train(tmp_path, "town_a", dict(net=counts())); train(tmp_path, "town_b", dict(net=counts(.1)), hash="ff00")
    train(tmp_path, "houses", dict(net=counts()), experiment="train_buildings")
    stopped = tmp_path / "runs/train_spin/stopped"; stopped.mkdir(); (stopped / "params.json").write_text("{}")
    broken = tmp_path / "runs/train_spin/broken"; broken.mkdir(); (broken / "params.json").write_text("{}"); (broken / "metrics.json").write_text("{")
    for asked, message in ((dict(runs="town_x"), "no run 'town_x'; did you mean town_"), (dict(runs="town_a,town_b"), "other test scenes: .*To see them apart: -p apart True"),
                           (dict(runs="town_a,houses"), "no common task"), (dict(runs="stopped"), "is unfinished and has no result"),
                           (dict(runs="broken"), "is unreadable and has no result .metrics.json is damaged"), (dict(runs="town_a", metric="apls"), "not measured by 'apls'"),
                           (dict(runs="town_a", task="building masks"), "no common scores of building masks")):
        with pytest.raises(ValueError, match=message): compare(tmp_path, "RunFolder.current(", **asked)
    assert not (tmp_path / "runs/compare").exists()        # refused before a run folder is made
    with pytest.raises(ParameterError, match="did you mean 'runs'"): compare(tmp_path, "check_parameters(", run_s="a")
    with pytest.raises(ParameterError, match="task is 'roads'"): compare(tmp_path, "check_parameters(", task="roads")
    apart = compare(tmp_path, runs="town_a,town_b", apart=True)
    assert len(apart["parts"]) == 2 and apart["compared"] == [] and apart["run"].metrics["forbids"]


def test_every_pair_of_published_records_can_be_asked_for_what_changed(tmp_path):
    entries = read_archive(tmp_path, ROOT / "results")
    for a, b in itertools.combinations(entries, 2): assert len(changed(a, b))
