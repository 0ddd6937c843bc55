"""The notebooks run from top to bottom, in a folder of their own, the second on the project of the first."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, workplace):
    shutil.copy(path, workplace)
    notebook = nbformat.read(workplace / path.name, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(workplace)}}).execute()
    pictures = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 3
    nbformat.write(notebook, workplace / path.name)
