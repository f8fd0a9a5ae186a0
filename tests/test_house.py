"""The house: what holds for every notebook, the package, the commands and the README."""
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|work|tmp|farm|Users|mnt|var|opt|usr|private|content)/[\w.-]+")


def cells(path: Path) -> list[dict]:
    return [c | dict(source="".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def exported(path: Path) -> list[str]:
    return [c["source"] for c in cells(path) if c["cell_type"] == "code" and re.match(r"\s*#\|\s*export", c["source"])]


def default_exp(path: Path) -> str | None:
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(c["source"] for c in cells(path)), re.M)
    return found and found.group(1)


def texts(path: Path):
    "Every piece of text that a notebook has stored as output; pictures left out."
    for cell in cells(path):
        for output in cell.get("outputs", []):
            kept = [v for k, v in output.get("data", {}).items() if k.startswith("text/") or k == "image/svg+xml"]
            for text in [*kept, output.get("text", ""), output.get("traceback", "")]:
                yield re.sub(r"data:image/\w+;base64,[\w+/=\s]+", "", "".join(text))


EXPERIMENTS = [p for p in NOTEBOOKS if default_exp(p) is None]
CHAPTERS = [p for p in NOTEBOOKS if default_exp(p)]
by_name = dict(ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())


# ---- the package

def test_importing_the_package_is_light():
    code = "import sys, aerial_nb; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'rasterio', 'fastai', 'pandas', 'numpy'}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


def test_every_module_comes_from_its_chapter():
    modules = {p.relative_to(ROOT / "aerial_nb").with_suffix("").as_posix().replace("/", ".") for p in (ROOT / "aerial_nb").rglob("*.py")
               if p.name not in ("__init__.py", "_modidx.py")}
    assert modules == {default_exp(p) for p in CHAPTERS}
    for path in CHAPTERS: assert default_exp(path) == ".".join(path.relative_to(ROOT / "nbs").with_suffix("").parts)


@pytest.mark.parametrize("path", CHAPTERS, **by_name)
def test_a_chapter_exports_little_at_a_time(path):
    lines = [len(source.rstrip().splitlines()) for source in exported(path)]
    assert sum(lines) <= 400 and max(lines) <= 60, f"{sum(lines)} lines, the longest cell {max(lines)}: make two of it"


# ---- notebooks

def test_experiments_are_there_and_export_nothing():
    assert "train_spin.ipynb" in {p.name for p in EXPERIMENTS}
    for path in EXPERIMENTS: assert path.parent == ROOT / "nbs" and not exported(path)


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory):
    "The notebooks as nbdev_clean leaves them."
    root = tmp_path_factory.mktemp("clean")
    shutil.copy(ROOT / "pyproject.toml", root)
    shutil.copytree(ROOT / "nbs", root / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (root / "aerial_nb").mkdir(); shutil.copy(ROOT / "aerial_nb/__init__.py", root / "aerial_nb")
    subprocess.run([sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean()"], cwd=root, check=True, capture_output=True)
    return root


@pytest.mark.parametrize("path", NOTEBOOKS, **by_name)
def test_a_notebook_is_clean(path, cleaned):
    assert path.read_bytes() == (cleaned / path.relative_to(ROOT)).read_bytes(), "run nbdev_clean"


@pytest.mark.parametrize("path", EXPERIMENTS, **by_name)
def test_an_experiment_keeps_its_parameters_cell(path, cleaned):
    for notebook in (path, cleaned / path.relative_to(ROOT)):
        tagged = [c for c in cells(notebook) if "parameters" in c["metadata"].get("tags", [])]
        assert len(tagged) == 1 and tagged[0]["cell_type"] == "code", "papermill's -p needs exactly one"
    assert len(cells(path)) <= 25 and not any(c.get("outputs") for c in cells(path)), "25 cells at most, committed without outputs"


@pytest.mark.parametrize("path", NOTEBOOKS, **by_name)
def test_a_notebook_is_small_titled_and_without_faults(path):
    assert path.stat().st_size < 1_000_000
    first = cells(path)[0]
    assert first["cell_type"] == "markdown" and re.match(r"# \S", first["source"]), "begins with `# Title`"
    assert re.search(r"^> \S", first["source"], re.M), "then comes a promise in one line, `> promise`"
    outputs = [o for c in cells(path) for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    for output in outputs:
        for kind, data in output.get("data", {}).items():
            if kind.startswith("image/"): assert len("".join(data)) * 3 // 4 < 150_000, f"a picture of {len(''.join(data)) * 3 // 4000} kB"
    assert [found.group() for text in texts(path) for found in MACHINE_PATH.finditer(text)] == []


def test_the_search_for_paths_finds_some():
    for top in ("tmp", "home", "work"): assert MACHINE_PATH.search(f"in '{'/'.join(['', top, 'ann', 'x.tif'])}'")
    for text in ("../tmp/x", "runs/tmp/a", "https://a.org/home/x", "and/or"): assert not MACHINE_PATH.search(text)


# ---- the project file

def test_every_dependency_has_its_reason():
    text, project = (ROOT / "pyproject.toml").read_text(encoding="utf-8"), PROJECT["project"]
    wanted = [*project["dependencies"], *PROJECT["build-system"]["requires"], *(d for g in project["optional-dependencies"].values() for d in g),
              *(d for g in PROJECT["dependency-groups"].values() for d in g)]
    assert wanted
    for name in wanted: assert re.search(rf'"{re.escape(name)}"[\],]*\s*#\s*\S+ \S+', text), f"{name} has no comment that says why"


def test_the_settings_that_keep_experiments_working():
    assert PROJECT["tool"]["nbdev"]["allowed_cell_metadata_keys"] == ["tags"]
    assert re.fullmatch(r">=[\d.]+,<[\d.]+", PROJECT["project"]["requires-python"])  # another form is rewritten by nbdev_export


ASK_ALL = """
import contextlib, io, json, sys
from importlib.metadata import entry_points
told = {}
for name in sys.argv[1:]:
    [entry] = entry_points(group="console_scripts", name=name)
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try: code = entry.load()()
        except SystemExit as end: code = end.code
    told[name] = out.getvalue(), code or 0
print(json.dumps(told))
"""     # all in one process: the libraries that they load take longer than they do

def test_every_command_is_there_and_has_help(tmp_path):
    scripts = PROJECT["project"]["scripts"]
    assert {"nbdev_test", "nbdev_export", "nbdev_clean", "nbdev_docs", "nbdev_prepare", "aerial_run", "aerial_publish", "aerial_report"} <= scripts.keys()
    where = {name: shutil.which(name, path=Path(sys.executable).parent) for name in scripts}
    assert all(where.values()), f"not installed: {[name for name in where if not where[name]]}; run uv sync"
    # as programs and in an empty folder: nbdev's commands, called as functions, ignore --help and do their work
    def ask(name):
        done = subprocess.run([where[name], "--help"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
        return name, done.stdout, done.returncode
    as_programs = [name for name in scripts if name.startswith("nbdev")] + ["aerial_publish"]
    for name, text, code in map(ask, as_programs): assert code == 0 and text.startswith("usage"), f"{name}: {text[:300]}"
    done = subprocess.run([sys.executable, "-c", ASK_ALL, *sorted(scripts.keys() - as_programs)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    told = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    assert told.keys() == scripts.keys() - as_programs, done.stderr[-600:]
    for name, (text, code) in told.items(): assert code == 0 and text.startswith(f"usage: {name}"), f"{name}: {text[:300]}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_what_a_chapter_silences_it_lets_speak_again(path):
    "nbdev_test runs one notebook after the other in one process."
    code = "\n".join(c["source"] for c in cells(path) if c["cell_type"] == "code")
    assert bool(re.search(r"logging\.disable\((?!logging\.NOTSET)", code)) <= ("logging.disable(logging.NOTSET)" in code)


# ---- README and the check that runs everywhere

def fenced(heading: str) -> list[tuple[str, str]]: # (language, text)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.findall(rf"^## {heading}$", readme, re.M)) == 1, f"README.md needs the heading '## {heading}' once"
    section = re.split(r"^## ", readme.split(f"## {heading}\n", 1)[1], flags=re.M)[0]
    return re.findall(r"^```(\w*)\n(.*?)^```$", section, re.M | re.S)


@pytest.mark.parametrize("heading", ["Run it", "Test it"])
def test_the_readme_has_one_command_to_copy(heading):
    blocks = fenced(heading)
    assert [language for language, _ in blocks] == ["bash"] and blocks[0][1].strip()


def test_the_check_calls_the_readmes_command():
    ((_, command),) = fenced("Test it")
    assert command.strip() in (ROOT / ".ci/run").read_text(encoding="utf-8"), ".ci/run calls the README's test command word for word"


def test_the_readme_runs_the_main_experiment():
    ((_, command),) = fenced("Run it")
    assert "papermill nbs/train_spin.ipynb out.ipynb -p epochs" in command
