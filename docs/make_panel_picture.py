"""``docs/images/lanes-panel.png``: four lanes on 16 sleeping slots for seven minutes, and the dashboard page as rendered by Chromium.

``python docs/make_panel_picture.py [--seconds 420]``; needs ``chromium`` on the PATH and the extra ``dashboard``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from distributed import Client
from tornado.websocket import websocket_connect

from cryodask.cluster import LaneCluster
from cryodask.cluster.accounting.accounting import Accounting

OUT = Path(__file__).parent / "images" / "lanes-panel.png"
WIDTH, HEIGHT = 1100, 655
DRAW_SECONDS = 8.0
LANES = {"live": 4, "batch": 2, "hpda": 1, "learning": 1}
# lane and user, when they come (part of the time), slots that they could fill for how long (part of the time), seconds of a task
LOADS = (
    ("hpda/cleo", 0.0, 16, 0.95, 0.5),
    ("batch/ben", 0.2, 8, 0.42, 0.5),
    ("live/anna", 0.4, 9, 0.25, 0.4),
    ("learning/dan", 0.6, 3, 0.2, 0.8),
)


def nap(i: int, seconds: float) -> None:
    """A task."""
    time.sleep(seconds)


async def screenshot(url: str) -> bytes:
    """Screenshot of a page once it has been drawn; Chromium's own ``--screenshot`` does not wait for web sockets."""
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--remote-allow-origins=*"]
        command = ["chromium", *options, f"--user-data-dir={profile}"]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            assert browser.stderr is not None
            listening = next(line for line in browser.stderr if "DevTools listening on" in line)
            port = listening.split("127.0.0.1:")[1].split("/")[0]
            tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
            address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            socket = await websocket_connect(address, max_message_size=1 << 26)

            async def ask(number: int, method: str, **params: Any) -> Any:
                await socket.write_message(json.dumps({"id": number, "method": method, "params": params}))
                while True:
                    answer = json.loads(await socket.read_message() or "{}")
                    if answer.get("id") == number:
                        return answer["result"]

            await ask(1, "Emulation.setDeviceMetricsOverride", width=WIDTH, height=HEIGHT, deviceScaleFactor=1, mobile=False)
            await ask(2, "Page.navigate", url=url)
            await asyncio.sleep(DRAW_SECONDS)
            return base64.b64decode((await ask(3, "Page.captureScreenshot", format="png"))["data"])
        finally:
            browser.terminate()
            browser.wait()


def main(seconds: float) -> None:
    """Let the lanes work for this long, then take the picture."""
    with LaneCluster(n_workers=2, threads_per_worker=8, dashboard_address="127.0.0.1:0", lanes=LANES, silence_logs=50) as cluster:

        async def count() -> None:
            Accounting.attach(cluster.scheduler)

        cluster.sync(count)
        start, sent = time.time(), []
        for name, when, slots, busy, each in LOADS:
            time.sleep(max(0.0, start + when * seconds - time.time()))
            sent.append(Client(cluster, name=name).map(nap, range(int(slots * busy * seconds / each)), seconds=each, pure=False))
        time.sleep(max(0.0, start + seconds - time.time()))
        OUT.write_bytes(asyncio.run(screenshot(cluster.dashboard_link.replace("/status", "/lanes"))))
        print(f"{OUT}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=420.0)
    main(parser.parse_args().seconds)
