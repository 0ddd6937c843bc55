"""What steps pass to each other: seven product types, their parts, and the facts that the plan compares.

A *part* is a group of columns or arrays that only make sense together and that one step gives as a whole. A port asks for parts; a view
takes each part from one step. *Facts* (frame, point group, births, copies ...) are passed along the chain and compared before any work,
because types and columns alone cannot tell a valid pipeline from an invalid one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from cryodask.vocabulary import VARIABLES

ProductType = Literal["exposures", "particles", "classes", "map", "mask", "model", "weights"]

PARTS: dict[str, dict[str, str]] = {
    "exposures": {
        "frames": "raw frames",
        "optics": "voltage, Cs, amplitude contrast and pixel size",
        "dose": "exposure of a frame",
        "micrograph": "aligned sums",
        "halves": "sums of the odd and of the even frames",
        "denoised": "denoised sum; never replaces the micrograph",
        "field": "motion of the specimen",
        "ctf": "CTF of the micrograph",
        "ctf_quality": "quality of the CTF fit",
        "aberrations": "beam tilt, trefoil, tetrafoil and magnification of an optics group",
        "kept": "a selection of exposures, with reasons",
        "mask2d": "regions excluded from picking",
    },
    "particles": {
        "position": "positions in the exposure, assigned at birth",
        "score": "score of the picker",
        "image": "boxes extracted from the micrographs",
        "ctf": "CTF of the particle itself",
        "alignment2d": "in-plane pose against its 2D class",
        "class2d": "2D class; numbers of one classification",
        "class3d": "3D class; numbers of one classification",
        "pose": "orientation and centre in one frame",
        "components": "coordinates along the components of one variability analysis",
        "quality": "score of a sorter",
        "note": "user-defined columns",
    },
    "classes": {"averages": "2D class averages", "scores": "quality of each class"},
    "map": {
        "final": "unsharpened map of all particles, with voxel size and point group",
        "half_maps": "two independent unfiltered half-maps",
        "fsc": "corrected FSC, and the mask it applies to",
        "verdict": "whether a refinement has succeeded, with the evidence",
        "view": "sharpened or locally filtered map for viewing, docking and model building; never a reference",
    },
    "mask": {"mask": "soft mask on the grid of a map"},
    "model": {"atoms": "atomic coordinates in the frame of a map"},
    "weights": {"weights": "a trained network, with its purpose"},
}
"""Parts of each product type with a description; plug-ins add theirs with :func:`register_part`."""

COLLECTIONS = ("exposures", "particles")

ORIGINS = {
    "origin_y_angstrom": "centre_y_angstrom",
    "origin_x_angstrom": "centre_x_angstrom",
    "class_origin_y_angstrom": "class_centre_y_angstrom",
    "class_origin_x_angstrom": "class_centre_x_angstrom",
}
"""Shifts relative to a box, as block stages find them, and the positions in the exposure as which they are stored."""


def register_part(product: str, name: str, doc: str) -> None:
    """Add a part to a product type; a second definition must equal the first."""
    if product not in PARTS:
        raise ValueError(f"there is no product type {product!r}; there are {', '.join(PARTS)}")
    if PARTS[product].setdefault(name, doc) != doc:
        raise ValueError(f"part {product}.{name} is already defined differently: {PARTS[product][name]}")


def part_of(variable: str) -> tuple[str, str] | None:
    """(product, part) of a variable; None for registry facts of an exposure, and for bookkeeping."""
    part = VARIABLES[variable].part
    if not part:
        return None
    product, _, name = part.partition(".")
    return product, name


def columns_of(product: str, part: str) -> list[str]:
    """Variables of a part."""
    return [v.name for v in VARIABLES.values() if v.part == f"{product}.{part}"]


def place_named(name: str, names: Sequence[str]) -> int | None:
    """Index of the product that a name refers to, or None.

    ``STEP.particles`` means ``STEP``; the key of an earlier result may be abbreviated, and omitted if the step has only one.
    """
    step, _, key = name.strip().partition("@")
    known = [(one.partition("@")[0].removesuffix(".particles"), one.partition("@")[2]) for one in names]
    alike = [i for i, (label, _) in enumerate(known) if label == step.removesuffix(".particles")]
    found = [i for i in alike if known[i][1].startswith(key) and bool(known[i][1]) == bool(key)]
    found = found or (alike if not key else [])
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class ImageFact:
    """Images of a set: box size in the micrograph, box size and pixel size of the images (None: as in the micrograph)."""

    source: str
    box: float | None
    size: int | None
    pixel_size_angstrom: float | None

    def is_like(self, other: ImageFact) -> bool:
        """Whether images of two sets can form one stack, as far as known."""
        ours, theirs = ((i.box, i.size or i.box, i.pixel_size_angstrom) for i in (self, other))
        return all(a is None or b is None or math.isclose(a, b, rel_tol=1e-3) for a, b in zip(ours, theirs))


@dataclass(frozen=True)
class Product:
    """A product on the chain of a plan, with its facts.

    ``ref`` is its name in the project file. ``parts``: part -> ref of the step that gave it. ``ids``: ref of the step that last set which
    particles (or exposures) there are. ``behind``: refs of all its ancestors; ``line``: those of its own collection only. ``count``: number
    of classes, if the plan knows it.

    For an earlier result (``STEP@KEY``), parts and ids are ``LABEL@STAGE/KEY``: exact results. ``pinned``: it is such a result itself.
    ``at``: results, by label, of all earlier steps as they were then. ``threshold``: the picking threshold that applied to its ids then.
    ``optics``: for exposures, the result (``LABEL@STAGE/KEY``) whose optics of that time apply; empty: the current ones.
    """

    type: str
    step: str
    output: str
    index: int
    parts: dict[str, str] = field(default_factory=dict)
    ids: str = ""
    behind: frozenset[str] = frozenset()
    line: frozenset[str] = frozenset()
    exposures: Product | None = None
    sources: frozenset[str] = frozenset()
    births: frozenset[str] = frozenset()
    frame: str | None = None
    pose_frames: frozenset[str] = frozenset()
    point_group: str | None = None
    copies: int = 1
    subtracted: str | None = None
    image: ImageFact | None = None
    partition: bool = False
    pixel_sizes: frozenset[float] = frozenset()
    purpose: str | None = None
    count: int | None = None
    pinned: bool = False
    at: dict[str, str] = field(default_factory=dict)
    threshold: float | str | None = None
    optics: str = ""

    @property
    def ref(self) -> str:
        """``STEP``, or ``STEP.OUTPUT`` where the step gives several of the type."""
        return self.step if self.output == self.type else f"{self.step}.{self.output}"

    @property
    def name(self) -> str:
        """Like ``ref``; for an earlier result with its key, ``STEP@KEY``."""
        return f"{self.ref}@{self.at[self.step].partition('/')[2]}" if self.pinned and self.step in self.at else self.ref
