"""The book: the list is what is there, every listed page is written, and nothing in it needs nbdev or the network."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from aerial_nb.report import stage as book
from aerial_nb.report.stage import aerial_report, book_pages, label_title, markdown_table, offline, read_processed, results_page, stage
from aerial_nb.training.publish import publish
from aerial_nb.training.records import write_json
from aerial_nb.training.runs import RunFolder

ROOT = Path(__file__).parents[1]
BARE = re.compile(r"^\s*#\|\s*[\w-]+(\s+[^:]*)?$", re.M)       # a directive of nbdev: no colon
new = nbformat.v4


def test_the_list_is_what_is_in_nbs():
    listed = [p for p in book_pages(ROOT) if p != "book/results.md"]
    there = sorted("book/" + p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    assert len(set(listed)) == len(listed)
    assert sorted(listed) == there, "correct the chapter list of _quarto.yml"


def test_no_chapter_needs_a_later_one():
    modules = [page[len("book/"):-len(".ipynb")].replace("/", ".") for page in book_pages(ROOT) if page.endswith(".ipynb")]
    for place, module in enumerate(modules):
        file = ROOT / "aerial_nb" / (module.replace(".", "/") + ".py")
        if not file.is_file(): continue                       # an experiment
        for dots, name, names in re.findall(r"^\s*from (\.+)([\w.]*) import (.+)", file.read_text(encoding="utf-8"), re.M):
            for last in [name] if name else names.split(", "):
                needed = ".".join([*module.split(".")[:-len(dots)], last])
                assert needed in modules[:place], f"{module} needs {needed}, which comes later in _quarto.yml"


def test_only_keys_that_are_known_to_work():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    assert config.keys() == {"project", "book", "format"}     # an unknown key stops a render
    assert config["project"] == {"type": "book", "output-dir": "_book"} and config["book"].keys() == {"title", "chapters"}
    assert config["format"]["html"].keys() <= {"toc", "code-fold", "html-math-method"} and config["format"].keys() == {"html"}
    assert config["book"]["chapters"][0] == "index.qmd" and (ROOT / "index.qmd").is_file()
    for entry in config["book"]["chapters"]: assert isinstance(entry, str) or entry.keys() == {"part", "chapters"}


def test_the_front_page_links_to_pages_that_are_listed():
    links = re.findall(r"\]\((book/[^)#]+)\)", (ROOT / "index.qmd").read_text(encoding="utf-8"))
    assert links and set(links) <= set(book_pages(ROOT))


def test_git_ignores_what_is_staged_and_rendered():
    names = ["book/settings.ipynb", "_book/index.html", ".quarto/x"]
    found = subprocess.run(["git", "-C", ROOT, "check-ignore", *names], capture_output=True, text=True)
    if found.returncode == 128: pytest.skip("not in a git tree")
    assert found.stdout.split() == names


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "The chapters that are here now, listed and staged in a project of their own."
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "nbs", root / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    pages = ["book/" + p.relative_to(root / "nbs").as_posix() for p in sorted((root / "nbs").rglob("*.ipynb"))]
    chapters = ["index.qmd", dict(part="All", chapters=pages), "book/results.md"]
    (root / "_quarto.yml").write_text(yaml.safe_dump(dict(book=dict(chapters=chapters))))
    (root / "book").mkdir(); (root / "book/gone.ipynb").write_text("{}")
    return root, stage(root, root / "runs", root / "results")


def test_every_listed_page_is_written_and_no_other(project):
    root, pages = project
    assert [p.relative_to(root).as_posix() for p in pages] == book_pages(root)
    assert sorted(pages) == sorted(p for p in (root / "book").rglob("*.*"))


def test_staged_chapters_have_no_directives_scripts_or_metadata(project):
    for page in project[1]:
        if page.suffix != ".ipynb": continue
        made = nbformat.read(page, 4)
        nbformat.validate(made)
        for cell in made.cells:
            assert not BARE.search(cell.source), f"{page.name}: {cell.source[:80]}"
            assert "nbdev_export()" not in cell.source and not cell.metadata, page.name
            for output in cell.get("outputs", []):
                text = json.dumps(output)
                assert "<script" not in text and "text/html" not in text and "application/" not in text, page.name
        assert re.match(r"# .+ \{#sec-[a-z0-9-]+\}", made.cells[0].source), page.name


def test_exported_code_and_stored_pictures_are_there(project):
    root, _ = project
    made = nbformat.read(root / "book/training/records.ipynb", 4)
    assert any("def atomic(" in c.source for c in made.cells)
    assert any("image/png" in o.get("data", {}) for c in made.cells for o in c.get("outputs", []))


def chapter(path: Path, *cells) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new.new_notebook(cells=list(cells)), path)
    return path


def test_directives_go_and_options_for_quarto_stay(tmp_path):
    path = chapter(tmp_path / "x.ipynb", new.new_markdown_cell("# X"), new.new_markdown_cell("#| export\nWhat it is."), new.new_code_cell("#| hide\nsecret"),
                   new.new_code_cell("#| export\n#| label: fig-a\n#| fig-cap: A hill\ndef f(): pass"), new.new_code_cell("a = 1\nb = 2 #| hide_line\nc = 3"),
                   new.new_code_cell("#| slow\n#| eval: false\nrun()"), new.new_code_cell("%matplotlib inline"), new.new_code_cell("#| include: false\nno"))
    assert [c.source for c in read_processed(path).cells] == [
        "# X", "What it is.", "#| label: fig-a\n#| fig-cap: A hill\ndef f(): pass", "a = 1\nc = 3", "run()"]


def test_outputs_read_offline():
    def shown(**data): return offline(new.new_output("display_data", data={k.replace("_", "/"): v for k, v in data.items()}))
    table = shown(text_html="<div>\n<style scoped>\nx {}\n</style>\n<table><tr><td>1</td></tr></table><SCRIPT>\nbad()\n</SCRIPT></div>", text_plain="1").data
    assert table["text/markdown"].splitlines()[0] == "````{=html}" and "bad" not in str(table) and "x {}" not in str(table)
    assert "<td>1</td>" in table["text/markdown"] and table["text/plain"] == "1"
    assert shown(image_png="aaa", text_html="<script>1</script>").data == {"image/png": "aaa"}
    assert shown(text_html="<script>only()</script>") is None
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "bar"}
    assert offline(new.new_output("display_data", data=widget)).data == {"text/plain": "bar"}
    assert offline(new.new_output("stream", name="stdout", text=" \n")) is None
    assert offline(new.new_output("stream", name="stderr", text="/home/ann/x/auto.py:21: Warning")).text == "auto.py:21: Warning"
    assert offline(new.new_output("stream", name="stderr", text="1%\r50%\r100%\ndone\r\n")).text == "100%\ndone\n"


def test_a_page_without_a_title_is_refused(tmp_path):
    path = chapter(tmp_path / "x.ipynb", new.new_code_cell("x = 1"))
    with pytest.raises(ValueError, match="first cell must be `# Title`"): label_title(read_processed(path), "book/x.ipynb")
    path = chapter(tmp_path / "y.ipynb", new.new_markdown_cell("# Own {#sec-own}\n\n> p"))
    assert label_title(read_processed(path), "book/y.ipynb").cells[0].source == "# Own {#sec-own}\n\n> p"


# ---- experiments and results

@pytest.fixture
def small(tmp_path):
    "A project with one experiment, and its runs: finished, newer and finished, newest and failed."
    tags = dict(tags=["parameters"])
    source = chapter(tmp_path / "nbs/train_x.ipynb", new.new_markdown_cell("# Train x\n\n> Learn."), new.new_code_cell("epochs = 2", metadata=tags))
    (tmp_path / "_quarto.yml").write_text("project: {type: book}\nbook:\n  chapters: [index.qmd, book/train_x.ipynb, book/results.md]\n")
    for name in ("a", "b", "c"):
        run = RunFolder.create("train_x", dict(epochs=2, resume=""), tmp_path / "runs", id=name)
        cell = new.new_code_cell("epochs", outputs=[new.new_output("stream", text=f"from {name}")], metadata=dict(papermill=dict(x=str(tmp_path))))
        made = new.new_notebook(cells=[new.new_markdown_cell("# Train x"), cell], metadata=dict(papermill=dict(input_path=str(tmp_path))))
        nbformat.write(made, run / "train_x.ipynb")
        run.fail("ValueError", "bad") if name == "c" else run.finish(dict(iou=0.25))
    return source


def test_the_newest_finished_run_is_shown(small, tmp_path):
    page = stage(tmp_path, tmp_path / "runs", tmp_path / "results")[0]
    text = page.read_text()
    assert "from b" in text and "from a" not in text and "from c" not in text and str(tmp_path) not in text
    assert "Run `b`" in text and "with epochs 2.*" in text


def test_without_a_finished_run_the_page_says_how_to_make_one(small, tmp_path):
    for name in ("a", "b"): (tmp_path / "runs/train_x" / name / "metrics.json").unlink()
    made = nbformat.read(stage(tmp_path, tmp_path / "runs", tmp_path / "results")[0], 4)
    assert made.cells[0].source.startswith("# Train x {#sec-train-x}") and "aerial_run nbs/train_x.ipynb" in made.cells[1].source
    assert "`a` (unfinished), `b` (unfinished), `c` (failed)" in made.cells[1].source and len(made.cells) == 2


def test_results_show_what_the_records_hold(small, tmp_path):
    assert "No run has been published yet" in results_page(tmp_path / "results")
    run = RunFolder.open("a", tmp_path / "runs")
    write_json(run / "metrics.json", dict(finished=True, wall_s=12.3456, note="a|b", arms=dict(spin=dict(iou=0.123456, f1=None), glass=dict(iou=0.2)),
                                          rows=[dict(tile="t1", iou=0.3)]))
    (run / "figures").mkdir(); (run / "figures/errors.png").write_bytes(b"png")
    publish(run, "best", allow_dirty=True, results=tmp_path / "results")
    page = stage(tmp_path, tmp_path / "runs", tmp_path / "results")[1].read_text()
    for part in ("## train_x", "### best", "| arms | iou | f1 |", "| spin | 0.1235 | – |", "| t1 | 0.3 |", r"| 12.35 | a\|b |", "epochs `2`"): assert part in page
    (link,) = re.findall(r"!\[\]\(([^)]+)\)|!\[[^]]*\]\(([^)]+)\)", page)
    assert (tmp_path / "book" / link[1]).read_bytes() == b"png"
    assert "<" not in page and "resume" not in page


def test_a_markdown_table_keeps_all_columns():
    assert markdown_table([dict(a=1), dict(b="x\ny")]).splitlines() == ["| a | b |", "| --- | --- |", "| 1 | – |", "| – | x y |"]


# ---- the command

def test_the_command_stages_and_says_when_quarto_is_missing(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "nbs/deep").mkdir(); monkeypatch.chdir(tmp_path / "nbs/deep")
    monkeypatch.setenv("AERIAL_RUNS", str(tmp_path / "runs")); monkeypatch.setenv("AERIAL_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(book.shutil, "which", lambda name: None)
    assert aerial_report(["--no-render"]) == 0 and "2 pages staged" in capsys.readouterr().out
    assert aerial_report([]) == 1 and "Quarto is not installed" in capsys.readouterr().err
    small.unlink()
    assert aerial_report([]) == 2 and "there is no nbs/train_x.ipynb: correct the list" in capsys.readouterr().err
    (tmp_path / "_quarto.yml").unlink()
    assert aerial_report([]) == 2 and "run aerial_report inside the project" in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 3])
def test_the_command_calls_quarto_and_keeps_its_word(small, tmp_path, monkeypatch, capsys, code):
    fake = tmp_path / "quarto"
    fake.write_text(f"#!{sys.executable}\nimport os, sys\nopen('called', 'w').write(' '.join(sys.argv[1:])); sys.exit({code})\n"); fake.chmod(0o755)
    monkeypatch.chdir(tmp_path); monkeypatch.setenv("AERIAL_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(book.shutil, "which", lambda name: str(fake))
    assert aerial_report([]) == (1 if code else 0)
    assert (tmp_path / "called").read_text() == "render"
