"""The picking page in a real browser, with a real server that is killed: nothing acknowledged is lost, and everyone sees the same."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from _once import once
from _picked import PLACES, SHAPE, picked_project
from _served import DEADLINE_SECONDS, Served, need_browser, person

from cryodask.edits.board import Board
from cryodask.edits.frozen import frozen
from cryodask.edits.operations import new_id
from cryodask.store.project import Arrival, Project

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    need_browser()
    made = once(tmp_path_factory, "picked", lambda folder: picked_project(folder, 6))
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(made, folder / "projects")
    with Served(folder / "projects", folder) as server:
        yield server


def opened(page: Any, served: Served, row: int) -> Any:
    page.goto(f"{served.address}/s/session/pick/{row}")
    page.wait_for_selector("body[data-ready=yes]")
    return page


def board_of(served: Served) -> Board:
    return Board(served.folder / "session")


def settled(page: Any) -> None:
    """Wait until all edits of a page are saved, and it shows what the server has."""
    page.wait_for_function("() => !picker.queue.pending().length && !picker.queue.busy && !picker.refreshing && !picker.sent.size")


def shown(page: Any) -> dict[str, tuple[float, float]]:
    found = page.evaluate("picker.shown().map(p => [p.pick, p.y, p.x])")
    return {pick: (round(y, 2), round(x, 2)) for pick, y, x in found}


def stored(served: Served, row: int) -> dict[str, tuple[float, float]]:
    return {p.pick: (round(p.y, 2), round(p.x, 2)) for p in board_of(served).edited(row) if p.on}


CENTRE = """([y, x]) => {
  const [right, down] = picker.frame.toScreen(y, x), reach = Math.max(12, Math.ceil(9 * picker.frame.zoom));
  const [left, top] = [Math.round(right) - reach, Math.round(down) - reach], size = 2 * reach + 1;
  const pixels = picker.context.getImageData(left, top, size, size).data;
  let sum = 0, a = 0, b = 0;
  for (let j = 0; j < size; j++) for (let i = 0; i < size; i++) {
    const weight = Math.max(0, pixels[4 * (j * size + i)] - 236);
    sum += weight; a += weight * (left + i + 0.5); b += weight * (top + j + 0.5);
  }
  return [a / sum - right, b / sum - down, sum];
}"""


@pytest.fixture(scope="module")
def zoomed(served: Served, chromium: Any) -> Iterator[Any]:
    page = opened(person(chromium, served), served, 0)
    yield page
    page.context.close()


@pytest.mark.parametrize("zoom", [0.2, 0.45, 0.61, 1.0, 2.7, 8.0])
def test_circles_are_where_the_particles_are_at_every_zoom(zoomed: Any, zoom: float) -> None:
    page = zoomed
    page.evaluate("() => { picker.form.lowpass.value = 0; picker.form.contrast.value = 1; picker.filter(); picker.canvas.blur(); }")
    for y, x in PLACES.tolist():
        page.evaluate(
            """([zoom, y, x]) => {
              const f = picker.frame; f.zoom = zoom; [f.left, f.top] = [0, 0];
              const [right, down] = f.toScreen(y, x);
              f.left = picker.canvas.width / 2 - right + 0.37; f.top = picker.canvas.height / 2 - down + 0.21; picker.draw();
            }""",
            [zoom, y, x],
        )
        page.wait_for_function("() => picker.shownStep === picker.suitable()")
        page.evaluate("() => { picker.picks = new Map(); picker.paintAll(); }")
        right, down, weight = page.evaluate(CENTRE, [y, x])
        assert weight > 0
        assert abs(right) <= 0.5, (zoom, y, x, right, down)
        assert abs(down) <= 0.5, (zoom, y, x, right, down)
        # all that is on the screen is of the picture, also after the view was moved
        assert page.evaluate("picker.covers()")
        # and the way back
        back = page.evaluate("([y, x]) => picker.frame.toPlace(...picker.frame.toScreen(y, x))", [y, x])
        assert back == pytest.approx([y, x])


def test_the_low_pass_is_that_of_three_uniform_filters(served: Served, chromium: Any) -> None:
    from scipy.ndimage import uniform_filter

    page = opened(person(chromium, served), served, 1)
    picture = np.random.default_rng(1).integers(0, 256, (61, 83)).astype(np.uint8)
    picture[10:14, 20:25] = 255
    for sigma in (0.4, 0.8, 1.7, 3.3, 9.0, 40.0):
        widths, values = page.evaluate(
            """async ([bytes, h, w, sigma]) => {
              const p = await import(new URL("../../../static/pixels.js", location));
              const widths = p.boxWidths(sigma);
              return [widths, [...p.blurred(new Uint8Array(bytes), h, w, widths)]];
            }""",
            [picture.ravel().tolist(), *picture.shape, sigma],
        )
        wanted = picture.astype(np.float64)
        for width in widths:
            wanted = uniform_filter(wanted, width, mode="nearest")
        assert np.abs(np.reshape(values, picture.shape) - wanted).max() < 2e-3
        # an area is filtered as in the whole picture
        area = {"bottom": 7, "left": 30, "height": 21, "width": 53}
        part, bytes_, spread = page.evaluate(
            """async ([bytes, height, width, area, widths]) => {
              const p = await import(new URL("../../../static/pixels.js", location));
              const picture = { bytes: new Uint8Array(bytes), height, width };
              return [[...p.blurredArea(picture, area, widths)], [...p.cut(picture, area)], p.spread(picture, widths)];
            }""",
            [picture.ravel().tolist(), *picture.shape, area, widths],
        )
        inside = (slice(7, 28), slice(30, 83))
        assert np.abs(np.reshape(part, (21, 53)) - wanted[inside]).max() < 2e-3
        assert np.array_equal(np.reshape(bytes_, (21, 53)), picture[inside])
        assert spread["mean"] == pytest.approx(wanted.mean(), abs=4)
        assert spread["deviation"] == pytest.approx(wanted.std(), rel=0.25)
        # one width more or less changes the variance by two thirds of sigma; the nearest is chosen
        assert sum(w * w - 1 for w in widths) / 12 == pytest.approx(sigma**2, abs=1 + 0.35 * sigma)
    page.context.close()


def test_everything_by_keyboard_alone(served: Served, chromium: Any) -> None:
    page = opened(person(chromium, served), served, 2)
    first = shown(page)
    assert page.evaluate("document.activeElement === picker.canvas")
    page.keyboard.press("Enter")  # the cursor is at the centre, where a pick is
    settled(page)
    assert len(shown(page)) == len(first) - 1
    page.keyboard.press("z")
    settled(page)
    assert shown(page) == first
    page.keyboard.press("y")
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    for _ in range(5):
        page.keyboard.press("Shift+ArrowUp")
    page.keyboard.press("Enter")
    settled(page)
    added = shown(page).keys() - first.keys()
    assert len(added) == 1
    page.keyboard.press("m")
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("m")
    settled(page)
    (one,) = added
    y, x = shown(page)[one]
    centre = (SHAPE[0] / 2, SHAPE[1] / 2)
    assert y < centre[0] < centre[0] + 1 < x
    assert stored(served, 2) == shown(page)
    for key in ("+", "-", "0"):
        page.keyboard.press(key)
    page.keyboard.press("n")
    page.wait_for_url("**/pick/3")
    page.wait_for_selector("body[data-ready=yes]")
    page.keyboard.press("p")
    page.wait_for_url("**/pick/2")
    assert page.errors == []
    page.context.close()


def test_mouse_threshold_and_use_these(served: Served, chromium: Any) -> None:
    page = opened(person(chromium, served), served, 3)
    first = shown(page)
    box = page.locator("canvas.view").bounding_box()

    def at(y: float, x: float) -> tuple[float, float]:
        right, down = page.evaluate("([y, x]) => picker.frame.toScreen(y, x)", [y, x])
        return box["x"] + right, box["y"] + down

    page.mouse.click(*at(300.0, 1000.0))
    page.mouse.move(*at(*PLACES[0]))
    page.mouse.down()
    page.mouse.move(*at(400.0, 400.0), steps=4)
    page.mouse.up()
    settled(page)
    now = shown(page)
    (added,) = now.keys() - first.keys()
    assert now[added] == pytest.approx((300, 1000), abs=2)
    assert now["1.3.0"] == pytest.approx((400, 400), abs=2)
    page.evaluate("() => { picker.form.score.value = 1.7; picker.tell(); }")
    page.get_by_role("button", name="Remove 2 below").click()
    settled(page)
    assert len(shown(page)) == len(now) - 2
    page.get_by_role("button", name="Undo").click()
    settled(page)
    assert shown(page) == now
    page.get_by_role("button", name="Use these picks").click()
    page.wait_for_function("() => picker.frozen.time")
    made = frozen(served.folder / "session", "picks")
    assert made is not None
    assert {e["action"] for e in made.picks[3]} == {"add", "move"}
    page.context.close()


MAKE = """([seed]) => {
  // a small generator, so that a run can be repeated
  let s = seed >>> 0; const r = () => (s = (s * 1664525 + 1013904223) >>> 0) / 4294967296;
  const some = [...picker.picks.values()], on = picker.shown(), kind = r();
  if (kind < 0.4 || !on.length) picker.act([{ do: "add", y: r() * (picker.height - 1), x: r() * (picker.width - 1) }]);
  else if (kind < 0.6) { const p = on[Math.floor(r() * on.length)]; picker.act([{ do: "remove", pick: p.pick, y: p.y, x: p.x }]); }
  else if (kind < 0.75) picker.move(on[Math.floor(r() * on.length)], r() * (picker.height - 1), r() * (picker.width - 1));
  else if (kind < 0.85) picker.undo();
  else if (kind < 0.9) picker.redo();
  else { const p = some[Math.floor(r() * some.length)]; picker.act([{ do: "restore", pick: p.pick }]); }
  window.made = (window.made || 0) + 1;
}"""


NOTE = """() => {
  // what is made and what is acknowledged, noted where a reload does not reach
  const noted = (name) => JSON.parse(localStorage.getItem(name) || "[]");
  const note = (name, ops) => localStorage.setItem(name, JSON.stringify([...noted(name), ...ops.map((op) => op.id)]));
  const { add, send } = picker.queue;
  picker.queue.add = function (edits) { const ops = add.call(this, edits); note("made", ops); return ops; };
  picker.queue.send = async (ops) => { const answer = await send(ops); note("acknowledged", ops); return answer; };
}"""


def _two_people(served: Served, chromium: Any, row: int, operations: int, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    pages = [opened(person(chromium, served), served, row) for _ in range(2)]
    for page in pages:
        page.evaluate(NOTE)
    killed_at = set(rng.sample(range(operations), kills))
    off: set[int] = set()
    acknowledged: set[str] = set()
    for number in range(operations):
        for k, page in enumerate(pages):
            page.evaluate(MAKE, [rng.randrange(1 << 30)])
            what = rng.random()
            if what < 0.05 and k not in off:
                off.add(k)
                page.context.set_offline(True)
            elif what < 0.2 and k in off:
                off.discard(k)
                page.context.set_offline(False)
            elif what < 0.23 and k not in off:
                opened(page, served, row)
                page.evaluate(NOTE)
        if number in killed_at:
            known = Board(served.folder / "session").picks
            known.look()
            acknowledged |= {one["id"] for one in known.of_row(row)}
            served.kill()
            for page in pages:
                page.evaluate(MAKE, [rng.randrange(1 << 30)])
            served.start()
    for page in pages:
        page.context.set_offline(False)
    for page in pages:
        settled(page)
    wanted = stored(served, row)
    for page in pages:
        page.wait_for_function("n => { const s = picker.shown(); return s.length === n && !picker.refreshing; }", arg=len(wanted))
        page.evaluate("() => picker.refresh()")
        settled(page)
        assert shown(page) == wanted
        assert page.errors == []
        assert page.evaluate("Object.keys(localStorage).filter(k => k.startsWith('picks ')).length") == 0
    log = board_of(served).picks
    log.look()
    kept = {one["id"] for one in log.of_row(row)}
    assert acknowledged <= kept
    made = {one for page in pages for one in page.evaluate("JSON.parse(localStorage.getItem('made'))")}
    told = {one for page in pages for one in page.evaluate("JSON.parse(localStorage.getItem('acknowledged'))")}
    assert told <= made == kept, "every edit is there, once, and no other"
    assert len(made) >= operations
    for page in pages:
        page.context.close()


def test_two_people_off_line_spells_reloads_and_kills(served: Served, chromium: Any) -> None:
    _two_people(served, chromium, row=4, operations=25, kills=2, seed=4)


@pytest.mark.slow
def test_two_people_200_operations_each_and_50_kills(served: Served, chromium: Any) -> None:
    _two_people(served, chromium, row=5, operations=200, kills=50, seed=5)


def test_two_dashboards_on_one_project_agree(served: Served, chromium: Any, tmp_path: Path) -> None:
    """What is edited or committed is seen at both, also when both move one pick at the same time."""
    project, row = Project(served.folder / "session"), 5
    with Served(served.folder, tmp_path) as other:
        one, two = (opened(person(chromium, server), server, row) for server in (served, other))
        first = shown(one)

        def agree(expected: Callable[[dict[str, tuple[float, float]]], bool]) -> None:
            until = time.monotonic() + DEADLINE_SECONDS
            while not (shown(one) == shown(two) == stored(served, row) and expected(shown(one))):
                assert time.monotonic() < until, (shown(one), shown(two), stored(served, row))
                one.wait_for_timeout(50)
                two.wait_for_timeout(50)

        agree(lambda now: now == first)
        one.evaluate("() => picker.act([{ do: 'add', y: 333, x: 444 }])")
        agree(lambda now: (333.0, 444.0) in now.values() and len(now) == len(first) + 1)
        gone, moved, *_ = first
        two.evaluate("one => { const p = picker.picks.get(one); picker.act([{ do: 'remove', pick: one, y: p.y, x: p.x }]); }", gone)
        agree(lambda now: gone not in now and len(now) == len(first))
        for page, x in ((one, 700), (two, 800)):
            page.evaluate("([one, x]) => picker.move(picker.picks.get(one), 900, x)", [moved, x])
        for page in (one, two):
            settled(page)
        agree(lambda now: now[moved] in ((900.0, 700.0), (900.0, 800.0)))

        tables = [person(chromium, server) for server in (served, other)]
        for page, server in zip(tables, (served, other)):
            page.goto(f"{server.address}/s/session/")
            page.wait_for_function("() => document.body.dataset.sequence > 0")
        count = len(list(project.items()))
        project.update_exposures([Arrival("a new one", "content of it", {})], complete=False)
        project.generation("import_picks").commit_failure(count, "a new one", "MovieError", "its file is truncated", 3)
        for page in tables:
            page.wait_for_function("n => document.getElementById('c-exposures').textContent === n", arg=f"{count + 1}")
            page.wait_for_function("() => document.getElementById('c-quarantined').textContent === '1'")
            page.wait_for_function("() => document.getElementById('quarantine').textContent.includes('its file is truncated')")
        counters = "() => [...document.querySelectorAll('[id^=c-]')].map((one) => `${one.id} ${one.textContent}`)"
        assert tables[0].evaluate(counters) == tables[1].evaluate(counters)
        for page in (one, two, *tables):
            assert page.errors == []
            page.context.close()


def test_bad_operations_are_refused_with_a_clear_answer(served: Served) -> None:
    def sent(row: int, *ops: dict[str, Any], **more: Any) -> httpx.Response:
        address = f"{served.address}/s/session/picks/{row}/ops"
        return httpx.post(address, json={"ops": list(ops)}, headers={**served.headers, **more}, timeout=60)

    def op(**more: Any) -> dict[str, Any]:
        return {"id": new_id(), "n": 1, "do": "add", "row": 0, "y": 1.0, "x": 1.0, **more}

    before = len(board_of(served).edited(0))
    for wrong, status, said in (
        (op(row=1), 422, "another exposure"),
        (op(do="explode"), 400, "not valid"),
        (op(y=5000.0), 400, "outside m0"),
        (op(y=-1.0), 400, "not valid"),
        (op(do="remove", pick="7.0.3"), 400, "has no pick"),
        (op(id="short"), 400, "not valid"),
    ):
        answer = sent(0, op(), wrong)
        assert answer.status_code == status, answer.text
        assert said in answer.json()["what"]
    raw = b'{"ops": [{"id": "%s", "n": 1, "do": "add", "row": 0, "y": NaN, "x": 1}]}' % new_id().encode()
    json = {**served.headers, "content-type": "application/json"}
    answer = httpx.post(f"{served.address}/s/session/picks/0/ops", content=raw, headers=json)
    assert answer.status_code in (400, 422)
    assert answer.json()["what"]

    def endless() -> Iterator[bytes]:
        for _ in range(300):
            yield b" " * (1 << 20)

    try:
        answer = httpx.post(f"{served.address}/s/session/picks/0/ops", content=endless(), headers=json, timeout=60)
        assert answer.status_code == 413
        assert "larger than" in answer.json()["what"]
    except httpx.WriteError:
        pass  # the server has answered and hung up before all of it was sent
    assert httpx.post(f"{served.address}/s/session/picks/9/ops", json={"ops": [op(row=9)]}, headers=served.headers).status_code == 400
    assert httpx.post(f"{served.address}/s/other/picks/0/ops", json={"ops": [op()]}, headers=served.headers).status_code == 404
    assert httpx.get(f"{served.address}/s/session/picture/0/3", headers=served.headers).status_code == 404
    assert httpx.get(f"{served.address}/s/session/edits/maps/events", headers=served.headers).status_code == 422
    assert httpx.post(f"{served.address}/s/session/picks/0/ops", json={"ops": [op()]}).status_code in (401, 403)
    from_elsewhere = {"origin": "http://evil.example", "sec-fetch-site": "cross-site"}
    assert sent(0, op(), **from_elsewhere).status_code == 403
    assert len(board_of(served).edited(0)) == before, "all or none"
    # the same edit twice counts once
    one = op(y=9.0, x=9.0)
    assert [sent(0, one).json()["stored"] for _ in range(2)] == [1, 0]


def test_a_project_that_vanishes_keeps_the_edits_in_the_browser(served: Served, chromium: Any) -> None:
    page = opened(person(chromium, served), served, 1)
    home, away = served.folder / "session", Path(f"{served.folder}-away")
    home.rename(away)
    page.evaluate("() => picker.act([{ do: 'add', y: 33, x: 44 }])")
    page.wait_for_function("() => picker.queue.trouble")
    assert not home.exists()
    assert page.evaluate("picker.queue.pending().length") == 1
    away.rename(home)
    settled(page)
    assert (33.0, 44.0) in stored(served, 1).values()
    page.context.close()
