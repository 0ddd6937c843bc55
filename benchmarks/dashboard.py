"""Cost of the dashboard: looking at journals, telling a hundred viewers, and a page with 10,000 exposures.

``python benchmarks/dashboard.py [--quick]`` makes a project of 10,000 exposures whose journals are as workers would have left them, and
nineteen of 1,000. The server is ``cryodask dashboard`` in a process of its own; the page is drawn by Chromium without a graphics card.
CPU seconds are those of processes; a commit is on the screen when the page has drawn the new count. ``agree_s`` is the longest time until
two servers of one project have told what one of them took (remarks on exposures) or what was committed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

OUT = Path(__file__).parent / "out"
GOALS = {
    "first_look_cpu_s": 0.2,
    "idle_look_ms": 1.0,
    "commit_look_ms": 10.0,
    "commit_to_screen_p95_s": 1.0,
    "viewers_lost": 0.0,
    "server_core_share": 0.25,
    "server_rss_mb": 200.0,
    "agree_s": 2.0,
    "page_mb": 1.5,
    "page_cpu_s": 1.5,
    "brush_ms": 150.0,
}
PICKS, SHELLS, FRAMES = 200, 200, 24
SIDE = 1024
GIVES = {
    "motion": ("micrograph_preview", "frame_shift", "total_motion", "early_motion"),
    "ctf": (
        *("defocus_u_angstrom", "defocus_v_angstrom", "ctf_resolution_angstrom", "ctf_figure_of_merit", "ctf_alternative_score"),
        *("spectrum_frequency", "spectrum_average", "spectrum_fit"),
    ),
    "pick": ("pick_y", "pick_x", "pick_score", "pick_threshold", "particle_id"),
}
TOKEN = "benchmark"
LOOK = """
import sys, time
from pathlib import Path
import numpy
from cryodask.web.follow import Follower
import cryodask.store.table
follower = Follower(Path(sys.argv[1]))
begin = time.process_time()
follower.look()
first = time.process_time() - begin
assert follower.counters()["done"] == int(sys.argv[2]), follower.counters()
begin = time.process_time()
for _ in range(200):
    assert not follower.look()
print(first, (time.process_time() - begin) / 200 * 1e3)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the size and ten viewers, as a smoke test")
    quick = parser.parse_args().quick
    exposures, others, viewers, commits = (500, 2, 10, 5) if quick else (10_000, 19, 100, 30)
    with tempfile.TemporaryDirectory(dir=os.environ.get("CRYODASK_SCRATCH")) as scratch:
        folder = Path(scratch)
        projects = folder / "projects"
        big = make_project(projects / "big", exposures, spare=2 * commits + 5)
        if others:
            make_project(folder / "small", exposures // 10)
            for number in range(others):
                shutil.copytree(folder / "small", projects / f"small{number}", copy_function=os.link)
        figures = looks(big.path, exposures)
        figures |= commit_look(big, exposures)
        figures |= served(projects, folder, big, viewers, commits, exposures + 5, [f"small{n}" for n in range(others)])
    figures = {name: figures[name] for name in GOALS}
    print(f"\n{'':<26}{'measured':>10}{'goal':>8}")
    for name, value in figures.items():
        print(f"{name:<26}{value:>10.3g}{GOALS[name]:>8.3g}")
    draw(figures)
    print(json.dumps({**figures, "exposures": exposures, "viewers": viewers, "commits": commits, "quick": quick}))


# --- projects --------------------------------------------------------------------------------------------------------------------
def make_project(path: Path, exposures: int, spare: int = 0) -> Any:
    """A project with journals and previews of all exposures, and some more exposures that are registered only."""
    from cryodask.kernels.preview import preview
    from cryodask.stage import load_stages
    from cryodask.store.generation import Generation
    from cryodask.store.journal import encode_value
    from cryodask.store.layouts import Grid
    from cryodask.store.lines import checked_line
    from cryodask.store.project import Arrival, Project
    from cryodask.store.state import ProductRef, StepState

    load_stages()
    project = Project.create(path, path.name)
    project.state.constants = {"": {"pixel_size_angstrom": 1.0}}
    names = [f"FoilHole_{number:08d}_Data" for number in range(exposures + spare)]
    project.update_exposures([Arrival(name, f"content {name}", {}) for name in names], complete=True)
    grid = Grid({"preview": 2, "preview_y": SIDE, "preview_x": SIDE}, {})
    rng = np.random.default_rng(0)
    picture = preview(rng.normal(100, 10, (SIDE, SIDE)).astype(np.float32))
    for stage, gives in GIVES.items():
        where, meta = path / "stages" / stage / "k1", {"stage": stage, "version": 1, "params": {}, "recipe": "k1"}
        generation = Generation.create(where, meta=meta, gives=gives, per_item=True, grids={"": grid})
        threshold = "auto" if stage == "pick" else None
        kind = "particles" if stage == "pick" else "exposures"
        product = ProductRef(type=kind, step=stage, output=kind, ids=f"{stage}/k1", place=f"{stage}/k1", threshold=threshold)
        project.state.adopt(stage, StepState(stage=stage, key="k1", products={f"{kind}:{kind}": product}))
        shards: dict[str, int] = {}
        if stage == "motion":
            first = generation.commit(0, names[0], {**values(rng, 0), "micrograph_preview": picture}, grid=grid)
            shards = first["shards"]
            made = generation.shard_path("micrograph_preview", 0, 3)
            for row in range(1, exposures):
                there = generation.shard_path("micrograph_preview", row, 3)
                there.parent.mkdir(parents=True)
                os.link(made, there)
            generation.journal.close()
        with open(where / "journal" / "node-1-a.jsonl", "wb") as file:
            for row in range(exposures):
                given = {name: value for name, value in values(rng, row).items() if name in gives}
                record = {"row": row, "name": names[row], "ok": True, "time": 1e9 + row, "attempt": 1, "shards": shards}
                file.write(checked_line({**record, "columns": {name: encode_value(value) for name, value in given.items()}}))
    project.save()
    for stage in GIVES:
        project.generation(stage).compact()
    return project


def values(rng: np.random.Generator, row: int) -> dict[str, Any]:
    """Numbers of an exposure."""
    defocus = 15000 + 4000 * rng.standard_normal()
    return {
        "frame_shift": rng.standard_normal((FRAMES, 2)).astype(np.float32),
        "total_motion": np.float64(15 + 4 * rng.standard_normal()),
        "early_motion": np.float64(3 + rng.standard_normal()),
        "defocus_u_angstrom": np.float64(defocus + 100 * rng.random()),
        "defocus_v_angstrom": np.float64(defocus),
        "ctf_resolution_angstrom": np.float64(4 + rng.random()),
        "ctf_figure_of_merit": np.float64(0.3 * rng.random()),
        "ctf_alternative_score": np.float64(rng.random()),
        "spectrum_frequency": np.linspace(0.01, 0.3, SHELLS, dtype=np.float32),
        "spectrum_average": rng.random(SHELLS, np.float32),
        "spectrum_fit": rng.random(SHELLS, np.float32),
        "pick_y": rng.random(PICKS, np.float32) * SIDE,
        "pick_x": rng.random(PICKS, np.float32) * SIDE,
        "pick_score": rng.random(PICKS, np.float32),
        "pick_threshold": np.float64(0.3),
        "particle_id": (1 << 51) + (row << 27) + (np.arange(PICKS) << 7),
    }


def commit(project: Any, row: int, name: str) -> None:
    """Commit the results of one more exposure, as workers do."""
    from cryodask.store.layouts import Grid

    grid = Grid({"preview": 2, "preview_y": SIDE, "preview_x": SIDE}, {})
    rng = np.random.default_rng(row)
    picture = rng.integers(0, 255, (2, SIDE, SIDE), dtype=np.uint8)
    for stage, gives in GIVES.items():
        given = {**values(rng, row), "micrograph_preview": picture}
        project.generation(stage).commit(row, name, {n: given[n] for n in gives}, grid=grid)


# --- measuring -------------------------------------------------------------------------------------------------------------------
def looks(path: Path, exposures: int) -> dict[str, float]:
    """CPU time of the first look, and of one without news: the best of three processes, because others use the same cores."""
    found = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", LOOK, str(path), str(exposures)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        found.append([float(word) for word in done.stdout.split()])
    first, idle = np.min(found, axis=0).tolist()
    return {"first_look_cpu_s": first, "idle_look_ms": idle}


def commit_look(project: Any, exposures: int) -> dict[str, float]:
    """CPU time of a look after one exposure was committed to one step: the median of fifteen."""
    from cryodask.web.follow import Follower

    follower = Follower(project.path)
    follower.look()
    names = {item.row: item.name for item in project.items()}
    spent = []
    for row in range(exposures, exposures + 5):
        rng = np.random.default_rng(row)
        for stage in GIVES:
            given = {**values(rng, row), "micrograph_preview": rng.integers(0, 255, (2, SIDE, SIDE), dtype=np.uint8)}
            project.generation(stage).commit(row, names[row], {n: given[n] for n in GIVES[stage]})
            begin = time.process_time()
            assert follower.look()
            spent.append(time.process_time() - begin)
    return {"commit_look_ms": float(np.median(spent)) * 1e3}


def served(projects: Path, folder: Path, big: Any, viewers: int, commits: int, first: int, others: list[str]) -> dict[str, float]:
    from playwright.sync_api import sync_playwright

    server, address, port = start(projects, folder)
    try:
        process = psutil.Process(server.pid)
        with sync_playwright() as play:
            arguments = ["--no-sandbox", "--use-angle=swiftshader", "--disable-gpu"]
            browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
            figures = page(browser, address)
            figures |= live(browser, address, port, process, big, viewers, commits, first)
            tab = browser.new_page()
            tab.goto(f"{address}?token={TOKEN}")
            for name in ("big", *others):
                for path in ("", "maps", "history", "people"):
                    tab.goto(f"{address}s/{name}/{path}")
            browser.close()
        figures["server_rss_mb"] = process.memory_info().rss / 1e6
        return figures | agreement(projects, folder, port, big, first + commits)
    finally:
        server.kill()
        server.wait()


def start(projects: Path, folder: Path, account: str = "") -> tuple[subprocess.Popen[str], str, int]:
    """A server, its address and its port."""
    environ = {**os.environ, "XDG_STATE_HOME": str(folder / f"state{account}"), "XDG_CACHE_HOME": str(folder / f"cache{account}")}
    command = [sys.executable, "-m", "cryodask.cli", "dashboard", str(projects), "--token", TOKEN]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
    assert server.stdout is not None
    address = server.stdout.readline().strip().partition("?")[0]
    return server, address, int(address.rsplit(":", 1)[1].strip("/"))


def agreement(projects: Path, folder: Path, port: int, big: Any, first: int) -> dict[str, float]:
    """Remarks that the first of two servers takes and exposures that are committed, five each, until both have told them."""
    from cryodask.edits.operations import new_id

    second, _, other = start(projects, folder, "2")
    spent = []
    try:
        told: list[dict[str, Any]] = [{} for _ in range(4)]
        ways = [(where, path) for where in (port, other) for path in ("events", "edits/exposures/events")]
        for (where, path), said in zip(ways, told):
            threading.Thread(target=listen, args=(where, said, path), daemon=True).start()
        wait_until(lambda: all(told))
        names = {item.row: item.name for item in big.items()}
        for number in range(5):
            row, version = first + number, told[1]["last"]
            edit = {"id": new_id(), "n": number + 1, "do": "set", "row": number, "name": "note", "value": "seen"}
            connection = http.client.HTTPConnection("127.0.0.1", port)
            headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
            connection.request("POST", "/s/big/choices/exposures/ops", json.dumps({"ops": [edit]}), headers)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            begin = time.monotonic()
            wait_until(lambda version=version: told[1]["last"] == told[3]["last"] != version)
            spent.append(time.monotonic() - begin)
            commit(big, row, names[row])
            begin = time.monotonic()
            wait_until(lambda row=row: all(said.get("done") == row + 1 for said in (told[0], told[2])))
            spent.append(time.monotonic() - begin)
            time.sleep(0.37)  # not in step with the looks of the servers
    finally:
        second.kill()
        second.wait()
    return {"agree_s": max(spent)}


def page(browser: Any, address: str) -> dict[str, float]:
    """Bytes and CPU time of opening the page of the big project, and the time of a brush: the better of two visits."""
    spent, brushed, size = [], [], 0.0
    for _ in range(2):
        context = browser.new_context(viewport={"width": 1400, "height": 900})
        tab = context.new_page()
        tab.goto(f"{address}?token={TOKEN}")
        devtools = context.new_cdp_session(tab)
        devtools.send("Network.enable")
        received = [0.0]

        def add(event: dict[str, Any], received: list[float] = received) -> None:
            received[0] += event["encodedDataLength"]

        devtools.on("Network.loadingFinished", add)
        before = browser_cpu()
        tab.goto(f"{address}s/big/")
        wait(tab, "document.body.dataset.sequence > 0 && document.querySelectorAll('.uplot canvas').length >= 6")
        wait(tab, "[...document.querySelectorAll('#gallery img')].slice(0, 8).every(i => i.naturalWidth > 0)")
        spent.append(browser_cpu() - before)
        size = received[0] / 1e6
        script = """async () => {
            const input = document.querySelector('.plot input'), begin = performance.now();
            input.value = '1.5';
            input.dispatchEvent(new Event('change'));
            await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
            return performance.now() - begin;
        }"""
        brushed.append(float(tab.evaluate(script)))
        context.close()
    return {"page_mb": size, "page_cpu_s": min(spent), "brush_ms": min(brushed)}


def browser_cpu() -> float:
    """CPU seconds of all processes of the browser."""
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        try:
            if "chrom" in child.name():
                total += sum(child.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return total


def live(
    browser: Any, address: str, port: int, process: psutil.Process, big: Any, viewers: int, commits: int, first: int
) -> dict[str, float]:
    """A commit a second: when the page shows it, what a hundred listeners get to know, and what that costs the server."""
    tab = browser.new_page()
    tab.goto(f"{address}?token={TOKEN}")
    tab.goto(f"{address}s/big/")
    wait(tab, "document.body.dataset.sequence > 0")
    tab.evaluate("""() => {
        window.seen = {};
        const at = document.getElementById('c-done');
        new MutationObserver(() => { window.seen[at.textContent.replace(/,/g, '')] = Date.now() / 1000; }).observe(at, {childList: true});
    }""")
    heard: list[dict[str, Any]] = [{} for _ in range(viewers)]
    listeners = [threading.Thread(target=listen, args=(port, said), daemon=True) for said in heard]
    for listener in listeners:
        listener.start()
    wait_until(lambda: all(heard))
    names = {item.row: item.name for item in big.items()}
    begin, before = time.monotonic(), sum(process.cpu_times()[:2])
    committed: dict[int, float] = {}
    for number in range(commits):
        row = first + number
        commit(big, row, names[row])
        committed[row + 1] = time.time()
        while time.monotonic() < begin + number + 1:
            tab.wait_for_timeout(20)
    share = (sum(process.cpu_times()[:2]) - before) / (time.monotonic() - begin)
    wait(tab, f"window.seen[{first + commits}]")
    wait_until(lambda: all(said.get("done") == first + commits for said in heard), give_up=True)
    lost = sum(said.get("done") != first + commits for said in heard)
    seen = {int(count): when for count, when in tab.evaluate("window.seen").items()}
    # a count that came together with a later one was on the screen when that was
    delays = [min(when for count, when in seen.items() if count >= wanted) - when_committed for wanted, when_committed in committed.items()]
    return {"commit_to_screen_p95_s": float(np.percentile(delays, 95)), "viewers_lost": float(lost), "server_core_share": share}


def listen(port: int, said: dict[str, Any], path: str = "events") -> None:
    """Follow events of the big project; ``said`` has the content of the last one."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", f"/s/big/{path}", headers={"Authorization": f"Bearer {TOKEN}"})
    for line in connection.getresponse():
        if line.startswith(b"data: "):
            told = json.loads(line[6:])
            said.update(told if isinstance(told, dict) else {}, last=told)


def wait(tab: Any, script: str) -> None:
    wait_until(lambda: tab.evaluate(script) or tab.wait_for_timeout(20))


def wait_until(state: Any, *, give_up: bool = False) -> None:
    deadline = time.monotonic() + 60
    while not state():
        if time.monotonic() > deadline:
            if give_up:
                return
            raise SystemExit("the page or the server did not get there within a minute")
        time.sleep(0.01)


def draw(figures: dict[str, float]) -> None:
    """Share of each goal that was used, in ``benchmarks/out/dashboard.png``."""
    from matplotlib.figure import Figure

    OUT.mkdir(exist_ok=True)
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(figures), [value / (GOALS[name] or 1) for name, value in figures.items()], color="#4878a8")
    axes.bar_label(bars, [f"{value:.3g}" for value in figures.values()], fontsize=8)
    axes.axvline(1.0, color="black", lw=0.7)
    axes.invert_yaxis()
    axes.set(xlabel="share of the goal")
    figure.savefig(OUT / "dashboard.png", dpi=120)


if __name__ == "__main__":
    main()
