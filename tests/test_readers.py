"""Readers of a project that grows under their eyes: never an exception, never half an item, and cheap after compaction."""

from __future__ import annotations

import cProfile
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cryodask
from cryodask.store.births import TABLE
from cryodask.store.generation import Generation
from cryodask.store.identity import make_ids
from cryodask.store.journal import encode_value
from cryodask.store.layouts import Grid
from cryodask.store.lines import checked_line
from cryodask.store.project import Arrival, Project
from cryodask.store.state import ProductRef, StepState
from cryodask.vocabulary import VARIABLES

PARTICLES = 5

READER = """
import sys, time, warnings
import dask, numpy as np
import cryodask
dask.config.set(scheduler="synchronous")
path, seconds = sys.argv[1], float(sys.argv[2])
end, looks, most, revisions = time.monotonic() + seconds, 0, 0, set()
kept = cryodask.open(path)                       # a notebook's project, opened once
while time.monotonic() < end or looks < 3:
    for project in (cryodask.open(path), kept):
        repr(project); project._repr_html_(); project.failures()
        for label in ("motion", "extract"):
            dataset = project[label]
            rows = dataset["row"].values
            assert (np.diff(rows) > 0).all()
            if label == "motion":
                revision = (dataset["total_motion"].values - rows) / 1000
                assert (revision == revision.round()).all() and (revision >= 0).all(), revision
                assert (dataset["frame_shift"].values == dataset["total_motion"].values[:, None, None]).all()
                for place in range(max(0, len(rows) - 3), len(rows)):
                    image = dataset["micrograph_sum"][place].values
                    assert (image == image[0, 0]).all(), "half of one picture, half of another"
                    # the picture may be of a later commit than the numbers, never of an earlier
                    assert image[0, 0] >= dataset["total_motion"].values[place], (image[0, 0], dataset["total_motion"].values[place])
                revisions |= set(revision.tolist())
        joined = project.joined()
        names = joined["micrograph"].values.tolist()
        assert len(set(names)) == len(names)
        gone = set(names) - {item.name for item in project.items()}  # the writer removes this one now and then
        assert gone <= {"m1"}, gone
        particles = project.particles()
        if particles.sizes.get("particle"):
            last = particles.isel(particle=slice(-3, None)).compute()
            assert (last["particle_image"].values[:, 0, 0] == last["row"].values).all()
            assert (last["particle_y"].values == last["row"].values).all()
            assert (np.diff(particles["particle_id"].values) > 0).all()
        most = max(most, joined.sizes["micrograph"])
        looks += 1
print(looks, most, len(revisions))
"""


def growing(folder: Path) -> Project:
    project = Project.create(folder, "growing")
    for label, gives, sizes in (
        ("motion", ("micrograph_sum", "total_motion", "frame_shift"), {"y": 64, "x": 48}),
        (
            "extract",
            ("particle_id", "particle_image", "particle_y", "particle_x", "particle_count", "particle_pixel_size_angstrom"),
            {"slot": 64, "y": 8, "x": 8},
        ),
    ):
        meta = {"stage": label, "version": 1, "params": {}, "recipes": {"": label}, "inputs": {}}
        Generation.create(folder / "stages" / label / "key", meta=meta, gives=gives, per_item=True, grids={"": Grid(sizes, {})})
        project.state.adopt(label, StepState(stage=label, key="key"))
    extracted = ProductRef(type="particles", step="extract", output="particles", ids="extract/key", parts={"image": "extract/key"})
    project.state.steps["extract"].products = {"particles:particles": extracted}
    project.save()
    return project


def arrival(name: str, version: int) -> Arrival:
    """An exposure as its input describes it: ``version`` is a value that may change."""
    return Arrival(name, f"content of {name}", {"version": version})


def registered(project: Project, name: str, version: int):
    return project.update_exposures([arrival(name, version)], complete=False).items[0]


def commit(project: Project, item, attempt: int) -> None:
    number = item.row + 1000.0 * item.revision
    made = {"input": item.fingerprint, "revision": item.revision, "attempt": attempt}
    given = {"micrograph_sum": np.full((64, 48), number, np.float32), "total_motion": number}
    project.generation("motion").commit(item.row, item.name, {**given, "frame_shift": np.full((4, 2), number)}, **made)
    row = np.full(PARTICLES, item.row, np.float32)
    given = {"particle_id": make_ids(1, item.row, np.arange(PARTICLES)), "particle_y": row, "particle_x": row}
    given |= {"particle_count": PARTICLES, "particle_pixel_size_angstrom": 1.0}
    images = np.broadcast_to(row[:, None, None], (PARTICLES, 8, 8)).copy()
    project.generation("extract").commit(item.row, item.name, {**given, "particle_image": images}, **made)


@pytest.mark.heavy
def test_readers_of_a_growing_project_see_whole_items_and_no_exception(tmp_path):
    project = growing(tmp_path / "p")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(project.path), "6"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    made: list[str] = []
    number = 0
    while reader.poll() is None:
        number += 1
        made.append(f"m{number}")
        commit(project, registered(project, made[-1], 0), number)
        if number % 3 == 0:  # an input changes: its item is committed anew, over the shard that readers look at
            commit(project, registered(project, made[-2], number), number)
        if number % 7 == 0:
            project.generation("motion").commit_failure(number + 10**6, "nobody", "MovieError", "bad", 1)
            project.generation("motion").compact()
            project.generation("extract").compact()
        if number % 11 == 0:
            project.forget_exposures(made[:1])
            project.forget_exposures(made[:1], undo=True)
        time.sleep(0.005)
    said, error = reader.communicate()
    assert reader.returncode == 0, error
    looks, most, revisions = map(int, said.split())
    print(f"{looks} looks at {most} of {number} items, {revisions} revisions seen")
    assert looks >= 3
    assert most > 3
    # the exposure of the failures was never registered
    assert [p for p in Project(project.path).verify() if "harmless" not in p and "of row 1000" not in p] == []


LENGTHS = {
    "defect": 3,
    "frame": 32,
    "axis": 2,
    "patch": 25,
    "coefficient": 36,
    "shell": 512,
    "radius": 64,
    "slot": 300,
    "left_out": 12,
    "cell_y": 32,
    "cell_x": 32,
}


def session(folder: Path, count: int) -> Project:
    """The journals of ``count`` micrographs of 3838 x 3710 with 300 particles each, as four stages leave them; no shards."""
    from cryodask.stage import load_stages

    project = Project.create(folder, "session")
    paths = ({"movie_path": f"/data/{i:08d}.tif", "size": i, "stat": [0, 0, 0]} for i in range(count))
    listing = (Arrival(f"FoilHole_{i:08d}_fractions", f"{i}-0badc0de", inputs) for i, inputs in enumerate(paths))
    items = project.update_exposures(listing, complete=True).items
    rng = np.random.default_rng(0)
    for label in ("motion", "ctf", "pick", "extract"):
        gives = load_stages()[label].gives_variables()
        sizes = (
            {"y": 3838, "x": 3710, "ky": 512, "kx": 257, "slot": 4096, "preview": 2, "preview_y": 1024, "preview_x": 990}
            if label != "extract"
            else {"slot": 4096, "y": 64, "x": 64}
        )
        bulk = {v.name: 1 for v in gives if v.kind == "bulk"}
        meta = {"stage": label, "version": 1, "params": {}, "recipes": {"": label}, "inputs": {}}
        step = StepState(stage=label, key="key")
        if label == "pick":
            meta["birth"] = {"number": 1, "identity": "pick"}
            gives = [VARIABLES[name] for name in dict.fromkeys((*TABLE, *(v.name for v in gives)))]
            parts = {"position": "pick/key", "score": "pick/key"}
            born = ProductRef(type="particles", step="pick", output="particles", ids="pick/key", parts=parts, threshold="auto")
            step.products = {"particles:particles": born}
        sizes = {d: sizes[d] for name in bulk for d in VARIABLES[name].dims}
        names = tuple(v.name for v in gives)
        made = Generation.create(folder / "stages" / label / "key", meta=meta, gives=names, per_item=True, grids={"": Grid(sizes, {})})
        columns = {v.name: rng.integers(0, 99, [LENGTHS[d] for d in v.dims]).astype(v.dtype) for v in gives if v.kind != "bulk"}
        small = {name: encode_value(values) for name, values in columns.items()}
        with open(made.path / "journal" / "node-1-a.jsonl", "wb") as file:
            for item in items:
                record = {
                    "row": item.row,
                    "name": item.name,
                    "ok": True,
                    "input": item.fingerprint,
                    "time": float(item.row),
                    "attempt": item.row,
                }
                record |= {"columns": small, "shards": bulk, "revision": 0}
                if item.row % 1000 == 7:
                    record |= {"ok": False, "error": "MovieError", "message": "bad"}
                file.write(checked_line(record))
        project.state.adopt(label, step)
    project.save()
    return project


@pytest.mark.heavy
def test_opening_many_items_costs_next_to_nothing_for_each_after_compaction(tmp_path):
    def calls(count: int) -> dict[str, int]:
        """How many function calls each look takes."""
        project = session(tmp_path / str(count), count)
        project.compact()
        looks: dict[str, Callable[[Project], Any]] = {"repr": repr} | {step: itemgetter(step) for step in ("motion", "ctf", "pick")}
        looks["warm"] = looks["repr"]
        found = {}
        for what in ("warm", *looks):
            with cProfile.Profile() as profile:
                shown = looks[what](cryodask.open(project.path))
            assert isinstance(shown, str) or shown.sizes["micrograph"] == count - len(range(7, count, 1000))
            found[what] = sum(entry.callcount for entry in profile.getstats())
        return found

    few, many = calls(500), calls(1500)
    each = {what: (many[what] - few[what]) / 1000 for what in few}
    print(json.dumps({f"calls_per_item_of_{what}": round(number, 1) for what, number in each.items()}))
    assert max(each.values()) < 70  # 140 to 220 where the lines of the journals are read
