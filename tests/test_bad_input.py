"""What a user can do wrong, and what can go wrong under way: nothing is lost, nothing is made up, and three sentences say what to do."""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from _service import running

from cryodask import cli, errors
from cryodask.errors import CryodaskError, InputError
from cryodask.formats import star
from cryodask.formats.movies import write_mrc_movie, write_tiff_movie
from cryodask.formats.mrc import write_mrc
from cryodask.interop import export_relion
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.store.journal import content_crc
from cryodask.store.project import Project

pytestmark = pytest.mark.heavy

PROJECT = """
name: p
inputs: {movies: "movies/*"}
microscope: {voltage_kv: 300, spherical_aberration_mm: 2.7, amplitude_contrast: 0.1, pixel_size_angstrom: 2.0, dose_per_frame: 5}
pipeline:
  - motion: {patches: [1, 1]}
  - pick: {diameter_angstrom: 60}
  - extract: {box: 64, scale_to: 32}
workers: 1
"""
PIXEL, SIZE, FRAMES = 2.0, 192, 3


COMMAND = [sys.executable, "-m", "cryodask.cli"]


def frames_of(seed: int, *, particles: int = 6, size: int = SIZE, frames: int = FRAMES) -> np.ndarray:
    """Counts with dark discs on a ring."""
    y, x = np.mgrid[:size, :size]
    density = np.full((size, size), 3.0)
    for angle in 2 * np.pi * np.arange(particles) / max(particles, 1):
        distance = np.hypot(y - size / 2 - 0.28 * size * np.sin(angle), x - size / 2 - 0.28 * size * np.cos(angle))
        density -= 1.5 / (1 + np.exp(distance - 13))
    return np.random.default_rng(seed).poisson(density, (frames, size, size)).astype(np.uint8)


@pytest.fixture(scope="module")
def movies(tmp_path_factory) -> Path:
    """Three good movies."""
    folder = tmp_path_factory.mktemp("movies")
    for i in range(3):
        write_tiff_movie(folder / f"m{i + 1}.tif", frames_of(i), PIXEL)
    return folder


@pytest.fixture
def project(tmp_path, movies):
    """A folder with the good movies and a project file; call it to change the file and get the plan."""
    shutil.copytree(movies, tmp_path / "movies")

    def make(*changes: tuple[str, str]):
        text = PROJECT
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "p.yaml").write_text(text)
        return make_plan(tmp_path / "p.yaml")

    make.folder = tmp_path
    make()
    return make


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run a command line that must fail with three sentences before any worker is started; gives what it says."""

    def never(*args, **options):
        raise AssertionError("a cluster was started")

    def run(*words: str, status: int = 2) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module("cryodask.cluster.connect"), "connect", never)
            patch.setattr(sys, "argv", ["cryodask", *map(str, words)])
            with pytest.raises(SystemExit) as stopped:
                cli.main()
        said = capsys.readouterr().err
        assert stopped.value.code == status, said
        assert "What to do: " in said
        return said

    return run


def contents(project: Project) -> dict[tuple[str, int], int]:
    """What the records say of their items, not where and when they were made."""
    labels = project.stages
    return {(label, row): content_crc(r) for label in labels for row, r in project.generation(label).committed().items()}


def failures(project: Project) -> dict[str, str]:
    return {f["name"]: f["message"] for f in project.failures()}


# --- movies ------------------------------------------------------------------------------------------------------------------


def test_missing_truncated_and_foreign_movies_are_refused_before_a_cluster_starts(project, refused):
    file = project.folder / "p.yaml"
    movies = sorted((project.folder / "movies").iterdir())
    for path in movies:
        path.write_bytes(path.read_bytes()[:2000])
    assert "None of the 3 inputs" in refused("run", file)
    for path in movies:
        path.unlink()
    assert "No movie matches" in refused("run", file)
    (project.folder / "movies" / "notes.txt").write_text("hello")
    assert "notes.txt" in refused("run", file)


def test_two_movies_of_one_name_are_refused_for_one_would_be_lost(project, refused):
    (project.folder / "movies" / "again").mkdir()
    shutil.copy(project.folder / "movies" / "m1.tif", project.folder / "movies" / "again")
    project(("movies/*", "movies/**/*.tif"))
    assert "same name m1" in refused("run", project.folder / "p.yaml")


def test_bad_movies_are_quarantined_with_the_reason_and_the_good_ones_go_on(project, client):
    movies = project.folder / "movies"
    for name in ("a_larger", "a_longer", "a_deeper"):  # the odd ones come first
        options = {"a_larger": {"size": 256}, "a_longer": {"frames": 5}, "a_deeper": {}}[name]
        frames = frames_of(9, **options)
        write_tiff_movie(movies / f"{name}.tif", frames.astype(np.uint16) * (300 if name == "a_deeper" else 1), PIXEL)
    write_tiff_movie(movies / "n_empty.tif", frames_of(5, particles=0), PIXEL)
    write_tiff_movie(movies / "z_blank.tif", np.zeros((FRAMES, SIZE, SIZE), np.uint8), PIXEL)
    for i in range(4, 9):
        write_tiff_movie(movies / f"m{i}.tif", frames_of(10 + i), PIXEL)
    (movies / "m9.tif").write_bytes((movies / "m1.tif").read_bytes()[:4000])
    os.symlink("nowhere", movies / "m10.tif")
    done = run_plan(project(), client)
    said = failures(done)
    assert set(said) == {"a_larger", "a_longer", "a_deeper", "m9", "z_blank"}
    assert "256, 256" in said["a_larger"]
    assert "(5, 192, 192)" in said["a_longer"]
    assert "uint16" in said["a_deeper"]
    assert "no counts" in said["z_blank"]
    found = done["extract"]["particle_count"].to_series()
    assert found[[f"m{i}" for i in range(1, 9)]].min() >= 5
    assert done.particles().sizes["particle"] == found.sum()


def test_a_movie_that_vanishes_after_it_was_listed_is_quarantined(project, client, monkeypatch):
    from cryodask.run import sources

    plan = project()
    listed = sources.list_movies(plan)
    (project.folder / "movies" / "m2.tif").unlink()
    monkeypatch.setattr(sources, "list_movies", lambda plan, data_set, needed: listed)
    done = run_plan(plan, client, until="motion")
    assert set(failures(done)) == {"m2"}
    assert "does not exist" in failures(done)["m2"]


def test_pixels_that_are_no_numbers_never_get_into_a_micrograph(project, client):
    movies = project.folder / "movies"
    for path in list(movies.iterdir()):
        path.unlink()
    for i in range(4):
        frames = frames_of(i, frames=5).astype(np.float32)
        if i == 1:
            frames[1, 50, 60] = np.nan  # a frame and a pixel that no sample sees
        if i == 2:
            frames[3, :4] = np.inf
        write_mrc_movie(movies / f"m{i}.mrc", frames, PIXEL)
    done = run_plan(project(), client, until="motion")
    for name in done["motion"]["micrograph"].values:
        assert np.isfinite(done["motion"]["micrograph_sum"].sel(micrograph=name).values).all()
    assert {"m0", "m3"} <= set(done["motion"]["micrograph"].values)
    assert set(failures(done)) == {"m1", "m2"}


def test_a_movie_replaced_by_a_bad_one_does_not_keep_its_old_results(project, client):
    first = run_plan(project(), client)
    assert first["extract"].sizes["micrograph"] == 3
    path = project.folder / "movies" / "m2.tif"
    path.write_bytes(path.read_bytes()[:4000])
    again = run_plan(project(), client)
    assert set(failures(again)) == {"m2"}
    assert again["ingest"]["micrograph"].values.tolist() == ["m1", "m3"]
    write_tiff_movie(path, frames_of(1), PIXEL)
    assert contents(run_plan(project(), client)) == contents(first)


def test_a_box_larger_than_the_micrograph_stops_with_the_reason(project, client):
    with pytest.raises(InputError, match="box of 256 pixels is larger"):
        run_plan(project(("box: 64", "box: 256")), client)


def test_no_particles_at_all_is_a_clear_error(project, client):
    movies = project.folder / "movies"
    for path in list(movies.iterdir()):
        write_tiff_movie(path, frames_of(7, particles=0), PIXEL)
    plan = project(("{diameter_angstrom: 60}", "{diameter_angstrom: 60, threshold: 1000}"), ("  - extract", "  - ctf\n  - extract"))
    plan = project(
        ("{diameter_angstrom: 60}", "{diameter_angstrom: 60, threshold: 1000}"),
        ("workers", "  - ctf: {coarsest_angstrom: 40, finest_angstrom: 10}\n  - classify2d\nworkers"),
    )
    with pytest.raises(CryodaskError, match="has no particles"):
        run_plan(plan, client)
    done = Project(plan.folder)
    assert done.particles().sizes.get("particle", 0) == 0
    assert (project.folder / "relion" / "motion" / "m1.star") in export_relion(done, project.folder / "relion")


# --- STAR files ----------------------------------------------------------------------------------------------------------------


def star_of_particles(folder: Path, count: int = 24, micrographs: int = 3) -> Path:
    y, x = np.mgrid[-16:16, -16:16]
    noise = np.random.default_rng(1).normal(size=(count, 32, 32))
    images = noise + 2.0 * np.exp(-(y**2 + (1.5 * x) ** 2) / 40)
    columns = {
        "micrograph_name": np.array([f"mic{i % micrographs}.mrc" for i in range(count)], dtype=object),
        "image_stack": "s.mrcs", "image_index": np.arange(count),
        "voltage_kv": 300.0, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1,
        "pixel_size_angstrom": 4.0, "particle_pixel_size_angstrom": 4.0, "box": 32,
        "defocus_u_angstrom": np.full(count, 1e4), "defocus_v_angstrom": np.full(count, 1e4), "defocus_angle_deg": np.zeros(count),
        "particle_y": np.zeros(count), "particle_x": np.zeros(count),
    }  # fmt: skip
    write_mrc(folder / "s.mrcs", images.astype(np.float32), 4.0, stack=True)
    star.write_particles(folder / "s.star", columns)
    return folder / "s.star"


def particle_project(folder: Path, *steps: str) -> Path:
    lines = "".join(f"  - {step}\n" for step in steps)
    (folder / "q.yaml").write_text(f"name: q\ninputs: {{particles: s.star}}\npipeline:\n{lines}workers: 1\n")
    return folder / "q.yaml"


def test_a_stack_that_is_missing_or_too_short_is_refused_before_a_cluster_starts(tmp_path, refused):
    star_of_particles(tmp_path)
    file = particle_project(tmp_path, "classify2d")
    write_mrc(tmp_path / "s.mrcs", np.zeros((5, 32, 32), np.float32), 4.0, stack=True)
    assert "has 5 images" in refused("run", file)
    (tmp_path / "s.mrcs").write_bytes((tmp_path / "s.mrcs").read_bytes()[:9000])
    assert "truncated" in refused("run", file)
    (tmp_path / "s.mrcs").unlink()
    assert "s.mrcs" in refused("run", file)
    (tmp_path / "s.star").write_text("data_particles\n\nloop_\n_rlnImageName #1\n_rlnDefocusU #2\n1@s.mrcs 9000\n")
    assert "relion_convert_star" in refused("run", file)
    (tmp_path / "s.star").unlink()
    assert "s.star" in refused("run", file)


def test_micrographs_with_pixels_that_are_no_numbers_are_quarantined_and_picks_are_not_confused(tmp_path, client):
    (tmp_path / "picks").mkdir()
    for i, name in enumerate(("mic_1", "mic_10", "mic_2")):
        image = frames_of(i)[0].astype(np.float32)
        if name == "mic_2":
            image[3, 3] = np.nan
        write_mrc(tmp_path / f"{name}.mrc", image, PIXEL)
        star.write_coordinates(tmp_path / "picks" / f"{name}_pick.star", 96.0 + 2.0 * np.arange(i + 1), np.full(i + 1, 90.0))
    (tmp_path / "m.star").write_text(
        "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnOpticsGroupName #2\n_rlnVoltage #3\n_rlnSphericalAberration #4\n"
        "_rlnAmplitudeContrast #5\n_rlnMicrographPixelSize #6\n1 o 300 2.7 0.1 2.0\n\n"
        "data_micrographs\n\nloop_\n_rlnMicrographName #1\n_rlnOpticsGroup #2\nmic_1.mrc 1\nmic_10.mrc 1\nmic_2.mrc 1\n"
    )
    (tmp_path / "p.yaml").write_text(
        "name: p\ninputs: {micrographs: m.star, coordinates: picks}\npipeline:\n  - extract: {box: 64, scale_to: 32}\n"
    )
    done = run_plan(make_plan(tmp_path / "p.yaml"), client)
    assert set(failures(done)) == {"mic_2"}
    assert "NaN or infinite" in failures(done)["mic_2"]
    assert dict(zip(done["extract"]["micrograph"].values, done["extract"]["particle_count"].values)) == {"mic_1": 1, "mic_10": 2}


def test_a_stack_that_was_replaced_is_read_again_and_its_bad_pixels_are_met(tmp_path, client):
    star_of_particles(tmp_path)
    plan = make_plan(particle_project(tmp_path, "import_particles"))
    before = contents(run_plan(plan, client))
    images = np.random.default_rng(2).normal(size=(24, 32, 32)).astype(np.float32)
    images[4, 5, 6] = np.nan
    write_mrc(tmp_path / "s.mrcs", images, 4.0, stack=True)
    done = run_plan(plan, client)
    assert set(failures(done)) == {"mic1"}
    assert set(contents(done)) == set(before) - {("import_particles", 1)}
    assert not set(contents(done).values()) & set(before.values())


def test_a_table_without_rows_is_refused(tmp_path, refused):
    path = star_of_particles(tmp_path)
    text = path.read_text()
    path.write_text("\n".join(line for line in text.splitlines() if "s.mrcs" not in line) + "\n")
    assert "lists nothing" in refused("run", particle_project(tmp_path, "classify2d"))


def test_import_does_not_overwrite_a_project_file(tmp_path, refused):
    path = star_of_particles(tmp_path)
    (tmp_path / "project.yaml").write_text("mine")
    assert "not overwritten" in refused("import", path, "-o", tmp_path / "project.yaml")
    assert (tmp_path / "project.yaml").read_text() == "mine"
    assert "nothing.star" in refused("import", tmp_path / "nothing.star", "-o", tmp_path / "other.yaml")


# --- maps ----------------------------------------------------------------------------------------------------------------------


def ball(size: int, pixel: float) -> np.ndarray:
    z, y, x = np.mgrid[:size, :size, :size] * pixel - size // 2 * pixel
    return np.exp(-(z**2 + y**2 + (1.5 * x) ** 2) / 600).astype(np.float32)


def test_a_reference_of_another_box_and_pixel_is_resampled(tmp_path, client):
    star_of_particles(tmp_path)
    write_mrc(tmp_path / "ref.mrc", ball(50, 3.1), 3.1)
    file = particle_project(tmp_path, "refine3d: {reference: ref.mrc, iterations: 1}")
    done = run_plan(make_plan(file), client)
    maps = done["refine3d"].load()
    assert maps["half_map"].shape == (2, 32, 32, 32)
    assert float(maps["map_pixel_size_angstrom"]) == pytest.approx(4.0)


def test_a_nonsense_reference_is_refused_before_a_cluster_starts(tmp_path, refused):
    star_of_particles(tmp_path)
    file = particle_project(tmp_path, "refine3d: {reference: ref.mrc, iterations: 1}")
    (tmp_path / "ref.mrc").write_text("no map " * 500)
    assert "not an MRC file" in refused("run", file)
    for wrong in (np.zeros((16, 16, 16)), np.full((16, 16, 16), np.nan)):
        write_mrc(tmp_path / "ref.mrc", wrong.astype(np.float32), 4.0)
        assert "refine3d.reference" in refused("run", file)


def test_a_particle_a_half_set_is_needed_for_a_refinement(tmp_path, client):
    star_of_particles(tmp_path, count=1)
    write_mrc(tmp_path / "ref.mrc", ball(32, 4.0), 4.0)
    with pytest.raises(CryodaskError, match="1 particles"):
        run_plan(make_plan(particle_project(tmp_path, "refine3d: {reference: ref.mrc, iterations: 1}")), client)


def test_half_maps_that_differ_are_refused_and_those_of_nan_stop_with_the_reason(tmp_path, refused, client):
    (tmp_path / "h.yaml").write_text("name: h\ninputs: {half_maps: [a.mrc, b.mrc]}\npipeline: [mask, postprocess]\n")
    write_mrc(tmp_path / "a.mrc", ball(32, 4.0), 4.0)
    assert "b.mrc" in refused("run", tmp_path / "h.yaml")
    write_mrc(tmp_path / "b.mrc", ball(40, 4.0), 4.0)
    assert "The half-maps differ" in refused("run", tmp_path / "h.yaml")
    write_mrc(tmp_path / "b.mrc", ball(32, 4.0)[0], 4.0)
    assert "not a cube" in refused("run", tmp_path / "h.yaml")
    write_mrc(tmp_path / "b.mrc", np.full((32, 32, 32), np.nan, np.float32), 4.0)
    with pytest.raises(InputError, match="NaN"):
        run_plan(make_plan(tmp_path / "h.yaml"), client)


# --- under way -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, movies, client) -> dict[tuple[str, int], int]:
    """Contents of a run that nothing went wrong with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    os.symlink(movies, folder / "movies")
    (folder / "p.yaml").write_text(PROJECT)
    return contents(run_plan(make_plan(folder / "p.yaml"), client))


def mount(*words: str) -> None:
    if shutil.which("mount") is None or subprocess.run(["mount", *words], capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")


def test_a_full_disk_stops_with_the_reason_and_the_run_resumes_when_there_is_space(project, client, undisturbed):
    folder = project.folder / "p"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=700k", "tmpfs", str(folder))
    try:
        with pytest.raises(CryodaskError, match="No space is left") as stopped:
            run_plan(project(), client)
        assert "rerun the same command" in str(stopped.value)
        assert [p for p in Project(folder).verify() if "harmless" not in p] == []
        mount("-o", "remount,size=64m", str(folder))
        assert contents(run_plan(project(), client)) == undisturbed
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_limit_on_the_size_of_files_is_told_like_a_full_disk(tmp_path):
    code = (
        "import numpy as np, resource, sys\n"
        "from cryodask.errors import DiskFullError\n"
        "from cryodask.store.generation import Generation\n"
        "from cryodask.store.layouts import Grid\n"
        "from pathlib import Path\n"
        "meta = {'stage': 'motion', 'version': 1, 'params': {}, 'recipes': {}, 'inputs': {}}\n"
        "g = Generation.create(Path(sys.argv[1]), meta=meta, gives=('micrograph_sum',), per_item=True,"
        " grids={'': Grid({'y': 99, 'x': 99}, {})})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try:\n    g.commit(0, 'm', {'micrograph_sum': np.random.random((99, 99)).astype(np.float32)})\n"
        "except DiskFullError as error:\n    print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code, str(tmp_path / "g")], capture_output=True, text=True, check=True).stdout
    assert "file size limit" in told
    assert not list((tmp_path / "g").rglob("*.part"))


def test_without_permission_to_write_reading_works_and_writing_is_refused(project, client, refused):
    file, folder = project.folder / "p.yaml", project.folder / "p"
    run_plan(project(), client, until="motion")
    mount("--bind", str(folder), str(folder))
    try:
        mount("-o", "remount,bind,ro", str(folder))
        for words in (("run", file), ("gc", folder), ("report", folder)):
            assert "cannot be written: Read-only file system" in refused(*words, status=4 if words[0] == "run" else 2)
        assert Project(folder).verify() == []
        assert len(Project(folder)["motion"]["micrograph"]) == 3
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def started(folder: Path) -> subprocess.Popen:
    """A real `cryodask run` that holds the lock and works."""
    process = subprocess.Popen(
        [*COMMAND, "run", "p.yaml"], cwd=folder, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob("p/stages/extract/*/journal/*.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def many(project, count: int = 30) -> None:
    for i in range(4, count):
        write_tiff_movie(project.folder / "movies" / f"m{i}.tif", frames_of(i), PIXEL)


def test_a_second_driver_is_refused_and_ctrl_c_ends_the_first_cleanly(project, client, refused):
    many(project)
    process = started(project.folder)
    said = refused("run", project.folder / "p.yaml")
    assert f"Process {process.pid}" in said
    assert "--force" in said
    assert "is working on" in refused("gc", project.folder / "p")
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the driver and all of its workers
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "cryodask run p.yaml" in said
    assert "Traceback" not in said
    assert psutil.wait_procs(family, timeout=120)[1] == []
    assert not (project.folder / "p" / "driver.lock").exists()
    assert 0 < Project(project.folder / "p")["extract"].sizes["micrograph"] < 29
    assert run_plan(project(), client)["extract"].sizes["micrograph"] == 29


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_nothing(project):
    many(project, 6)
    process = started(project.folder)
    workers = running([p.pid for p in psutil.Process(process.pid).children(recursive=True)], "spawn_main", "forkserver")
    workers[-1].kill()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    done = Project(project.folder / "p")
    assert done.failures() == []
    assert done["extract"].sizes["micrograph"] == 5
    assert [p for p in done.verify() if "harmless" not in p] == []


# --- damage --------------------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def verified(folder: Path, capsys, *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        cli.app(["verify", str(folder), *words], standalone_mode=True)
    return ended.value.code, capsys.readouterr().out


def test_damage_is_found_and_what_is_taken_back_is_made_again(project, client, undisturbed, capsys):
    done = run_plan(project(), client)
    shards = sorted(done.generation("motion").path.glob("micrograph_sum/c/*/0/0"))
    flip(shards[0], 1000)
    movie = sorted(done.generation("ingest").path.glob("movie/c/*/0/0/0"))[1]
    movie.write_bytes(movie.read_bytes()[:500])
    sorted(done.generation("extract").path.glob("particle_image/c/*/0/0/0"))[2].unlink()
    code, said = verified(done.path, capsys)
    assert code == 1
    assert said.count("damaged, its ") == 2
    assert said.count("missing, though") == 1
    code, said = verified(done.path, capsys, "--repair")
    assert code == 0
    assert {line for line in said.splitlines() if line.startswith("invalidated")} == {
        "invalidated: ingest: m2", "invalidated: motion: m1", "invalidated: extract: m3",
    }  # fmt: skip
    assert len(Project(done.path)["motion"]["micrograph"]) == 2
    again = run_plan(project(), client)
    assert contents(again) == undisturbed
    assert verified(done.path, capsys)[0] == 0


def test_a_damaged_journal_line_is_found_and_its_item_is_made_again(project, client, undisturbed, capsys):
    done = run_plan(project(), client)
    journal = next(done.generation("pick").path.glob("journal/*.jsonl"))
    flip(journal, 40)
    code, said = verified(done.path, capsys)
    assert code == 1
    assert "its commit is lost" in said
    assert verified(done.path, capsys, "--repair")[0] == 0
    assert contents(run_plan(project(), client)) == undisturbed
    assert verified(done.path, capsys)[0] == 0
    assert (journal.parent / "damaged-lines.txt").read_bytes().count(b"\n") == 1


def test_a_damaged_result_of_all_particles_is_made_again(tmp_path, client, capsys):
    star_of_particles(tmp_path)
    plan = make_plan(particle_project(tmp_path, "classify2d: {classes: 2, iterations: 2}"))
    done = run_plan(plan, client)
    before = contents(done)
    folder = done.generation("classify2d").path
    flip(folder / "class_average" / "c" / "0" / "0" / "0", 100)
    checkpoint = next(folder.glob("checkpoints/iteration-*.npz"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:-700])
    assert verified(done.path, capsys, "--repair")[0] == 0
    assert contents(run_plan(plan, client)) == before
    assert verified(done.path, capsys)[0] == 0


def test_a_damaged_movie_in_the_store_is_made_again_before_it_is_used(project, client):
    done = run_plan(project(), client, until="motion")
    movie = sorted(done.generation("ingest").path.glob("movie/c/*/0/0/0"))[1]
    movie.write_bytes(movie.read_bytes()[:500])
    done = run_plan(project(("patches: [1, 1]", "patches: [1, 1], alignment_resolution_angstrom: 9")), client, until="motion")
    assert done.failures() == []
    assert done.verify() == []


def test_damaged_project_files_are_named(project, client, refused):
    done = run_plan(project(), client, until="motion")
    shutil.rmtree(done.generation("motion").path)
    assert "rerun the project" in refused("info", done.path)
    assert run_plan(project(), client, until="motion")["motion"].sizes["micrograph"] == 3
    state = (done.path / "project.json").read_text()
    (done.path / "project.json").write_text(state[:50])
    assert "project.json is damaged" in refused("info", done.path)
    (done.path / "project.json").unlink()
    kept = contents(run_plan(project(), client, until="motion"))
    assert len(kept) == 6
    lines = (done.path / "items.jsonl").read_text().splitlines(keepends=True)
    (done.path / "items.jsonl").write_text("".join(["{" + lines[0], *lines[1:]]))
    assert any("row 0 is damaged" in problem for problem in done.verify())
    again = run_plan(project(), client, until="motion")
    assert [item.name for item in again.items()] == ["m1", "m2", "m3"]
    assert contents(again) == kept
    assert again.verify() == []


def test_gc_removes_what_is_superseded_and_nothing_else(project, client, undisturbed, capsys):
    run_plan(project(), client)
    run_plan(project(("box: 64", "box: 60")), client)
    done = run_plan(project(), client)
    leftover = done.superseded()
    assert [p.parent.name for p in leftover] == ["extract"]
    with pytest.raises(SystemExit):
        cli.app(["gc", str(done.path), "--dry-run"])
    assert leftover[0].exists()
    with pytest.raises(SystemExit):
        cli.app(["gc", str(done.path)])
    assert not leftover[0].exists()
    assert contents(Project(done.path)) == undisturbed
    assert verified(done.path, capsys)[0] == 0


def test_results_never_go_among_the_users_own_files(project, refused):
    with pytest.raises(errors.ProjectFileError, match="among your files"):
        project(("name: p", "name: p\nfolder: ."))
    assert "among your files" in refused("run", project.folder / "p.yaml")


def test_a_folder_of_other_files_is_not_taken_for_results(project, refused):
    """A project called ``mic`` beside a folder mic/ with micrographs must not write its results among them."""
    project(("name: p", "name: mic"))
    theirs = project.folder / "mic"
    theirs.mkdir()
    (theirs / "m1.mrc").write_bytes(b"theirs")
    said = refused("run", project.folder / "p.yaml")
    assert "among other files (m1.mrc)" in said
    assert [path.name for path in theirs.iterdir()] == ["m1.mrc"]


def test_every_error_of_the_package_says_what_happened_and_what_to_do():
    """The usual reason may be left out where there is none; the other two sentences never."""
    package = Path(cli.__file__).parent
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type)} | {"error"}
    short = []
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())) if file.parent.name != "testing" else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
                empty = any(isinstance(a, ast.Constant) and a.value == "" for a in (*node.args[:1], *node.args[2:]))
                if len(node.args) != 3 or empty:
                    short.append(f"{file.name}:{node.lineno}")
    assert short == []
