"""``docs/images/picking.png``: the picking page on a simulated micrograph, with some edits, as rendered by Chromium.

``python docs/make_picking_picture.py``; needs ``chromium`` and the extras ``facility`` and ``test``. About a minute of CPU.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from _shown import dashboard, run
from PIL import Image
from playwright.sync_api import Page

from cryodask.demo import simulate_folder

OUT = Path(__file__).parent / "images" / "picking.png"
STEPS = "pipeline:\n  - motion: {}\n  - ctf: {}\n  - pick: {diameter_angstrom: 180}\n  - edit_picks: {wait: true}\n"
MAKE_EDITS = """() => {
  const picks = picker.shown();
  picker.act([{ do: "remove", pick: picks[1].pick, y: picks[1].y, x: picks[1].x }]);
  picker.act([{ do: "add", y: 500, x: 620 }, { do: "add", y: 300, x: 250 }]);
  picker.form.removed.checked = true;
  picker.form.lowpass.value = 25;
  picker.filter();
}"""


def main() -> None:
    """Simulate, process and look."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        file = simulate_folder(home, movies=1, size=1024, frames=8, particles=40, seed=3)
        text = file.read_text()
        file.write_text(text[: text.index("pipeline:")] + STEPS)
        run(file)
        with dashboard(home, 1180, 860) as (page, address):
            picture(page, address)
    print(OUT)


def picture(page: Page, address: str) -> None:
    """Save a screenshot of the page after some edits."""
    session = page.locator("a[href*='s/']").first.get_attribute("href") or ""
    page.goto(f"{address}/{session.removeprefix('./')}pick/0")
    page.wait_for_selector("body[data-ready=yes]")
    page.evaluate(MAKE_EDITS)
    page.wait_for_function("() => !picker.queue.pending().length && !picker.sent.size")
    whole = Image.open(io.BytesIO(page.screenshot()))
    whole.convert("RGB").quantize(128, method=Image.Quantize.FASTOCTREE).save(OUT, optimize=True)


if __name__ == "__main__":
    main()
