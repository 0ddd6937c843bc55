"""RELION's STAR files, in the words of the vocabulary.

``COLUMNS`` is the one table of names. What differs in more than the name is turned on the way: RELION counts classes, half-sets
and images of a stack from 1 (here from 0), and writes optics once a group (here once a row). Tables are those of RELION 3.1 and
later; a table of RELION 3.0 is read where it carries its own optics, and refused otherwise.
"""

from __future__ import annotations

import linecache
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import starfile

from cryodask.errors import StarError

Tables = dict[str, "pd.DataFrame | dict[str, Any]"]
Columns = dict[str, np.ndarray]


class Column(NamedTuple):
    """Our name, RELION's, the type here, and what is subtracted from RELION's number on reading."""

    name: str
    relion: str
    dtype: str = "f8"
    base: int = 0


COLUMNS = (
    Column("micrograph_name", "rlnMicrographName", "str"),
    Column("movie_name", "rlnMicrographMovieName", "str"),
    Column("image_name", "rlnImageName", "str"),
    Column("ctf_image", "rlnCtfImage", "str"),
    Column("optics_group", "rlnOpticsGroup", "i8"),
    Column("defocus_u_angstrom", "rlnDefocusU"),
    Column("defocus_v_angstrom", "rlnDefocusV"),
    Column("defocus_angle_deg", "rlnDefocusAngle"),
    Column("phase_shift_deg", "rlnPhaseShift"),
    Column("ctf_resolution_angstrom", "rlnCtfMaxResolution"),
    Column("ctf_figure_of_merit", "rlnCtfFigureOfMerit"),
    Column("total_motion", "rlnAccumMotionTotal"),
    Column("early_motion", "rlnAccumMotionEarly"),
    Column("particle_x", "rlnCoordinateX"),
    Column("particle_y", "rlnCoordinateY"),
    Column("pick_score", "rlnAutopickFigureOfMerit"),
    Column("rot_deg", "rlnAngleRot"),
    Column("tilt_deg", "rlnAngleTilt"),
    Column("psi_deg", "rlnAnglePsi"),
    Column("origin_x_angstrom", "rlnOriginXAngst"),
    Column("origin_y_angstrom", "rlnOriginYAngst"),
    Column("class_number", "rlnClassNumber", "i8", 1),
    Column("half_set", "rlnRandomSubset", "i8", 1),
    Column("class_probability", "rlnMaxValueProbDistribution"),
    Column("log_likelihood", "rlnLogLikeliContribution"),
)
OPTICS = (
    Column("optics_group_name", "rlnOpticsGroupName", "str"),
    Column("voltage_kv", "rlnVoltage"),
    Column("spherical_aberration_mm", "rlnSphericalAberration"),
    Column("amplitude_contrast", "rlnAmplitudeContrast"),
    Column("pixel_size_angstrom", "rlnMicrographPixelSize"),
    Column("particle_pixel_size_angstrom", "rlnImagePixelSize"),
    Column("box", "rlnImageSize", "i8"),
)
ALIASES = {
    "rlnMicrographPixelSize": ("rlnMicrographOriginalPixelSize",),
    "particle_y": ("pick_y",),
    "particle_x": ("pick_x",),
}
_TEXT = [c.relion for c in (*COLUMNS, *OPTICS) if c.dtype == "str"]


# --- tables as they are


def read_tables(path: str | Path) -> Tables:
    """All blocks of a STAR file: a DataFrame for a loop, a dict for a list of pairs, under RELION's names without ``data_``.

    Raises
    ------
    StarError
        The file is missing, holds no block, or a row is longer or shorter than its header.
    """
    path = Path(path)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StarError(f"{path} cannot be read: {error}", "the path is wrong or it is not a STAR file", "check the path") from error
    _check_rows(path, lines)
    # starfile reads through linecache, which would hand out an older content of the same path
    linecache.checkcache(str(path))
    try:
        return dict(starfile.read(path, always_dict=True, parse_as_string=_TEXT))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise StarError(
            f"{path} cannot be parsed: {error}", "it is not a STAR file of RELION, or was edited by hand", "write it again"
        ) from error


def write_tables(path: str | Path, tables: Mapping[str, pd.DataFrame | Mapping[str, Any]]) -> None:
    """Write blocks under RELION's names; numbers keep nine digits.

    Raises
    ------
    StarError
        A text is empty, or holds blanks, quotes or `#`, none of which RELION can read; or a number is NaN.
    """
    for block, table in tables.items():
        columns: Iterable[tuple[Any, Any]] = table.items()
        for name, values in columns:
            array = np.atleast_1d(np.asarray(values))
            if array.dtype.kind == "f" and np.isnan(array).any():
                raise StarError(
                    f"{path}: column {name} of data_{block} holds NaN",
                    "an earlier step failed for some rows",
                    "leave them out",
                )
            if array.dtype.kind in "OUS":
                bad = [t for t in map(str, array) if not t.isprintable() or t.split() != [t] or any(c in t for c in "'\"#")]
                if bad:
                    raise StarError(
                        f"{path}: {name} cannot hold {bad[0]!r}",
                        "a file name with blanks, quotes or #",
                        "rename the file",
                    )
    ready = {b: t if isinstance(t, pd.DataFrame) else dict(t) for b, t in tables.items()}
    starfile.write(ready, Path(path), float_format="%.9g", overwrite=True)


def _check_rows(path: Path, lines: list[str]) -> None:
    """Refuse ragged rows: the parser below would fill short ones with NaN."""
    header, in_loop, blocks = 0, False, 0
    for number, raw in enumerate(lines, 1):
        line = raw.strip()
        if line.startswith("data_"):
            header, in_loop, blocks = 0, False, blocks + 1
        elif line.startswith("loop_"):
            in_loop = True
        elif in_loop and line.startswith("_") and len(line.split("#")[0].split()) == 1:
            header += 1
        elif in_loop and line and not line.startswith("#"):
            try:
                fields = shlex.split(line, comments=True) if any(c in line for c in "'\"#") else line.split()
            except ValueError as error:
                raise StarError(f"{path}, line {number}: {error}", "an unclosed quote", "mend the line") from error
            if len(fields) != header:
                raise StarError(
                    f"{path}, line {number}: {len(fields)} values for {header} columns",
                    "the file was cut short, or a name holds a blank",
                    "write the file again",
                )
    if not blocks:
        raise StarError(f"{path} holds no data_ block", "it is not a STAR file, or is empty", "check the path")


# --- reading into the vocabulary


def read_micrographs(path: str | Path) -> Columns:
    """Micrographs or movies of a STAR file, one value a row, in the vocabulary's names.

    Returns
    -------
    dict of arrays `(micrograph,)`
        What the file has of ``micrograph_name, movie_name``, the CTF columns, ``optics_group``, and always ``voltage_kv,
        spherical_aberration_mm, amplitude_contrast, pixel_size_angstrom``.

    Raises
    ------
    StarError
        No such table, no optics, a missing or non-numeric column, NaN.
    """
    path = Path(path)
    columns = _read(path, ("micrographs", "movies"), need="pixel_size_angstrom")
    if "micrograph_name" not in columns and "movie_name" not in columns:
        raise _missing(path, "rlnMicrographName")
    return columns


def read_particles(path: str | Path) -> Columns:
    """Particles of a STAR file, one value a row, in the vocabulary's names.

    Returns
    -------
    dict of arrays `(particle,)`
        As :func:`read_micrographs`, with the poses, ``particle_y, particle_x`` (pixels of the micrograph, from 0),
        ``particle_pixel_size_angstrom``, and ``rlnImageName`` split into ``image_stack`` (text) and ``image_index`` (from 0).
    """
    path = Path(path)
    columns = _read(path, ("particles", "images"), need="particle_pixel_size_angstrom")
    if "image_name" not in columns:
        raise _missing(path, "rlnImageName")
    parts = [name.partition("@") for name in columns.pop("image_name")]
    bad = [number + sign + stack for number, sign, stack in parts if not (number.isdigit() and sign and stack and int(number) > 0)]
    if bad:
        raise StarError(
            f"{path}: image name {bad[0]!r} is not NUMBER@STACK",
            "it is not a table of extracted particles",
            "give the STAR file that the extraction or refinement wrote",
        )
    columns["image_index"] = np.array([int(number) - 1 for number, _, _ in parts], dtype=np.int64)
    columns["image_stack"] = np.array([stack for _, _, stack in parts], dtype=object)
    return columns


def read_coordinates(path: str | Path) -> Columns:
    """Picks of one micrograph: ``particle_y, particle_x`` (pixels from 0) and, where given, ``pick_score``."""
    path = Path(path)
    table = next((t for t in read_tables(path).values() if isinstance(t, pd.DataFrame) and "rlnCoordinateX" in t), None)
    if table is None:
        raise _missing(path, "rlnCoordinateX")
    return dict(_translate(path, table, COLUMNS))


def find_beside(name: str, star: Path) -> Path | None:
    """A file that a STAR file names: absolute, beside the STAR file, or relative to a folder above it (a RELION project)."""
    candidates = (Path(name), *(folder / name for folder in star.resolve().parents))
    # a link keeps its own name: many may lead to one file
    return next((p.absolute() for p in candidates if p.is_file()), None)


def _read(path: Path, blocks: tuple[str, ...], need: str) -> Columns:
    tables = read_tables(path)
    table = next((tables[b] for b in (*blocks, "") if b in tables), None)
    if not isinstance(table, pd.DataFrame):
        raise StarError(
            f"{path} has the blocks {sorted(tables)}, but no table {' or '.join('data_' + b for b in blocks)}",
            "it is a STAR file of another kind",
            "give the file that lists them",
        )
    columns = dict(_translate(path, table, COLUMNS))
    optics = tables.get("optics")
    if isinstance(optics, pd.DataFrame):
        columns.update(_spread_optics(path, optics, columns))
    else:
        columns.update(_optics_of_old_table(path, table))
    for name in ("voltage_kv", "spherical_aberration_mm", "amplitude_contrast", need):
        if name not in columns:
            relion = next(c.relion for c in OPTICS if c.name == name)
            if "optics" in tables:
                raise _missing(path, relion)
            raise StarError(
                f"{path} has no data_optics block, and its table no {relion}",
                "it was written by RELION 3.0 or earlier",
                "convert it with relion_convert_star, or add the optics columns to the table",
            )
    return columns


def _translate(path: Path, table: pd.DataFrame, names: Iterable[Column]) -> Iterator[tuple[str, np.ndarray]]:
    for column in names:
        relion = next((n for n in (column.relion, *ALIASES.get(column.relion, ())) if n in table), None)
        if relion is None:
            continue
        values = table[relion]
        if column.dtype == "str":
            yield column.name, values.astype(str).to_numpy(dtype=object)
            continue
        try:
            numbers = values.to_numpy(dtype=np.float64)
        except (ValueError, TypeError) as error:
            raise StarError(
                f"{path}: column {relion} is not numeric: {error}",
                "the columns are shifted against the header",
                "write the file again with the program that made it",
            ) from error
        if not np.isfinite(numbers).all():
            row = int(np.flatnonzero(~np.isfinite(numbers))[0])
            raise StarError(
                f"{path}: {relion} is not a number in row {row + 1}",
                "the program that wrote it failed there",
                "leave the row out",
            )
        if column.dtype == "i8" and (numbers != np.round(numbers)).any():
            raise StarError(
                f"{path}: {relion} holds numbers that are not whole",
                "the columns are shifted against the header",
                "write the file again with the program that made it",
            )
        yield column.name, numbers.astype(column.dtype) - column.base


def _spread_optics(path: Path, optics: pd.DataFrame, columns: Columns) -> Columns:
    groups = dict(_translate(path, optics, (Column("optics_group", "rlnOpticsGroup", "i8"), *OPTICS)))
    if "optics_group" not in groups or "optics_group" not in columns:
        raise _missing(path, "rlnOpticsGroup")
    row_of = {int(number): row for row, number in enumerate(groups.pop("optics_group"))}
    unknown = set(columns["optics_group"].tolist()) - set(row_of)
    if unknown:
        raise StarError(
            f"{path}: optics group {min(unknown)} is not in data_optics",
            "tables were joined by hand",
            "add the group",
        )
    rows = np.array([row_of[int(g)] for g in columns["optics_group"]], dtype=np.int64)
    return {name: values[rows] for name, values in groups.items()}


def _optics_of_old_table(path: Path, table: pd.DataFrame) -> Columns:
    """Optics and origins of a RELION 3.0 table, from its own columns (origins were in pixels)."""
    columns = dict(_translate(path, table, OPTICS))
    if {"rlnDetectorPixelSize", "rlnMagnification"} <= set(table):
        two = (Column("detector_um", "rlnDetectorPixelSize"), Column("magnification", "rlnMagnification"))
        old = dict(_translate(path, table, two))
        pixel = old["detector_um"] * 1e4 / old["magnification"]
        columns.setdefault("pixel_size_angstrom", pixel)
        columns.setdefault("particle_pixel_size_angstrom", pixel)
    if "particle_pixel_size_angstrom" in columns:
        origins = (Column("origin_x_angstrom", "rlnOriginX"), Column("origin_y_angstrom", "rlnOriginY"))
        for name, pixels in _translate(path, table, origins):
            columns[name] = pixels * columns["particle_pixel_size_angstrom"]
    return columns


def _missing(path: Path, relion: str) -> StarError:
    return StarError(f"{path} has no column {relion}", "it is a STAR file of another kind", "give the file that has it")


# --- writing from the vocabulary


def write_micrographs_ctf(path: str | Path, columns: Mapping[str, Any]) -> None:
    """Micrographs with their CTF, as RELION's ``micrographs_ctf.star``; columns as :func:`read_micrographs` gives them."""
    _need(path, columns, ("micrograph_name", "pixel_size_angstrom", *_CTF, *_LENS))
    optics, table = _relion_tables(path, columns, len(np.atleast_1d(columns["micrograph_name"])))
    table["rlnCtfAstigmatism"] = table["rlnDefocusU"] - table["rlnDefocusV"]
    optics["rlnMicrographOriginalPixelSize"] = optics["rlnMicrographPixelSize"]
    write_tables(path, {"optics": optics, "micrographs": table})


def write_particles(path: str | Path, columns: Mapping[str, Any]) -> None:
    """Particles as RELION's ``particles.star``; columns as :func:`read_particles` gives them, scalars stand for all rows.

    Rows with equal optics share a group, numbered in the order in which they appear. ``box`` is the size of the images, pixels.
    """
    _need(path, columns, ("image_index", "image_stack", "particle_pixel_size_angstrom", "box", *_LENS))
    count = len(np.atleast_1d(columns["image_index"]))
    named = {k: v for k, v in columns.items() if k not in ("image_index", "image_stack")}
    stacks = np.broadcast_to(np.asarray(columns["image_stack"], dtype=object), count)
    indices = np.broadcast_to(columns["image_index"], count)
    named["image_name"] = np.array([f"{int(i) + 1:06d}@{s}" for i, s in zip(indices, stacks)], dtype=object)
    optics, table = _relion_tables(path, named, count)
    optics["rlnImageDimensionality"] = 2
    if "rlnMicrographPixelSize" in optics:
        optics["rlnMicrographOriginalPixelSize"] = optics["rlnMicrographPixelSize"]
    write_tables(path, {"optics": optics, "particles": table})


def write_coordinates(path: str | Path, pick_y: np.ndarray, pick_x: np.ndarray, pick_score: np.ndarray | None = None) -> None:
    """Picks of one micrograph, pixels from 0 in the MRC row frame, as RELION's ``*_autopick.star``."""
    table = pd.DataFrame({"rlnCoordinateX": np.asarray(pick_x, np.float64), "rlnCoordinateY": np.asarray(pick_y, np.float64)})
    if pick_score is not None:
        table["rlnAutopickFigureOfMerit"] = np.asarray(pick_score, np.float64)
    write_tables(path, {"": table})


def write_postprocess(
    path: str | Path,
    *,
    shell_resolution_angstrom: np.ndarray,
    fsc_unmasked: np.ndarray,
    fsc_masked: np.ndarray,
    fsc_randomised: np.ndarray,
    fsc_corrected: np.ndarray,
    resolution_angstrom: float,
    b_factor_angstrom2: float,
    half_map_names: tuple[str, str] = ("half1.mrc", "half2.mrc"),
    mask_name: str = "mask.mrc",
) -> None:
    """FSC curves `(shell,)` and result of post-processing as RELION's ``postprocess.star``; shell 0 may have resolution inf."""
    angstrom = np.where(np.isfinite(shell_resolution_angstrom), shell_resolution_angstrom, 999.0)
    general = {
        "rlnFinalResolution": float(resolution_angstrom),
        "rlnBfactorUsedForSharpening": float(b_factor_angstrom2),
        "rlnUnfilteredMapHalf1": half_map_names[0],
        "rlnUnfilteredMapHalf2": half_map_names[1],
        "rlnMaskName": mask_name,
    }
    curves = {
        "rlnSpectralIndex": np.arange(len(angstrom)),
        "rlnResolution": 1.0 / angstrom,
        "rlnAngstromResolution": angstrom,
        "rlnFourierShellCorrelationCorrected": fsc_corrected,
        "rlnFourierShellCorrelationUnmaskedMaps": fsc_unmasked,
        "rlnFourierShellCorrelationMaskedMaps": fsc_masked,
        "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps": fsc_randomised,
    }
    write_tables(path, {"general": general, "fsc": pd.DataFrame(curves)})


def write_motion(
    path: str | Path,
    *,
    movie_name: str,
    width: int,
    height: int,
    frame_shift: np.ndarray,
    pixel_size_angstrom: float,
    voltage_kv: float,
    dose_per_frame: float,
    pre_exposure: float = 0.0,
    gain_name: str | None = None,
    motion_polynomial: np.ndarray | None = None,
    hot_pixel: np.ndarray | None = None,
) -> None:
    """Motion of one movie as RELION's per-movie STAR file, for Bayesian polishing.

    Parameters
    ----------
    width, height : int
        Of a frame, pixels.
    frame_shift : array, `(frame, 2)`, Angstrom
        (y, x) displacement of the specimen. RELION stores the correction, its negative, in pixels, with frame 1 at zero.
    motion_polynomial : array, `(36,)`, optional
        RELION's coefficients of the local motion, X first.
    hot_pixel : array, `(n, 2)`, optional
        (y, x) of repaired pixels.
    """
    correction = -(np.asarray(frame_shift, np.float64) - frame_shift[:1]) / pixel_size_angstrom + 0.0
    general: dict[str, Any] = {
        "rlnImageSizeX": width,
        "rlnImageSizeY": height,
        "rlnImageSizeZ": len(correction),
        "rlnMicrographMovieName": movie_name,
        **({"rlnMicrographGainName": gain_name} if gain_name else {}),
        "rlnMicrographBinning": 1.0,
        "rlnMicrographOriginalPixelSize": pixel_size_angstrom,
        "rlnMicrographDoseRate": dose_per_frame,
        "rlnMicrographPreExposure": pre_exposure,
        "rlnVoltage": voltage_kv,
        "rlnMicrographStartFrame": 1,
        "rlnMotionModelVersion": 0 if motion_polynomial is None else 1,
    }
    shifts = {
        "rlnMicrographFrameNumber": np.arange(1, len(correction) + 1),
        "rlnMicrographShiftX": correction[:, 1],
        "rlnMicrographShiftY": correction[:, 0],
    }
    tables: dict[str, Any] = {"general": general, "global_shift": pd.DataFrame(shifts)}
    if motion_polynomial is not None:
        coefficients = np.asarray(motion_polynomial, np.float64).ravel()
        table = {"rlnMotionModelCoeffsIdx": np.arange(len(coefficients)), "rlnMotionModelCoeff": coefficients}
        tables["local_motion_model"] = pd.DataFrame(table)
    if hot_pixel is not None and len(hot_pixel):
        tables["hot_pixels"] = pd.DataFrame({"rlnCoordinateX": hot_pixel[:, 1], "rlnCoordinateY": hot_pixel[:, 0]}, dtype=np.float64)
    write_tables(path, tables)


_LENS = ("voltage_kv", "spherical_aberration_mm", "amplitude_contrast")
_CTF = ("defocus_u_angstrom", "defocus_v_angstrom", "defocus_angle_deg")


def _need(path: str | Path, columns: Mapping[str, Any], names: Iterable[str]) -> None:
    missing = [n for n in names if n not in columns]
    if missing:
        raise StarError(
            f"{path} cannot be written without {', '.join(missing)}",
            "an earlier stage has not run",
            "run it first",
        )


def _relion_tables(path: str | Path, columns: Mapping[str, Any], count: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Optics and main table under RELION's names; names that RELION lacks are refused, scalars spread over the rows."""
    ours = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
    columns = {ours.get(name, name): values for name, values in columns.items()}
    known = {c.name for c in (*COLUMNS, *OPTICS)}
    foreign = sorted(set(columns) - known)
    if foreign:
        raise StarError(f"{path}: RELION has no column for {', '.join(foreign)}", "they are ours alone", "leave them out")

    def spread(column: Column) -> np.ndarray:
        values = np.broadcast_to(np.asarray(columns[column.name], dtype=object if column.dtype == "str" else column.dtype), count)
        return values if column.dtype == "str" else values + column.base

    optics = pd.DataFrame({c.relion: spread(c) for c in OPTICS if c.name in columns})
    group = optics.groupby(list(optics.columns), sort=False).ngroup().to_numpy() + 1
    first = np.unique(group, return_index=True)[1]
    optics = optics.iloc[first].reset_index(drop=True)
    if "rlnOpticsGroupName" not in optics:
        optics.insert(0, "rlnOpticsGroupName", [f"opticsGroup{g + 1}" for g in range(len(optics))])
    optics.insert(1, "rlnOpticsGroup", np.arange(1, len(optics) + 1))
    table = pd.DataFrame({c.relion: spread(c) for c in COLUMNS if c.name in columns and c.name != "optics_group"})
    table["rlnOpticsGroup"] = group
    return optics, table
