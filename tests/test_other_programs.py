"""The page docs/other-programs.md: its package is installed, its commands are carried out, and its program fails."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from _fresh import Fresh
from _once import simulated
from test_docs import blocks
from test_plugins import install

import cryodask
from cryodask.simulate import SessionParams
from cryodask.store.project import Project

PAGE = Path(__file__).parents[1] / "docs" / "other-programs.md"
pytestmark = pytest.mark.relion


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("programs")
    simulated(
        tmp_path_factory, made, SessionParams(movies=3, height=384, width=384, frames=3, dose_per_frame=10, particles=8, truth_maps=())
    )
    (made / "package").mkdir()
    for text in blocks(PAGE, "toml", "python", "yaml"):
        name = re.match(r"# ([\w.]+)\n", text)[1]
        ((made if name.endswith(".yaml") else made / "package") / name).write_text(text)
    install(made / "package", made / "installed")
    return made


@pytest.fixture(scope="module")
def fresh() -> Iterator[Fresh]:
    with Fresh() as made:
        yield made


def logs(project: Project) -> list[Path]:
    return sorted((project.generation("relion_lowpass").path / "logs").iterdir())


@pytest.mark.heavy
def test_the_commands_of_the_page_work_and_the_log_of_each_exposure_is_kept(folder, fresh):
    (text,) = blocks(PAGE, "sh")
    made, *lines = text.strip().splitlines()
    assert made == "pip install ./lowpass"
    for line in lines:
        shown = fresh.shell(line, folder, folder / "installed")
        assert shown.returncode == 0, shown.stderr
    project = cryodask.open(folder / "session")
    step, before = project["relion_lowpass"], project["motion"]
    assert step.sizes["micrograph"] == 3
    fine = np.hypot(np.fft.fftfreq(384, 1.77)[:, None], np.fft.rfftfreq(384, 1.77)) > 1 / 20
    low, whole = (
        (abs(np.fft.rfft2(image.values)) ** 2)[fine].sum() for image in (step["micrograph_lowpass"][0], before["micrograph_sum"][0])
    )
    assert low < 1e-4 * whole
    assert len(logs(project)) == 3
    for record in project.records("relion_lowpass").values():
        log = project.generation("relion_lowpass").path / record["log"]
        assert log.read_text().startswith("$ relion_image_handler --i in.mrc --o out.mrc --lowpass 30.0 --angpix 1.77\n")
    assert str(project.generation("relion_lowpass").meta["version"]).startswith("1 with relion_image_handler ")


@pytest.mark.heavy
def test_an_exposure_whose_program_fails_is_quarantined_with_the_last_lines_and_the_others_go_on(folder, fresh, tmp_path, monkeypatch):
    for name in ("movies", "session.yaml"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "relion_image_handler"
    program.write_text(
        f"""#!/bin/bash
[ "$1" = --version ] && echo "RELION version: 9.9 " && exit
mkdir {tmp_path}/first && echo "ERROR: lost its licence" && exit 4
cp in.mrc out.mrc
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    shown = fresh.shell("cryodask run session.yaml --workers 1", tmp_path, folder / "installed")
    assert shown.returncode == 0, shown.stderr
    project = cryodask.open(tmp_path / "session")
    (failure,) = project.failures()
    assert failure["error"] == "ProgramError"
    assert re.search(
        r"failed with exit status 4; its last lines; the full output is in .*\.log:\n  \| ERROR: lost its licence", failure["message"]
    )
    assert project["relion_lowpass"].sizes["micrograph"] == 2
    assert len(logs(project)) == 3, "that of the failure is kept"
    shown = fresh.shell("cryodask run session.yaml --workers 1 --retry-quarantined", tmp_path, folder / "installed")
    assert shown.returncode == 0, shown.stderr
    assert cryodask.open(tmp_path / "session")["relion_lowpass"].sizes["micrograph"] == 3
    assert np.isfinite(cryodask.open(tmp_path / "session")["relion_lowpass"]["micrograph_lowpass"].values).all()
