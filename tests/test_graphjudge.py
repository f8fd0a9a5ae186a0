"""A saved graph model on tiles: what is refused, what it has seen, scores that stay, and several ways beside each other."""
import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

from aerial_nb.data.graphtiles import GraphStore, Preparing, graph_samples
from aerial_nb.data.raster import DataError, read_pixels, write_raster
from aerial_nb.data.splits import ensure_split, split_hash
from aerial_nb.models.zoo import build
from aerial_nb.report.archive import image_hash, read_archive
from aerial_nb.roads.files import read_graph
from aerial_nb.roads.graph import RoadGraph
from aerial_nb.roads.gte import encode
from aerial_nb.scenes import graphjudge, graphways
from aerial_nb.scenes.graphjudge import check_graph_model, judge_graphs, seen_by
from aerial_nb.scenes.graphways import GraphHow, judge_tile, judge_tiles, tensor_distance
from aerial_nb.scenes.provenance import find_model
from aerial_nb.training.graphscore import JudgedGraph, Scoring, graphs_of
from aerial_nb.training.graphtask import graph_hash
from aerial_nb.training.records import Folder
from aerial_nb.training.runs import RunFolder
from aerial_nb.training.saved import save_model

matplotlib.use("Agg")
NUMBERS = dict(thr=.3, edge_thr=.3, snap_px=15., angle_weight=100.)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(before)


@pytest.fixture(scope="module")
def towns(tmp_path_factory) -> pd.DataFrame:
    return graph_samples("synthetic", dict(n=5, size=128, seed=3, gsd_m=1.), cache=tmp_path_factory.mktemp("drawn"))


def save(folder, bands=3, **card) -> Path:
    torch.manual_seed(1)
    arguments = dict(width=1, bands=bands)
    values = dict(stats=((127.5,) * bands, (255.,) * bands), gsd_m=1., data="elsewhere", extra=dict(graph=NUMBERS | dict(channels=28), arm="tiny", seed=2)) | card
    save_model(folder, build("sat2graph", **arguments), "sat2graph", arguments, **values)
    return folder


def folder_of(samples: pd.DataFrame, folder: Path, bands=3, mask=None) -> Path:
    "Towns as images/ and labels/, or as images/ and masks/."
    for part in ("images", "labels" if mask is None else "masks"): (folder / part).mkdir(parents=True)
    for k, row in enumerate(samples.itertuples()):
        got = read_pixels(row.image)
        data = got.data if bands == 3 else np.concatenate([got.data, got.data[:1]])
        write_raster(folder / f"images/town{k}.tif", data, got.crs, got.transform)
        if mask is None: shutil.copy(row.label, folder / f"labels/town{k}_roads.geojson")
        else: write_raster(folder / f"masks/town{k}.tif", np.full((1, *got.valid.shape), mask, "uint8"), got.crs, got.transform)
    return folder


class Oracle:
    "Knows each tile by where its pixels say they are; forgets a share of the edges of some."
    def __init__(self, samples, cache, forget=()):
        tiles = graphs_of(GraphStore(samples, Preparing(), cache, progress=False))
        self.truth = np.stack([encode(t.graph, t.shape, road=True) for t in tiles], 1).reshape(28, -1)
        size, self.calls = tiles[0].shape[0] * tiles[0].shape[1], 0
        for k in forget: self.truth[2:26:4, k * size + size // 2:(k + 1) * size] = 0
        places = np.arange(len(tiles) * size, dtype="float32").reshape(len(tiles), 1, *tiles[0].shape)
        self.tiles = [JudgedGraph(t.name, t.scene, np.concatenate([t.pixels, p]), t.valid, t.graph, t.source) for t, p in zip(tiles, places)]

    def __call__(self, pixels, valid):
        self.calls += 1
        return self.truth[:, pixels[:, -1].astype(int)].swapaxes(0, 1) * valid[:, None]


# ways

def test_every_way_finds_what_a_perfect_network_says(towns, tmp_path):
    oracle = Oracle(towns.head(1), tmp_path)
    graphs, rows, apart = judge_tile(oracle.tiles[0], oracle, NUMBERS, GraphHow(ways="ours,published,published+decoder"), Scoring())
    assert [r["way"] for r in rows] == list(graphs) == ["ours", "published", "published+decoder"]
    assert rows[0]["topo_f1"] > .95 and rows[1]["topo_f1"] > .95 and rows[2]["topo_f1"] > .6
    assert all(r["predict_s"] > 0 and r["decode_s"] > 0 and r["edges"] == len(graphs[r["way"]]) for r in rows)
    assert rows[1]["predict_s"] == rows[2]["predict_s"]      # one tensor for two decoders
    assert [(r["a"], r["b"]) for r in apart] == [("ours", "published"), ("ours", "published+decoder")]
    assert apart[0]["probability"] < 1e-6 and apart[0]["vector_px"] < 1e-4 and apart[0]["topo_between"] > .99
    assert apart[1]["topo_between"] <= 1 and not np.array_equal(graphs["ours"].nodes, graphs["published+decoder"].nodes)


def test_ways_begin_in_turns(monkeypatch, towns, tmp_path):
    oracle, asked = Oracle(towns.head(1), tmp_path), []
    real = graphways.predict_tensor
    monkeypatch.setattr(graphways, "predict_tensor", lambda *a, blend, **k: asked.append(blend) or real(*a, blend=blend, **k))
    for turn in (0, 1): judge_tile(oracle.tiles[0], oracle, NUMBERS, GraphHow(ways="ours,published"), Scoring(), turn)
    assert asked == ["ramp", "published", "published", "ramp"]


def test_the_distance_of_tensors_is_in_probability_and_pixels():
    a = np.zeros((28, 4, 4), "float32")
    b = a.copy(); b[0] = .5; b[4] = .12     # one of eight probabilities (vertex, six edges, road), one of twelve vectors
    np.testing.assert_allclose(tensor_distance(a, b), (.5 / 8, 25 * .12 / 12), rtol=1e-5)
    np.testing.assert_allclose(tensor_distance(a[:26], b[:26]), (.5 / 7, 25 * .12 / 12), rtol=1e-5)


def test_impossible_wishes_are_refused_together():
    with pytest.raises(DataError) as refused: GraphHow(ways="ours,theirs", gsd_m=-1., spacing_m=0., apls="spacent")
    for says in ("windows 'theirs'", "ours, published, published+decoder", "gsd_m is -1", "spacing_m is 0", "apls 'spacent'"): assert says in str(refused.value)
    with pytest.raises(DataError, match="no windows were named"): GraphHow(ways=" , ")
    assert GraphHow(ways="published, ours,published").ways == ("published", "ours")


# interrupted, and without roads

def test_an_interrupted_evaluation_goes_on_with_the_next_tile(towns, tmp_path):
    oracle, how, folder = Oracle(towns.head(3), tmp_path / "cache"), GraphHow(ways="ours,published"), Folder(tmp_path / "run")
    whole, _ = judge_tiles(oracle.tiles, oracle, NUMBERS, how, Scoring(), Folder(tmp_path / "whole"))
    seen = []
    def failing(pixels, valid):
        seen.append(int(pixels[:, -1].max()) // 128**2)
        if seen[-1] == 2: raise RuntimeError("the lights went out")
        return oracle(pixels, valid)
    with pytest.raises(RuntimeError, match="lights"): judge_tiles(oracle.tiles, failing, NUMBERS, how, Scoring(), folder)
    kept = pd.read_csv(folder / "scores.csv")
    assert kept.image.nunique() == 2 and len(kept) == 4
    asked = []
    def counting(pixels, valid): asked.append(int(pixels[:, -1].max()) // 128**2); return oracle(pixels, valid)
    table, apart = judge_tiles(oracle.tiles, counting, NUMBERS, how, Scoring(), folder)
    assert set(asked) == {2} and len(table) == 6 and len(apart) == 3 and not table.duplicated(["image", "way"]).any()
    same = ["image", "way", "topo_f1", "apls", "edges"]
    pd.testing.assert_frame_equal(table[same].reset_index(drop=True), whole[same].reset_index(drop=True))
    next((folder.path / "arms/published/predictions").glob("*.npz")).unlink()      # a graph that is gone is made again
    judge_tiles(oracle.tiles, counting, NUMBERS, how, Scoring(), folder)
    assert set(asked) > {2} and len(list((folder.path / "arms/published/predictions").glob("*.npz"))) == 3


def test_a_tile_without_a_true_road_has_no_score_and_is_counted(towns, tmp_path):
    home = folder_of(towns.head(3), tmp_path / "tiles")
    (home / "labels/town1_roads.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    found = judge_graphs(find_model(save(tmp_path / "model")), graph_samples(home, gsd_m=1.), tmp_path / "run", data=str(home), cache=tmp_path / "cache")
    none = found.table.set_index("image").loc["town1"]
    assert none[["topo_f1", "topo_precision", "topo_recall", "apls"]].isna().all() and none.true_m == 0
    assert "1 of 3 tiles have no true road" in " ".join(found.remarks()) and found.intervals()["ours"]["topo_f1"].images == 2
    assert found.record()["empty"] == 1 and found.record()["arms"]["tiny"]["images"] == 2
    with pytest.raises(DataError, match="none of the 2 tiles has a true road"):
        blank = folder_of(towns.head(2), tmp_path / "blank", mask=0)
        judge_graphs(find_model(tmp_path / "model"), graph_samples(blank, gsd_m=1.), tmp_path / "no", cache=tmp_path / "cache")


# what does not fit

def test_models_and_images_that_do_not_fit_are_named(towns, tmp_path):
    arguments = dict(width=4, depth=2)
    save_model(tmp_path / "masks", build("unet", **arguments), "unet", arguments, gsd_m=1.)
    with pytest.raises(DataError, match=r"masks \(unet\) is a mask model.*nbs/evaluate.ipynb"): check_graph_model(find_model(tmp_path / "masks"))
    model = find_model(save(tmp_path / "model"))
    four = graph_samples(folder_of(towns.head(2), tmp_path / "four", bands=4), gsd_m=1.)
    with pytest.raises(DataError, match="2 of 2 images do not fit.*trained on 3 bands: town0.tif: 4 bands; town1.tif: 4 bands"): judge_graphs(model, four, tmp_path / "a")
    with pytest.raises(DataError, match="has no pixel size: give gsd_m"): judge_graphs(find_model(save(tmp_path / "sizeless", gsd_m=None)), towns, tmp_path / "b")
    with pytest.raises(DataError, match="none of the 5 images are in split valid"): judge_graphs(model, towns, tmp_path / "c", GraphHow("valid"))
    (tmp_path / "bare/images").mkdir(parents=True); shutil.copy(towns.image[0], tmp_path / "bare/images/a.tif")
    with pytest.raises(DataError, match="have no roads: a.tif"): graph_samples(tmp_path / "bare")
    assert not any((tmp_path / x).exists() for x in "abc")


def test_a_model_without_numbers_takes_the_published_ones_and_says_so(towns, tmp_path):
    model = find_model(save(tmp_path / "model", extra=dict(graph=dict(channels=28))))
    assert check_graph_model(model) == dict(thr=.05, edge_thr=.05, snap_px=15., angle_weight=100.)
    assert any("no thresholds of its own" in d for d in graphjudge.graph_doubts(towns.assign(seen=""), model, "tiles"))
    assert not graphjudge.graph_doubts(towns.assign(seen=""), find_model(save(tmp_path / "own")), "tiles")


# doors and records

def test_a_models_own_test_tiles_go_through_its_door_and_are_counted(towns, tmp_path):
    home = folder_of(towns, tmp_path / "tiles")
    samples = graph_samples(home, gsd_m=1.)
    divided = ensure_split(samples)
    run = RunFolder.create("train_sat2graph", dict(data=str(home), protocol="split", limit=0, data_gsd_m=1.), tmp_path / "runs", id="one")
    save(run.arm("tiny-seed2").path, data=str(home), split_hash=split_hash(divided)); run.release()
    model = find_model("one", tmp_path / "runs")
    found = judge_graphs(model, samples, tmp_path / "judged", data=str(home), cache=tmp_path / "cache")
    test = divided[divided.split == "test"]
    assert set(found.table.image) == {Path(i).stem for i in test.image} and found.counted_in == "run train_sat2graph/one" and not found.doubts
    (reading,) = json.loads((run.path / "test_read.json").read_text())["readings"]
    assert reading["rows"] == len(test) and reading["reader"] == "tiny-seed2" and reading["model"] == graph_hash(model.load(), NUMBERS)
    assert found.record()["is_result"] and found.record()["split_hash"] == split_hash(divided)
    again = judge_graphs(model, samples, tmp_path / "twice", GraphHow(limit=1), str(home), cache=tmp_path / "cache")
    assert len(json.loads((run.path / "test_read.json").read_text())["readings"][0]["again"]) == 1
    assert again.split_hash == image_hash(again.tiles) != found.split_hash or len(test) == 1
    everything = judge_graphs(model, samples, tmp_path / "all", GraphHow("all"), str(home), cache=tmp_path / "cache")
    assert any("were trained on" in d for d in everything.doubts) and not everything.record()["is_result"]


def test_tiles_learned_by_heart_are_known_again_elsewhere(towns, tmp_path):
    home = folder_of(towns, tmp_path / "tiles")
    run = RunFolder.create("train_sat2graph", dict(data=str(home), protocol="overfit", limit=2, tiles="town0,town1,town3", data_gsd_m=1.), tmp_path / "runs", id="heart")
    save(run.arm("tiny-seed0").path, data=str(home)); run.release()
    copies = tmp_path / "copies"; (copies / "images").mkdir(parents=True); (copies / "labels").mkdir()
    for k in range(5):
        shutil.copy(home / f"images/town{k}.tif", copies / f"images/c{k}.tif"); shutil.copy(home / f"labels/town{k}_roads.geojson", copies / f"labels/c{k}_roads.geojson")
    for place in (home, copies):
        seen, division = seen_by(graph_samples(place, gsd_m=1.), find_model("heart", tmp_path / "runs"), str(place))
        assert seen.seen.tolist() == ["train", "train", "", "", ""] and division is None


def test_the_record_is_understood_by_the_archive(towns, tmp_path):
    home = folder_of(towns.head(3), tmp_path / "tiles")
    run = RunFolder.create("evaluate_sat2graph", dict(data=str(home), windows="ours,published"), tmp_path / "runs", id="x")
    how = GraphHow(ways="ours,published", apls="spacenet", gsd_m=2.)
    found = judge_graphs(find_model(save(tmp_path / "model")), graph_samples(home, gsd_m=1.), run, how, str(home), cache=tmp_path / "cache")
    assert set(found.table.factor) == {.5} and "brought to it" in found.remarks()[0] and "trained at 1 m" in found.remarks()[1]
    assert {j.shape for j in found.tiles.values()} == {(64, 64)}
    run.finish(found.record())
    (entry,) = read_archive(tmp_path / "runs", tmp_path / "results")
    arms = entry.arms().set_index("arm")
    assert list(arms.index) == ["tiny", "tiny, published windows"] and (arms.reason == "").all() and arms.is_result.all()
    assert "apls" not in arms and arms[["topo_f1", "apls_spacenet"]].notna().all().all() and set(arms.split_hash) == {image_hash(f"town{k}" for k in range(3))}
    assert set(entry.counts()) == set(arms.index) and all(len(t) == 3 for t in entry.counts().values())
    assert str(tmp_path) not in (run.path / "metrics.json").read_text()
    assert set(found.differences()) == {("ours", "published")} and found.differences()["ours", "published"]["topo_f1"].scenes == 3


def test_graphs_lie_where_their_images_do_and_pictures_are_drawn(towns, tmp_path):
    oracle = Oracle(towns.head(4), tmp_path / "cache", forget=(2,))
    how, folder = GraphHow(ways="ours,published"), Folder(tmp_path / "run")
    table, apart = judge_tiles(oracle.tiles, oracle, NUMBERS, how, Scoring(), folder)
    model = find_model(save(tmp_path / "model"))
    found = graphjudge.GraphJudgement(model, "towns", how, 1., folder, table.assign(gsd_m=1., factor=1., seen=""), apart, NUMBERS, [], tiles={j.name: j for j in oracle.tiles})
    worst = found.of("ours").image[0]
    assert worst == oracle.tiles[2].name and found.of("ours").topo_f1[0] < .9 < found.of("ours").topo_f1[1]
    judged = found.tiles[worst]
    there = read_graph(folder / f"arms/ours/predictions/{worst}.geojson")
    info = graphways.raster_info(judged.source)
    back = there.to_crs(info.crs).to_pixels(info.transform)
    mine = found.graph(worst, "ours")
    assert back.length == pytest.approx(mine.length, rel=1e-3) and np.abs(np.sort(back.nodes, 0)[[0, -1]] - np.sort(mine.nodes, 0)[[0, -1]]).max() < .1
    for figure, panels in ((found.plot(), 0), (found.show(1), 3), (found.show(9), 4), (found.show_ways(), 2)):
        assert len([a for a in figure.axes if a.images]) == panels
        matplotlib.pyplot.close(figure)
    times = found.times()
    assert times["ours"]["windows_a_tile"] == 1 and times["published"]["times_as_long"] > 0
    assert found.agreement()["ours", "published"]["topo_between"] > .9
    lone = RoadGraph(np.zeros((0, 2)), np.zeros((0, 2), int))
    graphways.keep_graph(folder, judged, lone)        # nothing found is no file of lines
    assert not (folder / f"predictions/{worst}.geojson").exists() and len(RoadGraph.load(folder / f"predictions/{worst}.npz")) == 0
