"""The page of particles: columns from the store, density and ranges in the browser, and the step that keeps the same particles."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from _browser import Tab, chromium
from _web import Made, Site, make_project, serving

from cryodask.stages.select import SelectParams, evaluate
from cryodask.store.particles import particle_columns
from cryodask.store.sets import SetReader
from cryodask.vocabulary import CTF_COLUMNS, OPTICS
from cryodask.web import particles
from cryodask.web.ledger import Ledger
from cryodask.web.sessions import Sessions

pytestmark = pytest.mark.heavy

COUNT = 3000
COLUMNS = ["class_log_likelihood", "class_number", "class_origin_x_angstrom", "class_origin_y_angstrom", "class_probability"]
READY = "document.body.dataset.ready === 'yes'"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, dict[str, np.ndarray]]:
    made = make_project(tmp_path_factory.mktemp("particles") / "session")
    return made, made.particles(COUNT)


@pytest.fixture(scope="module")
def shown(made: Any) -> Iterator[Site]:
    folder = made[0].project.path
    with serving(Sessions({"": [folder]}, Ledger(folder.parent / "audit")), cache=folder.parent / "cache") as site:
        yield site


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def tab(browser: Any, shown: Site) -> Iterator[Tab]:
    with contextlib.closing(Tab(browser, shown).log_in()) as made:
        yield made


@pytest.fixture
def one(tab: Tab) -> Iterator[Tab]:
    tab.page.goto("about:blank")  # what the page before says while it is left is not of this one
    tab.wrong.clear()
    tab.open("s/session/particles?step=import_particles").until(READY)
    yield tab
    assert tab.wrong == []


def unpacked(content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    (length,) = struct.unpack_from("<I", content)
    head = json.loads(content[4 : 4 + length])
    assert (4 + length) % 8 == 0
    values = np.frombuffer(content, "<f4", offset=4 + length).reshape(len(head["columns"]), head["rows"])
    return head, dict(zip([column["name"] for column in head["columns"]], values))


def value(tab: Tab, id: str, text: str) -> None:
    """Type into an input, or choose from a list, as a person does."""
    if id.startswith(("column", "x", "y", "step")):
        tab.page.select_option(f"#{id}", text)
    else:
        tab.page.fill(f"#{id}", text)
        tab.page.keyboard.press("Enter")


# --- the server ------------------------------------------------------------------------------------------------------------------
def test_columns_are_those_of_the_store_and_what_is_unknown_is_nan(shown, made):
    about = shown.json("/s/session/particles.json?step=import_particles")
    assert [column["name"] for column in about["columns"]] == COLUMNS
    assert about["first"] == ["class_log_likelihood", "class_probability"]
    assert about["columns"][2] | {"about": ""} == {"name": COLUMNS[2], "title": "class origin x", "unit": "Å", "about": ""}
    status, headers, content = shown.ask(f"/s/session/particles/columns?step=import_particles&names={','.join(COLUMNS)}")
    assert (status, headers["cache-control"]) == (200, "no-store")
    head, found = unpacked(content)
    assert head["rows"] == COUNT
    for name in COLUMNS:
        wanted = made[1][name].astype(np.float32)
        np.testing.assert_array_equal(found[name], np.where(wanted == -1, np.nan, wanted) if name == "class_number" else wanted)


def test_the_columns_that_are_listed_are_those_that_can_be_read(made):
    project = made[0].project
    ref = project.product("import_particles", "particles")
    sets = SetReader(project)
    read = particle_columns(project, ref, sets.ids(ref), sets=sets)
    assert set(sets.known(ref)) == set(read)
    assert project.sets._kept == {}  # a reader of one's own leaves nothing in that of the project


def test_picks_have_their_positions_and_the_ctf_of_their_exposures(made):
    project = made[0].project
    parts = {"position": "pick/k1", "score": "pick/k1"}
    exposures = {"ctf": "ctf/k1", "optics": "motion/k1", "field": "motion/k1"}
    ref = project.product("pick", "particles").model_copy(update={"parts": parts, "exposures": exposures, "threshold": None})
    sets = SetReader(project)
    known = sets.known(ref)
    assert set(known) >= {"pick_score", "position_y_angstrom", "position_x_angstrom", "defocus_u_angstrom"}
    read = particle_columns(project, ref, sets.ids(ref), sets=sets)
    # what the exposures do not have after all is listed, and unknown for every particle
    assert set(read) <= set(known)
    assert set(known) - set(read) <= {*CTF_COLUMNS, *OPTICS}


def test_the_stamp_differs_between_sets_only(made):
    project = made[0].project
    made[0].particles(100, label="fewer")
    stamps = [
        unpacked(particles.packed(project, label, names))[0]["stamp"]
        for label, names in (("import_particles", COLUMNS[:1]), ("import_particles", COLUMNS[1:]), ("fewer", COLUMNS[:1]))
    ]
    assert stamps[0] == stamps[1] != stamps[2]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("step=import_particles&names=nonsense", "no column nonsense"),
        ("step=import_particles&names=particle_id", "no column particle_id"),
        ("step=nothing&names=class_number", "no step nothing"),
        ("step=motion&names=class_number", "no step motion"),
        ("step=import_particles&names=" + ",".join(["class_number"] * 9), "at most 8"),
        ("step=import_particles", "names"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(shown, query, said):
    status, _, body = shown.ask(f"/s/session/particles/columns?{query}")
    assert status in {400, 422}
    assert said in json.loads(body)["what"]


def test_a_set_of_no_particles_and_a_session_without_any_are_pages(tmp_path):
    made = Made(tmp_path / "session")
    made.register("one")
    with serving(Sessions({"": [tmp_path]}, Ledger(tmp_path / "audit")), cache=tmp_path / "cache") as site:
        assert b"No step has given particles yet." in site.ask("/s/session/particles")[2]
        made.particles(0)
    head, found = unpacked(particles.packed(made.project, "import_particles", COLUMNS[:2]))
    assert head["rows"] == 0
    assert [len(values) for values in found.values()] == [0, 0]


def test_a_project_that_vanishes_is_said(tmp_path):
    made = make_project(tmp_path / "session")
    made.particles(10)
    with serving(Sessions({"": [tmp_path]}, Ledger(tmp_path / "audit")), cache=tmp_path / "cache") as site:
        assert site.ask("/s/session/particles.json?step=import_particles")[0] == 200
        made.project.path.rename(tmp_path / "aside")
        assert site.ask("/s/session/particles")[0] == 200
        for path in ("particles.json?step=import_particles", "particles/columns?step=import_particles&names=class_number"):
            status, _, body = site.ask(f"/s/session/{path}")
            assert status == 409
            assert str(made.project.path) in json.loads(body)["what"]


# --- the page --------------------------------------------------------------------------------------------------------------------
def test_counts_and_step_are_those_of_the_stage_that_selects(one, made):
    value(one, "column-0", "class_number")
    value(one, "to-0", "1")
    value(one, "column-1", "class_log_likelihood")
    value(one, "from-1", "55.5")
    value(one, "column-2", "class_probability")
    value(one, "from-2", "0.25")
    value(one, "to-2", "0.75")
    one.until("document.getElementById('within-2').textContent")
    one.page.click("#as-step")
    ((name, params),) = yaml.safe_load(one.until("document.getElementById('yaml').textContent"))[0].items()
    assert (name, params["from"]) == ("select", {"particles": "import_particles"})
    where = SelectParams(where=params["where"]).where
    assert where.count(" and ") == 3
    kept = int(evaluate(where, made[1], COUNT).sum())
    assert 100 < kept < COUNT / 2
    assert one.text("kept") == f"{kept:,} of {COUNT:,}"
    for n, condition in enumerate(
        ("class_number <= 1", "class_log_likelihood >= 55.5", "class_probability >= 0.25 and class_probability <= 0.75")
    ):
        assert one.text(f"within-{n}") == f"{int(evaluate(condition, made[1], COUNT).sum()):,}"
    one.page.click("#clear")
    one.until(f"document.getElementById('kept').textContent === '{COUNT:,} of {COUNT:,}'")
    one.page.click("#as-step")
    one.until("document.getElementById('toasts').textContent.includes('Set a range first')")


def test_a_box_that_is_drawn_sets_the_ranges_of_both_columns(one, made):
    value(one, "y", "class_origin_y_angstrom")
    box = one.page.locator("#density").bounding_box()
    assert box is not None
    one.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.3)
    one.page.mouse.down()
    one.page.mouse.move(box["x"] + box["width"] * 0.95, box["y"] + box["height"] * 0.7, steps=3)
    one.page.mouse.up()
    limits = [float(one.ask(f"document.getElementById('{side}-{n}').value")) for n in (0, 1) for side in ("from", "to")]
    assert [one.ask(f"document.getElementById('column-{n}').value") for n in (0, 1)] == ["class_log_likelihood", "class_origin_y_angstrom"]
    x, y = made[1]["class_log_likelihood"], made[1]["class_origin_y_angstrom"]
    kept = ((x >= limits[0]) & (x <= limits[1]) & (y >= limits[2]) & (y <= limits[3])).sum()
    assert one.text("kept") == f"{kept:,} of {COUNT:,}"
    # what is right of the middle and around zero is the group with a likelihood of 60
    assert limits[0] > 30
    assert limits[2] < 0 < limits[3]


def test_density_is_drawn_where_the_particles_are_and_grey_outside_the_ranges(one):
    def inks() -> list[int]:
        """Painted pixels of the left and right half, and those of the colour of what is kept."""
        script = """() => {
            const canvas = document.getElementById('density'), left = 90, w = canvas.width - 106, h = canvas.height - 72;
            const copy = new OffscreenCanvas(w, h).getContext('2d', { willReadFrequently: true });
            copy.drawImage(canvas, -left, -14);
            const d = copy.getImageData(0, 0, w, h).data, found = [0, 0, 0];
            for (let i = 0; i < d.length; i += 4) if (d[i + 3]) {
                found[(i / 4) % w < w / 2 ? 0 : 1]++;
                if (d[i + 2] - d[i] > 60) found[2]++;
            }
            return found;
        }"""
        return list(one.ask(script))

    left, right, kept = inks()
    assert right > 1.3 * left > 100  # 70 % of the particles have the higher likelihood
    assert kept == left + right
    value(one, "to-0", "40")
    one.until("document.getElementById('within-0').textContent")
    now = inks()
    assert now[:2] == [left, right]
    assert 0.5 * left < now[2] < 1.2 * left


def test_the_arithmetic_of_the_page_is_that_of_numpy(one):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=2000).astype(np.float32), rng.normal(size=2000).astype(np.float32)
    x[::50] = np.nan
    keep = (rng.random(2000) < 0.5).astype(np.uint8)
    script = """async ([x, y, keep]) => {
        const { binned, extent, ticks, together, within } = await import('../../static/density.js');
        const floats = (a) => Float32Array.from(a, (v) => (v === null ? NaN : v));
        const found = binned(floats(x), floats(y), Uint8Array.from(keep), [-2, 2], [-1, 3], 16, 8);
        const nothing = new Float32Array(4).fill(NaN);
        return {
            all: [...found.all], kept: [...found.kept], outside: found.outside, extent: extent(floats(x)),
            none: extent(nothing), same: extent(new Float32Array(3).fill(7)), unknown: within(nothing, [null, 5]).count,
            both: together(4, [Uint8Array.of(1, 1, 0, 0), Uint8Array.of(1, 0, 1, 0)]).count, any: together(4, []).count,
            ticks: ticks(-0.31, 0.85), large: ticks(9800, 20100),
        };
    }"""
    found = one.ask(script, [[None if v != v else float(v) for v in x], y.tolist(), keep.tolist()])
    for name, some in (("all", np.ones(2000, bool)), ("kept", keep == 1)):
        wanted = np.histogram2d(y[some], x[some], [8, 16], [[-1, 3], [-2, 2]])[0][::-1]
        np.testing.assert_array_equal(np.reshape(found[name], (8, 16)), wanted)
    assert found["outside"] == 2000 - sum(found["all"])
    low, high = np.nanquantile(x, [0.005, 0.995])
    assert found["extent"] == pytest.approx([low, high], abs=0.04 * (high - low) + 0.15)
    assert found["none"] is None
    assert found["same"] == pytest.approx([6.65, 7.35])
    assert (found["unknown"], found["both"], found["any"]) == (0, 1, 4)
    assert found["ticks"] == [-0.2, 0, 0.2, 0.4, 0.6, 0.8]
    assert found["large"] == [10000, 12000, 14000, 16000, 18000, 20000]


def test_columns_are_read_again_together_when_the_particles_change(browser, tmp_path: Path):
    made = make_project(tmp_path / "session")
    made.particles(50)
    with serving(Sessions({"": [tmp_path / "session"]}, Ledger(tmp_path / "audit")), cache=tmp_path / "cache") as site:
        with contextlib.closing(Tab(browser, site).log_in().open("s/session/particles")) as one:
            one.until("document.getElementById('count').textContent === '50 particles'")
            state = made.project.state.steps["import_particles"]
            made.particles(80, label="later")
            later = made.project.state.steps["later"].product("particles")
            assert later is not None
            state.products["particles:particles"] = later.model_copy(update={"step": "import_particles"})
            made.project.save()
            one.until("fetch('particles.json?step=later').then((answer) => answer.status)", ok=lambda status: status == 200)
            value(one, "x", "class_origin_x_angstrom")  # only this column is asked for, and the answer is of other particles
            one.until("document.getElementById('kept').textContent === '80 of 80'")
            value(one, "step", "import_particles")
            one.page.click("#again")
            one.until(READY)
            assert one.wrong == []


def test_ranges_are_set_by_keyboard_alone(one, made):
    press = one.page.keyboard.press
    for id, typed in (("column-0", "class number"), ("to-0", "1"), ("as-step", "")):
        for _ in range(40):
            press("Tab")
            if one.ask("document.activeElement.id") == id:
                break
        assert one.ask("document.activeElement.id") == id
        if typed:
            one.page.keyboard.type(typed)
        press("Enter")
        if id == "column-0":
            press("Escape")  # closes the list, where Enter has opened it
    assert "class_number <= 1" in one.until("document.getElementById('yaml').textContent")
    assert one.text("kept") == f"{int((made[1]['class_number'] == 1).sum()):,} of {COUNT:,}"


def test_a_step_without_columns_says_so(one):
    value(one, "step", "pick")
    one.until("!document.getElementById('empty').classList.contains('hidden')")
    assert one.ask("document.getElementById('plots').classList.contains('hidden')")
    value(one, "step", "import_particles")
    one.until(f"document.getElementById('count').textContent === '{COUNT:,} particles'")
