"""What a check has found out about one point."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One point of a check.

    Parameters
    ----------
    point : str
        What was tested, in a word or two.
    state : str
        ``ok``, ``problem``, or ``note``: nothing is wrong, but the operator should know.
    what : str
        What was found.
    way_out : str
        What to do; empty where there is nothing to do.
    """

    point: str
    state: Literal["ok", "note", "problem"]
    what: str
    way_out: str = ""

    def __str__(self) -> str:
        do = f"\n{'':9}What to do: {self.way_out}" if self.way_out else ""
        return f"{self.state:<8} {self.point}: {self.what}{do}"

    def described(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def ok(point: str, what: str) -> Finding:
    """A point that is as it should be."""
    return Finding(point, "ok", what)


def note(point: str, what: str, way_out: str = "") -> Finding:
    """A point that is no problem, but that the operator should know."""
    return Finding(point, "note", what, way_out)


def problem(point: str, what: str, way_out: str) -> Finding:
    """A point that has to be corrected."""
    return Finding(point, "problem", what, way_out)
