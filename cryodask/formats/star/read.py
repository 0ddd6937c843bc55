"""Reading STAR files into columns under the vocabulary's names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.errors import StarError
from cryodask.formats.star.blocks import Loop, scan
from cryodask.formats.star.names import ALIASES, COLUMNS, KEPT, NONE, OF_TOMOGRAMS, OLD, OPTICS, PARTICLE_ID, SIDE, Column, stem
from cryodask.formats.star.numbers import check_limits, floats, whole
from cryodask.formats.star.rows import read_blocks
from cryodask.formats.star.texts import Coded, Images, encode

Columns = dict[str, np.ndarray]
Read = dict[str, "np.ndarray | Coded | Images"]

_PICKS = [c for c in COLUMNS if c.name in ("particle_x", "particle_y", "pick_score", "micrograph_name")]
_PIXELS = ("rlnMicrographPixelSize", *ALIASES["rlnMicrographPixelSize"])
_TOMOGRAM, _HEIGHT = OF_TOMOGRAMS


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
        If the table or the optics are missing, a column that is needed is missing or not numeric, or a quantity is outside its limits.
        A number that is missing (``nan``, ``inf``) is NaN, except in the optics.
    """
    path = Path(path)
    columns = _read(path, ("micrographs", "movies"), need="pixel_size_angstrom")
    if "micrograph_name" not in columns and "movie_name" not in columns:
        raise missing_column(path, "rlnMicrographName")
    if "defocus_u_angstrom" in columns:  # a table without astigmatism
        columns.setdefault("defocus_v_angstrom", columns["defocus_u_angstrom"])
        columns.setdefault("defocus_angle_deg", np.zeros(_length(columns["defocus_u_angstrom"])))
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
        raise StarError(
            f"{path} has no column rlnImageName, so it names no images.",
            "it is a table of positions, or of another kind",
            "give the file that has it, or import positions only, with images: false, and extract",
        )
    images = columns.pop("image_name")
    if isinstance(images, Coded):
        images = _split(path, images)
    assert isinstance(images, Images)
    return {name: values for name, values in columns.items() if not isinstance(values, Images)}, images


def _split(path: Path, names: Coded) -> Images:
    parts = [name.partition("@") for name in names.decode()]
    bad = [
        number + sign + stack
        for number, sign, stack in parts
        if not (number.isascii() and number.isdigit() and sign and stack and 0 < int(number) < 2**31)
    ]
    if bad:
        raise StarError(
            f"{path}: image name {bad[0]!r} is not NUMBER@STACK",
            "it is not a table of extracted particles",
            "give the STAR file that the extraction or refinement wrote",
        )
    index = np.array([int(number) - 1 for number, _, _ in parts], dtype=np.int64)
    return Images(index, encode(stack for _, _, stack in parts))


def read_coordinates(path: str | Path) -> Columns:
    """Picks of one micrograph: ``particle_y, particle_x`` (pixels from 0), and where given ``pick_score``, ``micrograph_name`` and the
    ``pixel_size_angstrom`` of these pixels.

    A file may hold picks of several micrographs; then only ``micrograph_name`` says whose they are.

    Raises
    ------
    StarError
        If a coordinate is missing, or not a number.
    """
    path = Path(path)
    tables = _tables(path, [*(c.relion for c in COLUMNS), *_PIXELS, _HEIGHT, _TOMOGRAM])
    # a table without rows has no columns either
    given = {name: t for name, t in tables.items() if t and {"rlnCoordinateX", "rlnCoordinateY"} & set(t)}
    if not given:
        raise missing_column(path, "rlnCoordinateX")
    filled = {name: t for name, t in given.items() if _length(next(iter(t.values())))}
    if len(filled) > 1:
        raise StarError(
            f"{path} has {len(filled)} tables of coordinates: {', '.join(f'data_{name}' for name in filled)}",
            "two pickers, or picks and their sorted-out rest, were written into one file",
            "keep one of the tables",
        )
    table = next(iter((filled or given).values()))
    columns = {name: _decoded(values) for name, values in _translate(path, table, _PICKS)}
    for name, relion in (("particle_x", "rlnCoordinateX"), ("particle_y", "rlnCoordinateY")):
        if name not in columns:
            raise missing_column(path, relion)
        if np.isnan(columns[name]).any():
            raise _not_a_number(path, relion, _row(int(np.flatnonzero(np.isnan(columns[name]))[0])))
    check_limits(path, columns, "row", lambda at: at + 1)
    _check_frame(path, table, np.stack([columns["particle_x"], columns["particle_y"]]))
    size = Column("pixel_size_angstrom", "rlnMicrographPixelSize")
    told = [np.asarray(values) for one in (table, tables.get("optics")) if one for _, values in _translate(path, one, [size])]
    return columns | ({"pixel_size_angstrom": told[0]} if told else {})


def _check_frame(path: Path, table: Read, places: np.ndarray) -> None:
    """Refuse coordinates `(2, row)` that are not pixels of a micrograph."""
    _check_plane(path, table)
    if places.shape[1] > 1 and (places >= 0).all() and (places <= 1).all() and (places % 1 > 0).any():
        raise StarError(f"{path} has coordinates between 0 and 1 only.", "they are fractions of the micrograph", "convert them to pixels")


def _check_plane(path: Path, table: Read | Loop) -> None:
    """Refuse what is of a tomogram: its images are of a tilt series, its coordinates have three dimensions."""
    told = _TOMOGRAM if _TOMOGRAM in table else ""
    if _HEIGHT in table and (floats([str(v) for v in _decoded(table[_HEIGHT]).tolist()])[0] != 0.0).any():
        told = _HEIGHT
    if told:
        what = "coordinates in three dimensions" if told == _HEIGHT else "names of tomograms"
        raise StarError(f"{path} has {what} ({told}).", "it is of tomograms", "give particles or picks of micrographs")


def _check_position(path: Path, table: Loop, keep: Collection[str] | None) -> None:
    """Refuse one coordinate without the other, unless only some columns were read; a missing origin is 0 for RELION."""
    missing = [name for name in ("rlnCoordinateX", "rlnCoordinateY") if name not in table]
    if keep is None and len(missing) == 1:
        raise missing_column(path, missing[0])


def _lists_files(table: Loop | None) -> bool:
    """Whether a table has rows that name movies, micrographs or images."""
    names = ("rlnImageName", "rlnMicrographName", "rlnMicrographMovieName")
    return bool(table) and any(_length(table[name]) for name in names if table is not None and name in table)


def _check_only(path: Path, tables: list[str]) -> None:
    if len(tables) > 1:
        raise StarError(
            f"{path} has {len(tables)} tables: {' and '.join('data_' + name for name in tables)}.",
            "files were joined by hand",
            "keep the one that is meant",
        )


def find_beside(name: str, star: Path) -> Path | None:
    """A file that a STAR file names: absolute, beside the STAR file, or relative to a folder above it (a RELION project).

    The folders are those of the path by which the STAR file was given, then those of the file it is a link to.
    """
    folders = dict.fromkeys((*star.absolute().parents, *star.resolve().parents))
    candidates = [Path(name)] if os.path.isabs(name) else [folder / name for folder in folders]
    # keep the name of a link, because many may point to one file
    return next((p for p in candidates if os.path.isfile(p)), None)  # False, too, for a name that no file can have


def missing_column(path: Path, relion: str) -> StarError:
    """Error for a missing column."""
    return StarError(f"{path} has no column {relion}", "it is another kind of STAR file", "give the file that has it")


def _decoded(values: np.ndarray | Coded | Images) -> np.ndarray:
    assert not isinstance(values, Images)
    return values.decode() if isinstance(values, Coded) else values


def _length(values: np.ndarray | Coded | Images) -> int:
    return len(values.codes if isinstance(values, Coded) else values.index if isinstance(values, Images) else values)


def _tables(path: Path, wanted: Iterable[str], *, split_images: bool = False) -> dict[str, Loop | None]:
    """The wanted columns of every table; irregular files are read in full, and a list of pairs is a table of one row."""
    fast = scan(path, wanted, split_images=split_images)
    if fast is not None:
        return fast
    blocks = read_blocks(path)
    return {b: {n: np.array(v, dtype=object) for n, v in block.columns.items()} for b, block in blocks.items()}


def _wanted(keep: Collection[str] | None) -> list[str]:
    """RELION's names of the columns to read: those kept, and those that identify the optics."""
    always = {"micrograph_name", "image_name", "optics_group"}
    kept = [c for c in COLUMNS if keep is None or c.name in keep or c.name in always]
    names = [c.relion for c in (*kept, *OPTICS)]
    return [*names, *(alias for name in names for alias in ALIASES.get(name, ())), *OLD, *KEPT, *OF_TOMOGRAMS]


def _read(path: Path, blocks: tuple[str, ...], need: str, *, keep: Collection[str] | None = None, split_images: bool = False) -> Read:
    tables = _tables(path, _wanted(keep), split_images=split_images)
    table = next((tables[b] for b in (*blocks, "") if b in tables), None)
    if table is None:
        raise StarError(
            f"{path} has the blocks {sorted(tables)}, but no table {' or '.join('data_' + b for b in blocks)}",
            "it is another kind of STAR file",
            "give the file that lists them",
        )
    _check_only(path, [b for b in (*blocks, "") if b in tables and _lists_files(tables[b])])
    _check_plane(path, table)
    _check_position(path, table, keep)
    columns = dict(_translate(path, table, COLUMNS))
    check_limits(path, columns, "row", lambda row: row + 1)
    _check_names(path, columns)
    _check_astigmatism(path, columns)
    optics = tables.get("optics")
    columns.update({} if optics is None else _spread_optics(path, optics, columns))
    columns.update(_optics_of_rows(path, table, columns, need))
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


def _row(at: int) -> str:
    return f"row {at + 1}"


def _translate(
    path: Path, table: Loop, names: Iterable[Column], place: Callable[[int], str] = _row
) -> Iterator[tuple[str, np.ndarray | Coded | Images]]:
    """Columns under the vocabulary's names; ``place`` says for messages where an element is."""
    for column in names:
        relion = next((n for n in (column.relion, *ALIASES.get(column.relion, ())) if n in table), None)
        if relion is None:
            continue
        values = table[relion]
        if column.dtype != "str":
            yield column.name, _numbers(path, relion, column, values, place)
        else:
            yield column.name, values if isinstance(values, (Coded, Images)) else encode(values)


def _numbers(path: Path, relion: str, column: Column, values: Any, place: Callable[[int], str]) -> np.ndarray:
    """A column as numbers of its type, with our offsets; integers are never converted by way of floats. NaN where a number is missing."""
    exact = values if values.dtype.kind == "i" else whole(values) if values.dtype == object else None
    if relion == PARTICLE_ID and len(values) and exact is None:
        raise _shifted(path, f"{relion} has values other than integers below 2^63")
    if column.dtype == "i8" and exact is not None:
        return np.asarray(exact, dtype=np.int64) - column.base
    numbers, bad = floats(values) if values.dtype == object else (np.array(values, dtype=np.float64), np.zeros(0, np.int64))
    numbers[~np.isfinite(numbers)] = np.nan
    if len(bad) and column.name not in SIDE:
        raise _shifted(path, f"column {relion} is not numeric: {values[bad[0]]!r} in {place(int(bad[0]))}")
    if column.dtype == "i8":
        none = np.isnan(numbers)
        if none.any() and column.name not in NONE:
            raise _not_a_number(path, relion, place(int(np.flatnonzero(none)[0])))
        numbers[none] = NONE.get(column.name, 0)
        if (numbers != np.round(numbers)).any() or (np.abs(numbers) >= 2.0**63).any():
            raise _shifted(path, f"{relion} has numbers that are not integers")
        return numbers.astype(np.int64) - column.base
    return numbers


def _not_a_number(path: Path, relion: str, where: str) -> StarError:
    return StarError(f"{path}: {relion} is not a number in {where}", "the program that wrote it failed there", "remove it")


def _shifted(path: Path, what: str) -> StarError:
    return StarError(
        f"{path}: {what}", "the columns are shifted relative to the header", "write the file again with the program that made it"
    )


def _spread_optics(path: Path, optics: Loop, columns: Read) -> Read:
    """The optics of each row. Every number of a group that is used must be there; those of others do not matter."""
    import pandas as pd

    named = dict(_translate(path, optics, (Column("optics_group", "rlnOpticsGroup", "i8"),)))
    if optics and _length(next(iter(optics.values()))) == 1 and columns:  # the only group is that of all rows
        given = np.asarray(columns.get("optics_group", []))
        named.setdefault("optics_group", given[:1] if len(given) else np.ones(1, np.int64))
        count = _length(next(iter(columns.values())))
        columns.setdefault("optics_group", np.full(count, np.asarray(named["optics_group"])[0]))
    if "optics_group" not in named or "optics_group" not in columns:
        raise missing_column(path, "rlnOpticsGroup")
    numbers = np.asarray(named["optics_group"]).tolist()
    row_of = {number: row for row, number in enumerate(numbers)}
    twice = next((n for n in numbers if numbers.count(n) > 1), None)
    if twice is not None:
        raise StarError(f"{path}: optics group {twice} is in data_optics twice", "tables were joined by hand", "renumber the groups")
    codes, used = pd.factorize(np.asarray(columns["optics_group"]))
    unknown = set(used.tolist()) - set(row_of)
    if unknown:
        raise StarError(
            f"{path}: optics group {min(unknown)} is not in data_optics",
            "tables were joined by hand",
            "add the group to data_optics",
        )
    rows = np.array([row_of[int(g)] for g in used], dtype=np.int64)
    taken = {label: _rows_of(values, rows) for label, values in optics.items()}
    groups = dict(_translate(path, taken, OPTICS, lambda row: f"optics group {numbers[rows[row]]}")) | _kept(path, taken)
    check_limits(path, groups, "optics group", lambda row: numbers[rows[row]], needed=True)
    return {name: _rows_of(values, codes) for name, values in groups.items()}


def _rows_of(values: Any, rows: np.ndarray) -> Any:
    return Coded(values.codes[rows], values.names) if isinstance(values, Coded) else np.asarray(values)[rows]


def _kept(path: Path, table: Loop) -> Read:
    """What no stage uses of an optics group, one JSON text per row; the file of an MTF by its full path, if it is there."""
    labels = [n for n in KEPT if n in table]
    if not labels:
        return {}
    texts = [_decoded(v if isinstance(v, Coded) else encode(v)).tolist() for v in (table[n] for n in labels)]
    names = {n: str(find_beside(n, path) or n) for n in texts[labels.index("rlnMtfFileName")]} if "rlnMtfFileName" in labels else {}
    rows = [{n: names[v] if n == "rlnMtfFileName" else v for n, v in zip(labels, row)} for row in zip(*texts)]
    return {"relion_optics": encode(json.dumps(row) for row in rows)}


def _optics_of_rows(path: Path, table: Loop, columns: Read, pixel: str) -> Read:
    """Optics and origins that the rows have themselves (RELION 3.0 has no others); they must agree with those of their groups.

    RELION ignores them where there are groups, so that images multiplied by their CTF would not be recognised. ``pixel``: what a
    magnification in the rows gives the size of. Of particles it is their images, as in relion_convert_star: extraction with a scale
    writes the magnification of the images, and nothing then says that of the micrographs.
    """
    own: Read = dict(_translate(path, table, OPTICS))
    check_limits(path, own, "row", lambda row: row + 1, needed=True)
    for name, values in own.items():
        group = columns.get(name)
        if isinstance(values, np.ndarray) and isinstance(group, np.ndarray) and not np.allclose(values, group, rtol=1e-3, atol=0):
            row = int(np.flatnonzero(~np.isclose(values, group, rtol=1e-3, atol=0))[0])
            relion = next(c.relion for c in OPTICS if c.name == name)
            raise StarError(
                f"{path}: {relion} of row {row + 1} is {values[row]:g}, but {group[row]:g} in its optics group.",
                "the table was edited, or joined with another",
                "remove the wrong one",
            )
    out = {name: values for name, values in own.items() if name not in columns} | _both_kept(columns, _kept(path, table))
    if {"rlnDetectorPixelSize", "rlnMagnification"} <= set(table):
        two = (Column("detector_um", "rlnDetectorPixelSize"), Column("magnification", "rlnMagnification"))
        detector, magnification = (np.asarray(values) for _, values in _translate(path, table, two))
        with np.errstate(divide="ignore", invalid="ignore"):
            size = detector * 1e4 / magnification
        if pixel not in {*columns, *out}:
            check_limits(path, {pixel: size}, "row", lambda row: row + 1, needed=True)
            out[pixel] = size
    image_pixel = out.get("particle_pixel_size_angstrom", columns.get("particle_pixel_size_angstrom"))
    if image_pixel is not None:
        origins = (Column("origin_x_angstrom", "rlnOriginX"), Column("origin_y_angstrom", "rlnOriginY"))
        for name, pixels in _translate(path, table, origins):
            if name not in columns:
                out[name] = np.asarray(pixels) * np.asarray(image_pixel)
                check_limits(path, {name: out[name]}, "row", lambda row: row + 1)
    return out


def _both_kept(columns: Read, own: Read) -> Read:
    """What is kept of the optics of the groups and of the rows; that of the groups counts, as in RELION."""
    import pandas as pd

    group, row = columns.get("relion_optics"), own.get("relion_optics")
    if not isinstance(group, Coded) or not isinstance(row, Coded):
        return own
    codes, pairs = pd.factorize(group.codes.astype(np.int64) * len(row.names) + row.codes)
    texts = [json.dumps(json.loads(row.names[p % len(row.names)]) | json.loads(group.names[p // len(row.names)])) for p in pairs.tolist()]
    return {"relion_optics": Coded(codes.astype(np.int32), texts)}


def _check_astigmatism(path: Path, columns: Read) -> None:
    """A defocus that depends on the direction needs an angle."""
    u, v = columns.get("defocus_u_angstrom"), columns.get("defocus_v_angstrom")
    if isinstance(u, np.ndarray) and isinstance(v, np.ndarray) and "defocus_angle_deg" not in columns and (np.abs(u - v) > 1.0).any():
        raise missing_column(path, "rlnDefocusAngle")


def _check_names(path: Path, columns: Read) -> None:
    for name, relion in (("micrograph_name", "rlnMicrographName"), ("movie_name", "rlnMicrographMovieName")):
        values = columns.get(name)
        if isinstance(values, Coded) and (bad := [one for one in values.names if stem(one) in ("", ".", "..") or not one.isprintable()]):
            raise StarError(f"{path}: {relion} {bad[0]!r} is not the name of a file", "", "correct it, or remove its rows")
