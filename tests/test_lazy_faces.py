"""The lazy face of every map stage gives what the runner stored, bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from test_bad_input import PIXEL, frames_of, particle_project, star_of_particles

from cryodask.formats import star
from cryodask.formats.movies import write_tiff_movie
from cryodask.formats.mrc import write_mrc
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.stage import find_stage, load_stages
from cryodask.store.births import TABLE as BIRTH_TABLE
from cryodask.store.project import Project

MOVIES = """
name: m
inputs: {movies: "movies/*.tif", gain: gain.mrc}
microscope: {voltage_kv: 300, spherical_aberration_mm: 2.7, amplitude_contrast: 0.1, pixel_size_angstrom: 2.0, dose_per_frame: 5}
pipeline:
  - ingest
  - motion: {patches: [2, 2]}
  - ctf: {coarsest_angstrom: 40, finest_angstrom: 10}
  - pick: {diameter_angstrom: 60}
  - extract: {box: 64, scale_to: 32}
"""
MICROGRAPHS = """
name: m
inputs: {micrographs: m.star, coordinates: picks}
pipeline:
  - import_micrographs
  - import_picks
"""
TABLE = """
data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnVoltage #3
_rlnSphericalAberration #4
_rlnAmplitudeContrast #5
_rlnMicrographPixelSize #6
1 o 300 2.7 0.1 2.0

data_micrographs

loop_
_rlnMicrographName #1
_rlnOpticsGroup #2
"""


def of_movies(folder: Path) -> Path:
    (folder / "movies").mkdir()
    for i in range(3):
        write_tiff_movie(folder / "movies" / f"m{i}.tif", frames_of(i, size=256), PIXEL)
    gain = np.full((256, 256), 1.05, np.float32)  # a pattern that the movies lack would be refused
    gain[40, 50:53] = 0.0
    write_mrc(folder / "gain.mrc", gain, PIXEL)
    (folder / "m.yaml").write_text(MOVIES)
    return folder / "m.yaml"


def of_micrographs(folder: Path) -> Path:
    (folder / "picks").mkdir()
    for i in range(3):
        write_mrc(folder / f"m{i}.mrc", frames_of(i)[0].astype(np.float32), PIXEL)
        places = np.random.default_rng(i).uniform(0, 190, (2, 4 * i))  # the first has none
        star.write_coordinates(folder / "picks" / f"m{i}.star", *places)
    (folder / "m.star").write_text(TABLE + "".join(f"m{i}.mrc 1\n" for i in range(3)))
    (folder / "m.yaml").write_text(MICROGRAPHS)
    return folder / "m.yaml"


def of_particles(folder: Path) -> Path:
    star_of_particles(folder, count=25)  # one micrograph has more than the others
    return particle_project(folder, "import_particles")


STARTS = {
    of_movies: ("ingest", "motion", "ctf", "pick", "extract"),
    of_micrographs: ("import_micrographs", "import_picks"),
    of_particles: ("import_particles",),
}


@pytest.fixture(scope="module")
def projects(tmp_path_factory, client) -> dict[str, Project]:
    """A finished project for every map stage."""
    out: dict[str, Project] = {}
    for make, stages in STARTS.items():
        done = run_plan(make_plan(make(tmp_path_factory.mktemp(make.__name__))), client)
        assert done.failures() == []
        out |= dict.fromkeys(stages, done)
    return out


def test_no_map_stage_is_forgotten():
    own = {name for name, s in load_stages().items() if s.shape == "map" and s.home.startswith("cryodask.stages.")}
    # what another project or a person says, or a refinement found of particles, is given to the stage by the driver: there is no Dataset
    # that it could be applied to
    given = {"import_project", "edit_picks", "subtract", "polish"}
    assert {name for stages in STARTS.values() for name in stages} == own - given


def test_a_stage_that_takes_particle_images_says_that_it_is_for_runs():
    with pytest.raises(TypeError, match="subtract takes the particles of an exposure with their images"):
        find_stage("subtract")(xr.Dataset())


@pytest.mark.parametrize("name", [name for stages in STARTS.values() for name in stages])
def test_lazy_face_gives_what_the_runner_stored_bit_by_bit(projects, name):
    project, stage = projects[name], find_stage(name)
    stored = project[name].load()
    earlier = [project[label] for label in project.stages[: project.stages.index(name)]]
    inputs = xr.merge([project.micrographs(), *earlier], compat="override", join="inner")
    lazy = stage(inputs, **project.generation(name).meta["params"])
    assert all(array.chunks is not None for array in lazy.data_vars.values())
    lazy = lazy.compute(scheduler="sync")
    of_birth = {*BIRTH_TABLE, "pick_accepted", "pick_count"} if "birth" in project.generation(name).meta else set()
    assert set(lazy.data_vars) == set(stage.gives)
    assert set(stored.data_vars) == set(stage.gives) | of_birth
    for variable in lazy.data_vars:
        there, here = stored[variable], lazy[variable]
        assert here.dtype == there.dtype
        assert here.dims == there.dims
        for i in range(there.sizes["micrograph"]):
            one, other = there.values[i], here.values[i]
            ragged = {"slot": "particle_id", "left_out": "left_out_id", "defect": "hot_pixel"}.get("".join(there.dims[1:2]))
            if ragged:
                records = project.generation(name).committed()
                count = int(records[int(stored["row"][i])]["columns"][ragged]["shape"][0])
                one, other = one[:count], other[:count]
            same = one == other if isinstance(one, str) else one.tobytes() == other.tobytes()
            assert same, f"{name}.{variable} of {stored['micrograph'].values[i]}"
