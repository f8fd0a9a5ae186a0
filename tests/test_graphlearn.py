"""Training on graph-tensors, and choosing thresholds: curves that resume, norms that settle, stops, and a search that finds the best."""
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from aerial_nb.data.graphcrops import GraphCrops, draw_places, graph_loaders, graph_stats
from aerial_nb.data.graphtiles import GraphStore, graph_samples
from aerial_nb.data.raster import DataError
from aerial_nb.data.splits import split_by_scene
from aerial_nb.models.zoo import build
from aerial_nb.roads.graph import RoadGraph
from aerial_nb.roads.gte import encode
from aerial_nb.training import graphscore, graphtask
from aerial_nb.training.callbacks import NotFinite
from aerial_nb.training.control import Halve
from aerial_nb.training.graphlearn import GraphHistory, SettleNorms, graph_learner, graph_recipe, train_graph
from aerial_nb.training.graphloss import GraphLoss, GraphWeights
from aerial_nb.training.graphscore import JudgedGraph, Scoring, best_numbers, score_graph, search_numbers
from aerial_nb.training.graphtask import GraphSampling, graph_task, read_graph_of, run_graph_arm
from aerial_nb.training.learner import Recipe, fit
from aerial_nb.training.records import Folder
from aerial_nb.training.runs import RunFolder
from aerial_nb.training.saved import load_card, load_model

from fastai.callback.core import Callback

TINY = dict(width=1)
TOLD = ["train_loss", "vertex", "edge", "vector", "road", "valid_loss", "valid_vertex", "valid_edge", "valid_vector", "valid_road", "lr"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(before)


@pytest.fixture(scope="module")
def home(tmp_path_factory): return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def samples(home): return graph_samples(synthetic=dict(n=5, size=128), cache=home)


@pytest.fixture(scope="module")
def store(samples, home): return GraphStore(samples.head(2), cache=home, progress=False)


def loaders(store, n=6, size=64, bs=2, road=True):
    train = GraphCrops(store, partial(draw_places, store, n, size, 0, least_road_px=20), size, road=road)
    return graph_loaders(train, GraphCrops(store, draw_places(store, 2, size, 1, least_road_px=20), size, road=road), bs, graph_stats(store))


def test_the_network_is_given_the_image_alone_and_every_weight_a_gradient(store, tmp_path):
    seen = []
    class Look(Callback):
        order = 65
        def after_backward(self):
            seen.append([len(self.xb), len(self.yb), [n for n, p in self.model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]])
    train_graph("sat2graph", TINY, loaders(store, 2), graph_recipe(1), Folder(tmp_path), quiet=True, cbs=(Look(),))
    assert seen == [[1, 2, []]]


@pytest.mark.parametrize("amp", ["", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_killed_training_goes_on_as_if_it_had_not_been(store, tmp_path, amp):
    class Kill(Callback):
        order = 90
        def after_batch(self):
            if self.training and (self.epoch, self.iter) == (2, 1): raise KeyboardInterrupt
    dls, recipe = loaders(store), graph_recipe(4, halve_every=5, amp=amp, valid_every=2)
    whole, parts = Folder(tmp_path / "whole"), Folder(tmp_path / "parts")
    one, _ = train_graph("sat2graph", TINY, dls, recipe, whole, quiet=True, checkpoint_s=0)
    with pytest.raises(KeyboardInterrupt): train_graph("sat2graph", TINY, dls, recipe, parts, quiet=True, checkpoint_s=0, cbs=(Kill(),))
    two, record = train_graph("sat2graph", TINY, dls, recipe, parts, quiet=True, checkpoint_s=0)
    assert record["resumed_after"] == 2
    pd.testing.assert_frame_equal(whole.history[TOLD], parts.history[TOLD])
    for a, b in zip(one.state_dict().values(), two.state_dict().values()): assert torch.equal(a, b)


def test_the_history_has_all_losses_and_costs(store, tmp_path):
    _, record = train_graph("sat2graph", TINY, loaders(store), graph_recipe(3, halve_every=4), folder := Folder(tmp_path), quiet=True,
                            weights=GraphWeights(vector=100.))
    h = folder.history
    assert set(TOLD) | {"epoch", "step_ms", "seconds", "memory_mb"} == set(h.columns)
    assert h.lr.tolist() == [1e-3, 5e-4, 2.5e-4]     # steps 0-3, 4-7, 8: of each epoch the last
    for prefix, total in (("", h.train_loss), ("valid_", h.valid_loss)):
        assert np.allclose(h[f"{prefix}vertex"] + 10 * h[f"{prefix}edge"] + 100 * h[f"{prefix}vector"] + .1 * h[f"{prefix}road"], total, rtol=1e-4)
    best = h.valid_loss.idxmin()
    assert record["best_epoch"] == best + 1 and np.isclose(record["best_valid_loss"], h.valid_loss[best], rtol=1e-6)


def test_means_weigh_batches_by_their_crops(tmp_path):
    history = GraphHistory(Folder(tmp_path))
    history.parts, history.sizes = [torch.tensor([1., 10.]), torch.tensor([4., 40.])], [2, 1]
    assert history.means() == [2., 20.]


def test_a_tiny_network_learns_where_vertices_are(store, tmp_path):
    train_graph("sat2graph", dict(width=2), loaders(store, 20), graph_recipe(3, lr=3e-3), folder := Folder(tmp_path), quiet=True)
    h = folder.history
    assert h.vertex.iloc[-1] < .5 * h.vertex.iloc[0] and h.valid_vertex.iloc[-1] < .7 * h.valid_vertex.iloc[0]


def test_settled_norms_make_evaluation_what_training_saw(store, tmp_path):
    "With the batch that norms were settled on, evaluation and training mode say the same."
    dls, recipe = loaders(store, 2, bs=2), graph_recipe(3, lr=3e-3)
    learn = graph_learner(build("sat2graph", **TINY), dls, recipe, Folder(tmp_path), quiet=True, settle=1)
    momenta = [m.momentum for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)]
    said = {}
    class Compare(Callback):
        order = 72
        def before_validate(self):
            x = self.learn.settle_norms.recent[-1]
            with torch.no_grad():
                said["eval"] = self.model(*x)
                tracked = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
                for m in tracked.values(): m.train(); m.track_running_stats = False
                said["train"] = self.model(*x)
                for m in tracked.values(): m.eval(); m.track_running_stats = True
    learn.add_cb(Compare())
    fit(learn, recipe)
    assert torch.allclose(said["eval"], said["train"], rtol=.05, atol=.05 * said["train"].abs().max().item())
    assert all(m.momentum is not None and int(m.num_batches_tracked) == 3 for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)), momenta


def test_frozen_norms_are_not_settled():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm2d(1)).train()
    model[0].eval()
    cb = SettleNorms(2)
    class Learn:
        training, xb = True, (torch.randn(4, 1, 3, 3) * 5 + 3,)
    cb.learn = learn = Learn(); learn.model = model; learn.training = True
    cb.after_batch(); cb.after_train(); model.eval(); cb.before_validate()
    assert model[0].running_mean.item() == 0 and abs(model[1].running_mean.item() - 3) < 2 and model[1].momentum == .1
    assert not model[1].training


class Large(nn.Module):
    "A network whose activations leave fp16 behind."
    classes = 28
    def __init__(self, scale): super().__init__(); self.layer, self.scale = nn.Conv2d(3, 28, 1), scale
    def forward(self, x): return self.layer(x) * self.scale


def test_fp16_with_vectors_that_count_a_thousand_times_stops_with_advice(store, tmp_path):
    dls, recipe = loaders(store), graph_recipe(1, amp="fp16")
    with pytest.raises(NotFinite) as stopped: fit(graph_learner(Large(1e6), dls, recipe, Folder(tmp_path), quiet=True, settle=0), recipe)
    for says in ("epoch 1, batch 1", "tile town", "vectors count 1000 times", "amp='bf16' or amp='no' (float32)", "GraphWeights(vector=100)"):
        assert says in str(stopped.value), says
    same = graph_recipe(1, amp="bf16")
    fit(graph_learner(Large(1e6), dls, same, Folder(tmp_path / "bf16"), quiet=True, settle=0), same)


def test_fp16_that_skips_every_step_stops_too(store, tmp_path):
    class Overflow(Callback):
        order = 65
        def after_backward(self):
            for p in self.model.parameters(): p.grad.fill_(float("inf"))
    recipe = graph_recipe(2, amp="fp16")
    with pytest.raises(NotFinite, match="overflowed fp16 at every scale.*no step is taken.*bf16"):
        fit(graph_learner(Large(1.), loaders(store, 40, 32), recipe, Folder(tmp_path), quiet=True, settle=0, cbs=(Overflow(),)), recipe)


def test_what_cannot_be_trained_is_refused(store, tmp_path):
    dls, folder = loaders(store), Folder(tmp_path)
    with pytest.raises(ValueError, match="best_by='iou'"): train_graph("sat2graph", TINY, dls, Recipe(epochs=1), folder)
    with pytest.raises(ValueError, match="26 or 28"): train_graph("unet", dict(classes=1), dls, graph_recipe(1), folder)
    with pytest.raises(ValueError, match="28 channels.*crops have 26"): train_graph("sat2graph", TINY, loaders(store, road=False), graph_recipe(1), folder)
    with pytest.raises(ValueError, match="halve_every"): graph_recipe(1, halve_every=0)
    train_graph("sat2graph", TINY, dls, graph_recipe(1), folder, quiet=True)
    with pytest.raises(ValueError, match=r"(?s)another network.*\[28.*\[26.*begin a new run"):
        train_graph("sat2graph", TINY | dict(road=False), dls, graph_recipe(2), folder, quiet=True)


def test_a_network_without_road_learns_from_crops_with_it(store, tmp_path):
    train_graph("sat2graph", TINY | dict(road=False), loaders(store), graph_recipe(1), folder := Folder(tmp_path), quiet=True)
    assert (folder.history.road == 0).all() and folder.history.vertex[0] > 0


def test_halving_counts_optimiser_steps():
    class Opt:
        hypers = [dict(lr=.8), dict(lr=.4)]
        def set_hyper(self, name, values): self.now = values
    class Learn: opt, epoch, iter = Opt(), 0, 0
    cb = Halve(2, accum=3); cb.learn = learn = Learn(); learn.dls = type("D", (), dict(train=range(8)))()
    cb.before_fit()
    seen = []
    for learn.epoch, learn.iter in ((0, 0), (0, 5), (0, 6), (1, 3), (1, 4)):
        cb.before_batch(); seen.append(learn.opt.now)
    assert seen == [[.8, .4], [.8, .4], [.4, .2], [.4, .2], [.2, .1]]


# --- thresholds


def grid_of_roads(size=256):
    nodes = np.array([[x, y] for y in range(28, size, 40) for x in range(28, size, 20)], float)
    across = len(range(28, size, 20))
    edges = [[i, i + 1] for i in range(len(nodes)) if (i + 1) % across]
    return RoadGraph(nodes, edges)


def doubtful(truth, size, sure=.7, doubt=.3):
    "True roads at `sure`; between them, joined to them, roads that are not there, at `doubt`."
    n, rows = len(truth.nodes), np.unique(truth.nodes[:, 1])
    between = truth.nodes[truth.nodes[:, 1] < rows[-1]] + [0, 20]
    across = n // len(rows)
    up = [[n + i, i] for i in range(len(between))] + [[n + i, i + across] for i in range(len(between))]
    every = encode(RoadGraph(np.concatenate([truth.nodes, between]), np.concatenate([truth.edges, up])), (size, size), road=True)
    real = encode(truth, (size, size), road=True)
    for k in (0, *range(2, 26, 4)): every[k] = np.where(real[k] > 0, sure, doubt * every[k])
    return every


@pytest.mark.parametrize("sure, doubt", [(.55, .4), (.9, .3), (.7, .1)])
def test_the_search_finds_thresholds_between_doubt_and_certainty(sure, doubt):
    truth = grid_of_roads()
    judged = JudgedGraph("t", "t", np.zeros((3, 256, 256), "uint8"), np.ones((256, 256), bool), truth)
    best, table = search_numbers([judged], lambda j: doubtful(truth, 256, sure, doubt), Scoring(thr=(.02, .05, .5), edge_thr=(.02, .05, .5)))
    assert best["worth"] == table.worth.max() > .95 and max(best["thr"], best["edge_thr"]) == .5
    assert table[(table.thr == .02) & (table.edge_thr == .02)].worth.iloc[0] < .7 * best["worth"]


def test_the_search_is_a_race_kept_tile_by_tile(monkeypatch):
    truth, tries, kept = grid_of_roads(), [], []
    tiles = [JudgedGraph(f"t{i}", f"t{i}", np.zeros((3, 256, 256), "uint8"), np.ones((256, 256), bool), truth) for i in range(3)]
    found = dict(zip([(.1, .1, 15.), (.1, .5, 15.), (.5, .1, 15.), (.5, .5, 15.)], (.2, .8, .85, .9)))
    def searched(tensor, judged, combinations, scoring):
        tries.append(list(combinations))
        return [dict(image=judged.name, scene=judged.scene, thr=c[0], edge_thr=c[1], snap_px=c[2], worth=found[c]) for c in combinations]
    monkeypatch.setattr(graphscore, "tile_search", searched)
    scoring = Scoring(thr=(.1, .5), edge_thr=(.1, .5))
    best, table = search_numbers(tiles, lambda j: None, scoring, keep=kept.append)
    assert (best["thr"], best["edge_thr"], best["worth"]) == (.5, .5, pytest.approx(.9))
    assert [len(t) for t in tries] == [4, 3, 3] and [len(t) for t in kept] == [4, 7, 10]
    tries.clear()
    again, whole = search_numbers(tiles, lambda j: None, scoring, done=kept[1])     # killed before the third tile
    assert again == best and len(tries) == 1 and whole.equals(table)


def test_equal_graphs_are_scored_once_and_hopeless_ones_not_at_all(monkeypatch):
    truth, scored = grid_of_roads(), []
    judged = JudgedGraph("t", "t", np.zeros((3, 256, 256), "uint8"), np.ones((256, 256), bool), truth)
    real = graphscore.score_graph
    monkeypatch.setattr(graphscore, "score_graph", lambda *a: scored.append(1) or real(*a))
    tensor = doubtful(truth, 256, .9, 0.)
    search_numbers([judged], lambda j: tensor, Scoring(thr=(.1, .2, .3), edge_thr=(.1, .2, .3)))
    assert len(scored) == 1
    little = replace(judged, graph=RoadGraph(truth.nodes, truth.edges[:2]))
    scored.clear()
    best, table = search_numbers([little], lambda j: tensor, Scoring(thr=(.1,), edge_thr=(.1,)))
    assert not scored and best["worth"] == 0 and best["thr"] == .05 and table.topo_f1.isna().all()


def test_of_equals_the_middle_is_taken():
    rows = [dict(image="a", thr=t, edge_thr=.1, snap_px=15., worth=w) for t, w in ((.05, .5), (.1, .9), (.2, .9), (.35, .9), (.5, .3))]
    assert best_numbers(pd.DataFrame(rows), Scoring())["thr"] == .2


def test_scores_are_in_metres_and_of_the_tile_alone():
    truth = grid_of_roads()
    beyond = RoadGraph(np.concatenate([truth.nodes, [[300, 300], [340, 300]]]), np.concatenate([truth.edges, [[len(truth.nodes), len(truth.nodes) + 1]]]))
    a, b = (score_graph(beyond, truth, (256, 256), Scoring(gsd_m=g)) for g in (1., .5))
    assert a["true_m"] == a["found_m"] == 2 * b["found_m"] and a["topo_f1"] == pytest.approx(1)
    shifted = RoadGraph(truth.nodes + [0, 15], truth.edges)      # 15 m is too far to be found, 7.5 m is not
    assert score_graph(truth, shifted, (256, 256), Scoring(gsd_m=1.))["topo_f1"] < .2 < .8 < score_graph(truth, shifted, (256, 256), Scoring(gsd_m=.5))["topo_f1"]
    nothing = RoadGraph(np.zeros((0, 2)), np.zeros((0, 2), int))
    assert score_graph(truth, nothing, (256, 256))["topo_f1"] == 0 and score_graph(nothing, nothing, (256, 256))["topo_f1"] == 1


@pytest.mark.parametrize("wrong, says", [(dict(choose_by="f1"), "choose_by 'f1' is unknown"), (dict(apls="new"), "apls 'new'"), (dict(thr=()), "thr are prob"),
                                         (dict(edge_thr=(1.,)), "edge_thr are prob"), (dict(snap_px=(0,)), "snap_px"), (dict(gsd_m=-1), "gsd_m")])
def test_impossible_scorings(wrong, says):
    with pytest.raises(ValueError, match=says): Scoring(**wrong)


# --- tasks and arms


SMALL = GraphSampling(size=64, crops=4, valid_crops=2)
QUICK = Scoring(thr=(.05, .3), edge_thr=(.05,))


@pytest.fixture
def task(samples, home, monkeypatch):
    monkeypatch.setenv("AERIAL_CACHE", str(home))
    return graph_task(samples, "split", graph_recipe(1), SMALL, scoring=QUICK, arguments=TINY, data="synthetic")


def test_an_arm_reads_the_test_once_and_finished_steps_not_again(task, tmp_path, monkeypatch):
    run = RunFolder.create("check", {}, tmp_path)
    folder = run.arm("sat2graph-seed0")
    class Stop(Exception): pass
    def stop(*a): raise Stop
    monkeypatch.setattr(graphtask, "search_numbers", stop)
    with pytest.raises(Stop): run_graph_arm(task, "sat2graph", 0, folder, quiet=True)
    with pytest.raises(DataError, match="behind their door"): task.score_on[0]
    assert (folder / "checkpoint.pt").is_file() and not (folder / "arm.json").is_file() and not (run.path / "test_read.json").is_file()
    monkeypatch.undo()
    monkeypatch.setattr(graphtask, "score_tiles", stop)
    with pytest.raises(Stop): run_graph_arm(task, "sat2graph", 0, folder, quiet=True)
    assert (folder / "arm.json").is_file() and (folder / "search.csv").is_file() and len(folder.history) == 1
    monkeypatch.undo()
    monkeypatch.setattr(graphtask, "train_graph", stop)     # neither trained nor searched again
    fresh = replace(task, score_on=type(task.score_on)(task.score_on.door, task.score_on.read))
    done = run_graph_arm(fresh, "sat2graph", 0, folder, quiet=True)
    assert len(done.scores) == len(task.score_on) and not (folder / "checkpoint.pt").exists()
    (reading,) = json.loads((run.path / "test_read.json").read_text())["readings"]
    assert reading["reader"] == "sat2graph-seed0" and len(reading["again"]) == 1
    found = read_graph_of(folder, fresh.score_on[0])
    assert found.crs is not None and found.space == "pixel"
    again = run_graph_arm(fresh, "sat2graph", 0, folder, quiet=True)
    pd.testing.assert_frame_equal(again.scores, done.scores)
    kept = json.loads((folder / "arm.json").read_text())
    kept["numbers"]["thr"] = .123
    (folder / "arm.json").write_text(json.dumps(kept)); (folder / "scores.csv").unlink()
    with pytest.raises(DataError, match="another model or threshold"): run_graph_arm(fresh, "sat2graph", 0, folder, quiet=True)


def test_the_saved_model_says_how_to_decode(task, tmp_path):
    done = run_graph_arm(task, "sat2graph", 0, folder := RunFolder.create("check", {}, tmp_path).arm("sat2graph-seed0"), quiet=True)
    card = load_card(folder.path)
    assert {k: card.extra["graph"][k] for k in ("thr", "edge_thr", "snap_px", "angle_weight")} == {k: done.numbers[k] for k in ("thr", "edge_thr", "snap_px", "angle_weight")}
    assert card.extra["graph"]["channels"] == 28 and card.extra["size"] == 64 and card.classes == ("road",) and card.threshold is None
    assert (card.builder, card.gsd_m, card.split_hash, card.mean) == ("sat2graph", 1., task.split_hash, (127.5,) * 3)
    about = json.loads((folder / "model.json").read_text())
    about["arguments"]["road"] = False
    text = json.dumps(about)
    (folder / "model.json").write_text(text)
    with pytest.raises(ValueError, match=r"(?s)score.weight is \(28.*the model wants \(26"): load_model(folder.path)


def test_overfit_is_said_to_be_no_result(samples, home, monkeypatch):
    monkeypatch.setenv("AERIAL_CACHE", str(home))
    task = graph_task(samples.head(1), "overfit", graph_recipe(1), GraphSampling.by_heart(size=64, crops=2, valid_crops=1), arguments=TINY)
    assert not task.is_result and task.split_hash is None
    assert [j.name for j in task.choose_on] == [j.name for j in task.score_on] == ["town0"]
    assert not task.dls.train.dataset.augment


def test_tiles_smaller_than_a_crop_are_padded_and_said(samples, home, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("AERIAL_CACHE", str(home))
    task = graph_task(samples.head(1), "overfit", graph_recipe(1), GraphSampling.by_heart(size=192, crops=2, valid_crops=1), arguments=TINY, scoring=QUICK)
    assert "1 of 1 tiles are smaller than the crops of 192 px (town0)" in caplog.text
    image, tensor, valid = task.dls.train.one_batch()
    assert image.shape[-2:] == (192, 192) and not valid[:, 128:].any() and valid[:, :128, :128].all()
    done = run_graph_arm(task, "sat2graph", 0, Folder(tmp_path / "arm"), quiet=True)
    assert len(done.scores) == 1


def test_published_splits_are_kept_and_missing_ones_drawn_by_scene(samples, home, monkeypatch):
    monkeypatch.setenv("AERIAL_CACHE", str(home))
    given = samples.assign(split=["valid", "train", "train", "test", "train"])
    task = graph_task(given, "split", graph_recipe(1), SMALL, arguments=TINY)
    assert [j.name for j in task.choose_on] == ["town0"] and len(task.score_on) == 1
    drawn = split_by_scene(samples)
    own = graph_task(samples, "split", graph_recipe(1), SMALL, arguments=TINY)
    assert [j.name for j in own.choose_on] == drawn[drawn.split == "valid"].scene.tolist()
    for bad, says in ((dict(protocol="fit"), "use overfit or split"), (dict(samples=given[given.split != "test"]), "no tiles in split test")):
        with pytest.raises(ValueError, match=says): graph_task(**dict(samples=given, protocol="split", recipe=graph_recipe(1), sampling=SMALL) | bad)
    with pytest.raises(ValueError, match="crops must be 1 or more"): GraphSampling(crops=0)
    assert isinstance(GraphLoss().weights, GraphWeights)
