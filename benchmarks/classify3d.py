"""Focused 3D classification of a known mixture at physical noise, at true, jittered and refined poses, beside RELION.

    python benchmarks/classify3d.py
    python benchmarks/classify3d.py --seeds 1 2 3 --without-own-poses --relion relion_refine

Data: beta-galactosidase (D2), 45 % whole, 33 % without domain 4, 22 % with domain 1 turned by 12 degrees, in 64 pixels of 3.54 A.
Focused accuracies are those of whole against turned, inside a mask around domain 1; jittered poses are off by 2 degrees rms and
0.3 pixels; own poses are those of ``refine3d`` from the true map of the whole state cut at 40 A. Recall is that of the state without
domain 4 in a classification without a mask. RELION classifies at the true poses, without a mask, into three: its accuracy is that of
all states, to be compared with ours without a mask (``whole_particle_accuracy``).

Mixture: 2400 particles, 45 % beta-galactosidase, 35 % apoferritin, 20 % junk, sorted by ``ab_initio: {classes: 4}`` in C1 from
nothing; purity is the share of particles whose kind is the commonest of their class.

Aligned (``align: true``): the same mixture sorted against the true maps of both proteins, which the stage cuts at 28 A, and two decoys;
``aligned_purity`` as above, and ``aligned_own_purity`` from the four maps of ``ab_initio``. Without apoferritin, against the map of
beta-galactosidase and two decoys: the share of its particles that stays in the class of the map (``junk_recall``), and the share of the
junk that leaves it (``junk_removed``).

CPU seconds are user and system time of this process with one thread. Accuracies are means over the seeds of the data; keys that were
not measured are null. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _mixtures import Mixture, jittered, posed, states, two_proteins_and_junk
from _molecules import AMPLITUDE_CONTRAST, SPHERICAL_ABERRATION_MM, VOLTAGE_KV
from _stacks import OUT, iterate

from cryodask.formats.mrc import write_mrc
from cryodask.kernels.classify3d import agreement_of_labels
from cryodask.kernels.orientations import euler_to_matrix
from cryodask.stage import Context, ParticleBlock, ParticleSet
from cryodask.stages.ab_initio import AbInitioParams, ab_initio
from cryodask.stages.classify3d import Classify3DParams, classify3d, says
from cryodask.stages.refine3d import Refine3DParams, refine3d

PIXEL = 3.54
MASK_DIAMETER = 200.0
MIXED = 2400


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the data")
    p.add_argument("--particles", type=int, default=3000)
    p.add_argument("--relion", default="relion_refine", help="name of RELION's program; not run if it is not installed")
    p.add_argument("--only-mixture", action="store_true", help="skip everything at known poses")
    p.add_argument("--without-own-poses", action="store_true", help="skip the refinement")
    return p.parse_args()


def classes_of(mixture: Mixture, count: int, masked: bool) -> tuple[np.ndarray, dict[str, Any], float]:
    """Class of each particle from 0, the result, and CPU seconds."""
    inputs = {"final_map": mixture.maps[0], "map_pixel_size_angstrom": PIXEL}
    if masked:
        inputs["solvent_mask"] = mixture.mask
    params = Classify3DParams(classes=count, symmetry="D2", mask_diameter_angstrom=MASK_DIAMETER)
    start = time.process_time()
    result, _ = iterate(classify3d, params, mixture.images, mixture.particles, inputs)
    return result["class3d_number"] - 1, result, time.process_time() - start


def mixture_purity(made: Mixture) -> tuple[float, float, np.ndarray]:
    """Purity of the classes of a mixture of two proteins and junk, CPU seconds, and the maps."""
    params, functions = AbInitioParams(classes=4, mask_diameter_angstrom=MASK_DIAMETER), ab_initio.functions
    start = time.process_time()
    block = ParticleBlock(functions.select(params, made.particles), made.images, made.particles.columns, PIXEL)
    with Context() as context:
        chains = [functions.chain(params, block, chain_seed, context) for chain_seed in functions.seeds(params)]
        result = functions.finish(params, block, chains, context)
    seconds = time.process_time() - start
    return purity(made, result["class3d_number"]), seconds, result["class_map"]


def purity(made: Mixture, number: np.ndarray) -> float:
    """Share of the particles whose kind is the commonest of their class."""
    counts = np.array([np.bincount(made.labels[number == k], minlength=3) for k in range(1, number.max() + 1)])
    print(counts.tolist())
    return float(counts.max(1).sum() / counts.sum())


def aligned(made: Mixture, maps: list[np.ndarray], count: int) -> tuple[np.ndarray, str, float]:
    """Class of each particle from 1 with alignment to some maps and decoys, what the stage says, and CPU seconds."""
    inputs: dict[str, Any] = {"maps_final_map": maps, "maps_map_pixel_size_angstrom": [PIXEL] * len(maps)}
    if len(maps) == 1:
        inputs = {"final_map": maps[0], "map_pixel_size_angstrom": PIXEL}
    params = Classify3DParams(align=True, classes=count, mask_diameter_angstrom=MASK_DIAMETER)
    start = time.process_time()
    result, _ = iterate(classify3d, params, made.images, made.particles, inputs)
    return result["class3d_number"], says(result), time.process_time() - start


def without(made: Mixture, label: int) -> Mixture:
    """A mixture without the particles of one kind."""
    kept = np.nonzero(made.labels != label)[0]
    columns = {name: values[kept] for name, values in made.particles.columns.items()}
    particles = replace(made.particles, count=len(kept), columns=columns)
    return replace(made, images=made.images[kept], labels=made.labels[kept], particles=particles)


def pair_accuracy(mixture: Mixture, numbers: np.ndarray) -> float:
    """Of whole against turned."""
    pair = mixture.labels != 1
    return agreement_of_labels(numbers[pair], np.where(mixture.labels == 2, 1, 0)[pair], 2)


def recall_of_missing(mixture: Mixture, numbers: np.ndarray) -> float:
    """Share of the particles without domain 4 that are in the class that holds most of them, if others make up less than half of it."""
    missing = numbers[mixture.labels == 1]
    best = int(np.bincount(missing).argmax())
    pure = float((mixture.labels[numbers == best] == 1).mean())
    return float((missing == best).mean()) if pure > 0.5 else 0.0


def refined(mixture: Mixture) -> Mixture:
    """The same particles at the poses of our own refinement, moved into the frame of the true map by the consensus they start from."""
    start = OUT / "states_start.mrc"
    write_mrc(start, mixture.maps[0].astype(np.float32), PIXEL)
    unposed = ParticleSet(
        mixture.particles.count, mixture.particles.box, PIXEL,
        {n: v for n, v in mixture.particles.columns.items() if not n.startswith(("rot", "tilt", "psi", "origin"))},
    )  # fmt: skip
    params = Refine3DParams(symmetry="D2", reference=str(start), mask_diameter_angstrom=MASK_DIAMETER)
    result, _ = iterate(refine3d, params, mixture.images, unposed)
    rotations = euler_to_matrix(*(torch.deg2rad(torch.from_numpy(result[f"{a}_deg"]).double()) for a in ("rot", "tilt", "psi")))
    origins = np.stack([result[f"origin_{a}_angstrom"] for a in "yx"], 1) / PIXEL
    own = posed(unposed, rotations, origins)
    return Mixture(mixture.images, own, mixture.labels, [result["final_map"], *mixture.maps[1:]], rotations, origins, mixture.mask)


def relion_accuracy(mixture: Mixture, program: str, folder: Path) -> tuple[float, float]:
    """Accuracy of RELION's classification of three at the true poses, and its CPU seconds."""
    import pandas as pd
    import starfile

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "run").mkdir(parents=True)
    write_mrc(folder / "states.mrcs", mixture.images, PIXEL)
    write_mrc(folder / "start.mrc", mixture.maps[0].astype(np.float32), PIXEL)
    columns, n = mixture.particles.columns, len(mixture.labels)
    optics = {
        "rlnOpticsGroupName": ["og1"], "rlnOpticsGroup": [1], "rlnVoltage": [VOLTAGE_KV],
        "rlnSphericalAberration": [SPHERICAL_ABERRATION_MM],
        "rlnAmplitudeContrast": [AMPLITUDE_CONTRAST], "rlnImagePixelSize": [PIXEL], "rlnImageSize": [64], "rlnImageDimensionality": [2],
    }  # fmt: skip
    rows = {
        "rlnImageName": [f"{i + 1:06d}@states.mrcs" for i in range(n)],
        "rlnMicrographName": [f"m{m}.mrc" for m in columns["micrograph"]], "rlnOpticsGroup": 1,
        "rlnDefocusU": columns["defocus_u_angstrom"], "rlnDefocusV": columns["defocus_v_angstrom"],
        "rlnDefocusAngle": columns["defocus_angle_deg"], "rlnAngleRot": columns["rot_deg"], "rlnAngleTilt": columns["tilt_deg"],
        "rlnAnglePsi": columns["psi_deg"], "rlnOriginXAngst": columns["origin_x_angstrom"], "rlnOriginYAngst": columns["origin_y_angstrom"],
    }  # fmt: skip
    starfile.write({"optics": pd.DataFrame(optics), "particles": pd.DataFrame(rows)}, folder / "states.star")
    command = [
        program, "--i", "states.star", "--ref", "start.mrc", "--o", "run/run", "--K", "3", "--skip_align", "--tau2_fudge", "4",
        "--ini_high", "20", "--sym", "D2", "--iter", "11", "--particle_diameter", str(MASK_DIAMETER), "--ctf",
        "--pad", "2", "--norm", "--scale", "--zero_mask",
        "--flatten_solvent", "--preread_images", "--j", "1",
    ]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (folder / "log.txt").open("w") as log:
        subprocess.run(command, cwd=folder, check=True, stdout=log, stderr=log)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = starfile.read(folder / "run" / "run_it011_data.star", always_dict=True)["particles"]
    order = found["rlnImageName"].str.partition("@")[0].astype(int).to_numpy() - 1
    numbers = np.empty(n, int)
    numbers[order] = found["rlnClassNumber"].to_numpy() - 1
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return agreement_of_labels(numbers, mixture.labels, 3), seconds


def plot(course: dict[str, np.ndarray], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, changed in course.items():
        axes.semilogy(100 * np.maximum(changed[1:], 1e-5), label=name)
    axes.set(xlabel="iteration", ylabel="particles that change class, %")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    out: dict[str, list[float]] = {}
    course: dict[str, np.ndarray] = {}

    def note(name: str, value: float, seconds: float, said: str = "") -> None:
        out.setdefault(name, []).append(value)
        out.setdefault(f"{name}_cpu_s", []).append(seconds)
        print(f"{name:28s} {value:7.3f} {seconds:8.1f} s  {said}", flush=True)

    for seed in args.seeds:
        print(f"data {seed}: figure, CPU seconds, what the stage says")
        made = two_proteins_and_junk(MIXED, seed)
        value, seconds, own_maps = mixture_purity(made)
        note("mixture_purity", value, seconds)
        for name, maps in {"aligned_purity": made.maps, "aligned_own_purity": list(own_maps)}.items():
            numbers, said, seconds = aligned(made, maps, 4)
            note(name, purity(made, numbers), seconds, said)
        one = without(made, 1)
        numbers, said, seconds = aligned(one, made.maps[:1], 3)
        purity(one, numbers)
        note("junk_recall", float((numbers[one.labels == 0] == 1).mean()), seconds, said)
        note("junk_removed", float((numbers[one.labels == 2] != 1).mean()), seconds)
        if args.only_mixture:
            continue
        mixture = states(args.particles, seed)
        cases = {"focused_true_poses": mixture, "focused_jittered": jittered(mixture, 2.0, 0.3)}
        if not args.without_own_poses:
            cases["focused_own_poses"] = refined(mixture)
        for name, one in cases.items():
            numbers, result, seconds = classes_of(one, 2, masked=True)
            note(name, pair_accuracy(one, numbers), seconds, says(result))
            course[name] = result["iteration_changed_share"]
        numbers, result, seconds = classes_of(mixture, 3, masked=False)
        note("missing_domain_recall", recall_of_missing(mixture, numbers), seconds, says(result))
        note("whole_particle_accuracy", agreement_of_labels(numbers, mixture.labels, 3), seconds)
        if shutil.which(args.relion):
            accuracy, seconds = relion_accuracy(mixture, args.relion, OUT / "classify3d_relion")
            note("relion_accuracy", accuracy, seconds)
    out["mixture_cpu_s"] = out["mixture_purity_cpu_s"]
    if course:
        plot(course, OUT / "classify3d.png")
    names = ("mixture_purity", "mixture_cpu_s", "focused_true_poses", "focused_jittered", "focused_own_poses", "missing_domain_recall",
             "whole_particle_accuracy", "relion_accuracy", "focused_true_poses_cpu_s", "relion_accuracy_cpu_s", "aligned_purity",
             "aligned_purity_cpu_s", "aligned_own_purity", "aligned_own_purity_cpu_s", "junk_recall", "junk_removed",
             "junk_recall_cpu_s")  # fmt: skip
    print(json.dumps({name: round(float(np.mean(out[name])), 4) if name in out else None for name in names}))


if __name__ == "__main__":
    main()
