"""Motion of movies with the right gain, without it, and with wrong ones, against known truth.

``python benchmarks/wrong_gain.py [--seeds 3]``: a demo movie (1024 x 1024 x 24) of each seed with its own gain, with none, with its
gain upside down, and with that of the next seed's camera. Errors are RMS lengths at 9 x 9 positions, means over frames removed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from cryodask.simulate import DEMO, simulate_movie
from cryodask.simulate.session import session_detector
from cryodask.stages.motion import MotionParams, motion


def error_of(frames: np.ndarray, gain: np.ndarray | None, truth: np.ndarray) -> tuple[float, float]:
    """Error of the motion, Angstrom, and the share of a still pattern that was found."""
    out = motion.process(
        MotionParams(),
        movie=frames,
        gain=gain,
        pixel_size_angstrom=DEMO.pixel_size_angstrom,
        dose_per_frame=DEMO.dose_per_frame,
        pre_exposure=0.0,
        voltage_kv=DEMO.voltage_kv,
    )
    error = out["patch_shift"] - truth
    error = error - error.mean(-2, keepdims=True)
    return float(np.sqrt((error**2).sum(-1).mean())), out["still_pattern_share"]


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    errors: dict[str, list[float]] = {}
    for seed in range(1, arguments.seeds + 1):
        params = DEMO.model_copy(update={"seed": seed})
        frames, truth = simulate_movie(params, 0)
        gain = session_detector(params).gain
        other = session_detector(DEMO.model_copy(update={"seed": seed + 1})).gain
        still = truth["patch_shift"] - truth["patch_shift"].mean(1, keepdims=True)
        print(f"seed {seed}: uncorrected {np.sqrt((still**2).sum(-1).mean()):.2f} A")
        for name, used in (("right", gain), ("none", None), ("turned", np.ascontiguousarray(gain[::-1])), ("other camera", other)):
            error, share = error_of(frames, used, truth["patch_shift"])
            errors.setdefault(name, []).append(error)
            print(f"  {name:14}{error:6.2f} A, still pattern {100 * share:.2f} % of the noise of a frame")
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for name, values in errors.items():
        axes.plot(range(1, len(values) + 1), values, "o-", label=f"gain: {name}")
    axes.set(xlabel="seed", ylabel="error of the motion, Å", ylim=(0, None))
    axes.legend(frameon=False)
    out = Path(__file__).parent / "out"
    out.mkdir(exist_ok=True)
    figure.savefig(out / "wrong_gain.png", dpi=110)
    wrong = [e for name, values in errors.items() if name != "right" for e in values]
    print(json.dumps({"error_right_gain_angstrom": max(errors["right"]), "error_wrong_gain_angstrom": max(wrong)}))


if __name__ == "__main__":
    main()
