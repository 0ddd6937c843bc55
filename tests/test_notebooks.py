"""The notebooks run from top to bottom, in a folder of their own, the second on the project of the first.

By default with less of everything (``LESS``): each cell runs, on fewer and smaller movies. The long suite runs them as they stand.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

LESS = {
    "processes=2)": "processes=1)",
    "workers=2)": "workers=1)",
    "movies=6, ": "movies=6, height=512, width=512, frames=4, dose_per_frame=10, particles=11, ",
    "dose_per_frame: 1.667}": "dose_per_frame: 10}",
    "  - motion\n": "  - motion: {patches: [1, 1]}\n",
    "classify2d: {classes: 6}": "classify2d: {classes: 2, iterations: 3}",
    "restarts: 2, steps: 50": "restarts: 1, steps: 10",
    "symmetry: D2, iterations: 5}": "symmetry: D2, iterations: 1}",
    "workers: 3": "workers: 2",
    "MOVIES = 24": "MOVIES = 4",
    "parts[i::8] for i in range(8)": "parts[i::4] for i in range(4)",
    "frames=8, dose_per_frame=5,": "frames=4, dose_per_frame=10,",
    "dose_per_frame: 5}": "dose_per_frame: 10}",
    "patches: [3, 3]": "patches: [1, 1]",
    "while session.is_alive() or len(training) < 15:": "while len(training) < 2:",
    "* 420,": "* 12,",
    "range(48)": "range(4)",
    "step, width = 0.25, 4.0": "step, width = 0.25, 0.5",
}


def run(path: Path, folder: Path, changes: dict[str, str]) -> set[str]:
    """Run a notebook and keep it there with its pictures; returns those changes that found their place in it."""
    notebook = nbformat.read(path, as_version=4)
    found = set()
    for cell in notebook.cells:
        for old, new in changes.items():
            if cell.cell_type == "code" and old in cell.source:
                cell.source = cell.source.replace(old, new)
                found.add(old)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    pictures = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 3
    nbformat.write(notebook, folder / path.name)
    return found


@pytest.mark.heavy
def test_the_notebooks_run_on_a_small_session(tmp_path):
    found: set[str] = set()
    for path in NOTEBOOKS:
        found |= run(path, tmp_path, LESS)
    assert found == set(LESS), "a change that finds no place makes nothing smaller"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, workplace):
    run(path, workplace, {})
