"""For tests of the pages: a project with results of every kind, written through the store in a second, and servers that show it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
import uvicorn

from cryodask.kernels.preview import preview, preview_shape
from cryodask.stage import load_stages
from cryodask.store.generation import Generation
from cryodask.store.layouts import Grid
from cryodask.store.project import Arrival, Project
from cryodask.store.state import ProductRef, StepState
from cryodask.tiers.policy import Storage
from cryodask.web.app import create_app
from cryodask.web.control import Starter
from cryodask.web.login import Login, OwnLogin
from cryodask.web.serving import _config
from cryodask.web.sessions import Sessions

HEIGHT, WIDTH = 256, 320
FRAMES, PICKS, SHELLS = 6, 12, 20
TOKEN = "a-token"
DEADLINE_SECONDS = 60.0
_GIVES = {
    "motion": ("micrograph_sum", "micrograph_preview", "frame_shift", "patch_position", "patch_shift", "total_motion", "early_motion"),
    "ctf": (
        *("defocus_u_angstrom", "defocus_v_angstrom", "ctf_resolution_angstrom", "ctf_figure_of_merit", "ctf_alternative_score"),
        *("spectrum_frequency", "spectrum_average", "spectrum_fit"),
    ),
    "pick": ("pick_y", "pick_x", "pick_score", "pick_threshold", "particle_id"),
}


class Made:
    """A project on disk to which exposures can be added."""

    def __init__(self, folder: Path, name: str = "session") -> None:
        load_stages()
        self.project = Project.create(folder, name)
        self.names: list[str] = []
        small = dict(zip(("preview_y", "preview_x"), preview_shape(HEIGHT, WIDTH)))
        self.grid = Grid({"y": HEIGHT, "x": WIDTH, "preview": 2, **small}, {})
        self.project.state.constants = {"": {"pixel_size_angstrom": 1.5}}
        for stage, gives in _GIVES.items():
            self._step(stage, gives, per_item=True)
        self.project.save()

    def _step(
        self, stage: str, gives: tuple[str, ...], *, per_item: bool, key: str = "k1", params: Any = None, grid: Grid | None = None
    ) -> Generation:
        place = f"{stage}/{key}"
        meta = {"stage": stage, "version": 1, "params": params or {}, "recipe": key}
        generation = Generation.create(
            self.project.path / "stages" / stage / key,
            meta=meta,
            gives=gives,
            per_item=per_item,
            grids={"": (grid or self.grid) if per_item else Grid({}, {})},
        )
        kind = {"pick": "particles", "classify2d": "classes", "postprocess": "map", "refine3d": "map"}.get(stage, "exposures")
        product = ProductRef(type=kind, step=stage, output=kind, ids=place, place=place, threshold="auto" if stage == "pick" else None)
        step = StepState(stage=stage, key=key, params=params or {}, products={f"{kind}:{kind}": product})
        self.project.state.adopt(stage, step)
        return generation

    def register(self, *names: str) -> None:
        """Register exposures that nothing has processed."""
        self.names += names
        listing = [Arrival(name, f"content {name}", {}) for name in self.names]
        self.project.update_exposures(listing, complete=True)

    def commit(self, row: int, *, steps: tuple[str, ...] = tuple(_GIVES), **changed: Any) -> None:
        """Commit the results of an exposure."""
        rng = np.random.default_rng(row)
        micrograph = rng.normal(100, 10, (HEIGHT, WIDTH)).astype(np.float32)
        micrograph[:40, :60] += 60  # bright at the bottom left, as rows run upwards
        values = {
            "micrograph_sum": micrograph,
            "micrograph_preview": preview(micrograph),
            "frame_shift": rng.normal(size=(FRAMES, 2)).astype(np.float32),
            "patch_position": np.stack(np.meshgrid(np.linspace(0, HEIGHT, 3), np.linspace(0, WIDTH, 3), indexing="ij"), -1).reshape(-1, 2),
            "patch_shift": rng.normal(size=(9, FRAMES, 2)),
            "total_motion": 5.0 + row,
            "early_motion": 1.0,
            "defocus_u_angstrom": 15000.0 + 100 * row,
            "defocus_v_angstrom": 14800.0 + 100 * row,
            "ctf_resolution_angstrom": 4.0 + 0.1 * row,
            "ctf_figure_of_merit": 0.3,
            "ctf_alternative_score": 0.5,
            "spectrum_frequency": np.linspace(0.01, 0.3, SHELLS),
            "spectrum_average": rng.random(SHELLS),
            "spectrum_fit": rng.random(SHELLS),
            "pick_y": rng.uniform(0, HEIGHT, PICKS),
            "pick_x": rng.uniform(0, WIDTH, PICKS),
            "pick_score": np.linspace(5, 1, PICKS),
            "pick_threshold": 2.0,
            "particle_id": (1 << 51) + (row << 27) + (np.arange(PICKS) << 7),
            **changed,
        }
        for stage in steps:
            gives = {name: values[name] for name in _GIVES[stage]}
            self.project.generation(stage).commit(row, self.names[row], gives, grid=self.grid)

    def fail(self, row: int, message: str, stage: str = "motion") -> None:
        """Quarantine an exposure."""
        self.project.generation(stage).commit_failure(row, self.names[row], "MovieError", message, 3)

    def finish(self, key: str = "k1", sharpening: float = -80.0) -> None:
        """Classes and a map."""
        size = 24
        averages = np.random.default_rng(0).random((3, 16, 16)).astype(np.float32)
        shown = {
            "class_average": averages,
            "class_share": np.array([0.5, 0.3, 0.2]),
            "class_resolution_angstrom": np.array([9.0, 10.0, np.inf]),
        }
        self._step("classify2d", tuple(shown), per_item=False, params={"classes": 3}).commit_result(shown)
        z, y, x = np.mgrid[:size, :size, :size] - (size - 1) / 2
        shells = np.arange(12)
        with np.errstate(divide="ignore"):
            resolution = np.where(shells > 0, size * 3.0 / shells, np.inf)
        fsc = np.exp(-((shells / 6.0) ** 2))
        given = {
            "sharpened_map": (8 - np.sqrt(z**2 + 2 * y**2 + x**2)).astype(np.float32),
            "shell_resolution_angstrom": resolution,
            "fsc_unmasked": fsc,
            "fsc_masked": fsc,
            "fsc_corrected": fsc,
            "resolution_angstrom": 6.5,
            "b_factor_angstrom2": sharpening,
        }
        params = {"sharpening": sharpening}
        self._step("postprocess", tuple(given), per_item=False, key=key, params=params).commit_result(given)
        self.project.save()

    def refine(self, size: int = 40, key: str = "a1") -> str:
        """A map on which a mask can be chosen: two balls of other sizes, voxels of 3 A; returns its place."""
        z, y, x = np.mgrid[:size, :size, :size] - size // 2
        density = np.exp(-(z**2 + y**2 + (x + 8) ** 2) / 40) + np.exp(-(z**2 + (y - 4) ** 2 + (x - 9) ** 2) / 16)
        given = {"final_map": density.astype(np.float32), "map_pixel_size_angstrom": 3.0}
        self._step("refine3d", tuple(given), per_item=False, key=key).commit_result(given)
        self.project.save()
        return f"refine3d/{key}"

    def local_resolution(self, size: int = 40) -> None:
        """A ball whose local resolution falls from 3 A at its left to 9 A at its right."""
        z, y, x = np.mgrid[:size, :size, :size] - size // 2
        given = {
            "sharpened_map": np.clip(12 - np.sqrt(z**2 + y**2 + x**2), 0, 1).astype(np.float32),
            "local_resolution_angstrom": (6.0 + x / 4.0).astype(np.float32),
            "local_resolution_percentile": np.array([3.0, 4.5, 6.0, 7.5, 9.0]),
        }
        self._step("local_resolution", tuple(given), per_item=False).commit_result(given)
        self.project.save()

    def sort(self, size: int = 40, key: str = "b1") -> str:
        """Two 3D classes, the second with a ball at x 9 instead of -8; returns its place."""
        z, y, x = np.mgrid[:size, :size, :size] - size // 2
        balls = [np.exp(-(z**2 + y**2 + (x - at) ** 2) / 40).astype(np.float32) for at in (-8, 9)]
        given = {"class_map": np.stack(balls), "map_pixel_size_angstrom": 3.0, "class3d_share": np.array([0.7, 0.3])}
        self._step("classify3d", tuple(given), per_item=False, key=key).commit_result(given)
        self.project.save()
        return f"classify3d/{key}.class2"

    def vary(self, count: int = 2000, components: int = 2, key: str = "c1", *, agreement: float = 0.9, images: bool = True) -> np.ndarray:
        """An analysis of variability whose first component moves a ball from x -8 to 8; returns coordinates `(component, n)`.

        Particles come from all registered exposures in turn; those with an odd number are in half-set 1, and the last has no coordinates.
        """
        rng, size, rows = np.random.default_rng(count), 32, len(self.names)
        coordinates = rng.normal(size=(components, count)).astype(np.float32)
        coordinates[:, -1] = np.nan
        z, y, x = np.mgrid[:size, :size, :size] - size // 2
        balls = [np.exp(-(z**2 + y**2 + (x - at) ** 2) / 12).astype(np.float32) for at in (-8, 8)]
        maps = np.stack([0.25 * (balls[1] - balls[0]), *(0.1 * rng.normal(size=(components - 1, size, size, size)))]).astype(np.float32)
        mean = 0.5 * (balls[0] + balls[1])
        number, row = np.divmod(np.arange(count), rows)
        ids = (1 << 51) + (row << 27) + (number << 7)
        order = np.argsort(ids)
        given = {
            "particle_id": ids[order],
            "half_set": (number[order] % 2).astype(np.int8),
            **{f"component{j + 1}": coordinates[j] for j in range(components)},
            "component_map": maps,
            "component_series": np.stack([[mean + z * one for z in (-2, -1, 0, 1, 2)] for one in maps]).astype(np.float32),
            "component_strength": np.ones(components),
            "component_agreement": np.array([agreement, *[0.1] * (components - 1)]),
            "component_gain": 3.0,
            "map_pixel_size_angstrom": 4.0,
        }
        place, parts = f"variability/{key}", {"components": f"variability/{key}", "position": f"variability/{key}"}
        self._step("variability", tuple(given), per_item=False, key=key).commit_result(given)
        if images:
            grid, gives = Grid({"slot": -(-count // rows), "y": 16, "x": 16}, {}), ("particle_id", "particle_image", "particle_count")
            extract = self._step("extract", gives, per_item=True, key=key, grid=grid)
            for one in range(rows):
                here = np.sort(ids[row == one])
                boxes = rng.normal(size=(len(here), 16, 16)).astype(np.float32)
                extract.commit(one, self.names[one], dict(zip(gives, (here, boxes, len(here)))), grid=grid)
            parts["image"] = f"extract/{key}"
        ref = ProductRef(type="particles", step="variability", output="particles", ids=place, place=place, parts=parts)
        self.project.state.adopt("variability", StepState(stage="variability", key=key, products={"particles:particles": ref}))
        self.project.save()
        return coordinates

    def particles(self, count: int, label: str = "import_particles", **changed: Any) -> dict[str, np.ndarray]:
        """A step with particles: two groups in their columns, some values unknown; returns them."""
        rng = np.random.default_rng(count)
        group = rng.random(count) < 0.7
        values: dict[str, Any] = {
            "particle_id": (1 << 52) + (np.arange(count, dtype=np.int64) << 7),
            "class_number": np.where(group, 1, 2).astype(np.int32),
            "class_probability": rng.random(count).astype(np.float32),
            "class_log_likelihood": (np.where(group, 60, 20) + 5 * rng.normal(size=count)).astype(np.float32),
            "class_origin_y_angstrom": rng.normal(0, 8, count).astype(np.float32),
            "class_origin_x_angstrom": rng.normal(0, 8, count).astype(np.float32),
            **changed,
        }
        values["class_number"][::10] = -1
        values["class_log_likelihood"][::7] = np.nan
        generation = self._step(label, tuple(values), per_item=False)
        place = f"{label}/k1"
        parts = {"class2d": place, "alignment2d": place}
        ref = ProductRef(type="particles", step=label, output="particles", ids=place, place=place, parts=parts)
        self.project.state.adopt(label, StepState(stage=label, key="k1", products={"particles:particles": ref}))
        generation.commit_result(values)
        self.project.save()
        return values


def make_project(folder: Path, exposures: int = 4, *, names: list[str] | None = None) -> Made:
    """A finished project: its last exposure is quarantined, the one before has been registered only."""
    made = Made(folder)
    names = names or [f"exposure_{n}" for n in range(exposures)]
    made.register(*names)
    for row in range(len(names) - 2):
        made.commit(row)
    made.fail(len(names) - 1, f"the movie {names[-1]}.tif is truncated")
    made.finish()
    return made


# --- servers -------------------------------------------------------------------------------------------------------------------------
class Site:
    """A running server, as programs see it."""

    def __init__(self, port: int, prefix: str = "") -> None:
        self.port, self.prefix = port, prefix
        self.address = f"http://127.0.0.1:{port}{prefix}"

    def ask(
        self,
        path: str,
        method: str = "GET",
        *,
        token: str | None = TOKEN,
        body: bytes | None = None,
        sent: Any = None,
        form: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
        only_head: bool = False,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (in lower case) and body of an answer; redirects are not followed."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_SECONDS)
        asked = {} if token is None else {"Authorization": f"Bearer {token}"}
        if sent is not None:
            body, asked["Content-Type"] = json.dumps(sent).encode(), "application/json"
        if form is not None:
            body, asked["Content-Type"] = urlencode(form).encode(), "application/x-www-form-urlencoded"
        with contextlib.closing(connection):
            connection.request(method, f"{self.prefix}{path}", body, {**asked, **(headers or {})})
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, found, b"" if only_head else answer.read()

    def json(self, path: str, **asked: Any) -> Any:
        """The JSON of a successful answer."""
        status, _, body = self.ask(path, **asked)
        assert status == 200, (path, status, body[:500])
        return json.loads(body)


@contextlib.contextmanager
def serving(
    shown: Sessions,
    login: Login | None = None,
    *,
    cache: Path,
    prefix: str = "",
    storage: Storage | None = None,
    starter: Starter | None = None,
    templates: Path | None = None,
) -> Iterator[Site]:
    """A server in a thread of this process."""
    app = create_app(shown, login or OwnLogin(TOKEN), prefix=prefix, cache=cache, storage=storage, starter=starter, templates=templates)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(_config(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started, "the server to start")
    try:
        yield Site(listening.getsockname()[1], prefix)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(DEADLINE_SECONDS)
        listening.close()


class Command:
    """``cryodask dashboard`` as a process of its own."""

    def __init__(self, *words: str | Path, folder: Path, environment: dict[str, str] | None = None) -> None:
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        environ = {**os.environ, "PYTHONPATH": path, "XDG_STATE_HOME": str(folder / "state"), "XDG_CACHE_HOME": str(folder / "cache")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cryodask.cli", "dashboard", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=open(folder / "dashboard.log", "a"),  # noqa: SIM115  (closed with the process)
            text=True,
            env={**environ, **(environment or {})},
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline().strip()
        assert self.said.startswith("http"), (self.said, (folder / "dashboard.log").read_text())
        self.site = Site(urlsplit(self.said).port or 0)
        wait_for(lambda: self._answers(), "the server to answer")

    def _answers(self) -> bool:
        try:
            return self.site.ask("/healthz", token=None)[0] == 200
        except OSError:
            return False

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()


def wait_for(state: Callable[[], Any], what: str) -> Any:
    """Wait until something is true; returns it."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := state()):
        assert time.monotonic() < deadline, f"waited {DEADLINE_SECONDS:.0f} s for {what}"
        time.sleep(0.05)
    return found


def routes_of(app: Any) -> list[Any]:
    """All routes of an application, also where it includes routers when it is asked."""
    found: list[Any] = []
    for route in app.routes:
        inner = getattr(route, "original_router", None)
        found += routes_of(inner) if inner is not None else [route]
    return found
