"""``cryodask submit`` and dry runs, by what they print: names, options, keys, clusters that cannot be found, a missing extra."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from _service import COMMAND, cryodask, environment_of_tests

from cryodask.cluster.access import tls
from cryodask.cluster.service import batch, service
from cryodask.cluster.service.driver import drive
from cryodask.cluster.service.service import submit
from cryodask.cluster.settings import JobSettings
from cryodask.errors import ClusterError

_POOLS = {"kind": "slurm", "interface": "lo", "pools": {"cpu": {"memory": "1GiB", "count": 2}}}
_PROJECT = """
name: my project (β-gal)
inputs: {movies: "movies/*.tif"}
microscope: {voltage_kv: 300, spherical_aberration_mm: 2.7, pixel_size_angstrom: 1.0, dose_per_frame: 1.0}
pipeline: [motion]
"""
# as if the extra em had not been installed
_BARE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        name = name.split(".")[0]
        if name in {"gemmi", "imagecodecs", "jinja2", "matplotlib", "mrcfile", "scipy", "starfile", "tifffile", "torch"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from cryodask.cli import main
main()
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    environment_of_tests(monkeypatch, tmp_path)
    (tmp_path / "p.yaml").write_text(_PROJECT)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**_POOLS, "logs": str(tmp_path / "logs")}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_name_of_a_project_becomes_one_word_of_sbatch(home):
    said = cryodask("submit", "p.yaml", "--cluster", "c.yaml", "--dry-run")
    assert "#SBATCH -J cryodask-my-project--gal-\n" in said
    assert "#SBATCH --comment=cryodask:run:my-project--gal-\n" in said
    assert f"#SBATCH --output={home}/logs/cryodask-my-project--gal--%j.log\n" in said


def test_a_walltime_that_slurm_would_take_for_something_else_is_refused_in_three_sentences(home):
    for walltime, says in (("99", "hours:minutes:seconds"), ("12:00", "minutes and seconds")):
        said = cryodask("submit", "p.yaml", "--cluster", "c.yaml", "--walltime", walltime, code=2)
        assert re.search(rf"ProjectFileError: walltime: .*{says}", said)
        assert "Traceback" not in said
        assert "What to do" in said


def test_local_is_no_cluster_to_start_and_a_missing_file_is_not_answered_with_it(home):
    said = cryodask("cluster", "start", "local", code=2)
    assert "nothing to start" in said
    assert "kind: local" in said
    assert "write local" not in cryodask("cluster", "start", "nosuch.yaml", code=2)


@pytest.mark.parametrize("words", [["submit", "p.yaml", "--cluster", "c.yaml", "--dry-run"], ["blueprint", "check", "BLUEPRINT"]])
def test_without_the_extra_for_images_its_name_is_said(words, home, request):
    words = [str(request.config.rootpath / "configs/blueprints/mixed.yaml") if word == "BLUEPRINT" else word for word in words]
    done = subprocess.run([sys.executable, "-c", _BARE, *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert 'pip install "cryodask[em]"' in done.stderr


def test_the_driver_of_a_cluster_that_this_account_does_not_know_fails_without_waiting_for_it(home):
    with pytest.raises(ClusterError, match="There is no cluster nosuch"):
        drive(["true"], "nosuch", 5, wait_seconds=3600.0)
    done = subprocess.run(
        [sys.executable, "-m", "cryodask.cluster.service.driver", "5", "true"],
        env={**os.environ, "CRYODASK_CLUSTER": str(home / "absent.invite")},
        capture_output=True,
        text=True,
        timeout=300,  # of the six hours that it would wait
    )
    assert done.returncode == 1
    assert re.match(rf"There is no {home}/absent.invite", done.stderr)


def test_a_job_is_given_the_whole_path_of_an_invitation(home, monkeypatch):
    found = service.Service("mixed", "tls://127.0.0.1:1", folder=None, security=None)
    monkeypatch.setattr(service, "find", lambda name: found)
    assert f"export CRYODASK_CLUSTER={home}/anna.invite " in submit(["true"], "anna.invite", dry_run=True).script
    # an invitation may lie under another name than the cluster has with its owner
    assert "export CRYODASK_CLUSTER=theirs " in submit(["true"], "theirs", dry_run=True).script


def test_clusters_that_an_account_is_invited_to_are_listed_beside_its_own(home):
    made = tls.Authority.create(home / "elsewhere", owner="service", cluster="shared")
    given = made.invite("facility", [], address="tls://127.0.0.1:4", role="viewer")
    kept = tls.invitation_of("shared")
    kept.parent.mkdir(parents=True)
    shutil.copy(given, kept)
    kept.with_name("torn.invite").write_text("{")
    kept.with_name("torn.invite").chmod(0o600)
    found = json.loads(cryodask("cluster", "status", "--json"))
    assert found["shared"] == {"address": "tls://127.0.0.1:4", "says": ""}
    assert set(found) == {"shared", "torn"}
    assert found["torn"]["address"] is None
    assert found["torn"]["says"]


def test_a_dry_run_of_one_allocation_makes_no_keys_and_prints_the_script_of_the_real_one(home, monkeypatch):
    single = {**_POOLS, "interface": "eth0", "single_allocation": True, "logs": str(home / "logs")}
    (home / "single.yaml").write_text(yaml.safe_dump(single))
    made = submit(["true"], "single.yaml", dry_run=True)
    assert not list(home.rglob("*.pem"))
    monkeypatch.setattr(batch, "sbatch", lambda script: "7")
    assert submit(["true"], "single.yaml").script == made.script
    assert list(home.rglob("certificates/batch/ca-key.pem"))
    assert submit(["true"], "single.yaml", dry_run=True).script == made.script


def test_a_dry_start_of_one_allocation_is_refused_as_the_start_is(home):
    (home / "single.yaml").write_text(yaml.safe_dump({**_POOLS, "single_allocation": True}))
    start = subprocess.run([*COMMAND, "cluster", "start", "single.yaml"], capture_output=True, text=True)
    dry = subprocess.run([*COMMAND, "cluster", "start", "single.yaml", "--dry-run"], capture_output=True, text=True)
    assert "single_allocation describes one batch job" in dry.stderr
    assert (dry.returncode, dry.stdout, dry.stderr) == (start.returncode, start.stdout, start.stderr)


def test_a_batch_job_that_comes_on_top_of_too_many_is_told_to_wait(home, monkeypatch):
    (home / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: AssocMaxSubmitJobLimit' >&2\nexit 1\n")
    (home / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    with pytest.raises(ClusterError, match="accepts no more jobs for now: AssocMaxSubmitJobLimit") as refused:
        batch.sbatch(batch.driver_script(JobSettings(), ["true"], "mixed", lane="batch", name="n", log="/dev/null"))
    assert "try again when some have ended" in refused.value.way_out
