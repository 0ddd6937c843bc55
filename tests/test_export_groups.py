"""Exports of several data sets: optics groups, gains and movies of each, in every file alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from distributed import Client

from cryodask.formats import star
from cryodask.formats.movies import open_movie, write_mrc_movie, write_tiff_movie
from cryodask.formats.mrc import read_mrc, write_mrc
from cryodask.interop import export_relion, relion
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan

SETS = {"krios": (300.0, 1.0), "glacios": (200.0, 1.25), "krios2": (300.0, 1.0)}
"""Voltage and pixel size."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """Noise of three data sets with gains of their own, of which the first has an MRC movie and the others TIFF movies."""
    folder, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    (folder / "picks").mkdir()
    inputs = []
    for i, (name, (voltage, pixel)) in enumerate(SETS.items()):
        (folder / f"d{i}").mkdir()
        gain = rng.normal(1.0, 0.02, (128, 128)).astype(np.float32)
        frames = rng.poisson(8.0 / gain, (3, 128, 128)).astype(np.uint8)
        if i == 0:
            write_mrc_movie(folder / "d0" / "m0.mrc", frames, pixel)
        else:
            write_tiff_movie(folder / f"d{i}" / f"m{i}.tif", frames, pixel)
        write_mrc(folder / f"gain{i}.mrc", gain, pixel)
        star.write_coordinates(folder / "picks" / f"m{i}.star", np.array([50.0, 70.0]), np.array([60.0, 64.0]))
        scope = {"voltage_kv": voltage, "spherical_aberration_mm": 2.7, "pixel_size_angstrom": pixel, "dose_per_frame": 1.0 + i}
        inputs.append({"name": name, "movies": f"d{i}/*", "gain": f"gain{i}.mrc", "microscope": scope})
    steps = [{"motion": {"patches": [1, 1]}}, {"import_picks": {"folder": "picks"}}]
    steps += [{"extract": {"box_angstrom": 60, "pixel_size_angstrom": 2.5, "background_diameter_angstrom": 45}}]
    (folder / "p.yaml").write_text(yaml.safe_dump({"name": "p", "inputs": inputs, "pipeline": steps}))
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as here:
        project = run_plan(make_plan(folder / "p.yaml"), here)
    assert project.failures() == []
    export_relion(project, folder / "relion")
    return folder


def test_each_data_set_is_an_optics_group_of_its_name(exported):
    micrographs = star.read_micrographs(exported / "relion" / "corrected_micrographs.star")
    particles = star.read_particles(exported / "relion" / "particles.star")
    assert micrographs["optics_group_name"].tolist() == ["krios", "glacios", "krios2"]
    assert micrographs["voltage_kv"].tolist() == [300.0, 200.0, 300.0]
    assert micrographs["pixel_size_angstrom"].tolist() == [1.0, 1.25, 1.0]
    assert particles["optics_group_name"].tolist() == ["krios"] * 2 + ["glacios"] * 2 + ["krios2"] * 2
    assert particles["voltage_kv"].tolist() == [300.0] * 2 + [200.0] * 2 + [300.0] * 2
    assert particles["pixel_size_angstrom"].tolist() == [1.0] * 2 + [1.25] * 2 + [1.0] * 2
    assert set(particles["particle_pixel_size_angstrom"]) == {2.5}


@pytest.mark.parametrize("i", range(3))
def test_the_motion_of_each_movie_names_its_own_gain_movie_and_dose(exported, i):
    folder = exported / "relion"
    general = star.read_tables(folder / "motion" / f"m{i}.star")["general"]
    assert float(general["rlnMicrographDoseRate"]) == 1.0 + i
    assert float(general["rlnVoltage"]) == list(SETS.values())[i][0]
    np.testing.assert_array_equal(read_mrc(folder / general["rlnMicrographGainName"])[0], read_mrc(exported / f"gain{i}.mrc")[0])
    link = folder / general["rlnMicrographMovieName"]
    assert link.suffix == (".mrcs", ".tif", ".tif")[i], "RELION takes .mrc for one image"
    original = next((exported / f"d{i}").iterdir())
    assert (np.asarray(open_movie(link)[2]) == np.asarray(open_movie(original)[2])).all()
    assert "rlnMicrographDefectFile" not in general


def test_an_export_is_written_again_in_the_same_folder(exported):
    from cryodask.store.project import Project

    before = {p.name: p.readlink() for p in (exported / "relion" / "movies").iterdir()}
    export_relion(Project(exported / "p"), exported / "relion")
    assert {p.name: p.readlink() for p in (exported / "relion" / "movies").iterdir()} == before


def test_the_same_particles_for_cryosparc(exported):
    """Positions as fractions of each micrograph, exposure groups, and uids that are the ids of the project."""
    from cryodask.formats import cryosparc
    from cryodask.interop import export_cryosparc
    from cryodask.store.project import Project

    written = export_cryosparc(Project(exported / "p"), exported / "cs")
    assert [path.name for path in written] == ["particles.csg", "particles.cs", "particles.mrcs"]
    table, known = cryosparc.read_particles(exported / "cs" / "particles.csg"), star.read_particles(exported / "relion" / "particles.star")
    assert table["cryosparc_uid"].tolist() == known["particle_id"].tolist()
    for name in ("particle_y", "particle_x", "pixel_size_angstrom", "particle_pixel_size_angstrom"):
        np.testing.assert_allclose(table[name], known[name], atol=1e-3, err_msg=name)
    assert table["contrast_sign"].tolist() == [1] * 6
    np.testing.assert_array_equal(read_mrc(exported / "cs/particles.mrcs")[0], read_mrc(exported / "relion/particles.mrcs")[0])


def test_a_name_that_relion_cannot_read_is_refused_before_anything_is_written(exported):
    from cryodask.errors import StarError
    from cryodask.interop.exposures import Exposures
    from cryodask.store.project import Project

    project = Project(exported / "p")
    exposures = Exposures.of(project)
    for name in ("a b", "a#", "it's", "tab\t"):
        vars(exposures)["items"] = {name: project.items()[0]}
        with pytest.raises(StarError, match="cannot read the name"):
            relion._check_names(exposures)
