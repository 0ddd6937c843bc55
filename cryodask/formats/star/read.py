"""Reading STAR files into columns under the vocabulary's names."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.errors import StarError
from cryodask.formats.star.blocks import Loop, scan
from cryodask.formats.star.names import ALIASES, COLUMNS, OPTICS, PARTICLE_ID, Column
from cryodask.formats.star.tables import read_tables
from cryodask.formats.star.texts import Coded, Images, encode

Columns = dict[str, np.ndarray]
Read = dict[str, "np.ndarray | Coded | Images"]

_HEAD = [c for c in OPTICS if c.name in ("pixel_size_angstrom", "particle_pixel_size_angstrom", "box")]
_OLD = ("rlnDetectorPixelSize", "rlnMagnification", "rlnOriginX", "rlnOriginY")


def read_micrographs(path: str | Path) -> Columns:
    """Micrographs or movies of a STAR file, one value per row, in the vocabulary's names.

    Returns
    -------
    dict of arrays `(micrograph,)`
        If present in the file ``micrograph_name, movie_name``, the CTF columns, ``optics_group``, and always ``voltage_kv,
        spherical_aberration_mm, amplitude_contrast, pixel_size_angstrom``.

    Raises
    ------
    StarError
        If the table or the optics are missing, or a column is missing, not numeric, or has NaN.
    """
    path = Path(path)
    columns = _read(path, ("micrographs", "movies"), need="pixel_size_angstrom")
    if "micrograph_name" not in columns and "movie_name" not in columns:
        raise missing_column(path, "rlnMicrographName")
    return {name: _decoded(values) for name, values in columns.items()}


def read_particles(path: str | Path) -> Columns:
    """Particles of a STAR file, one value per row, in the vocabulary's names.

    Returns
    -------
    dict of arrays `(particle,)`
        Like :func:`read_micrographs`, with the poses, ``particle_y, particle_x`` (pixels of the micrograph, from 0),
        ``particle_pixel_size_angstrom``, ``particle_id`` (int64, if a file of cryodask has it), and ``rlnImageName`` split into
        ``image_stack`` (text) and ``image_index`` (from 0).
    """
    columns, images = read_coded_particles(Path(path))
    out = {name: _decoded(values) for name, values in columns.items()}
    return {**out, "image_index": images.index, "image_stack": images.stack.decode()}


def read_coded_particles(path: Path, keep: Collection[str] | None = None) -> tuple[dict[str, np.ndarray | Coded], Images]:
    """Like :func:`read_particles`, but texts stay coded; `keep` names the columns to read, all if None."""
    columns = _read(path, ("particles", "images"), need="particle_pixel_size_angstrom", keep=keep, split_images=True)
    if "image_name" not in columns:
        raise missing_column(path, "rlnImageName")
    images = columns.pop("image_name")
    if isinstance(images, Coded):
        images = _split(path, images)
    assert isinstance(images, Images)
    return {name: values for name, values in columns.items() if not isinstance(values, Images)}, images


def _split(path: Path, names: Coded) -> Images:
    parts = [name.partition("@") for name in names.decode()]
    bad = [number + sign + stack for number, sign, stack in parts if not (number.isdigit() and sign and stack and int(number) > 0)]
    if bad:
        raise StarError(
            f"{path}: image name {bad[0]!r} is not NUMBER@STACK",
            "it is not a table of extracted particles",
            "give the STAR file that the extraction or refinement wrote",
        )
    index = np.array([int(number) - 1 for number, _, _ in parts], dtype=np.int64)
    return Images(index, encode(stack for _, _, stack in parts))


def read_coordinates(path: str | Path) -> Columns:
    """Picks of one micrograph: ``particle_y, particle_x`` (pixels from 0) and, where given, ``pick_score``."""
    path = Path(path)
    tables = _tables(path, [c.relion for c in COLUMNS])
    table = next((t for t in tables.values() if t is not None and "rlnCoordinateX" in t), None)
    if table is None:
        raise missing_column(path, "rlnCoordinateX")
    return {name: _decoded(values) for name, values in _translate(path, table, COLUMNS)}


def find_beside(name: str, star: Path) -> Path | None:
    """A file that a STAR file names: absolute, beside the STAR file, or relative to a folder above it (a RELION project)."""
    candidates = (Path(name), *(folder / name for folder in star.resolve().parents))
    # keep the name of a link, because many may point to one file
    return next((p.absolute() for p in candidates if p.is_file()), None)


def missing_column(path: Path, relion: str) -> StarError:
    """Error for a missing column."""
    return StarError(f"{path} has no column {relion}", "it is another kind of STAR file", "give the file that has it")


def _decoded(values: np.ndarray | Coded | Images) -> np.ndarray:
    assert not isinstance(values, Images)
    return values.decode() if isinstance(values, Coded) else values


def _tables(path: Path, wanted: Iterable[str], *, split_images: bool = False) -> dict[str, Loop | None]:
    """The wanted columns of every table, and None for every list of pairs; irregular files are read in full."""
    import pandas as pd

    fast = scan(path, wanted, split_images=split_images)
    if fast is not None:
        return fast
    tables = read_tables(path)
    return {b: {str(n): t[n] for n in t.columns} if isinstance(t, pd.DataFrame) else None for b, t in tables.items()}


def _wanted(keep: Collection[str] | None) -> list[str]:
    """RELION's names of the columns to read: those kept, and those that identify the optics."""
    always = {"micrograph_name", "image_name", "optics_group"}
    kept = [c for c in COLUMNS if keep is None or c.name in keep or c.name in always]
    names = [c.relion for c in (*kept, *OPTICS)]
    return [*names, *(alias for name in names for alias in ALIASES.get(name, ())), *_OLD]


def _read(path: Path, blocks: tuple[str, ...], need: str, *, keep: Collection[str] | None = None, split_images: bool = False) -> Read:
    tables = _tables(path, _wanted(keep), split_images=split_images)
    table = next((tables[b] for b in (*blocks, "") if b in tables), None)
    if table is None:
        raise StarError(
            f"{path} has the blocks {sorted(tables)}, but no table {' or '.join('data_' + b for b in blocks)}",
            "it is another kind of STAR file",
            "give the file that lists them",
        )
    columns = dict(_translate(path, table, COLUMNS))
    optics = tables.get("optics")
    columns.update(_optics_of_old_table(path, table) if optics is None else _spread_optics(path, optics, columns))
    for name in ("voltage_kv", "spherical_aberration_mm", "amplitude_contrast", need):
        if name not in columns:
            relion = next(c.relion for c in OPTICS if c.name == name)
            if "optics" in tables:
                raise missing_column(path, relion)
            raise StarError(
                f"{path} has no data_optics block, and its table has no {relion}",
                "RELION 3.0 or earlier wrote it",
                "convert it with relion_convert_star, or add the optics columns to the table",
            )
    return columns


def _translate(path: Path, table: Loop, names: Iterable[Column]) -> Iterator[tuple[str, np.ndarray | Coded | Images]]:
    for column in names:
        relion = next((n for n in (column.relion, *ALIASES.get(column.relion, ())) if n in table), None)
        if relion is None:
            continue
        values = table[relion]
        if column.dtype != "str":
            yield column.name, _numbers(path, relion, column, values)
        else:
            yield column.name, values if isinstance(values, (Coded, Images)) else encode(values)


def _numbers(path: Path, relion: str, column: Column, values: Any) -> np.ndarray:
    """A column as numbers of its type, counted as here; whole numbers never go through floats."""
    if relion == PARTICLE_ID and len(values) and values.dtype.kind != "i":
        raise _shifted(path, f"{relion} has values other than integers below 2^63")
    if column.dtype == "i8" and values.dtype.kind == "i":
        return np.asarray(values, dtype=np.int64) - column.base
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise _shifted(path, f"column {relion} is not numeric: {error}") from error
    if not np.isfinite(numbers).all():
        row = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise StarError(
            f"{path}: {relion} is not a number in row {row + 1}",
            "the program that wrote it failed for this row",
            "remove the row",
        )
    if column.dtype == "i8":
        if (numbers != np.round(numbers)).any():
            raise _shifted(path, f"{relion} has numbers that are not integers")
        return numbers.astype(np.int64) - column.base
    return np.require(numbers, requirements="W")


def _shifted(path: Path, what: str) -> StarError:
    return StarError(
        f"{path}: {what}", "the columns are shifted relative to the header", "write the file again with the program that made it"
    )


def _spread_optics(path: Path, optics: Loop, columns: Read) -> Read:
    import pandas as pd

    groups = dict(_translate(path, optics, (Column("optics_group", "rlnOpticsGroup", "i8"), *OPTICS)))
    if "optics_group" not in groups or "optics_group" not in columns:
        raise missing_column(path, "rlnOpticsGroup")
    row_of = {int(number): row for row, number in enumerate(np.asarray(groups.pop("optics_group")))}
    codes, used = pd.factorize(np.asarray(columns["optics_group"]))
    unknown = set(used.tolist()) - set(row_of)
    if unknown:
        raise StarError(
            f"{path}: optics group {min(unknown)} is not in data_optics",
            "tables were joined by hand",
            "add the group to data_optics",
        )
    rows = np.array([row_of[int(g)] for g in used], dtype=np.int64)[codes]
    return {name: Coded(v.codes[rows], v.names) if isinstance(v, Coded) else np.asarray(v)[rows] for name, v in groups.items()}


def _optics_of_old_table(path: Path, table: Loop) -> Read:
    """Optics and origins of a RELION 3.0 table, from its own columns (origins were in pixels)."""
    columns = dict(_translate(path, table, OPTICS))
    if {"rlnDetectorPixelSize", "rlnMagnification"} <= set(table):
        two = (Column("detector_um", "rlnDetectorPixelSize"), Column("magnification", "rlnMagnification"))
        detector, magnification = (np.asarray(values) for _, values in _translate(path, table, two))
        pixel = detector * 1e4 / magnification
        columns.setdefault("pixel_size_angstrom", pixel)
        columns.setdefault("particle_pixel_size_angstrom", pixel)
    if "particle_pixel_size_angstrom" in columns:
        origins = (Column("origin_x_angstrom", "rlnOriginX"), Column("origin_y_angstrom", "rlnOriginY"))
        for name, pixels in _translate(path, table, origins):
            columns[name] = np.asarray(pixels) * np.asarray(columns["particle_pixel_size_angstrom"])
    return columns


def read_labels(path: str | Path) -> frozenset[str]:
    """Labels of the first table that is not the optics, without the underscore; only the head of the file is read.

    Raises
    ------
    StarError
        If the file cannot be read, or has no table.
    """
    labels: set[str] = set()
    block = ""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                word = line.split(maxsplit=1)[0] if line.strip() else ""
                if word.startswith("data_"):
                    if labels and block != "optics":
                        break
                    block, labels = word.removeprefix("data_"), set()
                elif word.startswith("_"):
                    labels.add(word[1:])
                elif word and not word.startswith("#") and word != "loop_" and labels and block != "optics":
                    break
    except OSError as error:
        raise StarError(f"{path} cannot be read: {error.strerror}.", "", "check the path") from None
    if not labels:
        raise StarError(f"{path} has no table.", "it is another kind of file, or empty", "give a RELION STAR file")
    return frozenset(labels)


def read_optics(path: str | Path) -> list[dict[str, float]]:
    """What the optics groups say of pixels and images, one dict per group; of the file no more than its head is read.

    Returns
    -------
    list of dict
        ``pixel_size_angstrom`` of micrographs, ``particle_pixel_size_angstrom`` and ``box`` (pixels) of images, those that are given.
        Empty where the file has no table of optics at its head, or one that cannot be read: reading the whole file says why.
    """
    groups: list[dict[str, float]] = []
    labels: list[str] = []
    inside = False
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                words = shlex.split(line, comments=True)
                if not words or words[0] == "loop_":
                    continue
                if words[0].startswith("data_"):
                    if inside or words[0] != "data_optics":
                        break
                    inside = True
                elif words[0].startswith("_"):
                    labels.append(words[0][1:])
                else:
                    row = dict(zip(labels, words, strict=True))
                    found = {c.name: [row[n] for n in (c.relion, *ALIASES.get(c.relion, ())) if n in row] for c in _HEAD}
                    groups.append({name: float(texts[0]) for name, texts in found.items() if texts})
    except (OSError, ValueError):
        return []
    return groups
