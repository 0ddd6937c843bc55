"""Chromium for tests of pages; without it or playwright these tests are skipped, loudly."""

from __future__ import annotations

import contextlib
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from _web import DEADLINE_SECONDS, TOKEN, Site


@contextlib.contextmanager
def chromium(*arguments: str) -> Iterator[Any]:
    """The system's Chromium, driven by playwright."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        program = None
    if program is None:
        warnings.warn("chromium or playwright is not installed: tests of pages are SKIPPED", stacklevel=2)
        pytest.skip("needs chromium and playwright")
    with sync_playwright() as play:
        # in containers its own sandbox cannot be set up, and the pages are ours
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox", *arguments])
        yield browser
        browser.close()


class Tab:
    """An open page, and everything that went wrong in it."""

    def __init__(self, browser: Any, site: Site, *, width: int = 1400, dark: bool = False, cookies: Any = None, **context: Any) -> None:
        scheme = "dark" if dark else "light"
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **context)
        self.site, self.page = site, self.context.new_page()
        self.page.set_default_timeout(DEADLINE_SECONDS * 1000)
        self.wrong: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("console", lambda said: self.wrong.append(said.text) if said.type in {"error", "warning"} else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("response", lambda r: self.wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        self.page.on("request", lambda r: self.hosts.add(urlsplit(r.url).netloc or urlsplit(r.url).scheme))
        if cookies is not None:
            self.context.add_cookies(cookies)

    def log_in(self) -> Tab:
        """With the token in an address; the cookie is the browser's, and no page is drawn only for that."""
        answer = self.context.request.get(f"{self.site.address}/?token={TOKEN}")
        assert answer.ok, answer.status
        return self

    def open(self, path: str) -> Tab:
        """Go to a page, and wait until it has drawn itself."""
        self.page.goto(f"{self.site.address}/{path}")
        self.page.wait_for_load_state("load")
        return self

    def ask(self, script: str, *given: Any) -> Any:
        """The value of a JavaScript expression; it is not evaluated in the page, whose policy forbids that."""
        return self.page.evaluate(script, *given)

    def tab_to(self, id: str) -> None:
        """Press the tabulator until an element has the focus."""
        for _ in range(60):
            self.page.keyboard.press("Tab")
            if self.ask("document.activeElement.id") == id:
                return
        raise AssertionError(f"{id} cannot be reached")

    def until(self, script: str, what: str = "", ok: Callable[[Any], bool] = bool) -> Any:
        """Wait until an expression is true (or ``ok``); returns it. It may fail on the page that is being left."""
        from playwright.sync_api import Error

        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            try:
                found = self.ask(script)
                if ok(found):
                    return found
            except Error as error:
                found = error
            assert time.monotonic() < deadline, f"{what or script}: {found!r}; {self.wrong}"
            self.page.wait_for_timeout(50)

    def text(self, id: str) -> str:
        """The text of an element."""
        return str(self.ask("id => document.getElementById(id).textContent", id))

    def close(self) -> None:
        """Close it."""
        self.context.close()
