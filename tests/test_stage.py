"""The book: the list is what is there, every listed page is written, and nothing in it needs nbdev or the network."""
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
import yaml

from aerial_nb.report import stage as book
from aerial_nb.report.markdown import block, code, page_faults, plain_text, slug
from aerial_nb.report.pages import inert
from aerial_nb.report.stage import aerial_report, book_pages, label_title, made_pages, markdown_table, offline, read_processed, results_page, stage
from aerial_nb.training.parameters import notebook_parameters
from aerial_nb.training.publish import publish
from aerial_nb.training.records import write_json
from aerial_nb.training.runs import RunFolder

ROOT = Path(__file__).parents[1]
BARE = re.compile(r"^\s*#\|\s*[\w-]+(\s+[^:]*)?$", re.M)       # a directive of nbdev: no colon
new = nbformat.v4


def test_the_list_is_what_is_in_nbs_and_what_is_made():
    listed = book_pages(ROOT)
    there = ["book/" + p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    assert len(set(listed)) == len(listed)
    assert sorted(listed) == sorted([*there, *made_pages()]), "correct the chapter list of _quarto.yml"


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
    for name in ("nbs", "docs"): shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    pages = ["book/" + p.relative_to(root / "nbs").as_posix() for p in sorted((root / "nbs").rglob("*.ipynb"))]
    chapters = ["index.qmd", dict(part="All", chapters=pages), *made_pages()]
    (root / "_quarto.yml").write_text(yaml.safe_dump(dict(book=dict(chapters=chapters))))
    (root / "book").mkdir(); (root / "book/gone.ipynb").write_text("{}")
    return root, stage(root, root / "runs", ROOT / "results")


def test_every_listed_page_is_written_and_no_other(project):
    root, pages = project
    assert [p.relative_to(root).as_posix() for p in pages] == book_pages(root)
    assert sorted(pages) == sorted(p for p in (root / "book").rglob("*.*") if p.suffix in (".ipynb", ".md"))


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
                assert "<script" not in text and "text/html" not in text and '"application/' not in text, page.name
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
    assert "Run b: " in text and "epochs `2`" in text


def test_without_a_finished_run_the_page_says_how_to_make_one(small, tmp_path):
    for name in ("a", "b"): (tmp_path / "runs/train_x" / name / "metrics.json").unlink()
    made = nbformat.read(stage(tmp_path, tmp_path / "runs", tmp_path / "results")[0], 4)
    assert made.cells[0].source.startswith("# Train x {#sec-train-x}") and "aerial_run nbs/train_x.ipynb" in made.cells[1].source
    assert "c (failed), b (unfinished), a (unfinished)" in made.cells[1].source and len(made.cells) == 2


def test_other_runs_of_an_experiment_are_listed_with_links(small, tmp_path):
    (tmp_path / "_quarto.yml").write_text("book:\n  chapters: [index.qmd, book/train_x.ipynb, book/runs.md]\n")
    note = nbformat.read(stage(tmp_path, tmp_path / "runs", tmp_path / "results")[0], 4).cells[1].source
    assert "Run [b](runs.md#sec-run-train-x-b)" in note and "[c](runs.md#sec-run-train-x-c) (failed), [a](runs.md#sec-run-train-x-a) (finished)" in note


def test_a_finished_run_whose_notebook_is_broken_gives_way_to_an_older_one(small, tmp_path):
    (tmp_path / "runs/train_x/b/train_x.ipynb").write_text('{"cells": [{')
    assert "from a" in stage(tmp_path, tmp_path / "runs", tmp_path / "results")[0].read_text()


def test_results_show_what_the_records_hold(small, tmp_path):
    assert "No run has been published yet" in results_page(tmp_path / "results")
    run = RunFolder.open("a", tmp_path / "runs")
    arms = dict(spin=dict(iou=0.123456, f1=None, seeds=1), glass=dict(iou=0.2, seeds=1))
    write_json(run / "metrics.json", dict(finished=True, wall_s=12.3456, note="a|b", arms=arms))
    (run / "figures").mkdir(); (run / "figures/errors.png").write_bytes(b"png")
    publish(run, "best", allow_dirty=True, results=tmp_path / "results")
    page = stage(tmp_path, tmp_path / "runs", tmp_path / "results")[1].read_text()
    for part in ("## [train_x](train_x.ipynb)", "### best", "| arm | IoU | seeds |", "| `spin` | 0.123 | 1 |", "| `wall_s` | 12.346 |", r"| `note` | a\|b |", "epochs `2`"):
        assert part in page, part
    (link,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page)
    assert (tmp_path / "book" / link).read_bytes() == b"png"
    assert "<" not in page and "resume" not in page


@pytest.mark.parametrize("text", ["a|b", "`x`", "<b>", "*a*", "_a_", "[a](b)", "{{" + "< a >}}", "$x$", "@sec-a", "a\nb", "~~a~~", "#x", "\\", "&lt;", "::: a", "snake_case"])
def test_text_is_printed_as_it_is(text):
    from bs4 import BeautifulSoup
    from markdown_it import MarkdownIt
    for made in (plain_text(text), code(text)):
        shown = BeautifulSoup(MarkdownIt("commonmark").enable("table").render(f"| a |\n|---|\n| {made} |"), "html.parser").find("td")
        assert shown.get_text() == " ".join(text.split()) and not shown.find(["b", "em", "a", "s"]), made
        assert "{{<" not in made


@pytest.mark.parametrize("text", ["a", "```\nb\n```", "````", "~~~", "{{" + "< a >}}"])
def test_a_block_holds_anything(text):
    assert page_faults(f"# A\n\n{block(text)}\n\nend") == [] and ("shortcodes" in block(text)) == ("{{" in text)


def test_addresses_differ_where_names_do():
    names = ["a/b", "a b", "a?b", "a_b", "A-b.", "ü", "ö", "x" * 200, "x" * 201, "..", "."]
    assert len({slug(n) for n in names} - {slug("a/b")}) == len(names) - 2        # a/b and a_b are one, and no two runs are called so
    for name in names: assert re.fullmatch(r"[a-z0-9-]+", slug(name))


@pytest.mark.parametrize("text", ["<SCRIPT src=x>a</script >b", "<scr<script></script>ipt>alert(1)</script>", '<img src="x" onerror="go()">', "<svg/onload=go()>",
                                  "<a href='JaVaScript:go()'>x</a>", "<iframe srcdoc='<script>1</script>'></iframe>", "<form action=x><button formaction=y>"])
def test_what_acts_is_taken_away(text):
    left = inert(text).lower()
    for word in ("<script", "onerror", "onload", "javascript:", "srcdoc", "<iframe", "<form", "formaction"): assert word not in left, left
    assert inert("<b>x</b> [a](b.md) 1 < 2, on = 3") == "<b>x</b> [a](b.md) 1 < 2, on = 3"


def test_a_markdown_table_keeps_all_columns():
    assert markdown_table([dict(a=1), dict(b="x\ny")]).splitlines() == ["| a | b |", "| ---: | :--- |", "| 1 | – |", "| – | x y |"]
    assert markdown_table([]) == ""


def test_columns_are_as_wide_as_what_is_read_in_them():
    rule = markdown_table([dict(rank=1, arm=code("x" * 20), run=plain_text("y" * 99))]).splitlines()[1].strip("| ").split(" | ")
    assert [r.count("-") for r in rule] == [4, 20, 40] and rule[0].endswith(":") and rule[1].startswith(":")


# ---- the command

def test_the_command_stages_and_says_when_quarto_is_missing(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "nbs/deep").mkdir(); monkeypatch.chdir(tmp_path / "nbs/deep")
    monkeypatch.setenv("AERIAL_RUNS", str(tmp_path / "runs")); monkeypatch.setenv("AERIAL_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(book.shutil, "which", lambda name: None)
    assert aerial_report(["--no-render"]) == 0 and "2 pages staged" in capsys.readouterr().out
    assert aerial_report([]) == 1 and "pip install quarto-cli" in capsys.readouterr().err and (tmp_path / "book/train_x.ipynb").is_file()
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

# ---- the staged tree

LINK = re.compile(r"(?<!\\)(!?)\[(?:[^\]\\]|\\.|\](?!\())*\]\(([^()\s]+)(?:\s+\"[^\"]*\")?\)")
LABEL = re.compile(r"\{#([\w-]+)[^}]*\}")
CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.S)
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|work|tmp|farm|Users|mnt|var|opt|usr|private|content)/[\w.-]+")


def page_texts(page: Path) -> list[str]:
    "The Markdown of a page; of a notebook its cells and their Markdown outputs."
    if page.suffix == ".md": return [page.read_text(encoding="utf-8")]
    cells = nbformat.read(page, 4).cells
    shown = ["".join(o.get("data", {}).get("text/markdown", "")) for c in cells for o in c.get("outputs", [])]
    return [*(c.source for c in cells if c.cell_type == "markdown"), *filter(None, shown)]


def output_texts(page: Path) -> list[str]:
    "What the outputs of a notebook say."
    outputs = [o for c in nbformat.read(page, 4).cells for o in c.get("outputs", [])]
    return [t for o in outputs for t in [o.get("text", ""), *(v for k, v in o.get("data", {}).items() if k.startswith("text/"))]]


def prose(text: str) -> str:
    "Text without code."
    return CODE.sub("", re.sub(r"^\s*(`{3,}|~{3,}).*?^\s*\1\s*$", "", text, flags=re.M | re.S))


def tree_faults(root: Path, pages: list[Path]) -> list[str]:
    "Everything that is wrong with a staged book; the chapter on launching shows how an experiment fails, and may."
    faults, labels = [], {p: {x for t in page_texts(p) for x in LABEL.findall(t)} for p in pages}
    everywhere = [x for p in pages for x in labels[p]]
    faults += [f"{x} stands twice" for x in sorted({x for x in everywhere if everywhere.count(x) > 1})]
    for page in pages:
        name = page.relative_to(root).as_posix()
        for text in page_texts(page):
            faults += [f"{name}, {fault}" for fault in page_faults(text)]
            for picture, target in LINK.findall(prose(text)):
                if re.match(r"https?://[\w.-]+\.[a-z]+(/\S*)?$", target): continue
                place, _, anchor = target.partition("#")
                file = (page.parent / place).resolve() if place else page.resolve()
                if not file.is_file() or not file.is_relative_to((root / "book").resolve()): faults.append(f"{name}: {target} is not there")
                elif anchor and anchor not in labels.get(root / file.relative_to(root.resolve()), ()): faults.append(f"{name}: no {anchor} in {place}")
                if picture and file.suffix != ".png": faults.append(f"{name}: {target} is no picture")
            faults += [f"{name}: @{x} leads nowhere" for x in re.findall(r"(?<![\\\w])@(sec-[\w-]+)", prose(text)) if x not in everywhere]
        said = page.read_text(encoding="utf-8") if page.suffix == ".md" else "\n".join(output_texts(page))
        faults += [f"{name}: {found.group()}" for found in MACHINE_PATH.finditer(said)]
        if "Traceback (most recent call last)" in said and name != "book/training/launch.ipynb": faults.append(f"{name}: a traceback")
        if page.stat().st_size > 2_000_000: faults.append(f"{name}: {page.stat().st_size} bytes")
    for file in (root / "book").rglob("*.*"):
        if file.suffix == ".png" and file.stat().st_size > 400_000: faults.append(f"{file.name}: a large picture")
        if file.suffix == ".html" and REMOTE.search(file.read_text(encoding="utf-8")): faults.append(f"{file.name}: loads from the network")
    return faults


REMOTE = re.compile(r"<(script|link|iframe)\b[^>]*(src|href)\s*=\s*[\"']?(https?:)?//", re.I)


def test_the_staged_book_has_no_fault(project):
    root, pages = project
    assert not (found := tree_faults(root, pages)), "\n".join(found)


def test_the_search_for_faults_finds_some(tmp_path):
    page = tmp_path / "book/x.md"; page.parent.mkdir()
    page.write_text("# X {#sec-x}\n\n[a](gone.md) [b](x.md#sec-y) ![c](x.md) @sec-z and `[code](no)`\n\n| a | b |\n|---|---|\n| 1 |\n\n::: {.n}\n\n"
                    f"<script>go()</script> {'/'.join(['', 'tmp', 'ann'])}\n\n[fine](https://a.org/b) [own](#sec-x)\n")
    faults = tree_faults(tmp_path, [page])
    for said in ("gone.md is not there", "no sec-y", "no picture", "@sec-z leads nowhere", "1 cells, 2", "not closed", "active content", "tmp"): assert said in str(faults), said
    assert len(faults) == 8


def test_made_pages_say_how_to_begin_where_nothing_was_run(tmp_path):
    (tmp_path / "_quarto.yml").write_text(yaml.safe_dump(dict(book=dict(chapters=[p for p in made_pages() if p != "book/path.md"]))))
    pages = stage(tmp_path, tmp_path / "runs", tmp_path / "results")
    assert tree_faults(tmp_path, pages) == [] and len(pages) == len(made_pages()) - 1
    for page in pages:
        text = page.read_text()
        assert re.match(r"# .+ \{#sec-[a-z-]+\}\n\n> ", text)
        assert "aerial_run nbs/" in text or "aerial_publish RUN" in text, page.name


# ---- runs of all kinds

EVIL = "<img src=x onerror=alert(1)>|**b** `c` [d](javascript:alert(1)) {{" + "< include ../secret >}} $x$ ::: <script>alert(2)</script>"


def made_run(home: Path, id: str, *, metrics=None, params=None, experiment="train_unet", iou=.5, hash="ab12", error=None, history=True) -> Path:
    "A small run folder, written by hand."
    folder = home / experiment / id
    folder.mkdir(parents=True)
    ends = dict(iou=dict(value=iou, low=iou - .1, high=iou + .1, scenes=9, seeds=1))
    scored = {"unet": dict(scenes=9, seeds=1, thresholds=[.4], cost=[dict(seconds=60., parameters=7000)], intervals=ends)}
    kept = dict(params=dict(data="town", epochs=2, resume="") | (params or {}), env=dict(started="2026-01-01T00:00:00", cpu="a processor", cores=2))
    if error: kept["error"] = dict(error="ValueError", message=error)
    else: kept["metrics"] = dict(protocol="split", split_hash=hash, arms=scored, finished=True, wall_s=60.) | (metrics or {})
    for name, values in kept.items(): (folder / f"{name}.json").write_text(json.dumps(values))
    if history: (folder / "history.csv").write_text("epoch,arm,seed,valid_iou,train_loss\n" + "".join(f"{e},unet,0,{iou * e / 4},{1 - e / 4}\n" for e in (1, 2, 3)))
    return folder


@pytest.fixture
def made_only(tmp_path):
    "A project of made pages, and a notebook."
    (tmp_path / "nbs").mkdir()
    chapter(tmp_path / "nbs/train_unet.ipynb", new.new_markdown_cell("# Train\n\n> Learn."), new.new_code_cell("epochs = 2", metadata=dict(tags=["parameters"])))
    pages = ["book/train_unet.ipynb", *(p for p in made_pages() if p != "book/path.md")]
    (tmp_path / "_quarto.yml").write_text(yaml.safe_dump(dict(book=dict(chapters=pages))))
    return tmp_path


def staged(root: Path) -> list[Path]: return stage(root, root / "runs", root / "results")


def test_hostile_names_and_values_are_printed_and_not_obeyed(made_only):
    root = made_only
    folder = made_run(root / "runs", "a" * 3, params=dict(data=EVIL, note=EVIL), metrics=dict(split_hash=EVIL, note=EVIL))
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["arms"][EVIL] = metrics["arms"].pop("unet")
    (folder / "metrics.json").write_text(json.dumps(metrics))
    made_run(root / "runs", "<b>bold</b> | x", error=EVIL)
    made_run(root / "runs", "second", experiment="<i>train")
    shutil.copytree(folder, root / "results/train_unet/<u>record")
    (root / "results/train_unet/<u>record/record.json").write_text(json.dumps(dict(run="bbb")))
    cells = [new.new_markdown_cell(f"# Train\n\n{EVIL}"), new.new_code_cell("x", outputs=[new.new_output("display_data", data={"text/html": EVIL})])]
    nbformat.write(new.new_notebook(cells=cells), folder / "train_unet.ipynb")
    pages = staged(root)
    found = [f for f in tree_faults(root, pages) if any(w in f for w in ("active", "shortcode", "cells,", "closed", "not there"))]
    assert not found, "\n".join(found)
    for page in pages:
        for text in page_texts(page):
            bare = prose(text)
            assert not re.search(r"<(img|script|b|i|u)\b", bare) or page.suffix == ".ipynb", page.name
            assert not re.search(r"<script|onerror\s*=|javascript:|\{\{<", re.sub(r"&lt;.*", "", bare)) or "\\" in bare, page.name
            assert "{{" + "<" not in re.sub(r'^(`{3,})\{\.\w+ shortcodes="false"\}.*?^\1$', "", text, flags=re.M | re.S), page.name
    runs = text_of(root, "runs.md")
    assert "&lt;img" in runs and "&lt;b&gt;bold" in runs


def html_of(page: Path) -> str:
    from markdown_it import MarkdownIt
    return "\n".join(MarkdownIt("commonmark", {"html": True}).enable("table").render(t) for t in page_texts(page))


def test_no_script_comes_through_a_renderer(made_only):
    from bs4 import BeautifulSoup
    root = made_only
    made_run(root / "runs", "one", params=dict(data=EVIL, note=EVIL), metrics=dict(split_hash=EVIL))
    made_run(root / "runs", "two", error=EVIL)
    for page in staged(root):
        soup = BeautifulSoup(html_of(page), "html.parser")
        assert not soup.find(["script", "iframe", "object"]) and not soup.find("img", src="x"), page.name
        assert not [a for a in soup.find_all("a") if a.get("href", "").startswith("javascript")], page.name
        assert not [t for t in soup.find_all(True) if any(k.startswith("on") for k in t.attrs)], page.name


def test_broken_folders_are_shown_as_such(made_only):
    root = made_only
    for id, name, text in (("cut", "metrics.json", '{"arms": {'), ("list", "metrics.json", "[1]"), ("odd", "metrics.json", '{"finished": true, "arms": {"a": 3}}'),
                           ("empty", "params.json", ""), ("none", "env.json", "\x00")):
        (made_run(root / "runs", id) / name).write_text(text)
    (root / "runs/train_unet/bare").mkdir()
    (root / "runs/train_unet/file").write_text("")
    made_run(root / "runs", "fine")
    pages = staged(root)
    text = text_of(root, "runs.md")
    for id in ("cut", "list", "empty", "bare"): assert "**unreadable**" in text.split(f"### {id} ")[1].split("###")[0], id
    assert "0.500 [0.40, 0.60]" in text.split("### fine ")[1].split("###")[0]
    assert not (found := tree_faults(root, pages)), "\n".join(found)


def test_unfinished_runs_are_no_results_and_say_how_to_go_on(made_only):
    root = made_only
    made_run(root / "runs", "done", iou=.4); made_run(root / "runs", "died", error="no memory")
    bench = made_run(root / "runs", "bench", error="interrupted", experiment="bench_x")
    (bench / "params.json").write_text(json.dumps(dict(size=64)))        # an experiment that cannot be resumed
    (made_run(root / "runs", "stopped", iou=.9) / "metrics.json").unlink()
    pages = staged(root)
    text = text_of(root, "runs.md")
    assert "-p resume train_unet/died" in text and "-p resume train_unet/stopped" in text and "-p resume train_unet/done" not in text
    assert "1 finished" in text and "2 failed" in text and "1 unfinished" in text
    assert "resume bench_x/bench" not in text and "Make it again with\n\n```bash\naerial_run nbs/bench_x.ipynb -p size 64" in text
    board = text_of(root, "results/roads.md")
    assert "0.400" in board and "stopped" not in board and "died" not in board
    assert not (found := tree_faults(root, pages)), "\n".join(found)


def test_a_page_of_a_task_ranks_within_the_same_tiles_and_follows_the_data(made_only):
    root = made_only
    made_run(root / "runs", "low", iou=.3); made_run(root / "runs", "high", iou=.7); made_run(root / "runs", "other", iou=.95, hash="ff00")
    made_run(root / "runs", "check", iou=.99, metrics=dict(protocol="overfit", is_result=False))
    pages = staged(root)
    text = text_of(root, "results/roads.md")
    together, alone = text.split("## Alone on their tiles")
    alone, checks = alone.split("## Checks: road masks")
    assert together.index("0.700 [0.60, 0.80]") < together.index("0.300 [0.20, 0.40]") and "0.950" not in together
    assert "0.950" in alone and "0.990" in checks and "scored on what it was trained on" in checks and "0.990" not in together + alone
    assert "intervals do not overlap" in together and "differences-" in together and "curves-" in together
    front = text_of(root, "front.md")
    assert "0.700" in front and "above the other" in front and "0.990" not in front
    shutil.rmtree(root / "runs/train_unet/low"); made_run(root / "runs", "low", iou=.65)
    assert "0.650" in stage_text(root, "results/roads.md") and "1 of 1 may be as good" in stage_text(root, "front.md")
    assert not (found := tree_faults(root, pages)), "\n".join(found)


def text_of(root: Path, page: str) -> str: return (root / "book" / page).read_text().replace("\N{NO-BREAK SPACE}", " ")


def stage_text(root: Path, page: str) -> str:
    staged(root)
    return text_of(root, page)


def test_maps_come_along_when_they_read_offline(made_only):
    root = made_only
    folder = made_run(root / "runs", "one")
    (folder / "maps").mkdir(); (folder / "errors").mkdir()
    (folder / "maps/scene.html").write_text("<html><script>draw()</script></html>")
    (folder / "errors/worst tiles.html").write_text("<html></html>")
    (folder / "map.html").write_text('<script src="https://cdn.example.org/x.js"></script>')
    pages = staged(root)
    text = text_of(root, "runs.md")
    assert "[maps/scene](maps/train-unet-one/maps-scene.html)" in text and "`map.html` in its folder (needs the network)" in text
    assert len(list((root / "book/maps").rglob("*.html"))) == 2 and tree_faults(root, pages) == []
    assert "../maps/train-unet-one/maps-scene.html" in text_of(root, "results/roads.md")


def test_what_was_found_out_about_errors_stands_on_the_page(made_only):
    root = made_only
    folder = made_run(root / "runs", "one") / "errors/unet-seed0"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(dict(says=["Near the border F1 is 0.2 lower.", EVIL, 3], figures=["causes"])))
    (folder / "causes.png").write_bytes(b"png"); (folder / "suspects.csv").write_text("rank,image,kind,area_m2,odd\n1,tile|<b>,missing,40.5,x\n2,t2,,nan,y\n")
    (folder.parent / "broken").mkdir(); (folder.parent / "broken/summary.json").write_text("{")
    pages = staged(root)
    text = text_of(root, "results/roads.md")
    assert "- Near the border F1 is 0.2 lower." in text and "unet-seed0/causes.png" in text and "| rank | image | kind | area_m2 |" in text
    assert r"tile\|&lt;b&gt;" in text and "odd" not in text and "<script" not in text
    assert not [f for f in tree_faults(root, pages) if "active" in f or "not there" in f or "cells" in f]


# ---- staging itself

def test_nothing_changes_when_a_page_cannot_be_made(made_only):
    root = made_only
    made_run(root / "runs", "one"); staged(root)
    before = {p: p.read_bytes() for p in (root / "book").rglob("*") if p.is_file()}
    made_run(root / "runs", "two"); (root / "nbs/train_unet.ipynb").write_text(json.dumps(dict(cells=[], metadata={}, nbformat=4, nbformat_minor=5)))
    with pytest.raises(ValueError, match="must be `# Title`"): staged(root)
    assert {p: p.read_bytes() for p in (root / "book").rglob("*") if p.is_file()} == before


def test_the_same_runs_give_the_same_bytes_and_unchanged_files_are_left_alone(made_only):
    root = made_only
    made_run(root / "runs", "one"); made_run(root / "runs", "two", iou=.6); staged(root)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (root / "book").rglob("*") if p.is_file() and p.name != ".lock"}
    staged(root)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (root / "book").rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_what_is_no_longer_needed_goes(made_only):
    root = made_only
    made_run(root / "runs", "one"); made_run(root / "runs", "two", iou=.6); staged(root)
    pictures = set((root / "book/pictures").rglob("*.png"))
    (root / "book/old").mkdir(); (root / "book/old/page.md").write_text("x"); (root / "book/train_unet_files").mkdir(); (root / "book/train_unet_files/x.png").write_text("x")
    shutil.rmtree(root / "runs/train_unet/two"); staged(root)
    assert pictures and not pictures & set((root / "book/pictures").rglob("*.png")) and not (root / "book/old").exists()
    assert (root / "book/train_unet_files/x.png").is_file()      # a render's own


def test_two_stagings_at_once_leave_a_whole_book(made_only):
    root = made_only
    for k in range(2): made_run(root / "runs", f"r{k}", iou=.3 + k / 10)
    with ThreadPoolExecutor(3) as pool: done = list(pool.map(lambda _: staged(root), range(3)))
    assert all(d == done[0] for d in done) and tree_faults(root, done[0]) == []
    assert not list((root / "book").rglob(".part-*"))
    alone = {p.relative_to(root): p.read_bytes() for p in (root / "book").rglob("*") if p.is_file()}
    shutil.rmtree(root / "book"); staged(root)
    assert {p.relative_to(root): p.read_bytes() for p in (root / "book").rglob("*") if p.is_file()} == alone


def test_a_killed_staging_leaves_whole_files(made_only, monkeypatch):
    root = made_only
    made_run(root / "runs", "one"); staged(root)
    before = {p: p.read_bytes() for p in (root / "book").rglob("*") if p.is_file()}
    made_run(root / "runs", "two", iou=.6)
    calls, real = [], book.os.replace
    def dies(a, b):
        calls.append(b)
        if len(calls) == 3: raise KeyboardInterrupt
        return real(a, b)
    monkeypatch.setattr(book.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt): staged(root)
    assert not list((root / "book").rglob(".part-*"))
    for path in before: assert path.read_bytes() == before[path] or path in map(Path, calls)


@pytest.mark.slow
def test_a_hundred_runs_are_staged_in_ten_seconds(project, tmp_path):
    for k in range(100):
        made_run(tmp_path / "runs", f"r{k:03d}", iou=.2 + k / 200, hash=f"split{k % 5}", experiment=("train_unet", "train_spin", "train_roofs")[k % 3],
                 error="no memory" if k % 20 == 19 else None)
    spent = time.process_time()
    pages = stage(project[0], tmp_path / "runs", tmp_path / "results")
    spent = time.process_time() - spent
    stage(project[0], project[0] / "runs", project[0] / "results")      # the fixture as it was
    assert len(pages) > 100 and spent < 10, f"{spent:.1f} s of processor time"


# ---- every notebook

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
REPOSITORY = re.compile(r"github\.com/([\w.-]+/[\w.-]+)")


def sources(path: Path) -> list[tuple[str, str]]:
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]


EXPERIMENTS = [p for p in NOTEBOOKS if "#| default_exp" not in "\n".join(s for _, s in sources(p))]
by_name = dict(ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())


@pytest.mark.parametrize("path", EXPERIMENTS, **by_name)
def test_an_experiment_opens_in_colab_as_itself(path):
    first, install = sources(path)[0][1], sources(path)[1][1]
    place = path.relative_to(ROOT).as_posix()
    found = re.findall(r"\[!\[[^\]]+\]\(https://colab\.research\.google\.com/assets/colab-badge\.svg\)\]"
                       r"\(https://colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/([\w./-]+)\)", first)
    assert found and found[0][1] == place, f"the badge must open {place}"
    assert len(found) == 1 and set(REPOSITORY.findall(install)) == {found[0][0]}, "the badge and the install cell must name one repository"


def test_all_badges_name_one_repository():
    assert len({m for p in EXPERIMENTS for m in REPOSITORY.findall(sources(p)[1][1])}) == 1


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p not in EXPERIMENTS], **by_name)
def test_a_chapter_ends_with_the_one_line_that_does_the_same(path):
    last = [s for kind, s in sources(path) if kind == "markdown"][-1].rstrip()
    final = last.split("\n\n")[-1]
    is_command = final.endswith("```") or final.startswith("    ") or re.search(r"`[^`\n]{6,}`", final) and not re.match(r"\d+\.|- ", final)
    assert is_command, "its last paragraph must be the command, as in: The same in one line: `aerial_report`"


# ---- the walks

def path_table() -> list[tuple[str, str]]: # chapters, command
    rows = [re.sub(r"\\\|", "", line).strip("| ").split(" | ") for line in (ROOT / "docs/path.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [(r[1], r[2].strip("` ")) for r in rows if r[0].strip() != "step"]


def test_the_walks_lead_to_chapters_and_commands_that_exist():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert len(path_table()) > 20
    for chapters, command in path_table():
        links = re.findall(r"\]\((\.\./nbs/[\w/]+\.ipynb)\)", chapters)
        assert links and all((ROOT / "docs" / link).resolve().is_file() for link in links), chapters
        words = shlex.split(command)
        assert words[0] in scripts or words[0] == "python", command
        if words[0] in ("aerial_run", "aerial_launch"):
            known = notebook_parameters(ROOT / words[1])
            assert {words[k + 1] for k, w in enumerate(words) if w == "-p"} <= known.keys(), command


@pytest.mark.slow
def test_the_small_commands_of_the_walks_run():
    for _, command in path_table():
        words = shlex.split(command)
        if words[0] != "python": continue
        done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr[-500:]}"
