"""Real particles (EMPIAR-10204, beta-galactosidase) through the runner: import, classes, refinement, post-processing, export."""

from __future__ import annotations

import bz2

import mrcfile
import numpy as np
import pytest

from cryodask.formats import star
from cryodask.interop import export_relion, project_from
from cryodask.kernels.fsc import fsc
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan

COUNT = 700


@pytest.fixture(scope="module")
def project(shared, client, tmp_path_factory):
    folder = tmp_path_factory.mktemp("betagal")
    with mrcfile.open(shared / "data" / "betagal_10204" / "particles_64.mrcs.bz2") as file:
        images = file.data[:COUNT]
    with mrcfile.new(folder / "particles_64.mrcs") as file:
        file.set_data(images)
        file.set_image_stack()
        file.voxel_size = 3.54
    tables = star.read_tables(shared / "data" / "betagal_10204" / "particles.star")
    tables["particles"] = tables["particles"].iloc[:COUNT].copy()
    numbers = np.arange(1, COUNT + 1)
    tables["particles"]["rlnImageName"] = [f"{n:06d}@particles_64.mrcs" for n in numbers]
    star.write_tables(folder / "particles.star", tables)
    (folder / "ngl.mrc").write_bytes(bz2.decompress((shared / "data" / "models" / "betagal_ngl_100_3.54A.mrc.bz2").read_bytes()))
    project_from(folder / "particles.star", folder / "written.yaml")
    assert "particles.star" in (folder / "written.yaml").read_text()
    (folder / "p.yaml").write_text(
        "name: betagal\ninputs: {particles: particles.star}\npipeline:\n"
        "  - classify2d: {classes: 3, iterations: 3, mask_diameter_angstrom: 200}\n"
        "  - refine3d: {symmetry: D2, reference: ngl.mrc, mask_diameter_angstrom: 200, iterations: 5}\n  - mask\n  - postprocess\n"
    )
    return run_plan(make_plan(folder / "p.yaml"), client)


@pytest.mark.heavy
def test_particles_keep_their_micrographs_and_their_ctf(project):
    particles = project.particles()
    assert particles.sizes["particle"] == COUNT
    # the tutorial's own values lie between 0.8 and 1.2 um (data/README.md)
    mean = 0.5 * (particles["defocus_u_angstrom"] + particles["defocus_v_angstrom"])
    assert float(mean.min()) > 7500
    assert float(mean.max()) < 12500
    assert float(particles["voltage_kv"][0]) == 200


def test_refinement_of_real_particles_agrees_with_the_known_map(project, shared):
    """Soft figures for a third of the data; benchmarks/real_betagal.py has the full set (half-map FSC 0.71 at 9.06 A)."""
    with mrcfile.open(shared / "data" / "models" / "betagal_ngl_100_3.54A.mrc.bz2") as file:
        known = file.data[18:82, 18:82, 18:82].copy()
    import torch

    from cryodask.kernels.fourier import soft_sphere

    sphere = soft_sphere(64, 3.54, 95.0, 10.0)
    halves = torch.from_numpy(project["refine3d"]["half_map"].values)
    curve = fsc(halves.mean(0) * sphere, torch.from_numpy(known) * sphere)
    assert float(curve[15]) > 0.6  # 15.1 A; the starting map is zero beyond 40 A
    assert float(project["postprocess"]["resolution_angstrom"]) < 13.0


def test_poses_and_halves_are_exported(project, tmp_path):
    export_relion(project, tmp_path)
    columns = star.read_particles(tmp_path / "particles.star")
    assert len(columns["rot_deg"]) == COUNT
    assert np.isfinite(columns["origin_x_angstrom"]).all()
    assert set(columns["half_set"]) == {0, 1}
