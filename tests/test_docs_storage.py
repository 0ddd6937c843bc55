"""docs/storage.md: its commands run as they stand, and its policy is the default one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from _command import command
from _toy_session import finished
from distributed import Client

from cryodask.interop.about import EXAMPLE
from cryodask.store.project import Project
from cryodask.tiers.inventory import CATEGORIES
from cryodask.tiers.policy import Storage

PAGE = (Path(__file__).parents[1] / "docs" / "storage.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as here:
        made = finished(tmp_path_factory, here, tmp_path_factory.mktemp("storage") / "s")
    policy, about = blocks("yaml")
    (made / "facility.yaml").write_text(policy)
    (made / "about.yaml").write_text(about)
    return made


def test_the_commands_run_one_after_the_other(folder):
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) == 13
    for line in lines:
        # the project of the test has other names, and its places are its own
        here = line.replace("live.yaml", "toy.yaml").replace(" extract", " toy_extract")
        words = [str(folder / "elsewhere" / word[1:]) if word.startswith("/") else word for word in shlex.split(here)[1:]]
        done = command(*words, folder=folder)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
    assert Project(folder / "toy").verify() == []
    assert {path.name for path in (folder / "elsewhere" / "tmp" / "deposit").iterdir()} == {"empiar.json", "oscem.json"}


def test_the_policy_is_the_default():
    shown = Storage.model_validate(yaml.safe_load(blocks("yaml")[0])["storage"])
    assert shown.model_copy(update={"archive": ""}) == Storage()


def test_the_description_is_that_of_the_error():
    assert yaml.safe_load(blocks("yaml")[1]) == yaml.safe_load(EXAMPLE)


def test_every_category_is_in_the_table():
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == set(CATEGORIES)
