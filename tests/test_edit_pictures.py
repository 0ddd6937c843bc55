"""The picture pyramid: block means of the micrograph, the preview where there is one, and nothing heavy in the server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from _once import once
from _picked import PLACES, micrograph, picked_project
from _web import make_project

from cryodask.edits.board import Board
from cryodask.edits.pictures import level, steps_of


def test_steps_end_with_that_of_the_preview() -> None:
    assert steps_of((4096, 4096)) == [1, 2, 4]
    assert steps_of((4092, 5760)) == [1, 2, 4, 6]
    assert steps_of((1024, 1000)) == [1]
    assert steps_of((16, 16)) == [1]
    assert steps_of((1300, 1700)) == [1, 2]


def test_levels_are_block_means_of_the_micrograph(tmp_path_factory: pytest.TempPathFactory) -> None:
    board = Board(once(tmp_path_factory, "picked", lambda folder: picked_project(folder, 6)) / "session")
    exposure, picture = board.exposure(2), micrograph(2)
    for step in steps_of(exposure.shape):
        found = level(exposure, step)
        rows, columns = (n // step for n in picture.shape)
        means = picture[: rows * step, : columns * step].reshape(rows, step, columns, step).mean((1, 3))
        wanted = np.clip((means - means.mean()) * (255 / 8 / means.std()) + 127.5, 0, 255)
        assert found.shape == (rows, columns)
        assert np.abs(found.astype(float) - wanted).max() < 2.1  # the last bit of previews is dropped
        for y, x in PLACES.astype(int):
            assert found[y // step, x // step] > 250
    assert board.exposure(2).crc != board.exposure(1).crc


def test_the_smallest_level_is_the_preview_that_motion_wrote(tmp_path: Path) -> None:
    make_project(tmp_path / "session")
    exposure = Board(tmp_path / "session").exposure(0)
    stored = exposure.generation.read(exposure.record, "micrograph_preview")[0]
    assert (level(exposure, steps_of(exposure.shape)[-1]) == stored).all()


def test_nothing_heavy_is_imported_to_edit() -> None:
    code = "import sys, cryodask.edits.board, cryodask.edits.shown, cryodask.web.routes.picking, cryodask.web.routes.classes;"
    code += "print([m for m in ('torch', 'xarray', 'dask', 'distributed', 'matplotlib', 'scipy', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
