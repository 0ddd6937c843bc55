"""A dashboard in a process of its own, which can be killed and started again, and browsers to look at it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or "chromium"
TOKEN = "a-token-for-tests"
DEADLINE_SECONDS = 40.0


def need_browser() -> None:
    """Skip, loudly, where there is no browser."""
    try:
        import playwright  # noqa: F401

        missing = "" if Path(CHROMIUM).exists() else CHROMIUM
    except ImportError:
        missing = "playwright"
    if missing:
        warnings.warn(f"{missing} is missing: tests in a browser are SKIPPED", stacklevel=2)
        pytest.skip(f"{missing} is missing")


class Served:
    """A server of the projects in a folder."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self.home = folder, home
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Root of the server."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        code = "from cryodask.cli import main; main()"
        environ = {**os.environ, "XDG_CACHE_HOME": str(self.home / "cache"), "XDG_STATE_HOME": str(self.home / "state")}
        command = [sys.executable, "-c", code, "dashboard", str(self.folder), "--port", str(self.port), "--token", TOKEN]
        with open(self.home / "server.log", "ab") as log:
            self.process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
        until = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < until:
            try:
                if httpx.get(f"{self.address}/", headers=self.headers, timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.1)
            assert self.process.poll() is None, (self.home / "server.log").read_text()
        raise AssertionError((self.home / "server.log").read_text())

    @property
    def headers(self) -> dict[str, str]:
        """Headers of a program with the token."""
        return {"Authorization": f"Bearer {TOKEN}"}

    def kill(self) -> None:
        """End it without warning."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def __enter__(self) -> Served:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


@contextmanager
def browser() -> Iterator[Any]:
    """A browser that draws in software."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def person(browser: Any, served: Served, **options: Any) -> Any:
    """A page of somebody who is logged in; errors of its scripts are collected in ``page.errors``."""
    context = browser.new_context(viewport={"width": 1200, "height": 800}, **options)
    page = context.new_page()
    page.set_default_timeout(DEADLINE_SECONDS * 1000)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    context.request.get(f"{served.address}/?token={TOKEN}")  # the cookie is the context's
    return page
