"""Unions of sets whose images were cut apart, and of two results of one step. Toy stages, real runner."""

from __future__ import annotations

import numpy as np
import pytest
from test_counts import PIPELINE, here, run, session, write  # noqa: F401  here is a fixture
from test_pooled import HIGH, cut, table, union

from cryodask.errors import InputError
from cryodask.run.preview import preview
from cryodask.run.recipe import draft_plan

CUT = PIPELINE[:5]
"""Every exposure has particles at y = 4, 8 and 10, cut with the factor 1."""


def factors(project, label: str) -> list[float]:
    """By what the images of a step are brighter than those of the first extraction, by place in the exposure."""
    both = table(project, label).merge(table(project, "toy_extract"), on=["micrograph", "position_y_angstrom"])
    return np.round((both["image_x"] / both["image_y"]).tolist(), 3).tolist()


def problems(folder, pipeline) -> list[str]:
    return preview(draft_plan(write(folder, pipeline))).problems


def test_two_cuts_of_the_same_particles_are_refused_before_work(tmp_path):
    folder = session(tmp_path, 2)
    for particles in ("toy_pick", "toy_curate"):
        pipeline = [*CUT, "toy_curate", cut("other", 2, particles), union("toy_classify", "other")]
        (said,) = problems(folder, pipeline)
        assert "different images of the same particles, extracted by toy_extract and by other" in said
        assert "merge: {prefer: toy_classify} or {prefer: other}" in said
    alike = [*CUT, cut("other", 1, "toy_pick"), union("toy_classify", "other")]
    assert problems(folder, alike) == [], "cut alike, they are the same images"


@pytest.mark.parametrize(
    ("prefer", "factor"), [("other", 2.0), ("other.particles", 2.0), ("toy_extract", 1.0)], ids=["name", "with output", "first"]
)
def test_the_preferred_images_are_taken_however_their_source_is_called(tmp_path, here, prefer, factor):  # noqa: F811
    folder = session(tmp_path, 2)
    project = run(folder, here, [*CUT[:4], cut("other", 2, "toy_pick"), union("toy_extract", "other", prefer=prefer), "toy_classify"])
    assert factors(project, "merge") == [factor] * 6


def test_a_union_of_unions_reads_the_images_where_they_lie(tmp_path, here):  # noqa: F811
    folder = session(tmp_path, 2)
    steps = [*CUT[:4], cut("two", 2, "toy_pick"), union("toy_extract", "two", prefer="two"), cut("three", 3, "toy_pick")]
    steps += [{"merge as all": {"prefer": "merge", "from": {"particles": ["three", "merge"]}}}, "toy_classify"]
    project = run(folder, here, steps)
    assert factors(project, "toy_classify") == [2.0] * 6


def test_selections_that_share_particles_are_refused_once_that_is_known(tmp_path, here):  # noqa: F811
    folder = session(tmp_path, 2)

    def steps(limit: float, number: float) -> list:
        low = {"select as low": {"where": f"position_y_angstrom < {limit}"}}
        return [*CUT, low, HIGH, cut("small", number, "low"), cut("large", 3, "high"), union("small", "large"), "toy_poses"]

    project = run(folder, here, steps(5, 2))
    assert factors(project, "merge") == [2.0, 3.0, 3.0] * 2
    with pytest.raises(InputError, match="2 particles have different images in small and large"):
        run(folder, here, steps(9, 2))
    (said,) = problems(folder, steps(9, 2))
    assert "prefer: small" in said
    assert factors(run(folder, here, steps(9, 3)), "merge") == [3.0] * 6, "cut alike, from sets that overlap"


def test_a_result_is_merged_with_an_earlier_one_of_its_step(tmp_path, here):  # noqa: F811
    folder = session(tmp_path, 2)

    def steps(limit: float, *more) -> list:
        return [*CUT, {"toy_curate": {"leave_out_above": limit}}, *more]

    few = run(folder, here, steps(5)).generation("toy_curate").key
    for limit, count in ((9.0, 4), (99.0, 6)):
        project = run(folder, here, steps(limit, union(f"toy_curate@{few}", "toy_curate"), "toy_poses"))
        assert project.particles("merge").sizes["particle"] == project.particles("toy_poses").sizes["particle"] == count
    (said,) = problems(folder, steps(9, union(f"toy_curate@{few}", f"toy_curate@{few[:6]}")))
    assert said.endswith(f"merge: from.particles names one source twice: toy_curate@{few}.")


def test_of_two_refinements_of_one_step_the_preferred_one_brings_its_map(tmp_path, here):  # noqa: F811
    folder = session(tmp_path, 2)

    def steps(*more) -> list:
        return [*CUT, {"toy_poses": {"number": 2}}, *more]

    old = run(folder, here, [*CUT, "toy_poses"]).generation("toy_poses").key
    new = run(folder, here, steps()).generation("toy_poses").key
    for prefer, key in (("toy_poses", new), (f"toy_poses@{old[:5]}", old)):
        both = union(f"toy_poses@{old}", "toy_poses", prefer=prefer)
        project = run(folder, here, steps(both, "toy_polish"))
        assert set(project.step("toy_polish").inputs["map"][0].parts.values()) == {f"toy_poses/{key}"}
