"""Time from ``connect()`` to the first result on Slurm, and what is recomputed when a pool shrinks.

``python benchmarks/slurm_start.py [--times 5]``: a real Slurm in a temporary folder (``cryodask.testing.slurm``), pools with certificates
on a network interface of this machine. Twenty results on three jobs, then two of the jobs are let go: each task leaves a line in a file
when it runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import psutil
import yaml

from cryodask.cluster import close, connect
from cryodask.cluster.slurm.pools import PoolCluster
from cryodask.testing.slurm import TinySlurm, missing_programs


def noted(number: int, log: str) -> int:
    """A result that is worth keeping."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{number}\n")
    return number


def interface() -> str:
    """A network interface that is up and not loopback, else loopback."""
    up = [name for name, state in psutil.net_if_stats().items() if state.isup and name != "lo"]
    return next((name for name in up if any(a.family.name == "AF_INET" for a in psutil.net_if_addrs()[name])), "lo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="once, as a smoke test")
    arguments = parser.parse_args()
    if missing := missing_programs():
        raise SystemExit(f"Slurm is absent: {', '.join(missing)}")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    seconds, again = [], []
    print(f"interface {interface()}\n{'connect to first result, s':>28}{'computed again, of 20':>24}")
    with TinySlurm() as slurm, tempfile.TemporaryDirectory() as folder:
        os.environ |= slurm.environ
        file = Path(folder) / "cluster.yaml"
        pool = {"partition": "cpu", "memory": "800MiB", "count": 3}
        file.write_text(yaml.safe_dump({"kind": "slurm", "interface": interface(), "logs": folder, "pools": {"cpu": pool}}))
        for number in range(1 if arguments.quick else arguments.times):
            log = Path(folder) / f"log{number}"
            begin = time.perf_counter()
            client = connect(str(file), lane="hpda")
            try:
                assert client.submit(sum, [1, 2]).result() == 3
                seconds.append(time.perf_counter() - begin)
                client.wait_for_workers(3, timeout=120)
                kept = client.map(noted, range(20), log=str(log), pure=False)
                client.gather(kept)
                cluster = client.cluster
                assert isinstance(cluster, PoolCluster)
                cluster.scale_pool(cpu=1)
                while len(cluster.scheduler.workers) > 1:
                    time.sleep(0.1)
                assert client.gather(kept) == list(range(20))
                again.append(len(log.read_text().splitlines()) - 20)
            finally:
                close(client)
            print(f"{seconds[-1]:28.1f}{again[-1]:24}", flush=True)
    print(json.dumps({"first_result_seconds": round(statistics.median(seconds), 2), "recomputed": max(again)}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    main()
