"""How often the product's verdict on its own map is right: runs of c1.py over molecules, conditions and faults.

    python benchmarks/verdict.py [--groups nothing,symmetry,harder,honesty] [--minutes 60] [--out verdict.jsonl]

Each row is a run of c1.py in a process of its own, appended to a file of JSON lines under benchmarks/out as it ends; what is there already
is not run again, so that an interrupted benchmark goes on; what failed is. Rows of all groups take turns, so that any number of them is a
fair sample.

nothing    the five asymmetric molecules from nothing, three seeds each
symmetry   O, D2, C4 and C7 from nothing, two seeds each
harder     more noise, junk, preferred views, fewer particles
honesty    pure noise, random phases beyond 10 A, ties left undecided, wrong point groups, half of the particles of another molecule

A verdict is right where a map is accepted whose resolution is at most 10 % better than the truth, and which has 80 % of the poses within 12
degrees or a true resolution within 12 % of what true poses give; or where a map is refused whose true resolution is not within these 12 %.
Noise and wrong point groups must be refused. Refused runs report their starting map; no row may report more than 10 % better than the
truth.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _stacks import OUT

ASYMMETRIC = ("9be6", "6bqn", "7yc8", "6rn2", "4jsv")
NEAR, BETTER, POSES = 1.12, 1.10, 0.8
REFUSED = ("--noise-only", "--symmetry")
"""Options whose runs no true map can come from."""
ROWS = {
    "nothing": [f"--model {m} --seed {s}" for s in range(3) for m in ASYMMETRIC],
    "symmetry": [f"--model {m} --seed {s}" for s in range(2) for m in ("5a1a", "ring7", "7a4m", "ring4")],
    "harder": [
        "--model 4jsv --noise 1.3", "--model 9be6 --junk 0.2", "--model 6rn2 --noise 1.6", "--model 7yc8 --particles 400",
        "--model 6rn2 --preferred", "--model 9be6 --preferred", "--model 4jsv --noise 1.3 --seed 1", "--model 9be6 --junk 0.2 --seed 1",
        "--model 6rn2 --noise 1.6 --seed 1", "--model 6rn2 --particles 1000",
    ],
    "honesty": [
        "--model 9be6 --noise-only", "--model 6bqn --without-ties", "--model 4jsv --symmetry C2", "--model 7yc8 --phases 10",
        "--model 9be6 --other 4jsv", "--model 7yc8 --without-ties", "--model 5a1a --noise-only", "--model 6bqn --symmetry C3",
        "--model 4jsv --phases 10", "--model 7yc8 --other 6rn2", "--model 9be6 --without-ties", "--model 9be6 --noise-only --seed 1",
        "--model 9be6 --symmetry D2", "--model 4jsv --without-ties", "--model 6bqn --noise-only --seed 2", "--model 6rn2 --without-ties",
    ],
}  # fmt: skip


def near_truth(row: dict[str, Any]) -> bool:
    """Whether the true resolution of the map is within 12 % of what true poses give."""
    truth, ideal = row["truth05_angstrom"], row["true_poses_truth05_angstrom"]
    return truth is not None and ideal is not None and truth <= NEAR * ideal


def honest(row: dict[str, Any]) -> bool:
    """Whether the reported figure is at most 10 % better than the truth; without a truth, whether it is no better than 28 A."""
    reported, truth = row["reported_angstrom"], row["truth05_angstrom"]
    return reported is None or (reported >= 28.0 if truth is None else truth <= BETTER * reported)


def verdict_is_right(arguments: str, row: dict[str, Any]) -> bool:
    """Whether the verdict of a run says what the truth says (see the head of this file)."""
    if any(option in arguments for option in REFUSED):
        return not row["succeeded"]
    if not row["succeeded"]:
        return not near_truth(row)
    return honest(row) and (near_truth(row) or (row["share_below_12"] or 0.0) >= POSES)


def measured(arguments: str) -> dict[str, Any]:
    """The JSON line of one run of c1.py."""
    command = [sys.executable, str(Path(__file__).parent / "c1.py"), *arguments.split()]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    if found.returncode:
        return {"failed": (found.stderr or found.stdout).strip().splitlines()[-1:]}
    return dict(json.loads(found.stdout.splitlines()[-1]))


def shown(arguments: str, row: dict[str, Any]) -> str:
    """A line of the table."""
    if "failed" in row:
        return f"{arguments:44s} failed: {' '.join(row['failed'])}"
    figures = [row[key] for key in ("reported_angstrom", "truth05_angstrom", "true_poses_truth05_angstrom")]
    poses = "     -" if row["share_below_12"] is None else f"{row['share_below_12']:6.2f}"
    evidence = [row[key] for key in ("pose_certainty", "held_out_gain")]
    words = [*("     -" if f is None else f"{f:6.2f}" for f in figures), poses, *("     -" if f is None else f"{f:6.2f}" for f in evidence)]
    said = ("accepted" if row["succeeded"] else "refused") + ("" if verdict_is_right(arguments, row) else " WRONGLY")
    return f"{arguments:44s} {' '.join(words)} {row['cpu_seconds']:6.0f} s  {said}{'' if honest(row) else ', FALSE FIGURE'}"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--groups", default=",".join(ROWS))
    p.add_argument("--minutes", type=float, default=float("inf"), help="no run begins after this time")
    p.add_argument("--out", default="verdict.jsonl", help="file of JSON lines under benchmarks/out")
    a = p.parse_args()
    unknown = set(a.groups.split(",")) - set(ROWS)
    if unknown:
        raise SystemExit(f"no group {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    turns = zip_longest(*(ROWS[group] for group in a.groups.split(",")))
    wanted = [row for row in chain.from_iterable(turns) if row is not None]
    kept, began = OUT / a.out, time.monotonic()
    kept.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, dict[str, Any]] = {}
    if kept.exists():
        done = {entry["arguments"]: entry["row"] for entry in map(json.loads, kept.read_text().splitlines())}
    print(f"{'':44s} report  truth  ideal   < 12 certain gain     CPU  verdict", flush=True)
    for arguments in wanted:
        if arguments not in done:
            if time.monotonic() - began > 60.0 * a.minutes:
                continue
            done[arguments] = measured(arguments)
            if "failed" not in done[arguments]:
                with open(kept, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"arguments": arguments, "row": done[arguments]}) + "\n")
        print(shown(arguments, done[arguments]), flush=True)
    rows = {arguments: done[arguments] for arguments in wanted if arguments in done}
    ended = {arguments: row for arguments, row in rows.items() if "failed" not in row}
    wrong = [arguments for arguments, row in ended.items() if not verdict_is_right(arguments, row)]
    print(json.dumps({
        "runs": len(ended),
        "right": len(ended) - len(wrong),
        "share_right": round(1.0 - len(wrong) / len(ended), 3) if ended else None,
        "wrongly_accepted": [arguments for arguments in wrong if ended[arguments]["succeeded"]],
        "wrongly_refused": [arguments for arguments in wrong if not ended[arguments]["succeeded"]],
        "false_figures": [arguments for arguments, row in ended.items() if not honest(row)],
        "failed": [arguments for arguments in rows if arguments not in ended],
        "not_run": len(wanted) - len(rows),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
