"""Cluster files: what they may say, and the job scripts that come of them, as text."""

from __future__ import annotations

import ast
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cryodask.cluster.access.tls import Authority
from cryodask.cluster.settings import AddressSettings, LocalSettings, SlurmSettings, parse_settings, read_cluster_file
from cryodask.cluster.slurm.allocation import allocation_script
from cryodask.cluster.slurm.pool_state import PoolState, PoolStatus, missing
from cryodask.cluster.slurm.pools import PoolCluster
from cryodask.cluster.slurm.slurm import QueuedJob, dry_run, is_full, new_cluster_id, owner_is_dead, walltime_seconds
from cryodask.errors import ClusterError, ProjectFileError

_CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "clusters"


def slurm(**pool):
    return {"kind": "slurm", "pools": {"cpu": {"memory": "4GiB", **pool}}}


def test_the_shipped_files_are_read():
    kinds = {path.name: read_cluster_file(path) for path in _CONFIGS.glob("*.yaml")}
    assert isinstance(kinds["local.yaml"], LocalSettings)
    assert isinstance(kinds["address.yaml"], AddressSettings)
    assert isinstance(kinds["slurm.yaml"], SlurmSettings)
    assert list(kinds["mixed.yaml"].pools) == ["cpu", "gpu", "highmem", "preemptible"]
    assert [kinds["mixed.yaml"].pools[n].workers_per_job for n in ("cpu", "gpu")] == [4, 4]


def test_the_limits_of_graphs_reach_the_scheduler_of_a_single_allocation_too(tmp_path):
    Authority.create(tmp_path, owner="service")
    single = parse_settings(slurm(count=1) | {"single_allocation": True, "max_graph_tasks": 77})
    script = allocation_script(single, "true", certificates=tmp_path)
    (guard,) = [line for line in script.splitlines() if line.startswith("export DASK_CRYODASK__GUARD=")]
    assert ast.literal_eval(shlex.split(guard.partition("=")[2])[0])["max_graph_tasks"] == 77


def test_every_line_that_is_commented_out_in_the_shipped_files_may_be_said():
    text = (_CONFIGS / "slurm.yaml").read_text()
    lines = [line for line in text.splitlines()[1:] if not line.startswith("# Workers")]
    content = yaml.safe_load("\n".join(line.replace("# ", "", 1) if line.lstrip().startswith("# ") else line for line in lines))
    said = parse_settings(content)
    assert (said.interface, said.port, said.pools["cpu"].image) == ("ib0", 8786, "/software/cryodask.sif")
    assert (said.max_graph_bytes, said.max_graph_tasks) == ("256MiB", 2_000_000)
    assert len(said.pools["cpu"].environment) == 2
    assert said.pools["cpu"].directives == ("--constraint=rome",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"kind": "slrum"}, "did you mean 'slurm'"),
        ({"kind": "local", "worker": 3}, "did you mean 'workers'"),
        ({"kind": "slurm", "pool": {}}, "did you mean 'pools'"),
        (slurm(partitoin="cpu"), r"pools.cpu.partitoin.*did you mean 'partition'"),
        (slurm(walltime=43200), "hours:minutes:seconds"),
        (slurm(walltime="12h"), "hours:minutes:seconds"),
        (slurm(walltime="12:00"), 'minutes and seconds: write "12:00:00" if these are hours, "0:12:00" if not'),
        ({**slurm(), "driver": {"walltime": "30:00"}}, r"driver.walltime.*minutes and seconds"),
        (slurm(memory="much"), "a number with a unit"),
        (slurm(count=2, maximum=4), "give either count, or minimum and maximum"),
        (slurm(minimum=4, maximum=2), "below minimum"),
        (slurm(gpus=2, processes=3, cores=4), "one process per GPU"),
        (slurm(gpus=4), "4 processes need as many cores, not 1"),
        (slurm(directives=["--exclusive\nrm -r ~"]), "single line"),
        ({"kind": "slurm", "pools": {"CPU nodes": {"memory": "1GiB"}}}, "pattern"),
        ({**slurm(), "lanes": {"live": 3}, "reserve": {"liev": 1}}, "did you mean 'live'"),
        ({**slurm(), "single_allocation": True}, "one pool, with a count"),
        ({"kind": "address"}, "tcp://host:port"),
        ({"kind": "address", "address": "tcp://a:1", "invitation": "a.invite"}, "tcp://host:port"),
        ({"kind": "address", "invitation": "a.json"}, r"invitation.*invite"),
        (["local"], "not a mapping of names to values"),
    ],
)
def test_what_a_file_may_not_say_is_refused_in_three_sentences(content, says):
    with pytest.raises(ProjectFileError, match=says) as refused:
        parse_settings(content, "cluster.yaml")
    assert "cluster.yaml" in refused.value.what
    assert refused.value.way_out


def test_an_unquoted_walltime_in_yaml_is_no_number_to_base_sixty(tmp_path):
    (tmp_path / "c.yaml").write_text("kind: slurm\npools:\n  cpu:\n    memory: 4GiB\n    walltime: 12:00:00\n")
    assert read_cluster_file(tmp_path / "c.yaml").pools["cpu"].walltime == "12:00:00"


def test_scratch_on_a_network_file_system_is_refused_unless_asked_for(monkeypatch):
    mounts = "/dev/sda / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\n/dev/sdb /home/fast xfs rw 0 0\n"
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: mounts if str(self) == "/proc/mounts" else read(self, *a, **k))
    with pytest.raises(ProjectFileError, match=r"network file system \(nfs4\)"):
        parse_settings(slurm(scratch="/home/anna/tmp"))
    parse_settings(slurm(scratch="/home/anna/tmp", network_scratch=True))
    parse_settings(slurm(scratch="/home/fast/tmp"))
    parse_settings(slurm(scratch="$SLURM_TMPDIR"))


_HEAD = """\
#!/usr/bin/env bash

#SBATCH -J cryodask-{pool}
#SBATCH -p {partition}
#SBATCH -A em
#SBATCH -n 1
#SBATCH --cpus-per-task={cores}
#SBATCH -t 12:00:00
#SBATCH --mem=65536M
#SBATCH --no-requeue
#SBATCH --open-mode=append
#SBATCH --output=/logs/%x-%j.log
"""
_EXPORTS = """\
export OMP_NUM_THREADS=1
export MKL_NUM_THREADS=1
export OPENBLAS_NUM_THREADS=1
export NUMEXPR_NUM_THREADS=1
export MALLOC_MMAP_THRESHOLD_=33554432
export MALLOC_TRIM_THRESHOLD_=536870912
export PYTHONDONTWRITEBYTECODE=''
"""
_COMMON = {"account": "em", "memory": "64GiB", "walltime": "12:00:00"}
_PAGES = "--dashboard-address 127.0.0.1:0 --no-dashboard --preload cryodask.cluster.access.versions"
_LIFETIME = "--lifetime 42600s --lifetime-stagger 300s"
_WORKER = "-m distributed.cli.dask_worker SCHEDULER --name"


def parts(script):
    """Text before the exports of Dask's settings, these, and the text after them."""
    lines = script.splitlines(keepends=True)
    dask = [line for line in lines if line.startswith("export DASK_")]
    first = lines.index(dask[0])
    return "".join(lines[:first]), dask, "".join(lines[first + len(dask) :])


def without_scratch(after):
    """The rest of a script, without the line that looks at its scratch, which has a test of its own."""
    first, _, rest = after.partition("\n")
    assert first.startswith("scratch=")
    return rest


def test_the_script_of_a_pool_as_text():
    pool = {**_COMMON, "partition": "cpu", "qos": "long", "cores": 16, "processes": 4, "scratch": "/scratch", "python": "/opt/py"}
    pool |= {"environment": ["module load openmpi"], "directives": ["--constraint=rome"], "interface": "ib0", "resources": {"disk": 2}}
    before, dask, after = parts(dry_run(parse_settings({"kind": "slurm", "logs": "/logs", "pools": {"cpu": pool}}))["cpu"])
    directives = "#SBATCH --qos=long\n#SBATCH --comment=cryodask:CLUSTER:cpu-0\n#SBATCH --constraint=rome\nmodule load openmpi\n"
    assert before == _HEAD.format(pool="cpu", partition="cpu", cores=16) + directives + _EXPORTS
    assert "export DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT=45s\n" in dask
    assert without_scratch(after) == (
        f"exec /opt/py {_WORKER} cpu-0 --nthreads 4 --memory-limit 14.40GiB --nworkers 4 --nanny --death-timeout 180"
        f' --local-directory "/scratch" {_PAGES} --resources "disk=2,pool-cpu=1e+09"'
        f" {_LIFETIME} --interface ib0\n"
    )


def test_the_script_of_a_job_with_two_gpus_starts_a_worker_for_each_in_the_image():
    pool = {**_COMMON, "partition": "gpu", "cores": 8, "gpus": 2, "image": "/software/cryo dask.sif"}
    before, _, after = parts(dry_run(parse_settings({"kind": "slurm", "logs": "/logs", "pools": {"gpu": pool}}))["gpu"])
    directives = "#SBATCH --gres=gpu:2\n#SBATCH --comment=cryodask:CLUSTER:gpu-0\n"
    assert before == _HEAD.format(pool="gpu", partition="gpu", cores=8) + directives + _EXPORTS
    assert without_scratch(after) == (
        ': "${CUDA_VISIBLE_DEVICES:?Slurm gave this job no GPU}"\n'
        'IFS=, read -ra devices <<< "$CUDA_VISIBLE_DEVICES"\n'
        'for i in "${!devices[@]}"; do\n'
        "    CUDA_VISIBLE_DEVICES=${devices[$i]} apptainer exec --nv --bind \"${TMPDIR:-/tmp}\" '/software/cryo dask.sif' python3"
        f" {_WORKER} gpu-0-$i --nthreads 4 --memory-limit 28.80GiB --nanny --death-timeout 180"
        f' --local-directory "${{TMPDIR:-/tmp}}" {_PAGES} --resources "GPU=1,pool-gpu=1e+09"'
        f" {_LIFETIME} &\n"
        "done\nwait\n"
    )


def test_every_script_is_shell_without_errors():
    single = parse_settings({**slurm(count=2, gpus=1), "single_allocation": True, "interface": "lo"})
    scripts = [*dry_run(read_cluster_file(_CONFIGS / "mixed.yaml")).values(), allocation_script(single, "cryodask run p.yaml")]
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_dry_run_makes_no_folders(tmp_path):
    dry_run(parse_settings({**slurm(), "logs": str(tmp_path / "logs")}))
    assert not (tmp_path / "logs").exists()


def test_a_users_own_settings_of_dask_jobqueue_do_not_leak_into_the_scripts(tmp_path):
    (tmp_path / "jobqueue.yaml").write_text(
        "jobqueue:\n  slurm:\n    queue: theirs\n    walltime: '0:01:00'\n    job-extra-directives: [--x]\n"
    )
    code = (
        "from cryodask.cluster.slurm.slurm import dry_run\nfrom cryodask.cluster.settings import parse_settings\n"
        f"print(dry_run(parse_settings({slurm()!r}))['cpu'])"
    )
    out = subprocess.run([sys.executable, "-c", code], env={"DASK_CONFIG": str(tmp_path), "HOME": "/"}, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "#SBATCH --mem=4096M" in out.stdout
    assert not any(word in out.stdout for word in ("theirs", "#SBATCH -t", "--x\n"))


_CTRL_C = """
import signal, sys, threading
from cryodask.cluster.slurm.slurm import load_jobqueue
from cryodask.errors import ClusterError
if sys.argv[1] == "thread":
    def first():
        try:
            load_jobqueue()
        except ClusterError as error:
            print("refused:", error.what)
    thread = threading.Thread(target=first)
    thread.start()
    thread.join()
before = signal.getsignal(signal.SIGINT)
load_jobqueue()
import dask_jobqueue.runner
assert signal.getsignal(signal.SIGINT) is before is signal.default_int_handler
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("KeyboardInterrupt")
"""


@pytest.mark.parametrize(
    ("where", "says"), [("main", ""), ("thread", "refused: Slurm pools cannot be opened in a thread before dask-jobqueue is imported.\n")]
)
def test_ctrl_c_is_still_ctrl_c_after_dask_jobqueue_came(where, says):
    out = subprocess.run([sys.executable, "-c", _CTRL_C, where], capture_output=True, text=True)
    assert out.stdout == says + "KeyboardInterrupt\n", out.stderr


def test_dask_jobqueue_still_takes_the_handler_of_ctrl_c_by_itself():
    # when this fails, load_jobqueue has nothing to mend any more
    code = "import signal, dask_jobqueue; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
    assert signal.getsignal(signal.SIGINT) is not None


def test_the_owner_of_a_cluster_is_known_to_live_or_to_be_dead():
    own = new_cluster_id()
    host, pid, born, name = own.split(".")
    assert not owner_is_dead(own)
    assert owner_is_dead(f"{host}.{pid}.{int(born) - 100}.{name}")
    assert not owner_is_dead(f"elsewhere.{pid}.{int(born) - 100}.{name}")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert owner_is_dead(f"{host}.{ended.pid}.{born}.{name}")


@pytest.mark.parametrize(("kind", "ends"), [("nfs", True), ("lustre", True), ("ext2/ext3", False), ("tmpfs", False), ("xfs", False)])
@pytest.mark.parametrize("single", [False, True])
def test_a_job_whose_scratch_turns_out_to_be_on_a_network_ends_with_a_sentence(kind, ends, single, tmp_path):
    content = {**slurm(count=1), "interface": "lo", "single_allocation": single}

    def script(content):
        settings = parse_settings(content)
        return allocation_script(settings, "true") if single else dry_run(settings)["cpu"]

    (line,) = (line for line in script(content).splitlines() if "stat -f" in line)
    (tmp_path / "stat").write_text(f'#!/bin/sh\n[ "$4" = "{tmp_path}" ] && echo "{kind}"\n')
    (tmp_path / "stat").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TMPDIR": f"{tmp_path}/not/made/yet"}
    done = subprocess.run(["bash", "-c", f"{line}\necho went on"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == ((1, "") if ends else (0, "went on\n"))
    assert (f"scratch folder {tmp_path}/not/made/yet is on a network file system" in done.stderr) == ends
    assert "stat -f" not in script({**content, "pools": {"cpu": {"memory": "4GiB", "count": 1, "network_scratch": True}}})


def test_each_worker_of_an_allocation_gets_all_cores_of_its_task():
    settings = parse_settings({**slurm(count=2, cores=8, processes=2), "interface": "lo", "single_allocation": True})
    script = allocation_script(settings, "true")
    assert "#SBATCH --cpus-per-task=4\n" in script
    assert "srun -K -n 4 -c 4 " in script


@pytest.mark.parametrize(
    ("said", "full"),
    [
        ("AssocMaxSubmitJobLimit; Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size)", True),
        ("QOSMaxSubmitJobPerUserLimit; Batch job submission failed: Job violates accounting/QOS policy (job submit limit)", True),
        ("AssocGrpSubmitJobsLimit", True),
        ("Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", True),
        ("QOSMaxCpuPerJobLimit; Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size)", False),
        ("invalid partition specified: nope; Batch job submission failed: Invalid partition name specified", False),
    ],
)
def test_a_limit_on_the_number_of_jobs_passes_and_other_refusals_do_not(said, full):
    assert is_full(said) == full


@pytest.mark.parametrize(
    ("text", "seconds"), [("12:00:00", 43200), ("30:00", 1800), ("1-00:00:00", 86400), ("2-12:30", 217800), ("0:01:05", 65)]
)
def test_walltimes_are_read_as_slurm_reads_them(text, seconds):
    assert walltime_seconds(text) == seconds


def test_losses_are_replaced_at_once_up_to_the_limit_of_an_hour_and_failed_starts_later_and_later():
    pool = PoolState(target=1)
    assert all(pool.count_loss(float(t), came=True, per_hour=3) for t in range(3))
    assert pool.not_before == 0
    assert pool.count_loss(10.0, came=True, per_hour=3)
    assert pool.not_before == 3600
    pool.aim(1)
    pauses = []
    for t in (5000.0, 5010.0):
        assert pool.count_loss(t, came=False, per_hour=60)
        pauses.append(pool.not_before - t)
    assert pauses == [2, 4]
    assert not pool.count_loss(5020.0, came=False, per_hour=60)


def test_what_is_missing_is_said_in_one_sentence():
    settings = read_cluster_file(_CONFIGS / "mixed.yaml").pools
    status = {
        "cpu": PoolStatus(2, 1, 1, 4, {"Resources": 1}, "", 0),
        "gpu": PoolStatus(1, 1, 0, 2, {}, "", 0),
        "highmem": PoolStatus(0, 0, 0, 0, {}, "Invalid partition", 0),
        "preemptible": PoolStatus(0, 0, 0, 0, {}, "", 3),
    }
    assert missing(status, settings, slurm_answers=False) == (
        "pool cpu: jobs are pending (1 Resources); pool gpu: 2 workers of 1 running jobs have connected;"
        " pool highmem: Invalid partition; Slurm does not answer"
    )


def test_a_queue_that_takes_no_more_is_said_and_asked_later_and_later():
    pool, pauses = PoolState(target=4), []
    for now in (0.0, 100.0, 200.0):
        pool.count_full(now, "AssocMaxSubmitJobLimit")
        pauses.append(pool.not_before - now)
    assert pauses == [15, 30, 60]
    status = {"cpu": PoolStatus(4, 2, 0, 8, {}, "", 0, pool.full)}
    settings = read_cluster_file(_CONFIGS / "mixed.yaml").pools
    assert missing(status, settings, slurm_answers=True) == "pool cpu: Slurm accepts no more jobs for now (AssocMaxSubmitJobLimit)"
    pool.aim(4)
    assert (pool.full, pool.not_before) == ("", 0)


def test_a_job_that_completes_has_lost_its_workers_and_a_pending_one_has_not():
    states = {state: QueuedJob("1", state, "", None, "", "", "").alive for state in ("PENDING", "RUNNING", "COMPLETING", "PREEMPTED")}
    assert states == {"PENDING": True, "RUNNING": True, "COMPLETING": False, "PREEMPTED": False}


def test_nothing_listens_beyond_this_machine_without_certificates():
    for settings in ({**slurm(), "interface": "ib0"}, slurm(), {**slurm(interface="ib0"), "interface": "lo"}):
        with pytest.raises(ClusterError, match="be encrypted"):
            PoolCluster(parse_settings(settings))
    with pytest.raises(ClusterError, match="be encrypted"):
        allocation_script(parse_settings({**slurm(count=2), "single_allocation": True}), "true")


def test_an_interface_that_this_machine_lacks_is_refused_with_those_it_has(tmp_path):
    with pytest.raises(ClusterError, match="no network interface ib7") as refused:
        PoolCluster(parse_settings({**slurm(), "interface": "ib7"}), certificates=tmp_path, owner="service")
    assert "lo" in refused.value.way_out


@pytest.mark.parametrize(
    ("text", "directive"), [("16G", "16384M"), ("16 g", "16384M"), ("16GiB", "16384M"), ("16GB", "15259M"), ("2000M", "2000M")]
)
def test_memory_without_a_b_is_binary_as_slurm_reads_it(text, directive):
    settings = parse_settings(slurm(memory=text, count=1))
    assert f"#SBATCH --mem={directive}\n" in dry_run(settings)["cpu"]
    assert parse_settings({"kind": "local", "memory": text}).memory == settings.pools["cpu"].memory


def test_a_worker_has_its_part_of_what_the_workers_of_a_job_may_fill():
    # a tenth of 64 GiB stays free: 0.9 * 64 * 2**30 = 61847529062 bytes; one of four processes has 15461882265, one of two GPUs 30923764531
    of_processes = parse_settings(slurm(memory="64GiB", cores=16, processes=4)).pools["cpu"]
    of_gpus = parse_settings(slurm(memory="64GiB", cores=16, gpus=2)).pools["cpu"]
    assert (of_processes.limit_bytes, of_processes.worker_bytes, of_gpus.worker_bytes) == (61_847_529_062, 15_461_882_265, 30_923_764_531)
