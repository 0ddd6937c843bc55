"""What a movie of 4096 x 4096 x 40 costs while it is processed live: CPU by stage, the platform's share, bytes written over bytes read.

``python benchmarks/live_budget.py [--quick]``: the movies of ``stage_costs.py`` (two, simulated, LZW TIFF, 250 particles each) through
ingest, motion, ctf, pick and extract in one fused task each, on a local cluster of one worker of one thread. The first movie imports and
compiles what is needed, and the gain is compared with it; what is measured is the run that finds the second one. A stage's CPU is what its
task measured; *store* is the rest of the worker process: decoding, compressing, checksums, writing. The platform is what driver,
scheduler and nanny use during that run, including the report of the session. Goals: at most 13 CPU s per movie, 8 % for the platform, and
no more bytes written than read; the second row has movies read in place (``ingest: {storage: in_place}``).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from stage_costs import MAP_STAGES, OUT, session

from cryodask.cluster.connect import close, connect
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan

PICTURE = OUT.parent / "live_budget.png"


def _used() -> float:
    """CPU seconds of a worker."""
    return time.process_time()


def others(worker: int) -> float:
    """CPU seconds of driver, scheduler and nanny: this process and its children, but for the worker."""
    me, total = psutil.Process(), 0.0
    for one in [me, *me.children(recursive=True)]:
        if one.pid != worker:
            times = one.cpu_times()
            total += times.user + times.system
    return total


def measure(client: Any, plan_file: Path, storage: str) -> dict[str, Any]:
    """The second movie of a session."""
    folder = plan_file.parent / "budget"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "movies").mkdir(parents=True)
    text, steps = plan_file.read_text(encoding="utf-8"), f"pipeline: [{{ingest: {{storage: {storage}}}}}, "
    (folder / "p.yaml").write_text(text.replace("gain.mrc", "../gain.mrc").replace("pipeline: [", steps), encoding="utf-8")
    first, second = sorted((plan_file.parent / "movies").iterdir())
    os.link(first, folder / "movies" / first.name)
    before = bytes_of(run_plan(make_plan(folder / "p.yaml"), client).path)
    os.link(second, folder / "movies" / second.name)
    worker = next(iter(client.run(os.getpid).values()))
    started, around = next(iter(client.run(_used).values())), others(worker)
    project = run_plan(make_plan(folder / "p.yaml"), client)
    used, platform = next(iter(client.run(_used).values())) - started, others(worker) - around
    assert not project.failures(), project.failures()
    seconds = {name: list(project.generation(name).committed().values())[-1]["cpu_seconds"] for name in MAP_STAGES}
    written = bytes_of(project.path) - before
    shutil.rmtree(folder)
    return {
        "seconds": {**seconds, "store": used - sum(seconds.values()), "platform": platform},
        "movie": used + platform, "share": platform / (used + platform), "bytes": written / second.stat().st_size,
    }  # fmt: skip


def bytes_of(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def plot(found: dict[str, dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    left = dict.fromkeys(found, 0.0)
    for name in next(iter(found.values()))["seconds"]:
        values = [one["seconds"][name] for one in found.values()]
        axes.barh(list(found), values, left=list(left.values()), label=name)
        left = {kind: left[kind] + value for kind, value in zip(found, values)}
    axes.axvline(13.0, color="k", linewidth=0.8)
    axes.set(xlabel="CPU s of a movie of 4096 x 4096 x 40")
    axes.legend(frameon=False, ncols=4, fontsize=8)
    figure.savefig(PICTURE, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="movies of 512 x 512, as a smoke test")
    arguments = parser.parse_args()
    client = connect("local", workers=1)
    try:
        large = session(512 if arguments.quick else 4096)
        found = {storage: measure(client, large, storage) for storage in ("chunked", "in_place")}
    finally:
        close(client)
    names = list(next(iter(found.values()))["seconds"])
    print(f"CPU s per movie\n{'':10}" + "".join(f"{name:>10}" for name in names) + f"{'all':>10}{'platform':>10}{'out/in':>8}")
    for storage, one in found.items():
        row = "".join(f"{one['seconds'][name]:10.2f}" for name in names)
        print(f"{storage:10}{row}{one['movie']:10.2f}{one['share']:10.1%}{one['bytes']:8.2f}")
    plot(found)
    live = found["chunked"]
    result = {"cpu_seconds_movie": round(live["movie"], 2), "platform_share": round(live["share"], 4)}
    print(
        json.dumps(
            result | {"bytes_out_over_in": round(live["bytes"], 3), "bytes_out_over_in_in_place": round(found["in_place"]["bytes"], 3)}
        )
    )


if __name__ == "__main__":
    main()
