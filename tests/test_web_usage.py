"""Usage over time on the page of clusters: means of threads by lane and user, and nobody else's to those who do not administer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _browser import Tab, chromium
from _web import Site, make_project, serving

from cryodask.web.ledger import Ledger
from cryodask.web.login import OwnLogin
from cryodask.web.people import Person
from cryodask.web.routes import cluster
from cryodask.web.sessions import Sessions

pytestmark = pytest.mark.heavy

HOUR = 3600


def row(hours_ago: int, lane: str, user: str, threads: float) -> dict[str, Any]:
    start = (time.time() // HOUR - hours_ago) * HOUR
    return {"from": start, "seconds": HOUR, "lane": lane, "user": user, "task_seconds": threads * HOUR, "tasks": 1, "failed": 0}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What ``cryodask cluster`` is asked; it answers with three hours of two users."""
    words: list[tuple[str, ...]] = []

    def answer(*some: str) -> Any:
        words.append(some)
        if some == ("status",):
            return {"box": {"address": "", "says": "it was stopped"}, "problem": "a sentence"}
        return [row(3, "live", "anna", 2), row(2, "live", "anna", 4), row(2, "batch", "ben", 1)]

    monkeypatch.setattr(cluster, "_asked", answer)
    return words


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    make_project(tmp_path / "session")
    with serving(Sessions({"": [tmp_path / "session"]}, Ledger(tmp_path / "audit")), cache=tmp_path / "cache") as site:
        yield site


def test_history_is_asked_for_with_its_hours_also_of_clusters_that_have_ended(site, asked):
    found = site.json("/api/v1/usage/history?hours=500")
    assert asked[-1] == ("usage", "box", "--hourly", "--hours", "720")
    assert list(found) == ["box"]
    assert [r["user"] for r in found["box"]] == ["anna", "anna", "ben"]
    assert [r["from"] for r in site.json("/api/v1/usage/history?hours=1")["box"]] == []
    assert [r["user"] for r in site.json("/api/v1/usage/history?hours=2")["box"]] == ["anna", "ben"]
    for hours in ("0", "8761", "x", "--by"):
        assert site.ask(f"/api/v1/usage/history?hours={hours}")[0] == 422


def test_who_does_not_administer_sees_their_own(site, asked, monkeypatch):
    monkeypatch.setattr(OwnLogin, "person_with_token", lambda self, token: Person("ben"))
    assert [r["user"] for r in site.json("/api/v1/usage/history")["box"]] == ["ben"]
    monkeypatch.setattr(cluster, "_asked", lambda *some: {"box": {}} if some == ("status",) else {"problem": "no journal"})
    assert site.json("/api/v1/usage/history") == {"box": {"problem": "no journal"}}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def test_the_plot_shows_lanes_or_users_and_the_table_their_sums(browser, site, asked):
    from axe_playwright_python.sync_playwright import Axe

    with contextlib.closing(Tab(browser, site, width=390, dark=True, bypass_csp=True).log_in().open("cluster")) as one:
        rows = "[...document.querySelectorAll('#history-table tbody tr')].map((r) => r.innerText.split(/\\s+/))"
        assert one.until(rows) == [["live", "6", "4"], ["batch", "1", "1"]]
        one.page.select_option("#history-by", "user")
        assert one.until(rows, ok=lambda found: found and found[0][0] == "anna") == [["anna", "6", "4"], ["ben", "1", "1"]]
        assert one.ask("document.querySelectorAll('#history .uplot').length") == 1
        one.ask(Axe().axe_script)
        options = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"], "resultTypes": ["violations"]}
        for width, scheme in ((390, "dark"), (390, "light"), (1400, "light"), (1400, "dark")):
            one.page.set_viewport_size({"width": width, "height": 900})
            one.page.emulate_media(color_scheme=scheme)
            one.until("document.documentElement.scrollWidth", "the page to fit", ok=lambda found, width=width: found <= width)
            one.until("document.querySelectorAll('#history .uplot').length === 1")
            found = one.ask("async (options) => (await axe.run(options)).violations", options)
            assert [(v["id"], [n["html"][:160] for n in v["nodes"][:4]]) for v in found] == [], (width, scheme)
        assert one.wrong == []


def test_without_usage_in_a_time_the_page_says_so_and_a_problem_is_shown(browser, site, asked, monkeypatch):
    with contextlib.closing(Tab(browser, site).log_in().open("cluster")) as one:
        one.until("document.querySelectorAll('#history .uplot').length === 1")
        answer: list[Any] = []
        monkeypatch.setattr(cluster, "_asked", lambda *some: {"box": {}} if some == ("status",) else answer)
        one.page.select_option("#history-hours", "720")
        one.until("document.getElementById('history-told').textContent === 'Nothing was used in this time.'")
        assert one.ask("document.querySelectorAll('#history .uplot').length") == 0
        monkeypatch.setattr(cluster, "_asked", lambda *some: {"box": {}} if some == ("status",) else {"problem": "It is being asked."})
        one.page.select_option("#history-hours", "8760")
        one.until("document.getElementById('history-told').textContent === 'It is being asked.'")


def test_the_hour_that_has_just_begun_is_drawn(browser, site, monkeypatch):
    monkeypatch.setattr(cluster, "_asked", lambda *some: {"box": {}} if some == ("status",) else [row(0, "live", "anna", 3)])
    with contextlib.closing(Tab(browser, site).log_in().open("cluster")) as one:
        painted = """() => {
            const canvas = document.querySelector('#history canvas');
            const over = document.querySelector('#history .u-over').getBoundingClientRect();
            if (!canvas) return 0;
            const left = over.left - canvas.getBoundingClientRect().left + over.width * (47 / 48), width = Math.floor(over.width / 48) - 4;
            const d = canvas.getContext('2d').getImageData(left + 4, over.height * 0.6, width - 4, 1).data;
            let count = 0;
            for (let i = 0; i < d.length; i += 4) if (d[i + 2] - d[i] > 60) count++;
            return count / (width - 4);
        }"""
        one.until("document.querySelectorAll('#history .uplot').length === 1")
        one.until(f"({painted})()", ok=lambda share: share > 0.9)


def test_bands_are_means_and_the_small_ones_are_one(browser, site, asked):
    with contextlib.closing(Tab(browser, site).log_in().open("cluster")) as one:
        script = """async (rows) => {
            const { bands } = await import('./static/usage.js');
            return [bands(rows, 'user', 0, 4 * 3600, 3600), bands(rows, 'lane', 0, 172800, 86400)];
        }"""
        rows = [{"from": HOUR * (n % 4), "seconds": HOUR, "lane": "", "user": f"u{n}", "task_seconds": HOUR * (9 - n)} for n in range(8)]
        rows.append({"from": 86400, "seconds": 86400, "lane": "live", "user": "u0", "task_seconds": 86400 * 3.0})
        hourly, daily = one.ask(script, rows)
        assert [band["label"] for band in hourly["bands"]] == ["u0", "u1", "u2", "u3", "u4", "others"]
        assert hourly["bands"][0]["values"] == [9, 0, 0, 0]  # the day that follows is beyond the last hour
        assert hourly["bands"][5]["values"] == [0, 4, 3, 2]
        assert hourly["times"] == [0, 3600, 7200, 10800]
        assert {band["label"]: band["values"] for band in daily["bands"]} == {"live": [0, 3], "none": [sum(range(2, 10)) / 24, 0]}
        spread = one.ask(script, [{"from": 0, "seconds": 86400, "lane": "l", "user": "u", "task_seconds": 86400.0}])[0]
        assert spread["bands"][0]["values"] == [1, 1, 1, 1]
