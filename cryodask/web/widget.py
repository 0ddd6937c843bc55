"""The picker in a notebook: the script of the picking page, with a source that asks Python instead of a server."""

from __future__ import annotations

import re
from getpass import getuser
from pathlib import Path
from typing import Any

import anywidget

from cryodask.edits.board import Board
from cryodask.edits.frozen import Frozen, freeze
from cryodask.edits.pictures import level, steps_of
from cryodask.edits.shown import about_picks
from cryodask.errors import CryodaskError, InputError

_STATIC = Path(__file__).parent / "static"
_SCRIPTS = ("pixels.js", "edits.js", "picker.js", "widget.js")


def _bundled() -> str:
    """The scripts as one module: a notebook loads a widget from a single text, which can import nothing beside it."""
    texts = []
    for name in _SCRIPTS:
        text = re.sub(r"^import .* from \"\./.*\";\n", "", (_STATIC / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
        texts.append(text if name == _SCRIPTS[-1] else re.sub(r"^export ", "", text, flags=re.MULTILINE))
    return "\n".join(texts)


class PickWidget(anywidget.AnyWidget):
    """Edits the picks of an exposure; see :func:`cryodask.pick_widget`.

    Parameters
    ----------
    folder : path
        Folder of the project.
    exposure : str or int
        Name or row.
    """

    _esm = _bundled()
    _css = (_STATIC / "pick.css").read_text(encoding="utf-8")

    def __init__(self, folder: str | Path, exposure: str | int) -> None:
        super().__init__()
        self.board = Board(folder)
        self.row = self._row(exposure)
        self.board.exposure(self.row)
        self.on_msg(lambda widget, content, buffers: self.send(*self.answer(content)))

    def _row(self, exposure: str | int) -> int:
        if isinstance(exposure, int):
            return exposure
        rows = {item.name: item.row for item in self.board.project().items()}
        if exposure not in rows:
            raise InputError(f"{self.board.project().name} has no exposure {exposure!r}.", "", "see the names with  project.items()")
        return rows[exposure]

    def freeze(self) -> Frozen:
        """Use the picks as they are now: the next run applies them."""
        return freeze(self.board.picks, getuser())

    def answer(self, asked: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
        """Answer a request of the script: what is sent back, and pictures as bytes; errors in words."""
        buffers: list[bytes] = []
        try:
            result = self._result(str(asked.get("call")), asked.get("given"), buffers)
            return {"id": asked.get("id"), "result": result}, buffers
        except CryodaskError as error:
            status = 400 if isinstance(error, InputError) else 409
            return {"id": asked.get("id"), "error": f"{error.what} {error.way_out}", "status": status}, []

    def _result(self, call: str, given: Any, buffers: list[bytes]) -> Any:
        if call == "picks":
            return about_picks(self.board, self.row)
        if call == "version":
            self.board.picks.look()
            return self.board.picks.version
        if call == "picture":
            exposure = self.board.exposure(self.row)
            if given not in steps_of(exposure.shape):
                raise InputError(f"There is no level {given!r} of this picture.", "", "ask for one of its steps")
            picture = level(exposure, given)
            buffers.append(picture.tobytes())
            return {"height": picture.shape[0], "width": picture.shape[1]}
        if call == "send":
            stored = self.board.take("picks", given, getuser())
            return {"stored": len(stored), "highest": self.board.picks.highest}
        if call == "freeze":
            return {"who": self.freeze().who}
        raise InputError(
            f"The widget cannot {call}.", "its script is of another version", "restart the notebook's kernel and reload the page"
        )
