"""From particles and nothing else to a map and a verdict, judged by the truth: ``ab_initio``, then ``refine3d`` from its map.

    python benchmarks/c1.py --model 9be6 --seed 0
    python benchmarks/c1.py --model 4jsv --noise 1.3
    python benchmarks/c1.py --stack particles.star --truth map.mrc --mask-diameter 160

Molecules: 9be6, 6bqn, 7yc8, 6rn2, 4jsv (none symmetric), 5a1a (D2), 7a4m (O), rings of one protein (ring4, ring7), or a PDB or mmCIF
file; 2000 particles of 64 pixels of 3.54 A at physical noise (see _molecules.py) unless said otherwise. A given STAR file is one of RELION
3.1, with white protein and noise of about unit variance; poses in it serve the judge only. ``--seed`` is that of the run; the stack's is
``--stack-seed``.

CPU seconds are user and system time of this process with one thread, without the judge. The last line is JSON; keys that the product or
the data do not give are null.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _judge import Judgement, column_rotations, judge, mirrored_poses, pose_errors, sphere_fsc, true_poses
from _molecules import Recipe, Stack, given_stack, molecule, noise_only, random_phases, simulated_stack
from _stacks import OUT, iterate

from cryodask.errors import CryodaskError
from cryodask.formats.mrc import write_mrc
from cryodask.run.blocks import ParticlesInMemory
from cryodask.stage import Context
from cryodask.stages.ab_initio import AbInitioParams, ab_initio
from cryodask.stages.refine3d import Refine3DParams, refine3d


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="9be6", help="name of a molecule, or a PDB or mmCIF file")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--stack-seed", type=int, default=11)
    p.add_argument("--symmetry", help="point group that is imposed; by default the molecule's")
    p.add_argument("--particles", type=int, default=2000)
    p.add_argument("--box", type=int, default=64, help="pixels; the box spans 227 A unless --pixel is given")
    p.add_argument("--pixel", type=float, help="Angstrom")
    p.add_argument("--noise", type=float, default=1.0, help="factor on the standard deviation of the noise")
    p.add_argument("--junk", type=float, default=0.0, help="share of the particles")
    p.add_argument("--preferred", action="store_true", help="70 %% of the views within 25 degrees of one axis")
    p.add_argument("--noise-only", action="store_true", help="images of pure noise")
    p.add_argument("--phases", type=float, metavar="A", help="randomise the images' phases beyond this resolution, Angstrom")
    p.add_argument("--other", metavar="MODEL", help="half of the particles are of this molecule; shares of poses are those of the rest")
    p.add_argument("--without-ties", action="store_true", help="ab initio ends at 28 A: pseudo-symmetric poses stay undecided")
    p.add_argument("--stack", type=Path, metavar="STAR", help="particles from elsewhere")
    p.add_argument("--truth", type=Path, metavar="MRC", help="true map of --stack; any box and voxel size")
    p.add_argument("--mask-diameter", type=float, metavar="A", help="diameter of the spherical mask; needed with --stack")
    return p.parse_args()


def loaded(a: argparse.Namespace) -> tuple[Stack, str, float, str]:
    """The stack, the name of the run, the mask's diameter, and the molecule's own point group."""
    if a.stack:
        if not a.mask_diameter:
            raise SystemExit("--stack needs --mask-diameter")
        stack, name, diameter, own = given_stack(a.stack, a.truth), a.stack.stem, a.mask_diameter, "C1"
    else:
        recipe = Recipe(a.model, a.particles, a.box, a.pixel, a.noise, a.junk, a.preferred, a.stack_seed)
        stack = simulated_stack(recipe)
        model = molecule(a.model)
        name, own = Path(a.model).name.split(".")[0], model.symmetry
        outermost = stack.facts["largest_radius_angstrom"]
        diameter = a.mask_diameter or model.mask_diameter_angstrom or 10.0 * np.ceil((2.0 * outermost + 5.0) / 10.0)
        if a.other:
            stack = mixed(stack, simulated_stack(replace(recipe, model=a.other)), a.seed)
    if a.noise_only:
        stack = replace(stack, images=noise_only(stack.images, a.seed), poses=None, truth=None)
    if a.phases:
        pixel = float(stack.particles.pixel_size_angstrom)
        stack = replace(stack, images=random_phases(stack.images, pixel, a.phases, a.seed))
    return stack, name, float(diameter), own


def mixed(stack: Stack, other: Stack, seed: int) -> Stack:
    """A stack, every second particle of which, by chance, comes from another one with the same CTF; these count as junk."""
    assert stack.poses is not None
    strange = np.random.default_rng(31 + seed).permutation(len(stack.images)) % 2 == 1
    images = np.where(strange[:, None, None], other.images, stack.images)
    return replace(stack, images=images, poses=replace(stack.poses, junk=stack.poses.junk | strange))


def run_name(a: argparse.Namespace, name: str, symmetry: str, own: str) -> str:
    """Name of the run's files."""
    parts = [
        (f"n{a.particles}", not a.stack and a.particles != 2000), (f"b{a.box}", not a.stack and a.box != 64),
        (f"px{a.pixel}", not a.stack and a.pixel), (f"noise{a.noise:g}", a.noise != 1.0), (f"junk{a.junk:g}", a.junk),
        ("preferred", a.preferred), ("noise_only", a.noise_only), (f"phases{a.phases}", a.phases),
        (f"other_{a.other}", a.other), ("without_ties", a.without_ties),
        (symmetry, symmetry != own), (f"s{a.stack_seed}", not a.stack and a.stack_seed != 11),
    ]  # fmt: skip
    return "_".join(["c1", name, str(a.seed), *(part for part, said in parts if said)])


def initial_map(a: argparse.Namespace, stack: Stack, symmetry: str, diameter: float) -> dict[str, Any]:
    """Result of ``ab_initio``, its chains run one after the other."""
    extra = {"resolution_angstrom": 28.0} if a.without_ties else {}
    params = AbInitioParams(symmetry=symmetry, mask_diameter_angstrom=diameter, seed=100 * a.seed, **extra)
    functions = ab_initio.functions
    index = functions.select(params, stack.particles)
    block = ParticlesInMemory(stack.particles, stack.images).block(index)
    with Context() as context:
        chains = []
        for seed in functions.seeds(params):
            start = time.process_time()
            chains.append(functions.chain(params, block, seed, context))
            print(f"chain {seed}: score {float(chains[-1]['score']):.3f}, {time.process_time() - start:.1f} CPU s", flush=True)
        return functions.finish(params, block, chains, context)


class Watch:
    """Prints a line per iteration. What it computes from the truth costs no CPU seconds of the run."""

    def __init__(self, stack: Stack, symmetry: str, own: str) -> None:
        self.stack, self.symmetry, self.own = stack, symmetry, own
        self.seconds = 0.0

    def __call__(self, state: dict, metrics: dict, columns: dict, cpu: float) -> None:
        """Print what an iteration measured and, where the true poses are known, the errors of its poses."""
        start = time.process_time()
        words = [f"{cpu - self.seconds:7.1f} s"]
        for key, value in metrics.items():
            words.append(f"{key} {value:.4g}" if isinstance(value, (float, np.floating)) else f"{key} {value}")
        if self.stack.poses is not None and "mode_rotation" in columns and state["phase"] != "scale":
            real = torch.from_numpy(~self.stack.poses.junk)
            poses, true = column_rotations(columns)[real], self.stack.poses.rotations[real]
            both = [pose_errors(some, true, self.symmetry, self.own, with_rival=False) for some in (poses, mirrored_poses(poses))]
            e = max(both, key=lambda e: e.share_near).degrees
            words.append(f"| median {np.median(e):.2f} deg, < 12 {(e < 12).mean():.3f}, > 20 {(e > 20).mean():.3f}")
        print("  ".join(words), flush=True)
        self.seconds += time.process_time() - start


def number(value: Any, digits: int = 3) -> float | None:
    """A rounded number, or None for what is missing or not finite."""
    return None if value is None or not np.isfinite(float(value)) else round(float(value), digits)


def plot(path: Path, stack: Stack, title: str, halves: np.ndarray, judged: Judgement, ideal: np.ndarray | None, length: float) -> None:
    """FSC curves, pose errors, and central slices of the map and the truth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title, fontsize=9)
    top, bottom = figure.subfigures(2, 1)
    left, right = top.subplots(1, 2)
    curves = ((halves, "between the halves"), (judged.curve, "against the truth"), (ideal, "true poses against the truth"))
    for curve, label in curves:
        if curve is not None:
            left.plot(np.arange(1, len(curve)) / length, curve[1:], label=label)
    for level in (0.143, 0.5):
        left.axhline(level, color="0.7", linewidth=0.7)
    left.set(xlabel="1/A", ylabel="FSC", ylim=(-0.1, 1.02))
    left.legend(fontsize=8)
    if judged.degrees is not None:
        right.hist(np.clip(judged.degrees, 0.0, 30.0), bins=60)
    right.set(xlabel="pose error, degrees (30 = more)", ylabel="particles")
    middle = judged.volume.shape[0] // 2
    for row, axes in zip((judged.volume, judged.placed_truth), bottom.subplots(2, 3)):
        for axis, panel in enumerate(axes):
            panel.imshow(np.take(row, middle, axis), cmap="gray", origin="lower")
            panel.set_axis_off()
            panel.set_title(f"{'map' if row is judged.volume else 'truth'}, section across {'zyx'[axis]}", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    a = arguments()
    stack, name, diameter, own = loaded(a)
    symmetry = a.symmetry or own
    box, pixel = stack.particles.box, float(stack.particles.pixel_size_angstrom)
    files = run_name(a, name, symmetry, own)
    facts = {key: round(value, 4) for key, value in stack.facts.items()}
    print(f"{name}: {stack.particles.count} particles of {box} px of {pixel:.3f} A, {symmetry}, mask {diameter:g} A, {facts}", flush=True)
    ideal: dict[str, float] = {}
    ideal_curve = None
    if stack.poses is not None and stack.truth is not None:
        ideal, ideal_curve = true_poses(stack, diameter, symmetry)
        print(f"true poses: {ideal}", flush=True)

    start = time.process_time()
    initial = initial_map(a, stack, symmetry, diameter)
    cpu_ab_initio = time.process_time() - start
    write_mrc(OUT / f"{files}_start.mrc", np.asarray(initial["final_map"], np.float32), float(initial["map_pixel_size_angstrom"]))

    watch = Watch(stack, symmetry, own)
    params = Refine3DParams(symmetry=symmetry, mask_diameter_angstrom=diameter, seed=a.seed)
    start = time.process_time()
    inputs = {key: initial[key] for key in ("final_map", "map_pixel_size_angstrom")}
    result, _ = iterate(refine3d, params, stack.images, stack.particles, inputs, watch=watch)
    cpu_refine = time.process_time() - start - watch.seconds

    final, voxel = np.asarray(result["final_map"], np.float32), float(result["map_pixel_size_angstrom"])
    write_mrc(OUT / f"{files}.mrc", final, voxel)
    reported = number(result.get("resolution_angstrom"))
    row: dict[str, Any] = {
        "model": name,
        "seed": a.seed,
        "reported_angstrom": reported,
        "truth05_angstrom": None,
        "true_poses_truth05_angstrom": None,
        "true_poses_reported_angstrom": None,
        "succeeded": bool(result["succeeded"]) if result.get("succeeded") is not None else None,
        "cpu_seconds": round(cpu_ab_initio + cpu_refine, 1),
        "cpu_ab_initio": round(cpu_ab_initio, 1),
        "cpu_refine": round(cpu_refine, 1),
        **dict.fromkeys(("median_deg", "share_below_5", "share_below_12", "share_above_20", "rival_share", "rival_deg", "hand")),
        **{key: number(result.get(key)) for key in ("pose_certainty", "held_out_gain", "held_out_z")},
        **ideal,
    }
    if stack.truth is not None:
        poses = column_rotations(result) if "rot_deg" in result else None
        judged = judge(stack, final, voxel, reported or float("inf"), diameter, symmetry, own, poses)
        row |= judged.figures
        halves = sphere_fsc(*np.asarray(result["half_map"]), voxel, diameter)
        title = f"{files}: reported {reported} A, truth {row['truth05_angstrom']} A, true poses {row['true_poses_truth05_angstrom']} A"
        plot(OUT / f"{files}.png", stack, title, halves, judged, ideal_curve, final.shape[0] * voxel)
    for key, value in row.items():
        print(f"  {key:30s} {value}")
    print(json.dumps(row))


if __name__ == "__main__":
    try:
        main()
    except CryodaskError as error:
        raise SystemExit(str(error)) from None
