"""``docs/images/mask-page.png``: the page on which a mask is chosen, with some strokes, as rendered by Chromium.

``python docs/make_mask_picture.py``; needs ``chromium`` and the extras ``facility`` and ``test``. Half a minute of CPU.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from _shown import dashboard, run
from PIL import Image
from playwright.sync_api import Page

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
        run(file)
        with dashboard(home, 1400, 860) as (page, address):
            picture(page, address)
    print(OUT)


def picture(page: Page, address: str) -> None:
    """Save a screenshot of the page after some strokes."""
    page.goto(f"{address}/s/betagal/mask")
    ready(page)
    page.fill("#radius", "16")
    page.check("[name=tool][value=erase]")
    stroke(page, 0, (0.62, 0.30), (0.78, 0.40))
    page.focus("#over-0")
    ready(page)
    page.screenshot(path=OUT)
    Image.open(OUT).convert("P", palette=Image.Palette.ADAPTIVE, colors=96).save(OUT, optimize=True)


def stroke(page: Page, axis: int, begin: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw a line on a section, from and to shares of its width and height."""
    box, mouse = page.locator(f"#over-{axis}").bounding_box(), page.mouse
    assert box is not None
    mouse.move(box["x"] + begin[0] * box["width"], box["y"] + begin[1] * box["height"])
    mouse.down()
    mouse.move(box["x"] + end[0] * box["width"], box["y"] + end[1] * box["height"], steps=6)
    mouse.up()


def ready(page: Page) -> None:
    """Wait until everything is drawn."""
    while not page.evaluate(READY):
        page.wait_for_timeout(100)
    page.wait_for_timeout(700)


if __name__ == "__main__":
    main()
