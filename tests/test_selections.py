"""Selections of exposures before steps that are done: particles, unions, exports and other projects are those of a run from scratch."""

from __future__ import annotations

import shutil

import pytest
from test_counts import here, run, session  # noqa: F401  here is a fixture

from cryodask.store.project import Project

pytestmark = pytest.mark.heavy

BEFORE = ["toy_motion", "toy_ctf"]
UNION = {"merge": {"nearer_than_angstrom": 1.5, "from": {"particles": ["toy_pick", "wide"]}}}
AFTER = [
    "toy_pick",
    {"toy_pick as wide": {"number": 9}},
    UNION,
    {"toy_extract": {"number": 1}},
    {"toy_extract as two": {"number": 2, "from": {"particles": "merge"}}},
    {"merge as both": {"prefer": "two", "from": {"particles": ["toy_extract", "two"]}}},
    "toy_classify",
]


def without(*names: str) -> list:
    return [*BEFORE, {"select_exposures": {"leave_out": list(names)}}, *AFTER]


def held(project: Project) -> dict[str, tuple[list[int], set[str]]]:
    """Ids and exposures of the particles of each step that gives some."""
    out = {}
    for label in project.stages:
        if "particles:particles" in project.step(label).products:
            found = project.particles(label)
            out[label] = found["particle_id"].values.tolist(), set(found["micrograph"].values)
    return out


@pytest.mark.parametrize("first", [without(), [*BEFORE, *AFTER], without("m003")], ids=["limit", "put in", "another"])
def test_exposures_that_a_selection_leaves_out_leave_the_sets_that_are_there(tmp_path, here, first):  # noqa: F811
    folder = session(tmp_path, 4)
    assert len(held(run(folder, here, first))) == 7
    project = run(folder, here, without("m001"))
    found, keys = held(project), {label: project.step(label).key for label in project.stages}
    assert all("m001" not in names and len(names) == 3 for _, names in found.values())
    shutil.rmtree(folder / "toy")
    again = run(folder, here, without("m001"))
    assert held(again) == found
    assert {label: again.step(label).key for label in again.stages} == keys
    # undone, they are there again
    assert all(len(names) == 4 for _, names in held(run(folder, here, without())).values())
