"""The picker in notebooks: its Python side, and its script in a real browser that talks to it."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path
from typing import Any

import pytest
from _once import once
from _picked import PLACES, picked_project
from _served import browser, need_browser

import cryodask
from cryodask.edits.board import Board
from cryodask.edits.frozen import frozen
from cryodask.errors import InputError

pytest.importorskip("anywidget")

pytestmark = pytest.mark.heavy


@pytest.fixture
def project(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = once(tmp_path_factory, "picked", lambda folder: picked_project(folder, 6))
    return Path(shutil.copytree(made / "session", tmp_path / "session"))


def test_the_python_side_answers_and_refuses(project: Path) -> None:
    widget = cryodask.pick_widget(cryodask.open(project), "m1")
    assert widget.row == 1
    reply, buffers = widget.answer({"id": 3, "call": "picks"})
    assert reply["id"] == 3
    assert [pick[1:3] for pick in reply["result"]["picks"]] == PLACES.tolist()
    step = reply["result"]["steps"][-1]
    reply, buffers = widget.answer({"id": 4, "call": "picture", "given": step})
    assert len(buffers[0]) == reply["result"]["height"] * reply["result"]["width"]
    for wrong in ({"call": "picture", "given": 7}, {"call": "send", "given": "word"}, {"call": "shell"}):
        reply, buffers = widget.answer({"id": 5, **wrong})
        assert (reply["status"], buffers) == (400, [])
        assert reply["error"]
    with pytest.raises(InputError, match="has no exposure 'm9'"):
        cryodask.pick_widget(project, "m9")
    with pytest.raises(InputError, match="no exposure with row 17"):
        cryodask.pick_widget(project, 17)


MODEL = """async (esm) => {
  const handlers = [];
  const model = {
    on: (name, handle) => handlers.push(handle),
    off: () => {},
    send: async (content) => {
      const [reply, buffers] = await window.python(content);
      const views = buffers.map((text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer));
      for (const handle of handlers) handle(reply, views);
    },
  };
  const address = URL.createObjectURL(new Blob([esm], { type: "text/javascript" }));
  const { default: widget } = await import(address);
  widget.render({ model, el: document.getElementById("place") });
}"""


def test_the_script_edits_picks_through_python(project: Path) -> None:
    need_browser()
    widget = cryodask.pick_widget(project, 1)
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 1000, "height": 700})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))

        def python(content: dict[str, Any]) -> list[Any]:
            reply, buffers = widget.answer(content)
            return [reply, [base64.b64encode(one).decode() for one in buffers]]

        page.expose_function("python", python)
        page.set_content(f"<style>{widget._css}</style><div id='place'></div>")
        page.evaluate(MODEL, widget._esm)
        page.wait_for_selector("#place[data-ready=yes]")
        page.focus("canvas")
        page.keyboard.press("Enter")
        page.wait_for_function(
            "() => { const p = place.picker; return !p.queue.pending().length && !p.sent.size && p.shown().length === 4; }"
        )
        assert [p.pick for p in Board(project).edited(1) if p.removed] == ["1.1.2"]
        # somebody else's edit arrives
        Board(project).take("picks", [{"id": "a" * 32, "n": 99, "do": "add", "row": 1, "y": 5.0, "x": 6.0}], "ben")
        page.wait_for_function("() => place.picker.shown().length === 5")
        page.get_by_role("button", name="Use these picks").click()
        page.wait_for_function("() => place.picker.frozen.time")
        assert errors == []
    made = frozen(project, "picks")
    assert made is not None
    assert {edit["action"] for edit in made.picks[1]} == {"add", "remove"}
