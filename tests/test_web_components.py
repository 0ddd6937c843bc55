"""The space of components in a real browser: points, paths and regions by mouse and by keyboard, sets by two people, and bad input."""

from __future__ import annotations

import contextlib
import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from _browser import Tab, chromium
from _web import Made, Site, make_project, serving, wait_for
from PIL import Image

from cryodask.edits.frozen import frozen
from cryodask.edits.regions import Region, chosen
from cryodask.formats.mrc import read_map
from cryodask.kernels.isosurface import reduced
from cryodask.stage import SetView
from cryodask.stages.select_region import SelectRegionParams, select_region
from cryodask.web import component_maps, components
from cryodask.web.ledger import Ledger
from cryodask.web.sessions import Sessions

pytestmark = pytest.mark.heavy

READY = "document.body.dataset.ready === 'yes' && !chosen.busy() && !chosen.queue.pending().length"
HERE = "/s/session/components/variability"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@contextlib.contextmanager
def site_of(folder: Path, **varied: Any) -> Iterator[tuple[Site, Made, np.ndarray]]:
    made = make_project(folder / "session", 5)
    coordinates = made.vary(**varied)
    with serving(Sessions({"": [folder]}, Ledger(folder / "audit")), cache=folder / "cache") as running:
        yield running, made, coordinates


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Site, Made, np.ndarray]]:
    with site_of(tmp_path) as running:
        yield running


@contextlib.contextmanager
def opened(browser: Any, site: Site, **options: Any) -> Iterator[Tab]:
    one = Tab(browser, site, **options)
    try:
        yield one.log_in().open("s/session/components").until(READY) and one
    finally:
        one.close()


def regions(one: Tab) -> list[Any]:
    one.until(READY)
    found: list[Any] = json.loads(one.ask("JSON.stringify(chosen.state().regions)"))
    return found


def op(n: int, do: str, **more: Any) -> dict[str, Any]:
    return {"id": f"{n:032x}", "n": n, "do": do, "of": "variability/c1", **more}


def query(*given: Any) -> str:
    return f"regions={quote(json.dumps(list(given)))}"


SQUARE = {"components": [1, 2], "points": [[0, 0], [2, 0], [2, 2], [0, 2]]}
END = {"components": [1], "points": [[1.0], [9.0]]}


# --- the server ------------------------------------------------------------------------------------------------------------------
def test_densities_count_every_particle_once(site: tuple[Site, Made, np.ndarray]) -> None:
    running, _, coordinates = site

    def density(what: str) -> tuple[dict[str, Any], np.ndarray]:
        content = running.ask(f"{HERE}/density?{what}")[2]
        (length,) = struct.unpack_from("<I", content)
        head = json.loads(content[4 : 4 + length])
        return head, np.frombuffer(content, "<u4", offset=4 + length).reshape(head["down"], head["across"])

    head, counts = density("x=1&y=2&across=40&down=30")
    known = coordinates[:, np.isfinite(coordinates).all(0)]
    edges = [np.linspace(*head[axis], cells + 1) for axis, cells in (("x", 40), ("y", 30))]
    expected = np.histogram2d(*known, bins=edges)[0].T[::-1]
    # in single precision a particle on an edge may be in the next cell
    assert np.abs(counts - expected).sum() <= 4
    assert counts.sum() + head["outside"] == 2000
    assert head["outside"] < 30
    line, alone = density("x=2&y=0&across=50")
    assert alone.shape == (1, 50)
    assert line["y"] is None
    assert alone.sum() + line["outside"] == 2000


def test_a_region_has_the_particles_of_the_stage_by_half_set_and_exposure(site: tuple[Site, Made, np.ndarray]) -> None:
    running, made, coordinates = site
    inside = chosen([Region.model_validate(SQUARE)], coordinates)
    found = running.json(f"{HERE}/region?{query(SQUARE)}")
    assert found["particles"] == inside.sum() > 200
    generation = made.project.generation("variability")
    record = generation.committed()[0]
    ids, half = (np.asarray(generation.read(record, name)) for name in ("particle_id", "half_set"))
    assert found["halves"] == [[int(inside[half == k].sum()), 1000] for k in (0, 1)]
    rows = (ids >> 27) & 0xFFFF
    assert {row: (here, all_of_it) for row, _, here, all_of_it, _ in found["exposures"]} == {
        row: (int(inside[rows == row].sum()), 400) for row in range(5)
    }
    counts = [one[2] for one in found["exposures"]]
    assert counts == sorted(counts, reverse=True)
    # the two exposures without a micrograph have no page
    assert {one[1] for one in found["exposures"] if one[4]} == {"exposure_0", "exposure_1", "exposure_2"}
    columns = {f"component{j + 1}": coordinates[j] for j in range(2)}
    kept = select_region.functions(
        SelectRegionParams(regions=(SQUARE,)), {"particles": [SetView("v", ids, ("components",), lambda parts: columns)]}
    )
    assert len(kept["particle_id"]) == found["particles"]
    empty = running.json(f"{HERE}/region?{query({**SQUARE, 'points': [[50, 50], [51, 50], [51, 51]]})}")
    assert (empty["particles"], empty["exposures"], empty["in_exposures"]) == (0, [], 0)
    status, _, body = running.ask(f"{HERE}/particles.png?{query(END)}")
    assert status == 200
    # 24 images of 16 pixels, eight in a row, with a frame
    assert Image.open(io.BytesIO(body)).size == (8 * 18, 3 * 18)


def test_the_map_at_a_point_is_the_mean_plus_the_components_times_its_coordinates(
    site: tuple[Site, Made, np.ndarray], tmp_path: Path
) -> None:
    running, made, _ = site
    generation = made.project.generation("variability")
    record = generation.committed()[0]
    maps, series = (np.asarray(generation.read(record, f"component_{name}")) for name in ("map", "series"))
    status, headers, body = running.ask(f"{HERE}/map.mrc?point={quote('[1.5, -0.25]')}")
    assert status == 200
    assert headers["content-disposition"] == 'attachment; filename="variability_1.5_-0.25.mrc"'
    (tmp_path / "one.mrc").write_bytes(body)
    volume, pixel = read_map(tmp_path / "one.mrc")
    assert pixel == 4.0
    np.testing.assert_allclose(volume, series[0, 2] + 1.5 * maps[0] - 0.25 * maps[1], atol=1e-5)
    wait_for(lambda: not list((tmp_path / "cache").glob("*.mrc")), "the file to be removed once it was sent")

    def middle(point: str) -> np.ndarray:
        body = running.ask(f"{HERE}/surface?point={quote(point)}&sigmas=3")[2]
        (length,) = struct.unpack_from("<I", body)
        head = json.loads(body[4 : 4 + length])
        return np.frombuffer(body, "<f4", 3 * head["vertices"], 4 + length).reshape(-1, 3)

    # at +2 standard deviations the whole ball is at x = 8, at -2 at x = -8, of which the mean has one half each; voxel n // 2 is at 0.5
    assert middle("[2]").mean(0) == pytest.approx([8.5, 0.5, 0.5], abs=0.3)
    assert middle("[-2, 0]").mean(0) == pytest.approx([-7.5, 0.5, 0.5], abs=0.3)
    assert middle("[]").mean(0) == pytest.approx([0.5, 0.5, 0.5], abs=0.3)
    # one grey scale for all points, so a section through the ball that vanishes is black
    bright = [np.asarray(Image.open(io.BytesIO(running.ask(f"{HERE}/section.png?point=[{z}]&axis=2&at=0.77")[2]))).max() for z in (2, -2)]
    assert bright[0] == 255
    assert bright[1] < 10


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("postprocess", 404, "has no components"),
        ("variability/density?x=3&y=1", 400, "There is no component 3: there are 2"),
        ("variability/density?x=1&y=9", 422, "less than or equal to 6"),
        ("variability/density?x=1&y=2&across=100000", 422, "less than or equal to 600"),
        ("variability/surface?point=[1,2,3]", 400, "The point has 3 coordinates"),
        ("variability/surface?point=[NaN]", 400, "The point is not valid"),
        ("variability/section.png?point=[1e9]", 400, "The point is not valid"),
        ("variability/map.mrc?point=no", 400, "The point is not valid"),
        ("variability/region?regions=[", 400, "The regions are not valid"),
        (f"variability/region?{query({**SQUARE, 'components': [1, 5]})}", 400, "A region is of component 5, but there are 2"),
        (f"variability/region?{query({**SQUARE, 'points': [[0, 1]] * 201})}", 400, "at most 200"),
        (f"variability/region?regions={'x' * 20001}", 422, "at most 20000"),
        (f"variability/particles.png?{query({**END, 'points': [[50], [60]]})}", 400, "no particle images in this region"),
    ],
)
def test_wrong_requests_are_explained(wrong_site: Site, path: str, status: int, said: str) -> None:
    got, _, body = wrong_site.ask(f"/s/session/components/{path}")
    assert (got, said in json.loads(body)["what"]) == (status, True), body


@pytest.fixture(scope="module")
def wrong_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site_of(tmp_path_factory.mktemp("wrong")) as (running, _, _):
        yield running


def test_sets_of_an_analysis_that_was_recomputed_or_removed_are_refused(site: tuple[Site, Made, np.ndarray]) -> None:
    running, made, _ = site
    post = {"method": "POST"}
    assert running.ask("/s/session/components/freeze", **post, sent={"of": "variability/c1"})[0] == 400  # nothing is chosen
    assert running.json("/s/session/components/ops", **post, sent={"ops": [op(1, "draw", region=SQUARE, reason="open")]})["stored"] == 1
    for wrong, said in (
        (op(2, "draw", region={**SQUARE, "components": [1, 3]}), "There is no component 3: variability/c1 has 2"),
        (op(2, "draw", region=SQUARE) | {"of": "variability/ff"}, "has no analysis variability/ff"),
        (op(2, "draw", region=SQUARE) | {"of": "classify2d/k1"}, "of"),
        (op(2, "remove", drawn="d" * 32), "Nothing was drawn"),
    ):
        status, _, body = running.ask("/s/session/components/ops", **post, sent={"ops": [wrong]})
        assert (status, said in json.loads(body)["what"]) == (400, True), body
    many = [op(100 + n, "draw", region=END) for n in range(50)]
    status, _, body = running.ask("/s/session/components/ops", **post, sent={"ops": many})
    assert (status, "More than 50 regions" in json.loads(body)["what"]) == (400, True)
    assert running.json("/s/session/components/freeze", **post, sent={"of": "variability/c1"})["who"]
    assert running.json(HERE)["frozen"]["current"] is True
    made.vary(500, key="c2")
    assert running.ask("/s/session/components/freeze", **post, sent={"of": "variability/c1"})[0] == 409
    now = running.json(HERE)
    assert (now["of"], now["particles"], now["regions"], now["frozen"]) == ("variability/c2", 500, [], None)
    lines = Ledger(Path(made.project.path).parent / "audit").records()
    assert [line["action"] for line in lines] == ["edit regions", "freeze regions"]


def test_extents_without_coordinates_and_with_an_outlier() -> None:
    assert components._extent(np.full(5, np.nan, np.float32)) == (-1.0, 1.0)
    assert components._extent(np.zeros(0, np.float32)) == (-1.0, 1.0)
    values = np.append(np.linspace(0, 1, 1001), 1000.0).astype(np.float32)
    low, high = components._extent(values)
    # half as far again as 99 % of the particles, which lie from 0.005 to 0.996, and a little room
    assert (low, high) == pytest.approx((-0.02, 1.51), abs=0.01)


def test_blocks_of_pixels_are_averaged_for_the_sample_of_images() -> None:
    image = np.arange(200.0 * 200).reshape(200, 200)
    assert component_maps._SIDE_PX == 96
    assert reduced(image[None].repeat(3, 0), 96)[0].shape == (66, 66)


# --- the page --------------------------------------------------------------------------------------------------------------------
def test_a_point_a_path_and_a_region_by_mouse_and_the_set_of_two_people(browser: Any, site: tuple[Site, Made, np.ndarray]) -> None:
    running, made, coordinates = site
    with opened(browser, running) as one, opened(browser, running) as other:
        assert "Component 2 is noise" in one.text("noise")
        box, mouse = one.page.locator("#plane").bounding_box(), one.page.mouse

        def at(a: float, b: float) -> tuple[float, float]:
            return box["x"] + a * box["width"], box["y"] + b * box["height"]

        mouse.click(*at(0.8, 0.3))
        one.until("chosen.point()[0] > 1 && chosen.point()[1] > 0.5")
        assert one.text("h-map").startswith("Map at ")
        one.page.check("[name=tool][value=path]")
        mouse.click(*at(0.3, 0.5))
        mouse.click(*at(0.6, 0.5))
        mouse.click(*at(0.6, 0.2))
        one.until("chosen.path().length === 3")
        begin, end = (one.ask(f"chosen.path()[{k}]") for k in (0, 2))
        assert one.ask("chosen.point()") == begin
        one.page.fill("#steps", "5")
        one.page.press("#steps", "Enter")
        one.until("document.getElementById('along-text').textContent === '1 of 5'")
        one.page.focus("#along")
        for _ in range(4):
            one.page.keyboard.press("ArrowRight")
        one.until("document.getElementById('along-text').textContent === '5 of 5'")
        assert one.ask("chosen.point()") == pytest.approx(end)
        one.until(f"document.body.dataset.shown === JSON.stringify(chosen.point()) && {READY}")
        # the series along a component, from its 5 % to its 95 % quantile
        one.page.click("#series")
        one.until(f"chosen.path()[0][0] < -1 && {READY}")
        assert [point[0] for point in one.ask("chosen.path()")] == pytest.approx(np.nanquantile(coordinates[0], [0.05, 0.95]), abs=0.02)
        # a box, then a lasso
        one.page.check("[name=tool][value=box]")
        mouse.move(*at(0.6, 0.1))
        mouse.down()
        mouse.move(*at(0.9, 0.7), steps=4)
        mouse.up()
        one.until("+document.body.dataset.region > 0")
        drawn = Region.model_validate(one.ask("chosen.region()"))
        count = int(chosen([drawn], coordinates).sum())
        assert one.ask("+document.body.dataset.region") == count
        one.until("document.getElementById('images').naturalWidth === 144")
        assert "Of half-set 1" in one.text("halves")
        assert one.ask("document.querySelector('#exposures a').getAttribute('href')").startswith("pick/")
        one.page.fill("#reason", "open")
        one.page.click("#keep")
        one.until("chosen.state().regions.length === 1")
        # the other person sees it, and adds a lasso
        other.until("chosen.state().regions.length === 1")
        other.page.check("[name=tool][value=lasso]")
        mouse = other.page.mouse
        mouse.move(*at(0.3, 0.3))
        mouse.down()
        for place in ((0.5, 0.3), (0.5, 0.6), (0.3, 0.6)):
            mouse.move(*at(*place), steps=3)
        mouse.up()
        other.until("+document.body.dataset.region > 0")
        other.page.click("#keep")
        one.until("chosen.state().regions.length === 2")
        assert [(r["reason"], r["particles"] > 0) for r in regions(one)] == [("open", True), ("", True)]
        other.until(READY)
        other.page.click("#undo")
        one.until("chosen.state().regions.length === 1")
        one.until(READY)
        one.until("!document.getElementById('use').disabled")
        one.page.click("#use")
        one.until("document.getElementById('frozen').textContent.includes('froze on')")
        assert "no step select_region" in one.text("frozen")
        assert one.wrong == other.wrong == []
    used = frozen(made.project.path, "regions", "variability/c1")
    assert used is not None
    assert used.content["reasons"] == ["open"]
    assert chosen([Region.model_validate(r) for r in used.content["regions"]], coordinates).sum() == count


def test_everything_by_keyboard_alone(browser: Any, site: tuple[Site, Made, np.ndarray]) -> None:
    with opened(browser, site[0]) as one:
        press = one.page.keyboard.press
        one.tab_to("plane")
        for key in ("ArrowRight", "ArrowRight", "ArrowUp", "Enter"):
            press(key)
        one.until("chosen.point()[0] > 0")
        assert one.text("plane-text").startswith("Mark at ")
        one.page.focus("[name=tool]:checked")
        for _ in range(3):
            press("ArrowRight")  # to the lasso
        one.tab_to("plane")
        for key in ("Enter", *["ArrowRight"] * 8, "Enter", *["ArrowUp"] * 8, "Enter"):
            press(key)
        one.until("+document.body.dataset.region > 0")
        assert len(one.ask("chosen.region()")["points"]) == 3
        press("Backspace")
        one.until("chosen.region() === null")
        press("Enter")
        one.until("+document.body.dataset.region > 0 && !document.getElementById('keep').disabled")
        one.tab_to("keep")
        press("Enter")
        one.until("chosen.state().regions.length === 1")
        one.until(READY)
        one.until("!document.getElementById('use').disabled")
        one.tab_to("use")
        press("Enter")
        one.until("document.getElementById('frozen').textContent.includes('froze on')")
        assert one.wrong == []


def test_a_single_component_of_noise_is_a_histogram_with_a_warning(browser: Any, tmp_path: Path) -> None:
    with site_of(tmp_path, components=1, agreement=0.2, images=False) as (running, _, coordinates), opened(browser, running) as one:
        assert one.text("noise").startswith("The components are noise")
        assert one.ask("getComputedStyle(document.getElementById('y-label')).display") == "none"
        one.page.check("[name=tool][value=box]")
        box, mouse = one.page.locator("#plane").bounding_box(), one.page.mouse
        mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.3 * box["height"])
        mouse.down()
        mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.5 * box["height"], steps=4)
        mouse.up()
        one.until("+document.body.dataset.region > 0")
        region = Region.model_validate(one.ask("chosen.region()"))
        assert region.components == (1,)
        assert one.ask("+document.body.dataset.region") == chosen([region], coordinates).sum()
        assert one.ask("document.getElementById('images').classList.contains('hidden')")
        assert one.wrong == []


def test_a_project_without_components_says_what_gives_them(browser: Any, tmp_path: Path) -> None:
    make_project(tmp_path / "session", 3)
    with serving(Sessions({"": [tmp_path]}, Ledger(tmp_path / "audit")), cache=tmp_path / "cache") as running:
        one = Tab(browser, running).log_in().open("s/session/components")
        assert "No step variability has finished" in one.text("main")
        assert "Heterogeneity" not in one.open("s/session/maps").text("main")
        assert one.wrong == []
        one.close()
