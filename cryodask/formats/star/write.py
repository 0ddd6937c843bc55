"""Writing STAR files for RELION from columns in the vocabulary's names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.errors import StarError
from cryodask.formats.star.names import ALIASES, COLUMNS, CRYOSPARC, KEPT, OPTICS, Column
from cryodask.formats.star.tables import write_tables
from cryodask.vocabulary import CTF_COLUMNS
from cryodask.vocabulary import OPTICS as GROUP_OPTICS

if TYPE_CHECKING:
    import pandas as pd

_NO_FACTOR = {"ctf_b_factor_angstrom2": 0.0, "ctf_scale_factor": 1.0}
"""What RELION writes where a particle has no such factor."""
_NEUTRAL = {"rlnMagMat00": "1", "rlnMagMat11": "1", "rlnOddZernike": "[0,0,0,0,0,0]", "rlnEvenZernike": "[0,0,0,0,0,0,0,0,0]"}
_NEUTRAL |= {label: "[0,0,0,0]" if label in ("cryosparcTetrafoil", "cryosparcAnisomag") else "[0,0]" for label in CRYOSPARC}
"""Texts of an optics group without aberrations; all others are 0."""


def write_micrographs_ctf(path: str | Path, columns: Mapping[str, Any]) -> None:
    """Micrographs with their CTF, as RELION's ``micrographs_ctf.star``; columns as from :func:`read_micrographs`."""
    _need(path, columns, ("micrograph_name", "pixel_size_angstrom", *CTF_COLUMNS[:3], *GROUP_OPTICS))
    optics, table = _relion_tables(path, columns, len(np.atleast_1d(columns["micrograph_name"])))
    table["rlnCtfAstigmatism"] = table["rlnDefocusU"] - table["rlnDefocusV"]
    optics["rlnMicrographOriginalPixelSize"] = optics["rlnMicrographPixelSize"]
    write_tables(path, {"optics": optics, "micrographs": table})


def write_corrected_micrographs(path: str | Path, columns: Mapping[str, Any], binning: int = 1) -> None:
    """Micrographs with the names of their motion files (``metadata_name``), as RELION's ``corrected_micrographs.star``.

    ``binning``: pixels of the movies per pixel of the micrographs.
    """
    _need(path, columns, ("micrograph_name", "metadata_name", "pixel_size_angstrom", *GROUP_OPTICS))
    optics, table = _relion_tables(path, columns, len(np.atleast_1d(columns["micrograph_name"])))
    optics["rlnMicrographOriginalPixelSize"] = optics["rlnMicrographPixelSize"] / binning
    write_tables(path, {"optics": optics, "micrographs": table})


def write_particles(path: str | Path, columns: Mapping[str, Any]) -> None:
    """Particles as RELION's ``particles.star``; columns as from :func:`read_particles`; scalars apply to all rows.

    ``particle_id`` is written exactly, as ``_cryodaskParticleId``, which RELION passes on. Rows with equal optics share a group,
    numbered in the order in which they appear. ``box`` is the size of the images, pixels. ``relion_optics``: the texts of
    :func:`read_particles`, written as columns of the groups.
    """
    _need(path, columns, ("image_index", "image_stack", "particle_pixel_size_angstrom", "box", *GROUP_OPTICS))
    _check_ids(path, columns.get("particle_id"))
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
    import pandas as pd

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
    """FSC curves `(shell,)` and result of post-processing as RELION's ``postprocess.star``; shell 0 may have resolution inf.

    A resolution of NaN, that of a refinement that has not succeeded, is left out.
    """
    import pandas as pd

    angstrom = np.where(np.isfinite(shell_resolution_angstrom), shell_resolution_angstrom, 999.0)
    general: dict[str, Any] = {} if np.isnan(resolution_angstrom) else {"rlnFinalResolution": float(resolution_angstrom)}
    general |= {
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
    defect_name: str | None = None,
    motion_polynomial: np.ndarray | None = None,
    hot_pixel: np.ndarray | None = None,
    eer_grouping: int | None = None,
    eer_upsampling: int = 1,
    binning: int = 1,
) -> None:
    """Motion of one movie as RELION's per-movie STAR file, for Bayesian polishing.

    Parameters
    ----------
    width, height : int
        Of a frame, pixels.
    frame_shift : array, `(frame, 2)`, Angstrom
        (y, x) displacement of the specimen. RELION stores the correction, its negative, in pixels, with frame 1 at zero.
    gain_name : str, optional
        Gain that multiplies the counts, in the frame of MRC files.
    defect_name : str, optional
        Mask of pixels to be repaired, 1 where they are.
    motion_polynomial : array, `(36,)`, optional
        RELION's coefficients of the local motion, X first.
    hot_pixel : array, `(n, 2)`, optional
        (y, x) of repaired pixels.
    eer_grouping, eer_upsampling : int, optional
        Of an EER movie: camera frames per frame, and pixels per camera pixel.
    binning : int
        Pixels of the movie per pixel of the micrograph. All else here is in pixels of the movie, whose size is ``pixel_size_angstrom``.
    """
    import pandas as pd

    correction = -(np.asarray(frame_shift, np.float64) - frame_shift[:1]) / pixel_size_angstrom + 0.0
    general: dict[str, Any] = {
        "rlnImageSizeX": width,
        "rlnImageSizeY": height,
        "rlnImageSizeZ": len(correction),
        "rlnMicrographMovieName": movie_name,
        **({"rlnMicrographGainName": gain_name} if gain_name else {}),
        **({"rlnMicrographDefectFile": defect_name} if defect_name else {}),
        "rlnMicrographBinning": float(binning),
        "rlnMicrographOriginalPixelSize": pixel_size_angstrom,
        "rlnMicrographDoseRate": dose_per_frame,
        "rlnMicrographPreExposure": pre_exposure,
        "rlnVoltage": voltage_kv,
        "rlnMicrographStartFrame": 1,
        **({"rlnEERGrouping": eer_grouping, "rlnEERUpsampling": eer_upsampling} if eer_grouping else {}),
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


def write_particle_tracks(path: str | Path, tracks: np.ndarray) -> None:
    """Tracks `(particle, frame, 2)` (y, x) of the particles of a micrograph, Angstrom, as relion_motion_refine writes them."""
    import pandas as pd

    tables: dict[str, Any] = {"general": {"rlnParticleNumber": len(tracks)}}
    for number, track in enumerate(np.asarray(tracks, np.float64)):
        tables[str(number)] = pd.DataFrame({"rlnOriginXAngst": track[:, 1], "rlnOriginYAngst": track[:, 0]})
    write_tables(path, tables)


def _need(path: str | Path, columns: Mapping[str, Any], names: Iterable[str]) -> None:
    missing = [n for n in names if n not in columns]
    if missing:
        raise StarError(
            f"{path} cannot be written without {', '.join(missing)}",
            "an earlier stage has not run",
            "run it first",
        )


def _check_ids(path: str | Path, ids: Any) -> None:
    if ids is not None and np.asarray(ids).dtype.kind != "i":
        raise StarError(
            f"{path}: particle_id is {np.asarray(ids).dtype}, which cannot hold ids exactly.",
            "ids were converted to floating point, which is exact only below 2^53",
            "keep them as int64 throughout",
        )


def _kept(texts: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of optics groups that were only carried along (``relion_optics``), one value per row."""
    import pandas as pd

    codes, names = pd.factorize(texts)
    groups = [json.loads(name) if name else {} for name in names]
    out = {}
    for label in KEPT:
        there = sum(label in group for group in groups)
        # RELION has no word for a missing MTF
        if there and (there == len(groups) or "Mtf" not in label):
            out[label] = np.array([group.get(label, _NEUTRAL.get(label, "0")) for group in groups], dtype=object)[codes]
    return out


def _relion_tables(path: str | Path, columns: Mapping[str, Any], count: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Optics and main table under RELION's names; names that RELION lacks are refused, scalars spread over the rows."""
    import pandas as pd

    ours = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
    columns = {ours.get(name, name): values for name, values in columns.items()}
    kept = _kept(np.broadcast_to(np.asarray(columns.pop("relion_optics", ""), dtype=object), count))
    for name, none in _NO_FACTOR.items():
        if name in columns and np.isfinite(columns[name]).any():
            columns[name] = np.where(np.isfinite(columns[name]), columns[name], none)
        else:
            columns.pop(name, None)
    known = {c.name for c in (*COLUMNS, *OPTICS)}
    foreign = sorted(set(columns) - known)
    if foreign:
        raise StarError(f"{path}: RELION has no column for {', '.join(foreign)}", "they are specific to cryodask", "leave them out")

    def spread(column: Column) -> np.ndarray:
        values = np.broadcast_to(np.asarray(columns[column.name], dtype=object if column.dtype == "str" else column.dtype), count)
        return values if column.dtype == "str" else values + column.base

    optics = pd.DataFrame({c.relion: spread(c) for c in OPTICS if c.name in columns} | kept)
    group = optics.groupby(list(optics.columns), sort=False).ngroup().to_numpy() + 1
    first = np.unique(group, return_index=True)[1]
    optics = optics.iloc[first].reset_index(drop=True)
    if "rlnOpticsGroupName" not in optics:
        optics.insert(0, "rlnOpticsGroupName", [f"opticsGroup{g + 1}" for g in range(len(optics))])
    optics.insert(1, "rlnOpticsGroup", np.arange(1, len(optics) + 1))
    table = pd.DataFrame({c.relion: spread(c) for c in COLUMNS if c.name in columns and c.name != "optics_group"})
    table["rlnOpticsGroup"] = group
    return optics, table
