"""Records and run folders: whole files, locks, resume, and what counts as a result."""
import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from aerial_nb.training import records, runs as runs_module
from aerial_nb.training.records import DiskFull, Folder, atomic, environment, git_state, plain, write_json
from aerial_nb.training.runs import RunFolder, RunLocked, flat, new_id, table


def python(code: str, *args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=60, **kwargs)


@pytest.fixture
def run(tmp_path):
    return RunFolder.create("train_spin", dict(epochs=3, size=128), tmp_path / "runs", id="one")


# ---- whole files or none

def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a" / "x.json"
    write_json(file, dict(n=1))
    for error in (ValueError, KeyboardInterrupt, OSError):
        with pytest.raises(error), atomic(file) as part:
            part.write_text("half")
            raise error
    assert json.loads(file.read_text()) == dict(n=1)
    assert [p.name for p in file.parent.iterdir()] == ["x.json"]


def test_a_write_that_wrote_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "x"): pass


def test_killed_in_the_middle_the_file_is_whole(tmp_path):
    file = tmp_path / "x.txt"
    code = ("import sys\nfrom aerial_nb.training.records import write_text\n"
            "while True:\n    for c in 'ab': write_text(sys.argv[1], c * 200_000)")
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", code, str(file)])
        until = time.monotonic() + 10
        while not file.exists() and time.monotonic() < until: time.sleep(0.01)
        time.sleep(0.05)
        writer.kill(); writer.wait()
        assert file.read_text() in ("a" * 200_000, "b" * 200_000)


def full_disk(folder: Path) -> list[str]:
    "A command prefix that runs with a 1 MB file system mounted on the folder; skips where that is not allowed."
    script = f"mount -t tmpfs -o size=1m tmpfs '{folder}' && exec \"$@\""
    prefix = ["unshare", "-rm", "sh", "-c", script, "sh"]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    return prefix


def test_a_full_disk_says_where_and_keeps_what_was_there(tmp_path):
    code = """
import json, os, sys
from aerial_nb.training.records import DiskFull
from aerial_nb.training.runs import RunFolder
base = sys.argv[1]
run = RunFolder.create("train", {}, base, id="one")
run.log(dict(epoch=0, loss=0.5))
with run.writing("checkpoint") as part: part.write_bytes(b"good")
messages = []
for name in ("checkpoint", "predictions/tile.tif"):
    try:
        with run.writing(name) as part: part.write_bytes(bytes(2_000_000))
    except DiskFull as error: messages.append(str(error))
try:
    with run.recording():
        with open(run / "filler", "wb", 0) as file:
            while True: file.write(bytes(4096))
except OSError: pass
print(json.dumps(dict(messages=messages, checkpoint=(run / "checkpoint").read_text(), rows=len(run.history), status=run.status,
                      parts=[p.name for p in run.path.rglob(".part*")])))
"""
    found = subprocess.run([*full_disk(tmp_path), sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    seen = json.loads(found.stdout)
    assert len(seen["messages"]) == 2
    assert all("no space left in" in m and "AERIAL_RUNS" in m and str(tmp_path) in m for m in seen["messages"])
    assert (seen["checkpoint"], seen["rows"], seen["parts"]) == ("good", 1, [])
    assert "could not be kept" in found.stderr and seen["status"] == "unfinished"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "x"), OSError(errno.EDQUOT, "x"),
                                   RuntimeError("I/O error: No space left on device (os error 28)")])
def test_every_way_to_say_full_is_understood(tmp_path, error):
    with pytest.raises(DiskFull, match="free some there"), atomic(tmp_path / "x"): raise error


def test_other_errors_pass(tmp_path):
    with pytest.raises(PermissionError), atomic(tmp_path / "x"): raise PermissionError("no")


# ---- plain values

scalars = st.none() | st.booleans() | st.integers() | st.text() | st.floats()


@given(st.recursive(scalars, lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text(max_size=5), s, max_size=4), max_leaves=12))
def test_plain_is_json_and_stays_the_same(value):
    once = plain(value)
    assert json.loads(json.dumps(once, allow_nan=False)) == once == plain(once)


def test_plain_unpacks_arrays_and_paths():
    value = dict(a=np.arange(3, dtype="uint8"), b=np.array(0.5), c=Path("x") / "y", d=np.float32("inf"), e={2, 1})
    assert plain(value) == dict(a=[0, 1, 2], b=0.5, c=os.path.join("x", "y"), d=None, e=[1, 2])
    with pytest.raises(TypeError, match="no plain value"): plain(lambda: 1)


# ---- history

@settings(max_examples=25, deadline=None)
@given(epochs=st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_a_repeated_epoch_replaces_itself_and_what_came_later(tmp_path_factory, epochs):
    folder = Folder(tmp_path_factory.mktemp("arm"))
    kept = []
    for step, epoch in enumerate(epochs):
        folder.log(dict(epoch=epoch, step=step))
        kept = [k for k in kept if k[0] < epoch] + [(epoch, step)]
    assert list(zip(folder.history.epoch, folder.history.step, strict=True)) == kept


def test_history_keeps_every_digit_and_late_columns(tmp_path):
    folder, loss = Folder(tmp_path), 0.1 + 0.2
    folder.log(dict(epoch=0, loss=loss)); folder.log(dict(epoch=1, loss=float("nan"), iou=np.float64(1 / 3), note="a,b"))
    history = folder.history
    assert history.loss[0] == loss and np.isnan(history.loss[1]) and np.isnan(history.iou[0]) and history.iou[1] == 1 / 3
    assert history.note[1] == "a,b"
    assert Folder(tmp_path / "none").history.empty


# ---- environment

@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"; folder.mkdir()
    def git(*args): subprocess.run(["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=b", *args], check=True, capture_output=True)
    git("init", "-q"); (folder / "code.py").write_text("1"); (folder / ".gitignore").write_text("runs/\n")
    git("add", "."); git("commit", "-qm", "x")
    return folder


def test_git_state_knows_changes_but_not_results_and_ignored(tree):
    assert git_state(tree)["dirty"] is False and len(git_state(tree)["commit"]) == 40
    for name in ("results/a/record.json", "runs/x.json"): write_json(tree / name, 1)
    assert git_state(tree)["dirty"] is False
    (tree / "new.py").write_text("2"); (tree / "code.py").write_text("3")
    assert git_state(tree)["changed"] == ["code.py", "new.py"] and git_state(tree)["dirty"]


def test_git_state_of_a_folder_that_is_not_the_trees(tree, tmp_path):
    inside = tree / "runs" / "site-packages"; inside.mkdir(parents=True); (inside / "package.py").write_text("")
    assert git_state(inside) == {} == git_state(tmp_path / "missing")


def test_environment_names_no_person_host_or_path(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "host-of-ann")
    text = json.dumps(environment("cpu"))
    for secret in ("host-of-ann", str(Path.home()), os.getcwd(), sys.prefix): assert secret not in text
    assert json.loads(text)["packages"]["torch"] and json.loads(text)["cores"] >= 1


def test_importing_loads_neither_torch_nor_pandas():
    seen = python("import sys, aerial_nb.training.runs; print([m for m in ('torch', 'pandas', 'matplotlib') if m in sys.modules])")
    assert seen.stdout.strip() == "[]", seen.stdout + seen.stderr


# ---- run folders

def test_no_run_is_overwritten(tmp_path, monkeypatch):
    ids = iter(["same", "same", "same", "other"])
    monkeypatch.setattr(runs_module, "new_id", lambda: next(ids))
    first, second = (RunFolder.create("t", dict(n=n), tmp_path) for n in (1, 2))
    assert (first.id, second.id, first.params["n"]) == ("same", "other", 1)
    with pytest.raises(FileExistsError, match="choose another id, or resume"): RunFolder.create("t", {}, tmp_path, id="same")


def test_ids_sort_by_time_and_differ():
    ids = [new_id() for _ in range(20)]
    assert len(set(ids)) == 20 and [i[:15] for i in ids] == sorted(i[:15] for i in ids)


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a b"])
def test_names_are_one_folder(tmp_path, name):
    with pytest.raises(ValueError, match="must be letters"): RunFolder.create(name, {}, tmp_path)
    with pytest.raises(ValueError, match="must be letters"): RunFolder(tmp_path).arm(name)


def test_a_run_is_finished_only_when_its_metrics_are_there(run, monkeypatch):
    assert run.status == "unfinished"
    real = records.os.replace
    def fails(a, b):
        if Path(b).name == "metrics.json": raise OSError(errno.ENOSPC, "full")
        real(a, b)
    with monkeypatch.context() as patch:
        patch.setattr(records.os, "replace", fails)
        with pytest.raises(DiskFull): run.finish(dict(iou=0.5))
    assert run.status == "unfinished" and run.metrics == {}
    assert run.finish(dict(iou=0.5)).status == "finished" and run.metrics["iou"] == 0.5


def test_an_error_is_kept_and_raised(run):
    with pytest.raises(ValueError, match="tile 7"), run.recording(): raise ValueError("NaN at tile 7")
    assert run.status == "failed" and run.error["error"] == "ValueError" and "tile 7" in run.error["traceback"][-1]
    with pytest.raises(KeyboardInterrupt), run.recording(): raise KeyboardInterrupt
    assert run.status == "unfinished"


def test_wall_time_counts_all_sessions(run, monkeypatch):
    clock = [0.]
    monkeypatch.setattr(runs_module.time, "monotonic", lambda: clock[0])
    first = RunFolder(run.path); clock[0] = 10; first.arm("a").log(dict(epoch=0)); clock[0] = 99  # died after the first row
    second = RunFolder(run.path); clock[0] += 5
    assert second.finish({}).metrics["wall_s"] == 15


# ---- locks

HOLD = ("import sys, time\nfrom aerial_nb.training.runs import RunFolder\n"
        "RunFolder(sys.argv[1]).acquire(); print('held', flush=True); time.sleep(60)")


def test_a_live_process_keeps_others_out_and_a_killed_one_does_not(run):
    run.release()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunLocked, match=f"process {holder.pid}"): run.acquire()
        with pytest.raises(RunLocked): RunFolder.current("train_spin", run.params, resume=run.path)
        (run.path / ".part-0-left").write_text("")
    finally: holder.kill()
    time.sleep(0.1)                                           # dead and not yet waited for: a zombie
    assert run.acquire() and not list(run.path.glob(".part*"))
    holder.wait(); holder.stdout.close()


def test_a_number_used_again_is_another_process(run):
    lock = run.path / ".lock"
    mine = json.loads(lock.read_text())
    parent = runs_module._process(os.getppid())
    lock.write_text(json.dumps(parent))
    with pytest.raises(RunLocked): run.acquire()
    lock.write_text(json.dumps(parent | dict(start=1)))
    assert run.acquire() and json.loads(lock.read_text()) == mine
    lock.write_text(json.dumps(dict(pid=1, start=1, machine="another")))
    with pytest.raises(RunLocked, match="another machine"): run.acquire()
    lock.write_text('{"pid": 12')
    assert run.acquire()


def test_the_launcher_hands_its_lock_on(run, monkeypatch):
    (run.path / ".lock").write_text(json.dumps(runs_module._process(os.getppid())))
    monkeypatch.setenv("AERIAL_RUN_OWNER", str(os.getppid()))
    assert run.acquire() and json.loads((run.path / ".lock").read_text())["pid"] == os.getpid()


def test_one_of_many_takes_a_stale_lock(run):
    (run.path / ".lock").write_text(json.dumps(runs_module._process(os.getpid()) | dict(start=1)))
    code = HOLD.replace("time.sleep(60)", "sys.stdin.read()")
    many = [subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, text=True) for _ in range(5)]
    winners = [p.stdout.readline() for p in many]             # a loser ends with RunLocked, a winner waits
    for p in many: p.communicate("")
    assert winners.count("held\n") == 1


# ---- opening, resuming

def test_a_run_is_found_by_path_and_by_name(run, tmp_path):
    base = tmp_path / "runs"
    two = RunFolder.create("train_unet", {}, base, id="once")
    for name in (run.path, "train_spin/one", "one"): assert RunFolder.open(name, base).path.samefile(run.path)
    assert RunFolder.open("onc", base).id == two.id and RunFolder.open("train_spin/on", base).id == "one"
    with pytest.raises(ValueError, match="give more of the id"): RunFolder.open("on", base)
    with pytest.raises(FileNotFoundError, match="train_spin/one"): RunFolder.open("nothing", base)
    with pytest.raises(FileNotFoundError, match="none was made yet"): RunFolder.open("one", tmp_path / "elsewhere")


def test_resume_wants_the_same_experiment_and_parameters(run):
    run.release()
    params = dict(epochs=3, size=128)
    with pytest.raises(ValueError, match="epochs: 3 then, 9 now"): RunFolder.current("train_spin", params | dict(epochs=9), run.path)
    with pytest.raises(ValueError, match="is no run of"): RunFolder.current("train_unet", params, run.path)
    again = RunFolder.current("train_spin", params | dict(resume="one", device="cpu"), run.path)
    assert again.params == params and len(again.env["sessions"]) == 1
    again.finish({})
    with pytest.raises(ValueError, match="is finished"): RunFolder.current("train_spin", params, run.path)


def test_current_takes_the_launchers_folder(run, monkeypatch, tmp_path):
    monkeypatch.setenv("AERIAL_RUN_DIR", str(run.path))
    found = RunFolder.current("train_spin", dict(epochs=5), runs=tmp_path / "elsewhere")
    assert found.path.samefile(run.path) and run.params == dict(epochs=5) and not (tmp_path / "elsewhere").exists()
    run.finish({})
    with pytest.raises(ValueError, match="for a second one"): RunFolder.current("train_spin", {})


# ---- what is shown

def test_only_finished_runs_have_results(run, tmp_path, caplog):
    base = tmp_path / "runs"
    write_json(run.path / "metrics.json", dict(iou=0.9))      # metrics of somebody who did not finish
    done = RunFolder.create("train_spin", {}, base, id="two").finish(dict(iou=0.5, arms=dict(spin=dict(f1=0.7)), curve=[1, 2]))
    damaged = RunFolder.create("train_spin", {}, base, id="zero")
    (damaged.path / "metrics.json").write_text("{"); (damaged.path / "env.json").write_text("{")
    rows = table(base).set_index("id")
    assert rows.status.to_dict() == dict(one="unfinished", two="finished", zero="unfinished")
    assert rows.iou.isna().to_dict() == dict(one=True, two=False, zero=True)
    assert rows.loc["two", "arms.spin.f1"] == 0.7 and "curve" not in rows and "damaged" in caplog.text
    assert table(tmp_path / "none").empty and isinstance(table(tmp_path / "none"), pd.DataFrame)
    assert "0.9" not in run._repr_html_() and "0.5" in done._repr_html_()


def test_html_is_escaped(tmp_path):
    run = RunFolder.create("t", dict(data="<script>x</script>"), tmp_path)
    run.fail("ValueError", "<b>")
    assert "<script>" not in run._repr_html_() and "&lt;b&gt;" in run._repr_html_()


@given(st.dictionaries(st.text("ab", min_size=1, max_size=2), st.integers() | st.dictionaries(st.text("cd", min_size=1), st.integers())))
def test_flat_keeps_every_number(values):
    total = sum(v if isinstance(v, int) else sum(v.values()) for v in values.values())
    assert sum(flat(values).values()) == total


def test_figures_are_pictures(run):
    plt = pytest.importorskip("matplotlib.pyplot")
    figure, ax = plt.subplots(figsize=(1, 1)); ax.plot([1, 2])
    file = run.figure(figure, "curve.png"); plt.close(figure)
    assert file.read_bytes()[:4] == b"\x89PNG" and file.name == "curve.png" and [p.name for p in file.parent.iterdir()] == ["curve.png"]
