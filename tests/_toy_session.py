"""A finished project of toy stages: made once per pytest run, and copied for each test that changes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import _toy_stages as toys
import numpy as np
import pytest
import yaml
from _once import once
from distributed import Client

from cryodask.formats.movies import write_mrc_movie
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.store.project import Project

MOVIES = 6
PIPELINE: list[object] = ["toy_motion", "toy_ctf", "toy_pick", "toy_extract", "toy_classify", "toy_refine", "toy_mask"]


def run(folder: Path, client: Client, listen: list[str] | None = None, **wanted: object) -> Project:
    """Run the project file of a folder; what the run says is added to ``listen``."""

    def hear(event: object) -> None:
        if listen is not None and hasattr(event, "text"):
            listen.append(str(event.text))

    return run_plan(make_plan(folder / "toy.yaml"), client, listen=[hear], **wanted)


def change(folder: Path, place: int, step: object) -> None:
    """Replace a step of the pipeline."""
    content = yaml.safe_load((folder / "toy.yaml").read_text())
    content["pipeline"][place] = step
    (folder / "toy.yaml").write_text(yaml.safe_dump(content))


def finished(factory: pytest.TempPathFactory, client: Client, target: Path) -> Path:
    """A copy of the finished project in ``target``: ``toy.yaml``, ``movies/`` and the results in ``toy/``."""

    def make(folder: Path) -> None:
        (folder / "movies").mkdir()
        for number in range(MOVIES):
            frames = np.random.default_rng(number).poisson(2.0, (3, 16, 16)).astype(np.uint8)
            write_mrc_movie(folder / "movies" / f"m{number}.mrc", frames, 1.0)
        project = {
            "name": "toy",
            "inputs": {"movies": "movies/*.mrc"},
            "microscope": {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "pixel_size_angstrom": 1.0},
            "pipeline": PIPELINE,
        }
        (folder / "toy.yaml").write_text(yaml.safe_dump(project))
        assert toys.BOX
        run(folder, client)

    shutil.copytree(once(factory, "toy-session", make), target, dirs_exist_ok=True)
    return target
