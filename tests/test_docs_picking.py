"""docs/picking.md: its commands and its Python run as they stand, and its tables are those of the page."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from _once import once
from _picked import picked_project
from typer.testing import CliRunner

from cryodask.cli import app
from cryodask.run.decisions import FOR_A_PERSON, waiting
from cryodask.run.recipe import make_plan

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "picking.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = once(tmp_path_factory, "picked", lambda folder: picked_project(folder, 6))
    shutil.copytree(made, tmp_path / "here")
    (tmp_path / "here" / "s.yaml").rename(tmp_path / "here" / "session.yaml")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_the_commands_run_one_after_the_other(folder: Path) -> None:
    (block,) = blocks("sh")
    for line in block.splitlines():
        done = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
        assert done.exit_code == 0, (line, done.output, done.exception)
        if "import" in line:
            assert done.output == "The picks of 6 exposures are already those of the files: nothing was edited.\n"
    assert len(list((folder / "star").glob("*.star"))) == 6


def test_the_python_runs(folder: Path) -> None:
    pytest.importorskip("anywidget")
    for code in blocks("python"):
        exec(compile(code, "picking.md", "exec"), {})


def test_the_pipeline_is_a_pipeline(tmp_path: Path) -> None:
    block, masked, step, varied, regions = map(yaml.safe_load, blocks("yaml"))
    given = {"name": "session", "inputs": {"movies": "*.tif"}, **block}
    given["microscope"] = {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "pixel_size_angstrom": 1.0}
    (tmp_path / "session.yaml").write_text(yaml.safe_dump(given))
    assert make_plan(tmp_path / "session.yaml").steps[-1].label == "ab_initio"
    # the part with a mask goes on from there, and waits for a person unless the file says what the mask is; so does that with regions
    for stage, last, wanted, waits in (
        ("draw_mask", "postprocess", masked["pipeline"], True),
        ("draw_mask", "postprocess", [masked["pipeline"][0], *step, masked["pipeline"][2]], False),
        ("select_region", "end", varied["pipeline"], True),
        ("select_region", "end", [*varied["pipeline"][:2], *regions, varied["pipeline"][3]], False),
    ):
        (tmp_path / "session.yaml").write_text(yaml.safe_dump({**given, "pipeline": [*block["pipeline"], *wanted]}))
        plan = make_plan(tmp_path / "session.yaml")
        assert plan.steps[-1].label == last
        assert (waiting(plan)[stage] == FOR_A_PERSON) is waits


def test_the_keys_are_those_of_the_page() -> None:
    def plain(text: str) -> str:
        return re.sub(r"[`]|</?\w+[^>]*>", "", text).strip()

    page = (ROOT / "cryodask" / "web" / "templates" / "pick.html").read_text()
    told = {plain(a): plain(b) for a, b in re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td></tr>', page)}
    docs = {plain(a): plain(b) for a, b in re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", PAGE, re.MULTILINE)}
    assert told == docs
