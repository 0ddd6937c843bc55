"""Programs of others as stages: RELION's post-processing, from half-maps and a mask to curves and a map."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
import yaml
from _command import command
from _particles import blob_map
from _told import Told
from distributed import Client, LocalCluster

from cryodask.errors import ProgramError, ProjectFileError
from cryodask.formats.mrc import write_mrc
from cryodask.run.preview import preview
from cryodask.run.recipe import make_plan
from cryodask.run.session import check_inputs, run_plan
from cryodask.store.project import Project

N, PIXEL = 48, 4.0
RUN = {"external.relion_postprocess": {"fit_from_angstrom": 20, "seed": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Half-maps of a molecule with noise, a mask, and a project file."""
    made = tmp_path_factory.mktemp("maps")
    rng = np.random.default_rng(3)
    volume = blob_map(N, "D2").numpy()
    for half in (1, 2):
        noise = rng.normal(size=volume.shape) * volume.std() * 0.5
        write_mrc(made / f"half{half}.mrc", (volume + noise).astype(np.float32), PIXEL)
    radius = np.sqrt(sum((axis - N // 2) ** 2 for axis in np.indices((N, N, N))))
    write_mrc(made / "mask.mrc", np.clip((20 - radius) / 4, 0, 1).astype(np.float32), PIXEL)
    write(made, [RUN])
    return made


@pytest.fixture
def here(folder, tmp_path) -> Path:
    """The same in a folder of its own."""
    return Path(shutil.copytree(folder, tmp_path / "p", ignore=shutil.ignore_patterns("p", "q", "byhand")))


def write(folder: Path, steps: list, name: str = "p") -> Path:
    content = {
        "name": name,
        "inputs": {"half_maps": ["half1.mrc", "half2.mrc"]},
        "pipeline": [{"import_mask": {"file": "mask.mrc"}}, *steps],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder / f"{name}.yaml"


@pytest.fixture(scope="module")
def threads():
    """A worker in this process: it has the PATH of the test."""
    with LocalCluster(1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster, Client(cluster) as client:
        yield client


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put a program of that name before RELION's on the PATH; it is given a version and lines of shell."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def make(version: str, lines: str) -> None:
        path = tmp_path / "bin" / "relion_postprocess"
        path.with_suffix(".new").write_text(
            f'#!/bin/bash\n[ "$1" = --version ] && {{ echo "RELION version: {version} "; exit; }}\n{lines}\n'
        )
        path.with_suffix(".new").chmod(0o755)
        path.with_suffix(".new").rename(path)

    return make


def lines_that_work(folder: Path) -> str:
    """Of a program that writes what RELION wrote before."""
    return f"cp {folder}/before.star out/relion.star; cp {folder}/before.mrc out/relion.mrc; echo worked"


# --- RELION itself -----------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def by_hand(folder) -> tuple[dict, np.ndarray]:
    (folder / "byhand").mkdir()
    command = "relion_postprocess --i half1.mrc --i2 half2.mrc --mask mask.mrc --force_mask --o byhand/pp --angpix 4 --auto_bfac"
    done = subprocess.run(f"{command} --autob_lowres 20 --random_seed 1".split(), cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return starfile.read(folder / "byhand" / "pp.star"), mrcfile.read(folder / "byhand" / "pp.mrc")


@pytest.fixture(scope="module")
def done(folder, client) -> Project:
    return run_plan(make_plan(write(folder, [RUN, {"postprocess": {"fit_from_angstrom": 20}}], "q")), client)


@pytest.mark.relion
def test_the_stage_gives_what_relion_gives_when_it_is_run_by_hand(by_hand, done):
    theirs, volume = by_hand
    ours = done["relion_postprocess"]
    for name, relion in {
        "fsc_unmasked": "rlnFourierShellCorrelationUnmaskedMaps",
        "fsc_masked": "rlnFourierShellCorrelationMaskedMaps",
        "fsc_randomised": "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps",
        "fsc_corrected": "rlnFourierShellCorrelationCorrected",
    }.items():
        assert np.array_equal(ours[name].values, theirs["fsc"][relion].to_numpy()), name
    assert float(ours["resolution_angstrom"]) == theirs["general"]["rlnFinalResolution"]
    assert float(ours["b_factor_angstrom2"]) == theirs["general"]["rlnBfactorUsedForSharpening"]
    assert np.array_equal(ours["sharpened_map"].values, volume)
    assert ours["shell_resolution_angstrom"].values[0] == np.inf
    assert ours["shell_resolution_angstrom"].values[1] == pytest.approx(N * PIXEL)


@pytest.mark.relion
def test_relion_and_our_own_postprocess_agree(done):
    theirs, ours = done["relion_postprocess"], done["postprocess"]
    # measured: 0.0017, 0.0028 and 0.015; RELION draws the random phases once
    for name, limit in (("fsc_unmasked", 0.003), ("fsc_masked", 0.005), ("fsc_corrected", 0.025)):
        assert float(((theirs[name] - ours[name]) ** 2).mean()) ** 0.5 < limit, name
    # RELION does not interpolate between shells
    shell = int(np.argmin(abs(theirs["shell_resolution_angstrom"].values - float(theirs["resolution_angstrom"]))))
    assert float(ours["resolution_angstrom"]) <= float(theirs["resolution_angstrom"]) + 1e-6
    assert float(ours["resolution_angstrom"]) >= theirs["shell_resolution_angstrom"].values[shell + 1]
    assert float(ours["b_factor_angstrom2"]) == pytest.approx(float(theirs["b_factor_angstrom2"]), rel=0.1)


@pytest.mark.relion
def test_the_log_is_kept_with_the_result_scratch_is_gone_and_the_version_is_in_the_key(done):
    generation = done.generation("relion_postprocess")
    log = (generation.path / "logs" / "result.log").read_text()
    assert log.startswith("$ relion_postprocess --force_mask --auto_bfac --i half1.mrc")
    assert "Fitting straight line through Guinier plot" in log
    assert generation.meta["version"].startswith("1 with relion_postprocess ")
    assert done.history("relion_postprocess")[-1].version == generation.meta["version"]


@pytest.mark.relion
def test_the_report_has_its_curves_and_map(done, tmp_path):
    from cryodask.report import write_report

    page = write_report(done, tmp_path / "r.html").read_text()
    assert "that of the last shell before RELION" in page
    assert "A figure failed" not in page


# --- its version -------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def before(here, by_hand, folder) -> Path:
    for ending in ("star", "mrc"):
        shutil.copy(folder / "byhand" / f"pp.{ending}", here / f"before.{ending}")
    return here


@pytest.mark.relion
def test_another_version_never_computes_unasked_and_has_a_key_of_its_own(before, threads, fake, monkeypatch):
    plan = make_plan(before / "p.yaml")
    fake("4.0.1", lines_that_work(before))
    first = run_plan(plan, threads).generation("relion_postprocess").path
    fake("5.0", "exit 9")
    patient = make_plan(write(before, [{"external.relion_postprocess": {**RUN["external.relion_postprocess"], "timeout_seconds": 99}}]))
    assert run_plan(patient, threads).generation("relion_postprocess").path == first, "a limit is no part of the key"
    plan = make_plan(write(before, [RUN]))
    told = Told()
    project = run_plan(plan, threads, listen=[told])
    assert project.generation("relion_postprocess").path == first
    assert any(
        "version 1 with relion_postprocess 4.0.1; --update relion_postprocess recomputes it with version 1 with relion_postprocess 5.0"
        in text
        for text in told.said
    ), told.said
    shown = next(step for step in preview(plan).steps if step.step == "relion_postprocess")
    assert (shown.done, shown.why) == (True, "version 1 with relion_postprocess 5.0 (done with 1 with relion_postprocess 4.0.1)")
    fake("5.0", lines_that_work(before))
    project = run_plan(plan, threads, update=["relion_postprocess"])
    assert project.generation("relion_postprocess").path != first
    assert project.generation("relion_postprocess").meta["version"] == "1 with relion_postprocess 5.0"
    monkeypatch.setenv("PATH", str(before))
    assert check_inputs(plan) == [], "what is finished needs no program"
    assert run_plan(plan, threads).generation("relion_postprocess").committed()


# --- failures ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("lines", "said", "timeout_seconds"),
    [
        (
            "seq 50; echo 'ERROR: half-maps of another box'; exit 3",
            r"failed with exit status 3; (?s:.*)\| 50\n.*half-maps of another box",
            300,
        ),
        ("cp half1.mrc out/relion.mrc; echo wrote half of it", r"did not write out/relion.star; (?s:.*)wrote half of it", 300),
        ("cp half1.mrc out/relion.mrc; echo nonsense > out/relion.star", "wrote a STAR file that cannot be read", 300),
        ("echo waiting; sleep 3600", r"took longer than 5 s and was killed; (?s:.*)waiting", 5),
    ],
)
def test_what_fails_ends_with_the_last_lines_of_the_log_and_the_next_run_goes_on(here, threads, fake, lines, said, timeout_seconds):
    fake("4.0.1", lines)
    path = write(here, [{"external.relion_postprocess": {"timeout_seconds": timeout_seconds}}])
    with pytest.raises(ProgramError, match=said):
        run_plan(make_plan(path), threads)
    project = Project(here / "p")
    log = project.generation("relion_postprocess").path / "logs" / "result.log"
    assert log.read_text().startswith("$ relion_postprocess")
    assert not project.generation("relion_postprocess").committed()


def test_without_the_program_a_run_is_refused_before_work_with_the_way_out(here, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    plan = make_plan(here / "p.yaml")
    with pytest.raises(ProjectFileError, match=r"relion_postprocess is not on the PATH .*apt-get install relion"):
        check_inputs(plan)
    assert not (here / "p" / "stages").exists() or not list((here / "p" / "stages").iterdir())
    shown = command("run", "p.yaml", "--dry-run", "--json", folder=here)
    assert shown.returncode == 2
    (problem, *_) = json.loads(shown.stdout)["problems"]
    assert "relion_postprocess is not on the PATH" in problem
