"""Values of exposures that a step reads from other projects; they may change while this project does not."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from cryodask.run.graph.chain import is_pinned, label_of
from cryodask.run.project_import import ProjectImport
from cryodask.run.recipe import Plan, Step
from cryodask.run.refs import givers_of, parts_used
from cryodask.store.project import Item


@dataclass(frozen=True)
class Origins:
    """For each part the imports that give it; for an exposure in several of them, the first one counts."""

    given: Sequence[tuple[str, Sequence[ProjectImport]]]

    def digest(self, item: Item) -> str:
        """Digest of what the step reads of an exposure, in the current state of the other projects."""
        first = ((part, next((one for one in some if one.has(item)), None)) for part, some in self.given)
        text = ";".join(one.digest_of(part, item) if one is not None else "" for part, one in first)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def origins_of(plan: Plan, step: Step) -> list[tuple[str, tuple[str, ...]]]:
    """Parts of exposures from ``import_project`` steps that a per-exposure step depends on, each with the labels of these steps."""
    found: dict[tuple[str, tuple[str, ...]], None] = {}
    waiting, seen = [step], set()
    while waiting:
        one = waiting.pop()
        if one.label in seen or one.stage.shape != "map":
            continue
        seen.add(one.label)
        for port in (p for p in one.stage.ports if p.type == "exposures"):
            for product in one.inputs.get(port.name, ()):
                for part in parts_used(one, port):
                    labels = [label_of(ref) for ref in givers_of(plan, product.parts[part], part) if not is_pinned(ref)]
                    steps = [plan.graph.step(label) for label in labels]
                    found |= {(part, tuple(s.label for s in steps if s.stage.name == "import_project")): None}
                    waiting += [s for s in steps if s.stage.name != "import_project"]
    return [(part, labels) for part, labels in found if labels]
