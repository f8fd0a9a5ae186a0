"""aerial_launch: two processes take the steps of one with twice the batch, and nothing hangs or is left behind."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from aerial_nb.data.catalog import synthetic_samples
from aerial_nb.data.loaders import CropDataset, Stats, loaders
from aerial_nb.data.tiles import TileStore, draw_crops
from aerial_nb.training.distributed import _checked, _fault, _parser, aerial_launch, script_of
from aerial_nb.training.parameters import ParameterError
from aerial_nb.training.runs import RunFolder
from aerial_nb.training.together import SharedNorm, part_of, shared_norms, shares

DEFAULTS = "data = ''\nepochs = 2\nbs = 2\ndie = False\nresume = ''"
WORK = """
import os, signal, sys, torch
import pandas as pd
from pathlib import Path
from aerial_nb.data.loaders import crop_loaders
from aerial_nb.data.tiles import TileStore
from aerial_nb.models.zoo import build
from aerial_nb.training.learner import Recipe, fit, learner_for
from aerial_nb.training.runs import RunFolder
from fastai.callback.core import Callback
%matplotlib inline
if "google.colab" in sys.modules:
    %pip install -q aerial_nb
run = RunFolder.current("train_small", dict(data=data, epochs=epochs, bs=bs, die=die, resume=resume), resume, may_change=("resume", "die"))
store = TileStore(pd.read_csv(data), cache=Path(data).parent / "cache", progress=False)

def trained(folder, epochs, frozen=False, **recipe):
    torch.manual_seed(0)
    model = build("hourglass", width=8, blocks=1, tasks="road")
    if frozen:
        for layer in model.modules():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm): layer.eval(); layer.train = lambda mode=True, m=layer: m
    recipe = Recipe(epochs, lr=2e-3, **recipe)
    learn = learner_for(model, crop_loaders(store, store, 32, bs, 8, 2), recipe, folder, checkpoint_s=0, quiet=True, cbs=(Mark(),) if die else ())
    return fit(learn, recipe)

class Mark(Callback):
    "Says in which epoch the training is, and waits there."
    looks_on, order = True, 99
    def after_epoch(self):
        import time
        (run / "mark").write_text("1"); time.sleep(60)
"""
TRAIN = "found = trained(run, epochs, loss='soft_iou')\n"
MORE = ("trained(run.arm('frozen'), 2, frozen=True, loss='soft_iou')\n"
        "trained(run.arm('usual'), 2, loss='ce_dice', accum=2, schedule='plateau', plateau=0, patience=1, ema=.5)\n")
END = "run.finish(found | dict(processes=os.getpid()))"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    synthetic_samples(folder, n=2, size=96, gsd_m=1, progress=False).to_csv(folder / "samples.csv", index=False)
    return folder / "samples.csv"


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    cells = [nbformat.v4.new_code_cell(DEFAULTS, metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell(WORK),
             nbformat.v4.new_code_cell(TRAIN), nbformat.v4.new_code_cell("if not die:\n    " + MORE.replace("\n", "\n    ").strip()),
             nbformat.v4.new_code_cell(END)]
    path = tmp_path_factory.mktemp("notebook") / "train_small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def launched(notebook, base, *words) -> subprocess.Popen:
    "aerial_launch in a process of its own, which hears Ctrl-C although it is in the background."
    code = ("import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from aerial_nb.training.distributed import aerial_launch; sys.exit(aerial_launch())")
    words = [sys.executable, "-c", code, str(notebook), "--runs", str(base), *map(str, words)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))


def players(run: Path) -> list[int]:
    "Processes that still work on a run."
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try: words = file.read_bytes().split(b"\0")
        except OSError: continue
        if b"aerial_nb.training.distributed" in words and any(str(run).encode() in w for w in words): found.append(int(file.parent.name))
    return found


def the_run(base) -> RunFolder:
    (found,) = Path(base).glob("train_small/*")
    return RunFolder(found)


# ---- the same training

def test_two_processes_learn_what_one_with_twice_the_batch_learns(notebook, data, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    work = [launched(notebook, two, "--nproc", 2, "-p", "data", data, "-p", "bs", 2),
            launched(notebook, one, "--nproc", 1, "-p", "data", data, "-p", "bs", 4)]
    for process in work:
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said
        assert "finished after" in said
    a, b = the_run(two), the_run(one)
    assert a.status == b.status == "finished" and (a / "train_small.py").is_file()
    for name, tolerance in (("frozen", 1e-5), ("usual", .05)):    # Dice of the pieces, weights per process: noise
        ours, theirs = (r.arm(name).history for r in (a, b))
        assert len(ours) == len(theirs) > 0
        assert (ours.train_loss - theirs.train_loss).abs().max() < tolerance, name
    assert (a.history.train_loss - b.history.train_loss).abs().max() < 1e-4    # usual batch norms, counted over both
    assert (a.history.valid_loss - b.history.valid_loss).abs().max() < 1e-3
    assert a.history.train_loss.iloc[0] != a.history.train_loss.iloc[1]
    assert not players(a.path) and not players(b.path)


def begun(notebook, data, base) -> subprocess.Popen:
    "A training of two processes that has an epoch behind it."
    process = launched(notebook, base, "--nproc", 2, "-p", "data", data, "-p", "die", True)
    until = time.monotonic() + 200
    while not list(base.glob("*/*/mark")) and time.monotonic() < until:
        time.sleep(.1)
        assert process.poll() is None, process.stderr.read()
    assert len(players(the_run(base).path)) == 2
    return process


@pytest.mark.slow
def test_a_process_that_dies_ends_all(notebook, data, tmp_path):
    process, run = begun(notebook, data, tmp_path), the_run(tmp_path)
    os.kill(max(players(run.path)), signal.SIGKILL)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 138 and "died of SIGKILL: most often the memory was used up" in said and run.status == "failed"
    assert f"continue it with: aerial_launch {notebook} --nproc 2 -p resume train_small/{run.id}" in said and not players(run.path)


@pytest.mark.slow
def test_ctrl_c_ends_all_and_resume_goes_on(notebook, data, tmp_path):
    process, run = begun(notebook, data, tmp_path), the_run(tmp_path)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=100)
    assert process.returncode == 130 and run.status == "unfinished" and not players(run.path)
    again = launched(notebook, tmp_path, "--nproc", 2, "-p", "resume", run.id, "-p", "die", False)
    said = again.communicate(timeout=200)[1]
    assert again.returncode == 0, said
    assert run.metrics["resumed_after"] == 1 and run.history.epoch.tolist() == [1, 2]


# ---- what is refused

@pytest.mark.parametrize("words, match", [
    (["-p", "epoch", "3"], "did you mean 'epochs'"), (["-p", "epochs", "many"], "whole number"), (["--nproc", "-1"], "--nproc of 1 or more"),
    (["--machines", "2"], "need --address"), (["--machines", "2", "--rank", "2"], "--rank below"), (["-p", "resume", "gone"], "no run 'gone'")])
def test_what_cannot_start_gives_2_and_leaves_nothing(notebook, tmp_path, capsys, words, match):
    assert aerial_launch([str(notebook), "--runs", str(tmp_path / "runs"), *words]) == 2
    assert match in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = _parser().parse_args(["n.ipynb", "--nproc", "4"])
    with pytest.raises(ParameterError, match="this machine has 2 GPUs"): _checked(args, {})
    assert _checked(args, dict(device="cpu")) == 4 and _checked(_parser().parse_args(["n.ipynb"]), {}) == 2


def test_a_notebook_that_is_no_script_is_refused(tmp_path):
    cells = [nbformat.v4.new_code_cell("a = 1", metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell("b = (1,\nfiles = !ls")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "x.ipynb")
    with pytest.raises(ParameterError, match="is no Python script: line"): script_of(tmp_path / "x.ipynb", {})


def test_the_first_fault_counts_and_a_lost_neighbour_does_not(tmp_path):
    note = '{"kind": "%s", "message": "m", "lines": [], "lost": %s}'
    (tmp_path / "error0.json").write_text(note % ("RuntimeError", "true"))
    assert _fault({0: 1, 1: -9}, tmp_path)[0] == "ProcessDied"
    (tmp_path / "error1.json").write_text(note % ("DataError", "false"))
    assert _fault({0: 1, 1: 1}, tmp_path)[0] == "DataError"


# ---- pieces

@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_pieces_are_the_plan_in_its_order(n, bs, world, drop):
    last = n % (bs * world)
    if not drop and 0 < last < world:
        with pytest.raises(ValueError, match="fewer than processes"): shares(n, bs, world, drop)
        return
    pieces = shares(n, bs, world, drop)
    flat = [i for batch in pieces for piece in batch for i in piece]
    assert flat == list(range(n - last if drop else n))
    assert all(1 <= len(piece) <= bs and max(map(len, batch)) - min(map(len, batch)) <= 1 for batch in pieces for piece in batch)
    assert all(len(piece) == bs for batch in pieces[:n // (bs * world)] for piece in batch)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.booleans())
def test_parts_of_a_loader_make_its_batches(world, bs, workers, drawn):
    store = STORE[0]
    plan = (lambda epoch: draw_crops(store, world * bs * 3 + world, 16, 0, epoch)) if drawn else draw_crops(store, world * bs * 3 + world, 16, 0, 0)
    crops, stats = CropDataset(store, plan, 16), Stats((100,) * 3, (50,) * 3)
    whole = list(loaders(crops, crops, bs * world, stats).train)
    parts = [part_of(loaders(crops, crops, bs, stats, workers if world == 1 else 0).train, r, world) for r in range(world)]
    assert {len(p) for p in parts} == {len(whole)}
    for k, batch in enumerate(zip(*parts, strict=True)):
        assert torch.equal(torch.cat([x for x, _ in batch]), whole[k][0]) and torch.equal(torch.cat([y for _, y in batch]), whole[k][1])
        assert sum(p.weight(k) for p in parts) == pytest.approx(world)


STORE = []

@pytest.fixture(scope="module", autouse=True)
def store(data):
    STORE[:] = [TileStore(pd.read_csv(data), cache=data.parent / "cache", progress=False)]


# ---- norms

@pytest.mark.parametrize("momentum", [.1, None])
def test_a_shared_norm_alone_is_a_batch_norm(momentum, monkeypatch):
    monkeypatch.setattr("aerial_nb.training.together._summed", lambda x: x.clone())
    torch.manual_seed(0)
    usual, x = nn.BatchNorm2d(3, momentum=momentum), (torch.randn(4, 3, 5, 6) * 3 + 50).requires_grad_()
    shared = nn.BatchNorm2d(3, momentum=momentum)
    with shared_norms(nn.Sequential(shared)):
        assert type(shared) is SharedNorm
        a = shared(x); (ga,) = torch.autograd.grad((a ** 3).sum(), x)
    assert type(shared) is nn.BatchNorm2d and "process_group" not in vars(shared)
    b = usual(x); (gb,) = torch.autograd.grad((b ** 3).sum(), x)
    assert torch.allclose(a, b, atol=1e-4) and torch.allclose(ga, gb, atol=1e-3)
    for name, value in usual.state_dict().items(): assert torch.allclose(value.float(), shared.state_dict()[name].float(), rtol=1e-4), name
    with shared_norms(nn.Sequential(shared.eval())): out = shared(x)
    assert torch.equal(out, shared(x))
