"""docs/exposures.md: its project files resolve as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_docs import blocks

from cryodask.run.recipe import draft_plan
from cryodask.stages.polish import PolishParams

PAGE = Path(__file__).parents[1] / "docs" / "exposures.md"


def resolved(folder, text):
    (folder / "movies").mkdir()
    (folder / "movies" / "a.tif").write_bytes(b"")
    (folder / "gain.mrc").write_bytes(b"")
    (folder / "p.yaml").write_text(text)
    graph = draft_plan(folder / "p.yaml").graph
    assert graph.problems == ()
    return graph


def test_the_second_picking_takes_the_kept_classes(tmp_path):
    (text,) = (text for text in blocks(PAGE, "yaml") if "templates:" in text)
    graph = resolved(tmp_path, text)
    again = graph.step("again")
    assert again.inputs["templates"][0].ref == "curate"
    assert again.inputs["exposures"][0].ref == "ctf"
    assert graph.step("second").inputs["particles"][0].ref == "again"


@pytest.mark.parametrize("text", [text for text in blocks(PAGE, "yaml") if "polish" in text])
def test_the_pipelines_resolve(tmp_path, text):
    graph = resolved(tmp_path, text)
    polished = graph.step("polished")
    assert polished.inputs["exposures"][0].ref == "polish"
    assert polished.inputs["map"][0].ref == "postprocess"
    assert graph.step("polish").inputs["mask"][0].ref == "mask"


def test_the_parameters_it_names_exist():
    text = PAGE.read_text()
    for name in ("box", "damage_scale"):
        assert name in PolishParams.model_fields
        assert name in text
