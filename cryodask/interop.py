"""Exchange with other programs: export to RELION 3.1, and project files from STAR files."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cryodask.errors import ProjectFileError, StarError
from cryodask.formats import star
from cryodask.formats.mrc import write_mrc
from cryodask.plugins import Plugins
from cryodask.products import columns_of
from cryodask.store.birthbook import BirthBook
from cryodask.store.claims import birth_marks
from cryodask.store.files import disk_errors
from cryodask.store.identity import birth_of, parent_of, row_of
from cryodask.store.project import Project
from cryodask.store.sets import kept_rows
from cryodask.store.state import ProductRef
from cryodask.vocabulary import CTF_COLUMNS, OPTICS

_PARTICLE_COLUMNS = (
    *CTF_COLUMNS,
    *OPTICS,
    "particle_y",
    "particle_x",
    "rot_deg",
    "tilt_deg",
    "psi_deg",
    "origin_y_angstrom",
    "origin_x_angstrom",
    "class_number",
    "class_probability",
    "half_set",
    "log_likelihood",
    "ctf_b_factor_angstrom2",
    "ctf_scale_factor",
    "particle_id",
)

_OF_MICROGRAPHS = {
    "ctf": CTF_COLUMNS,
    "ctf_quality": ("ctf_resolution_angstrom", "ctf_figure_of_merit"),
    "field": ("total_motion", "early_motion"),
}
"""Part -> its numbers that are written per micrograph."""


def _refused(name: str, exporter: object) -> str:
    """Why an exporter of another package cannot be used; empty if it can."""
    if name == "relion" or not callable(exporter):
        return (
            "the name relion is taken by cryodask"
            if name == "relion"
            else f"it is a {type(exporter).__name__}, not a function (project, folder)"
        )
    try:
        inspect.signature(exporter).bind("project", "folder")
    except TypeError as error:
        return f"it is called as {name}(project, folder): {error}"
    return ""


OTHERS = Plugins("cryodask.exporters", _refused)
"""Exporters of other packages, by program."""


def export(project: Project, name: str, folder: str | Path) -> list[Path]:
    """Export a project to another program; return the paths written.

    Parameters
    ----------
    name : str
        ``relion``, or the name of an exporter of another package (entry points of the group ``cryodask.exporters``).

    Raises
    ------
    ProjectFileError
        There is no such exporter.
    """
    if name == "relion":
        return export_relion(project, folder)
    known = OTHERS.load()
    if name not in known:
        raise ProjectFileError(
            f"There is no exporter {name!r}.{OTHERS.hint(name)}", "", f"use one of these: {', '.join(['relion', *sorted(known)])}"
        )
    return [Path(path) for path in known[name](project, Path(folder))]


def export_relion(project: Project, folder: str | Path) -> list[Path]:
    """Export a project as RELION 3.1 files; return the paths written.

    ``micrographs_ctf.star`` with ``micrographs/*.mrc``, ``motion/*.star``, ``coordinates/*.star``, ``particles.star`` + ``.mrcs`` (the
    particles of the last refinement with their poses, else those of the last curation, else all), ``class_averages.mrcs`` + ``.star``,
    ``half1.mrc, half2.mrc`` (unmasked, unsharpened), ``map.mrc`` (sharpened where post-processing ran), ``mask.mrc``,
    ``postprocess.star``. Everything is in the row order of MRC files. The exposures are those that the particles come from, without those
    that a selection excludes.
    """
    out = Path(folder)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        written = [*_micrographs(project, out), *_motion(project, out), *_coordinates(project, out)]
        return [*written, *_particles(project, out), *_classes(project, out), *_maps(project, out)]


def _optics(project: Project) -> dict[str, dict[str, float]]:
    """Optics of the exposures by name: from the registry, and from steps such as imports."""
    items, out = project.items(), dict[str, dict[str, float]]()
    for variable in (str(n) for n, v in project.micrographs().data_vars.items() if v.dims == ("micrograph",) and v.dtype.kind == "f"):
        out[variable] = {item.name: float(v) for item in items if (v := project.value_of(item, variable)) is not None}
    givers = (project.step(label).product("exposures") for label in project.stages)
    places = list(dict.fromkeys(ref.parts["optics"] for ref in givers if ref is not None and "optics" in ref.parts))
    names = {item.row: item.name for item in items}
    for variable in columns_of("exposures", "optics"):
        found = [known for place in places if (known := project.sets.exposure_values(place, variable)) is not None]
        values = {names[row]: float(v) for rows, vs in found for row, v in zip(rows.tolist(), vs) if row in names and np.isfinite(v)}
        if values:
            out[variable] = {**out.get(variable, {}), **values}
    return out


def _kept_optics(project: Project, rows: Iterable[int]) -> dict[str, np.ndarray]:
    """What imports keep of RELION's optics groups for exposures of some rows; the last import that knows an exposure counts."""
    known = {item.row: item.inputs.get("relion_optics", "") for item in project.items()}
    for label in project.stages:
        if "relion_optics" in project.generation(label).meta["gives"]:
            table = project.table_at(project.step(label).place, ["relion_optics"])
            known.update((row, text) for row, text in zip(table.row.tolist(), table.texts["relion_optics"].tolist()) if text)
    return {"relion_optics": np.array([known.get(row, "") for row in rows], dtype=object)}


def _exposures(project: Project) -> ProductRef | None:
    """The exposures to write: those that the exported particles come from, else those of the last step that gives any."""
    label = _label_of_particles(project)
    behind = project.product(label, "particles") if label is not None else None
    if behind is not None and "micrograph" in behind.exposures:
        return behind.model_copy(update={"parts": behind.exposures, "ids": behind.exposure_ids})
    given = (project.step(label).product("exposures") for label in reversed(project.stages))
    return next((ref for ref in given if ref is not None and "micrograph" in ref.parts), None)


def _rows(project: Project, exposures: ProductRef | None) -> dict[int, str]:
    """Names of the exposures that the last selection keeps, by row."""
    kept = kept_rows(project, exposures.ids) if exposures is not None else None
    return {i.row: i.name for i in project.items() if kept is None or i.row in kept}


def _givers(project: Project, exposures: ProductRef, part: str) -> list[str]:
    """Steps that gave a part: one, or for a union those of all its sources."""
    labels = {project.step(label).place: label for label in project.stages}
    given = [labels[place] for place in exposures.parts.get(part, "").split("|") if place in labels]
    return given or [label for label in (project.latest("exposures", part),) if label is not None]


def _figures(project: Project, exposures: ProductRef, part: str, name: str) -> dict[str, float]:
    """Values of a variable by the names of the exposures that have one."""
    known = project.sets.exposure_values(exposures.parts[part], name, exposures.optics) if part in exposures.parts else None
    names = {item.row: item.name for item in project.items()}
    return (
        {names[r]: float(v) for r, v in zip(*(one.tolist() for one in known)) if r in names and np.isfinite(v)} if known is not None else {}
    )


def _micrographs(project: Project, out: Path) -> list[Path]:
    exposures = _exposures(project)
    if exposures is None:
        return []
    every = [d for label in _givers(project, exposures, "micrograph") for d in project.by_image_size(label)]
    pictures = {str(n): d["micrograph_dw"].sel(micrograph=n) for d in every for n in d["micrograph"].values}
    values, fits = _optics(project), _figures(project, exposures, "ctf", "defocus_u_angstrom")
    names = [n for n in _rows(project, exposures).values() if n in pictures and (not fits or n in fits)]
    (out / "micrographs").mkdir(exist_ok=True)
    for name in names:
        pixel = float(values["pixel_size_angstrom"][name])
        write_mrc(out / "micrographs" / f"{name}.mrc", pictures[name].values, pixel)
    columns: dict[str, Any] = {"micrograph_name": np.array([f"micrographs/{n}.mrc" for n in names], dtype=object)}
    row_of_name = {item.name: item.row for item in project.items()}
    columns |= _kept_optics(project, (row_of_name[n] for n in names))
    for name in ("voltage_kv", "spherical_aberration_mm", "amplitude_contrast", "pixel_size_angstrom"):
        columns[name] = np.array([float(values[name][n]) for n in names])
    for part, some in _OF_MICROGRAPHS.items():
        for name in some:
            found = {**values.get(name, {}), **_figures(project, exposures, part, name)}
            if names and all(n in found for n in names):
                columns[name] = np.array([found[n] for n in names])
    if "defocus_u_angstrom" not in columns:
        return []
    path = out / "micrographs_ctf.star"
    star.write_micrographs_ctf(path, columns)
    return [path]


def _motion(project: Project, out: Path) -> list[Path]:
    exposures, label = _exposures(project), project.latest("exposures", "field")
    if label is None:
        return []
    (out / "motion").mkdir(exist_ok=True)
    items = {item.name: item for item in project.items()}
    written, kept = [], set(_rows(project, exposures).values())
    motion = project.by_image_size(label)
    for name, one in ((n, part.sel(micrograph=n)) for part in motion for n in part["micrograph"].values if n in kept):
        path = out / "motion" / f"{name}.star"
        star.write_motion(
            path,
            movie_name=str(project.value_of(items[name], "movie_path") or name),
            width=int(one.sizes["x"]),
            height=int(one.sizes["y"]),
            frame_shift=one["frame_shift"].values,
            pixel_size_angstrom=project.value_of(items[name], "pixel_size_angstrom"),
            voltage_kv=project.value_of(items[name], "voltage_kv"),
            dose_per_frame=project.value_of(items[name], "dose_per_frame"),
            pre_exposure=project.value_of(items[name], "pre_exposure"),
            motion_polynomial=one["motion_polynomial"].values,
        )
        written.append(path)
    return written


def _coordinates(project: Project, out: Path) -> list[Path]:
    label = project.latest("particles", "position")
    if label is None or "pick_y" not in project.generation(label).meta["gives"]:
        return []
    (out / "coordinates").mkdir(exist_ok=True)
    names = _rows(project, _exposures(project))
    picks = _picks(project, label)
    written = []
    for row, name in names.items():
        if row in picks:
            written.append(out / "coordinates" / f"{name}.star")
            star.write_coordinates(written[-1], *picks[row])
    return written


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


def _label_of_particles(project: Project) -> str | None:
    return project.latest("particles", "pose") or project.latest("particles")


def _particles(project: Project, out: Path) -> list[Path]:
    label = _label_of_particles(project)
    if label is None or "image" not in project.product(label, "particles").parts:
        return []
    particles = project.particles(label)
    count = int(particles.sizes["particle"])
    if not count:
        return []
    columns: dict[str, Any] = {n: particles[n].values for n in _PARTICLE_COLUMNS if n in particles.variables}
    if "half_set" in columns and (columns["half_set"] < 0).any():
        del columns["half_set"]
    if "class_number" in columns:
        columns["class_number"] = np.maximum(columns["class_number"], 0)
    if "pose" not in project.product(label, "particles").parts and "class_psi_deg" in particles:
        renamed = {"psi_deg": "class_psi_deg", "log_likelihood": "class_log_likelihood"}
        renamed |= {f"origin_{axis}_angstrom": f"class_origin_{axis}_angstrom" for axis in "yx"}
        columns |= {name: particles[old].values for name, old in renamed.items()}
    pixel, box = float(particles.attrs["particle_pixel_size_angstrom"]), int(particles.sizes["x"])
    by_name = _optics(project).get("pixel_size_angstrom", {})
    if by_name:
        columns["pixel_size_angstrom"] = np.array([by_name[n] for n in particles["micrograph"].values])
    columns |= _births(project, particles, columns.get("pixel_size_angstrom")) | _kept_optics(project, particles["row"].values.tolist())
    columns |= {
        "micrograph_name": np.array([f"micrographs/{n}.mrc" for n in particles["micrograph"].values], dtype=object),
        "image_index": np.arange(count),
        "image_stack": "particles.mrcs",
        "particle_pixel_size_angstrom": pixel,
        "box": box,
    }
    write_mrc(out / "particles.mrcs", particles["particle_image"].values, pixel, stack=True)
    star.write_particles(out / "particles.star", columns)
    return [out / "particles.star", out / "particles.mrcs"]


def _births(project: Project, particles: Any, pixel: np.ndarray | None) -> dict[str, np.ndarray]:
    """Positions at birth, pixels. They prove that an id in a reimported STAR file belongs to this project."""
    if "position_y_angstrom" in particles and pixel is not None:
        return {f"birth_{axis}": particles[f"position_{axis}_angstrom"].values / pixel for axis in "yx"}
    ids, book = parent_of(particles["particle_id"].values), BirthBook(project)
    marks: dict[int, tuple[float, float]] = {}
    for birth, row in sorted(set(zip(birth_of(ids).tolist(), row_of(ids).tolist()))):
        known = book.at(row, birth)
        marks.update(zip(known["particle_id"].tolist(), zip(*birth_marks(known["pick_y"], known["pick_x"], known["natural_key"]))))
    found = np.array([marks.get(one, (np.nan, np.nan)) for one in ids.tolist()], np.float64).reshape(-1, 2)
    return {"birth_y": found[:, 0], "birth_x": found[:, 1]} if np.isfinite(found).all() else {}


def _classes(project: Project, out: Path) -> list[Path]:
    label = project.latest("classes", "averages")
    if label is None:
        return []
    classes = project[label].load()
    pixel = float(project.particles(label).attrs["particle_pixel_size_angstrom"])
    write_mrc(out / "class_averages.mrcs", classes["class_average"].values, pixel, stack=True)
    count = classes.sizes["class"]
    table: dict[str, Any] = {"rlnReferenceImage": [f"{i + 1:06d}@class_averages.mrcs" for i in range(count)]}
    table["rlnClassDistribution"] = classes["class_share"].values
    if "class_resolution_angstrom" in classes:
        table["rlnEstimatedResolution"] = classes["class_resolution_angstrom"].values
    if "class_score" in classes:
        table["rlnClassScore"] = classes["class_score"].values
    import pandas as pd

    star.write_tables(out / "class_averages.star", {"model_classes": pd.DataFrame(table)})
    return [out / "class_averages.mrcs", out / "class_averages.star"]


def _maps(project: Project, out: Path) -> list[Path]:
    written = []
    halves, mask, post = (project.latest(*p) for p in (("map", "half_maps"), ("mask", "mask"), ("map", "view")))
    pixel = 0.0
    if halves is not None:
        maps = project[halves].load()
        pixel = float(maps["map_pixel_size_angstrom"])
        for i in (0, 1):
            write_mrc(out / f"half{i + 1}.mrc", maps["half_map"].values[i], pixel)
            written.append(out / f"half{i + 1}.mrc")
        whole = maps["half_map"].values.mean(0)
        name = "map.mrc" if post is None else "map_unsharpened.mrc"
        write_mrc(out / name, whole, pixel)
        written.append(out / name)
    if mask is not None:
        write_mrc(out / "mask.mrc", project[mask]["solvent_mask"].values, pixel)
        written.append(out / "mask.mrc")
    if post is not None:
        curves = project[post].load()
        write_mrc(out / "map.mrc", curves["sharpened_map"].values, pixel)
        star.write_postprocess(
            out / "postprocess.star",
            shell_resolution_angstrom=curves["shell_resolution_angstrom"].values,
            fsc_unmasked=curves["fsc_unmasked"].values,
            fsc_masked=curves["fsc_masked"].values,
            fsc_randomised=curves["fsc_randomised"].values,
            fsc_corrected=curves["fsc_corrected"].values,
            resolution_angstrom=float(curves["resolution_angstrom"]),
            b_factor_angstrom2=float(curves["b_factor_angstrom2"]),
        )
        written += [out / "map.mrc", out / "postprocess.star"]
    return written


def project_from_star(path: str | Path, output: str | Path) -> Path:
    """Write a short project file that starts from a RELION STAR file of micrographs or of particles."""
    path, output = Path(path), Path(output)
    if output.exists():
        raise ProjectFileError(
            f"{output} exists and is not overwritten.",
            "an earlier import wrote it",
            "choose another name with --output, or remove it",
        )
    tables = star.read_tables(path)
    content: dict[str, Any] = {"name": path.stem, "inputs": {}}
    relative = os.path.relpath(path.resolve(), output.resolve().parent)
    if "particles" in tables:
        columns = star.read_particles(path)
        content["inputs"]["particles"] = relative
        content["pipeline"] = [{"classify2d": {"classes": 20}}, {"curate": {"keep": "auto"}}, {"ab_initio": {"symmetry": "C1"}}]
        content["pipeline"] += [{"refine3d": {"symmetry": "C1"}}, {"mask": {}}, {"postprocess": {}}]
        count = f"{len(columns['image_index'])} particles"
    elif "micrographs" in tables:
        columns = star.read_micrographs(path)
        content["inputs"]["micrographs"] = relative
        first: list[dict[str, Any]] = [] if "defocus_u_angstrom" in columns else [{"ctf": {}}]
        content["pipeline"] = [*first, {"pick": {"diameter_angstrom": 150}}, {"extract": {"box": 256, "scale_to": 64}}]
        content["pipeline"] += [{"classify2d": {"classes": 20}}, {"curate": {"keep": "auto"}}]
        count = f"{len(columns['micrograph_name'])} micrographs"
    else:
        raise StarError(
            f"{path} lists neither micrographs nor particles.",
            "it is another kind of STAR file",
            "give one that lists micrographs or particles",
        )
    content["cluster"] = "local"
    with disk_errors(output.parent):
        output.write_text(f"# {count} from {path.name}\n" + yaml.safe_dump(content, sort_keys=False))
    return output
