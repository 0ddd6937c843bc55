"""``docs/images/mask-page.png``: the page on which a mask is chosen, with some strokes, as rendered by Chromium.

``python docs/make_mask_picture.py``; needs ``chromium`` and the extras ``facility`` and ``test``. Half a minute of CPU.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Error, sync_playwright

from cryodask.demo import simulate_folder
from cryodask.formats.mrc import write_mrc
from cryodask.simulate.model import beta_galactosidase, density_map

OUT = Path(__file__).parent / "images" / "mask-page.png"
STEPS = "pipeline:\n  - ingest\n  - import_map: {file: map.mrc}\n  - draw_mask: {from: {map: import_map}}\n"
READY = "document.body.dataset.ready === 'yes' && !chosen.busy() && !chosen.queue.pending().length"
BOX, PIXEL_ANGSTROM = 128, 2.0


def main() -> None:
    """Make a map, look at it, and draw."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        file = simulate_folder(home, movies=1, size=256, frames=4, particles=2, seed=3)
        density = density_map(beta_galactosidase(), BOX, PIXEL_ANGSTROM, 150.0)
        noise = np.random.default_rng(0).normal(0, 0.4 * density.std(), density.shape)
        write_mrc(home / "map.mrc", (density + noise).astype(np.float32), PIXEL_ANGSTROM)
        text = file.read_text()
        file.write_text(text[: text.index("pipeline:")] + STEPS)
        cryodask = [sys.executable, "-c", "from cryodask.cli import main; main()"]
        subprocess.run([*cryodask, "run", str(file), "--workers", "1", "--quiet"], check=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environ = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache", "XDG_STATE_HOME": f"{folder}/state"}
        server = subprocess.Popen([*cryodask, "dashboard", folder, "--port", str(port), "--token", "picture"], env=environ)
        try:
            picture(f"http://127.0.0.1:{port}")
        finally:
            server.kill()
            server.wait()
    print(OUT)


def picture(address: str) -> None:
    """Save a screenshot of the page after some strokes."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 860})
        while True:
            try:
                page.goto(f"{address}/?token=picture")
                break
            except Error:
                time.sleep(0.2)
        page.goto(f"{address}/s/betagal/mask")
        ready(page)
        page.fill("#radius", "16")
        page.check("[name=tool][value=erase]")
        stroke(page, 0, (0.62, 0.30), (0.78, 0.40))
        page.focus("#over-0")
        ready(page)
        page.screenshot(path=OUT)
        browser.close()
    Image.open(OUT).convert("P", palette=Image.Palette.ADAPTIVE, colors=96).save(OUT, optimize=True)


def stroke(page: object, axis: int, begin: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw a line on a section, from and to shares of its width and height."""
    box = page.locator(f"#over-{axis}").bounding_box()  # type: ignore[attr-defined]
    mouse = page.mouse  # type: ignore[attr-defined]
    mouse.move(box["x"] + begin[0] * box["width"], box["y"] + begin[1] * box["height"])
    mouse.down()
    mouse.move(box["x"] + end[0] * box["width"], box["y"] + end[1] * box["height"], steps=6)
    mouse.up()


def ready(page: object) -> None:
    """Wait until everything is drawn."""
    while not page.evaluate(READY):  # type: ignore[attr-defined]
        page.wait_for_timeout(100)  # type: ignore[attr-defined]
    page.wait_for_timeout(700)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
