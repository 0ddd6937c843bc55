"""Project files written for a folder of movies, and from other programs' results: each is one that cryodask accepts."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_counts import here  # noqa: F401
from test_cryosparc import columns, with_aberrations
from typer.testing import CliRunner

from cryodask.cli import app
from cryodask.errors import InputError, ProjectFileError, StarError
from cryodask.formats import cryosparc, star
from cryodask.formats.movies import write_mrc_movie, write_tiff_movie
from cryodask.formats.mrc import read_mrc, write_mrc
from cryodask.interop import Session, export_cryosparc, project_from, project_from_movies
from cryodask.run.recipe import list_movies, make_plan
from cryodask.run.session import run_plan
from cryodask.run.sources import list_exposures
from cryodask.store.project import Project

SESSION = Session(300.0, 2.7, 1.1, 1.25, diameter_angstrom=160.0)


def movies(folder: Path, count: int = 3, ending: str = ".tif") -> list[str]:
    folder.mkdir(parents=True)
    for i in range(count):
        write = write_tiff_movie if ending == ".tif" else write_mrc_movie
        write(folder / f"m{i}{ending}", np.full((4, 32, 48), i + 1, np.uint8), 1.1)
    write_mrc(folder.parent / "gain.mrc", np.ones((32, 48), np.float32), 1.1)
    return [f"{folder.name}/m{i}{ending}" for i in range(count)]


def relion_project(folder: Path, doses: tuple[float, ...] = (1.25, 1.25, 1.25)) -> Path:
    """A RELION project after motion correction."""
    job = folder / "MotionCorr" / "job002"
    (job / "motion").mkdir(parents=True)
    names = movies(folder / "Movies")
    for i, name in enumerate(names):
        shifts = {"frame_shift": np.zeros((4, 2)), "pixel_size_angstrom": 1.1, "voltage_kv": 300.0, "pre_exposure": 0.5}
        star.write_motion(
            job / "motion" / f"m{i}.star", movie_name=name, width=48, height=32, dose_per_frame=doses[i], gain_name="gain.mrc", **shifts
        )
    lens = {"voltage_kv": 300.0, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.07, "pixel_size_angstrom": 1.1}
    named = {
        "micrograph_name": np.array([f"MotionCorr/job002/m{i}.mrc" for i in range(3)], dtype=object),
        "metadata_name": np.array([f"MotionCorr/job002/motion/m{i}.star" for i in range(3)], dtype=object),
    }
    star.write_corrected_micrographs(job / "corrected_micrographs.star", {**lens, **named})
    return folder


@pytest.mark.parametrize("ending", [".tif", ".mrc"])
@pytest.mark.parametrize("given", ["folder", "pattern"])
def test_a_folder_of_movies(tmp_path, ending, given):
    movies(tmp_path / "raw", ending=ending)
    pattern = str(tmp_path / "raw") if given == "folder" else str(tmp_path / "raw" / f"m*{ending}")
    path = project_from_movies(pattern, tmp_path / "p.yaml", SESSION, tmp_path / "gain.mrc")
    plan = make_plan(path)
    assert plan.file.microscope.model_dump() == {
        "voltage_kv": 300.0, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1, "pixel_size_angstrom": 1.1,
        "dose_per_frame": 1.25, "pre_exposure": 0.0,
    }  # fmt: skip
    assert plan.file.inputs.gain == "gain.mrc"
    assert "# 3 movies; the first has 4 frames of 32 x 48 pixels" in path.read_text()
    assert [step.label for step in plan.steps] == ["ingest", "motion", "ctf", "pick", "extract", "classify2d", "curate"]
    assert plan.steps[4].params.box == 232
    with pytest.raises(ProjectFileError, match="is not overwritten"):
        project_from_movies(pattern, path, SESSION)


def test_init_asks_for_what_is_not_given(tmp_path):
    movies(tmp_path / "raw")
    words = ["init", str(tmp_path / "raw"), "-o", str(tmp_path / "p.yaml"), "--voltage", "200", "--cs", "2.7", "--pixel-size", "1.1"]
    done = CliRunner().invoke(app, words, input="0.8\n170\n")
    assert done.exit_code == 0, done.output
    assert "Exposure per frame" in done.output
    written = yaml.safe_load((tmp_path / "p.yaml").read_text())
    assert written["microscope"]["voltage_kv"] == 200
    assert written["microscope"]["dose_per_frame"] == 0.8
    assert {"pick": {"diameter_angstrom": 170}} in written["pipeline"]


@pytest.mark.parametrize("given", ["folder", "table"])
def test_a_relion_project_with_its_movies(tmp_path, given):
    relion_project(tmp_path / "rel")
    start = tmp_path / "rel" if given == "folder" else tmp_path / "rel/MotionCorr/job002/corrected_micrographs.star"
    plan = make_plan(project_from(start, tmp_path / "p.yaml"))
    assert plan.file.inputs.movies == "rel/Movies/*.tif"
    assert plan.file.inputs.gain == "rel/gain.mrc"
    scope = plan.file.microscope
    assert (scope.dose_per_frame, scope.pre_exposure, scope.amplitude_contrast, scope.voltage_kv) == (1.25, 0.5, 0.07, 300.0)


def test_movies_of_several_folders_and_optics_become_data_sets(tmp_path):
    project = relion_project(tmp_path / "rel")
    job, other = project / "MotionCorr" / "job002", movies(project / "Day2", 2)
    for i, name in enumerate(other):
        star.write_motion(
            job / "motion" / f"n{i}.star", movie_name=name, width=48, height=32, dose_per_frame=0.9,
            frame_shift=np.zeros((4, 2)), pixel_size_angstrom=0.8, voltage_kv=200.0,
        )  # fmt: skip
    optics = {
        "voltage_kv": np.array([300.0, 300.0, 300.0, 200.0, 200.0]), "pixel_size_angstrom": np.array([1.1, 1.1, 1.1, 0.8, 0.8]),
        "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.07,
    }  # fmt: skip
    names = ["m0", "m1", "m2", "n0", "n1"]
    files = {
        "micrograph_name": np.array([f"MotionCorr/job002/{n}.mrc" for n in names], dtype=object),
        "metadata_name": np.array([f"MotionCorr/job002/motion/{n}.star" for n in names], dtype=object),
    }
    star.write_corrected_micrographs(job / "corrected_micrographs.star", {**optics, **files})
    plan = make_plan(project_from(project, tmp_path / "p.yaml"))
    first, second = plan.data_sets["set1"], plan.data_sets["set2"]
    assert (first.movies, first.gain) == ("rel/Movies/*.tif", "rel/gain.mrc")
    assert (second.movies, second.gain) == ("rel/Day2/*.tif", None)
    assert plan.constants["set1"]["dose_per_frame"] == 1.25
    assert {k: plan.constants["set2"][k] for k in ("voltage_kv", "pixel_size_angstrom", "dose_per_frame")} == {
        "voltage_kv": 200.0, "pixel_size_angstrom": 0.8, "dose_per_frame": 0.9,
    }  # fmt: skip


def test_movies_that_the_table_does_not_list_are_left_out(tmp_path):
    """A rejected movie, and another program's file of the same ending, lie beside those that a table lists."""
    project = relion_project(tmp_path / "rel")
    listed = {f.resolve() for f in (project / "Movies").iterdir()}
    for name in ("rejected.tif", "average.tif"):
        (project / "Movies" / name).write_bytes(b"not listed")
    path = project_from(project, tmp_path / "p.yaml")
    plan = make_plan(path)
    assert plan.file.inputs.movies == "p_movies/1/*.tif"
    found = [Path(name) for name in list_movies(plan)]
    assert {file.resolve() for file in found} == listed
    assert not any(Path(os.readlink(file)).is_absolute() for file in found)
    assert "2 more beside them are not in it and are left out" in path.read_text()
    path.unlink()
    with pytest.raises(ProjectFileError, match="p_movies exists and is not overwritten"):
        project_from(project, path)


def test_movies_that_one_project_file_cannot_describe_are_refused(tmp_path):
    relion_project(tmp_path / "a", doses=(1.0, 1.25, 1.25))
    with pytest.raises(InputError, match=r"Movies differ in gain, dose or optics"):
        project_from(tmp_path / "a", tmp_path / "p.yaml")
    relion_project(tmp_path / "b")
    (tmp_path / "b" / "Movies" / "m1.tif").unlink()
    with pytest.raises(InputError, match=r"names Movies/m1\.tif, which does not exist"):
        project_from(tmp_path / "b", tmp_path / "p.yaml")
    (tmp_path / "c").mkdir()
    with pytest.raises(ProjectFileError, match="has none of"):
        project_from(tmp_path / "c", tmp_path / "p.yaml")
    star.write_postprocess(
        tmp_path / "x.star", **dict.fromkeys(("fsc_unmasked", "fsc_masked", "fsc_randomised", "fsc_corrected"), np.ones(2)),
        shell_resolution_angstrom=np.array([99.0, 9.0]), resolution_angstrom=9.0, b_factor_angstrom2=0.0,
    )  # fmt: skip
    with pytest.raises(StarError, match="lists neither"):
        project_from(tmp_path / "x.star", tmp_path / "p.yaml")
    with pytest.raises(ProjectFileError, match="There are no movies"):
        project_from_movies(str(tmp_path / "c"), tmp_path / "p.yaml", SESSION)
    assert not (tmp_path / "p.yaml").exists()


@pytest.mark.parametrize("ending", [".cs", ".csg"])
def test_particles_of_cryosparc(tmp_path, ending):
    (tmp_path / "job").mkdir()
    before = columns(6, 4)
    for i in range(2):
        write_mrc(tmp_path / "job" / f"particles_{i}.mrcs", np.zeros((6, 64, 64), np.float32), 2.5, stack=True)
    cryosparc.write_particles(tmp_path / "job" / "particles.cs", before, (3000, 4000))
    plan = make_plan(project_from(tmp_path / "job" / f"particles{ending}", tmp_path / "p.yaml"))
    assert plan.steps[0].label == "import_particles"
    table = star.read_particles(tmp_path / "particles.star")
    np.testing.assert_allclose(table["defocus_u_angstrom"], before["defocus_u_angstrom"], rtol=1e-6)
    assert table["voltage_kv"].tolist() == before["voltage_kv"].tolist()
    assert set(table["image_stack"]) == {"job/particles_0.mrcs", "job/particles_1.mrcs"}
    kept = star.read_tables(tmp_path / "particles.star")["particles"]["cryosparcUid"]
    assert kept.tolist() == before["cryosparc_uid"].view(np.int64).tolist()


@pytest.mark.parametrize(("signs", "dark"), [([1, 1], False), ([-1, -1], True), ([1, -1], None)])
def test_images_of_cryosparc_in_which_protein_is_dark_are_inverted(tmp_path, signs, dark):
    before = columns(2, 4)
    images = np.random.default_rng(0).normal(size=(2, 2, 64, 64)).astype(np.float32)
    for i in range(2):
        write_mrc(tmp_path / f"particles_{i}.mrcs", images[i], 2.5, stack=True)
    cryosparc.write_particles(tmp_path / "particles.cs", before, (3000, 4000))
    table = np.load(tmp_path / "particles.cs")
    table["blob/sign"] = signs
    np.save((tmp_path / "particles.cs").open("wb"), table)
    if dark is None:
        with pytest.raises(InputError, match="protein is bright and others in which it is dark"):
            project_from(tmp_path / "particles.cs", tmp_path / "p.yaml")
        return
    step = make_plan(project_from(tmp_path / "particles.cs", tmp_path / "p.yaml")).steps[0]
    given = step.stage.process(step.params, particles_path=step.params.star, micrograph_name="m1.mrc")
    assert np.array_equal(given["particle_image"], images[1, 1:] * (-1 if dark else 1))


def test_particles_of_cryosparc_go_back_with_their_uids_poses_and_images(tmp_path, here):  # noqa: F811
    (tmp_path / "job").mkdir()
    before = columns(6, 4)
    images = np.random.default_rng(0).normal(size=(2, 6, 64, 64)).astype(np.float32)
    for i in range(2):
        write_mrc(tmp_path / "job" / f"particles_{i}.mrcs", images[i], 2.5, stack=True)
    cryosparc.write_particles(tmp_path / "job" / "particles.cs", before, (3000, 4000))
    tetra = np.arange(24, dtype=np.float32).reshape(6, 4)
    with_aberrations(tmp_path / "job" / "particles.cs", {"ctf/tetra_A": tetra, "ctf/trefoil_A": tetra[:, :2]})
    path = project_from(tmp_path / "job" / "particles.csg", tmp_path / "p.yaml")
    run_plan(make_plan(path), here, until="import_particles")
    export_cryosparc(Project(tmp_path / "p"), tmp_path / "back")
    told = CliRunner().invoke(app, ["export", str(tmp_path / "p"), "--relion", str(tmp_path / "relion")])
    assert told.exit_code == 0
    assert told.stderr.startswith("Warning: The trefoil that cryoSPARC has fitted is written as _cryosparcTrefoil only.")
    group = star.read_tables(tmp_path / "relion/particles.star")["optics"]
    assert "rlnOddZernike" not in group
    assert any(text.strip("[]").split(",")[-1] != "0" for text in group["rlnEvenZernike"])
    after = cryosparc.read_particles(tmp_path / "back" / "particles.csg")
    written = np.load(tmp_path / "back" / "particles.cs")
    assert written["ctf/tetra_A"][np.argsort(written["uid"])].tolist() == tetra[np.argsort(before["cryosparc_uid"])].tolist()
    back, order = np.argsort(after["cryosparc_uid"]), np.argsort(before["cryosparc_uid"])
    assert after["cryosparc_uid"][back].tolist() == before["cryosparc_uid"][order].tolist()
    for name in ("rot_deg", "tilt_deg", "psi_deg", "origin_y_angstrom", "origin_x_angstrom", "defocus_u_angstrom", "half_set"):
        np.testing.assert_allclose(after[name][back], before[name][order], atol=0.02, err_msg=name)
    stored = read_mrc(tmp_path / "back" / "particles.mrcs")[0]
    for one, other in zip(back, order):
        original = images[other % 2, before["image_index"][other]]
        assert np.corrcoef(stored[after["image_index"][one]].ravel(), original.ravel())[0, 1] > 0.9999


def test_micrographs_go_to_cryosparc_and_back(tmp_path, here):  # noqa: F811
    lens = {"voltage_kv": 300.0, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1, "pixel_size_angstrom": 1.1}
    fit = {
        "defocus_u_angstrom": np.array([1e4, 2e4]),
        "defocus_v_angstrom": np.array([9e3, 1.9e4]),
        "defocus_angle_deg": np.array([5.0, 50.0]),
    }
    for i, name in enumerate("ab"):
        write_mrc(tmp_path / f"{name}.mrc", np.random.default_rng(i).normal(size=(64, 48)).astype(np.float32), 1.1)
    star.write_micrographs_ctf(tmp_path / "mics.star", {"micrograph_name": np.array(["a.mrc", "b.mrc"], dtype=object), **lens, **fit})
    run_plan(make_plan(project_from(tmp_path / "mics.star", tmp_path / "p.yaml")), here, until="import_micrographs")
    written = export_cryosparc(Project(tmp_path / "p"), tmp_path / "out")
    assert [path.name for path in written] == ["micrographs.csg", "micrographs.cs"]
    back = cryosparc.read_micrographs(tmp_path / "out" / "micrographs.csg")
    assert back["micrograph_name"].tolist() == ["micrographs/a.mrc", "micrographs/b.mrc"]
    for name, values in (lens | fit).items():
        np.testing.assert_allclose(back[name], values, rtol=1e-6, err_msg=name)
    assert np.load(tmp_path / "out" / "micrographs.cs")["micrograph_blob/shape"].tolist() == [[64, 48]] * 2
    assert np.array_equal(read_mrc(tmp_path / "out" / "micrographs" / "a.mrc")[0], read_mrc(tmp_path / "a.mrc")[0])
    plan = make_plan(project_from(tmp_path / "out" / "micrographs.csg", tmp_path / "again.yaml"))
    assert [step.label for step in plan.steps][:2] == ["import_micrographs", "pick"]


def test_a_star_file_of_micrographs_and_one_of_movies(tmp_path):
    lens = {"voltage_kv": 300.0, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1, "pixel_size_angstrom": 1.1}
    fit = {"defocus_u_angstrom": 1e4, "defocus_v_angstrom": 9e3, "defocus_angle_deg": 0.0}
    write_mrc(tmp_path / "a.mrc", np.ones((64, 64), np.float32), 1.1)
    star.write_micrographs_ctf(tmp_path / "mics.star", {"micrograph_name": np.array(["a.mrc"], dtype=object), **lens, **fit})
    assert [s.label for s in make_plan(project_from(tmp_path / "mics.star", tmp_path / "p.yaml")).steps][:2] == [
        "import_micrographs",
        "pick",
    ]
    names = movies(tmp_path / "Movies", 2)
    optics = "loop_\n_rlnOpticsGroupName\n_rlnOpticsGroup\n_rlnVoltage\n_rlnSphericalAberration\n_rlnAmplitudeContrast\n"
    optics += "_rlnMicrographOriginalPixelSize\no 1 300 2.7 0.1 1.1\n"
    rows = "loop_\n_rlnMicrographMovieName\n_rlnOpticsGroup\n" + "".join(f"{name} 1\n" for name in names)
    (tmp_path / "movies.star").write_text(f"data_optics\n\n{optics}\n\ndata_movies\n\n{rows}\n")
    path = project_from(tmp_path / "movies.star", tmp_path / "m.yaml")
    assert make_plan(path).file.inputs.movies == "Movies/*.tif"
    assert "set dose_per_frame" in path.read_text()


OPTICS = "data_optics\n\nloop_\n_rlnOpticsGroup\n_rlnVoltage\n_rlnSphericalAberration\n_rlnAmplitudeContrast\n_rlnMicrographPixelSize\n"
OPTICS += "_rlnImagePixelSize\n1 300 2.7 0.1 1.1 1.1\n\n"
LENS = {"Voltage": "300", "SphericalAberration": "2.7", "AmplitudeContrast": "0.1", "DetectorPixelSize": "5", "Magnification": "50000"}
LISTS = {
    "movies": {"MicrographMovieName": "Movies/m0.tif"},
    "micrographs": {"MicrographName": "a.mrc", "DefocusU": "1e4"},
    "particles": {"ImageName": "1@a.mrcs", "MicrographName": "a.mrc", "DefocusU": "1e4"},
}


@pytest.mark.parametrize("what", LISTS)
@pytest.mark.parametrize("block", ["", "named", "old"])
@pytest.mark.parametrize("layout", ["loop", "pairs"])
def test_tables_of_all_names_and_ages_are_taken(tmp_path, what, block, layout):
    movies(tmp_path / "Movies", 1)
    row = LISTS[what] | (LENS if block == "old" else {"OpticsGroup": "1"})
    name = {"particles": "images"}.get(what, what) if block == "named" else ""
    if layout == "loop":
        table = "loop_\n" + "".join(f"_rln{label}\n" for label in row) + " ".join(row.values()) + "\n"
    else:
        table = "".join(f"_rln{label} {value}\n" for label, value in row.items())
    (tmp_path / "t.star").write_text(("" if block == "old" else OPTICS) + f"data_{name}\n\n{table}\n")
    plan = make_plan(project_from(tmp_path / "t.star", tmp_path / "p.yaml"))
    assert plan.steps[0].label == {"movies": "ingest", "micrographs": "import_micrographs", "particles": "import_particles"}[what]
    assert plan.path.read_text().startswith(f"# 1 {what} from t.star")


@pytest.mark.parametrize("what", LISTS)
def test_a_table_without_rows_is_refused(tmp_path, what):
    labels = "".join(f"_rln{label}\n" for label in (*LISTS[what], "OpticsGroup"))
    (tmp_path / "t.star").write_text(f"{OPTICS}data_{what}\n\nloop_\n{labels}\n")
    with pytest.raises(InputError, match=r"t\.star lists nothing"):
        project_from(tmp_path / "t.star", tmp_path / "p.yaml")


@pytest.mark.parametrize(
    ("general", "said"),
    [("data_x\n\n_a 1\n", "does not name its movie"), ("data_general\n\nloop_\n_a\n1\n", "does not name its movie")]
    + [
        (f"data_general\n\n_rlnMicrographMovieName Movies/m0.tif\n_rlnMicrographDoseRate {v}\n", "not a number")
        for v in ("x", "nan", "1,2")
    ],
)
def test_a_damaged_file_of_motion_is_named(tmp_path, general, said):
    relion_project(tmp_path)
    (tmp_path / "MotionCorr/job002/motion/m1.star").write_text(general)
    with pytest.raises(InputError, match=rf"m1\.star.*{said}"):
        project_from(tmp_path, tmp_path / "p.yaml")


def imported_movies(folder: Path, names: list[str], *, dose: float = 40.0, gain: str = ">gain.mrc", drop: str = "-", **columns) -> Path:
    """The exposures of a job that imported movies of 4 frames, as cryoSPARC 4 writes them."""
    kinds = [
        ("uid", "u8"), ("movie_blob/path", "S60"), ("movie_blob/shape", "u4", (3,)), ("movie_blob/psize_A", "f4"),
        ("gain_ref_blob/path", "S60"), ("gain_ref_blob/flip_x", "u4"), ("gain_ref_blob/flip_y", "u4"), ("gain_ref_blob/rotate_num", "u4"),
        ("mscope_params/accel_kv", "f4"), ("mscope_params/cs_mm", "f4"), ("mscope_params/total_dose_e_per_A2", "f4"),
        ("mscope_params/phase_plate", "u4"), ("movie_blob/has_defect_file", "u4"), ("movie_blob/is_gain_corrected", "u4"),
    ]  # fmt: skip
    table = np.zeros(len(names), kinds)
    rows = zip(*[range(1, len(names) + 1), [f">{name}" for name in names], [(4, 32, 48)] * len(names), [0.83] * len(names)])
    for row, values in zip(table, rows):
        row["uid"], row["movie_blob/path"], row["movie_blob/shape"], row["movie_blob/psize_A"] = values
    table["gain_ref_blob/path"] = gain.encode()
    table["mscope_params/accel_kv"], table["mscope_params/cs_mm"], table["mscope_params/total_dose_e_per_A2"] = 300, 2.7, dose
    for name, values in columns.items():
        field = next(n for n in table.dtype.names if n.endswith(f"/{name}"))
        table[field] = values
    with open(folder / "imported_movies.cs", "wb") as file:
        np.save(file, table[[n for n in table.dtype.names if not n.startswith(drop)]])
    return folder / "imported_movies.cs"


def test_movies_that_cryosparc_imported_start_a_project(tmp_path):
    table = imported_movies(tmp_path, movies(tmp_path / "imported"))
    plan = make_plan(project_from(table, tmp_path / "p.yaml"))
    microscope = {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1, "pixel_size_angstrom": 0.83}
    found = dict(plan.file.microscope)
    assert {name: found[name] for name in microscope} == pytest.approx(microscope)
    assert found["dose_per_frame"] == pytest.approx(40.0 / 4)
    assert [item.name for item in list_exposures(plan, None)] == ["m0", "m1", "m2"]
    assert "gain: gain.mrc" in (tmp_path / "p.yaml").read_text()
    assert "flips" not in (tmp_path / "p.yaml").read_text()


def test_what_a_table_of_movies_does_not_say_is_left_to_the_user(tmp_path):
    table = imported_movies(tmp_path, movies(tmp_path / "imported"), dose=0.0, flip_y=1)
    text = project_from(table, tmp_path / "p.yaml").read_text()
    assert "it does not say the dose: set dose_per_frame" in text
    assert "cryoSPARC flips or rotates the gain" in text
    (tmp_path / "imported" / "m1.tif").unlink()
    with pytest.raises(InputError, match=r"m1\.tif, which does not exist"):
        project_from(table, tmp_path / "q.yaml")


@pytest.mark.parametrize(
    ("columns", "dose", "words"),
    [
        ({"shape": [(4, 32, 48), (4, 32, 48), (3, 32, 48)]}, 10.0, "1 of the movies have another dose per frame than 10 e/A^2"),
        ({"shape": [(4, 32, 48), (0, 32, 48), (4, 32, 48)]}, 10.0, "1 of the movies have another dose per frame"),
        ({"shape": [(0, 32, 48)] * 3}, 1.0, "it does not say the dose"),
        ({"phase_plate": 1}, 10.0, "there was a phase plate"),
        ({"has_defect_file": 1}, 10.0, "there are defect files, which are not read"),
        ({"is_gain_corrected": 1}, 10.0, "the gain was applied to 3 of the movies already"),
    ],
)
def test_what_is_not_taken_over_of_a_table_of_movies_is_said(tmp_path, columns, dose, words):
    path = project_from(imported_movies(tmp_path, movies(tmp_path / "imported"), **columns), tmp_path / "p.yaml")
    assert words in path.read_text().splitlines()[0]
    plan = make_plan(path)
    assert dict(plan.file.microscope)["dose_per_frame"] == pytest.approx(dose)
    assert ("gain: " in path.read_text().partition("pipeline")[0]) == ("is_gain_corrected" not in columns)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"drop": "mscope_params"}, "does not say voltage_kv, spherical_aberration_mm of its movies"),
        ({"psize_A": 0.0}, "movie_blob/psize_A of row 1 is 0"),
        ({"accel_kv": 300_000}, "voltage_kv of row 1 is 300000"),
        ({"gain": ">imported/m0.tif"}, "the gain m0.tif is in the folder of the movies"),
    ],
)
def test_a_table_of_movies_that_cannot_be_right_is_refused(tmp_path, columns, words):
    table = imported_movies(tmp_path, movies(tmp_path / "imported"), **columns)
    with pytest.raises(InputError, match=words):
        project_from(table, tmp_path / "p.yaml")
