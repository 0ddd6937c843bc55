"""Gain references of the data sets: read from files or estimated from the movies, stored in the project, compared with the first movies."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.errors import CryodaskError, GainError
from cryodask.formats import gain as references
from cryodask.formats import movies
from cryodask.formats.defects import apply_defects, read_defects
from cryodask.formats.fractions import Fractions, is_eer
from cryodask.run.recipe import Movies, Plan, Step, fractions_of, list_movies
from cryodask.run.sources import processed
from cryodask.store.files import disk_errors, write_atomically

ESTIMATE = "estimate"
_CHECKED_MOVIES, _CHECKED_FRAMES = 3, 24
_MOST_MOVIES, _AT_A_TIME = 200, 10
_RELIABLE, _ENOUGH = 0.8, 0.98
_FLAT = 0.002


def check_gain_files(plan: Plan) -> None:
    """Refuse missing and invalid gain references and lists of defects before anything runs."""
    for inputs in plan.data_sets.values():
        if inputs.gain == ESTIMATE:
            if (inputs.gain_rotate, inputs.gain_flip, bool(inputs.gain_divides)) != (0, "none", False):
                raise GainError("An estimated gain cannot be turned or inverted.", "", "leave out gain_rotate, gain_flip and gain_divides")
            _defects(plan, inputs)
        elif inputs.gain or inputs.defects:
            _given(plan, inputs)


def store_gains(plan: Plan, folder: Path) -> dict[str, Path]:
    """Store the gain references in the project, named by the digest of their content; missing estimates are made."""
    out = {}
    for name, inputs in plan.data_sets.items():
        if not (inputs.gain or inputs.defects):
            continue
        data, stem = _as_file(
            _without_defects(plan, inputs, _estimated(plan, name, folder)) if inputs.gain == ESTIMATE else _given(plan, inputs)
        )
        path = folder / "inputs" / f"{stem}.npy"
        if not path.exists():
            _write(path, data)
        out[name] = path
    return out


def gain_names(plan: Plan, folder: Path) -> dict[str, str]:
    """Names of the data sets' gain references in a project, without reading any movie."""
    out = {}
    for name, inputs in plan.data_sets.items():
        if inputs.gain == ESTIMATE:
            kept = _estimate_path(name, folder)
            made = kept.exists()
            out[name] = _as_file(_without_defects(plan, inputs, np.load(kept)))[1] if made else "gain-not-estimated-yet"
        elif inputs.gain or inputs.defects:
            out[name] = _as_file(_given(plan, inputs))[1]
    return out


def check_orientation(plan: Plan, step: Step, data_set: str, gain: Path, shape: tuple[int, int], values: Iterable[dict[str, Any]]) -> None:
    """Refuse a gain that does not fit the first movies, before they are corrected with it.

    Raises
    ------
    GainError
    """
    listed = plan.data_sets.get(data_set)
    if listed is None or listed.gain != ESTIMATE:
        total = _sum_first_movies(step, values, shape)
        name = ((listed.gain or listed.defects) if listed is not None else "") or "the gain"
        references.check_gain(total, references.on_frames(np.load(gain), shape), name=name)


def _given(plan: Plan, inputs: Movies) -> np.ndarray:
    """The gain reference of a data set with its defects; 1 elsewhere if only defects are given."""
    return _without_defects(plan, inputs, _read(plan, inputs) if inputs.gain else None)


def _without_defects(plan: Plan, inputs: Movies, gain: np.ndarray | None) -> np.ndarray:
    defects = _defects(plan, inputs)
    if defects is not None:
        return apply_defects(gain, defects, inputs.defects or "")
    assert gain is not None
    return gain


def _defects(plan: Plan, inputs: Movies) -> np.ndarray | None:
    return read_defects(plan.resolve(inputs.defects), eer=is_eer(inputs.movies or "")) if inputs.defects else None


def _read(plan: Plan, inputs: Movies) -> np.ndarray:
    """The gain reference of a data set, rotated and flipped as the project file says."""
    path = plan.resolve(inputs.gain or "")
    if not Path(path).is_file():
        raise GainError(f"There is no gain reference {path}.", "", "check inputs.gain; paths are relative to the project file")
    return movies.read_gain(
        path, rotate=inputs.gain_rotate, flip=inputs.gain_flip, divides=inputs.gain_divides, eer=is_eer(inputs.movies or "")
    )


def _as_file(gain: np.ndarray) -> tuple[bytes, str]:
    """A gain reference as file content, and its name without extension, derived from the content."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(gain, np.float32))
    return buffer.getvalue(), f"gain-{hashlib.blake2b(buffer.getvalue(), digest_size=6).hexdigest()}"


def _write(path: Path, data: bytes) -> None:
    with disk_errors(path.parent.parent):
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, data)


def _sum_first_movies(step: Step, values_of: Iterable[dict[str, Any]], shape: tuple[int, int]) -> np.ndarray:
    """Sum of some frames of the first readable movies, `(y, x)` float64: enough to see the gain's pattern."""
    total = np.zeros(shape)
    used = 0
    for values in values_of:
        try:
            movie = processed(step, values)["movie"]
        except CryodaskError:
            continue
        if tuple(movie.shape[1:]) != shape:
            continue
        for i in range(min(len(movie), _CHECKED_FRAMES)):
            total += movie[i]
        used += 1
        if used == _CHECKED_MOVIES:
            break
    return total


# --- estimates ---------------------------------------------------------------------------------------------------------------
def _estimate_path(data_set: str, folder: Path) -> Path:
    return folder / "inputs" / f"estimated-gain{'-' + data_set if data_set else ''}.npy"


def _estimated(plan: Plan, data_set: str, folder: Path) -> np.ndarray:
    """The gain estimated from a data set's movies. It is made once: later movies must not change the results of earlier ones."""
    path = _estimate_path(data_set, folder)
    if path.exists():
        return np.asarray(np.load(path))
    gain = _estimate(list_movies(plan, data_set), fractions_of(plan, data_set))
    buffer = io.BytesIO()
    np.save(buffer, gain)
    _write(path, buffer.getvalue())
    return gain


def _estimate(paths: list[str], fractions: Fractions | None) -> np.ndarray:
    halves: tuple[np.ndarray, np.ndarray] | None = None
    used, reliability, pattern = 0, 0.0, 0.0
    for path in paths[:_MOST_MOVIES]:
        try:
            movie = movies.open_movie(path, fractions)
            total = sum((movie[i].astype(np.float64) for i in range(len(movie))), np.zeros(movie.shape[1:]))
        except CryodaskError:
            continue  # it will be quarantined by name
        if halves is None:
            halves = np.zeros_like(total), np.zeros_like(total)
        if total.shape == halves[0].shape:
            halves[used % 2].__iadd__(total)
            used += 1
            if used % _AT_A_TIME == 0 and (found := references.estimate_gain(halves))[1] > _ENOUGH:
                return found[0]
    if halves is None or used < 2:
        raise GainError(
            f"A gain cannot be estimated from {used} readable movies.",
            "the session has just begun",
            "wait for more movies, or give a gain",
        )
    gain, reliability, pattern = references.estimate_gain(halves)
    if reliability >= _RELIABLE:
        return gain
    if pattern < _FLAT:
        raise GainError(
            f"{used} movies have no fixed pattern that a gain would remove ({100 * pattern:.2f} % of the counts).",
            "the camera's software has corrected them",
            "leave out gain",
        )
    needed = int(np.ceil(used * _RELIABLE / (1.0 - _RELIABLE) * (1.0 - reliability) / max(reliability, 1e-3)))
    raise GainError(
        f"{used} movies are too few to estimate a gain: half of them agree with the others on {100 * reliability:.0f} % of the pattern.",
        "",
        f"wait for about {needed} movies, or give a gain",
    )
