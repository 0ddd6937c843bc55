"""docs/structures.md: its project files resolve as they stand, and its figures are those of the program."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from _states import PIXEL, two_states, write_project
from test_docs import blocks

from cryodask.formats.mrc import write_mrc
from cryodask.kernels.q_score import COARSEST_ANGSTROM
from cryodask.run.recipe import draft_plan
from cryodask.stages import _aligned_maps, _classify3d
from cryodask.stages.ab_initio import _MOST_SORTED
from cryodask.stages.classify3d import _ALIKE, LEAST_GAIN_Z
from cryodask.stages.variability import LEAST_AGREEMENT

PAGE = Path(__file__).parents[1] / "docs" / "structures.md"
TEXT = PAGE.read_text()
FIRST, UNIT, SUBTRACTED, MIXTURE, SPECIES, JUNK, ALIGNED, MOTION, *AFTER = blocks(PAGE, "yaml")


@pytest.fixture
def folder(tmp_path) -> Path:
    write_project(tmp_path, two_states(60), [])
    for name in ("domain", "one_unit"):
        write_mrc(tmp_path / f"{name}.mrc", np.ones((32,) * 3, np.float32), PIXEL)
    return tmp_path


@pytest.mark.parametrize("more", [UNIT, SUBTRACTED, JUNK, MOTION])
def test_the_pipelines_resolve(folder, more):
    content = yaml.safe_load(FIRST)
    (folder / "first.yaml").write_text(yaml.safe_dump(content))
    graph = draft_plan(folder / "first.yaml").graph
    assert graph.problems == ()
    assert [p.ref for p in graph.step("state2").inputs["map"]] == ["classify3d.class2"]
    content["pipeline"] = content["pipeline"][:2] + yaml.safe_load(more)
    (folder / "more.yaml").write_text(yaml.safe_dump(content))
    assert draft_plan(folder / "more.yaml").graph.problems == ()


def test_initial_maps_are_what_particles_are_sorted_by(folder):
    (folder / "species.yaml").write_text(SPECIES)
    graph = draft_plan(folder / "species.yaml").graph
    assert graph.problems == ()
    assert [p.ref for p in graph.step("classify3d").inputs["maps"]] == [f"ab_initio.class{k}" for k in (1, 2, 3, 4)]
    assert [p.ref for p in graph.step("refine3d").inputs["map"]] == ["classify3d.class1"]
    assert f"In the first {('one', 'two', 'three', 'four')[_aligned_maps.HELD_OPEN - 1]} passes" in TEXT


def test_maps_of_a_mixture_are_aligned_and_their_particles_merged(folder):
    content = yaml.safe_load(MIXTURE)
    content["pipeline"] = [content["pipeline"][0], *yaml.safe_load(ALIGNED)]
    (folder / "aligned.yaml").write_text(yaml.safe_dump(content))
    graph = draft_plan(folder / "aligned.yaml").graph
    assert graph.problems == ()
    merged = graph.step("merge").outputs["particles", "particles"]
    assert merged.pose_frames == graph.step("first").outputs["particles", "particles"].pose_frames


@pytest.mark.parametrize("text", AFTER)
def test_what_follows_a_map_resolves(folder, text):
    content = yaml.safe_load(FIRST)
    (folder / "5a1a.cif.gz").write_bytes(b"")
    (folder / "sequences.fasta").write_text(">a\nMTMITDSLAV\n")
    steps = [next(iter(step)) if isinstance(step, dict) else step for step in yaml.safe_load(text)["pipeline"]]
    assert steps[0] == "refine3d"
    content["pipeline"] = [content["pipeline"][0], *yaml.safe_load(text)["pipeline"]]
    (folder / "after.yaml").write_text(yaml.safe_dump(content))
    graph = draft_plan(folder / "after.yaml").graph
    assert graph.problems == ()
    assert [step.label for step in graph.steps[2:]] == [name.partition(" as ")[2] or name.rpartition(".")[2] for name in steps]


def test_classes_of_a_mixture_are_refined_on_their_own(folder):
    (folder / "mixture.yaml").write_text(MIXTURE)
    graph = draft_plan(folder / "mixture.yaml").graph
    assert graph.problems == ()
    for number, label in ((1, "first"), (2, "second")):
        assert {p.ref for port in ("particles", "map") for p in graph.step(label).inputs[port]} == {f"ab_initio.class{number}"}


def test_the_figures_are_those_of_the_program():
    assert f"a map worse than {COARSEST_ANGSTROM:g} A has none" in TEXT
    assert f"at least {LEAST_GAIN_Z:.0f} standard errors" in TEXT
    assert f"more than {100 * _ALIKE:.0f} %" in TEXT
    assert f"is below {LEAST_AGREEMENT:g}" in TEXT
    assert f"at most {_MOST_SORTED:,}" in TEXT
    assert f"fewer than {_classify3d.FEWEST_OF_A_CLASS} particles per class" in TEXT
