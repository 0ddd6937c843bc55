"""``docs/images/dashboard-*.png``: pages of a finished demo in Chromium.

``python docs/make_dashboard_pictures.py DEMO``, after ``cryodask demo DEMO``; needs ``chromium`` on the PATH and the extra ``test``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

OUT = Path(__file__).parent / "images"
PAGES = {"session": "s/betagal/", "maps": "s/betagal/maps?step=refine3d"}
READY = {
    "session": "document.querySelectorAll('#gallery img').length > 3 && document.getElementById('d-spectrum').naturalWidth > 0",
    "maps": "document.getElementById('surface').dataset.triangles > 0 && document.querySelector('#fsc canvas')",
}


def main() -> None:
    """Start the dashboard, and take the pictures."""
    command = [sys.executable, "-m", "cryodask.cli", "dashboard", sys.argv[1]]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    address = server.stdout.readline().strip()
    try:
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": 1400, "height": 1500})
            tab.goto(address)
            for name, path in PAGES.items():
                tab.goto(f"{address.partition('?')[0]}{path}")
                while not tab.evaluate(READY[name]):
                    tab.wait_for_timeout(100)
                tab.wait_for_timeout(500)
                path_of = OUT / f"dashboard-{name}.png"
                tab.screenshot(path=path_of)
                # what a page of text shows, at a fifth of the bytes
                small = Image.open(path_of).convert("RGB").resize((1000, 1071), Image.Resampling.LANCZOS)
                small.quantize(128, method=Image.Quantize.FASTOCTREE).save(path_of, optimize=True)
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
