"""Columns of the particles of a step, for the page that plots them."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from cryodask.errors import InputError
from cryodask.store.particles import particle_columns
from cryodask.store.project import Project
from cryodask.store.sets import SetReader
from cryodask.store.state import ProductRef
from cryodask.vocabulary import VARIABLES

_UNITS = {"angstrom": ("Å", "_angstrom"), "angstrom^2": ("Å²", "_angstrom2"), "degree": ("°", "_deg"), "1": ("", "")}
_MOST = 8
"""Columns in one answer: more would take the memory of the server from others."""


def particle_steps(project: Project) -> list[str]:
    """Steps with finished particles (of a per-exposure step: at least some), in order."""
    return [
        label for label in project.stages if project.step(label).product("particles") is not None and project.generation(label).committed()
    ]


def described(project: Project, label: str) -> list[dict[str, str]]:
    """The columns of a step's particles: ``name`` as in the project file, ``title``, ``unit``, ``about``; reads no values."""
    return [_about(name) for name in sorted(SetReader(project).known(_ref(project, label)))]


def packed(project: Project, label: str, names: Sequence[str]) -> bytes:
    """Columns of a step's particles in the binary form that the page reads.

    A little-endian u4, the length of the JSON head that follows (padded so that the arrays begin at a multiple of 8 bytes); then one f4
    array per column. Values that are not known are NaN. Answers with the same ``stamp`` are of the same particles in the same order.

    Raises
    ------
    InputError
        If the step has no such column.
    """
    if len(names) > _MOST:
        raise InputError(f"{len(names)} columns were asked for at once; at most {_MOST} are answered.", "", "ask for the others afterwards")
    ref = _ref(project, label)
    # a reader of its own: that of the project would keep all columns of a million particles in memory
    sets = SetReader(project)
    known = sets.known(ref)
    missing = [name for name in names if name not in known]
    if missing:
        raise InputError(f"The particles of {label} have no column {missing[0]}.", "", "reload the page: the step may have changed")
    ids = sets.ids(ref)
    found = particle_columns(project, ref, ids, {part for name in names for part in known[name]}, sets=sets)
    arrays = [_as_numbers(found[name]) if name in found else np.full(len(ids), np.nan, "<f4") for name in names]
    stamp = hashlib.blake2b(ids.tobytes(), digest_size=8)
    stamp.update(json.dumps(ref.model_dump(), sort_keys=True).encode())
    head = {"step": label, "stamp": stamp.hexdigest(), "rows": len(ids), "columns": [_about(name) for name in names]}
    text = json.dumps(head).encode()
    text += b" " * (-(len(text) + 4) % 8)
    return b"".join([struct.pack("<I", len(text)), text, *(a.data for a in arrays)])


def _ref(project: Project, label: str) -> ProductRef:
    ref = project.step(label).product("particles") if label in project else None
    if ref is None or label not in particle_steps(project):
        raise InputError(f"There is no step {label} with particles.", "", "choose one from the list of the page")
    return ref


def _about(name: str) -> dict[str, str]:
    var = VARIABLES.get(name)
    unit, end = _UNITS.get(var.units if var is not None else "angstrom", ("", ""))
    doc = var.doc if var is not None else "position of the centre of the box in the exposure"
    return {"name": name, "title": re.sub(f"{end}$", "", name).replace("_", " "), "unit": unit, "about": doc}


def _as_numbers(values: np.ndarray) -> np.ndarray:
    """As f4; -1, which stands for a missing integer, as NaN."""
    out = np.ascontiguousarray(values, dtype="<f4")
    if values.dtype.kind == "i":
        out[values == -1] = np.nan
    return out


def first_columns(columns: Sequence[dict[str, Any]]) -> list[str]:
    """Two columns to begin with: what people look at first, if the step has it."""
    names = [column["name"] for column in columns]
    liked = [n for n in ("defocus_u_angstrom", "pick_score", "class_log_likelihood", "log_likelihood", "class_probability") if n in names]
    return list(dict.fromkeys([*liked, *names]))[:2]
