"""Jobs that a cluster could not cancel at its end, because Slurm's controller was away: named, noted, and cancelled later."""

from __future__ import annotations

import pytest
import yaml
from _service import cryodask_process, environment_of_tests, wait

from cryodask.cluster.service import leftovers, service
from cryodask.cluster.service.leftovers import Leftovers, cancel_leftovers
from cryodask.cluster.service.whereabouts import in_thread
from cryodask.cluster.settings import parse_settings
from cryodask.cluster.slurm import pool_jobs
from cryodask.cluster.slurm.pools import PoolCluster
from cryodask.errors import ClusterError

pytestmark = pytest.mark.slurm

PENDING = {"memory": "800MiB", "partition": "cpu", "cores": 64, "count": 1}
"""More cores than any node has."""


def settings(folder, **more):
    return {"kind": "slurm", "interface": "lo", "poll_seconds": 0.5, "logs": str(folder / "logs"), "pools": {"huge": PENDING}, **more}


@pytest.fixture
def away(slurm, monkeypatch):
    """Take the controller away until the test ends, or brings it back by calling this."""
    monkeypatch.setenv("SLURM_CONF", slurm.environ["SLURM_CONF"])
    gone = []

    def bring_back():
        while gone:
            gone.pop()
            slurm.start_controller()

    def take():
        slurm.kill_controller()
        gone.append(True)
        return bring_back

    yield take
    bring_back()
    slurm.reset()


def test_a_pending_job_outlives_a_cluster_whose_controller_is_away_and_is_cancelled_afterwards(slurm, away, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_jobs, "_CLOSE_SECONDS", 3.0)
    monkeypatch.setattr(leftovers, "_CANCEL_SECONDS", 3.0)
    with PoolCluster(parse_settings(settings(tmp_path))) as cluster:
        cluster.scale_pool(huge=1)
        wait(slurm.jobs, "the job")
        (job,) = slurm.jobs()
        # the id is known to the cluster once sbatch has answered
        wait(lambda: any(one.job_id == job for one in cluster.workers.values()), "its id")
        bring_back = away()
    assert cluster.jobs_left == [job]
    Leftovers(cluster.cluster_id, cluster.jobs_left).write(tmp_path)
    assert in_thread(cancel_leftovers(tmp_path)) == []
    assert Leftovers.read(tmp_path) == Leftovers(cluster.cluster_id, [job])
    bring_back()
    assert slurm.jobs()[job][0] == "PENDING"
    assert in_thread(cancel_leftovers(tmp_path)) == [job]
    wait(lambda: not slurm.jobs(), "its end")
    assert Leftovers.read(tmp_path) is None
    assert in_thread(cancel_leftovers(tmp_path)) == []


def test_a_cluster_that_ends_as_it_should_leaves_nothing(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", slurm.environ["SLURM_CONF"])
    with PoolCluster(parse_settings(settings(tmp_path))) as cluster:
        cluster.scale_pool(huge=1)
        wait(slurm.jobs, "the job")
    assert cluster.jobs_left == []
    assert not slurm.jobs()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"jobs": []}', "null"])
def test_a_damaged_note_is_none(tmp_path, text):
    (tmp_path / "jobs-left.json").write_text(text)
    assert Leftovers.read(tmp_path) is None


@pytest.mark.slow
def test_the_owner_is_told_what_a_stopped_service_left_and_its_next_start_cancels_it(slurm, away, tmp_path, monkeypatch):
    environment_of_tests(monkeypatch, tmp_path)
    (tmp_path / "left.yaml").write_text(yaml.safe_dump(settings(tmp_path, service={"where": "process"})))
    cryodask_process("cluster", "start", str(tmp_path / "left.yaml"))
    wait(slurm.jobs, "the job")
    (job,) = slurm.jobs()
    bring_back = away()
    with pytest.raises(ClusterError, match=rf"left has ended, but Slurm does not answer: 1 of its jobs may still be there \({job}\)"):
        service.find("left").stop()
    bring_back()
    assert job in slurm.jobs()
    cryodask_process("cluster", "start", str(tmp_path / "left.yaml"))
    wait(lambda: job not in slurm.jobs(), "its end")
    service.find("left").stop()
    assert not slurm.jobs()
