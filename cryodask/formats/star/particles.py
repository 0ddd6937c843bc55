"""Particles of a STAR file with their rows grouped by micrograph: the form that an import of a million particles needs."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cryodask.errors import StarError
from cryodask.formats.star.names import COLUMNS, OPTICS
from cryodask.formats.star.read import read_coded_particles
from cryodask.formats.star.texts import Coded, Images
from cryodask.vocabulary import SLOTS

_NUMERIC = {c.name for c in (*COLUMNS, *OPTICS) if c.dtype != "str"}


@dataclass(frozen=True)
class ParticleTable:
    """Particles in the order of their file; names are stored once.

    Parameters
    ----------
    columns : dict of arrays `(particle,)`
        Numeric columns of the file, under the vocabulary's names: float64, or int64 for ``class_number`` ,
        ``optics_group``, ``box`` and ``particle_id``; ``half_set`` is int8, 0 or 1, and -1 for a particle in neither half.
    micrograph : int32 array `(particle,)`
        Index of each particle's micrograph in `micrographs`.
    micrographs : list of str
        Distinct micrographs in order of first appearance. In a file without micrograph names, the stacks: one with images of several
        optics groups, or of more particles than an exposure can hold, counts as several.
    stack, stacks
        The same for the stacks of the images.
    image_index : int64 array `(particle,)`
        Index of the image in its stack, from 0.
    order : int64 array
        Rows sorted by micrograph, in file order within each; without repeated ones.
    start : int64 array `(micrograph + 1,)`
        The rows of micrograph k are ``order[start[k] : start[k + 1]]``.
    repeated : int64 array
        Rows whose image an earlier row of the file has; these are not among the rows of any micrograph.
    kept_optics : Coded or None
        What is carried along of each row's optics group, JSON.
    """

    columns: dict[str, np.ndarray]
    micrograph: np.ndarray
    micrographs: list[str]
    stack: np.ndarray
    stacks: list[str]
    image_index: np.ndarray
    order: np.ndarray
    start: np.ndarray
    repeated: np.ndarray
    kept_optics: Coded | None = None

    def __len__(self) -> int:
        return len(self.image_index)

    def rows_of(self, micrograph: int) -> np.ndarray:
        """Rows of one micrograph, in file order, each image once."""
        return self.order[self.start[micrograph] : self.start[micrograph + 1]]

    def with_stacks(self, contents: Sequence[str]) -> ParticleTable:
        """The table with each image once, now that the content of every stack is known: links and copies hold the same images."""
        import pandas as pd

        known = pd.factorize(np.array(contents, dtype=object))[0]
        if len(set(known.tolist())) == len(known):
            return self
        repeated = np.union1d(self.repeated, _repeated(known[self.stack], self.image_index))
        order, start = _grouped(self.micrograph, len(self.micrographs), repeated)
        return replace(self, order=order, start=start, repeated=repeated)

    @property
    def half_set(self) -> np.ndarray:
        """Half of each particle, int8: 0 or 1, -1 where the file gives none."""
        return self.columns.get("half_set", np.full(len(self), -1, dtype=np.int8))

    @functools.cached_property
    def digests(self) -> np.ndarray:
        """One hash per row, uint64: depends on all its values, not on its position in the file."""
        total = np.zeros(len(self), np.uint64)
        with np.errstate(over="ignore"):
            columns = [*(v for _, v in sorted(self.columns.items())), self.image_index.astype(np.float64)]
            for i, values in enumerate(columns):
                exact = np.asarray(values, np.int64 if values.dtype == np.int64 else np.float64)  # an id does not fit into a float
                z = np.ascontiguousarray(exact).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(2 * i + 1)
                z = (z ^ (z >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
                total += z ^ (z >> np.uint64(29))
        return total

    @property
    def particle_id(self) -> np.ndarray | None:
        """Exact int64 ids of a file that cryodask wrote, or None."""
        return self.columns.get("particle_id")


def read_particle_table(path: str | Path, columns: Sequence[str] | None = None) -> ParticleTable:
    """Particles of a STAR file, grouped by micrograph.

    Parameters
    ----------
    path : path
    columns : sequence of str, optional
        Numeric columns to read, under the vocabulary's names; those that the file lacks are left out. All by default.

    Raises
    ------
    StarError
        As :func:`~cryodask.formats.star.read_particles`; also an unknown name in `columns`, and a random subset other than 0, 1 and 2.
    """
    path = Path(path)
    unknown = sorted(set(columns or ()) - _NUMERIC)
    if unknown:
        names = ", ".join(sorted(_NUMERIC))
        raise StarError(f"No numeric column of a STAR file is called {', '.join(unknown)}.", "", f"choose from {names}")
    read, images = read_coded_particles(path, columns)
    micrographs = read.get("micrograph_name", None)
    if micrographs is None:
        micrographs = _exposures_of_stacks(images, np.asarray(read.get("optics_group", np.zeros(len(images.index), np.int64))))
    assert isinstance(micrographs, Coded)
    micrographs = _each_once(micrographs)
    numbers = {n: v for n, v in read.items() if isinstance(v, np.ndarray) and (columns is None or n in columns)}
    if "half_set" in numbers:
        numbers["half_set"] = _half(path, numbers["half_set"])
    if "class_number" in numbers:
        _check_classes(path, numbers["class_number"])
    repeated = _repeated(_each_once(images.stack).codes, images.index)
    order, start = _grouped(micrographs.codes, len(micrographs.names), repeated)
    kept = read.get("relion_optics")
    return ParticleTable(
        columns=numbers,
        micrograph=micrographs.codes,
        micrographs=micrographs.names,
        stack=images.stack.codes,
        stacks=images.stack.names,
        image_index=images.index,
        order=order,
        start=start,
        repeated=repeated,
        kept_optics=kept if isinstance(kept, Coded) else None,
    )


def _each_once(paths: Coded) -> Coded:
    """Paths irrespective of spelling: ``./a.mrc`` is ``a.mrc``. The first spelling is kept."""
    import pandas as pd

    codes = pd.factorize(np.array([os.path.normpath(name) for name in paths.names], dtype=object))[0]
    first = np.unique(codes, return_index=True)[1]
    if len(first) == len(paths.names):
        return paths
    return Coded(codes[paths.codes].astype(np.int32), [paths.names[i] for i in first.tolist()])


def _repeated(stack: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Rows whose image an earlier row has."""
    import pandas as pd

    return np.flatnonzero(pd.DataFrame({"stack": stack, "index": index}).duplicated().to_numpy())


def _grouped(micrograph: np.ndarray, micrographs: int, repeated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``order`` and ``start`` of a table."""
    rows = np.delete(np.arange(len(micrograph)), repeated)
    count = np.bincount(micrograph[rows], minlength=micrographs)
    return rows[np.argsort(micrograph[rows], kind="stable")], np.concatenate([[0], np.cumsum(count)]).astype(np.int64)


def _check_classes(path: Path, classes: np.ndarray) -> None:
    if len(classes) and np.abs(classes).max() > np.iinfo(np.int32).max:
        raise StarError(
            f"{path}: rlnClassNumber of row {int(np.abs(classes).argmax()) + 1} is {classes[np.abs(classes).argmax()]}.",
            "the columns are shifted relative to the header",
            "write the file again with the program that made it",
        )


def _exposures_of_stacks(images: Images, optics_group: np.ndarray) -> Coded:
    """The stacks as exposures, in pieces of one optics group and of as many images as an exposure can hold."""
    import pandas as pd

    piece = images.index // SLOTS
    table = pd.DataFrame({"stack": images.stack.codes, "group": optics_group, "piece": piece})
    several = (table.groupby("stack")["group"].nunique() > 1).to_dict()
    codes = table.groupby(["stack", "group", "piece"], sort=False).ngroup().to_numpy()
    first = table.iloc[np.unique(codes, return_index=True)[1]]
    names = []
    for stack, group, number in first.itertuples(index=False):
        path = Path(images.stack.names[stack])
        end = (f"_optics{group}" if several[stack] else "") + (f"_from{number * SLOTS + 1}" if number else "")
        names.append(str(path.with_name(f"{path.stem}{end}{path.suffix}")) if end else images.stack.names[stack])
    return Coded(codes.astype(np.int32), names)


def _half(path: Path, subset: np.ndarray) -> np.ndarray:
    """RELION's subsets 1 and 2 as 0 and 1, no subset (0) as -1."""
    if len(subset) and (subset.min() < -1 or subset.max() > 1):
        raise StarError(
            f"{path}: rlnRandomSubset holds numbers other than 0, 1 and 2.",
            "the columns are shifted relative to the header",
            "write the file again with the program that made it",
        )
    return subset.astype(np.int8)
