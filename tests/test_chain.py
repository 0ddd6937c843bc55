"""The whole chain on a tiny simulated session: movies in, map and report out, on a real local cluster; killed and resumed."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import xarray as xr
from _once import simulated

from cryodask.errors import GainError, InputError, ItemError
from cryodask.formats import star
from cryodask.interop import export_relion
from cryodask.report import write_report
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.simulate import SessionParams
from cryodask.store.journal import content_crc
from cryodask.store.project import Project

PROJECT = """
name: tiny
inputs: {movies: "movies/*.tif", gain: gain.mrc}
microscope: {voltage_kv: 300, spherical_aberration_mm: 2.7, amplitude_contrast: 0.1, pixel_size_angstrom: 1.77, dose_per_frame: 6.667}
pipeline:
  - motion: {patches: [3, 3]}
  - ctf
  - pick: {diameter_angstrom: 180}
  - extract: {box: 128, scale_to: 32}
  - classify2d: {classes: 2, iterations: 4}
  - curate
  - ab_initio: {symmetry: D2, restarts: 2, steps: 20}
  - refine3d: {symmetry: D2, iterations: 2}
  - mask
  - postprocess
workers: 2
"""
PARAMS = SessionParams(movies=6, height=512, width=512, frames=6, dose_per_frame=40 / 6, particles=11, truth_maps=((32, 7.08),))


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("session")
    simulated(tmp_path_factory, folder, PARAMS)
    (folder / "tiny.yaml").write_text(PROJECT)
    return folder


@pytest.fixture(scope="module")
def done(session, client) -> Project:
    return run_plan(make_plan(session / "tiny.yaml"), client)


def contents(project: Project) -> dict[tuple[str, int], int]:
    """What every record says of its item: columns and checksums of the shards, not where and when."""
    return {(label, row): content_crc(record) for label in project.stages for row, record in project.generation(label).records().items()}


def test_every_stage_is_finished_and_intact(done):
    assert done.stages == [
        "ingest", "motion", "ctf", "pick", "extract", "classify2d", "curate", "ab_initio", "refine3d", "mask", "postprocess",
    ]  # fmt: skip
    assert done["motion"].sizes["micrograph"] == 6
    assert done.verify() == []
    assert done.failures() == []
    assert 6 * 8 <= done["curate"].sizes["particle"] <= 6 * 12
    assert np.isfinite(float(done["postprocess"]["resolution_angstrom"]))


def test_lazy_face_gives_what_the_runner_stored_bit_by_bit(done):
    everything = done.joined()
    stages = {"motion": {"patches": (3, 3)}, "ctf": {}, "pick": {"diameter_angstrom": 180}, "extract": {"box": 128, "scale_to": 32}}
    import cryodask.stages as face

    inputs = xr.merge([done.micrographs(), done["ingest"], done["motion"], done["ctf"], done["pick"]], compat="override", join="inner")
    inputs = inputs.isel(micrograph=slice(0, 2))
    assert "micrograph_sum" in everything
    for name, params in stages.items():
        stored = done[name].isel(micrograph=slice(0, 2)).load()
        lazy = getattr(face, name)(inputs, **params).compute(scheduler="sync")
        of_birth = {"particle_id", "particle_half", "pick_accepted", "pick_count"} if name == "pick" else set()
        assert set(stored.data_vars) - of_birth == set(lazy.data_vars)
        for variable in lazy.data_vars:
            there, here = stored[variable].values, lazy[variable].values
            here = here[tuple(slice(0, n) for n in there.shape)]
            if stored[variable].dims[1:2] == ("defect",):
                counts = [(one[:, 0] >= 0).sum() for one in there]
                assert all((a[:n] == b[:n]).all() and (b[n:] == -1).all() for a, b, n in zip(there, lazy[variable].values, counts))
                continue
            ragged = {"slot": "particle_id", "left_out": "left_out_id"}.get("".join(stored[variable].dims[1:2]))
            if ragged:
                counts = (stored[ragged].values >= 0).sum(1)
                for a, b, n in zip(there, here, counts):
                    np.testing.assert_array_equal(a[:n], b[:n], err_msg=f"{name}.{variable}")
            else:
                np.testing.assert_array_equal(there, here, err_msg=f"{name}.{variable}")


def test_export_is_what_relion_reads(done, tmp_path):
    export_relion(done, tmp_path)
    micrographs = star.read_micrographs(tmp_path / "micrographs_ctf.star")
    particles = star.read_particles(tmp_path / "particles.star")
    assert len(micrographs["defocus_u_angstrom"]) == 6
    count = done["refine3d"].sizes["particle"]
    assert len(particles["rot_deg"]) == count
    assert set(particles["half_set"]) == {0, 1}
    assert particles["tilt_deg"].max() <= 90.0, "the asymmetric unit of D2"
    assert (particles["rot_deg"] >= 0.0).all()
    with mrcfile.open(tmp_path / "particles.mrcs") as file:
        assert file.data.shape == (count, 32, 32)
        assert file.voxel_size.x == pytest.approx(7.08)
    for name in ("half1.mrc", "half2.mrc", "map.mrc", "mask.mrc"):
        assert mrcfile.read(tmp_path / name).shape == (32, 32, 32)
    assert (tmp_path / "class_averages.star").exists()
    assert (tmp_path / "motion" / "movie_0001.star").exists()
    assert len(star.read_coordinates(tmp_path / "coordinates" / "micrographs" / "movie_0003.star")["particle_x"]) > 5
    assert float(star.read_tables(tmp_path / "postprocess.star")["general"]["rlnFinalResolution"]) > 0


def test_report_is_one_page_that_says_what_it_must(done, tmp_path):
    page = write_report(done, tmp_path / "r.html").read_text()
    for text in (
        "refined independently",
        "handedness is undetermined",
        "first interpolated crossing",
        "refine3d",
        "timings",
        "None: every input",
    ):
        assert text in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert page.count("data:image/png;base64") >= 12


def test_project_shows_itself_in_text_and_html(done):
    assert "refine3d" in repr(done)
    assert "<table>" in done._repr_html_()
    particles = done.particles("extract")
    assert particles.sizes["particle"] == done["extract"]["particle_count"].sum()
    assert particles["particle_image"].isel(particle=0).values.std() > 0
    refined = done.particles()
    assert refined["particle_id"].values.tolist() == done["refine3d"]["particle_id"].values.tolist()
    assert np.isfinite(refined["rot_deg"].values).all()
    assert set(refined["half_set"].values) == {0, 1}


def test_nothing_is_done_twice_and_a_changed_parameter_renews_what_depends_on_it(session, done, client):
    before = {label: done.generation(label).key for label in done.stages}
    (session / "changed.yaml").write_text(PROJECT.replace("iterations: 4", "iterations: 5"))
    changed = run_plan(make_plan(session / "changed.yaml"), client, until="curate")
    after = {label: changed.generation(label).key for label in changed.stages}
    assert {k for k in after if after[k] != before[k]} == {"classify2d", "curate"}
    assert "refine3d" not in after  # computed from particles that are no longer the curated ones
    again = run_plan(make_plan(session / "tiny.yaml"), client)
    assert {label: again.generation(label).key for label in again.stages} == before


def test_a_bad_movie_among_good_ones_is_quarantined_and_reported(session, client, tmp_path):
    shutil.copytree(session / "movies", tmp_path / "movies")
    shutil.copy(session / "gain.mrc", tmp_path)
    whole = (tmp_path / "movies" / "movie_0002.tif").read_bytes()
    (tmp_path / "movies" / "movie_0002.tif").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "movies" / "movie_0009.tif").write_bytes(b"no movie at all")
    (tmp_path / "tiny.yaml").write_text(PROJECT)
    project = run_plan(make_plan(tmp_path / "tiny.yaml"), client, until="ctf")
    assert {f["name"] for f in project.failures()} == {"movie_0002", "movie_0009"}
    assert project["ctf"].sizes["micrograph"] == 5
    page = write_report(project).read_text()
    assert "movie_0002" in page
    assert "MovieError" in page


def test_a_gain_in_another_orientation_is_refused_before_any_movie_is_processed(session, client, tmp_path):
    for source in ("movies", "gain.mrc"):
        os.symlink(session / source, tmp_path / source)
    (tmp_path / "tiny.yaml").write_text(PROJECT.replace("gain: gain.mrc", "gain: gain.mrc, gain_flip: up-down"))
    with pytest.raises(GainError, match="flip"):
        run_plan(make_plan(tmp_path / "tiny.yaml"), client, until="motion")
    with mrcfile.new(tmp_path / "small.mrc") as file:
        file.set_data(np.ones((512, 256), np.float32))
    (tmp_path / "tiny.yaml").write_text(PROJECT.replace("gain: gain.mrc", "gain: small.mrc"))
    with pytest.raises(GainError, match="512 x 256"):
        run_plan(make_plan(tmp_path / "tiny.yaml"), client, until="motion")


def test_no_readable_input_at_all_stops_with_the_reason(client, tmp_path):
    (tmp_path / "movies").mkdir()
    for i in range(3):
        (tmp_path / "movies" / f"m{i}.tif").write_bytes(b"")
    (tmp_path / "tiny.yaml").write_text(PROJECT.replace(", gain: gain.mrc", ""))
    with pytest.raises((InputError, ItemError)):
        run_plan(make_plan(tmp_path / "tiny.yaml"), client, until="motion")


def test_the_example_of_the_readme_runs(session, done, client, tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```", readme, re.S).group(1)
    for source in ("movies", "gain.mrc"):
        os.symlink(session / source, tmp_path / source)
    # in a copy of a finished project nothing is computed again
    (tmp_path / "betagal.yaml").write_text(PROJECT.replace("name: tiny", "name: betagal"))
    shutil.copytree(done.path, tmp_path / "betagal")
    kept = {label: done.generation(label).key for label in ("motion", "curate")}
    for here, there in (('connect("local", workers=2)', f'connect("{client.scheduler.address}")'), ("client.shutdown()", "client.close()")):
        assert here in example
        example = example.replace(here, there)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip().endswith("True")
    again = Project(tmp_path / "betagal")
    assert {label: again.generation(label).key for label in kept} == kept
    assert {label: again.records(label) for label in kept} == {label: done.records(label) for label in kept}
