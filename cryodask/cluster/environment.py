"""Settings and environment of every worker and scheduler that cryodask starts."""

from __future__ import annotations

from typing import Any

import dask

# One thread per task slot: the runners fill the cores with tasks, and the number of threads changes the last bits of sums.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")

# Dask's own setting (trim at 64 KiB) returns every temporary array to the operating system and faults it in again: that took more than
# half of the CPU time of a refinement. 32 MiB is the largest threshold that glibc accepts.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(512 << 20)}

SETTINGS: dict[str, Any] = {
    # SpecCluster closes a nanny for good when its worker is away for this long (15 s by default), so a slow restart would hang the run
    "distributed.deploy.lost-worker-timeout": "1h",
    # a task whose worker died is retried on this many others before it is blamed; the runners, which retry suspects in their own processes,
    # ask for none (``run/isolation.py``)
    "distributed.scheduler.allowed-failures": 3,
    # the statistical profiler costs 2 % of a core per idle worker
    "distributed.worker.profile.enabled": False,
    # results are spilled by their own size; by process memory they would always be spilled once it holds the block runner's cache
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.target": 0.5,
    "distributed.admin.tick.limit": "30s",
    # every process measures its own latency 50 times per second, and the machine twice: with two workers that was 6 of the 8 % of
    # a core that an idle cluster used (memory limits have their own interval)
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "3s",
    "distributed.comm.timeouts.connect": "60s",
}


def as_the_site_says(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a server with ``distributed.KIND.blocked-handlers``, for which distributed looks under the name of the class."""
    if options.get("blocked_handlers") is None:
        options["blocked_handlers"] = dask.config.get(f"distributed.{kind}.blocked-handlers", None) or []
    return options
