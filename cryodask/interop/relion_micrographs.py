"""Micrographs, their motion and their picks for RELION."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.formats import star
from cryodask.formats.fractions import is_eer
from cryodask.formats.gain import on_frames, reciprocal_gain
from cryodask.formats.mrc import write_mrc
from cryodask.interop.exposures import Exposures
from cryodask.store.identity import row_of
from cryodask.store.project import Item, Project
from cryodask.vocabulary import CTF_COLUMNS

_OF_MICROGRAPHS = {
    "ctf": CTF_COLUMNS,
    "ctf_quality": ("ctf_resolution_angstrom", "ctf_figure_of_merit"),
    "field": ("total_motion", "early_motion"),
}
"""Part -> its numbers that are written per micrograph."""
_OF_OPTICS = ("voltage_kv", "spherical_aberration_mm", "amplitude_contrast", "pixel_size_angstrom")


def micrograph_file(name: str) -> str:
    """Name of a micrograph in every STAR file of an export."""
    return f"micrographs/{name}.mrc"


def _optics_columns(exposures: Exposures, names: list[str]) -> dict[str, Any]:
    values = exposures.optics
    columns: dict[str, Any] = {name: np.array([float(values[name][n]) for n in names]) for name in _OF_OPTICS}
    columns["optics_group_name"] = np.array([exposures.groups[n] for n in names], dtype=object)
    columns["relion_optics"] = np.array([exposures.kept_optics[n] for n in names], dtype=object)
    columns["micrograph_name"] = np.array([micrograph_file(n) for n in names], dtype=object)
    return columns


def exported_micrographs(exposures: Exposures, out: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Write the micrographs that have a CTF; their columns, and their sizes `(micrograph, 2)` in pixels (y, x). Empty if there are none."""
    every = [d for label in exposures.givers("micrograph") for d in exposures.project.by_image_size(label)]
    pictures = {str(n): d["micrograph_dw"].sel(micrograph=n) for d in every for n in d["micrograph"].values}
    if not pictures:
        return {}, np.zeros((0, 2), int)
    values, fits = exposures.optics, exposures.figures("ctf", "defocus_u_angstrom")
    names = [n for n in exposures.items if n in pictures and (not fits or n in fits)]
    (out / "micrographs").mkdir(exist_ok=True)
    for name in names:
        write_mrc(out / micrograph_file(name), pictures[name].values, float(values["pixel_size_angstrom"][name]))
    columns = _optics_columns(exposures, names)
    for part, some in _OF_MICROGRAPHS.items():
        for name in some:
            found = {**values.get(name, {}), **exposures.figures(part, name)}
            if names and all(n in found for n in names):
                columns[name] = np.array([found[n] for n in names])
    shapes = np.array([pictures[name].shape for name in names]).reshape(-1, 2)
    return (columns, shapes) if "defocus_u_angstrom" in columns else ({}, shapes[:0])


def write_micrographs(exposures: Exposures, out: Path) -> list[Path]:
    """``micrographs_ctf.star``, and the micrographs that it lists; nothing if there are none with a CTF."""
    columns, _ = exported_micrographs(exposures, out)
    if not columns:
        return []
    path = out / "micrographs_ctf.star"
    star.write_micrographs_ctf(path, columns)
    return [path]


def write_motion(exposures: Exposures, out: Path) -> list[Path]:
    """``corrected_micrographs.star`` and one file of motion per movie, for Bayesian polishing."""
    project = exposures.project
    label = project.latest("exposures", "field")
    if label is None:
        return []
    for folder in ("motion", "movies"):
        (out / folder).mkdir(exist_ok=True)
    found = {str(n): d.sel(micrograph=n) for d in project.by_image_size(label) for n in d["micrograph"].values}
    names, written = [n for n in exposures.items if n in found], []
    binning = int(project.generation(label).meta["params"].get("binning", 1))
    shapes = {exposures.items[n].data_set: (binning * int(found[n].sizes["y"]), binning * int(found[n].sizes["x"])) for n in names}
    gains = _gains(project, out, shapes)
    fractions, upsampling = _fractions(project)
    for name in names:
        one, item = found[name], exposures.items[name]
        path = out / "motion" / f"{name}.star"
        hot = one["hot_pixel"].values if "hot_pixel" in one else np.zeros((0, 2))
        star.write_motion(
            path,
            movie_name=_linked_movie(project, item, out),
            width=binning * int(one.sizes["x"]),
            height=binning * int(one.sizes["y"]),
            frame_shift=one["frame_shift"].values,
            pixel_size_angstrom=project.value_of(item, "pixel_size_angstrom") / binning,
            voltage_kv=project.value_of(item, "voltage_kv"),
            dose_per_frame=fractions.get(name, (0, project.value_of(item, "dose_per_frame")))[1],
            pre_exposure=project.value_of(item, "pre_exposure"),
            motion_polynomial=one["motion_polynomial"].values,
            hot_pixel=hot[hot[:, 0] >= 0],
            gain_name=gains.get(item.data_set, {}).get("gain_name"),
            defect_name=gains.get(item.data_set, {}).get("defect_name"),
            eer_grouping=fractions[name][0] if name in fractions else None,
            eer_upsampling=upsampling,
            binning=binning,
        )
        written.append(path)
    if names:
        columns = _optics_columns(exposures, names)
        columns["metadata_name"] = np.array([f"motion/{n}.star" for n in names], dtype=object)
        columns["total_motion"], columns["early_motion"] = (found_column(found, names, n) for n in ("total_motion", "early_motion"))
        star.write_corrected_micrographs(out / "corrected_micrographs.star", columns, binning)
        written.append(out / "corrected_micrographs.star")
    return written


def _fractions(project: Project) -> tuple[dict[str, tuple[int, float]], int]:
    """Camera frames and exposure of the fractions of EER movies by name, and their upsampling."""
    label = project.latest("exposures", "frames")
    if label is None:
        return {}, 1
    generation = project.generation(label)
    names = {item.row: item.name for item in project.items() if is_eer(str(item.inputs.get("movie_path", "")))}
    named = {}
    for row, record in generation.committed().items():
        if row in names and "dose_per_fraction" in record["columns"]:
            frames, dose = (generation.read(record, name) for name in ("frames_per_fraction", "dose_per_fraction"))
            named[names[row]] = int(frames), float(dose)
    return named, int(generation.meta["params"].get("eer_upsampling", 1))


def found_column(found: dict[str, Any], names: list[str], variable: str) -> np.ndarray:
    """A number of each exposure, `(exposure,)`."""
    return np.array([float(found[n][variable]) for n in names])


def _linked_movie(project: Project, item: Item, out: Path) -> str:
    """A link to the movie within the export: RELION tells stacks from single images by their ending."""
    path = project.value_of(item, "movie_path")
    if path is None:
        return item.name
    ending = Path(path).suffix.lower()
    link = out / "movies" / f"{item.name}{'.mrcs' if ending in ('.mrc', '.st') else ending}"
    link.unlink(missing_ok=True)
    os.symlink(Path(path).absolute(), link)
    return f"movies/{link.name}"


def _gains(project: Project, out: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, dict[str, str]]:
    """Write the gain of each data set as it was applied, and the mask of its dead pixels; names of the files by data set."""
    written: dict[str, dict[str, str]] = {}
    for data_set, stored in project.state.gain.items():
        gain, stem = np.load(project.path / stored), Path(stored).stem
        gain = on_frames(gain, shapes.get(data_set, gain.shape))
        if any(is_eer(str(i.inputs.get("movie_path", ""))) for i in project.items() if i.data_set == data_set):
            gain, stem = reciprocal_gain(gain), f"{stem}_divides"  # RELION divides EER movies by MRC gains
        (out / "gains").mkdir(exist_ok=True)
        write_mrc(out / "gains" / f"{stem}.mrc", gain, 1.0)
        written[data_set] = {"gain_name": f"gains/{stem}.mrc"}
        if (gain <= 0).any():
            write_mrc(out / "gains" / f"{stem}_defects.mrc", (gain <= 0).astype(np.float32), 1.0)
            written[data_set]["defect_name"] = f"gains/{stem}_defects.mrc"
    return written


def write_coordinates(exposures: Exposures, out: Path) -> list[Path]:
    """Picks of each micrograph, where ``relion_preprocess --coord_dir coordinates/ --coord_suffix .star`` looks for them."""
    project = exposures.project
    label = project.latest("particles", "position")
    if label is None or "pick_y" not in project.generation(label).meta["gives"]:
        return []
    folder = out / "coordinates" / Path(micrograph_file("")).parent
    folder.mkdir(parents=True, exist_ok=True)
    picks, written = _picks(project, label), []
    for name, item in exposures.items.items():
        if item.row in picks:
            written.append(folder / f"{name}.star")
            star.write_coordinates(written[-1], *picks[item.row])
    # RELION's window asks for this file, and takes the suffix from its name
    (out / "coordinates" / "coords_suffix.star").write_text("micrographs_ctf.star\n")
    return [*written, out / "coordinates" / "coords_suffix.star"]


def _picks(project: Project, label: str) -> dict[int, tuple[np.ndarray, ...]]:
    """Accepted positions (y, x, pixels) and scores by row: for every exposure of a picker, or for those with particles of a union."""
    if project.generation(label).meta["per_item"]:
        picks, rows = project[label], {item.name: item.row for item in project.items()}
        out = {}
        for name in picks["micrograph"].values:
            one = picks.sel(micrograph=name)
            out[rows[name]] = tuple(one[n].values[one["pick_accepted"].values > 0] for n in ("pick_y", "pick_x", "pick_score"))
        return out
    ref = project.product(label, "particles")
    ids = project.sets.ids(ref)
    known = project.sets.columns(ref, ids, ("position", "score"))
    pixel = project.sets.of_exposures(ref, row_of(ids), ["pixel_size_angstrom"]).get("pixel_size_angstrom", np.ones(len(ids)))
    score = known.get("pick_score", np.zeros(len(ids)))
    values = (known["position_y_angstrom"] / pixel, known["position_x_angstrom"] / pixel, score)
    return {row: tuple(v[row_of(ids) == row] for v in values) for row in np.unique(row_of(ids)).tolist()}
