"""The picking page without a GPU: how long until a micrograph of 4096 x 4096 is seen, and how fast it answers.

``python benchmarks/picking_page.py [--quick] [--size 4096] [--repeat 7]``

Micrographs are imported, so that there are no previews: the server makes the first picture from the whole micrograph, and has not cached
it. ``first_picture_s`` is from the start of the navigation to the first picture on the canvas; contrast and low-pass are measured in the
page, from the slider to the drawn picture, zoomed so that the level of 2048 x 2048 is shown (of which the page filters what is on the
screen). ``heap_mb`` is the JavaScript heap with its buffers of pixels, the largest while all levels of a micrograph are looked at, filtered
and picked in, with what the browser has not yet collected. Browser: the system's Chromium, headless, drawing in software.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from distributed import Client
from playwright.sync_api import sync_playwright

from cryodask.formats.mrc import write_mrc
from cryodask.formats.star import write_coordinates
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan

OUT = Path(__file__).parent / "out" / "picking_page"
PICKS = 400
TOKEN = "benchmark"
OPTICS = (
    "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnVoltage #2\n_rlnSphericalAberration #3\n_rlnAmplitudeContrast #4\n"
    "_rlnMicrographPixelSize #5\n1 300 2.7 0.1 1.0\n\ndata_micrographs\n\nloop_\n_rlnMicrographName #1\n_rlnOpticsGroup #2\n"
)
REPEATED = """([what, times]) => {
  const spent = [];
  for (let k = 0; k < times; k++) {
    picker.form[what].value = what === "lowpass" ? 15 + 5 * k : 1 + 0.2 * k;
    const begun = performance.now();
    what === "lowpass" ? picker.filter() : picker.colour();
    cancelAnimationFrame(picker.drawing);
    picker.drawing = 0;
    picker.paintAll();
    spent.push(performance.now() - begun);
  }
  return spent;
}"""
WORKED = """async ([zoom, added]) => {
  // at one zoom: wait for its level, filter it by several low-passes, and add picks all over the micrograph
  picker.frame.zoom = zoom;
  picker.draw();
  const until = performance.now() + 20000;
  while (picker.shownStep !== picker.suitable() && performance.now() < until) await new Promise((done) => setTimeout(done, 20));
  if (picker.shownStep !== picker.suitable()) throw new Error("the level of zoom " + zoom + " never came");
  let most = 0;
  const look = () => { most = Math.max(most, performance.memory.usedJSHeapSize / 1e6); };
  for (const angstrom of [20, 40, 80]) {
    picker.form.lowpass.value = angstrom;
    picker.filter();
    look();
  }
  for (let k = 0; k < added; k++) {
    picker.act([{ do: "add", y: (0.5 + k) * (picker.height - 1) / added, x: ((0.5 + 7 * k) % added) * (picker.width - 1) / added }]);
  }
  picker.paintAll();
  look();
  return most;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="2048 x 2048, three times")
    asked = parser.parse_args()
    size, repeat = (2048, 3) if asked.quick else (asked.size, asked.repeat)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    make_project(size, repeat)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from cryodask.cli import main; main()", "dashboard", str(OUT / "session"), "--port", str(port)]
    server = subprocess.Popen([*command, "--token", TOKEN], env=environment())
    try:
        found = measure(f"http://127.0.0.1:{port}", repeat)
    finally:
        server.kill()
        server.wait()
    limits = {"first_picture_s": 1.5, "contrast_ms": 50.0, "lowpass_ms": 200.0, "heap_mb": 120.0}
    for name, values in found.items():
        print(f"{name:<16} {statistics.median(values):8.2f}   (longest of {len(values)}: {max(values):.2f}; limit {limits[name]:g})")
    plot(found, limits)
    figures = {name: max(values) if name == "heap_mb" else statistics.median(values) for name, values in found.items()}
    print(json.dumps({name: round(value, 3) for name, value in figures.items()} | {"size": size}))


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "XDG_CACHE_HOME": str(OUT / "cache"), "XDG_STATE_HOME": str(OUT / "state")}


def make_project(size: int, count: int) -> None:
    rng = np.random.default_rng(1)
    (OUT / "picks").mkdir()
    names = []
    for k in range(count):
        write_mrc(OUT / f"m{k}.mrc", rng.normal(20.0, 4.5, (size, size)).astype(np.float32), 1.0)
        write_coordinates(OUT / "picks" / f"m{k}.star", *rng.uniform(0, size - 1, (2, PICKS)), rng.uniform(1, 4, PICKS))
        names.append(f"m{k}.mrc 1\n")
    (OUT / "m.star").write_text(OPTICS + "".join(names))
    pipeline = [{"import_micrographs": {"star": "m.star"}}, {"import_picks": {"folder": "picks"}}, "edit_picks"]
    (OUT / "s.yaml").write_text(yaml.safe_dump({"name": "session", "pipeline": pipeline}))
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        run_plan(make_plan(OUT / "s.yaml"), client)


def measure(address: str, repeat: int) -> dict[str, list[float]]:
    first: list[float] = []
    found: dict[str, list[float]] = {}
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--enable-precise-memory-info"]
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=arguments)
        page: Any = browser.new_page(viewport={"width": 1400, "height": 1000})
        until = time.monotonic() + 60
        while True:
            try:
                page.goto(f"{address}/?token={TOKEN}")
                break
            except Exception:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)
        for row in range(repeat):
            page.goto(f"{address}/s/session/pick/{row}")
            page.wait_for_selector("body[data-ready=yes]")
            first.append(page.evaluate("picker.spent.first") / 1e3)
        # so that two pixels of the micrograph are one of the screen: the level of half its size
        page.evaluate("() => { picker.frame.zoom = 0.5; picker.draw(); }")
        page.wait_for_function("() => picker.shownStep === (picker.height > 2048 ? 2 : 1) || picker.steps.length === 1")
        for name, what in (("lowpass_ms", "lowpass"), ("contrast_ms", "contrast")):
            page.evaluate(REPEATED, [what, 2])  # compiled on first use
            found[name] = page.evaluate(REPEATED, [what, repeat])
        found["heap_mb"] = heaps(page, address, repeat)
        browser.close()
    return {"first_picture_s": first, **found}


def heaps(page: Any, address: str, count: int) -> list[float]:
    """The largest heap while each of the micrographs is worked on, in MB."""
    found = []
    for row in range(count):
        page.goto(f"{address}/s/session/pick/{row}")
        page.wait_for_selector("body[data-ready=yes]")
        found.append(max(page.evaluate(WORKED, [zoom, 100]) for zoom in (0.2, 0.5, 1.0, 2.0)))
        page.wait_for_function("() => !picker.queue.pending().length && !picker.queue.busy")
    return found


def plot(found: dict[str, list[float]], limits: dict[str, float]) -> None:
    """Save ``out/picking_page.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(9, 2.8), layout="constrained")
    for axes, (name, values) in zip(panels, found.items()):
        axes.plot(values, "o")
        axes.axhline(limits[name], color="grey", linestyle=":", label="limit")
        axes.set(title=name, xlabel="repetition", ylim=(0, None))
    panels[0].legend()
    figure.savefig(OUT.parent / "picking_page.png", dpi=120)


if __name__ == "__main__":
    main()
