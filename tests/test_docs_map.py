"""docs/map.md: its commands and its Python run as they stand, on a smaller set; its figures are those of the program."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from _command import command
from test_docs import blocks, commands, example

from cryodask.cli import app
from cryodask.kernels.verdict import CERTAIN, LEAST_COVERAGE, LEAST_EXPLAINED, LEAST_GAIN, LEAST_Z, MOST_CUT
from cryodask.run.recipe import draft_plan
from cryodask.stages import _refine3d, _refinement
from cryodask.stages.ab_initio import _STEPS, _STEPS_OF_CHEAP_CHAINS, AbInitioParams, ab_initio
from cryodask.stages.refine3d import Refine3DParams

PAGE = Path(__file__).parents[1] / "docs" / "map.md"
TEXT = PAGE.read_text()
SIMULATE, INSPECT = blocks(PAGE, "python")
FULL, SMALL = "count=500, box=64, pixel_size_angstrom=4.0", "count=60, box=32, pixel_size_angstrom=8.0"


def run_python(code: str) -> None:
    exec(compile(code, PAGE.name, "exec"), {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, client) -> Path:
    """The project file of the page, shortened, and its particles."""
    made = tmp_path_factory.mktemp("map")
    content = yaml.safe_load(blocks(PAGE, "yaml")[0])
    content["pipeline"][0]["ab_initio"] |= {"steps": 10, "resolution_angstrom": 28}
    content["pipeline"][1]["refine3d"] |= {"iterations": 1}
    content["cluster"] = client.scheduler.address
    (made / "clpb.yaml").write_text(yaml.safe_dump(content))
    assert FULL in SIMULATE
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(made)
        run_python(SIMULATE.replace(FULL, SMALL))
    return made


@pytest.mark.heavy
def test_the_commands_run_one_after_the_other_and_then_the_python(folder, monkeypatch, capsys, client):
    monkeypatch.chdir(folder)
    (block,) = blocks(PAGE, "sh")
    for line in block.splitlines():
        done = command(*shlex.split(line, comments=True)[1:])
        assert done.returncode == 0, (line, done.stdout, done.stderr)
    assert "Not solved: the" in (folder / "clpb" / "report.html").read_text()
    # lazy columns are read on workers, which have another working directory
    with client.as_current():
        run_python(INSPECT)
    assert capsys.readouterr().out.startswith("False ")


@pytest.mark.parametrize("block", blocks(PAGE, "yaml"), ids=lambda b: yaml.safe_load(b)["name"])
def test_every_pipeline_of_the_page_resolves(block, tmp_path):
    path = example(block, tmp_path)
    assert path is not None
    graph = draft_plan(path).graph
    assert graph.problems == ()
    assert graph.warnings == ()


def test_commands_in_the_text_exist(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for line in commands(PAGE):
        name, *words = shlex.split(line, comments=True)[1:]
        typer.main.get_command(app).commands[name].make_context(name, words)  # type: ignore[attr-defined]


def test_the_figures_of_the_page_are_those_of_the_program():
    for said in (
        f"at least {100 * CERTAIN:.0f} %", f"at least {LEAST_GAIN:g} nats", f"by {LEAST_Z:g} standard errors",
        f"(below {100 * LEAST_EXPLAINED:.0f} %)", f"(below {100 * LEAST_COVERAGE:.0f} %)", f"(above {100 * MOST_CUT:.0f} %)",
        f"fewer than {_refine3d._FEWEST} particles",
        f"after {Refine3DParams().iterations} passes", f"{_refinement.DRAWN_PARTICLES:,} particles per half",
        f"larger than {_refinement.WIDEST_UNIT_ANGSTROM:g}", f"at most {AbInitioParams().particles:,} particles",
        f"of {_STEPS} steps", f"four of {_STEPS_OF_CHEAP_CHAINS} steps",
        f"Some {_refinement.VERDICT_PARTICLES} particles", f"cut at {_refinement.FIRST_ANGSTROM:g} Å",
    ):  # fmt: skip
        assert said in " ".join(TEXT.split()), said
    assert "one particle in eight" in TEXT
    assert _refinement.JUNK_SHARE == 1 / 8
    assert len(ab_initio.functions.seeds(AbInitioParams())) == 1
    assert len(ab_initio.functions.seeds(AbInitioParams(symmetry="D2"))) == 4


def test_the_phases_of_the_page_are_those_that_are_printed():
    told = [word for cell in re.findall(r"^\| ([a-z ,]+) \| ", TEXT, re.MULTILINE)[1:7] for word in cell.split(", ")]
    assert told == ["noise power", "grey scale", "draw", "global", "local", "verdict", "sort"]
