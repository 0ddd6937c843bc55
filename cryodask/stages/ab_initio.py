"""An initial map without any reference, from a tournament of short restarts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError
from cryodask.stage import Context, Output, Params, ParticleBlock, ParticleSet, Picture, stage
from cryodask.stages._symmetry import PointGroup

if TYPE_CHECKING:
    import xarray as xr


class AbInitioParams(Params):
    """Parameters of ``ab_initio``."""

    symmetry: PointGroup = Field("C1", description="point group, imposed from the start: C1, C4, D2, T, O, I ...")
    restarts: int = Field(8, ge=1, description="independent chains from random orientations; the likeliest map wins")
    particles: int = Field(2000, ge=50, description="number of particles used, taken evenly from the set")
    mask_diameter_angstrom: float | None = Field(
        None, gt=0, description="diameter of the soft spherical mask, Angstrom; by default 0.75 of the box"
    )
    shift_range_angstrom: float | None = Field(
        None, gt=0, description="largest shift of a particle from its pick, Angstrom; by default 0.1 of the mask diameter"
    )
    resolution_angstrom: float = Field(28.0, gt=5, description="resolution at which the chains end, Angstrom")
    steps: int = Field(50, ge=10, description="steps per chain, with 120 to 250 particles each")
    seed: int = Field(0, description="seed of the first chain")


@stage(
    version=1,
    shape="tournament",
    needs=["particle_image"],
    ports=["exposures[ctf, optics, aberrations?]", "particles[image, ctf?]"],
    gives=["final_map", "map_pixel_size_angstrom", "chain_score"],
    outputs=[Output("map", "map", ("final",), frame="new")],
    params=AbInitioParams,
)
class ab_initio:
    """Makes an initial map from the particles alone.

    Several short chains of stochastic expectation maximisation start from random orientations; each ends near 28 A. Not every chain
    finds the fold, but the mean likelihood of the particles identifies the good ones, so the likeliest map wins.
    The handedness of the map is undetermined: a map and its mirror image explain projections equally well. Check the refined map below 8 A
    (helices are right-handed) and mirror it if necessary.
    """

    @staticmethod
    def select(params: AbInitioParams, particles: ParticleSet) -> np.ndarray:
        """Indices of the particles used, taken evenly from the set."""
        if particles.count < 50:
            raise InputError(
                f"{particles.count} particles are too few for an initial map",
                "picking or curation left hardly any",
                "check the picks and the classes; some 500 particles are a fair start",
            )
        count = min(particles.count, params.particles)
        return np.unique(np.round(np.linspace(0, particles.count - 1, count)).astype(np.int64))

    @staticmethod
    def seeds(params: AbInitioParams) -> list[int]:
        """One seed per restart."""
        return [params.seed + i for i in range(params.restarts)]

    @staticmethod
    def chain(params: AbInitioParams, particles: ParticleBlock, seed: int, context: Context) -> dict[str, Any]:
        """Run one restart."""
        import torch

        from cryodask.kernels.ab_initio import Schedule, run_chain, working_box
        from cryodask.kernels.expectation import load_particles
        from cryodask.kernels.fourier import resize_images

        box = particles.images.shape[-1]
        length = box * particles.pixel_size_angstrom
        diameter = params.mask_diameter_angstrom or 0.75 * length
        small = working_box(length, params.resolution_angstrom, box)
        images = resize_images(torch.from_numpy(np.ascontiguousarray(particles.images, np.float32)), small).numpy()
        schedule = Schedule(
            steps=params.steps,
            first_resolution_angstrom=max(45.0, params.resolution_angstrom),
            last_resolution_angstrom=params.resolution_angstrom,
        )
        data = load_particles(
            images,
            particles.columns,
            particles.index,
            pixel_size_angstrom=length / small,
            radius=small // 2 - 1,
            mask_radius_angstrom=diameter / 2,
            device=context.device,
        )
        volume, score, trace = run_chain(
            data,
            pixel_size_angstrom=length / small,
            symmetry=params.symmetry,
            mask_diameter_angstrom=diameter,
            shift_range_angstrom=params.shift_range_angstrom or 0.1 * diameter,
            schedule=schedule,
            seed=seed,
            device=context.device,
        )
        return {
            "map": volume.cpu().numpy(),
            "score": score,
            "trace": np.asarray(trace),
            "box": box,
            "pixel_size_angstrom": float(particles.pixel_size_angstrom),
        }

    @staticmethod
    def choose(params: AbInitioParams, chains: list[dict[str, Any]]) -> dict[str, Any]:
        """The likeliest map, at the box of the particles."""
        import torch

        from cryodask.kernels.fourier import resize_map

        scores = np.array([c["score"] for c in chains])
        best = chains[int(np.argmax(scores))]
        volume = resize_map(torch.from_numpy(np.array(best["map"], np.float32)), int(best["box"]))
        return {
            "final_map": volume.numpy(),
            "map_pixel_size_angstrom": best["pixel_size_angstrom"],
            "chain_score": scores,
        }


@ab_initio.figures  # type: ignore[attr-defined]  # mypy does not see what class decorators return
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """The map, with a note on its handedness, and the scores of the chains."""
    from matplotlib.figure import Figure

    from cryodask.stages._map_pictures import draw_slices

    if "final_map" in ds:
        yield draw_slices(
            ds["final_map"].values,
            float(ds["map_pixel_size_angstrom"]),
            "Initial map",
            "Projections and sections of the likeliest map. Its handedness is undetermined: the mirror image fits equally well.",
        )
    if "chain_score" in ds:
        figure = Figure(figsize=(5.0, 2.8), layout="constrained")
        axes = figure.subplots()
        scores = np.sort(ds["chain_score"].values)[::-1]
        axes.bar(np.arange(len(scores)), scores)
        axes.set(xlabel="restart, best first", ylabel="log-likelihood per particle", ylim=(0.9 * float(scores.min()), None))
        yield Picture("Restarts", "Mean likelihood gain of each restart. If several of the best agree, the fold was found.", figure)
