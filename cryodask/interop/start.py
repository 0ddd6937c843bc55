"""Commented project files that start from a folder of movies, or from another program's results."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from cryodask.errors import InputError, ProjectFileError, StarError
from cryodask.formats import cryosparc, ctffind, star
from cryodask.formats.movies import MOVIE_ENDINGS, open_movie
from cryodask.store.files import disk_errors
from cryodask.vocabulary import LIMITS

_FINEST_ANGSTROM = 3.5
"""Pixel size of the images of a first round of classes and maps."""
_TABLES = ("corrected_micrographs.star", "movies.star", "micrographs_ctf.star", "particles.star")
"""What a RELION project is started from: the first of these that is found."""
_AMPLITUDE_CONTRAST = 0.1
"""What cryoSPARC assumes; its exposures have it once a CTF was fitted."""


@dataclass(frozen=True)
class Session:
    """Settings for processing a session of movies; ``dose_per_frame`` in electrons per square Angstrom."""

    voltage_kv: float
    spherical_aberration_mm: float
    pixel_size_angstrom: float
    dose_per_frame: float
    amplitude_contrast: float = 0.1
    pre_exposure: float = 0.0
    diameter_angstrom: float = 150.0


def project_from_movies(movies: str, output: str | Path, session: Session, gain: str | Path | None = None) -> Path:
    """Write a project file for a folder or pattern of movies, with a comment for each setting.

    Raises
    ------
    ProjectFileError
        If the file exists, or there are no movies.
    """
    output = _new(Path(output))
    folder, pattern = Path(movies), Path(movies).name
    if folder.is_dir():
        counts = {ending: len(list(folder.glob(f"*{ending}"))) for ending in MOVIE_ENDINGS}
        most = max(counts, key=lambda ending: counts[ending])
        found = sorted(folder.glob(f"*{most}"))
        pattern = f"*{most}"
    else:
        folder = folder.parent
        found = sorted(p for p in folder.glob(pattern) if p.is_file())
    if not found:
        raise ProjectFileError(
            f"There are no movies in {movies}.", "", f"give a folder with {', '.join(MOVIE_ENDINGS)} files, or a pattern"
        )
    first = open_movie(found[0])
    frames, height, width = first.shape
    about = f"{len(found)} movies; the first has {frames} frames of {height} x {width} pixels"
    return _written(output, about, _movie_lines([(folder / pattern, Path(gain) if gain else None, session)], output))


def project_from(path: str | Path, output: str | Path) -> Path:
    """Write a project file that starts from another program's results.

    Parameters
    ----------
    path : path
        A RELION STAR file of movies, corrected micrographs, micrographs or particles; a RELION project, whose newest such file is
        taken; a cryoSPARC ``.cs`` or ``.csg`` file of particles or micrographs; a folder of text files of CTFFIND. The latter two are
        converted into a STAR file beside the output.

    Raises
    ------
    ProjectFileError
        If the output exists, or the project has no such file.
    InputError, StarError
        If the file cannot be used.
    """
    path, output = Path(path), _new(Path(output))
    if path.suffix.lower() in (".cs", ".csg"):
        return _from_cryosparc(path, output)
    if path.is_dir():
        fits = sorted(f for f in path.glob("*.txt") if not f.stem.endswith("_avrot"))
        path = _table_of_fits(fits, output) if fits and not _relion_tables(path) else _table_of(path)
    kind, table = _listed(path)
    if kind == "particles":
        return _from_particles(path, False, output)
    if kind == "movies":
        return _from_star_of_movies(path, output, table)
    return _from_micrographs(path, output)


def _from_particles(path: Path, dark: bool, output: Path) -> Path:
    """From a STAR file of particles; ``dark``: protein is dark in their images."""
    count = len(star.read_particles(path)["image_index"])
    steps = ["classify2d: {classes: 20}", "curate: {keep: auto}", "ab_initio: {symmetry: C1}      # point group of the molecule"]
    steps += ["refine3d: {symmetry: C1}", "mask", "postprocess"]
    given = yaml.safe_dump({"star": _beside(path, output), "invert": True}, default_flow_style=True, sort_keys=False, width=10**6).strip()
    inputs = {} if dark else {"inputs": {"particles": _beside(path, output)}}
    steps = [f"import_particles: {given}      # protein is dark in these images (blob/sign)", *steps] if dark else steps
    return _written(output, f"{count} particles from {path.name}", inputs, steps)


def _from_micrographs(path: Path, output: Path) -> Path:
    columns = star.read_micrographs(path)
    steps = [] if "defocus_u_angstrom" in columns else ["ctf"]
    about = f"{len(columns['micrograph_name'])} micrographs from {path.name}"
    steps += _picking(150.0, float(columns["pixel_size_angstrom"][0]))
    return _written(output, about, {"inputs": {"micrographs": _beside(path, output)}}, steps)


def _listed(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """What a STAR file lists, by the columns of its table (RELION 3.0 and older give the table no name), and that table."""
    tables = star.read_tables(path)
    found = next((tables[name] for name in ("particles", "images", "micrographs", "movies", "") if name in tables), None)
    table = {} if found is None else {str(label): np.atleast_1d(np.asarray(values, object)) for label, values in found.items()}
    if table and not len(next(iter(table.values()))):
        raise InputError(f"{path} lists nothing.", "its table is empty", "rewrite it, or give another file")
    if "rlnImageName" in table:
        return "particles", table
    if {"rlnMicrographMetadata", "rlnMicrographMovieName"} & set(table) and (
        "rlnMicrographMetadata" in table or "rlnMicrographName" not in table
    ):
        return "movies", table
    if "rlnMicrographName" in table:
        return "micrographs", table
    raise StarError(
        f"{path} lists neither movies nor micrographs nor particles.",
        "it is another kind of STAR file",
        "give one with rlnImageName, rlnMicrographName or rlnMicrographMovieName",
    )


class _Movie(NamedTuple):
    """A movie that a table lists, its gain and its session."""

    file: Path
    gain: Path | None
    session: Session


def _from_star_of_movies(path: Path, output: Path, table: dict[str, np.ndarray]) -> Path:
    """From ``movies.star``, or ``corrected_micrographs.star`` with its files of motion, which name movies, gain and doses."""
    columns = star.read_micrographs(path)
    known = "rlnMicrographMetadata" in table
    general = [_general(_found(str(n), path)) for n in table["rlnMicrographMetadata"]] if known else []
    names = [str(one["rlnMicrographMovieName"]) for one in general] if known else [str(n) for n in columns.get("movie_name", ())]
    movies = []
    for row, name in enumerate(names):
        one = general[row] if known else {}
        gain = str(one.get("rlnMicrographGainName", ""))
        dose, before = float(one.get("rlnMicrographDoseRate", 1.0)), float(one.get("rlnMicrographPreExposure", 0.0))
        session = Session(**_optics(path, columns, row), dose_per_frame=dose, pre_exposure=before)
        movies.append(_Movie(_found(name, path), _found(gain, path) if gain else None, session))
    return _from_movies(path, output, movies, "" if known else "; it does not say the dose: set dose_per_frame, and the gain")


def _from_cryosparc_movies(path: Path, output: Path, columns: dict[str, np.ndarray]) -> Path:
    """From the exposures of a job that imported movies; of several doses per frame, the one of most movies."""
    count = len(columns["movie_name"])
    columns = {"amplitude_contrast": np.full(count, _AMPLITUDE_CONTRAST), "gain_name": np.full(count, ""), **columns}
    corrected = columns.get("gain_corrected", np.zeros(count)) != 0
    known = np.round(columns.get("dose_per_frame", np.zeros(count)), 6)
    doses, often = np.unique(known[known > 0], return_counts=True)
    dose = float(doses[often.argmax()]) if len(doses) else 1.0
    gains = {str(name) for name in columns["gain_name"][~corrected] if name}
    movies = []
    for row, (name, gain) in enumerate(zip(columns["movie_name"], columns["gain_name"])):
        gain = next(iter(gains)) if len(gains) == 1 and not gain else str(gain)
        session = Session(**_optics(path, columns, row), dose_per_frame=dose, pre_exposure=0.0)
        movies.append(_Movie(_found(str(name), path), _found(gain, path) if gain and not corrected[row] else None, session))
    notes = [] if len(doses) else ["it does not say the dose: set dose_per_frame"]
    if others := int((known != dose).sum()) if len(doses) else 0:
        notes.append(f"{others} of the movies have another dose per frame than {dose:g} e/A^2, or none")
    if corrected.any():
        notes.append(f"the gain was applied to {corrected.sum()} of the movies already")
    if np.any(columns.get("gain_turned", 0)):
        notes.append("cryoSPARC flips or rotates the gain: the first run says which gain_flip and gain_rotate fit")
    if np.any(columns.get("phase_plate", 0)):
        notes.append("there was a phase plate: its phase shift is not estimated here")
    if np.any(columns.get("defects", 0)):
        notes.append("there are defect files, which are not read")
    return _from_movies(path, output, movies, "".join(f"; {note}" for note in notes))


def _optics(path: Path, columns: dict[str, np.ndarray], row: int) -> dict[str, float]:
    """Optics of a movie, within their limits."""
    names = ("voltage_kv", "spherical_aberration_mm", "amplitude_contrast", "pixel_size_angstrom")
    if missing := [name for name in names if name not in columns]:
        raise InputError(f"{path} does not say {', '.join(missing)} of its movies.", "it is of another job", "give the table of the import")
    found = {name: float(columns[name][row]) for name in names}
    for name, value in found.items():
        if not LIMITS[name].hold(value):
            raise InputError(f"{path}: {name} of row {row + 1} is {value:g}, which is not {LIMITS[name]}.", "", "correct it there")
    return found


def _from_movies(path: Path, output: Path, movies: list[_Movie], note: str) -> Path:
    """Movies of another folder, gain, dose or optics are a data set of their own; movies that the table does not list are left out."""
    groups: dict[tuple[Path, Path | None, Session], list[Path]] = {}
    for movie in movies:
        groups.setdefault((movie.file.parent / f"*{movie.file.suffix}", movie.gain, movie.session), []).append(movie.file)
    patterns = [pattern for pattern, _, _ in groups]
    if shared := next((pattern for pattern in patterns if patterns.count(pattern) > 1), None):
        raise InputError(
            f"{path}: movies of {shared.parent} differ in gain, dose or optics.",
            "several sessions were copied into one folder",
            "sort them into folders, and list each as a data set of inputs",
        )
    for (pattern, gain, _), _ in groups.items():
        if gain is not None and gain.parent == pattern.parent and gain.suffix == pattern.suffix:
            raise InputError(
                f"{path}: the gain {gain.name} is in the folder of the movies, and would be taken for one.", "", "move it to another folder"
            )
    count = len({file for files in groups.values() for file in files})
    unlisted = {pattern: len(list(pattern.parent.glob(pattern.name))) - len(set(groups[key])) for pattern, key in zip(patterns, groups)}
    links = _new(output.parent / f"{output.stem}_movies") if any(unlisted.values()) else None
    sets = [
        (_linked(groups[key], links / str(number)) if links is not None and unlisted[key[0]] else key[0], *key[1:])
        for number, key in enumerate(groups, 1)
    ]
    about = f"{count} movies from {path.name}"
    if links is not None:
        about += f"; {sum(unlisted.values())} more beside them are not in it and are left out: {links.name} has links to those listed"
    return _written(output, about + note, _movie_lines(sets, output))


def _linked(movies: list[Path], folder: Path) -> Path:
    """A folder of links to some movies, and the pattern that finds them."""
    with disk_errors(folder):
        folder.mkdir(parents=True)
        for movie in sorted(set(movies)):
            (folder / movie.name).symlink_to(os.path.relpath(movie.absolute(), folder.absolute()))
    return folder / f"*{movies[0].suffix}"


def _general(path: Path) -> dict[str, Any]:
    """What a file of motion says of its movie."""
    general = star.read_tables(path).get("general")
    if not isinstance(general, dict) or "rlnMicrographMovieName" not in general:
        raise InputError(f"{path} does not name its movie (rlnMicrographMovieName).", "", "run the motion correction again")
    for label in ("rlnMicrographDoseRate", "rlnMicrographPreExposure"):
        if isinstance(value := general.get(label, 0.0), str) or not np.isfinite(value):
            raise InputError(f"{path}: {label} is {value!r}, not a number.", "", "correct it there")
    return general


def _found(name: str, path: Path) -> Path:
    file = star.find_beside(name, path)
    if file is None:
        raise InputError(f"{path} names {name}, which does not exist.", "the project was moved without it", "copy it, or fix the link")
    return file


def _relion_tables(folder: Path) -> list[Path]:
    """Tables of a RELION project to start from: all of the first kind that it has."""
    every = ([p for p in (folder / name, *folder.glob(f"*/job*/{name}")) if p.is_file()] for name in _TABLES)
    return next((found for found in every if found), [])


def _table_of(folder: Path) -> Path:
    """The table to start from that was written last."""
    found = _relion_tables(folder)
    if not found:
        raise ProjectFileError(
            f"{folder} has none of {', '.join(_TABLES)}.", "it is not the folder of a RELION project", "give one of its STAR files"
        )
    return max(found, key=lambda p: p.stat().st_mtime)


def _table_of_fits(fits: list[Path], output: Path) -> Path:
    """A STAR file of the micrographs that CTFFIND fitted; where it was given their spectra (``NAME_PS.mrc``), those of that name."""
    target = _new(output.with_name(f"{output.stem}_micrographs.star"))
    rows = []
    for fit in fits:
        image, row = ctffind.read_fit(fit)
        whole = image.replace("_PS.mrc", ".mrc")
        micrograph = star.find_beside(whole, fit) or star.find_beside(Path(whole).name, fit)
        if micrograph is None:
            raise InputError(f"{fit} is of {whole}, which does not exist.", "the micrographs were moved", "copy them beside the text files")
        rows.append({"micrograph_name": _beside(micrograph, target), **row})
    shared = [name for name in rows[0] if all(name in row for row in rows)]
    columns: dict[str, Any] = {n: np.array([row[n] for row in rows], dtype=object if n == "micrograph_name" else float) for n in shared}
    with disk_errors(target.parent):
        star.write_micrographs_ctf(target, columns)
    return target


def _from_cryosparc(path: Path, output: Path) -> Path:
    """From a cryoSPARC table: movies as they are, micrographs and particles by way of a STAR file beside the output."""
    columns: dict[str, Any] = cryosparc.read_particles(path)
    if "image_stack" in columns:
        return _from_particles(*_converted_particles(path, output, columns), output)
    columns = cryosparc.read_micrographs(path)
    if "micrograph_name" not in columns and "movie_name" in columns:
        return _from_cryosparc_movies(path, output, columns)
    if "micrograph_name" not in columns:
        raise InputError(f"{path} has neither particle images nor exposures.", "", "give the .csg file of the result group")
    target = _new(output.parent / f"{path.stem}.star")
    columns["micrograph_name"] = np.array([_beside(_of_job(n, path), target) for n in columns["micrograph_name"]], dtype=object)
    for name in ("cryosparc_uid", "movie_name", "gain_name", "gain_turned", "gain_corrected", "dose_per_frame", "phase_plate", "defects"):
        columns.pop(name, None)
    with disk_errors(target.parent):
        star.write_micrographs_ctf(target, columns)
    return _from_micrographs(target, output)


def _converted_particles(path: Path, output: Path, columns: dict[str, Any]) -> tuple[Path, bool]:
    """Particles as a STAR file beside the output, and whether protein is dark in their images."""
    target = _new(output.parent / f"{path.stem}.star")
    signs = np.unique(columns.pop("contrast_sign", np.ones(1, np.int64)))
    if len(signs) > 1:
        raise InputError(
            f"{path} has images in which protein is bright and others in which it is dark (blob/sign).",
            "particles of two imports were combined",
            "export them separately, and merge them here",
        )
    columns["cryosparc_uid"] = columns["cryosparc_uid"].view(np.int64)
    columns["image_stack"] = np.array([_beside(_of_job(n, path), target) for n in columns["image_stack"]], dtype=object)
    with disk_errors(target.parent):
        star.write_particles(target, columns)
    return target, bool((signs < 0).any())


def _of_job(name: str, path: Path) -> Path:
    """A file that a cryoSPARC table names: relative to it, or to a folder above it (the project of its job)."""
    return star.find_beside(name, path) or path.parent / name


def _new(path: Path) -> Path:
    if path.exists():
        raise ProjectFileError(
            f"{path} exists and is not overwritten.", "an earlier import wrote it", "choose another name with --output, or remove it"
        )
    return path


def _beside(path: str | Path, output: Path) -> str:
    return os.path.relpath(Path(path).absolute(), output.absolute().parent)


def _movie_lines(groups: list[tuple[Path, Path | None, Session]], output: Path) -> dict[str, Any]:
    """The sections ``inputs`` and ``microscope`` of movies: of one data set, or a list of several with their optics."""
    sets = [{"movies": _beside(pattern, output), **({"gain": _beside(gain, output)} if gain else {})} for pattern, gain, _ in groups]
    if len(groups) == 1:
        return {"inputs": sets[0], "session": groups[0][2]}
    named = [{"name": f"set{n}", **one, "microscope": _microscope(session)} for n, (one, (*_, session)) in enumerate(zip(sets, groups), 1)]
    sizes = {session.pixel_size_angstrom for *_, session in groups}
    return {"inputs": named, "pixel_size_angstrom": sizes.pop() if len(sizes) == 1 else None}


def _microscope(session: Session) -> dict[str, float]:
    return {name: getattr(session, name) for name in _MEANING}


def _picking(diameter_angstrom: float, pixel_size_angstrom: float | None) -> list[str]:
    """Steps from micrographs to classes; without a pixel size for micrographs of several."""
    box = f"box_angstrom: {1.6 * diameter_angstrom:g}, pixel_size_angstrom: {_FINEST_ANGSTROM}"
    unit = "Angstrom"
    if pixel_size_angstrom is not None:
        pixels, unit = 2 * round(0.8 * diameter_angstrom / pixel_size_angstrom), "pixels of the micrograph"
        small = max(8, min(pixels, 2 * round(0.5 * pixels * pixel_size_angstrom / _FINEST_ANGSTROM)))
        box = f"box: {pixels}, scale_to: {small}"
    return [
        f"pick: {{diameter_angstrom: {diameter_angstrom:g}}}      # of the particle",
        f"extract: {{{box}}}      # box: 1.5 to 2 diameters, in {unit}",
        "classify2d: {classes: 20}",
        "curate: {keep: auto}",
    ]


_MEANING = {
    "voltage_kv": "",
    "spherical_aberration_mm": "Cs",
    "amplitude_contrast": "",
    "pixel_size_angstrom": "of the movies",
    "dose_per_frame": "electrons per square Angstrom",
    "pre_exposure": "before the first frame",
}


def _written(output: Path, about: str, content: dict[str, Any], steps: list[str] | None = None) -> Path:
    """Write a project file: values as YAML, each with a comment where its meaning is not in its name."""

    def value(text: Any) -> str:
        return yaml.safe_dump(text, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()

    session: Session | None = content.get("session")
    lines = [
        f"# {about}",
        "# all settings: docs/project-file.md; check with:  cryodask run FILE --dry-run",
        f"name: {value(output.stem)}",
    ]
    notes = {"gain": "multiplies the counts; gain_rotate and gain_flip turn it"}
    if inputs := content.get("inputs"):
        lines.append("inputs:")
    if isinstance(inputs, list):
        lines += [f"  - {value(one)}" for one in inputs]
    elif inputs:
        lines += [f"  {key}: {value(text)}" + (f"      # {notes[key]}" if key in notes else "") for key, text in inputs.items()]
    if steps is None:
        pixel = session.pixel_size_angstrom if session is not None else content["pixel_size_angstrom"]
        steps = ["motion", "ctf", *_picking(session.diameter_angstrom if session is not None else 150.0, pixel)]
    if session is not None:
        lines.append("microscope:")
        for key, meaning in _MEANING.items():
            lines.append(f"  {key}: {getattr(session, key):g}" + (f"      # {meaning}" if meaning else ""))
    lines += ["pipeline:", *(f"  - {step}" for step in steps)]
    lines += ["cluster: local      # or the name of a cluster, or a cluster file", ""]
    with disk_errors(output.parent):
        output.write_text("\n".join(lines), encoding="utf-8")
    return output
