"""Shared by the scripts that take pictures of pages: a run in a folder, and its dashboard in Chromium."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Error, Page, sync_playwright

_COMMAND = [sys.executable, "-c", "from cryodask.cli import main; main()"]
_START_SECONDS = 60.0


def run(project_file: Path) -> None:
    """Run a project on one local worker."""
    subprocess.run([*_COMMAND, "run", str(project_file), "--workers", "1", "--quiet"], check=True)


@contextmanager
def dashboard(folder: Path, width: int, height: int) -> Iterator[tuple[Page, str]]:
    """A page of this size, logged in to the dashboard of a folder, and the address of the dashboard."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache", "XDG_STATE_HOME": f"{folder}/state"}
    server = subprocess.Popen([*_COMMAND, "dashboard", str(folder), "--port", str(port), "--token", "picture"], env=environ)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
            page, address = browser.new_page(viewport={"width": width, "height": height}), f"http://127.0.0.1:{port}"
            until = time.monotonic() + _START_SECONDS
            while True:
                try:
                    page.goto(f"{address}/?token=picture")
                    break
                except Error:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.2)
            yield page, address
            browser.close()
    finally:
        server.kill()
        server.wait()
