"""One batch job with a whole cluster: scheduler, workers and driver."""

from __future__ import annotations

import shlex
from pathlib import Path

from cryodask.cluster.access import tls
from cryodask.cluster.settings import SlurmSettings
from cryodask.cluster.slurm.slurm import (
    COMMENT,
    DEATH_SECONDS,
    directives_of,
    licence_directive,
    logs_of,
    memory_directive,
    prologue_of,
    python_of,
    refuse_clear_text,
    worker_options_of,
)


def allocation_script(settings: SlurmSettings, driver: str, *, certificates: Path | None = None) -> str:
    """A batch script with a scheduler, the workers of the only pool, and a driver, which finds them through ``$CRYODASK_CLUSTER``.

    The job ends when either driver or workers end, because a driver without workers would wait until the walltime.

    Parameters
    ----------
    settings : SlurmSettings
        With ``single_allocation``.
    driver : str
        A shell command: ``cryodask run project.yaml --cluster "$CRYODASK_CLUSTER"``.
    certificates : Path, optional
        Folder of the cluster's authority.
    """
    refuse_clear_text(settings, certificates)
    (name, pool), logs = next(iter(settings.pools.items())), logs_of(settings)
    workers, tasks = pool.workers_per_job, pool.wanted * pool.workers_per_job
    cores = pool.cores // workers
    asked = [f"-J {COMMENT}-batch", *(f"-{k} {v}" for k, v in (("p", pool.partition), ("A", pool.account), ("t", pool.walltime)) if v)]
    asked += [f"-n {tasks}", f"--cpus-per-task={cores}", *memory_directive(pool, pool.cores, tasks=tasks)]
    asked += [line for line in directives_of(pool, logs) if not line.startswith("--gres")]
    asked += [*(["--gpus-per-task=1"] if pool.gpus else []), *licence_directive(pool, pool.wanted), *pool.directives]
    python, interface = python_of(pool), pool.interface or settings.interface
    common = ["--scheduler-file", '"$CRYODASK_CLUSTER"', *(["--interface", interface] if interface else [])]
    common += ["--protocol tls://"] if certificates else []
    lanes = f"--preload cryodask.cluster.{'guard' if certificates else 'fairshare'}"
    scheduler = [python, "-m distributed.cli.dask_scheduler", *common, "--port 0 --dashboard-address 127.0.0.1:0", lanes]
    limit = pool.worker_bytes
    worker = [python, "-m distributed.cli.dask_worker", *common, f"--nanny --nthreads {cores} --memory-limit {limit}"]
    worker += [f'--death-timeout {DEATH_SECONDS} --local-directory "{pool.scratch}"', *worker_options_of(name, pool, certificates)]
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {line}" for line in asked),
        *[line for line in prologue_of(pool, certificates, people=settings.people_on_workers) if "CUDA" not in line],
        *_scheduler_exports(settings, certificates),
        f"folder={shlex.quote(str(logs))}/batch-$SLURM_JOB_ID",
        'mkdir -p -m 700 "$folder"',
        'export CRYODASK_CLUSTER="$folder/scheduler.json"',
        " ".join(scheduler) + " &",
        """trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$folder"' EXIT""",
        "# -K: a worker that dies of a signal ends all of them, else the step hangs. -c: a step does not inherit it from the job",
        f"srun -K -n {tasks} -c {cores} " + " ".join(worker) + " &",
        "workers=$!",
        'until [ -s "$CRYODASK_CLUSTER" ] || ! kill -0 $workers; do sleep 0.2; done',
        f"( {driver} ) &",
        "driver=$!",
        "wait -n $workers $driver",
        "ended=$?",
        'if kill -0 $driver 2>/dev/null; then echo "the workers ended before the driver" >&2; exit 1; fi',
        "exit $ended",
    ]
    return "\n".join(lines) + "\n"


def _scheduler_exports(settings: SlurmSettings, certificates: Path | None) -> list[str]:
    # Dask parses the value of a variable as a Python literal
    values = {"DASK_CRYODASK__FAIRSHARE": repr(settings.sharing())}
    if certificates:
        files = tls.security(certificates, "scheduler").get_tls_config_for_role("scheduler")
        values |= {f"DASK_DISTRIBUTED__COMM__TLS__SCHEDULER__{k.upper()}": str(files[k]) for k in ("cert", "key")}
        values["DASK_CRYODASK__GUARD"] = repr({"users": str(certificates / "people.json"), **settings.graph_limits()})
    return [f"export {name}={shlex.quote(value)}" for name, value in values.items()]
