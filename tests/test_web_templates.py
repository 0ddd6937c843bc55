"""New sessions from templates: what is filled in, who makes them, what is refused, and that they can be started as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _browser import Tab, chromium
from _web import Site, serving

from cryodask.errors import CryodaskError, InputError, ProjectFileError, StoreError
from cryodask.run.recipe import read_project_file
from cryodask.run.started import Started
from cryodask.web.control import HERE, Starter
from cryodask.web.ledger import Ledger
from cryodask.web.session_templates import Template, new_session, templates_in
from cryodask.web.sessions import Sessions

TEXT = """
name: "{name}"
inputs: {movies: "/data/raw/{name}/**/*.tif"}
microscope: {voltage_kv: 300, spherical_aberration_mm: 2.7, pixel_size_angstrom: {pixel_size}, dose_per_frame: {dose_per_frame}}
pipeline: [motion, ctf]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "screening.yaml").write_text(TEXT.replace("{pixel_size}", "1.7").replace("{dose_per_frame}", "1"))
    (tmp_path / "templates" / "standard.yaml").write_text(TEXT)
    (tmp_path / "templates" / "wrong.yaml").write_text("name: always the same")
    (tmp_path / "krios").mkdir()
    return tmp_path


def test_a_session_has_the_numbers_of_its_template_and_can_be_started(folder: Path) -> None:
    screening, standard, wrong = templates_in(folder / "templates")
    assert (screening.numbers, standard.numbers) == ((), ("pixel_size", "dose_per_frame"))
    assert "has no {name}" in wrong.problem
    path = new_session(folder / "krios", "apo-7", standard.filled("apo-7", {"pixel_size": "0.83", "dose_per_frame": " 1.2 "}))
    assert path == folder / "krios" / "apo-7" / "apo-7"
    made = read_project_file(path.parent / "apo-7.yaml")
    assert (made.name, made.inputs.movies) == ("apo-7", "/data/raw/apo-7/**/*.tif")
    assert (made.microscope.pixel_size_angstrom, made.microscope.dose_per_frame) == (0.83, 1.2)
    assert Started.read(path) == Started(path.parent / "apo-7.yaml", ("--watch",), True)
    assert Starter(HERE, strict=True).state(path)["start"]
    (folder / "templates" / "screening.yaml").chmod(0o664)
    assert "Other accounts can change" in templates_in(folder / "templates")[0].problem
    with pytest.raises(StoreError, match="something called apo-7"):
        new_session(folder / "krios", "apo-7", standard.text)


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("../other", {}, "cannot be the name of a session"),
        ("", {}, "cannot be the name of a session"),
        ("a b", {}, "cannot be the name of a session"),
        ('x"\npipeline: []', {}, "cannot be the name of a session"),
        ("apo", {"dose_per_frame": "1"}, "asks for a name, pixel_size, dose_per_frame"),
        ("apo", {"pixel_size": "1", "dose_per_frame": "1", "more": "1"}, "asks for"),
        ("apo", {"pixel_size": "1}\nfolder: /etc", "dose_per_frame": "1"}, "not a number"),
        ("apo", {"pixel_size": "-1", "dose_per_frame": "1"}, "not a number"),
    ],
)
def test_names_and_numbers_cannot_be_anything_else(name: str, values: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Template("standard", TEXT, ("pixel_size", "dose_per_frame")).filled(name, values)


@pytest.mark.parametrize(
    "text", ["name: [", "pipeline: [ctf]", 'name: "apo"\nfolder: /elsewhere\ninputs: {movies: "*.tif"}\npipeline: [ctf]']
)
def test_a_template_that_is_no_project_file_leaves_nothing_behind(folder: Path, text: str) -> None:
    with pytest.raises(CryodaskError) as error:
        new_session(folder / "krios", "apo", text)
    assert isinstance(error.value, ProjectFileError)
    assert list((folder / "krios").iterdir()) == []


@pytest.fixture
def site(folder: Path) -> Iterator[Site]:
    shown = Sessions({"krios": [folder / "krios"]}, Ledger(folder / "audit"))
    with serving(shown, cache=folder / "cache", templates=folder / "templates", starter=Starter(HERE, strict=True)) as running:
        yield running


@pytest.mark.heavy
def test_a_session_is_made_by_keyboard_alone(site: Site, folder: Path) -> None:
    with chromium() as browser:
        one = Tab(browser, site).log_in().open("")
        press, write = one.page.keyboard.press, one.page.keyboard.type

        def to(name: str) -> None:
            for _ in range(30):
                press("Tab")
                if one.ask("document.activeElement.name || document.activeElement.textContent") == name:
                    return
            raise AssertionError(f"{name} cannot be reached")

        to("name")
        write("apo-7")
        to("template")
        write("standard")
        to("pixel_size")
        write("0.83")
        to("dose_per_frame")
        write("many")
        to("Make the session")
        press("Enter")
        one.until("document.querySelector('.toast.bad')?.textContent.includes('not a number')")
        one.page.focus("[name=dose_per_frame]:enabled")
        press("Control+A")
        write("1.2")
        press("Enter")
        one.page.wait_for_url("**/s/apo-7/")
        one.until("document.body.dataset.run === 'never' && !document.getElementById('r-start').disabled")
        assert [wrong for wrong in one.wrong if "400" not in wrong] == []
        assert "{pixel_size}" in one.open("admin/").text("main")
        assert "has no {name}" in one.text("main")
        one.close()
    assert (folder / "krios" / "apo-7" / "apo-7.yaml").is_file()
    (line,) = Ledger(folder / "audit").records()
    assert (line["action"], line["session"], line["template"]) == ("new session", "apo-7", "standard")


def test_programs_make_sessions_and_are_told_what_is_wrong(site: Site) -> None:
    found = site.json("/api/v1/templates")
    assert [(one["name"], one["numbers"], bool(one["problem"])) for one in found] == [
        ("screening", [], False), ("standard", ["pixel_size", "dose_per_frame"], False), ("wrong", [], True),
    ]  # fmt: skip

    def make(**changed: Any) -> int:
        sent = {"template": "screening", "microscope": "krios", "name": "apo", **changed}
        return site.ask("/s", "POST", sent=sent)[0]

    assert make() == 201
    assert make() == 409
    assert make(name="apo2", microscope="glacios") == 404
    assert make(name="apo2", template="nothing") == 400
    assert make(name="apo2", template="wrong") == 400
    assert make(name="../apo2") == 400
    assert make(name="apo2", values={"folder": "1"}) == 400
    assert [one["id"] for one in site.json("/api/v1/sessions")] == ["apo"]
