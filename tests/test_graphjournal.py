"An interrupted road graph goes on with the same bytes; one writer; the published decoder; the options of refining."
import errno
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rasterio.transform import from_origin

from aerial_nb.data.raster import DataError, read_pixels, write_raster
from aerial_nb.data.synthetic import scene
from aerial_nb.models.zoo import build
from aerial_nb.roads.graph import RoadGraph
from aerial_nb.roads.gte import decode, encode
from aerial_nb.scenes import graphjournal, graphrules
from aerial_nb.scenes.eyes import Eye, Look
from aerial_nb.scenes.graphjournal import open_journal
from aerial_nb.scenes.graphmap import GraphRules, aerial_roadgraph, predict_graph
from aerial_nb.scenes.graphparts import Vertices
from aerial_nb.scenes.graphwindows import predict_tensor
from aerial_nb.training.records import DiskFull
from aerial_nb.training.saved import ModelCard, save_model

PLACE = dict(crs="EPSG:32633", transform=from_origin(5e5, 5e6, 1., 1.))
PROBS = [0, *range(2, 26, 4), 26]
CARD = ModelCard("none", gsd_m=1., mean=(127.5,) * 3, std=(255.,) * 3, extra=dict(graph=dict(thr=.1, edge_thr=.1, channels=28)))
FILL = (255,) * 3
SIDE, LOOK = 240, Look(size=96, overlap=32, batch=3, fill=FILL)
MANY = dict(panel_px=90, progress=False)      # three panels of four strips


@cache
def tensor():
    town = scene(SIDE, seed=1, gsd_m=1.).graph.simplify(.5).merge_close(4.).densify(20.)
    out = encode(RoadGraph(town.nodes, town.edges), (SIDE, SIDE), road=True)
    out += np.random.default_rng(0).normal(0, .02, out.shape).astype(np.float32)
    out[PROBS] = .9 * out[PROBS].clip(0, 1)
    return out


def look_up(pixels, valid):
    return np.stack([tensor()[:, p[0].astype(int).clip(0, SIDE - 1), p[1].astype(int).clip(0, SIDE - 1)] * known for p, known in zip(pixels, valid)])


def dying(after, error=KeyboardInterrupt):
    "A model function that raises at a batch."
    calls = []
    def answer(pixels, valid):
        calls.append(len(valid))
        if len(calls) > after: raise error
        return look_up(pixels, valid)
    return Eye("places", CARD, "1", lambda device: answer)


EYE = Eye("places", CARD, "1", lambda device: look_up)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    r, c = np.mgrid[:SIDE, :SIDE]
    pixels = np.stack([r, c, r * 0 + 7]).astype("uint8")
    pixels[:, 150:, 200:] = 255     # a corner without data
    return write_raster(tmp_path_factory.mktemp("image") / "scene.tif", pixels, **PLACE)


@cache
def straight(image): return content(predict_graph(image, EYE, LOOK, **MANY))


def content(made):
    return [x.tobytes() for x in (made.graph.nodes, made.graph.edges, made.edge_confidence, made.edge_length_m)] + [made.lines.geometry.to_wkb().tolist(), made.lines.confidence.tolist(), made.damaged]


# going on

@pytest.mark.parametrize("after", [0, 1, 3, 4, 7, 9])
def test_killed_at_any_batch_the_result_is_the_same(tmp_path, image, after, caplog):
    with open_journal(tmp_path / "a.json") as journal, pytest.raises(KeyboardInterrupt):
        predict_graph(image, dying(after), LOOK, journal=journal, **MANY)
    kept = len(journal.strips)
    assert journal.folder.exists() == bool(kept) and (kept > 0 or after < 3)
    calls = []
    def counted(pixels, valid): calls.append(len(valid)); return look_up(pixels, valid)
    with open_journal(tmp_path / "a.json") as journal, caplog.at_level(logging.INFO):
        made = predict_graph(image, Eye("places", CARD, "1", lambda device: counted), LOOK, journal=journal, **MANY)
        journal.remove()
    assert content(made) == straight(image) and ("finished before" in caplog.text) == bool(kept)
    assert not list(tmp_path.iterdir())
    whole = []
    def all_of(pixels, valid): whole.append(len(valid)); return look_up(pixels, valid)
    predict_graph(image, Eye("places", CARD, "1", lambda device: all_of), LOOK, **MANY)
    assert sum(calls) < sum(whole) or after < 4     # a strip shares its last windows with the next one


@settings(deadline=None, max_examples=4, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.sampled_from(["ramp", "published-test"]), st.sampled_from([(96, 32), (96, 64), (128, 32)]), st.integers(1, 5), st.integers(0, 8), st.sampled_from([90, 999]))
def test_any_windows_go_on(tmp_path_factory, image, blend, sides, batch, after, panel_px):
    out, look = tmp_path_factory.mktemp("any") / "a.json", Look(size=sides[0], overlap=sides[1], batch=batch, fill=FILL)
    rules = dict(blend=blend, panel_px=panel_px, progress=False)
    with open_journal(out) as journal:
        try: predict_graph(image, dying(after), look, journal=journal, **rules)
        except KeyboardInterrupt: pass
    with open_journal(out) as journal: made = predict_graph(image, EYE, look, journal=journal, **rules)
    assert content(made) == content(predict_graph(image, EYE, look, **rules))


def test_all_strips_are_there_and_only_the_output_is_missing(tmp_path, image):
    "Rules that change nothing about vertices may differ; the network is not asked again."
    out = tmp_path / "a.json"
    with open_journal(out) as journal: predict_graph(image, EYE, LOOK, journal=journal, **MANY)
    with open_journal(out) as journal: made = predict_graph(image, dying(0), LOOK, journal=journal, simplify_m=2., snap_px=10., **MANY)
    assert content(made) == content(predict_graph(image, EYE, LOOK, simplify_m=2., snap_px=10., **MANY))


def test_another_job_is_refused_or_dropped(tmp_path, image, caplog):
    out = tmp_path / "a.json"
    def begin():
        with open_journal(out) as journal, pytest.raises(KeyboardInterrupt): predict_graph(image, dying(5), LOOK, journal=journal, **MANY)
    begin()
    other = Eye("places", CARD, "2", lambda device: look_up)
    for eye, look, rules, said in ((other, LOOK, {}, "model: 1, now 2"), (EYE, Look(size=128, overlap=32, fill=FILL), {}, "look"), (EYE, LOOK, dict(thr=.3), "rules"),
                                   (EYE, LOOK, dict(blend="published-test"), "rules"), (EYE, LOOK, dict(decoder="published"), "rules")):
        with pytest.raises(DataError, match=f"unfinished vertices of another job(?s:.*){said}(?s:.*)overwrite"), open_journal(out) as journal:
            predict_graph(image, eye, look, journal=journal, **(MANY | rules))
    stat = os.stat(image)
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    try:
        with pytest.raises(DataError, match="bytes"), open_journal(out) as journal: predict_graph(image, EYE, LOOK, journal=journal, **MANY)
    finally: os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with open_journal(out, overwrite=True) as journal, caplog.at_level(logging.INFO):
        predict_graph(image, EYE, LOOK, thr=.3, journal=journal, **MANY)
    assert "are dropped" in caplog.text and "finished before" not in caplog.text


@pytest.mark.parametrize("harm", ["cut line", "no line", "bytes lost", "byte turned", "no vertices"])
def test_what_is_half_written_does_not_count(tmp_path, image, caplog, harm):
    out = tmp_path / "a.json"
    with open_journal(out) as journal, pytest.raises(KeyboardInterrupt): predict_graph(image, dying(7), LOOK, journal=journal, **MANY)
    kept, vertices, lines = len(journal.strips), journal.vertices, journal.journal
    content_of, said = vertices.read_bytes(), lines.read_bytes()
    if harm == "cut line": lines.write_bytes(said[:-9])
    if harm == "no line": lines.write_bytes(said[:said[:-1].rindex(b"\n") + 1])
    if harm == "bytes lost": vertices.write_bytes(content_of[:-200])
    if harm == "byte turned": vertices.write_bytes(content_of[:20] + bytes([content_of[20] ^ 1]) + content_of[21:])
    if harm == "no vertices": vertices.unlink()
    with open_journal(out) as journal: made = predict_graph(image, EYE, LOOK, journal=journal, **MANY)
    assert content(made) == straight(image) and kept > 2
    assert ("is damaged" in caplog.text) == (harm in ("bytes lost", "byte turned"))


def test_a_full_disk_keeps_what_is_there(tmp_path, image, monkeypatch):
    out, on_disk, calls = tmp_path / "a.json", graphjournal._on_disk, []
    def full(path, what):
        calls.append(path)
        if len(calls) > 5: on_disk(path, bytes(what)[:7]); raise OSError(errno.ENOSPC, "No space left on device")
        on_disk(path, what)
    monkeypatch.setattr(graphjournal, "_on_disk", full)
    with pytest.raises(DiskFull, match="2 strips are kept in a.json.part.*repeat"), open_journal(out) as journal:
        predict_graph(image, EYE, LOOK, journal=journal, **MANY)
    monkeypatch.undo()
    with open_journal(out) as journal:
        assert content(predict_graph(image, EYE, LOOK, journal=journal, **MANY)) == straight(image)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(0, 30))
def test_vertices_come_back_to_the_bit(seed, n):
    rng = np.random.default_rng(seed)
    some = Vertices(rng.integers(0, 2**40, (n, 2)), rng.random(n), rng.random((n, 6)), rng.normal(0, 1e9, (n, 6, 2)))
    back = graphjournal._as_vertices(graphjournal._as_bytes(some))
    for name in ("at", "v", "e", "vec"): assert getattr(some, name).tobytes() == getattr(back, name).tobytes() and getattr(some, name).shape == getattr(back, name).shape


# the command, killed, and twice

def model(folder, width=1):
    torch.manual_seed(0)
    net = build("sat2graph", width=width, bands=3)
    with torch.no_grad(): list(net.parameters())[-1][4:26] += torch.tensor([.5, .3, 0., 0.] * 6)[:22]     # edges that lead somewhere
    save_model(folder, net, "sat2graph", dict(width=width, bands=3), stats=((127.5,) * 3, (255.,) * 3), gsd_m=1.,
               classes=("road",), extra=dict(graph=dict(thr=.1, edge_thr=.01, channels=28)))
    return folder


SLOW = """
import sys, time
import aerial_nb.scenes.graphjournal as j
add = j.GraphJournal.add
def slow(self, *a, **k):
    add(self, *a, **k)
    if len(self.strips) == 2: print("two", flush=True); time.sleep(60)
j.GraphJournal.add = slow
from aerial_nb.scenes.graphmap import aerial_roadgraph
aerial_roadgraph(*sys.argv[1:4], size=96, overlap=32, part_px=0, spur_px=0, device="cpu")
"""


def run(*arguments, **options):
    with pytest.raises(SystemExit) as stop: aerial_roadgraph(*map(str, arguments), **dict(device="cpu", size=96, overlap=32, part_px=0, spur_px=0) | options)
    return stop.value.code


def test_a_command_is_killed_and_repeated(tmp_path, caplog):
    "A network, SIGKILL in the middle, a second command meanwhile, and the same bytes in the end."
    pixels = np.random.default_rng(0).integers(1, 255, (3, 260, 100), dtype=np.uint8)
    image, saved, out = write_raster(tmp_path / "p.tif", pixels, **PLACE), model(tmp_path / "model"), tmp_path / "roads.json"
    child = subprocess.Popen([sys.executable, "-c", SLOW, str(image), str(saved), str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                             cwd=Path(__file__).parents[1])
    try:
        assert child.stdout.readline() == b"two\n"
        assert run(image, saved, out) == 2 and "another command is writing this output" in caplog.text
    finally: os.kill(child.pid, signal.SIGKILL); child.wait(); child.stdout.close()
    assert not out.exists() and (tmp_path / "roads.json.part" / "journal.jsonl").exists()
    with caplog.at_level(logging.INFO):
        assert run(image, saved, out, thr=.2) == 2 and "unfinished vertices of another job" in caplog.text
        assert run(image, saved, out) == 0 and "finished before" in caplog.text
    assert run(image, saved, tmp_path / "straight.json") == 0
    assert out.read_bytes() == (tmp_path / "straight.json").read_bytes() and json.loads(out.read_text())[1]
    assert not list(tmp_path.glob("*.part")) and run(image, saved, out) == 2 and not list(tmp_path.glob("*.part"))


def test_an_interrupt_says_how_to_go_on(tmp_path, image, monkeypatch, caplog):
    from aerial_nb.scenes import graphmap
    monkeypatch.setattr(graphmap, "write_roadgraph", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(image, model(tmp_path / "model"), tmp_path / "a.json", thr=.99) == 130 and "repeat the command to go on" in caplog.text
    assert (tmp_path / "a.json.part").exists()


def _hold(out, ready, leave):
    with open_journal(out): ready.set(); leave.wait(20)


def test_two_writers(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "a.json", ready, leave))
    other.start(); assert ready.wait(20)
    try:
        with pytest.raises(DataError, match="another command is writing"), open_journal(tmp_path / "a.json"): pass
    finally: leave.set(); other.join()
    with open_journal(tmp_path / "a.json"): pass
    (tmp_path / "a.json").write_text("kept")
    with pytest.raises(DataError, match="exists"), open_journal(tmp_path / "a.json"): pass
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write there"), open_journal(tmp_path / "file" / "a.json"): pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "file"]


# the published decoder

@settings(deadline=None, max_examples=6)
@given(st.sampled_from(["ramp", "published", "published-test"]), st.sampled_from([.05, .2]), st.sampled_from([50., 100.]), st.sampled_from([{}, dict(part_px=60., spur_px=10.)]))
def test_the_published_decoder_is_the_published_decoder(image, blend, thr, weight, refining):
    look = Look(size=96, overlap=32, fill=FILL) if blend == "ramp" else Look(fill=FILL)
    made = predict_graph(image, EYE, look, decoder="published", blend=blend, thr=thr, edge_thr=.05, angle_weight=weight, progress=False, **refining)
    sheet = read_pixels(image, fill=FILL)
    size = (96, 64) if blend == "ramp" else (None, None)
    want = decode(predict_tensor(sheet.data, sheet.valid, look_up, *size, blend=blend), thr, .05, 15., weight, published=True, **refining)
    assert np.allclose(made.pixels.nodes, want.nodes, atol=1e-6, rtol=0) and np.array_equal(made.graph.edges, want.edges) and len(want)
    assert ((made.edge_confidence > 0) & (made.edge_confidence <= 1)).all()


def test_the_published_decoder_has_a_limit(tmp_path, image, monkeypatch, caplog):
    from aerial_nb.scenes import graphmap
    monkeypatch.setattr(graphmap, "PUBLISHED_PX", SIDE * SIDE - 1)
    with pytest.raises(DataError, match=r"240 x 240 pixels are too many for decoder='published'(?s:.*)decoder='cured'"):
        predict_graph(image, dying(0), LOOK, decoder="published", progress=False)
    assert graphrules.PUBLISHED_PX == 4096**2
    monkeypatch.undo()
    assert run(image, model(tmp_path / "model"), tmp_path / "a.json", decoder="published", thr=.9, edge_thr=.9) == 0 and not list(tmp_path.glob("*.part"))
    assert run(image, tmp_path / "model", tmp_path / "b.json", decoder="best") == 2 and "cured, published" in caplog.text


def test_an_image_without_data_has_no_published_roads(tmp_path, caplog):
    blank = write_raster(tmp_path / "blank.tif", np.full((3, 90, 80), 255, np.uint8), **PLACE)
    made = predict_graph(blank, EYE, Look(size=96, overlap=32, fill=(255,) * 3), decoder="published", progress=False)
    assert len(made) == 0 and "no valid pixel" in caplog.text


# refining

def test_what_is_refined_is_asked_for(tmp_path, image, caplog, monkeypatch):
    length = {name: predict_graph(image, EYE, LOOK, progress=False, **rules).pixels.length for name, rules in dict(
        usual={}, same=dict(part_px=200., spur_px=50.), all=dict(part_px=0., spur_px=0.), hard=dict(part_px=1e5, spur_px=200., sure=1.), saved=dict(part_px=1e5, spur_px=200., sure=0.)).items()}
    assert length["usual"] == length["same"] and length["hard"] < length["usual"] <= length["all"] + 1e-6
    assert np.isclose(length["saved"], length["all"])
    for rules, said in ((dict(sure=1.5), "sure is a probability"), (dict(part_px=-2), "part_px is 0 or more"), (dict(decoder="published", sure=.2), "leave sure out")):
        with pytest.raises(DataError, match=said): GraphRules(**rules)
    saved = model(tmp_path / "model")
    assert run(image, saved, tmp_path / "a.json", sure=2.) == 2 and "sure is a probability" in caplog.text
    from aerial_nb.scenes import graphmap
    asked = []
    def take(*arguments, **rest): asked.append(arguments[3]); raise DataError("enough")
    monkeypatch.setattr(graphmap, "predict_graph", take)
    assert run(image, saved, tmp_path / "a.json", part_px=30, spur_px=-1, sure=.3) == 2 == run(image, saved, tmp_path / "a.json", decoder="published", part_px=-1)
    assert asked == [GraphRules(part_px=30, sure=.3), GraphRules(decoder="published", spur_px=0)]
