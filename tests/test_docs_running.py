"""docs/running.md: its commands and its Python run as they stand, and its tables are those of the program."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from test_session import STEPS, session
from typer.testing import CliRunner

from cryodask import errors
from cryodask.cli import app
from cryodask.run.events import KINDS

pytestmark = pytest.mark.heavy

PAGE = (Path(__file__).parents[1] / "docs" / "running.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, client) -> Path:
    """A small session, on the workers that all tests share."""
    made = tmp_path_factory.mktemp("running")
    session(made, 2, [STEPS[0], {"ctf": {}}, *STEPS[1:]], size=512, workers=None, cluster=client.scheduler.address)
    return made


def test_the_commands_run_one_after_the_other(folder, monkeypatch):
    monkeypatch.chdir(folder)
    lines = blocks("sh")[0].splitlines()
    assert len(lines) == 7
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (line, done.output, done.exception)
        assert ("finished" in done.output) == (words[0] == "watch"), done.output


@pytest.mark.parametrize("code", blocks("python"))
def test_the_python_runs(folder, monkeypatch, code):
    monkeypatch.chdir(folder)
    exec(compile(code, "running.md", "exec"), {})


def test_the_table_of_events_has_every_kind_and_field():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.MULTILINE))
    assert rows.keys() == KINDS.keys()
    for name, text in rows.items():
        fields = [word for quoted in re.findall(r"`([^`]*)`", text) for word in quoted.split(", ")]
        assert fields == [field for field in KINDS[name].model_fields if field not in ("time", "run")], name


def test_the_table_of_exit_statuses_is_that_of_the_errors():
    told = {int(number) for number in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CryodaskError)]
    assert told == {0, *(kind.exit_status for kind in kinds)}
