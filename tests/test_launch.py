"""Parameters, aerial_run and aerial_publish: nothing wrong starts, exit codes say what happened, records are results."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import numpy as np
import pytest
from hypothesis import given, strategies as st
from papermill.cli import _resolve_type

from aerial_nb.training.launch import Watch, _pairs, aerial_run, plan_run
from aerial_nb.training.parameters import ParameterError, check_parameters, notebook_parameters, typed
from aerial_nb.training.publish import LIMIT, aerial_publish, publish, without_paths
from aerial_nb.training.records import write_json
from aerial_nb.training.runs import RunFolder

DEFAULTS = "epochs = 2   # passes\nlr = 1e-3\nprotocol = 'split'\namp = False\nresume = ''"
CHECK = ("from aerial_nb.training.parameters import check_parameters\n"
         "params = check_parameters(globals(), known=dict(epochs=int, lr=float, protocol=str, amp=bool, resume=str),\n"
         "    positive=('epochs', 'lr'), choices=dict(protocol=('overfit', 'split')))")
WORK = ("import time\nfrom aerial_nb.training.runs import RunFolder\n"
        "run = RunFolder.current('train_small', params, resume=resume)\n"
        "first = len(run.history)\n"
        "for epoch in range(first, epochs): run.log(dict(epoch=epoch + 1, train_loss=1 / (1 + epoch))); time.sleep(0.05)\n"
        "assert protocol == 'split', 'no overfitting here'\n"
        "run.finish(dict(epochs_run=epochs - first))")


def notebook(path: Path, *cells: str, tag: bool = True) -> Path:
    "A notebook whose cell with the defaults is tagged; setup cells before it define names of their own."
    made = [nbformat.v4.new_markdown_cell("# Small")]
    for source in cells:
        tags = ["parameters"] if tag and source == DEFAULTS else []
        made.append(nbformat.v4.new_code_cell(source, metadata=dict(tags=tags) if tags else {}))
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=kernel), path)
    return path


@pytest.fixture
def small(tmp_path):
    return notebook(tmp_path / "train_small.ipynb", "COLAB, epochal = False, 3", DEFAULTS, CHECK, WORK)


# ---- types

@given(st.text() | st.integers().map(str) | st.floats().map(str) | st.sampled_from(["True", "true", "None", "1_000", "1e3", " 7 "]))
def test_values_are_typed_as_papermill_does(text):
    ours, theirs = typed(text), _resolve_type(text)
    assert type(ours) is type(theirs) and (ours == theirs or ours != ours)


def test_pairs_take_what_begins_with_a_minus():
    given, rest = _pairs(["nb.ipynb", "-p", "lr", "-1e-3", "-p", "name", "-x", "--out", "o.ipynb", "-r", "n", "5"])
    assert given == dict(lr=-1e-3, name="-x", n="5") and rest == ["nb.ipynb", "--out", "o.ipynb"]


# ---- the check

RULES = dict(known=dict(epochs=int, lr=float, amp=bool, data=str, models=str, ratio=float, seeds=str), positive=("epochs", "lr"),
             nonnegative=("ratio",), between=dict(ratio=(0, 1)), choices=dict(data=("synthetic", "deepglobe")),
             lists=dict(models=("hourglass", "spin"), seeds=None))
GOOD = dict(epochs=2, lr=0.1, amp=True, data="synthetic", models="hourglass, spin", ratio=0, seeds="0,1")


def test_good_values_come_back_in_order():
    found = check_parameters(GOOD, **RULES)
    assert found == GOOD and list(found) == list(RULES["known"])
    assert check_parameters(GOOD | dict(lr=1), **RULES)["lr"] == 1    # a whole number is a number


@pytest.mark.parametrize("change, match", [
    (dict(epoch=200), "unknown parameter 'epoch'; did you mean 'epochs'"), (dict(zzz=1), r"unknown parameter 'zzz' Known: epochs, lr"),
    (dict(epochs=-3), "epochs is -3, and must be more than 0"), (dict(epochs=0), "more than 0"), (dict(epochs=2.5), "whole number"),
    (dict(epochs=2.0), "type 2$"), (dict(epochs="many"), "whole number"), (dict(epochs=True), "whole number"), (dict(epochs=None), "whole number"),
    (dict(lr="small"), "lr is 'small', a number"), (dict(lr=float("nan")), "finite"), (dict(lr=float("inf")), "finite"),
    (dict(amp="true"), "type True$"), (dict(amp="false"), "type False$"), (dict(amp=1), "type True or False"),
    (dict(data=2024), "give it with -r NAME 2024"), (dict(data=None), "type ''"), (dict(data="deepglob"), "did you mean deepglobe"),
    (dict(models="hourglass,spinn"), "some of hourglass, spin; did you mean spin"), (dict(models="spin,spin"), "'spin' twice"),
    (dict(ratio=-0.1), "not be less than 0"), (dict(ratio=1.1), "between 0 and 1"), (dict(seeds="1,1"), "twice")])
def test_each_fault_has_its_sentence(change, match):
    with pytest.raises(ParameterError, match=match): check_parameters(GOOD | change, **RULES)


def test_all_faults_come_at_once():
    with pytest.raises(ParameterError) as caught: check_parameters(dict(epochs=-1, lr=-1, epoch=2), ["epochs", "lr", "size"], ("epochs", "lr"))
    assert len(str(caught.value).splitlines()) == 4


def test_the_cell_with_the_defaults_must_be_plain_and_tagged_once(tmp_path, small):
    assert notebook_parameters(small) == dict(epochs=2, lr=1e-3, protocol="split", amp=False, resume="")
    for cells, match in [((CHECK,), "0 cells tagged"), ((DEFAULTS, DEFAULTS), "2 cells tagged")]:
        with pytest.raises(ParameterError, match=match): notebook_parameters(notebook(tmp_path / "x.ipynb", *cells))
    made = nbformat.v4.new_code_cell("lr = 1e-3 * 4", metadata=dict(tags=["parameters"]))
    nbformat.write(nbformat.v4.new_notebook(cells=[made]), tmp_path / "y.ipynb")
    with pytest.raises(ParameterError, match=r"not `lr = 0.001 \* 4`"): notebook_parameters(tmp_path / "y.ipynb")
    (tmp_path / "z.ipynb").write_text("not json")
    with pytest.raises(ParameterError, match="is no notebook"): notebook_parameters(tmp_path / "z.ipynb")


# ---- under plain papermill, which only warns

def pm(source: Path, **parameters):
    papermill.execute_notebook(str(source), str(source.with_name("out.ipynb")), parameters, progress_bar=False, kernel_name="python3")


def test_papermill_refuses_through_the_check(small):
    with pytest.raises(papermill.PapermillExecutionError) as caught: pm(small, epoch=200, epochs=-3, amp="true")
    said = re.sub(r"\s+", " ", str(caught.value))
    assert "did you mean 'epochs'?" in said and "epochs is -3, and must be more than 0" in said and "type True" in said


def test_a_stripped_tag_is_seen_inside_the_notebook(tmp_path):
    source = notebook(tmp_path / "stripped.ipynb", DEFAULTS, CHECK, tag=False)
    with pytest.raises(papermill.PapermillExecutionError, match="epochs = 9 was given, and 2 is in force"): pm(source, epochs=9)


# ---- aerial_run

def the_run(base: Path) -> RunFolder:
    (found,) = base.glob("train_small/*")
    return RunFolder(found)


def test_a_run_goes_into_its_folder(small, tmp_path, capsys):
    base = tmp_path / "runs {a}"                              # papermill takes braces for fields
    assert aerial_run([str(small), "-p", "epochs", "3", "-y", "lr: 0.5", "--runs", str(base), "--out", str(tmp_path / "copy.ipynb")]) == 0
    run = the_run(base)
    assert run.status == "finished" and run.metrics["epochs_run"] == 3 and run.params["lr"] == 0.5 and run.env["packages"]
    executed = nbformat.read(run / "train_small.ipynb", 4)
    assert any("injected-parameters" in c.metadata.get("tags", []) for c in executed.cells)
    assert str(tmp_path) not in json.dumps(executed.metadata) and (tmp_path / "copy.ipynb").read_text() == (run / "train_small.ipynb").read_text()
    assert "epoch 3 of 3: train_loss 0.3333" in capsys.readouterr().err


def test_a_notebook_that_fails_gives_1_and_its_last_lines(small, tmp_path, capsys):
    assert aerial_run([str(small), "-p", "protocol", "overfit", "--runs", str(tmp_path / "runs")]) == 1
    run, said = the_run(tmp_path / "runs"), capsys.readouterr().err
    assert run.status == "failed" and run.error["message"] == "no overfitting here"
    assert "no overfitting here" in said and f"-p resume train_small/{run.id}" in said and "\x1b" not in said
    with pytest.raises(ValueError, match="is failed .AssertionError: no overfitting here"): publish(run, results=tmp_path)


@pytest.mark.parametrize("words, match", [
    (["-p", "epoch", "3"], "unknown parameter 'epoch'; did you mean 'epochs'? Known: epochs, lr"), (["-p", "epochs", "many"], "whole number"),
    (["-p", "amp", "true"], "type True"), (["-p", "epochs"], "needs a name and a value"), (["-y", "- 1"], "expected lines like"),
    (["-y", "a: ["], "no YAML"), (["-f", "missing.yml"], "missing.yml"), (["-p", "resume", "gone"], "no run 'gone'")])
def test_what_cannot_start_gives_2_and_leaves_nothing(small, tmp_path, capsys, words, match):
    assert aerial_run([str(small), "--runs", str(tmp_path / "runs"), *words]) == 2
    assert match in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_no_notebook_gives_2(tmp_path, capsys):
    assert aerial_run([str(tmp_path / "none.ipynb"), "--runs", str(tmp_path)]) == 2 and "no notebook" in capsys.readouterr().err


def test_list_shows_the_defaults(small, capsys):
    assert aerial_run([str(small), "--list"]) == 0 and capsys.readouterr().out.strip() == DEFAULTS


def test_ctrl_c_gives_130_and_resume_finishes_the_run(small, tmp_path, capsys):
    base = tmp_path / "runs"
    command = [sys.executable, "-c", "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "   # a background job ignores it
               "from aerial_nb.training.launch import aerial_run; sys.exit(aerial_run())",
               str(small), "-p", "epochs", "40", "--runs", str(base)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 50
    while not list(base.glob("*/*/history.csv")) and time.monotonic() < until: time.sleep(0.05)
    run = the_run(base)
    kernel = json.loads((run / ".lock").read_text())["pid"]   # the kernel took the lock over from the launcher
    assert kernel != process.pid
    assert aerial_run([str(small), "-p", "resume", run.id, "--runs", str(base)]) == 2
    assert f"is being written by process {kernel}" in capsys.readouterr().err
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert "continue it with" in process.stderr.read() and run.status == "unfinished"
    process.stderr.close()
    with pytest.raises(ProcessLookupError): os.kill(kernel, 0)
    rows = len(run.history)
    assert 0 < rows < 40
    assert aerial_run([str(small), "-p", "resume", run.id, "--runs", str(base)]) == 0
    assert list(run.history.epoch) == list(range(1, 41)) and run.metrics["epochs_run"] <= 40 - rows + 1
    assert (run / "train_small-session1.ipynb").exists() and the_run(base).id == run.id
    assert aerial_run([str(small), "-p", "resume", run.id, "--runs", str(base)]) == 2
    assert "is finished: start a new one" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_parameters(small, tmp_path):
    run, _ = plan_run(small, dict(epochs=7), tmp_path / "runs")
    again, params = plan_run(small, dict(resume=run.id), tmp_path / "runs")
    assert again.id == run.id and params["epochs"] == 7 and Path(params["resume"]).is_absolute()
    other = notebook(tmp_path / "train_other.ipynb", DEFAULTS)
    with pytest.raises(ParameterError, match="is no run of train_other"): plan_run(other, dict(resume=run.id), tmp_path / "runs")


def test_a_full_disk_ends_with_a_sentence_and_the_last_good_file(tmp_path):
    disk, source = tmp_path / "disk", tmp_path / "train_full.ipynb"
    disk.mkdir()
    prefix = ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size=1m tmpfs '{disk}' && exec \"$@\"", "sh"]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    notebook(source, DEFAULTS, "from aerial_nb.training.runs import RunFolder\nrun = RunFolder.current('train_full', {})\n"
             "for size in (4, 2_000_000):\n    with run.writing('checkpoint') as part: part.write_bytes(bytes(size))")
    code = ("import sys; from pathlib import Path; from aerial_nb.training.launch import aerial_run\n"
            "code = aerial_run(sys.argv[1:]); (file,) = Path(sys.argv[-1]).glob('*/*/checkpoint'); print(code, file.stat().st_size)\n"
            "filler = open(sys.argv[-1] + '/filler', 'wb', 0)\n"
            "try:\n    while True: filler.write(bytes(4096))\n"
            "except OSError: pass\n"
            "print(aerial_run(sys.argv[1:]), len(list(Path(sys.argv[-1]).glob('*/*'))))")
    found = subprocess.run([*prefix, sys.executable, "-c", code, str(source), "--runs", str(disk)], capture_output=True, text=True)
    assert found.stdout.splitlines() == ["1 4", "2 1"], found.stdout + found.stderr
    assert len(re.findall("DiskFull: .*no space left in|aerial_run: .*no space left in", found.stderr)) == 2


def test_watching_says_what_is_new_and_how_long_it_takes(tmp_path, capsys, monkeypatch):
    run = RunFolder.create("t", {}, tmp_path)
    watch, clock = Watch(run, epochs=10, every_s=0), [0.]
    monkeypatch.setattr("aerial_nb.training.launch.time.monotonic", lambda: clock[0])
    for epoch in range(3):
        run.arm("spin-seed0").log(dict(epoch=epoch + 1, train_loss=0.5)); watch.look(); watch.look(); clock[0] += 60
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["spin-seed0 epoch 1 of 10: train_loss 0.5", "spin-seed0 epoch 2 of 10: train_loss 0.5; about 8 min left here",
                     "spin-seed0 epoch 3 of 10: train_loss 0.5; about 7 min left here"]


# ---- aerial_publish

@pytest.fixture
def done(tmp_path):
    run = RunFolder.create("train_spin", dict(data="/mnt/ann/tiles", epochs=2), tmp_path / "runs", id="one")
    env = run.env | dict(git=dict(commit="a" * 40, dirty=False, changed=[]))
    write_json(run / "env.json", env)
    run.log(dict(epoch=0, note="read /mnt/ann/x.tif")); run.arm("spin-seed0").log(dict(epoch=0, train_loss=0.5))
    (run / "figures").mkdir(); (run / "figures/curves.png").write_bytes(b"png")
    (run / "predictions").mkdir(); (run / "predictions/a.tif").write_bytes(bytes(10**6))
    return run.finish(dict(iou=0.5, worst="/mnt/ann/bad.tif"))


def snapshot(folder: Path) -> dict: return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_record_is_small_plain_and_the_same_twice(done, tmp_path, capsys):
    words = ["train_spin/one", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--name", "best"]
    assert aerial_publish(words) == 0
    first = snapshot(tmp_path / "results")
    assert list(first) == [f"train_spin/best/{n}" for n in ("arms/spin-seed0/history.csv", "env.json", "figures/curves.png", "history.csv",
                                                            "metrics.json", "params.json", "record.json")]
    assert not any(b"/mnt" in content for content in first.values()) and b"bad.tif" in first["train_spin/best/metrics.json"]
    assert aerial_publish(words) == 0 and snapshot(tmp_path / "results") == first
    assert capsys.readouterr().out.strip().endswith(os.path.join("train_spin", "best"))


def test_another_run_does_not_take_a_name_in_use(done, tmp_path):
    publish(done, "best", results=tmp_path / "results")
    second = RunFolder.create("train_spin", {}, tmp_path / "runs", id="two").finish({})
    before = snapshot(tmp_path / "results")
    with pytest.raises(FileExistsError, match="choose another --name"): publish(second, "best", allow_dirty=True, results=tmp_path / "results")
    with pytest.raises(ValueError, match="must be letters"): publish(second, "../best", allow_dirty=True, results=tmp_path / "results")
    assert snapshot(tmp_path / "results") == before


@pytest.mark.parametrize("git", [{}, dict(commit="b" * 40, dirty=True, changed=["nbs/x.ipynb"])])
def test_a_run_nobody_can_repeat_is_published_only_when_asked(done, tmp_path, git):
    write_json(done / "env.json", done.env | dict(git=git))
    with pytest.raises(ValueError, match="--allow-dirty, which the record will show"): publish(done, results=tmp_path / "results")
    folder = publish(done, allow_dirty=True, results=tmp_path / "results")
    assert folder.name == "one" and json.loads((folder / "record.json").read_text())["dirty"] is True


def test_an_earlier_session_of_a_changed_tree_counts(done, tmp_path):
    write_json(done / "env.json", done.env | dict(sessions=[dict(git=dict(commit="c" * 40, dirty=True))]))
    with pytest.raises(ValueError, match="is not of a commit"): publish(done, results=tmp_path)


def test_too_much_is_refused_and_leaves_nothing(done, tmp_path):
    (done / "figures/curves.png").write_bytes(bytes(LIMIT))
    with pytest.raises(ValueError, match=r"the largest file is figures/curves.png with 300 kB"): publish(done, results=tmp_path / "results")
    for name in "abc": (done / f"figures/{name}.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="at most 2 figures: choose with --figure among a.png"): publish(done, results=tmp_path / "results")
    with pytest.raises(ValueError, match="has no figure z.png; it has a.png"): publish(done, figures=["z"], results=tmp_path / "results")
    assert not snapshot(tmp_path / "results") and not list(tmp_path.glob("results/*/.*"))
    assert sorted(p.name for p in publish(done, figures=["a", "b.png"], results=tmp_path / "results").glob("figures/*")) == ["a.png", "b.png"]


def test_a_large_figure_is_published_small(done, tmp_path):
    from PIL import Image
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype="uint8").repeat(6, 0).repeat(6, 1)
    Image.fromarray(noise ^ np.random.default_rng(1).integers(0, 31, noise.shape, dtype="uint8")).save(done / "figures/curves.png")
    kept = publish(done, results=tmp_path / "results") / "figures/curves.png"
    assert (done / "figures/curves.png").stat().st_size > 300_000 and kept.stat().st_size <= 120_000
    with Image.open(kept) as picture: assert picture.width / picture.height == pytest.approx(4 / 3, abs=.02)


def test_an_unfinished_run_is_no_result(tmp_path, capsys):
    run = RunFolder.create("t", {}, tmp_path / "runs", id="one")
    assert aerial_publish(["one", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]) == 2
    assert f"run t/{run.id} is unfinished: only a finished run" in capsys.readouterr().err
    assert aerial_publish(["gone", "--runs", str(tmp_path / "runs")]) == 2


@pytest.mark.parametrize("text, short", [
    ("/home/ann/x.tif", "x.tif"), ("~/maps/x.tif", "x.tif"), ("/data", "data"), ("a /home/ann/x.tif b", "a x.tif b"), ("'/a/b/c'", "'c'"),
    ("../shared/data", "../shared/data"), ("./x/y", "./x/y"), ("https://example.org/a/b", "https://example.org/a/b"), ("m/s", "m/s"),
    ("1/2", "1/2"), (r"D:\ann\x.tif", "x.tif"), ("file /mnt/a b", "file a b"), ("", "")])
def test_paths_of_a_machine_are_shortened(text, short): assert without_paths([text]) == [short]


@given(st.text(st.characters(exclude_characters="/\\~")))
def test_text_without_separators_stays(text): assert without_paths(text) == text


def test_paths_in_the_project_become_relative(tmp_path):
    assert without_paths(dict(a=str(tmp_path / "d/x"), b=[f"see {tmp_path}/d"]), tmp_path) == dict(a="d/x", b=["see d"])
    assert not re.search("/home|/tmp", json.dumps(without_paths(dict(t=f"{tmp_path}/a /home/x/y"))))
