"""Plug-ins of other packages, found by their entry points; one registry per kind.

A plug-in that cannot be loaded or used is skipped with one warning; everything else works.

=======================  ==========================================================================================
group of entry points    what it names
=======================  ==========================================================================================
``cryodask.stages``      a module with stages (``@stage``), or one stage
``cryodask.readers``     a :class:`cryodask.formats.movies.Reader`: a movie format
``cryodask.exporters``   a function ``(project, folder) -> paths written``, for ``cryodask export --to NAME FOLDER``
``cryodask.pool_kinds``  a subclass of :class:`cryodask.cluster.settings.PluginSettings`: ``kind: NAME`` in cluster files
=======================  ==========================================================================================
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any

from cryodask.errors import CryodaskError, PluginError


class PluginWarning(UserWarning):
    """A plug-in is skipped."""


class Plugins:
    """Plug-ins of one kind, by entry-point name; loaded on first use.

    Parameters
    ----------
    group : str
        Group of the entry points.
    refused : callable ``(name, thing) -> sentence``
        Why a plug-in cannot be used; empty if it can.
    """

    def __init__(self, group: str, refused: Callable[[str, Any], str] = lambda name, thing: "") -> None:
        self.group, self.refused = group, refused
        self.broken: dict[str, str] = {}
        self._loaded: dict[str, Any] | None = None

    def load(self) -> dict[str, Any]:
        """All plug-ins that can be used; ``broken`` says why the others cannot."""
        if self._loaded is None:
            self._loaded = {}
            for entry in importlib.metadata.entry_points(group=self.group):
                try:
                    self._loaded[entry.name] = self._checked(entry)
                except (Exception, SystemExit) as error:  # an error in a plug-in must not stop what does not need it
                    self.broken[entry.name] = _said(entry, error)
                    warnings.warn(f"{self.broken[entry.name]} It is skipped.", PluginWarning, stacklevel=2)
        return self._loaded

    def _checked(self, entry: importlib.metadata.EntryPoint) -> Any:
        if entry.name in (self._loaded or {}):
            raise PluginError(f"Another package registers the same name for {entry.group}.", "", "remove one of the two packages")
        thing = entry.load()
        if sentence := self.refused(entry.name, thing):
            raise PluginError(sentence, "", f"{__name__} describes what an entry point of {entry.group} must name")
        return thing

    def hint(self, name: str) -> str:
        """Suffix for a message about an unknown name: plug-ins that could not be loaded and may provide it."""
        found = [said for entry, said in self.broken.items() if entry == name] or list(self.broken.values())
        return " " + " ".join(found) if found else ""


def _said(entry: importlib.metadata.EntryPoint, error: BaseException) -> str:
    package = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value
    reason = error.what if isinstance(error, CryodaskError) else f"{type(error).__name__}: {error}"
    return f"{entry.name} ({entry.group}) of the package {package} cannot be loaded: {reason.rstrip('.')}."
