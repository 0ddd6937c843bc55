"""Collects the content of the page: figures of the stages, sentences on the resolution, failures and timings."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from cryodask.errors import AwayError, ProjectFileError
from cryodask.stage import OTHERS, STAGES, Picture, Stage, load_stages
from cryodask.store.files import disk_errors
from cryodask.store.generation import Generation
from cryodask.store.project import Project

if TYPE_CHECKING:
    import xarray as xr


_DPI = 90
_HEAD = 1024
"""Characters of a page within which its state stands."""


@dataclass(frozen=True)
class Shown:
    """A figure on the page; without ``png`` it failed, for the reason in its caption."""

    title: str
    caption: str
    png: str


@dataclass(frozen=True)
class Section:
    """A stage on the page."""

    label: str
    stage: str
    sentence: str
    params: dict[str, Any]
    done: str
    seconds: float
    pictures: list[Shown]


def write_report(project: Project, output: str | Path | None = None, *, live: str = "") -> Path:
    """Write the page; ``report.html`` in the project's folder by default. Returns its path.

    Parameters
    ----------
    project : Project
    output : path, optional
    live : str
        Address of the project's live page, to which the report then has a link.

    Raises
    ------
    ProjectFileError
        If ``live`` is not an http address.
    """
    import jinja2

    # a link to javascript: or a file would be followed by whoever opens the report
    if live and not (urlsplit(live).scheme in ("http", "https") and urlsplit(live).netloc):
        raise ProjectFileError(f"{live!r} is not the address of a page.", "", "give it as the browser shows it, beginning with https://")
    load_stages()
    path = Path(output) if output else project.path / "report.html"
    sections = [_section(project, label) for label in project.stages]
    complete = all(picture.png for section in sections for picture in section.pictures)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("cryodask.report", "."), autoescape=True, trim_blocks=True)
    page = environment.get_template("page.html").render(
        project=project,
        live=live,
        state=_state(project) if complete and not live else "",
        when=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=version("cryodask"),
        facts=facts(project),
        resolution=resolution_sentences(project),
        sections=sections,
        failures=project.failures(),
    )
    with disk_errors(path):
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(page)
        os.replace(part, path)
    return path.resolve()


def update_report(project: Project) -> Path:
    """Like :func:`write_report`, but a page in the project's folder that shows these results, and all their figures, is kept."""
    path = project.path / "report.html"
    try:
        with open(path, encoding="utf-8") as file:
            kept = f'content="{_state(project)}"' in file.read(_HEAD)
    except (OSError, UnicodeDecodeError):
        kept = False
    return path.resolve() if kept else write_report(project)


def _state(project: Project) -> str:
    """Digest of what the page is made from."""
    load_stages()
    steps = [
        [label, project.step(label).place, project.generation(label).meta["params"], project.records(label)] for label in project.stages
    ]
    known = sorted(STAGES)
    text = json.dumps([version("cryodask"), known, str(project.path), len(project.items()), project.failures(), steps], default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def facts(project: Project) -> list[tuple[str, str]]:
    """The key numbers at the top of the page."""
    out = [("micrographs", str(len(project.items()))), ("quarantined", str(len(project.failures())))]
    found = _latest(project, "particles", "position")
    if found is not None and "pick_count" in found:
        out.append(("picks", str(int(found["pick_count"].sum()))))
    selected = next((s for s in reversed(project.stages) if "dropped_id" in project.generation(s).meta["gives"]), None)
    found = project[selected] if selected is not None else None
    if found is not None and "particle" in found.sizes:
        out.append(("particles kept", f"{found.sizes['particle']} of {found.sizes['particle'] + found.sizes.get('dropped', 0)}"))
    found = _latest(project, "exposures", "field")
    if found is not None and "total_motion" in found:
        out.append(("median motion", f"{float(np.median(found['total_motion'])):.1f} Å"))
    found = _latest(project, "exposures", "ctf")
    if found is not None and "defocus_u_angstrom" in found:
        mean = 0.5 * (found["defocus_u_angstrom"] + found["defocus_v_angstrom"]).values
        out.append(("defocus", f"{mean.min() / 1e4:.2f} to {mean.max() / 1e4:.2f} µm"))
    found = _latest(project, "map", "fsc")
    if found is not None:
        value = float(found["resolution_angstrom"])
        out.append(("resolution", f"{value:.2f} Å" if np.isfinite(value) else "none: the refinement has not succeeded"))
    return out


def resolution_sentences(project: Project) -> list[str]:
    """The resolution with its maps and mask, and what is undetermined."""
    out: list[str] = []
    post = next((s for s in reversed(project.stages) if _name(project, s) == "postprocess"), None)
    if post is not None and project.generation(post).committed():
        step = project.step(post)
        place = step.inputs["map"][0].parts["half_maps"]  # an earlier result is not the current one of a step
        maps = next((label for label in project.stages if project.step(label).place == place), place.replace("/", "@"))
        mask = step.inputs["mask"][0].step
        value = float(project[post]["resolution_angstrom"])
        out.append(
            f"No resolution is stated, because step “{maps}” has not succeeded: its half-maps may agree on a wrong map."
            if np.isnan(value)
            else f"The resolution is {value:.2f} Å: the first interpolated crossing of 0.143 by the FSC corrected for the mask (phase "
            "randomisation), within the shells where the unmasked FSC stands out from noise. It compares the two unmasked, unsharpened "
            f"half-maps of step “{maps}”, which were refined independently, under the soft mask of step “{mask}”."
        )
    if any(_name(project, s) == "ab_initio" for s in project.stages):
        out.append("The map began ab initio, so its handedness is undetermined: the mirror image fits equally well. Check the helices.")
    return out


def _name(project: Project, label: str) -> str:
    return str(project.generation(label).meta["stage"])


def _latest(project: Project, kind: str, part: str) -> xr.Dataset | None:
    label = project.latest(kind, part)
    return project[label] if label is not None else None


def _section(project: Project, label: str) -> Section:
    generation = project.generation(label)
    name = _name(project, label)
    stage = STAGES.get(name)
    records = project.records(label).values()
    done = sum(r["ok"] for r in records)
    seconds = sum(float(r.get("seconds", 0.0)) for r in records if r["ok"])
    shown = list(_shown(project, label, generation, stage)) if done and stage is not None else []
    count = f"{done} micrographs" if generation.meta["per_item"] else ("done" if done else "not finished")
    sentence = (
        stage.doc.splitlines()[0]
        if stage is not None
        else f"The stage {name} is not installed, so its figures are missing.{OTHERS.hint(name)}"
    )
    return Section(label, name, sentence, generation.meta["params"], count, seconds, shown)


def _shown(project: Project, label: str, generation: Generation, stage: Stage) -> Iterator[Shown]:
    """Figures of a step; one that fails becomes a box with its error and does not affect the rest of the page."""
    try:
        for picture in _pictures(project, label, generation, stage):
            yield Shown(picture.title, picture.caption, _png(picture))
    except AwayError as error:
        yield Shown("Images are away", error.problem, "")
    except Exception as error:  # figures of plug-ins may raise anything
        at = traceback.extract_tb(error.__traceback__)[-1]
        yield Shown("A figure failed", f"{type(error).__name__}: {error} ({Path(at.filename).name}, line {at.lineno})", "")


def _pictures(project: Project, label: str, generation: Generation, stage: Stage) -> Iterator[Picture]:
    if stage.draw is None:
        return
    if not generation.meta["per_item"]:
        yield from stage.draw(project[label])
        return
    registry = project.micrographs()
    for dataset in _with_what_they_saw(project, label):
        for name in registry.data_vars:
            if name not in dataset and "micrograph" in registry[name].dims:
                dataset = dataset.assign({name: registry[name].sel(micrograph=dataset["micrograph"].values)})
        yield from stage.draw(dataset)


def _with_what_they_saw(project: Project, label: str) -> Iterator[xr.Dataset]:
    """The exposures of a step by image size, with the images that it processed, because picks are shown on micrographs."""
    step = project.step(label)
    places = {ref.parts.get("micrograph") for ref in step.inputs.get("exposures", ())}
    givers = [giver for giver in project.stages if project.step(giver).place in places and giver != label]
    seen = [d for giver in givers for d in project.by_image_size(giver) if "micrograph_dw" in d]
    for dataset in project.by_image_size(label):
        with_images = [_beside(dataset, images["micrograph_dw"]) for images in seen if "micrograph_dw" not in dataset]
        yield from [d for d in with_images if d is not None and d.sizes["micrograph"]] or [dataset]


def _beside(dataset: xr.Dataset, image: xr.DataArray) -> xr.Dataset | None:
    """The exposures that have the image, together with it; None if its size differs from the step's own images."""
    if any(dataset.sizes.get(d, n) != n for d, n in image.sizes.items() if d != "micrograph"):
        return None
    shared = np.intersect1d(dataset["micrograph"].values, image["micrograph"].values)
    return dataset.sel(micrograph=shared).assign({"micrograph_dw": image.sel(micrograph=shared)})


def _png(picture: Picture) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer, figure = io.BytesIO(), picture.figure
    # of the levels of zlib the quickest also gives the smallest files for noisy micrographs
    options: dict[str, Any] = {"pil_kwargs": {"compress_level": 1}}
    if figure.get_layout_engine() is None:
        figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight", **options)
    else:  # savefig would draw it twice, the first time for the layout only
        figure.set_dpi(_DPI)
        FigureCanvasAgg(figure).print_png(buffer, **options)
    return base64.b64encode(buffer.getvalue()).decode()
