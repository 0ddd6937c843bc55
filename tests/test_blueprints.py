"""Blueprints: what they refuse, what they make, and their sessions run to the end on a real Slurm: all kinds of them at once.

The long suite runs each of the three blueprints as it stands.
"""

from __future__ import annotations

import getpass
import grp
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from cryodask.blueprints import check, invite_people, read_blueprint
from cryodask.cluster import shared_folders
from cryodask.cluster.service import service
from cryodask.cluster.shared_folders import Folder, make_folder, striping
from cryodask.errors import ProjectFileError, StoreError
from cryodask.formats.star import read_particles
from cryodask.simulate import simulate_particles
from cryodask.store.project import Project

CONFIGS = Path(__file__).parents[1] / "configs" / "blueprints"
SHAPES = ["preprocessing", "image-analysis", "mixed"]
OPTICS = {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "pixel_size_angstrom": 1.0}


def written(tmp_path, **change):
    content = yaml.safe_load((CONFIGS / "preprocessing.yaml").read_text()) | change
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path / "b.yaml"


# --- reading and checking ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("profile", [None, "test"])
def test_checking_says_what_would_happen_and_makes_nothing(name, profile, tmp_path):
    made = read_blueprint(CONFIGS / f"{name}.yaml", profile, tmp_path)
    said = "\n".join(check(made))
    for session in made.sessions:
        assert f"session {session} in lane {made.sessions[session].lane}" in said
    for pool in made.cluster.pools:
        assert f"--- a job of pool {pool}\n#!/usr/bin/env bash" in said
    for session in made.sessions:
        (script,) = [part for part in said.split("\n--- ") if part.startswith(f"the job of session {session}\n#!/usr/bin/env bash")]
        assert f"#SBATCH --comment=cryodask:run:{made.name}-{session}\n" in script
        assert f"export CRYODASK_CLUSTER={made.name} CRYODASK_LANE={made.sessions[session].lane}\n" in script
    of_scheduler = f"--- the scheduler\n#!/usr/bin/env bash\n#SBATCH -J cryodask-{made.name}\n"
    assert (of_scheduler in said) == (made.cluster.service.where == "slurm")
    assert "motion > ctf > pick > extract" in said or name == "image-analysis"
    assert not list(tmp_path.iterdir())


def test_a_profile_replaces_name_by_name_and_null_removes(tmp_path):
    plain, small = (read_blueprint(CONFIGS / "mixed.yaml", profile, tmp_path) for profile in (None, "test"))
    assert set(plain.cluster.pools) == {"cpu", "gpu", "highmem", "preemptible"}
    assert set(small.cluster.pools) == {"cpu", "preemptible"}
    assert small.cluster.lanes == plain.cluster.lanes
    assert plain.cluster.reserve == {"live": 2}
    assert small.cluster.reserve == {}
    assert small.cluster.pools["cpu"].partition == "cpu"
    assert small.storage.raw.path == str(tmp_path / "raw")
    assert plain.storage.raw.path == "/data/raw"


def test_scratch_of_the_storage_is_that_of_all_pools_and_never_a_network_file_system(tmp_path, monkeypatch):
    content = yaml.safe_load((CONFIGS / "preprocessing.yaml").read_text())
    content["storage"]["scratch"] = {"path": "/fast"}
    made = read_blueprint(written(tmp_path, **content), folder=tmp_path)
    assert made.cluster.pools["cpu"].scratch == "/fast"
    monkeypatch.setattr("cryodask.cluster.settings.network_file_system", lambda path: "nfs4" if path == "/fast" else "")
    with pytest.raises(ProjectFileError, match="scratch /fast is on a network file system"):
        read_blueprint(tmp_path / "b.yaml", folder=tmp_path)
    content["storage"]["scratch"] = {"path": "/fast", "network": True}
    assert read_blueprint(written(tmp_path, **content), folder=tmp_path).cluster.pools["cpu"].network_scratch


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"people": {"anna": ["lvie"]}}, "people.anna names the lane 'lvie'; there are live, batch"),
        ({"cluster": {"kind": "local"}}, "pools of Slurm jobs"),
        ({"sesions": {}}, "sesions: Extra inputs"),
        ({"sessions": {"krios1": {"lane": "live"}}}, "give either a project or a command"),
    ],
)
def test_mistakes_are_named(change, said, tmp_path):
    with pytest.raises(ProjectFileError, match=said):
        read_blueprint(written(tmp_path, **change))


def test_a_wrong_pipeline_is_found_by_checking(tmp_path):
    sessions = {"a": {"lane": "live", "project": {"inputs": {"movies": "x/*.tif"}, "microscope": OPTICS, "pipeline": ["moton"]}}}
    with pytest.raises(ProjectFileError, match="Did you mean 'motion'"):
        list(check(read_blueprint(written(tmp_path, sessions=sessions), folder=tmp_path)))


def test_a_profile_or_file_that_does_not_exist_is_said(tmp_path):
    with pytest.raises(ProjectFileError, match="no profile 'tset'"):
        read_blueprint(CONFIGS / "mixed.yaml", "tset")
    with pytest.raises(ProjectFileError, match="There is no blueprint"):
        read_blueprint(tmp_path / "none.yaml")


# --- folders -----------------------------------------------------------------------------------------------------------------------
def test_folders_have_their_mode_and_hand_on_their_group(tmp_path, recwarn):
    make_folder(Folder(path=str(tmp_path / "a" / "raw"), mode="2770"))
    assert stat.S_IMODE((tmp_path / "a" / "raw").stat().st_mode) == 0o2770
    make_folder(Folder(path=str(tmp_path / "a" / "raw"), mode="2770"))
    assert not recwarn.list
    with pytest.raises(StoreError, match="The group nobody-has-this does not exist"):
        make_folder(Folder(path=str(tmp_path / "b"), group="nobody-has-this"))
    assert not (tmp_path / "b").exists()


def test_a_folder_of_the_site_is_left_as_it_is_and_what_differs_is_said(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    raw.chmod(0o2755)
    before = raw.stat()
    another = next(group.gr_name for group in grp.getgrall() if group.gr_gid != before.st_gid)
    folder = Folder(path=str(raw), mode="2770", group=another)
    owner = grp.getgrgid(before.st_gid).gr_name
    with pytest.warns(UserWarning, match=f"its mode is 2755, not 2770, its group is {owner}, not {another}"):
        make_folder(folder)
    after = raw.stat()
    assert (after.st_mode, after.st_gid) == (before.st_mode, before.st_gid)
    made = read_blueprint(CONFIGS / "mixed.yaml", "test", tmp_path)
    assert "its mode is 2755, not" in "\n".join(check(made))


# --- people ------------------------------------------------------------------------------------------------------------------------
def test_started_again_a_blueprint_invites_whoever_is_new_and_all_other_invitations_stay_good(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    me = getpass.getuser()

    def people(**lanes):
        made = read_blueprint(written(tmp_path, people={me: ["live"], **lanes}), folder=tmp_path)
        with service.prepared(made.cluster, made.name):
            pass
        return invite_people(made), service.authority_of(made.name)

    invited, authority = people(anna=["live"], ben=["batch"])
    assert set(invited) == {"anna", "ben"}  # the owner needs none
    files = {path.name: path.read_bytes() for path in authority.folder.iterdir() if path.suffix == ".pem"}
    before = authority.people()
    assert people(anna=["live"], ben=["batch"])[0] == {}
    assert authority.people() == before
    invited, authority = people(anna=["batch", "live"], ben=["batch"], carl=["live"])
    assert set(invited) == {"carl"}
    after = authority.people()
    assert after["anna"] == {**before["anna"], "lanes": ["batch", "live"]}
    assert after["ben"] == before["ben"]
    assert {name: (authority.folder / name).read_bytes() for name in files} == files
    authority.invite("ben", ["batch"], address="tls://127.0.0.1:1", days=-1)
    assert set(people(anna=["batch", "live"], ben=["batch"], carl=["live"])[0]) == {"ben"}


def test_stripes_are_set_on_lustre_once_and_nowhere_else(tmp_path, monkeypatch):
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "lfs").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n')
    (bin_ / "lfs").chmod(0o755)
    folder = Folder(path=str(tmp_path / "raw"), stripe={"count": -1, "size": "16MiB", "pool": "flash"})
    on_lustre = Folder.model_validate(folder)
    monkeypatch.setattr(shared_folders, "network_file_system", lambda path: "lustre")
    assert striping(on_lustre) is None  # no lfs
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    make_folder(on_lustre)
    make_folder(on_lustre)  # it is there now: its stripes stay
    assert (tmp_path / "said").read_text() == f"setstripe -c -1 -S {16 * 2**20} -p flash {tmp_path}/raw\n"
    monkeypatch.setattr(shared_folders, "network_file_system", lambda path: "nfs")
    make_folder(folder.model_copy(update={"path": str(tmp_path / "other")}))
    assert "other" not in (tmp_path / "said").read_text()
    (bin_ / "lfs").write_text("#!/bin/sh\necho 'lfs: no such pool' >&2\nexit 2\n")
    monkeypatch.setattr(shared_folders, "network_file_system", lambda path: "lustre")
    with pytest.raises(StoreError, match="no such pool"):
        make_folder(folder.model_copy(update={"path": str(tmp_path / "third")}))


def test_simulated_particles_are_read_back_with_their_ctf(tmp_path):
    columns = read_particles(simulate_particles(tmp_path, count=30, box=32, pixel_size_angstrom=6.0, seed=4))
    assert len(columns["image_index"]) == 30
    assert np.all((columns["defocus_u_angstrom"] > 9000) & (columns["defocus_u_angstrom"] < 23000))
    again = simulate_particles(tmp_path / "again", count=30, box=32, pixel_size_angstrom=6.0, seed=4)
    assert (tmp_path / "particles.mrcs").read_bytes() == again.with_name("particles.mrcs").read_bytes()


# --- on a real Slurm -----------------------------------------------------------------------------------------------------------------
@pytest.fixture
def facility(slurm, tmp_path, monkeypatch):
    """Start the test profile of a blueprint as a user does; what is left is ended."""
    monkeypatch.setenv("SLURM_CONF", slurm.environ["SLURM_CONF"])
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    started = set()

    def start(path, good=True):
        words = ["blueprint", "start", str(path), "--profile", "test", "--folder", str(tmp_path)]
        started.add(f"{path.stem}-test")
        done = subprocess.run([sys.executable, "-m", "cryodask.cli", *words], capture_output=True, text=True, timeout=240)
        assert (done.returncode == 0) == good, done.stdout + done.stderr
        return done.stdout + done.stderr

    yield start
    for name in started:
        service.find(name).stop()
    deadline = time.monotonic() + 60
    while jobs := slurm.run("squeue", "-h", "-o", "%j"):
        assert time.monotonic() < deadline, jobs
        time.sleep(0.2)


def finished(tmp_path, *sessions, seconds=300):
    """Wait until these sessions have ended well; what their drivers wrote is shown otherwise."""
    deadline = time.monotonic() + seconds
    states = {}
    while set(states.values()) != {"finished"} or len(states) < len(sessions):
        for name in sessions:
            status = tmp_path / "projects" / name / "status.json"
            states[name] = json.loads(status.read_text())["state"] if status.exists() else "not begun"
        ended = [s for s in states.values() if s.startswith("stopped")]
        if ended or time.monotonic() > deadline:
            pytest.fail(f"{states}\n{logs(tmp_path)}")
        time.sleep(0.2)
    return [Project(tmp_path / "projects" / name) for name in sessions]


def logs(tmp_path):
    return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-2000:]}" for p in sorted((tmp_path / "logs").glob("*.log")))


def task_seconds(name):
    return {row["lane"]: row["task_seconds"] for row in service.find(name).usage(by=("lane",))}


def refined(project):
    """Particles of elsewhere have become a map."""
    assert project.particles().sizes["particle"] == 300
    post = project["postprocess"].load()
    assert post["sharpened_map"].shape == (48, 48, 48)
    resolution = float(post["resolution_angstrom"])  # so few steps may not agree in any shell
    assert np.isnan(resolution) or 11 <= resolution < 60


@pytest.mark.heavy
@pytest.mark.slurm
def test_sessions_of_every_kind_run_beside_each_other_and_a_second_start_leaves_them_alone(facility, slurm, tmp_path, monkeypatch):
    """The blueprint ``mixed``, and with it the session of ``image-analysis``, with fewer iterations."""
    content, other = (yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("mixed", "image-analysis"))
    content["sessions"] |= other["sessions"]
    content["profiles"]["test"]["sessions"] |= other["profiles"]["test"]["sessions"]
    fewer = [
        {"classify2d": {"classes": 2, "iterations": 2}},
        {"ab_initio": {"symmetry": "D2", "restarts": 1, "steps": 12, "resolution_angstrom": 28}},
    ]
    fewer += [{"refine3d": {"symmetry": "D2", "iterations": 2}}, "mask", "postprocess"]
    content["profiles"]["test"]["sessions"]["refinement"]["project"]["pipeline"] = fewer
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    said = facility(tmp_path / "mixed.yaml")
    assert "krios1: Slurm job" in said
    again = facility(tmp_path / "mixed.yaml")
    assert "already running as Slurm job" in again
    names = slurm.run("squeue", "-h", "-o", "%j").split()
    assert len(names) == len(set(names)), "no session is there twice"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        assert "Slurm does not answer" in facility(tmp_path / "mixed.yaml", good=False)
    assert sorted(slurm.run("squeue", "-h", "-o", "%j").split()).count("mixed-test-krios1") <= 1
    assert stat.S_IMODE((tmp_path / "raw").stat().st_mode) == 0o2770
    live, again, refinement = finished(tmp_path, "krios1", "again", "refinement")
    refined(refinement)
    mixed_has_run(tmp_path, live, again)


@pytest.mark.slow
@pytest.mark.slurm
def test_preprocessing_takes_movies_of_two_microscopes_to_sorted_particles(facility, tmp_path):
    facility(CONFIGS / "preprocessing.yaml")
    for project in finished(tmp_path, "krios1", "arctica1"):
        curated = project["curate"]
        assert curated.sizes["particle"] >= 15
        assert "dropped_id" not in curated
        assert project.failures() == []
    assert set(task_seconds("preprocessing-test")) == {"live"}


@pytest.mark.slow
@pytest.mark.slurm
def test_image_analysis_takes_particles_of_elsewhere_to_a_map(facility, tmp_path):
    facility(CONFIGS / "image-analysis.yaml")
    refined(*finished(tmp_path, "refinement"))
    assert task_seconds("image-analysis-test")["batch"] > 0


@pytest.mark.slow
@pytest.mark.slurm
def test_mixed_runs_all_lanes_beside_each_other(facility, tmp_path):
    facility(CONFIGS / "mixed.yaml")
    mixed_has_run(tmp_path, *finished(tmp_path, "krios1", "again"))


def mixed_has_run(tmp_path, live, again):
    assert live.particles().sizes["particle"] >= 15
    assert live.failures() == again.failures() == []
    assert again["curate"].sizes["particle"] >= 15
    assert "dropped_id" not in again["curate"]
    deadline = time.monotonic() + 120
    files = [tmp_path / "projects" / f"{name}.txt" for name in ("reduction", "training")]
    while not all(f.exists() and f.read_text() for f in files):
        assert time.monotonic() < deadline, logs(tmp_path)
        time.sleep(0.2)
    deviation, error = (float(f.read_text()) for f in files)
    assert deviation == pytest.approx(1, abs=0.01)
    assert error < 0.2
    used = task_seconds("mixed-test")
    assert set(used) >= {"live", "batch", "hpda", "learning"}
    assert all(seconds > 0 for seconds in used.values())
