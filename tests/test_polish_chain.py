"""Polishing within a project: from imported poses to new images with the same ids, the refinement after it, report and export."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from _relion import MAPS, PROJECT, exported

from cryodask.formats import star
from cryodask.interop import export_relion
from cryodask.kernels.particle_motion import field_at
from cryodask.report import write_report
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan

pytestmark = pytest.mark.slow
STEPS = "  - polish: {box: 128, scale_to: 64}\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory, client):
    folder = tmp_path_factory.mktemp("polished")
    session = exported(tmp_path_factory, client)
    for name in ("movies", "gain.mrc", "truth.star", "half1.mrc", "half2.mrc"):
        (folder / name).symlink_to(session / name)
    (folder / "p.yaml").write_text(PROJECT.replace("dose_per_frame: 6.667", "dose_per_frame: 6.6667") + MAPS + STEPS)
    return run_plan(make_plan(folder / "p.yaml"), client)


def test_particles_keep_their_ids_halves_and_poses(project):
    before, after = (project.particles(name).load() for name in ("extract", "polish"))
    known = dict(zip(before["particle_id"].values.tolist(), range(before.sizes["particle"])))
    rows = [known[i] for i in after["particle_id"].values.tolist()]
    assert after.sizes["particle"] >= before.sizes["particle"] - 4
    for name in ("half_set", "rot_deg", "tilt_deg", "psi_deg", "position_y_angstrom"):
        np.testing.assert_array_equal(after[name].values, before[name].values[rows])
    assert after["particle_image"].shape[1:] == (64, 64)
    assert (np.abs(after["origin_y_angstrom"].values) < 1e-3).all()
    assert np.isfinite(after["signal_amount"].values).all()
    # a later step takes the new micrographs
    assert project.product("polish", "particles").exposures["micrograph"] == project.step("polish").place


def test_the_report_has_a_section(project, tmp_path):
    text = write_report(project, tmp_path / "report.html").read_text()
    for title in ("Polishing", "Signal gained", "Motion before and after"):
        assert title in text


def test_the_export_has_the_tracks_of_the_particles(project, tmp_path):
    export_relion(project, tmp_path)
    particles = star.read_particles(tmp_path / "particles.star")
    polished = project["polish"]
    for name in polished["micrograph"].values.tolist():
        tables = star.read_tables(tmp_path / "polish" / "micrographs" / f"{name}_tracks.star")
        here = particles["micrograph_name"] == f"micrographs/{name}.mrc"
        assert int(tables["general"]["rlnParticleNumber"]) == here.sum()
        places = np.stack([particles["particle_y"], particles["particle_x"]], -1)[here]
        field = field_at(polished["patch_shift"].sel(micrograph=name).values, places, (512, 512))
        first = tables["0"][["rlnOriginYAngst", "rlnOriginXAngst"]].to_numpy(float)
        np.testing.assert_allclose(first, field[0] - field[0, :1], atol=0.05)
    assert len(list(Path(tmp_path / "motion").glob("*.star"))) == 4
    shutil.rmtree(tmp_path / "polish")
