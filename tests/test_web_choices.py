"""Classes and exposures chosen by eye, in a real browser: click, range, box, reasons, keyboard, and two people at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from _classified import CLASSIFIED
from _once import once
from _served import Served, need_browser, person
from distributed import Client
from test_counts import run, session

from cryodask.edits.frozen import frozen

pytestmark = pytest.mark.heavy


def make(folder: Path) -> None:
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        run(session(folder, 12), client, [*CLASSIFIED, "select_classes"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    need_browser()
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(once(tmp_path_factory, "classified", make), folder / "projects")
    with Served(folder / "projects", folder) as server:
        yield server


def opened(chromium: Any, served: Served, page: str) -> Any:
    made = person(chromium, served)
    made.goto(f"{served.address}/s/toy/{page}")
    made.wait_for_selector("body[data-ready=yes]")
    return made


def settled(page: Any) -> list[int]:
    page.wait_for_function("() => !choices.queue.pending().length && !choices.queue.busy && !choices.sent.size && !choices.busy()")
    return sorted(page.evaluate("choices.chosen()"))


def test_classes_by_click_range_and_undo(served: Served, chromium: Any) -> None:
    page, other = (opened(chromium, served, "classes") for _ in range(2))
    page.fill("#reason", "sharp")
    page.click("[data-row='1']")
    assert settled(page) == [1]
    assert "sharp" in page.text_content("[data-row='1'] .said")
    order = page.eval_on_selector_all(".choice", "cells => cells.map(c => +c.dataset.row)")
    assert sorted(order) == [1, 2, 3, 4]
    page.click(f"[data-row='{order[-1]}']", modifiers=["Shift"])
    between = order[order.index(1) :]
    assert settled(page) == sorted({1, *between})
    other.wait_for_function("n => choices.chosen().length === n", arg=len({1, *between}))
    page.click("#undo")
    assert settled(page) == [1]
    page.click("#use")
    page.wait_for_function("() => document.getElementById('frozen').textContent.includes('froze on')")
    answer = httpx.get(f"{served.address}/s/toy/choices/classes", headers=served.headers).json()
    made = frozen(served.folder / "toy", "classes", answer["of"])
    assert made is not None
    assert made.numbers == {1: "sharp"}
    images = page.eval_on_selector_all(".choice img", "images => images.map(i => i.naturalWidth)")
    assert images == [32] * 4
    assert page.errors == other.errors == []


def test_exposures_by_box_keyboard_ratings_and_filter(served: Served, chromium: Any) -> None:
    page = opened(chromium, served, "choose")
    first, last = (page.locator(f"[data-row='{row}']").bounding_box() for row in (1, 3))
    page.fill("#reason", "<b>ice</b>")
    page.mouse.move(first["x"] + 20, first["y"] + 20)
    page.mouse.down()
    page.mouse.move(last["x"] + 30, last["y"] + 40, steps=5)
    page.mouse.up()
    assert settled(page) == [1, 2, 3]
    assert page.text_content("[data-row='2'] .said") == "<b>ice</b>"
    page.focus("[data-row='0']")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert settled(page) == [2, 3]
    page.keyboard.press("4")
    page.fill("#a-tags", "good, k3")
    page.fill("#a-note", "look again")
    page.click("#a-save")
    settled(page)
    for word, rows in (("rating:4", [1]), ("tag:k3", [1]), ("excluded", [2, 3]), ("again", [1]), ("m01", [10, 11])):
        page.fill("#filter", word)
        assert page.eval_on_selector_all(".choice", "cells => cells.map(c => +c.dataset.row)") == rows
    page.fill("#filter", "")
    # the same words find exposures on the page of the session
    other = person(chromium, served)
    other.goto(f"{served.address}/s/toy/")
    other.wait_for_function("() => document.body.dataset.sequence > 0")
    for word, rows in (("tag:good", [1]), ("excluded", [2, 3]), ("m01", [10, 11])):
        with other.expect_response("**/remarks"):
            other.evaluate("document.activeElement.blur()")
            other.focus("#f-name")
        other.fill("#f-name", word)
        other.wait_for_function(
            "rows => JSON.stringify([...document.querySelectorAll('#gallery [data-row]')].map(c => +c.dataset.row)) === rows",
            arg=str(rows).replace(" ", ""),
        )
    # the session as a whole, and the list of sessions
    page.click("#a-session")
    page.select_option("#a-rating", "5")
    page.fill("#a-tags", "apo")
    page.fill("#a-note", "<b>thin</b> ice")
    page.click("#a-save")
    settled(page)
    other.goto(served.address)
    assert "★★★★★" in other.inner_text("tbody tr")
    assert "<b>thin</b> ice" in other.inner_text("tbody tr")
    for words, hidden in (("rating:5 tag:apo", False), ("thin", False), ("rating:4", True), ("tag:holo", True), ("toy", False)):
        other.fill("#filter", words)
        assert other.eval_on_selector("tbody tr", "row => row.classList.contains('hidden')") is hidden, words
    assert other.errors == []
    page.click("#use")
    page.wait_for_function("() => document.getElementById('frozen').textContent.includes('froze on')")
    made = frozen(served.folder / "toy", "exposures")
    assert made is not None
    assert made.numbers == {2: "<b>ice</b>", 3: "<b>ice</b>"}
    assert page.errors == []


def test_wrong_choices_are_refused(served: Served) -> None:
    def post(path: str, body: Any) -> httpx.Response:
        return httpx.post(f"{served.address}/s/toy/choices/{path}", json=body, headers=served.headers)

    one = {"id": "0" * 32, "n": 1, "do": "set", "row": 99, "of": "toy_averages/ab", "name": "keep"}
    assert post("classes/ops", {"ops": [one]}).status_code == 400
    assert (
        "no exposure"
        in post("exposures/ops", {"ops": [{**{k: v for k, v in one.items() if k != "of"}, "name": "leave_out"}]}).json()["what"]
    )
    assert post("classes/freeze", {"of": "toy_averages/ab"}).status_code == 409
    assert post("maps/ops", {"ops": []}).status_code == 422
    assert httpx.get(f"{served.address}/s/toy/classes/1.png?of=toy_averages/ab", headers=served.headers).status_code == 404
