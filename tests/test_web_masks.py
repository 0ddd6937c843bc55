"""The mask of a map chosen by eye, in a real browser: by mouse and by keyboard, by two people at once, and what a run gets from it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _browser import Tab, chromium
from _web import Made, Site, make_project, serving

from cryodask.edits.frozen import frozen
from cryodask.stages.draw_mask import DrawMaskParams, draw_mask
from cryodask.web import maps
from cryodask.web.ledger import Ledger
from cryodask.web.sessions import Sessions

pytestmark = pytest.mark.heavy

READY = "document.body.dataset.ready === 'yes' && !chosen.busy() && !chosen.queue.pending().length"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Site, Made]]:
    made = make_project(tmp_path / "session", 3)
    made.refine()
    with serving(Sessions({"": [tmp_path]}, Ledger(tmp_path / "audit")), cache=tmp_path / "cache") as running:
        yield running, made


@contextlib.contextmanager
def opened(browser: Any, site: Site, **options: Any) -> Iterator[Tab]:
    one = Tab(browser, site, **options)
    try:
        yield one.log_in().open("s/session/mask").until(READY) and one
    finally:
        one.close()


def recipe(one: Tab) -> dict[str, Any]:
    one.until(READY)
    found: dict[str, Any] = json.loads(one.ask("JSON.stringify(chosen.recipe())"))
    return found


def test_a_mask_is_chosen_drawn_taken_back_and_used(browser: Any, site: tuple[Site, Made]) -> None:
    running, made = site
    with opened(browser, running) as one, opened(browser, running) as other:
        assert recipe(one)["threshold"] == "auto"
        before = one.ask("chosen.share()")
        one.page.fill("#extend_angstrom", "15")
        one.page.press("#extend_angstrom", "Enter")
        one.until("chosen.share()", ok=lambda share: share > 1.2 * before)
        one.page.select_option("#t-kind", "none")
        one.until("chosen.share()", ok=lambda share: share == 0)
        assert one.ask("document.getElementById('use').disabled")
        # a ball by a click on the section across z, half way from the middle to the right border: x is 30 A, y and z are 0
        one.page.fill("#radius", "12")
        box = one.page.locator("#over-0").bounding_box()
        one.page.mouse.click(box["x"] + 0.75 * box["width"], box["y"] + 0.5 * box["height"])
        one.until("chosen.recipe().strokes.length === 1")
        # the other person sees it, and draws a line on the section across x
        other.until("chosen.recipe().strokes.length === 1")
        box = other.page.locator("#over-2").bounding_box()
        other.page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.3 * box["height"])
        other.page.mouse.down()
        other.page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.3 * box["height"], steps=8)
        other.page.mouse.up()
        one.until("chosen.recipe().strokes.length === 2")
        (ball,), line = (stroke["points"] for stroke in recipe(one)["strokes"])
        # voxel 20 of 40 is the centre; half a section of 40 voxels lies half a voxel below it
        assert ball == pytest.approx([0.0, -1.5, 28.5], abs=1.6)
        assert len(line) > 3
        assert {point[2] for point in line} == {0.0}
        assert [line[0][0], line[-1][0]] == pytest.approx([22.5, 22.5], abs=1.6)
        assert [line[0][1], line[-1][1]] == pytest.approx([-25.5, 10.5], abs=4)
        other.page.click("#undo")
        one.until("chosen.recipe().strokes.length === 1")
        other.until("chosen.recipe().strokes.length === 1")
        other.page.click("#clear")
        one.until("chosen.recipe().strokes.length === 0")
        other.until(READY)
        other.page.click("#undo")
        one.until("chosen.recipe().strokes.length === 1")
        one.until("+document.getElementById('surface').dataset.veil > 50")
        one.until(READY)
        one.page.click("#use")
        one.until("document.getElementById('frozen').textContent.includes('froze on')")
        assert "no step draw_mask" in one.text("frozen")
        assert one.wrong == other.wrong == []
    used = frozen(made.project.path, "masks", "refine3d/a1")
    assert used is not None
    # what is recorded are numbers, from which the stage makes the mask
    params = DrawMaskParams.model_validate(used.content)
    made_of = made.project.generation("refine3d")
    volume = np.asarray(made_of.read(made_of.committed()[0], "final_map"))
    mask = draw_mask.process(params, final_map=volume, map_pixel_size_angstrom=3.0, context=None)["solvent_mask"]
    assert np.unravel_index(mask.argmax(), mask.shape)[0] in range(17, 24)
    where = np.argwhere(mask > 0.5)
    assert where.mean(0) == pytest.approx([20, 20 - 0.5, 20 + 9.5], abs=0.6)
    # 4/3 pi 12^3 / 27 cubic A of a voxel
    assert len(where) == pytest.approx(268, rel=0.06)


def test_a_mask_is_drawn_by_keyboard_alone(browser: Any, site: tuple[Site, Made]) -> None:
    with opened(browser, site[0]) as one:
        press = one.page.keyboard.press
        one.tab_to("threshold")
        press("ArrowRight")
        one.until("typeof chosen.recipe().threshold === 'number'")
        one.tab_to("edge_angstrom")
        one.page.keyboard.type("6")
        press("Enter")
        one.until("chosen.recipe().edge_angstrom === 6")
        one.tab_to("radius")
        one.page.keyboard.type("10")
        one.tab_to("over-1")
        for key in ("ArrowRight", "ArrowRight", "ArrowUp", "PageUp", "Enter"):
            press(key)
        one.until("chosen.recipe().strokes.length === 1")
        press("Delete")
        one.until("chosen.recipe().strokes.length === 2")
        first, second = recipe(one)["strokes"]
        assert [first["erase"], second["erase"]] == [False, True]
        assert first["points"] == second["points"]
        # two steps of half a radius to the right, one up, one section up along y
        assert first["points"][0] == pytest.approx([5.0, 4.5, 10.0], abs=1.6)
        assert "Mark at z 5" in one.text("mark")
        one.page.focus("#undo")
        press("Enter")
        one.until("chosen.recipe().strokes.length === 1")
        one.until(READY)
        one.page.focus("#use")
        press("Enter")
        one.until("document.getElementById('frozen').textContent.includes('froze on')")
        assert one.wrong == []


def test_a_map_that_is_computed_again_has_no_mask_yet_and_offers_the_former(browser: Any, site: tuple[Site, Made]) -> None:
    running, made = site
    one = {"id": "1" * 32, "n": 1, "do": "set", "of": "refine3d/a1", "name": "extend_angstrom", "value": 21.0}
    assert running.json("/s/session/mask/ops", method="POST", sent={"ops": [one]})["stored"] == 1
    assert running.json("/s/session/mask/freeze", method="POST", sent={"of": "refine3d/a1"})["edits"] == 5
    with opened(browser, running) as page:
        made.refine(44, key="b2")
        assert running.ask("/s/session/mask/freeze", "POST", sent={"of": "refine3d/a1"})[0] == 409
        page.open("s/session/mask").until(READY)
        assert recipe(page)["extend_angstrom"] == 7
        assert "before somebody says so" in page.text("frozen")
        page.page.click("#former")
        page.until("chosen.recipe().extend_angstrom === 21")
        assert page.wrong == []
    lines = Ledger(Path(made.project.path).parent / "audit").records()
    assert [line["action"] for line in lines] == ["edit masks", "freeze masks", "edit masks"]


def test_the_mask_of_a_class_is_chosen_on_the_map_of_that_class(site: tuple[Site, Made]) -> None:
    running, made = site
    place = made.sort()
    steps = running.ask("/s/session/maps", headers={"Accept": "text/html"})[2].decode()
    assert "<option>classify3d.class1</option><option selected>classify3d.class2</option>" in steps
    about = running.json("/s/session/map/classify3d.class2")
    assert (about["shape"], about["mask"]) == ([40, 40, 40], True)
    assert "0.3" in about["figures"].values()

    def centre(path: str) -> float:
        raw = running.ask(f"/s/session/{path}")[2]
        length = int.from_bytes(raw[:4], "little")
        return float(np.frombuffer(raw, "<f4", 3 * json.loads(raw[4 : 4 + length])["vertices"], 4 + length).reshape(-1, 3)[:, 0].mean())

    # voxel n // 2 is at 0.5
    assert [centre(f"map/classify3d.class{k}/surface") for k in (1, 2)] == pytest.approx([-7.5, 9.5], abs=0.2)
    op = {"id": "2" * 32, "n": 1, "do": "set", "of": place, "name": "extend_angstrom", "value": 3.0}
    assert running.json("/s/session/mask/ops", method="POST", sent={"ops": [op]})["stored"] == 1
    assert running.json("/s/session/mask/classify3d.class2")["recipe"]["extend_angstrom"] == 3
    assert running.json("/s/session/mask/classify3d.class1")["recipe"]["extend_angstrom"] == 7
    assert [centre(f"mask/classify3d.class{k}/surface") for k in (1, 2)] == pytest.approx([-7.5, 9.5], abs=0.3)
    assert running.json("/s/session/mask/freeze", method="POST", sent={"of": place})["edits"] == 5
    used = frozen(made.project.path, "masks", place)
    assert used is not None
    assert used.content["extend_angstrom"] == 3
    for wrong in ("classify3d/b1", "classify3d/b1.class3", "classify3d/b1.other"):
        status, _, body = running.ask("/s/session/mask/ops", method="POST", sent={"ops": [{**op, "id": "3" * 32, "of": wrong}]})
        assert status == 400, body
    assert running.ask("/s/session/mask/classify3d.class3")[0] == 404


def test_a_surface_of_fewer_triangles_has_the_same_size_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    z, y, x = np.mgrid[:60, :60, :60] - 29.5
    ball = (20 - np.sqrt((z - 4) ** 2 + y**2 + x**2)).astype(np.float32)
    for most in (100_000, 3000):
        monkeypatch.setattr(maps, "MOST_TRIANGLES", most)
        raw = maps.surface_at(ball, 0.0)
        head = json.loads(raw[4 : 4 + int.from_bytes(raw[:4], "little")])
        vertices = np.frombuffer(raw, "<f4", 3 * head["vertices"], 4 + int.from_bytes(raw[:4], "little")).reshape(-1, 3)
        assert head["triangles"] < most
        assert np.linalg.norm(vertices - (0, 0, 4), axis=1).mean() == pytest.approx(20, abs=0.3)


@pytest.mark.parametrize("most", [100_000, 3000])
def test_a_surface_is_coloured_by_the_values_at_its_vertices(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Values that are z: those of the vertices are their z, however many voxels were averaged."""
    z, y, x = np.mgrid[:60, :60, :60] - 29.5
    monkeypatch.setattr(maps, "MOST_TRIANGLES", most)
    coloured = maps.Coloured(z.astype(np.float32), 4.0, 9.0, "local resolution, Å")
    raw = maps.surface_at((20 - np.sqrt(z**2 + y**2 + x**2)).astype(np.float32), 0.0, coloured)
    length = int.from_bytes(raw[:4], "little")
    head = json.loads(raw[4 : 4 + length])
    assert (head["low"], head["high"], head["label"]) == (4.0, 9.0, "local resolution, Å")
    vertices = np.frombuffer(raw, "<f4", 3 * head["vertices"], 4 + length).reshape(-1, 3)
    values = np.frombuffer(raw, "<f4", head["vertices"], 4 + length + 12 * (head["vertices"] + head["triangles"]))
    assert len(raw) == 4 + length + 16 * head["vertices"] + 12 * head["triangles"]
    assert np.abs(values - vertices[:, 2]).max() < 1e-3


def test_wrong_requests_are_explained(site: tuple[Site, Made]) -> None:
    running, _ = site
    assert running.ask("/s/session/mask/postprocess")[0] == 404
    assert running.ask("/s/session/mask/refine3d/surface?sigmas=nan")[0] == 422
    stroke = {"points": [[0, 0, 1e9]], "radius_angstrom": 3}
    for wrong, said in (
        ({"do": "draw", "stroke": stroke}, "less than or equal to 100000"),
        ({"do": "set", "name": "extend_angstrom", "value": "<b>"}, "Edit 1 is not valid"),
        ({"do": "set", "name": "threshold", "value": 1.0, "of": "refine3d/ff"}, "has no map refine3d/ff"),
        ({"do": "remove", "drawn": "d" * 32}, "Nothing was drawn"),
    ):
        status, _, body = running.ask(
            "/s/session/mask/ops", method="POST", sent={"ops": [{"id": "e" * 32, "n": 1, "of": "refine3d/a1", **wrong}]}
        )
        assert status == 400, body
        assert said in json.loads(body)["what"]
