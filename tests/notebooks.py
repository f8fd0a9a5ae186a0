"""Experiments in this process, cell by cell: refusals need no kernel of their own, which takes ten seconds to start."""
import logging
import os
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import matplotlib
import nbformat

ROOT = Path(__file__).parents[1]


@contextmanager
def quiet_place(folder: Path):
    "Runs and caches in a folder, which is the working directory; the log and the plots stay as they are."
    here, places = Path.cwd(), dict(AERIAL_RUNS=str(folder / "runs"), AERIAL_CACHE=str(folder / "cache"))
    os.chdir(folder)
    try:
        with mock.patch.dict(os.environ, places), mock.patch.object(logging, "basicConfig"), matplotlib.rc_context({"backend": "agg"}): yield
    finally: os.chdir(here)


def play(notebook: str, folder: Path, until: str = "check_parameters(", **params) -> dict:
    """Run the code cells of nbs/NOTEBOOK with parameters injected as papermill injects them, up to the first cell that holds
    `until`; raises what the cells raise, and returns their names."""
    space, seen = {"__name__": "__main__", "In": [""]}, False
    with quiet_place(folder):
        for cell in nbformat.read(ROOT / "nbs" / notebook, as_version=4).cells:
            if cell.cell_type != "code" or "google.colab" in cell.source: continue
            sources = [cell.source]
            if "parameters" in cell.metadata.get("tags", []):
                sources.append("# Parameters\n" + "\n".join(f"{k} = {v!r}" for k, v in params.items())); seen = True
            for source in sources:
                space["In"].append(source)
                exec(compile(source, notebook, "exec"), space)
            if seen and until in cell.source and len(sources) == 1: return space
    raise AssertionError(f"no cell of {notebook} holds {until!r}")
