"""``STEP@KEY``: an earlier result as it was, with its ids, parts and facts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from cryodask.products import ImageFact, Product
from cryodask.run.graph.chain import Step, WrongStep, labels_of
from cryodask.store import places
from cryodask.store.generation import Generation
from cryodask.store.places import Line
from cryodask.store.state import ProductRef, ProjectState, parted

FACTS = ("frame", "point_group", "copies", "subtracted", "purpose")
"""Facts that its parameters determined. Sources, births and pixel sizes are those of the project."""


@dataclass(frozen=True)
class Pins:
    """Looks up earlier results in a project's folder."""

    folder: Path

    def __call__(self, step: Step, product: Product, key: str) -> Product:
        """The product of a step as an earlier result of it gave it.

        Parameters
        ----------
        step : Step
            In the current pipeline.
        product : Product
            The step's current product.
        key : str
            Key of the result (a prefix is enough), or ``STAGE/KEY``.

        Raises
        ------
        WrongStep
            If there is no such result, it is unfinished, or something that it depends on is gone.
        """
        place = key if "/" in key else self._place(step, key)
        name = f"{step.label}@{place.partition('/')[2]}"
        folder = self.folder / "stages" / place
        if not (folder / "zarr.json").is_file():
            raise WrongStep(
                f"{name} is no longer in the project: it was removed, by gc or by hand. Use another result, or the current one."
            )
        line = places.line_of(folder, step.label)
        ref = line.products.get(f"{product.output}:{product.type}") if line is not None else None
        if line is None or ref is None:
            raise WrongStep(f"{name} has no record of where its {product.type} came from: it was made in another way. Use another result.")
        gone = sorted(p for p in ref.places() if not (self.folder / "stages" / p / "zarr.json").is_file())
        if gone:
            what = ", ".join(p.replace("/", "@") for p in gone)
            raise WrongStep(f"{name} depends on {what}, which was removed, by gc or by hand. Use another result, or the current one.")
        if not line.finished and not Generation(folder).committed():
            raise WrongStep(f"{name} is not finished: its run was stopped. Use another result, or the current one.")
        return _as_it_was(product, ref, line, f"{step.label}@{place}")

    def _place(self, step: Step, key: str) -> str:
        stage = step.stage.name
        there = sorted(p.name for p in self.folder.glob(f"stages/{stage}/*") if p.suffix != ".part" and (p / "zarr.json").is_file())
        found = [k for k in there if k.startswith(key)]
        if not found and (days := self._gone(stage, key)):
            when = "; ".join(f"gc removed {step.label}@{k} on {day}" for k, day in days.items())
            raise WrongStep(f"{step.label}@{key} is gone: {when}. Use another result, or the current one.")
        if len(found) != 1:
            known = ", ".join(f"{step.label}@{k}" for k in there) or "none"
            raise WrongStep(f"{step.label}@{key} matches {len(found) or 'no'} results. There are {known}.")
        return f"{stage}/{found[0]}"

    def _gone(self, stage: str, key: str) -> dict[str, str]:
        """Keys with this prefix of results that gc removed, with the date."""
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
    """``LABEL@PLACE``; the label is for display only."""
    if not place:
        return ""
    first = parted(place.partition("|")[0])[0]
    return f"{line.label_at(first) or first.partition('/')[0]}@{place}"


def _among(refs: frozenset[str], labels: set[str]) -> frozenset[str]:
    """Those of the current ancestors of a product that were its ancestors then."""
    return frozenset(ref for ref in refs if labels_of([ref]) <= labels)
