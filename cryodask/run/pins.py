"""``STEP@KEY``: an earlier result as it was, with the ids, the parts and the facts of its time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from cryodask.products import ImageFact, Product
from cryodask.run.graph_chain import Step, WrongStep, labels_of
from cryodask.store import places
from cryodask.store.generation import Generation
from cryodask.store.places import Line
from cryodask.store.state import ProductRef, ProjectState

FACTS = ("frame", "point_group", "copies", "subtracted", "purpose")
"""Facts that parameters of its time have settled. Sources, births and pixel sizes are those of the project."""


@dataclass(frozen=True)
class Pins:
    """Looks up earlier results in a project's folder."""

    folder: Path

    def __call__(self, step: Step, product: Product, key: str) -> Product:
        """The product of a step as an earlier result of it gave it.

        Parameters
        ----------
        step : Step
            As the pipeline has it now.
        product : Product
            The same product as the step gives it now.
        key : str
            Key of the result (its beginning is enough), or ``STAGE/KEY``.

        Raises
        ------
        WrongStep
            Where there is no such result, it is unfinished, or something that it rests on is gone.
        """
        place = key if "/" in key else self._place(step, key)
        name = f"{step.label}@{place.partition('/')[2]}"
        folder = self.folder / "stages" / place
        if not (folder / "zarr.json").is_file():
            raise WrongStep(f"{name} is not in the project any more: gc, or somebody, removed it. Take another result, or that of now.")
        line = places.line_of(folder, step.label)
        ref = line.products.get(f"{product.output}:{product.type}") if line is not None else None
        if line is None or ref is None:
            raise WrongStep(f"{name} does not say where its {product.type} came from: it was made otherwise. Take another result.")
        gone = sorted(p for p in ref.places() if not (self.folder / "stages" / p / "zarr.json").is_file())
        if gone:
            what = ", ".join(p.replace("/", "@") for p in gone)
            raise WrongStep(f"{name} rests on {what}, which gc or somebody removed. Take another result, or that of now.")
        if not line.finished and not Generation(folder).committed():
            raise WrongStep(f"{name} is not finished: its run was stopped. Take another result, or that of now.")
        return _as_it_was(product, ref, line, f"{step.label}@{place}")

    def _place(self, step: Step, key: str) -> str:
        stage = step.stage.name
        there = sorted(p.name for p in self.folder.glob(f"stages/{stage}/*") if p.suffix != ".part" and (p / "zarr.json").is_file())
        found = [k for k in there if k.startswith(key)]
        if not found and (days := self._gone(stage, key)):
            when = "; ".join(f"gc removed {step.label}@{k} on {day}" for k, day in days.items())
            raise WrongStep(f"{step.label}@{key} is gone: {when}. Take another result, or that of now.")
        if len(found) != 1:
            known = ", ".join(f"{step.label}@{k}" for k in there) or "none"
            raise WrongStep(f"{step.label}@{key} names {len(found) or 'no'} results. There are {known}.")
        return f"{stage}/{found[0]}"

    def _gone(self, stage: str, key: str) -> dict[str, str]:
        """Keys that begin so of results that gc removed, and the day."""
        if not (self.folder / "project.json").is_file():
            return {}
        removed = {tuple(place.split("/")): when for place, when in ProjectState.read(self.folder).removed.items()}
        return {k: f"{datetime.fromtimestamp(when):%Y-%m-%d}" for (of, k), when in removed.items() if of == stage and k.startswith(key)}


def _as_it_was(product: Product, ref: ProductRef, line: Line, name: str) -> Product:
    labels = set(line.steps)
    facts = line.facts.get(f"{product.output}:{product.type}", {})
    image = facts.get("image")
    exposures = product.exposures or (Product("exposures", product.step, "exposures", product.index) if ref.exposures else None)
    if exposures is not None:
        exposures = replace(
            exposures,
            parts=_refs(ref.exposures, line),
            ids=_ref(ref.exposure_ids, line),
            behind=_among(exposures.behind, labels),
            line=_among(exposures.line, labels),
            sources=exposures.sources or product.sources,
            pinned=True,
            at=line.steps,
            optics=name,
        )
    return replace(
        product,
        parts=_refs(ref.parts, line),
        ids=_ref(ref.ids, line),
        behind=_among(product.behind, labels),
        line=_among(product.line, labels),
        exposures=exposures,
        image=ImageFact(**image) if image else None,
        pose_frames=frozenset(facts.get("pose_frames", ())),
        pinned=True,
        at=line.steps,
        threshold=ref.threshold,
        optics=name if product.type == "exposures" else "",
        **{name: facts[name] for name in FACTS if name in facts},
    )


def _refs(given: dict[str, str], line: Line) -> dict[str, str]:
    return {part: _ref(place, line) for part, place in given.items()}


def _ref(place: str, line: Line) -> str:
    """``LABEL@PLACE``; the label is for people."""
    if not place:
        return ""
    first = place.partition("|")[0]
    return f"{line.label_at(first) or first.partition('/')[0]}@{place}"


def _among(refs: frozenset[str], labels: set[str]) -> frozenset[str]:
    """Of what stands behind a product now, what stood behind it then."""
    return frozenset(ref for ref in refs if labels_of([ref]) <= labels)
