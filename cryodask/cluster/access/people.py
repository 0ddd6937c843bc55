"""The list of people who may connect, as the file ``people.json`` of an authority has it now."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from cryodask.cluster.access.peers import Peer

logger = logging.getLogger(__name__)

ROLES = ("user", "viewer")
"""What a person may be: one who submits, or one who only looks."""
_FRESH_SECONDS = 1.0
_TRUSTED_SECONDS = 10.0
"""How long the last readable list holds if the file cannot be read; then nobody but the owner is admitted."""


class People:
    """Who may connect.

    Parameters
    ----------
    source : mapping, path or None
        ``{"anna": {"lanes": ["hpda"], "serial": "1F"}}``, a file with it, which is read again when it changes, or None: everybody with a
        valid certificate.
    """

    def __init__(self, source: Mapping[str, Any] | str | Path | None) -> None:
        self._path = Path(source) if isinstance(source, str | Path) else None
        self._known: Mapping[str, Any] | None = {} if self._path is not None else source  # type: ignore[assignment]
        self._stamp: tuple[int, ...] | None = None
        self._looked = self._good = float("-inf")

    def now(self) -> Mapping[str, Any] | None:
        """The list, at most a second old; None if everybody may."""
        if self._path is not None and monotonic() - self._looked > _FRESH_SECONDS:
            self.look()
        return self._known

    def look(self) -> Mapping[str, Any] | None:
        """The list as it is now, at the cost of one call of ``stat``."""
        if self._path is None:
            return self._known
        self._looked = monotonic()
        try:
            found = os.stat(self._path)
            stamp: tuple[int, ...] = (found.st_ino, found.st_size, found.st_mtime_ns)
            if stamp != self._stamp:
                self._known, self._stamp = _entries(self._path.read_text(encoding="utf-8")), stamp
            self._good = self._looked
        except FileNotFoundError:  # nobody has been invited yet
            self._known, self._stamp, self._good = {}, None, self._looked
        except (OSError, ValueError) as error:
            if self._looked - self._good > _TRUSTED_SECONDS and self._known:
                logger.error("%s cannot be read, so nobody but the owner is admitted: %s", self._path, error)
                self._known, self._stamp = {}, None
        return self._known

    def invites(self, peer: Peer) -> bool:
        """Whether a peer is on the list with its certificate; if not, the file is looked at again first."""
        return self._has(self.now(), peer) or self._has(self.look(), peer)

    def is_viewer(self, peer: Peer) -> bool:
        """Whether a person is a viewer."""
        entry = (self.now() or {}).get(str(peer.name))
        return peer.role == "user" and entry is not None and entry.get("role", "user") != "user"

    @staticmethod
    def _has(people: Mapping[str, Any] | None, peer: Peer) -> bool:
        if people is None:
            return True
        entry = people.get(str(peer.name))
        return entry is not None and ("serial" not in entry or int(str(entry["serial"]), 16) == peer.serial)


def _entries(text: str) -> dict[str, Any]:
    """Entries of the file.

    Raises
    ------
    ValueError
        If one does not have the form that :meth:`Authority.invite` writes.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise ValueError("it is not a list of people")
    for entry in content.values():
        int(str(entry.get("serial", "0")), 16)
        if entry.get("role", "user") not in ROLES:
            raise ValueError(f"the role {entry['role']!r} does not exist")
    return content
