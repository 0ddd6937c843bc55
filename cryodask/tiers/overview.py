"""What lies where, how big it is, and what goes when: for the terminal, programs and pages."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from cryodask.store.project import Project
from cryodask.tiers.inventory import held
from cryodask.tiers.lustre import lustre_lines
from cryodask.tiers.policy import Storage, announcements, forecast, size_text


def as_dict(project: Project, storage: Storage) -> dict[str, Any]:
    """All of it as plain values; times are seconds since 1970."""
    return {
        "project": project.name,
        "folder": str(project.path),
        "held": [asdict(one) for one in held(project)],
        "going": [asdict(one) for one in forecast(project, storage)],
        "announcements": announcements(project),
        "lustre": lustre_lines(project.path),
    }


def lines(project: Project, storage: Storage) -> list[str]:
    """All of it as lines of a terminal."""
    out = [f"{project.name} ({project.path})", f"  {'category':<12} {'size':>10} {'files':>8}  where"]
    out += [f"  {one.category:<12} {size_text(one.bytes):>10} {one.files:>8}  {one.where}" for one in held(project)]
    for going in forecast(project, storage):
        when = time.strftime("%Y-%m-%d", time.localtime(going.due)) if going.due is not None else f"no date yet: {going.why}"
        out.append(f"  {going.then} {going.category}, {size_text(going.bytes)}: {when}")
    return out + [f"  {line}" for line in lustre_lines(project.path)]
