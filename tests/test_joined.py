"""`Project.joined` holds whatever steps of other packages have given: other lengths, other types, nothing at all, failures only."""

from __future__ import annotations

import numpy as np
import pytest

from cryodask.store.generation import Generation
from cryodask.store.layouts import Grid
from cryodask.store.project import Arrival, Project
from cryodask.store.state import StepState
from cryodask.vocabulary import Var, register

register(
    [
        Var("first_profile", ("ring",), "f4", "1", "a profile of a step of another package"),
        Var("second_profile", ("ring",), "f4", "1", "a profile of another length"),
        Var("first_found", ("slot",), "i8", "1", "numbers of another package"),
        Var("is_good", (), "?", "1", "a truth value of another package"),
        Var("second_count", (), "i8", "1", "a number of another package"),
    ],
    "exposures.joined_test",
)


def step(project: Project, label: str, gives: tuple[str, ...], sizes: dict[str, int]) -> Generation:
    meta = {"stage": label, "version": 1, "params": {}, "recipes": {"": "recipe"}, "inputs": {}}
    path = project.path / "stages" / label / "key"
    Generation.create(path, meta=meta, gives=gives, per_item=True, grids={"": Grid(sizes, {})})
    project.state.adopt(label, StepState(stage=label, key="key"))
    project.save()
    return project.generation(label)


@pytest.fixture
def project(tmp_path) -> Project:
    made = Project.create(tmp_path / "p", "p")
    made.update_exposures([Arrival(f"m{row}", f"content {row}", {}) for row in range(3)], complete=True)
    first = step(made, "first", ("first_profile", "first_found", "is_good"), {"ring": 5, "slot": 4})
    for row in range(2):
        value = {"first_profile": np.full(5, row, np.float32), "first_found": np.arange(row + 1), "is_good": row == 1}
        first.commit(row, f"m{row}", value, attempt=1, revision=0)
    first.journal.close()
    return made


def test_profiles_of_two_lengths_have_dimensions_of_their_own(project):
    second = step(project, "second", ("second_profile", "second_count"), {"ring": 7})
    second.commit(1, "m1", {"second_profile": np.arange(7, dtype=np.float32), "second_count": 9}, attempt=1, revision=0)
    second.journal.close()
    joined = Project(project.path).joined()
    assert joined["first_profile"].dims == ("micrograph", "ring")
    assert joined["second_profile"].dims == ("micrograph", "second_ring")
    one = joined.sel(micrograph="m1")
    assert one["second_profile"].values.tolist() == list(range(7))
    assert one["first_profile"].values.tolist() == [1.0] * 5
    assert joined["second_count"].values.tolist() == [-1, 9]
    assert np.isnan(joined.sel(micrograph="m0")["second_profile"]).all()
    assert joined["is_good"].values.tolist() == [False, True]


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_a_step_without_any_good_item_leaves_the_others_as_they_are(project, failures):
    before = Project(project.path).joined()
    second = step(project, "second", ("second_profile", "second_count"), {"ring": 7})
    for row in range(failures):
        second.commit_failure(row, f"m{row}", "ValueError", "nothing is good", 1, revision=0)
    second.journal.close()
    opened = Project(project.path)
    after = opened.joined()
    assert after["micrograph"].values.tolist() == ["m0", "m1"]
    assert after[list(before.data_vars)].equals(before)
    assert opened["second"].sizes.get("micrograph", 0) == 0
    assert "second_count" in opened.scalars()
    assert len(opened.failures()) == failures


def test_a_project_in_which_nothing_is_good_is_an_empty_table(tmp_path):
    made = Project.create(tmp_path / "p", "p")
    made.update_exposures([Arrival("m0", "content", {})], complete=True)
    only = step(made, "second", ("second_profile", "second_count"), {"ring": 7})
    only.commit_failure(0, "m0", "ValueError", "nothing is good", 1, revision=0)
    only.journal.close()
    assert Project(made.path).joined().sizes["micrograph"] == 0
