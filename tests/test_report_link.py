"""``cryodask report --url``: a link to the live page, and to nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from _web import Made
from typer.testing import CliRunner

from cryodask.cli import app
from cryodask.errors import ProjectFileError
from cryodask.report import write_report
from cryodask.store.project import Project

PAGE = (Path(__file__).parents[1] / "docs" / "dashboard.md").read_text()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Made(tmp_path_factory.mktemp("report") / "demo" / "betagal")
    made.register("one")
    return made.project.path


def test_the_report_links_to_the_live_page_as_the_docs_say(project, monkeypatch):
    monkeypatch.chdir(project.parents[1])
    ((words, address),) = re.findall(r"`cryodask (report \S+ --url (\S+))`", PAGE)
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0, done.output
    assert f'<a href="{address}">live page</a>' in (project / "report.html").read_text()


def test_without_an_address_there_is_no_link_and_quotes_stay_quotes(project, tmp_path):
    opened = Project(project)
    assert "live page" not in write_report(opened, tmp_path / "plain.html").read_text()
    text = write_report(opened, tmp_path / "evil.html", live='https://x/"onclick="alert(1)').read_text()
    assert 'href="https://x/&#34;onclick=&#34;alert(1)"' in text


@pytest.mark.parametrize("address", ["javascript:alert(1)", "file:///etc/passwd", "cryo.example.org", "https://"])
def test_an_address_that_is_no_page_is_refused(project, tmp_path, address):
    with pytest.raises(ProjectFileError, match="is not the address of a page"):
        write_report(Project(project), tmp_path / "report.html", live=address)
    assert not (tmp_path / "report.html").exists()
