"""The exposures of an export: which they are, their optics, and the optics group of each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np

from cryodask.products import columns_of
from cryodask.store.project import Item, Project
from cryodask.store.sets import kept_rows
from cryodask.store.state import ProductRef
from cryodask.vocabulary import OPTICS


def label_of_particles(project: Project) -> str | None:
    """The step whose particles are exported: the last refinement, or what has given images of its particles since; else the last set."""

    def has(label: str, *parts: str) -> bool:
        ref = project.step(label).product("particles")
        return ref is not None and set(parts) <= set(ref.parts)

    refined, imaged = project.latest("particles", "pose"), project.latest("particles", "image")
    order = list(project.stages)
    if refined is not None and imaged is not None and order.index(imaged) > order.index(refined) and has(imaged, "pose", "image"):
        return imaged
    if refined is not None and has(refined, "image"):
        return refined
    both = (label for label in reversed(project.stages) if has(label, "pose", "image"))
    done = (label for label in both if any(r["ok"] for r in project.records(label).values()))
    return next(done, None) or refined or project.latest("particles")


@dataclass(frozen=True)
class Exposures:
    """The exposures of an export.

    ``ref``: those that the exported particles come from, else those of the last step that gives any; None if there are none.
    """

    project: Project
    ref: ProductRef | None

    @classmethod
    def of(cls, project: Project) -> Exposures:
        """Those of a project."""
        label = label_of_particles(project)
        behind = project.product(label, "particles") if label is not None else None
        if behind is not None and "micrograph" in behind.exposures:
            return cls(project, behind.model_copy(update={"parts": behind.exposures, "ids": behind.exposure_ids}))
        given = (project.step(label).product("exposures") for label in reversed(project.stages))
        return cls(project, next((ref for ref in given if ref is not None and "micrograph" in ref.parts), None))

    @cached_property
    def items(self) -> dict[str, Item]:
        """Those that the last selection keeps, by name."""
        kept = kept_rows(self.project, self.ref.ids) if self.ref is not None else None
        return {i.name: i for i in self.project.items() if kept is None or i.row in kept}

    @cached_property
    def optics(self) -> dict[str, dict[str, float]]:
        """Optics of all exposures by variable and name: from the registry, and from steps such as imports."""
        project = self.project
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

    @cached_property
    def kept_optics(self) -> dict[str, str]:
        """What imports keep of RELION's optics groups, by exposure; the last import that knows an exposure counts."""
        project = self.project
        known = {item.row: item.inputs.get("relion_optics", "") for item in project.items()}
        for label in project.stages:
            if "relion_optics" in project.generation(label).meta["gives"]:
                table = project.table_at(project.step(label).place, ["relion_optics"])
                known.update((row, text) for row, text in zip(table.row.tolist(), table.texts["relion_optics"].tolist()) if text)
        return {item.name: known[item.row] for item in project.items()}

    @cached_property
    def groups(self) -> dict[str, str]:
        """Name of the optics group of every exposure: one for each data set, and within it for each set of optics.

        Every file of an export names the groups alike.
        """
        found: dict[tuple[str, str, tuple[float, ...]], str] = {}
        taken = {item.data_set for item in self.project.items()}
        out = {}
        for item in self.project.items():
            values = tuple(self.optics.get(name, {}).get(item.name, np.nan) for name in (*OPTICS, "pixel_size_angstrom"))
            key = (item.data_set, self.kept_optics[item.name], values)
            if key not in found:
                of_set = sum(data_set == item.data_set for data_set, *_ in found)
                numbered = (f"{item.data_set or 'opticsGroup'}{'_' if item.data_set else ''}{n}" for n in count(of_set + 1))
                found[key] = item.data_set if item.data_set and not of_set else next(n for n in numbered if n not in taken)
                taken.add(found[key])
            out[item.name] = found[key]
        return out

    def figures(self, part: str, name: str) -> dict[str, float]:
        """Values of a variable by the names of the exposures that have one."""
        ref, sets = self.ref, self.project.sets
        known = sets.exposure_values(ref.parts[part], name, ref.optics) if ref is not None and part in ref.parts else None
        names = {item.row: item.name for item in self.project.items()}
        return (
            {names[r]: float(v) for r, v in zip(*(one.tolist() for one in known)) if r in names and np.isfinite(v)}
            if known is not None
            else {}
        )

    def givers(self, part: str) -> list[str]:
        """Steps that gave a part: one, or for a union those of all its sources."""
        if self.ref is None:
            return []
        labels = {self.project.step(label).place: label for label in self.project.stages}
        given = [labels[place] for place in self.ref.parts.get(part, "").split("|") if place in labels]
        return given or [label for label in (self.project.latest("exposures", part),) if label is not None]
