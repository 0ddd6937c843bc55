"""cryoSPARC's tables (``.cs``, NumPy structured arrays, and ``.csg`` groups of them), under the names of the vocabulary.

Conventions: a pose is a rotation vector; the transpose of its rotation is RELION's matrix of Euler angles (as pyem and cryoDRGN
read it). Shifts (x, y) are in pixels of ``alignments3D/psize_A`` and move the particle to the centre, as RELION's origins. Angles are
in radians, U and V of the defocus as in RELION. Centres are fractions of the micrograph, whose shape is (y, x). A path that begins
with ``>`` is relative to the file. ``uid`` identifies a row in all files, and all its 64 bits are kept.

Aberrations are those of the exposure group, in texts as :func:`cryodask.formats.star.read_particles` gives them; see
:mod:`cryodask.formats.cryosparc_optics`.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np
import yaml

from cryodask.documents import read_yaml
from cryodask.errors import InputError, ProjectFileError
from cryodask.formats import cryosparc_optics
from cryodask.formats.star.numbers import in_micrometres
from cryodask.vocabulary import LIMITS, Limits

Columns = dict[str, np.ndarray]

_CTF = {
    "voltage_kv": ("ctf/accel_kv", 1.0),
    "spherical_aberration_mm": ("ctf/cs_mm", 1.0),
    "amplitude_contrast": ("ctf/amp_contrast", 1.0),
    "defocus_u_angstrom": ("ctf/df1_A", 1.0),
    "defocus_v_angstrom": ("ctf/df2_A", 1.0),
    "defocus_angle_deg": ("ctf/df_angle_rad", 180.0 / np.pi),
    "phase_shift_deg": ("ctf/phase_shift_rad", 180.0 / np.pi),
    "ctf_b_factor_angstrom2": ("ctf/bfactor", 1.0),
    "ctf_scale_factor": ("ctf/scale", 1.0),
}
_NEUTRAL = {"ctf_b_factor_angstrom2": 0.0, "ctf_scale_factor": 1.0}
"""Our name -> cryoSPARC's, and the factor from its unit to ours."""
_PIXEL_SIZES = ("blob/psize_A", "alignments3D/psize_A", "location/micrograph_psize_A", "micrograph_blob/psize_A", "movie_blob/psize_A")
_MICROSCOPE = {"voltage_kv": "mscope_params/accel_kv", "spherical_aberration_mm": "mscope_params/cs_mm"}
_WIDTHS = {
    "blob/shape": 2,
    "movie_blob/shape": 3,
    "alignments3D/pose": 3,
    "alignments3D/shift": 2,
    "location/micrograph_shape": 2,
    **dict(cryosparc_optics.FIELDS.values()),
}
"""Columns of vectors, and their lengths."""
_POSSIBLE = {
    **{
        theirs: (LIMITS[ours].least / factor, LIMITS[ours].most / factor, LIMITS[ours].unit if factor == 1.0 else "")
        for ours, (theirs, factor) in _CTF.items()
        if ours in LIMITS
    },
    **dict.fromkeys(_PIXEL_SIZES, (LIMITS["pixel_size_angstrom"].least, LIMITS["pixel_size_angstrom"].most, "A")),
    "blob/shape": (2, 10_000, "pixels"),
    "blob/idx": (0, 2**31, ""),
    "alignments2D/class": (-1, 2**31 - 2, ""),
    "alignments3D/split": (0, 1, ""),
    "alignments3D/pose": (-4 * np.pi, 4 * np.pi, "radians"),
    "location/micrograph_shape": (1, 1_000_000, "pixels"),
    "location/center_x_frac": (-0.1, 1.1, ""),
    "location/center_y_frac": (-0.1, 1.1, ""),
    "ctf/anisomag": (-0.4, 0.4, ""),
}
"""Column -> least and most value, unit."""
_NUMBERS = {*_POSSIBLE, *_WIDTHS, *(theirs for theirs, _ in _CTF.values()), *_MICROSCOPE.values()}
_NUMBERS |= {"blob/sign", "alignments2D/class", "ctf/exp_group_id", "mscope_params/total_dose_e_per_A2", "movie_blob/is_gain_corrected"}
_FLAGS = ("movie_blob/is_gain_corrected", "movie_blob/has_defect_file", "mscope_params/phase_plate")
_TURNS = ("gain_ref_blob/flip_x", "gain_ref_blob/flip_y", "gain_ref_blob/rotate_num")
_NUMBERS |= {*_FLAGS, *_TURNS}
_WHOLE = ("blob/idx", "blob/shape", "movie_blob/shape", "alignments2D/class", "alignments3D/split", "ctf/exp_group_id", *_FLAGS, *_TURNS)
"""Columns of whole numbers, whatever their type."""
_PATHS = ("blob/path", "micrograph_blob/path", "movie_blob/path", "location/micrograph_path", "gain_ref_blob/path")
_NEEDED_PATHS = {"blob/path": "the particle was not extracted", "location/micrograph_path": "its exposure was removed"}
"""Paths that no row may lack, and the usual reason why one does."""
_DAMAGED = (OSError, ValueError, EOFError, MemoryError, SyntaxError, TypeError, OverflowError, RecursionError, BadZipFile, TokenError)
"""What NumPy raises for a file whose header can be anything."""
_CS_VERSION = "v4.0.0"


def read_particles(path: str | Path) -> Columns:
    """Particles of a ``.cs`` file, or of all files of a ``.csg`` group, joined by uid.

    Returns
    -------
    dict of arrays `(particle,)`
        As :func:`cryodask.formats.star.read_particles`, with what the file has: ``image_stack, image_index, box,
        particle_pixel_size_angstrom``; the CTF; ``rot_deg, tilt_deg, psi_deg, origin_y_angstrom, origin_x_angstrom, half_set``;
        ``class_number`` of the last 2D classification, from 1; ``particle_y, particle_x, micrograph_name, pixel_size_angstrom``;
        ``optics_group_name``, ``relion_optics``; ``contrast_sign``, 1 where protein is bright and -1 where the job was told that it is
        dark. Always ``cryosparc_uid``, uint64.

    Raises
    ------
    InputError
        If the file is missing or damaged, has no uid, or one twice; or a column has NaN or infinite values.
    """
    table = _read(Path(path))
    _possible(Path(path), table)
    out: Columns = {"cryosparc_uid": table["uid"]}
    if "blob/path" in table:
        out["image_stack"] = _texts(Path(path), table["blob/path"])
        out["image_index"] = table["blob/idx"].astype(np.int64)
        if (table["blob/shape"][:, 0] != table["blob/shape"][:, 1]).any():
            raise InputError(f"{path} has images that are not square (blob/shape).", "", "give a table of particles")
        out["box"] = table["blob/shape"][:, 0].astype(np.int64)
        out["particle_pixel_size_angstrom"] = _doubles(table["blob/psize_A"])
    if "blob/sign" in table:
        if not np.isin(table["blob/sign"], (-1, 1)).all():
            raise InputError(f"{path}: blob/sign is neither 1 nor -1 in some rows.", "another program wrote it", "correct it there")
        out["contrast_sign"] = table["blob/sign"].astype(np.int64)
    out |= _ctf(table) | cryosparc_optics.kept(Path(path), table)
    if "alignments3D/pose" in table:
        out |= dict(zip(("rot_deg", "tilt_deg", "psi_deg"), _angles(table["alignments3D/pose"].astype(np.float64))))
        shift = table["alignments3D/shift"].astype(np.float64) * table["alignments3D/psize_A"][:, None]
        out |= {"origin_x_angstrom": shift[:, 0], "origin_y_angstrom": shift[:, 1]}
        if "alignments3D/split" in table:
            out["half_set"] = table["alignments3D/split"].astype(np.int64)
    if "alignments2D/class" in table:
        out["class_number"] = table["alignments2D/class"].astype(np.int64) + 1
    if "location/center_x_frac" in table:
        shape = table["location/micrograph_shape"].astype(np.float64)
        out["particle_y"] = table["location/center_y_frac"] * shape[:, 0]
        out["particle_x"] = table["location/center_x_frac"] * shape[:, 1]
        out["micrograph_name"] = _texts(Path(path), table["location/micrograph_path"])
        if "location/micrograph_psize_A" in table:
            out["pixel_size_angstrom"] = _doubles(table["location/micrograph_psize_A"])
    return _checked(Path(path), out)


def read_micrographs(path: str | Path) -> Columns:
    """Exposures of a ``.cs`` file or ``.csg`` group: ``micrograph_name`` or ``movie_name``, optics, CTF, and ``cryosparc_uid``.

    Of movies also, where the file has them, ``gain_name``, ``gain_turned`` (1 where cryoSPARC flips or rotates it), ``gain_corrected``
    (1 where it was applied already), ``dose_per_frame`` (0 where it is not known), ``phase_plate`` and ``defects`` (1 where there are).
    """
    table = _read(Path(path))
    _possible(Path(path), table)
    out: Columns = {"cryosparc_uid": table["uid"]}
    for name, blob in (("micrograph_name", "micrograph_blob"), ("movie_name", "movie_blob")):
        if f"{blob}/path" in table:
            out[name] = _texts(Path(path), table[f"{blob}/path"])
            out.setdefault("pixel_size_angstrom", _doubles(table[f"{blob}/psize_A"]))
    out |= {ours: _doubles(table[theirs]) for ours, theirs in _MICROSCOPE.items() if theirs in table}
    if "movie_name" in out and "gain_ref_blob/path" in table:
        out["gain_name"] = _texts(Path(path), table["gain_ref_blob/path"])
        turns = [table[name] != 0 for name in _TURNS if name in table]
        out["gain_turned"] = np.any(turns, axis=0).astype(np.int64) if turns else np.zeros(len(table["uid"]), np.int64)
        out["gain_corrected"] = table.get("movie_blob/is_gain_corrected", np.zeros(len(table["uid"]))).astype(np.int64)
    if "movie_name" in out and "movie_blob/shape" in table and "mscope_params/total_dose_e_per_A2" in table:
        frames = table["movie_blob/shape"][:, 0].astype(np.float64)
        dose = _doubles(table["mscope_params/total_dose_e_per_A2"])
        out["dose_per_frame"] = np.divide(dose, frames, out=np.zeros(len(frames)), where=frames > 0)
    for name, theirs in (("phase_plate", "mscope_params/phase_plate"), ("defects", "movie_blob/has_defect_file")):
        if "movie_name" in out and theirs in table:
            out[name] = table[theirs].astype(np.int64)
    return _checked(Path(path), {**out, **_ctf(table), **cryosparc_optics.kept(Path(path), table)})


def write_particles(path: str | Path, columns: Mapping[str, Any], micrograph_shape: Any = None) -> None:
    """Particles as a ``.cs`` file and its ``.csg`` group; columns as :func:`read_particles` gives them, what is missing is left out.

    Parameters
    ----------
    micrograph_shape : (y, x), or array `(particle, 2)`, optional
        Size of the micrographs, pixels: positions are written as fractions of it, so without it there are none.
    """
    path = Path(path)
    count = len(np.atleast_1d(columns["image_index"]))

    def column(name: str) -> np.ndarray:
        return np.broadcast_to(np.asarray(columns[name]), count)

    fields: dict[str, np.ndarray] = {"uid": column("cryosparc_uid").astype(np.uint64)}
    fields["blob/path"] = np.char.add(b">", _encoded(column("image_stack")))
    fields["blob/idx"] = column("image_index").astype(np.uint32)
    fields["blob/shape"] = np.repeat(column("box")[:, None], 2, axis=1).astype(np.uint32)
    fields["blob/psize_A"] = column("particle_pixel_size_angstrom").astype(np.float32)
    fields["blob/sign"] = np.ones(count, np.float32)
    fields |= _ctf_fields(columns, column)
    if "rot_deg" in columns:
        fields |= _alignments(*(column(n).astype(np.float64) for n in ("rot_deg", "tilt_deg", "psi_deg")))
        shift = np.stack([column(f"origin_{axis}_angstrom") for axis in "xy"], 1) / fields["blob/psize_A"][:, None]
        fields["alignments3D/shift"] = shift.astype(np.float32)
        fields["alignments3D/psize_A"] = fields["blob/psize_A"]
        if "half_set" in columns:
            fields["alignments3D/split"] = column("half_set").astype(np.uint32)
    if micrograph_shape is not None and "particle_y" in columns:
        fields["location/micrograph_path"] = _encoded(column("micrograph_name"))
        shape = np.broadcast_to(np.asarray(micrograph_shape, np.uint32), (count, 2))
        fields["location/micrograph_shape"] = shape
        fields["location/center_x_frac"] = (column("particle_x") / shape[:, 1]).astype(np.float32)
        fields["location/center_y_frac"] = (column("particle_y") / shape[:, 0]).astype(np.float32)
        fields["location/micrograph_psize_A"] = column("pixel_size_angstrom").astype(np.float32)
        if "micrograph_uid" in columns:
            fields["location/micrograph_uid"] = column("micrograph_uid").astype(np.uint64)
    _write_group(path, fields, "particle", "particles")


def write_micrographs(path: str | Path, columns: Mapping[str, Any], micrograph_shape: Any) -> None:
    """Exposures as a ``.cs`` file and its ``.csg`` group; columns as :func:`read_micrographs` gives them.

    Parameters
    ----------
    micrograph_shape : (y, x), or array `(micrograph, 2)`
        Pixels.
    """
    count = len(np.atleast_1d(columns["micrograph_name"]))

    def column(name: str) -> np.ndarray:
        return np.broadcast_to(np.asarray(columns[name]), count)

    pixel = column("pixel_size_angstrom").astype(np.float32)
    fields: dict[str, np.ndarray] = {"uid": column("cryosparc_uid").astype(np.uint64)}
    fields["micrograph_blob/path"] = np.char.add(b">", _encoded(column("micrograph_name")))
    fields["micrograph_blob/idx"] = np.zeros(count, np.uint32)
    fields["micrograph_blob/shape"] = np.broadcast_to(np.asarray(micrograph_shape, np.uint32), (count, 2))
    fields["micrograph_blob/psize_A"] = pixel
    fields["micrograph_blob/format"] = np.full(count, b"MRC/1")
    if "movie_name" in columns:
        fields["movie_blob/path"], fields["movie_blob/psize_A"] = _encoded(column("movie_name")), pixel
    fields |= {theirs: column(ours).astype(np.float32) for ours, theirs in _MICROSCOPE.items()}
    _write_group(Path(path), fields | _ctf_fields(columns, column), "exposure", "micrographs")


def _encoded(names: np.ndarray) -> np.ndarray:
    return np.array([str(name).encode("utf-8", "surrogateescape") for name in names], dtype=bytes)


def _ctf_fields(columns: Mapping[str, Any], column: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    if "defocus_u_angstrom" not in columns:
        return {}
    groups = column("optics_group_name" if "optics_group_name" in columns else "voltage_kv")
    fields = {"ctf/type": np.full(len(groups), b"imported")}
    fields["ctf/exp_group_id"] = np.unique(groups.astype(str), return_inverse=True)[1].astype(np.uint32)
    fields |= {theirs: (column(ours) / factor).astype(np.float32) for ours, (theirs, factor) in _CTF.items() if ours in columns}
    if "relion_optics" in columns:
        fields |= {name: values.astype(np.float32) for name, values in cryosparc_optics.fields(columns, column).items()}
    return fields


def _write_group(path: Path, fields: dict[str, np.ndarray], kind: str, name: str) -> None:
    count = len(fields["uid"])
    table = np.zeros(count, [(field, values.dtype.str, values.shape[1:]) for field, values in fields.items()])
    for field, values in fields.items():
        table[field] = values
    with open(path, "wb") as file:
        np.save(file, table, allow_pickle=False)
    slots = dict.fromkeys(field.split("/")[0] for field in fields if "/" in field)
    group = {
        "created": datetime.datetime.now().isoformat(sep=" "),
        "group": {"description": f"{name.title()} of cryodask", "name": name, "title": name.title(), "type": kind},
        "results": {slot: {"metafile": f">{path.name}", "num_items": count, "type": f"{kind}.{slot}"} for slot in slots},
        "version": _CS_VERSION,
    }
    path.with_suffix(".csg").write_text(yaml.safe_dump(group, sort_keys=False), encoding="utf-8")


def _read(path: Path) -> dict[str, np.ndarray]:
    """Columns by cryoSPARC's names; several files are joined by uid, and the first that has a column counts."""
    if path.suffix.lower() != ".csg":
        return _table(path)
    try:
        results = read_yaml(path, "group of cryoSPARC")["results"].values()
        files = list(dict.fromkeys(str(result["metafile"]) for result in results))
        rows = {str(result["metafile"]): int(result.get("num_items", 0)) for result in results}
    except ProjectFileError as error:
        raise InputError(error.what, "it was edited, or is damaged", "export the group again") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{path} is not a group of cryoSPARC: it has no results with a metafile.", "it is truncated", "export the group again"
        ) from error
    tables = [_table(path.parent / name.removeprefix(">")) for name in files]
    if not tables:
        raise InputError(f"{path} names no files.", "", "export the group again")
    if short := next((name for name, table in zip(files, tables) if len(table["uid"]) < rows[name]), None):
        raise InputError(
            f"{path} has {rows[short]} particles or exposures, but {short.removeprefix('>')} has fewer.",
            "the file was replaced by that of another job",
            "export the group again",
        )
    first = tables[0]
    out = _Table(path, first)
    for name, table in zip(files[1:], tables[1:]):
        order = np.argsort(table["uid"])
        at = np.searchsorted(table["uid"], first["uid"], sorter=order)
        places = order[np.minimum(at, len(order) - 1)] if len(order) else order
        if len(places) != len(first["uid"]) or (table["uid"][places] != first["uid"]).any():
            raise InputError(f"{path}: {name} lacks particles of {files[0]}.", "the files are of two exports", "export the group again")
        out |= {key: values[places] for key, values in table.items() if key not in out}
    return out


def _table(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            table = np.load(file, allow_pickle=False)
            surplus = isinstance(table, np.ndarray) and bool(file.read(1))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} does not exist.", "the path is wrong, or a group was copied without its files", "check the path"
        ) from error
    except _DAMAGED as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is not a NumPy table of plain values"
        raise InputError(f"{path} cannot be read: {why}.", "it is truncated, or not a .cs file", "export it again") from error
    names = getattr(table, "dtype", np.dtype("f4")).names
    if not names or "uid" not in names or table.ndim != 1:
        raise InputError(f"{path} is not a table of cryoSPARC: it has no column uid.", "", "give a .cs file of particles or exposures")
    if surplus:
        raise InputError(f"{path} goes on after its {len(table)} rows.", "files were joined", "export it again from cryoSPARC")
    if len(np.unique(table["uid"])) < len(table):
        raise InputError(f"{path} has a uid twice.", "two sets were combined", "remove duplicates in cryoSPARC and export again")
    if table["uid"].dtype.kind not in "ui" or table["uid"].ndim != 1:
        raise InputError(f"{path}: uid is not a column of whole numbers.", "another program wrote it", "export it again from cryoSPARC")
    for name in (n for n in names if n in _NUMBERS):
        if table[name].dtype.kind not in ("iufb" if name in _FLAGS + _TURNS else "iuf") or (name not in _WIDTHS and table[name].ndim != 1):
            raise InputError(f"{path}: {name} is not a column of numbers.", "another program wrote it", "export it again from cryoSPARC")
        if name in _WHOLE and table[name].dtype.kind == "f" and (table[name] != np.round(table[name])).any():
            raise InputError(f"{path}: {name} is not a whole number in some rows.", "another program wrote it", "correct it there")
    for name in (n for n in names if n in _PATHS):
        if table[name].dtype.kind not in "SU" or table[name].ndim != 1:
            raise InputError(f"{path}: {name} is not a column of text.", "another program wrote it", "export it again from cryoSPARC")
    for name, width in _WIDTHS.items():
        if name in names and table[name].shape != (len(table), width):
            raise InputError(f"{path}: {name} has the shape {table[name].shape[1:]}, not ({width},).", "another program wrote it", "fix it")
    for name in ("ctf/df_angle_rad", "ctf/phase_shift_rad"):
        if name in names and (np.abs(table[name]) > 2.001 * np.pi).any():
            raise InputError(f"{path}: {name} is beyond 2 pi.", "it is in degrees", "convert it to radians")
    return _Table(path, {name: table[name] for name in names})


class _Table(dict[str, np.ndarray]):
    """Columns of a table; one that is missing beside those that need it is an error of the file."""

    def __init__(self, path: Path, columns: Mapping[str, np.ndarray]) -> None:
        super().__init__(columns)
        self.path = path

    def __missing__(self, name: str) -> np.ndarray:
        raise InputError(f"{self.path} has no column {name}.", "the group lacks one of its files", "export the whole group again")


def _texts(path: Path, values: np.ndarray) -> np.ndarray:
    """Paths as text, without the mark of paths that are relative to the file."""
    try:
        texts = [v.decode("utf-8") if isinstance(v, bytes) else str(v) for v in values.tolist()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} names {error.object!r}, which is not UTF-8.", "it comes from another computer", "rename it") from None
    return np.array([text.removeprefix(">") for text in texts], dtype=object)


def _doubles(values: np.ndarray) -> np.ndarray:
    """Single precision as the decimal number that it stands for: 2.7, not 2.70000005."""
    known, place = np.unique(values, return_inverse=True)
    return np.array([float(str(v)) for v in known], np.float64)[place]


def _ctf(table: dict[str, np.ndarray]) -> Columns:
    if "ctf/df1_A" in table or "ctf/df2_A" in table:  # a defocus that depends on the direction needs all three
        _ = table["ctf/df1_A"], table["ctf/df2_A"], table["ctf/df_angle_rad"]
    out = {ours: _doubles(table[theirs]) * factor for ours, (theirs, factor) in _CTF.items() if theirs in table}
    out = {name: values for name, values in out.items() if name not in _NEUTRAL or (values != _NEUTRAL[name]).any()}
    if "ctf/exp_group_id" in table:
        out["optics_group_name"] = np.array([f"exposure_group_{int(i)}" for i in table["ctf/exp_group_id"]], dtype=object)
    return out


def _angles(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    import torch
    from scipy.spatial.transform import Rotation

    from cryodask.kernels.orientations import matrix_to_euler

    # older versions of scipy refuse no rotations
    matrices = Rotation.from_rotvec(vectors.reshape(-1, 3)).inv().as_matrix() if vectors.size else np.zeros((0, 3, 3))
    rot, tilt, psi = (np.degrees(angle.numpy()) for angle in matrix_to_euler(torch.from_numpy(matrices)))
    return rot, tilt, psi


def _alignments(rot_deg: np.ndarray, tilt_deg: np.ndarray, psi_deg: np.ndarray) -> dict[str, np.ndarray]:
    import torch
    from scipy.spatial.transform import Rotation

    from cryodask.kernels.orientations import euler_to_matrix

    matrices = euler_to_matrix(*(torch.from_numpy(np.radians(a)) for a in (rot_deg, tilt_deg, psi_deg))).numpy()
    return {"alignments3D/pose": Rotation.from_matrix(matrices).inv().as_rotvec().astype(np.float32)}


def _possible(path: Path, table: Mapping[str, np.ndarray]) -> None:
    """Refuse values that no microscope, image or pose has, by the name of their column."""
    for name, (least, most, unit) in _POSSIBLE.items():
        values = table.get(name)
        if values is None:
            continue
        # NaN is reported as such
        outside = (values < least) | (values > most)
        if outside.any():
            row = int(np.flatnonzero(outside.reshape(len(values), -1).any(1))[0])
            value = float(values.reshape(len(values), -1)[row][outside.reshape(len(values), -1)[row]][0])
            raise InputError(
                f"{path}: {name} of row {row + 1} is {value:g}, which is not {Limits(least, most, unit)}.",
                "it is in another unit, or the job that wrote it has failed",
                "correct it there, or remove the row",
            )
    for name, reason in _NEEDED_PATHS.items():
        empty = np.flatnonzero(_texts(path, table[name]) == "") if name in table else np.zeros(0, int)
        if len(empty):
            raise InputError(f"{path}: {name} of row {int(empty[0]) + 1} is empty.", reason, "remove the row")
    for name in ("ctf/df1_A", "ctf/df2_A"):
        known = table[name][table[name] != 0] if name in table else np.zeros(0)
        if len(known) and in_micrometres(known).all():
            raise InputError(
                f"{path}: {name} is at most {np.abs(known).max():g} A in all rows.", "it is in micrometres", "write it in Angstrom"
            )


def _checked(path: Path, columns: Columns) -> Columns:
    bad = [name for name, values in columns.items() if values.dtype.kind == "f" and not np.isfinite(values).all()]
    if bad:
        raise InputError(
            f"{path}: {bad[0]} has NaN or infinite values.", "the job that wrote it has failed for some rows", "remove these rows"
        )
    return columns
