"""Images of merged sets: which extraction holds each particle's image, and whether the sources' images are compatible."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from cryodask.errors import InputError
from cryodask.run.inputs import StepInputs
from cryodask.run.recipe import Plan, Step
from cryodask.run.refs import Refer, united_parts
from cryodask.store.foreseen import Foreseen
from cryodask.store.identity import place_of
from cryodask.store.particles import ImagePlaces
from cryodask.store.project import Project
from cryodask.store.sets import Given
from cryodask.store.state import ProductRef
from cryodask.vocabulary import VARIABLES

_BOXES = ("particle_y", "particle_x")
_PIXEL = "particle_pixel_size_angstrom"
_LOOKED_AT = 64
"""Number of images of two sources that are compared."""
_ALIKE = "merge before extraction, or extract both with the same parameters"


def image_givers(plan: Plan, project: Project, step: Step) -> list[str]:
    """The extractions that hold the images of a union, if there are several."""
    if "image" not in united_parts(step):
        return []
    refer = Refer(plan, project.state)
    return _extractions(project, (refer.place(p.parts["image"]) for p in step.inputs.get("particles", ())))


def _extractions(project: Project, places: Iterable[str]) -> list[str]:
    """Extractions that hold images; those of a union are the extractions of its sources."""
    return list(dict.fromkeys(one for place in places for one in project.generation_at(place).meta.get("image_givers") or [place]))


@dataclass(frozen=True)
class _Source:
    """A source of a union: its name, its particles, and the location of their images."""

    name: str
    ref: ProductRef
    ids: np.ndarray
    images: Given

    @property
    def extractions(self) -> tuple[str, ...]:
        return self.images.givers or (self.ref.parts["image"],)

    def columns(self, project: Project, ids: np.ndarray) -> dict[str, np.ndarray]:
        return project.sets.columns(self.ref, ids, ["image"])

    def places(self, project: Project, at: np.ndarray) -> ImagePlaces:
        """Places of the images at some indices of ``images``."""
        givers = tuple(project.generation_at(place) for place in self.extractions)
        return ImagePlaces(givers, self.images.row[at], self.images.slot[at], self._giver()[at])

    def giver(self, givers: list[str]) -> np.ndarray:
        """Index, within a list of extractions, of the one that holds each image."""
        return np.asarray(np.array([givers.index(place) for place in self.extractions], np.int16)[self._giver()])

    def _giver(self) -> np.ndarray:
        return self.images.giver if self.images.giver is not None else np.zeros(len(self.images.ids), np.int16)


def _sources(project: Project, inputs: StepInputs) -> Iterator[_Source]:
    for product, (ref, ids) in zip(inputs.step.inputs["particles"], inputs.sets["particles"]):
        yield _Source(product.name, ref, ids, project.sets.images(ref.parts["image"]))


def united_images(project: Project, inputs: StepInputs, ids: np.ndarray) -> dict[str, Any]:
    """Location and box position of each image of a union, from the preferred source, else the first that has the particle.

    Parameters
    ----------
    project : Project
    inputs : StepInputs
    ids : `(n,)`, int64, sorted
        Particles of the union.

    Returns
    -------
    dict
        Extraction, row and slot of each image, box positions in pixels, and the one pixel size.
    """
    from cryodask.stages.merge import by_preference

    sources = list(_sources(project, inputs))
    givers = _extractions(project, (s.ref.parts["image"] for s in sources))
    out: dict[str, Any] = {name: np.full(len(ids), np.nan, np.float32) for name in _BOXES}
    out |= {"image_giver": np.full(len(ids), -1, np.int16), "image_row": np.zeros(len(ids), np.int64)}
    out |= {"image_slot": np.zeros(len(ids), np.int32), _PIXEL: np.nan}
    order = by_preference([s.name for s in sources], getattr(inputs.step.params, "prefer", None))
    for source in (sources[i] for i in reversed(order)):
        at = place_of(ids, source.images.ids)
        here = np.flatnonzero((at >= 0) & np.isin(ids, source.ids))
        if not len(here):
            continue
        columns = source.columns(project, ids[here])
        out["image_giver"][here] = source.giver(givers)[at[here]]
        out["image_row"][here], out["image_slot"][here] = source.images.row[at[here]], source.images.slot[at[here]]
        for name in _BOXES:
            out[name][here] = columns[name]
        out[_PIXEL] = float(np.nanmax(columns[_PIXEL]))
    return out


def check_images(project: Project, inputs: StepInputs) -> None:
    """Refuse sources with incompatible images, as far as they exist; does nothing if the step is not such a union.

    Raises
    ------
    InputError
        If sizes or pixel sizes differ, or if one particle has different images and ``prefer`` does not choose one.
    """
    if "image" not in united_parts(inputs.step):
        return
    sources = list(_sources(project, inputs))
    if any(isinstance(project.generation_at(place), Foreseen) for s in sources for place in s.extractions):
        return
    _check_sizes(project, sources)
    if getattr(inputs.step.params, "prefer", None) is not None:
        return
    for a, b in combinations(sources, 2):
        count = _other_images(project, a, b)
        if count:
            raise InputError(
                f"{count:,} particles have different images in {a.name} and {b.name}.",
                "they were extracted with other parameters, or at other centres",
                f"choose one, merge: {{prefer: {a.name}}} or merge: {{prefer: {b.name}}}",
            )


def _check_sizes(project: Project, sources: list[_Source]) -> None:
    boxes: dict[tuple[int, ...], str] = {}
    pixels: dict[float, str] = {}
    for source in sources:
        for place in source.extractions:
            boxes.setdefault(project.generation_at(place).layout(VARIABLES["particle_image"]).shape[1:], source.name)
        sizes = source.columns(project, source.ids).get(_PIXEL, np.zeros(0)) if len(source.ids) else np.zeros(0)
        for size in np.unique(sizes[np.isfinite(sizes)]).tolist():
            pixels.setdefault(size, source.name)
    if len(boxes) > 1:
        text = " and ".join(f"{' x '.join(map(str, shape))} pixels in {name}" for shape, name in boxes.items())
        raise InputError(f"Images of different sizes cannot be merged: {text}.", "they were extracted with different boxes", _ALIKE)
    if pixels and max(pixels) > 1.0005 * min(pixels):
        text = " and ".join(f"{size:g} A in {name}" for size, name in sorted(pixels.items()))
        raise InputError(f"Images of different pixel sizes cannot be merged: {text}.", "their exposures or scales differ", _ALIKE)


def _other_images(project: Project, a: _Source, b: _Source) -> int:
    """How many particles have different images in the two sources; 0 if none of the compared ones differ."""
    shared = np.intersect1d(a.ids, b.ids, assume_unique=True)
    at = [place_of(shared, s.images.ids) for s in (a, b)]
    both = (at[0] >= 0) & (at[1] >= 0)
    shared, at = shared[both], [one[both] for one in at]
    if not len(shared):
        return 0
    givers = _extractions(project, (s.ref.parts["image"] for s in (a, b)))
    first, second = (_where(project, s, one, givers, shared) for s, one in zip((a, b), at))
    same = (first["place"] == second["place"]).all(1)
    same |= (first["recipe"] == second["recipe"]) & (first["box"] == second["box"]).all(1)
    rest = np.flatnonzero(~same)
    some = rest[np.unique(np.linspace(0, len(rest) - 1, min(len(rest), _LOOKED_AT)).astype(int))] if len(rest) else rest
    if not len(some):
        return 0
    ours, theirs = (s.places(project, one[some]).read() for s, one in zip((a, b), at))
    return 0 if np.array_equal(ours, theirs) else len(rest)


def _where(project: Project, source: _Source, at: np.ndarray, givers: list[str], ids: np.ndarray) -> dict[str, np.ndarray]:
    """For some images: extraction, row and slot `(n, 3)`, recipe of the extraction `(n,)`, box positions `(n, 2)`."""
    giver, row = source.giver(givers)[at], source.images.row[at]
    recipe = np.empty(len(at), object)
    for number, place in enumerate(givers):
        mine = np.flatnonzero(giver == number)
        if len(mine):
            table = project.table_at(place, ())
            recipe[mine] = np.asarray(table.recipe, object)[np.searchsorted(table.row, row[mine])]
    columns = source.columns(project, ids)
    box = np.stack([columns[name] for name in _BOXES], 1)
    return {"place": np.stack([giver, row, source.images.slot[at]], 1), "recipe": recipe, "box": box}
