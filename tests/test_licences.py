"""Licences: stated in cluster files, requested from Slurm, never exceeded by the work of all lanes, and refused where no worker has one."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from distributed import Client, LocalCluster

from cryodask.cluster import LaneCluster
from cryodask.cluster.settings import parse_settings
from cryodask.cluster.slurm.allocation import allocation_script
from cryodask.cluster.slurm.scaling import PoolShape
from cryodask.cluster.slurm.slurm import dry_run
from cryodask.errors import ProjectFileError
from cryodask.formats.mrc import write_mrc
from cryodask.run.map import MapRunner
from cryodask.run.recipe import Plan, make_plan
from cryodask.run.selection import Wanted
from cryodask.run.session import check_inputs, run_plan
from cryodask.stage import STAGES, Context, Params, Resources, stage
from cryodask.store.project import Item

IN_USE: list[int] = []
MOST: list[int] = []
LOCK = threading.Lock()


def use_licence(*args: object, **more: object) -> None:
    with LOCK:
        IN_USE.append(1)
        MOST.append(len(IN_USE))
    time.sleep(0.02)
    with LOCK:
        IN_USE.pop()


class LicensedJob:
    run = staticmethod(use_licence)

    def brief(self, item: Item, again: bool) -> None:
        return None

    def quarantine(self, item: Item, error: str, message: str, tries: int) -> None:
        raise AssertionError(message)


class NoParams(Params):
    """None."""


@pytest.fixture
def plan(tmp_path):
    def licensed(params: NoParams, *, half_map, context: Context):
        """Needs a licence."""
        return {"solvent_mask": np.ones(half_map.shape[1:], np.float32)}

    stage(version=1, shape="whole", needs=["half_map"], gives=["solvent_mask"], resources=Resources(licences=("topaz",)))(licensed)
    for seed, name in enumerate(("half1", "half2")):
        write_mrc(tmp_path / f"{name}.mrc", np.random.default_rng(seed).normal(size=(8, 8, 8)).astype(np.float32), 1.0)
    (tmp_path / "p.yaml").write_text("name: p\ninputs: {half_maps: [half1.mrc, half2.mrc]}\npipeline: [licensed]\n")
    yield make_plan(tmp_path / "p.yaml")
    del STAGES["licensed"]


def test_no_more_licences_are_in_use_at_once_than_there_are_over_all_lanes():
    options = {"processes": False, "threads_per_worker": 1, "dashboard_address": None}
    with (
        LaneCluster(n_workers=4, licences={"topaz": 2}, lanes={"batch": 1, "hpda": 1}, **options) as cluster,
        Client(cluster, name="hpda/ben") as ben,
        Client(cluster, name="batch/anna") as anna,
    ):
        theirs = ben.map(use_licence, range(10), resources={"licence-topaz": 1}, pure=False)
        items = [Item(row, f"item{row}", f"content {row}") for row in range(10)]
        counts = MapRunner(anna, LicensedJob(), licences=("topaz",)).run(iter(items))
        ben.gather(theirs)
    assert counts["done"] == 10
    assert max(MOST) == 2


def _cluster_file(folder: Path, text: str) -> Wanted:
    (folder / "cluster.yaml").write_text(text)
    return Wanted(cluster=str(folder / "cluster.yaml"))


def test_a_step_whose_licence_nobody_offers_is_refused_before_any_work(plan: Plan, tmp_path):
    said = "licensed needs the licence topaz, but no worker of local has it. Use a cluster file with licences: {topaz: N}"
    with pytest.raises(ProjectFileError, match=said):
        check_inputs(plan)
    assert check_inputs(plan, _cluster_file(tmp_path, "kind: local\nlicences: {topaz: 1}\n")) == []
    pools = "kind: slurm\npools:\n  cpu: {memory: 2GiB, licences: {%s: 1}}\n"
    with pytest.raises(ProjectFileError, match=r"no worker of .* has it. Give a pool of .* licences: {topaz: N}"):
        check_inputs(plan, _cluster_file(tmp_path, pools % "matlab"))
    assert check_inputs(plan, _cluster_file(tmp_path, pools % "topaz")) == []


def test_a_scheduler_given_by_its_address_is_asked_what_its_workers_have(plan: Plan, monkeypatch):
    options = {"n_workers": 1, "processes": False, "threads_per_worker": 1, "dashboard_address": None}
    with LocalCluster(**options, memory_limit="2 GB") as cluster, Client(cluster) as client:
        with pytest.raises(
            ProjectFileError, match=r"no worker of inproc://.* has it. Start workers that do: dask worker --resources licence-topaz=1"
        ):
            run_plan(plan, client)
    with LocalCluster(**options, resources={"licence-topaz": 1}, memory_limit="2 GB") as cluster, Client(cluster) as client:
        resources = Resources(licences=("topaz",), memory=lambda params, sizes: 3e9)
        with monkeypatch.context() as patch:
            patch.setattr(STAGES["licensed"], "resources", resources)
            with pytest.raises(ProjectFileError, match=r"needs about 3.00 GB .* each worker has 2.00 GB. Start workers with more memory"):
                run_plan(plan, client)
        assert "licensed" in run_plan(plan, client)


def test_the_jobs_of_a_pool_request_their_licences_and_divide_them_among_the_processes():
    pool = {"memory": "8GiB", "cores": 4, "processes": 2, "count": 3, "licences": {"topaz": 4, "em@server": 2}}
    settings = parse_settings({"kind": "slurm", "interface": "lo", "pools": {"cpu": pool}})
    script = dry_run(settings)["cpu"]
    assert "#SBATCH --licenses=topaz:4,em@server:2\n" in script
    assert '--resources "licence-topaz=2,licence-em@server=1,pool-cpu=1e+09"' in script
    single = parse_settings({"kind": "slurm", "interface": "lo", "pools": {"cpu": pool}, "single_allocation": True})
    assert "#SBATCH --licenses=topaz:12,em@server:6\n" in allocation_script(single, "true")
    shape = PoolShape.of("cpu", settings.pools["cpu"], 0, 3)
    assert [shape.slots((needs,)) for needs in (("licence-topaz", 1.0), ("licence-em@server", 1.0), ("licence-other", 1.0))] == [4, 2, 0]


@pytest.mark.parametrize(
    ("pool", "says"),
    [
        ({"licences": {"topaz": 3}, "processes": 2, "cores": 2}, "3 licences topaz cannot be divided equally among 2 processes"),
        ({"licences": {"topaz": 0}}, "greater than 0"),
        ({"licences": {"to paz": 1}}, "pattern"),
        ({"licences": {"topaz": 1}, "directives": ["--licenses=topaz:1"]}, "leave them out of directives"),
    ],
)
def test_licences_that_no_job_can_request_are_refused(pool, says):
    with pytest.raises(ProjectFileError, match=says):
        parse_settings({"kind": "slurm", "pools": {"cpu": {"memory": "2GiB", **pool}}})
