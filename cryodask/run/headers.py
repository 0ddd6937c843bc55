"""What the headers of files say against the tables and the project that name them: pixel sizes, and where maps lie."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from cryodask.errors import CryodaskError, InputError
from cryodask.formats.mrc import MrcStack, open_mrc
from cryodask.formats.star import find_beside
from cryodask.run.known import map_edge
from cryodask.run.recipe import Plan, Step
from cryodask.store.project import Arrival

_READ = 200
"""Headers that are read per table, evenly spaced."""
_TOLERANCE = 0.01
_PLACEHOLDER_ANGSTROM = 1.0


def is_other_size(header_angstrom: float | None, stated_angstrom: float | None) -> bool:
    """Whether a header contradicts a stated pixel size: by more than 1%, unless it holds nothing, or the 1 that programs put there."""
    if not header_angstrom or not stated_angstrom or header_angstrom == _PLACEHOLDER_ANGSTROM:
        return False
    return abs(header_angstrom / stated_angstrom - 1.0) > _TOLERANCE


def other_pixel_sizes(plan: Plan, listing: list[Arrival]) -> Iterator[str]:
    """Sentences about imported micrographs, stacks and maps whose headers contradict the pixel sizes that their tables give."""
    for step in plan.steps:
        if step.stage.name == "import_micrographs":
            pairs = [
                (os.path.join(plan.path.parent.resolve(), str(a.inputs["micrograph_path"])), float(a.inputs.get("pixel_size_angstrom", 0)))
                for a in listing
                if a.inputs.get("source") == step.label and "micrograph_path" in a.inputs
            ]
            yield from _contradictions(step, pairs, "micrograph", "rlnMicrographPixelSize")
        elif step.stage.name == "import_particles" and step.params.images:
            yield from _contradictions(step, _stacks(step), "stack", "rlnImagePixelSize")
        yield from _maps_of_other_pixels(plan, step)
        yield from _mask_of_another_box(plan, step)


def _stacks(step: Step) -> list[tuple[str, float]]:
    """Stacks of a table of particles, and the pixel size that it gives for their images."""
    from cryodask.stages.import_particles import read_table

    table = read_table(step.params.star)
    sizes = table.columns.get("particle_pixel_size_angstrom", np.zeros(len(table)))
    used, first = np.unique(table.stack, return_index=True)
    found = [(find_beside(table.stacks[int(i)], Path(step.params.star)), float(sizes[row])) for i, row in zip(used, first)]
    return [(str(path), size) for path, size in found if path is not None]


def _contradictions(step: Step, pairs: list[tuple[str, float]], what: str, label: str) -> Iterator[str]:
    wrong: dict[tuple[str, str], list[str]] = {}
    for i in np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), _READ)).astype(int)):
        path, stated = pairs[i]
        try:
            header = open_mrc(path).pixel_size_angstrom
        except (CryodaskError, OSError):
            continue  # its stage reports the error
        if is_other_size(header, stated):
            wrong.setdefault((f"{header:.4g}", f"{stated:.4g}"), []).append(Path(path).name)
    for (header_size, stated_size), names in wrong.items():
        several = f"{len(names)} {what}s such as {names[0]} have" if len(names) > 1 else f"the {what} {names[0]} has"
        yield (
            f"{step.label}: {several} a pixel size of {header_size} A in the header, but {stated_size} A in {Path(step.params.star).name}, "
            f"which is used. Check {label} there."
        )


def _maps_of_other_pixels(plan: Plan, step: Step) -> Iterator[str]:
    """Maps for particles of as many pixels, which have another size: their header holds a placeholder, or the particles were scaled."""
    images = [p.image for p in step.inputs.get("particles", ()) if p.image is not None]
    if not images or images[0].size is None or images[0].pixel_size_angstrom is None:
        return
    size, pixel = images[0].size, images[0].pixel_size_angstrom
    for path in {**_maps(plan, step), **{path: None for p in step.inputs.get("map", ()) for path in _maps(plan, plan.graph.step(p.step))}}:
        try:
            stack = open_mrc(path)
        except (CryodaskError, OSError):
            continue
        voxel = stack.pixel_size_angstrom
        if voxel and stack.shape[-1] == size and abs(voxel / pixel - 1.0) > _TOLERANCE:
            yield (
                f"{step.label}: {Path(path).name} has {size} voxels of {voxel:.4g} A according to its header, the particles have "
                f"{size} pixels of {pixel:.4g} A. Correct the voxel size in the header if both are of one size."
            )


def _mask_of_another_box(plan: Plan, step: Step) -> Iterator[str]:
    """An imported mask whose box differs from that of its map, as far as the plan knows it."""
    if step.stage.name != "import_mask" or plan.graph.step(step.inputs["map"][0].step).inputs.get("to"):
        return
    edge = map_edge(plan, None, step.inputs["map"][0])
    try:
        shape = open_mrc(step.params.file).shape
    except (CryodaskError, OSError):
        return
    if edge is not None and shape != (edge,) * 3:
        yield (
            f"{step.label}: {Path(step.params.file).name} is {' x '.join(map(str, shape))} voxels, but the map of "
            f"{step.inputs['map'][0].ref} will have {edge} in each direction, and the mask would be refused. Resample it to this grid."
        )


def _maps(plan: Plan, step: Step) -> dict[str, None]:
    every = (path for paths in plan.input_files(step).values() for path in paths)
    return dict.fromkeys(path for path in every if Path(path).suffix.lower() in (".mrc", ".map"))


# --- where maps lie ----------------------------------------------------------------------------------------------------------
def check_places(plan: Plan) -> None:
    """Refuse half-maps, and a mask and its imported map, that their headers put in different places.

    Raises
    ------
    InputError
    """
    for step in plan.steps:
        if step.stage.name == "import_map" and step.params.half_maps:
            _check_same_place([open_mrc(path) for path in step.params.half_maps], "give the two half-maps of one refinement")
        elif step.stage.name == "import_mask":
            giver = plan.graph.step(step.inputs["map"][0].step)
            files = _maps(plan, giver) if giver.stage.name == "import_map" else {}
            _check_same_place([open_mrc(path) for path in (*files, step.params.file)], "make the mask on the grid of the map")


def _check_same_place(maps: Iterable[MrcStack], way_out: str) -> None:
    placed = [(one.path, one.header.offset_voxels) for one in maps]
    known = [(path, offset) for path, offset in placed if offset is not None]
    if len(known) < 2:
        return
    (first, here), (other, there) = known[0], max(known, key=lambda one: max(abs(a - b) for a, b in zip(one[1], known[0][1])))
    if max(abs(a - b) for a, b in zip(here, there)) > 0.5:
        texts = [f"{path} at ({', '.join(f'{v:g}' for v in reversed(offset))})" for path, offset in ((first, here), (other, there))]
        raise InputError(
            f"Maps of one grid begin at different voxels (x, y, z) according to their headers: {' and '.join(texts)}.",
            "they were cut from different places of a larger map, or one was moved",
            f"{way_out}, or set the origins and start indices to 0 if they are on one grid",
        )
