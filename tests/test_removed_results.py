"""A result whose folder was removed by hand is recomputed, and only that; the dry run says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from _toy_session import MOVIES, finished, run
from distributed import Client

from cryodask.run.preview import preview
from cryodask.run.recipe import make_plan


@pytest.mark.parametrize(("stage", "file", "todo"), [("toy_mask", "", None), ("toy_refine", "zarr.json", 18), ("toy_extract", "", MOVIES)])
def test_a_removed_result_is_recomputed(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, client: Client, stage: str, file: str, todo: int | None
) -> None:
    folder = finished(tmp_path_factory, client, tmp_path / "p")
    (made,) = (folder / "toy" / "stages" / stage).iterdir()
    if file:
        (made / file).unlink()
    else:
        shutil.rmtree(made)
    shown = preview(make_plan(folder / "toy.yaml"))
    assert shown.problems == []
    steps = {s.step: (s.done, s.todo, s.why) for s in shown.steps}
    assert steps[stage] == (False, todo, "its result was removed")
    assert all(done for step, (done, _, _) in steps.items() if step not in (stage, "toy_classify", "toy_refine", "toy_mask"))
    run(folder, client)
    again = preview(make_plan(folder / "toy.yaml"))
    assert again.problems == []
    assert all(s.done for s in again.steps)
    assert (made / "zarr.json").is_file()
