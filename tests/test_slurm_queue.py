"""Jobs that Slurm lets wait, takes only so many of, or ends by a walltime that the cluster file does not name."""

from __future__ import annotations

import os
import re
import shutil
import time
import warnings

import pytest
import yaml
from distributed import Client

from cryodask.cluster import connect
from cryodask.cluster.settings import parse_settings
from cryodask.cluster.slurm import pool_jobs, pool_state, pools
from cryodask.cluster.slurm.pools import PoolCluster, open_pools
from cryodask.errors import ClusterError

pytestmark = pytest.mark.slurm

_ONE = {"memory": "800MiB", "partition": "cpu"}


def wait(condition, what, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def content(tmp_path, **pool):
    return {"kind": "slurm", "interface": "lo", "poll_seconds": 0.5, "logs": str(tmp_path / "logs"), "pools": {"cpu": {**_ONE, **pool}}}


@pytest.fixture
def on_slurm(slurm, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", slurm.environ["SLURM_CONF"])
    yield slurm
    slurm.reset()


def test_connect_says_now_and_then_why_no_worker_comes(on_slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "_FIRST_WORD_SECONDS", 3.0)
    monkeypatch.setattr(PoolCluster.wait_for_first, "__defaults__", (20.0,))
    (tmp_path / "huge.yaml").write_text(yaml.safe_dump(content(tmp_path, cores=64, count=1)))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(ClusterError, match=r"No worker has connected: .*1 PartitionConfig"):
            connect(tmp_path / "huge.yaml")
    said = [str(w.message) for w in seen if "No worker has connected" in str(w.message)]
    # after 3 s, and 6 s later; the next would come 12 s after that
    first, second = (int(re.match(r"No worker has connected for (\d+) s,", text)[1]) for text in said)
    assert first >= 3
    assert second >= first + 5
    assert all("pool cpu: jobs are pending (1 PartitionConfig)" in text for text in said)
    assert on_slurm.jobs() == {}


def test_no_word_is_said_where_workers_come_in_time(on_slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "_FIRST_WORD_SECONDS", 300.0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with open_pools(parse_settings(content(tmp_path, count=1))) as cluster:
            cluster.wait_for_first(300)
            assert cluster.pool_status()["cpu"].workers == 1
    assert not [w for w in seen if "No worker has connected for" in str(w.message)]


def test_a_limit_on_the_number_of_jobs_is_waited_for_and_said(on_slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_state, "_FULL_SECONDS", (5.0, 5.0))
    real, tries, room = shutil.which("sbatch"), tmp_path / "tries", tmp_path / "room"
    (tmp_path / "sbatch").write_text(
        f"#!/bin/sh\necho x >> {tries}\n[ -e {room} ] && exec {real} \"$@\"\necho 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2\n"
        "echo 'sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user size)' >&2\nexit 1\n"
    )
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    asked = lambda: len(tries.read_text().splitlines())  # noqa: E731
    with open_pools(parse_settings(content(tmp_path, count=3))) as cluster:
        assert cluster.what_is_missing().startswith("pool cpu: Slurm accepts no more jobs for now (QOSMaxSubmitJobPerUserLimit;")
        now = cluster.pool_status()["cpu"]
        assert (now.target, now.problem, now.lost, asked()) == (3, "", 0, 3)
        wait(lambda: asked() >= 5, "two more attempts, of one job each")
        before = asked()
        room.touch()
        wait(lambda: cluster.pool_status()["cpu"].workers == 3, "the workers")
        assert cluster.what_is_missing() == ""
        assert asked() <= before + 1 + 3


def test_at_most_twenty_jobs_are_submitted_at_a_time(on_slurm, tmp_path, monkeypatch):
    grew, to_targets = [], pool_jobs.PoolJobs._to_targets

    async def counted(self, **options):
        before = len(self.worker_spec)
        await to_targets(self, **options)
        grew.append(len(self.worker_spec) - before)

    monkeypatch.setattr(pool_jobs.PoolJobs, "_to_targets", counted)
    later = parse_settings(content(tmp_path, count=50, directives=["--begin=now+1hour"]))
    with open_pools(later) as cluster:
        wait(lambda: cluster.pool_status()["cpu"].pending == 50, "all of them")
    assert [size for size in grew if size > 0] == [20, 20, 10]


@pytest.mark.slow
def test_without_a_walltime_a_job_is_replaced_and_left_before_the_one_of_the_partition_ends(on_slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("SBATCH_TIMELIMIT", "1")
    # Slurm's least is a minute: the replacement is due 20 s before its end, the leave 10 s before
    with open_pools(parse_settings(content(tmp_path, count=1))) as cluster, Client(cluster) as client:
        held = client.submit(lambda: 81)
        assert held.result(60) == 81
        (first,) = client.nthreads()
        job = next(iter(on_slurm.jobs()))
        wait(lambda: len(client.nthreads()) == 2, "the replacement", 60)
        assert first in client.nthreads()
        wait(lambda: list(client.nthreads()) not in ([first], []) and first not in client.nthreads(), "the end of the first", 40)
        wait(lambda: job not in on_slurm.jobs(), "the end of its job")
        finished = (on_slurm.folder / "log" / "jobcomp.log").read_text().splitlines()
        assert "TIMEOUT" not in next(line for line in finished if line.startswith(f"JobId={job} "))
        assert held.status == "finished"
        assert held.result(30) == 81
        assert cluster.pool_status()["cpu"].lost == 0
