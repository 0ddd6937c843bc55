"""docs/exposures.md: its project files resolve as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_docs import blocks

from cryodask.run.recipe import draft_plan
from cryodask.stages.polish import PolishParams

PAGE = Path(__file__).parents[1] / "docs" / "exposures.md"


@pytest.mark.parametrize("text", blocks(PAGE, "yaml"))
def test_the_pipelines_resolve(tmp_path, text):
    (tmp_path / "movies").mkdir()
    (tmp_path / "movies" / "a.tif").write_bytes(b"")
    (tmp_path / "gain.mrc").write_bytes(b"")
    (tmp_path / "p.yaml").write_text(text)
    graph = draft_plan(tmp_path / "p.yaml").graph
    assert graph.problems == ()
    polished = graph.step("polished")
    assert polished.inputs["exposures"][0].ref == "polish"
    assert polished.inputs["map"][0].ref == "postprocess"
    assert graph.step("polish").inputs["mask"][0].ref == "mask"


def test_the_parameters_it_names_exist():
    text = PAGE.read_text()
    for name in ("box", "damage_scale"):
        assert name in PolishParams.model_fields
        assert name in text
