"""An initial map without any reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError
from cryodask.stage import AddedMark, Context, Output, Params, ParticleBlock, ParticleSet, Picture, stage
from cryodask.stages._particle_checks import check_particles
from cryodask.stages._symmetry import PointGroup

if TYPE_CHECKING:
    import xarray as xr


_CHAIN_ANGSTROM = 28.0
_RESTARTS, _ORDER_OF_CHEAP_CHAINS = 4, 4
"""With symmetry a chain is cheap and fails more often: every second one for a D2 molecule of five blobs."""
_STEPS, _STEPS_OF_CHEAP_CHAINS = 150, 75
"""With symmetry each particle counts several times in the map, and half the steps suffice: 5 of 6 chains of beta-galactosidase (D2) found
the fold in 75 steps, and a ring of seven (C7) scored the same after 75 and after 150."""


class AbInitioParams(Params):
    """Parameters of ``ab_initio``."""

    symmetry: PointGroup = Field("C1", description="point group, imposed from the start: C1, C4, D2, T, O, I ...")
    restarts: int | None = Field(
        None,
        ge=1,
        description="independent chains from random orientations; the likeliest map wins; by default 1, from group order 4 on 4",
    )
    classes: Annotated[int, AddedMark] = Field(
        1,
        ge=1,
        le=20,
        description="number of maps; for a mixture, one or two more than there are molecules, because junk needs classes of its own",
    )
    particles: int = Field(
        2000, ge=50, description="number of particles used, spread evenly over the set; with several classes all are used and sorted"
    )
    mask_diameter_angstrom: float | None = Field(
        None, gt=0, description="diameter of the soft spherical mask, Angstrom; by default 0.75 of the box"
    )
    shift_range_angstrom: float | None = Field(
        None, gt=0, description="largest shift of a particle from its pick, Angstrom; by default 0.1 of the mask diameter"
    )
    resolution_angstrom: float = Field(
        14.16,
        gt=5,
        description="resolution of the map, Angstrom; chains end at 28, and only the best map is refined further, with all particles used",
    )
    steps: int | None = Field(
        None,
        ge=10,
        description="steps per chain, with 120 to 250 particles each; by default 150, or 75 for point groups of order 4 or more",
    )
    seed: int = Field(0, description="seed of the first chain")


_MOST_SORTED, _FEWEST_OF_A_CLASS = 50_000, 50


def outputs(params: Any) -> tuple[Output, ...]:
    """The map; with classes, all particles with their class, and for each class its particles and its map in a frame of its own."""
    if int(params.classes) == 1:
        return (Output("map", "map", ("final",), frame="new"),)
    found = [Output("particles", "particles", ("class3d",), on="particles", partition=True)]
    for k in range(1, int(params.classes) + 1):
        found.append(Output(f"class{k}", "particles", on="particles", subset=True))
        found.append(Output(f"class{k}", "map", ("final",), frame="new"))
    return tuple(found)


@stage(
    version=6,
    shape="tournament",
    needs=["particle_image"],
    ports=["exposures[ctf, optics, aberrations?]", "particles[image, ctf?]"],
    gives=[
        "final_map", "map_pixel_size_angstrom", "chain_score", "class_map", "class3d_number", "class3d_probability", "class3d_share",
        "iteration_class_share",
    ],
    outputs=outputs,
    params=AbInitioParams,
)  # fmt: skip
class ab_initio:
    """Make an initial map from the particles alone.

    A chain of stochastic expectation maximisation starts from random orientations and ends near 28 A. At that resolution, similar parts
    of a molecule are still interchanged, and often its mirror image is mixed in; a second phase, whose map soon forgets earlier particles,
    continues to 14 A, until one of the alternatives has won by chance. With several restarts the likeliest map wins. For large molecules,
    and those of high symmetry, a map that is correct to 28 A suffices: that is what ``refine3d`` starts from.
    The handedness of the map is undetermined: a map and its mirror image explain the particles equally well. Check the refined map once it
    is better than 8 A (alpha helices are right-handed), and mirror it if necessary (``hand``).

    With ``classes``, a chain makes several maps at once, to 28 A, and sorts all particles into them, for mixtures of molecules and junk.
    The classes are given equal weight for the first 70 % of the chain, because the first good map would otherwise attract every particle.
    Each map is in its own frame; refine the particles of a class against its map (``from: ab_initio.class1``).
    """

    @staticmethod
    def select(params: AbInitioParams, particles: ParticleSet) -> np.ndarray:
        """Indices of the particles used, spread evenly over the set."""
        if particles.count < 50:
            raise InputError(
                f"{particles.count} particles are too few for an initial map",
                "picking or curation left hardly any",
                "check the picks and the classes; some 500 particles are a reasonable start",
            )
        check_particles(particles, params.mask_diameter_angstrom)
        if params.classes > 1:
            return _all_of(params, particles)
        count = min(particles.count, params.particles)
        return np.unique(np.round(np.linspace(0, particles.count - 1, count)).astype(np.int64))

    @staticmethod
    def seeds(params: AbInitioParams) -> list[int]:
        """One seed per restart."""
        return [params.seed + i for i in range(params.restarts or (_RESTARTS if _cheap(params) else 1))]

    @staticmethod
    def chain(params: AbInitioParams, particles: ParticleBlock, seed: int, context: Context) -> dict[str, Any]:
        """Run one restart."""
        from cryodask.kernels.ab_initio import Schedule, run_chain, working_box

        length, diameter, end = _sizes(params, particles)
        small = working_box(length, end, particles.images.shape[-1])
        if params.classes > 1:
            return _class_chain(params, particles, small, seed, context)
        volume, score, trace = run_chain(
            **_loaded(params, particles, small, small // 2 - 1, context),
            symmetry=params.symmetry,
            shift_range_angstrom=params.shift_range_angstrom or 0.1 * diameter,
            schedule=Schedule(
                steps=params.steps or (_STEPS_OF_CHEAP_CHAINS if _cheap(params) else _STEPS),
                first_resolution_angstrom=max(45.0, end),
                last_resolution_angstrom=end,
            ),
            seed=seed,
        )
        return {"map": volume.cpu().numpy(), "score": score, "trace": np.asarray(trace), "seed": seed}

    @staticmethod
    def finish(params: AbInitioParams, particles: ParticleBlock, chains: list[dict[str, Any]], context: Context) -> dict[str, Any]:
        """The likeliest map, refined to the final resolution, in the box of the particles."""
        import torch

        from cryodask.kernels.fourier import resize_map
        from cryodask.kernels.symmetry import symmetry_operators
        from cryodask.kernels.tie_breaking import Ties, break_ties

        scores = np.array([c["score"] for c in chains])
        best = chains[int(np.argmax(scores))]
        if params.classes > 1:
            return _sorted_classes(particles, best, scores)
        volume = torch.from_numpy(np.array(best["map"], np.float32))
        box = particles.images.shape[-1]
        length, _, end = _sizes(params, particles)
        ties = Ties(end, params.resolution_angstrom)
        first, last = ties.rings(length)
        if last > first:
            small = ties.working_box(length, box)
            volume, _ = break_ties(
                **_loaded(params, particles, small, min(small // 2 - 1, last + 1), context),
                start=volume,
                operators=symmetry_operators(params.symmetry),
                ties=ties,
                seed=best["seed"],
                tell=lambda step, rings, likelihood: context.report(min(1.0, rings / last), log_likelihood=likelihood),
            )
        return {
            "final_map": resize_map(volume.cpu(), box).numpy(),
            "map_pixel_size_angstrom": float(particles.pixel_size_angstrom),
            "chain_score": scores,
        }


def _all_of(params: AbInitioParams, particles: ParticleSet) -> np.ndarray:
    """Indices of all particles, for classes; refuses too few per class, and more than one worker can sort."""
    if particles.count < _FEWEST_OF_A_CLASS * params.classes:
        raise InputError(
            f"{particles.count} particles are too few for {params.classes} initial maps",
            "",
            f"ask for fewer classes: at least {_FEWEST_OF_A_CLASS} particles each are needed, 500 are a reasonable start",
        )
    if particles.count > _MOST_SORTED:
        raise InputError(
            f"ab_initio sorts at most {_MOST_SORTED} particles into classes, not {particles.count}",
            "",
            "use a subset of the particles, chosen with select",
        )
    return np.arange(particles.count)


def _class_chain(params: AbInitioParams, particles: ParticleBlock, small: int, seed: int, context: Context) -> dict[str, Any]:
    """One restart with several maps."""
    from dataclasses import replace

    import torch

    from cryodask.kernels.ab_initio_classes import SCHEDULE, run_class_chain

    _, diameter, end = _sizes(params, particles)
    schedule = replace(
        SCHEDULE, steps=params.steps or SCHEDULE.steps, first_resolution_angstrom=max(45.0, end), last_resolution_angstrom=end
    )
    with torch.no_grad():
        found = run_class_chain(
            **_loaded(params, particles, small, small // 2 - 1, context),
            classes=params.classes,
            symmetry=params.symmetry,
            shift_range_angstrom=params.shift_range_angstrom or 0.1 * diameter,
            schedule=schedule,
            seed=seed,
        )
    posterior = torch.softmax(found.evidence, 1).cpu().numpy()
    return {"map": found.volumes.cpu().numpy(), "posterior": posterior, "score": found.score, "course": found.shares.numpy(), "seed": seed}


def _sorted_classes(particles: ParticleBlock, best: dict[str, Any], scores: np.ndarray) -> dict[str, Any]:
    """The classes of the likeliest chain, largest first."""
    import torch

    from cryodask.kernels.fourier import resize_map

    order = np.argsort(-best["posterior"].sum(0), kind="stable")
    posterior, box = best["posterior"][:, order], particles.images.shape[-1]
    return {
        "class_map": np.stack([resize_map(torch.from_numpy(best["map"][k]), box).numpy() for k in order]),
        "class3d_number": posterior.argmax(1).astype(np.int32) + 1,
        "class3d_probability": posterior.max(1),
        "class3d_share": posterior.mean(0),
        "iteration_class_share": best["course"][:, order],
        "map_pixel_size_angstrom": float(particles.pixel_size_angstrom),
        "chain_score": scores,
    }


def _cheap(params: AbInitioParams) -> bool:
    """Whether the point group is large enough for several short chains."""
    from cryodask.kernels.symmetry import symmetry_operators

    return len(symmetry_operators(params.symmetry)) >= _ORDER_OF_CHEAP_CHAINS


def _sizes(params: AbInitioParams, particles: ParticleBlock) -> tuple[float, float, float]:
    """Length of the box, mask diameter, and resolution at which chains end, Angstrom."""
    length = particles.images.shape[-1] * particles.pixel_size_angstrom
    return length, params.mask_diameter_angstrom or 0.75 * length, max(_CHAIN_ANGSTROM, params.resolution_angstrom)


def _loaded(params: AbInitioParams, particles: ParticleBlock, small: int, rings: int, context: Context) -> dict[str, Any]:
    """The particles in a working box, on polar rings and as rows, with their sizes."""
    import torch

    from cryodask.kernels.expectation import load_particles
    from cryodask.kernels.fourier import resize_images
    from cryodask.kernels.rows import image_rows

    length, diameter, _ = _sizes(params, particles)
    pixel = length / small
    images = torch.from_numpy(np.ascontiguousarray(particles.images, np.float32))
    images = torch.cat([resize_images(lot, small) for lot in images.split(256)])
    data = load_particles(
        images.numpy(), particles.columns, particles.index, pixel_size_angstrom=pixel, rings=rings, mask_radius_angstrom=diameter / 2,
        device=context.device,
    )  # fmt: skip
    rows = image_rows(images.to(context.device), particles.columns, small // 2 - 1, pixel)
    return {"data": data, "images": rows, "pixel_size_angstrom": pixel, "mask_diameter_angstrom": diameter}


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
    if "class_map" in ds:
        from cryodask.stages._class_pictures import draw_course, draw_initial_classes

        yield draw_initial_classes(ds["class_map"].values, ds["class3d_share"].values)
        yield draw_course(ds["iteration_class_share"].values)
    if "chain_score" in ds:
        figure = Figure(figsize=(5.0, 2.8), layout="constrained")
        axes = figure.subplots()
        scores = np.sort(ds["chain_score"].values)[::-1]
        axes.bar(np.arange(len(scores)), scores)
        axes.set(xlabel="restart, best first", ylabel="log-likelihood per particle", ylim=(0.9 * float(scores.min()), None))
        yield Picture(
            "Restarts", "Mean likelihood gain of each restart. If the best ones agree, they probably found the correct fold.", figure
        )
