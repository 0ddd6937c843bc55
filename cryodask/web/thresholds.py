"""Ranges of numbers that people set on the trends of a session: saved for all who look, and turned into a step on request."""

from __future__ import annotations

from typing import Any

import numpy as np
import yaml

from cryodask.web.columns import COLUMNS
from cryodask.web.follow import DONE, STARTED, Follower
from cryodask.web.ledger import Ledger

Range = tuple[float | None, float | None]
Ranges = dict[str, Range]

_AS_PARAMETER = {
    ("ctf_resolution", 1): ("worst_ctf_resolution_angstrom", 1.0),
    ("total_motion", 1): ("largest_motion_angstrom", 1.0),
    ("defocus", 0): ("least_defocus_angstrom", 1e4),
    ("defocus", 1): ("largest_defocus_angstrom", 1e4),
}
"""Limits that stage ``select_exposures`` has itself, and the factor to its unit."""


class Thresholds:
    """The ranges of one session, with who set them."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self._ledger = Ledger(follower.path / "edits" / "thresholds")

    def current(self) -> dict[str, Any]:
        """The last saved ranges by column: ``ranges``, ``person``, ``time``."""
        records = self._ledger.records()
        return dict(records[-1]) if records else {"ranges": {}, "person": "", "time": None}

    def save(self, ranges: Ranges, person: str) -> dict[str, Any]:
        """Save ranges for everybody."""
        return self._ledger.append({"ranges": {name: list(range_) for name, range_ in ranges.items()}, "person": person})

    def outside(self, ranges: Ranges) -> np.ndarray:
        """Rows of measured exposures with a number outside its range."""
        follower = self._follower
        out = np.zeros(len(follower.state), bool)
        for name, (low, high) in ranges.items():
            values = follower.columns[name]
            out |= (values < (-np.inf if low is None else low)) | (values > (np.inf if high is None else high))
        return np.flatnonzero(out & ((follower.state == DONE) | (follower.state == STARTED)))

    def as_step(self, ranges: Ranges) -> str:
        """A ``select_exposures`` step that leaves the same exposures out, as YAML for the project file."""
        params: dict[str, Any] = {}
        rest: Ranges = {}
        for name, range_ in ranges.items():
            for side, limit in enumerate(range_):
                if limit is None:
                    continue
                if (name, side) in _AS_PARAMETER:
                    parameter, factor = _AS_PARAMETER[name, side]
                    params[parameter] = float(f"{limit * factor:.6g}")
                else:
                    low, high = rest.get(name, (None, None))
                    rest[name] = (limit, high) if side == 0 else (low, limit)
        names = [self._follower.names[row] for row in self.outside(rest)] if rest else []
        if names:
            params["leave_out"] = names
        return yaml.safe_dump([{"select_exposures": params}], sort_keys=False, allow_unicode=True)


def known(ranges: Ranges) -> bool:
    """Whether all ranges are of columns that exist, and none is empty."""
    names = {column.name for column in COLUMNS}
    return all(name in names and (low is None or high is None or low <= high) for name, (low, high) in ranges.items())
