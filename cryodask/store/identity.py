"""Identity of particles: ids, half-sets, and joining tables of particles.

An id is a positive int64: birth (12 bits), row of the exposure (24), number within exposure and birth (20), copy (7, from 1; 0 is the
particle itself). Ids sort by birth, exposure, number, copy; a set of particles is a sorted array of unique ids. They are never
unsigned: numpy promotes uint64 with int64 to float64, in which neighbouring ids are equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cryodask.errors import InputError, StoreError

_COPY_BITS, _NUMBER_BITS, _ROW_BITS, _BIRTH_BITS = 7, 20, 24, 12
_NUMBER_AT = _COPY_BITS
_ROW_AT = _NUMBER_AT + _NUMBER_BITS
_BIRTH_AT = _ROW_AT + _ROW_BITS
MOST_BIRTHS, MOST_ROWS, MOST_NUMBERS, MOST_COPIES = 1 << _BIRTH_BITS, 1 << _ROW_BITS, 1 << _NUMBER_BITS, (1 << _COPY_BITS) - 1


def make_ids(birth: Any, row: Any, number: Any, copy: Any = 0) -> np.ndarray:
    """Compose ids from their parts (arrays or numbers, broadcast).

    Raises
    ------
    InputError
        If a part exceeds its bits.
    """
    parts = [np.asarray(part, np.int64) for part in (birth, row, number, copy)]
    limits = (MOST_BIRTHS, MOST_ROWS, MOST_NUMBERS, MOST_COPIES + 1)
    names = ("births in a project", "exposures in a project", "particles of one exposure and birth", "copies of a particle")
    for part, limit, name in zip(parts, limits, names):
        if part.size and (part.min() < 0 or part.max() >= limit):
            raise InputError(
                f"At most {limit:,} {name} are possible; number {int(part.max()):,} was requested.",
                "the picks of many micrographs were given as those of a single one",
                "split the input into several projects",
            )
    b, r, n, c = parts
    return (b << _BIRTH_AT) | (r << _ROW_AT) | (n << _NUMBER_AT) | c


def birth_of(ids: Any) -> np.ndarray:
    """Birth numbers of ids."""
    return np.asarray(ids, np.int64) >> _BIRTH_AT


def row_of(ids: Any) -> np.ndarray:
    """Exposure rows of ids."""
    rows = np.asarray(ids, np.int64) >> _ROW_AT
    rows &= MOST_ROWS - 1  # in place: for millions of ids a second array costs more than the arithmetic
    return rows


def row_runs(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and number of particles of each run of particles of one exposure, without an array of all rows."""
    block = 1 << 16
    firsts = [np.zeros(1 if len(ids) else 0, np.int64)]
    for start in range(0, len(ids), block):
        rows = row_of(ids[start : start + block + 1])  # including the first of the next block
        firsts.append(np.flatnonzero(rows[1:] != rows[:-1]) + (start + 1))
    first = np.concatenate(firsts)
    return row_of(ids[first]), np.diff(np.append(first, len(ids)))


def rows_in(ids: np.ndarray) -> np.ndarray:
    """Unique sorted rows of the exposures of some particles."""
    firsts, _ = row_runs(ids)
    return firsts if (np.diff(firsts) > 0).all() else np.unique(firsts)


def number_of(ids: Any) -> np.ndarray:
    """Numbers of ids within exposure and birth."""
    return (np.asarray(ids, np.int64) >> _NUMBER_AT) & (MOST_NUMBERS - 1)


def copy_of(ids: Any) -> np.ndarray:
    """Copy numbers of a symmetry expansion, from 1; 0 for the particle itself."""
    return np.asarray(ids, np.int64) & MOST_COPIES


def parent_of(ids: Any) -> np.ndarray:
    """Ids of the particles without copy number."""
    return np.asarray(ids, np.int64) & ~np.int64(MOST_COPIES)


def id_text(particle_id: int) -> str:
    """``birth.row.number`` or ``birth.row.number.copy``."""
    parts = [int(f(particle_id)) for f in (birth_of, row_of, number_of)]
    copy = int(copy_of(particle_id))
    return ".".join(map(str, [*parts, copy] if copy else parts))


def parse_id(text: str | int) -> int:
    """Inverse of :func:`id_text`; also accepts plain integers.

    Raises
    ------
    InputError
    """
    parts = str(text).split(".")
    try:
        numbers = [int(part) for part in parts]
        if len(numbers) == 1:
            return numbers[0]
        if len(numbers) in (3, 4):
            return int(make_ids(*numbers))
    except ValueError:
        pass
    raise InputError(f"{text!r} is not the id of a particle.", "", "write birth.row.number, for example 1.12.7, or the integer particle_id")


def checked(ids: np.ndarray) -> np.ndarray:
    """Return the ids; raise if they are not a set: wrong dtype, unsorted, or duplicates."""
    if ids.dtype != np.int64:
        raise StoreError(
            f"Particle ids must be int64, not {ids.dtype}.", "they were converted in a table of numbers", "read them again as int64"
        )
    if len(ids) > 1 and not (ids[1:] > ids[:-1]).all():
        raise StoreError("The ids of a set are not sorted, or one occurs twice.", "results were joined by hand", "run cryodask verify")
    return ids


def same_ids(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two sets are equal."""
    return one is other or (len(one) == len(other) and bool((one == other).all()))


def place_of(wanted: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Index of each wanted id in the set ``ids``, -1 if missing. A wanted copy matches its parent if ``ids`` has no copies."""
    if same_ids(wanted, ids):
        return np.arange(len(ids))
    if not len(ids):
        return np.full(len(wanted), -1)
    if not copy_of(ids).any():
        wanted = parent_of(wanted)
    at = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    return np.where(ids[at] == wanted, at, -1)


def aligned(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Values at indices; NaN, or -1 for integers, where the index is -1."""
    if (at >= 0).all():
        return np.asarray(values[at])
    out = np.full((len(at), *values.shape[1:]), -1 if values.dtype.kind in "iu" else np.nan, values.dtype)
    out[at >= 0] = values[at[at >= 0]]
    return out


def births_text(ids: np.ndarray) -> str:
    """Text with the numbers of the births that a set comes from."""
    found = sorted(set(birth_of(ids).tolist()))
    return "birth " + ", ".join(map(str, found)) if found else "no birth"


def _mixed(values: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64 hash (Steele, Lea and Flood 2014): bit-identical on every machine."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed + 1)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def half_sets(ids: np.ndarray, seed: int = 0) -> np.ndarray:
    """Half-set `(n,)` int8 that each particle gets at birth.

    Numbers 2k and 2k + 1 of an exposure go to different halves, assigned by a hash of (seed, birth, row, k): every prefix of a birth table
    is balanced to within one particle, independently of all other particles. Copies are in the half of their parent.
    """
    pair = parent_of(ids) >> (_NUMBER_AT + 1)
    flip = (_mixed(pair, seed) & np.uint64(1)).astype(np.int8)
    return (number_of(ids) & 1).astype(np.int8) ^ flip
