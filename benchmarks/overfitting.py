"""Does the refinement find resolution where there is none? Pure noise, and particles whose phases are random beyond 10 A.

Both go through the same stages with the same parameters as real use, from the true map at 40 A. Noise must not be reported better than
35 A, the randomised stack not better than 9.5 A (its shell of 10 A still holds some signal): neither by any iteration of the refinement
nor by post-processing of its half-maps under the mask made from them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _stacks import OUT, iterate, peers_stack, read_stack, subset

from cryodask.errors import InputError
from cryodask.stage import ParticleSet
from cryodask.stages.mask import MaskParams, mask
from cryodask.stages.postprocess import PostprocessParams, postprocess
from cryodask.stages.refine3d import Refine3DParams, refine3d

NOISE_IMAGES = 1200


def noise_set(count: int, seed: int, like: ParticleSet) -> tuple[np.ndarray, ParticleSet]:
    """White noise of sd 1 with the box, pixel size and CTF columns of a real set."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((count, like.box, like.box), dtype=np.float32)
    _, particles = subset(np.zeros((like.count, 1, 1)), like, np.arange(count))
    return images, particles


def randomise(images: np.ndarray, pixel: float, beyond_angstrom: float, seed: int) -> np.ndarray:
    """The same amplitudes, random phases beyond a resolution."""
    n = images.shape[-1]
    rng = np.random.default_rng(seed)
    k = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None]) * n
    out = np.empty_like(images)
    for i, image in enumerate(images):
        noise = np.fft.rfft2(rng.standard_normal((n, n)))
        spectrum = np.fft.rfft2(image)
        mixed = np.where(k > n * pixel / beyond_angstrom, np.abs(spectrum) * noise / np.abs(noise), spectrum)
        out[i] = np.fft.irfft2(mixed, s=(n, n))
    return out


def worst(label: str, images: np.ndarray, particles: ParticleSet, params: Refine3DParams) -> tuple[float, list[float]]:
    """Best resolution ever reported, by refinement or post-processing, and those of all iterations."""
    cpu = [0.0]

    def watch(state: dict, metrics: dict, columns: dict, seconds: float) -> None:
        cpu[0] = seconds

    result, state = iterate(refine3d, params, images, particles, watch=watch)
    history = [round(float(r), 2) for r in result["iteration_resolution_angstrom"]]
    maps = {"half_map": result["half_map"], "map_pixel_size_angstrom": result["map_pixel_size_angstrom"]}
    try:
        soft = mask.process(MaskParams(), **maps)["solvent_mask"]
        post = postprocess.process(PostprocessParams(), **maps, solvent_mask=soft)["resolution_angstrom"]
    except InputError as error:  # no molecule to put a mask round: nothing is reported
        print(error.args[0])
        soft, post = np.zeros(1), float("inf")
    print(
        f"{label:32s} {history}  final {result['resolution_angstrom']:.2f} A  post-processed {post:.2f} A (mask {soft.mean():.3f})"
        f"  scale {state['scale']:.3g}  {cpu[0]:.0f} CPU s",
        flush=True,
    )
    return min([*history, result["resolution_angstrom"], post]), history


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    stack = peers_stack()
    images, particles, _ = read_stack(stack["p64"].with_suffix(".mrcs"), stack["p64"].with_suffix(".star"))
    common = {"reference": str(stack["truth64.mrc"]), "mask_diameter_angstrom": 200.0}
    curves = {}
    found = []
    for symmetry, seeds in (("D2", (0, 1, 2)), ("C1", (0,))):
        for seed in seeds:
            noise, small = noise_set(NOISE_IMAGES, 100 + seed, particles)
            best, history = worst(f"noise, {symmetry}, seed {seed}", noise, small, Refine3DParams(symmetry=symmetry, seed=seed, **common))
            found.append(best)
            curves[f"noise {symmetry} {seed}"] = history
    mixed = randomise(images, particles.pixel_size_angstrom, 10.0, 7)
    randomised, history = worst("phases random beyond 10 A, D2", mixed, particles, Refine3DParams(symmetry="D2", **common))
    curves["randomised beyond 10 A"] = history
    plot(curves)
    print(json.dumps({"noise_resolution_angstrom": round(min(found), 2), "randomised_resolution_angstrom": round(randomised, 2)}))


def plot(curves: dict[str, list[float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        axes.plot([1 / v for v in values], marker="o", label=name)
    axes.axhline(1 / 35, color="grey", linestyle=":")
    axes.axhline(1 / 9.5, color="grey", linestyle=":")
    axes.set(xlabel="iteration", ylabel="reported resolution, 1/A", title="Refinement of noise")
    axes.legend(fontsize=7)
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "overfitting.png", dpi=120)


if __name__ == "__main__":
    main()
