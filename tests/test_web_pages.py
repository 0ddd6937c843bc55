"""The pages in a real browser: drawn without errors, live, by keyboard, accessible, behind prefixes and a proxy, whatever happens."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _browser import Tab, chromium
from _web import HEIGHT, TOKEN, WIDTH, Command, Made, Site, make_project, serving, wait_for

from cryodask.run.events import Counted, ExposureQuarantined
from cryodask.run.events.log import EventLog
from cryodask.web.directory import Directory
from cryodask.web.ledger import Ledger
from cryodask.web.login import FacilityLogin
from cryodask.web.passwords import PasswordFile
from cryodask.web.sessions import Sessions
from cryodask.web.settings import LoginSettings

pytestmark = pytest.mark.heavy

PAGES = ["", "s/session/", "s/session/maps?step=postprocess", "s/session/history", "s/session/data", "s/session/people"]
PAGES += ["cluster", "admin/", "account"]
CHOSEN = ["s/session/pick/0", "s/session/classes", "s/session/choose", "s/session/particles", "s/session/mask", "s/session/components"]
PAGES += CHOSEN
PAGES += ["s/session/history?first=postprocess%40k1&second=postprocess%40k2", "nothing/here"]
DRAWN = "document.body.dataset.sequence > 0 && document.getElementById('d-name').textContent !== 'No exposure chosen'"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("pages")
    made = make_project(folder / "session", 6)
    made.finish(key="k2", sharpening=-120.0)
    made.particles(500)
    made.refine()
    made.local_resolution()
    made.vary(500)
    (folder / "templates").mkdir()
    (folder / "templates" / "standard.yaml").write_text('name: "{name}"\nmicroscope: {pixel_size_angstrom: {pixel_size}}\n')
    shown = Sessions({"krios": [folder / "session"]}, Ledger(folder / "audit"))
    with serving(shown, cache=folder / "cache", templates=folder / "templates") as site:
        yield site


@contextlib.contextmanager
def site_of(folder: Path, prefix: str = "") -> Iterator[tuple[Site, Made]]:
    made = make_project(folder / "session", 5)
    with serving(Sessions({"": [folder]}, Ledger(folder / "audit")), cache=folder / "cache", prefix=prefix) as site:
        yield site, made


@contextlib.contextmanager
def tab(browser: Any, site: Site, **options: Any) -> Iterator[Tab]:
    made = Tab(browser, site, **options)
    try:
        yield made.log_in()
    finally:
        made.close()


# --- every page ------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def inspected(browser: Any, shown: Site) -> Iterator[Tab]:
    # axe is evaluated in the page, which the pages' own policy forbids
    with tab(browser, shown, width=390, dark=True, bypass_csp=True) as one:
        yield one


@pytest.fixture(scope="module")
def walked(browser: Any, shown: Site) -> Iterator[Tab]:
    with tab(browser, shown) as one:
        yield one


@pytest.mark.parametrize("path", PAGES)
def test_every_page_is_accessible_fits_and_asks_no_other_host(inspected, shown, path):
    """Dark and light, on a telephone and on a screen: a page is opened once, and follows."""
    from axe_playwright_python.sync_playwright import Axe

    one = inspected
    one.page.set_viewport_size({"width": 390, "height": 900})
    one.page.emulate_media(color_scheme="dark")
    one.page.goto("about:blank")
    one.wrong.clear()
    one.open(path)
    if path == "s/session/":
        one.until(DRAWN)
        one.until("document.querySelectorAll('.uplot canvas').length >= 7")
    if path in CHOSEN:
        one.until("document.body.dataset.ready === 'yes'")
    one.ask(Axe().axe_script)
    options = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"], "resultTypes": ["violations"]}
    for width, scheme in ((390, "dark"), (390, "light"), (1400, "light"), (1400, "dark")):
        one.page.set_viewport_size({"width": width, "height": 900})
        one.page.emulate_media(color_scheme=scheme)
        one.until("document.documentElement.scrollWidth", f"{path} to fit", ok=lambda found, width=width: found <= width)
        found = one.ask("async (options) => (await axe.run(options)).violations", options)
        assert [(v["id"], [n["html"][:160] for n in v["nodes"][:4]]) for v in found] == [], (path, width, scheme)
    assert one.hosts - {"about"} == {shown.address.removeprefix("http://")}
    assert [w for w in one.wrong if "404" not in w] == []


@pytest.mark.parametrize("path", [p for p in PAGES if p != "nothing/here"])
def test_every_page_is_drawn_without_errors_under_its_own_policy(walked, path):
    one = walked
    one.page.goto("about:blank")  # what the page before says while it is left is not of this one
    one.wrong.clear()
    one.open(path)
    if path == "s/session/":
        one.until(DRAWN)
    if "/maps" in path:
        one.until("document.getElementById('surface').dataset.triangles > 100")
        one.until("document.querySelectorAll('#fsc .uplot').length === 1")
    if "first=" in path:
        one.until("document.querySelectorAll('#fsc .uplot').length === 1")
        assert "sharpening" in one.text("main")
    one.page.wait_for_load_state("networkidle" if path not in {"s/session/", "cluster"} else "load")
    assert one.wrong == []


def test_a_surface_is_coloured_by_local_resolution_with_its_scale(walked):
    """The better resolved side of the ball is blue, the other red; a map without local resolution has one colour and no scale."""
    one = walked
    one.open("s/session/maps?step=local_resolution")
    one.until("document.getElementById('surface').dataset.triangles > 100")
    one.until("document.getElementById('scale-low').textContent === '3.0'")
    assert (one.text("scale-high"), one.text("scale-label")) == ("9.0", "local resolution, Å")
    look = "(share) => { const c = document.getElementById('surface'); "
    look += "return [...c.getContext('2d').getImageData(share * c.width, c.height / 2, 1, 1).data]; }"
    one.until("document.getElementById('surface').getContext('2d').getImageData(230, 230, 1, 1).data[3] === 255")
    left, right = one.ask(look, 0.15), one.ask(look, 0.85)
    assert left[2] > 1.5 * left[0], left
    assert right[0] > 2 * right[2], right
    one.page.select_option("#step", "postprocess")
    one.until("document.getElementById('scale').classList.contains('hidden')")


def test_the_log_in_page_is_accessible(browser, shown):
    from axe_playwright_python.sync_playwright import Axe

    one = Tab(browser, shown, bypass_csp=True).open("s/session/maps")
    assert one.page.url.endswith("login?next=s/session/maps")
    assert Axe().run(one.page).violations_count == 0
    one.page.fill("input[name=token]", TOKEN)
    one.page.keyboard.press("Enter")
    one.page.wait_for_url("**/s/session/maps")
    one.close()


# --- a session -------------------------------------------------------------------------------------------------------------------
def test_the_micrograph_stands_upright_and_its_picks_are_where_they_belong(browser, shown):
    with tab(browser, shown) as one:
        one.open("s/session/").until(DRAWN)
        # rows run upwards: what is bright in the first rows and columns is shown at the bottom left
        bright = """() => {
            const canvas = document.getElementById("d-micrograph"), {width: w, height: h} = canvas;
            const mean = (x, y) => {
                const d = canvas.getContext("2d").getImageData(x, y, w * 0.1, h * 0.1).data;
                let sum = 0;
                for (let i = 0; i < d.length; i += 4) sum += d[i + 3] ? d[i] : 0;
                return (4 * sum) / d.length;
            };
            return [mean(0, h * 0.9), mean(0, 0), mean(w * 0.9, h * 0.9)];
        }"""
        one.page.uncheck("#d-show")
        left, top, right = one.until(f"({bright})()", ok=lambda found: found[0] > 100)
        assert left > top + 20
        assert left > right + 20
        picks = shown.json("/s/session/exposure/0")["picks"]
        one.page.check("#d-show")
        green = """([x, y]) => {
            const canvas = document.getElementById("d-micrograph"), d = canvas.getContext("2d").getImageData(x - 2, y - 2, 5, 5).data;
            let most = -255;
            for (let i = 0; i < d.length; i += 4) most = Math.max(most, d[i + 1] - d[i]);
            return most;
        }"""
        scale = 640 / WIDTH
        for x, y, accepted in zip(picks["x"], picks["y"], picks["accepted"]):
            at = [(x + 0.5) * scale + 9, (HEIGHT - y - 0.5) * scale]
            if accepted and 20 < at[0] < 620 and 20 < at[1] < 490:
                assert one.ask(green, at) > 40, (x, y)


def test_a_range_is_brushed_saved_and_seen_by_others(browser, tmp_path):
    with site_of(tmp_path) as (site, _), tab(browser, site) as one, tab(browser, site) as other:
        one.open("s/session/").until(DRAWN)
        assert one.text("c-kept") == "5"
        box = one.page.locator(".plot .u-over").nth(3).bounding_box()
        assert box is not None
        one.page.mouse.move(box["x"] + 100, box["y"] + 2)
        one.page.mouse.down()
        one.page.mouse.move(box["x"] + 100, box["y"] + box["height"] * 0.6, steps=5)
        one.page.mouse.up()
        kept = one.until("document.getElementById('c-kept').textContent", ok=lambda text: text != "5")
        one.page.click("#save")
        one.until("document.getElementById('saved').textContent")
        assert set(site.json("/s/session/thresholds")["ranges"]) == {"total_motion"}
        other.open("s/session/").until(DRAWN)
        assert other.text("c-kept") == kept
        other.page.click("#step")
        assert "largest_motion_angstrom" in other.until("document.getElementById('yaml').textContent")


def test_everything_works_by_keyboard_alone(browser, shown):
    with tab(browser, shown) as one:
        one.open("s/session/").until(DRAWN)
        press = one.page.keyboard.press
        focused = "document.activeElement.id || document.activeElement.className || document.activeElement.getAttribute('aria-label')"

        def tab_to(what: str) -> None:
            for _ in range(120):
                press("Tab")
                if what in str(one.ask(focused)):
                    return
            raise AssertionError(f"{what} cannot be reached")

        press("Tab")
        assert one.ask("document.activeElement.className") == "skip"
        press("Enter")
        tab_to("Defocus (µm): to")
        one.page.keyboard.type("1.495")
        press("Enter")
        one.until("document.getElementById('c-kept').textContent === '1'")
        outline = one.ask("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
        tab_to("clear")
        press("Enter")
        one.until("document.getElementById('c-kept').textContent === '6'")
        tab_to("f-sort")
        one.page.keyboard.type("Motion")
        tab_to("f-view")
        one.page.keyboard.type("table")
        one.until("document.querySelectorAll('#table tbody tr').length === 6")
        tab_to("plain")
        press("Enter")
        first = one.text("d-name")
        press("]")
        one.until("document.getElementById('d-name').textContent", ok=lambda text: text != first)
        one.open("s/session/maps").until("document.getElementById('surface').dataset.triangles > 100")
        look = "document.getElementById('surface').toDataURL()"
        before = one.ask(look)
        tab_to("surface")
        press("ArrowLeft")
        one.until(look, ok=lambda now: now != before)
        tab_to("sigmas")
        press("ArrowRight")
        one.until("document.getElementById('sigmas-text').textContent === '3.1'")


def test_forms_of_all_other_pages_work_by_keyboard_alone(browser, tmp_path):
    """Roles of people, tokens, a hand-over, two results side by side, a log-in and a log-out: what the pages of a facility ask for."""
    from axe_playwright_python.sync_playwright import Axe

    made = make_project(tmp_path / "krios" / "session", 4)
    made.finish(key="k2", sharpening=-120.0)
    passwords, directory = PasswordFile(tmp_path / "passwords"), Directory(Ledger(tmp_path / "people", private=True), ["anna"])
    passwords.write("anna", "a long password")
    login = FacilityLogin(LoginSettings(passwords=passwords.path), directory, "secret")
    shown = Sessions({"krios": [tmp_path / "krios"]}, Ledger(tmp_path / "audit", private=True))
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "wrong.yaml").write_text("name: x")
    (tmp_path / "templates" / "standard.yaml").write_text('name: "{name}"\nmicroscope: {pixel_size_angstrom: {pixel_size}}\n')
    templates = tmp_path / "templates"
    with (
        serving(shown, login, cache=tmp_path / "cache", templates=templates) as site,
        contextlib.closing(Tab(browser, site, bypass_csp=True)) as one,
    ):
        press, write = one.page.keyboard.press, one.page.keyboard.type
        name = "document.activeElement.name || document.activeElement.textContent"

        def to(what: str) -> None:
            for _ in range(60):
                press("Tab")
                if one.ask(name) == what:
                    return
            raise AssertionError(f"{what} cannot be reached")

        def then(act: str, path: str, text: str) -> None:
            to(act)
            press("Enter")
            one.until(f"location.href.endsWith('{path}') && document.body.textContent.includes('{text}')", text)
            one.page.wait_for_load_state("load")

        one.open("login")
        one.page.focus("[name=name]")
        write("anna")
        to("password")
        write("a long password")
        press("Enter")
        one.page.wait_for_url(site.address + "/")
        one.open("s/session/people")
        to("name")
        write("ben")
        to("role")
        press("ArrowDown")
        then("Save", "s/session/people", "ben")
        assert directory.people()["ben"].sessions == {"session": "member"}
        one.open("s/session/data")
        to("who")
        write("Professor B")
        then("Acknowledge", "s/session/data", "Acknowledged by Professor B")
        one.open("s/session/history")
        to("first")
        press("Space")
        to("second")
        press("ArrowDown")
        then("Compare", "postprocess%40k1", "Compared")
        one.open("account")
        to("about")
        write("a script")
        then("Make a token", "account", "Copy it now")
        one.open("admin/")
        to("name")
        write("carla")
        to("microscopes")
        press("Space")
        then("Save", "admin/", "carla")
        assert directory.people()["carla"].microscopes == {"krios"}
        # with people, tokens and templates in them, these pages fit a telephone, and are accessible
        for path in ("", "admin/", "account", "s/session/people", "s/session/data"):
            one.page.set_viewport_size({"width": 390, "height": 900})
            one.open(path)
            assert one.ask("document.documentElement.scrollWidth") <= 390, path
            for scheme in ("light", "dark"):
                one.page.emulate_media(color_scheme=scheme)
                found = Axe().run(one.page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]})
                assert [v["id"] for v in found.response["violations"]] == [], (path, scheme)
        one.page.set_viewport_size({"width": 1400, "height": 900})
        to("Log out")
        press("Enter")
        one.page.wait_for_url("**/login*")
        assert one.wrong == []


def test_exposures_appear_as_they_are_committed(browser, tmp_path):
    with site_of(tmp_path) as (site, made), tab(browser, site) as one:
        one.open("s/session/").until(DRAWN)
        made.register("a new exposure")
        one.until("document.getElementById('c-exposures').textContent === '6'")
        one.until("document.getElementById('gallery').textContent.includes('a new exposure')")
        one.page.click("#gallery [data-row='5']")
        one.until("document.getElementById('d-name').textContent === 'a new exposure'")
        made.commit(5)
        one.until("document.getElementById('c-done').textContent === '4'")
        one.until("document.querySelector('#gallery [data-row=\"5\"] img')?.naturalWidth > 0")
        one.until("document.getElementById('d-micrograph').getAttribute('aria-label').includes('9 picks')")
        made.fail(3, "no such file")
        one.until("document.getElementById('quarantine').textContent.includes('no such file')")
        assert one.wrong == []


def test_a_project_that_vanishes_or_changes_its_format_is_said_on_the_open_page(browser, tmp_path):
    with site_of(tmp_path) as (site, made), tab(browser, site) as one:
        made.refine()
        made.vary(100)
        one.open("s/session/").until(DRAWN)
        place = made.project.path / "project.json"
        content = place.read_text()
        place.write_text(json.dumps({**json.loads(content), "format": 99}))
        one.until("document.getElementById('problem').textContent.includes('format')")
        shutil.move(made.project.path, tmp_path / "aside")
        one.until("!document.getElementById('problem').classList.contains('hidden')")
        assert one.text("c-done") == "3"
        for path in (
            *("maps", "history", "exposure/0", "map/postprocess", "thumbnail/0.jpg", "quarantine", ""),
            *("mask", "mask/refine3d", "mask/refine3d/volume", "mask/refine3d/surface?of=map", "control"),
            *("components", "components/variability", "components/variability/density", "components/variability/surface"),
        ):
            status, _, body = site.ask(f"/s/session/{path}")
            assert status in {200, 404, 409}, (path, status)
            assert body
        shutil.move(tmp_path / "aside", made.project.path)
        place.write_text(content)
        one.until("document.getElementById('problem').classList.contains('hidden')")


def test_the_page_goes_on_when_the_server_is_killed_and_started_again(browser, tmp_path):
    made = make_project(tmp_path / "projects" / "session", 5)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    words = (tmp_path / "projects", "--token", TOKEN, "--port", port)
    with Command(*words, folder=tmp_path) as command, tab(browser, command.site) as one:
        one.open("s/session/").until(DRAWN)
        epoch = one.ask("document.body.dataset.epoch")
        command.process.kill()
        command.process.wait()
        made.commit(3)
        with Command(*words, folder=tmp_path):
            one.until("document.body.dataset.epoch", ok=lambda now: now != epoch)
            one.until("document.getElementById('c-done').textContent === '4'")
            one.page.click("#save")  # the cookie is still good
            one.until("document.getElementById('saved').textContent")


def test_a_browser_that_slept_for_a_day_shows_what_happened_meanwhile_and_that_it_must_log_in(browser, tmp_path):
    """Hidden, it listens to nothing; awake, it shows the state of now. Where its cookie has ended it says so, until somebody logs in."""
    hide = """hidden => {
        Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    with site_of(tmp_path) as (site, made), tab(browser, site) as one:
        one.open("s/session/").until(DRAWN)
        one.ask(hide, True)
        made.commit(3)
        made.register("of the night")
        one.page.wait_for_timeout(700)
        assert one.text("c-done") == "3"
        one.ask(hide, False)
        one.until("document.getElementById('c-done').textContent === '4'")
        one.until("document.getElementById('gallery').textContent.includes('of the night')")
        assert one.wrong == []
        one.ask(hide, True)
        one.context.clear_cookies()
        made.register("of the morning")
        one.ask(hide, False)
        one.until("document.getElementById('toasts').textContent.startsWith('You are logged out.')")
        assert one.ask("document.querySelector('#toasts a').href") == one.page.url
        assert "of the morning" not in one.text("gallery")
        one.log_in()
        one.ask(hide, True)
        one.ask(hide, False)
        one.until("document.getElementById('gallery').textContent.includes('of the morning')")
        assert one.text("toasts") == ""


# --- stored scripts --------------------------------------------------------------------------------------------------------------
EVIL = ['<img src=x onerror="window.pwned=1">', '"><script>window.pwned=1</script>', "'`${window.pwned=1}`"]
EVIL += ["</title><svg onload=window.pwned=1>"]


def test_names_and_messages_are_never_read_as_html(browser, tmp_path):
    folder = tmp_path / EVIL[0].replace("/", "")
    made = make_project(folder, names=[name.replace("/", "_") for name in EVIL])
    made.refine()
    made.vary(100)
    log, run = EventLog(folder, "r"), {"time": 1.0, "run": "r", "step": EVIL[2]}
    log(Counted(**run, seen=4, done=3, quarantined=1, running=0, waiting=0, workers=2))
    log(ExposureQuarantined(**run, row=3, name=EVIL[0], message=EVIL[1]))
    with serving(Sessions({EVIL[1]: [folder]}, Ledger(tmp_path / "audit")), cache=tmp_path / "cache") as site, tab(browser, site) as one:
        (session,) = site.json("/api/v1/sessions")
        said = (
            {"do": "set", "row": -1, "name": "note", "value": EVIL[1]},
            {"do": "set", "row": -1, "name": f"tag:{EVIL[0]}"[:44], "value": ""},
        )
        ops = [{"id": f"{n:032x}", "n": 1 + n, **one} for n, one in enumerate(said)]
        assert site.ask(f"/s/{session['id']}/choices/exposures/ops", "POST", sent={"ops": ops})[0] == 200
        below = ("", "maps", "mask", "components", "history", "data", "people", "classes", "choose", "particles", "pick/0")
        for path in ("", "admin/", *(f"s/{session['id']}/{name}" for name in below)):
            one.open(path)
            if path.endswith(f"{session['id']}/"):
                one.until(DRAWN)
                one.page.select_option("#f-view", "table")
                one.until("document.querySelectorAll('#table tbody tr').length === 4")
                one.until("document.getElementById('quarantine').textContent.includes('svg onload')")
            if path.endswith("components"):
                one.until("document.body.dataset.ready === 'yes'")
                one.page.check("[name=tool][value=box]")
                one.page.focus("#plane")
                for key in ("Enter", *["ArrowRight"] * 9, *["ArrowUp"] * 9, "Enter"):
                    one.page.keyboard.press(key)
                one.until("document.getElementById('exposures').textContent.includes('svg onload')")
            if path.endswith("history"):
                assert f"{EVIL[2]}: 4 seen = 3 done + 1 quarantined + 0 running + 0 waiting" in one.text("main")
                assert f"quarantined {EVIL[0]}: {EVIL[1]}" in one.text("main")
            assert one.ask("window.pwned === undefined"), path
            assert one.ask("document.querySelectorAll('main img[src=x], main script, [onload], [onerror]').length") == 0, path
        assert site.ask("/s/<script>alert(1)</script>/", headers={"Accept": "text/html"})[0] == 404


# --- behind others ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefix", ["/node/c01/8801", "/user/anna/proxy/8801"])
def test_pages_work_behind_a_prefix(browser, tmp_path, prefix):
    with site_of(tmp_path, prefix) as (site, made), tab(browser, site) as one:
        one.page.goto(f"{site.address}/?token={TOKEN}")
        assert one.page.url.endswith(f"{prefix}/")
        one.page.click("tbody th a")
        one.until(DRAWN)
        made.refine()
        made.commit(3)
        one.until("document.getElementById('c-done').textContent === '4'")
        one.page.click("text=Maps")
        one.until("document.getElementById('surface').dataset.triangles > 100")
        one.page.click("text=Choose a mask")
        one.until("+document.getElementById('surface').dataset.veil > 50")
        one.until("document.getElementById('section-2').naturalWidth === 40")
        made.vary(200)
        one.page.click("text=Maps")
        one.page.click("text=Heterogeneity")
        one.until("document.body.dataset.ready === 'yes' && document.getElementById('surface').dataset.triangles > 50")
        one.until("document.getElementById('section-2').naturalWidth === 32")
        assert one.wrong == []


NGINX = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log off; gzip on; gzip_types *; gzip_min_length 1; proxy_buffering on;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u;
  scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{port};
    proxy_http_version 1.1; proxy_set_header Host $http_host;
    location /cryo/ {{ proxy_pass http://127.0.0.1:{behind}/; }}
    location /node/c01/8801/ {{ proxy_pass http://127.0.0.1:{all}/; }}
    location /user/anna/proxy/8801/ {{ proxy_pass http://127.0.0.1:{all}/; }}
  }}
}}
"""


def test_pages_are_live_behind_nginx_with_gzip_and_buffering(browser, shown, tmp_path):
    """One session is watched while it grows; then every page is drawn without an error behind two prefixes."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        warnings.warn("nginx is not installed: its test is SKIPPED", stacklevel=1)
        pytest.skip("needs nginx")
    with site_of(tmp_path) as (site, made):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        settings = tmp_path / "nginx.conf"
        settings.write_text(NGINX.format(folder=tmp_path, port=port, behind=site.port, all=shown.port))
        process = subprocess.Popen([program, "-c", str(settings), "-e", str(tmp_path / "error.log")], stderr=subprocess.DEVNULL)
        front = Site(port, "/cryo")
        try:
            wait_for(lambda: _answers(front), "nginx to answer")
            with tab(browser, front) as one:
                one.open("s/session/").until(DRAWN)
                made.commit(3)
                one.until("document.getElementById('c-done').textContent === '4'")
                one.page.click("#save")
                one.until("document.getElementById('saved').textContent")
                assert one.wrong == []
            for prefix in ("/node/c01/8801", "/user/anna/proxy/8801"):
                with tab(browser, Site(port, prefix)) as one:
                    for path in [page for page in PAGES if page != "nothing/here"]:
                        one.open(path)
                        if path in CHOSEN:
                            one.until("document.body.dataset.ready === 'yes'")
                        elif "/maps" in path:
                            one.until("document.getElementById('surface').dataset.triangles > 100")
                        elif path == "s/session/":
                            one.until(DRAWN)
                        assert one.ask("document.querySelector('h1').textContent") != "Sorry"
                    assert one.wrong == []
        finally:
            process.terminate()
            process.wait()


def _answers(site: Site) -> bool:
    try:
        return site.ask("/healthz", token=None)[0] == 200
    except OSError:
        return False
