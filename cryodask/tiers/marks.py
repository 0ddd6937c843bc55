"""Facts about a project as a whole, kept like the lines of its files: identity, hand-overs, announcements."""

from __future__ import annotations

import uuid
from pathlib import Path

from cryodask.store.away import Ledger

MARKS = "marks"
_IDENTITY = "identity"


def identity(folder: str | Path) -> str:
    """Eight letters that tell a project from others of its name; given once (driver only), and kept in copies of it."""
    marks = Ledger(folder, MARKS)
    if _IDENTITY not in marks.records():
        marks.note(_IDENTITY, id=uuid.uuid4().hex[:8])
    return str(marks.records()[_IDENTITY]["id"])
