"""Refinement of 2400 simulated particles with noise like real data (beta-galactosidase, D2) from the true map at 40 A.

The starting map is on a grey scale that is 37 times wrong, as maps of other programs are. RELION 3.1.3 on the same stack: median error
2.81 degrees after nine iterations and 4,511 CPU seconds, not yet converged.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mrcfile
import numpy as np
import starfile
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _stacks import OUT, iterate, peers_stack, pose_errors, read_map, read_stack, sphere_fsc

from cryodask.stages.refine3d import Refine3DParams, refine3d


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    stack = peers_stack()
    images, particles, _ = read_stack(stack["p64"].with_suffix(".mrcs"), stack["p64"].with_suffix(".star"))
    truth = starfile.read(f"{stack['p64']}_truth.star", always_dict=True)["particles"]
    true_map, pixel = read_map(stack["truth64.mrc"])
    start = OUT / "stacks" / "truth64_wrong_scale.mrc"
    with mrcfile.new(start, overwrite=True) as f:
        f.set_data(true_map * 37.0)
        f.voxel_size = pixel
    seconds = [0.0]

    def watch(state: dict, metrics: dict, columns: dict, cpu: float) -> None:
        seconds[0] = cpu
        if "scored_angstrom" in metrics:
            e = pose_errors(columns, truth, "D2")
            print(
                f"{cpu:6.1f} s  scored {metrics['scored_angstrom']:5.1f} A  supported {metrics['resolution_angstrom']:5.1f} A  "
                f"median {np.median(e):5.2f} deg  < 5 deg {np.mean(e < 5):.3f}  > 20 deg {np.mean(e > 20):.3f}  "
                f"shifts {metrics['shift_sigma_angstrom']:.1f} A",
                flush=True,
            )

    params = Refine3DParams(symmetry="D2", reference=str(start), mask_diameter_angstrom=200.0)
    result, _ = iterate(refine3d, params, images, particles, watch=watch)
    errors = pose_errors(result, truth, "D2")
    curve = sphere_fsc(result["final_map"], true_map, pixel)
    halves = sphere_fsc(*result["half_map"], pixel)
    for shell in (10, 15, 20, 25, 28, 30):
        print(f"{64 * pixel / shell:6.2f} A   halves {halves[shell]:.3f}   truth {curve[shell]:.3f}")
    plot(curve, halves, errors, 64 * pixel)
    print(json.dumps({
        "median_error_deg": round(float(np.median(errors)), 3),
        "share_below_5_deg": round(float(np.mean(errors < 5)), 4),
        "truth_fsc_9_06A": round(float(curve[25]), 4),
        "truth_fsc_8_09A": round(float(curve[28]), 4),
        "truth_fsc_7_55A": round(float(curve[30]), 4),
        "succeeded": bool(result["succeeded"]),
        "cpu_seconds": round(seconds[0], 1),
    }))  # fmt: skip


def plot(curve: np.ndarray, halves: np.ndarray, errors: np.ndarray, length: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    frequency = np.arange(len(curve)) / length
    left.plot(frequency[1:], curve[1:], label="against the truth")
    left.plot(frequency[1:], halves[1:], label="between the halves")
    left.set(xlabel="1/A", ylabel="FSC, 95 A sphere")
    left.legend()
    right.hist(np.clip(errors, 0, 10), bins=60)
    right.set(xlabel="angular error, degrees (10 = more)", ylabel="particles")
    figure.savefig(OUT / "refine.png", dpi=120)


if __name__ == "__main__":
    main()
