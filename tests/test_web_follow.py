"""A follower shows what is in the journals, tells what has changed, and survives whatever happens to the project."""

from __future__ import annotations

import json
import shutil
import struct

import numpy as np
import pytest
from _web import TOKEN, Command, Made, make_project, serving

from cryodask.store.journal import Journal
from cryodask.web.columns import COLUMNS
from cryodask.web.follow import DONE, LEFT_OUT, QUARANTINED, STARTED, WAITING, Follower
from cryodask.web.ledger import Ledger
from cryodask.web.sessions import Sessions

pytestmark = pytest.mark.heavy


def unpacked(content: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    (length,) = struct.unpack_from("<I", content)
    head = json.loads(content[4 : 4 + length])
    at, out = 4 + length, {}
    assert at % 8 == 0
    kinds = [("time", "<f8"), ("row", "<u4"), *((c["name"], "<f4") for c in head["columns"]), ("state", "u1")]
    for name, kind in kinds:
        out[name] = np.frombuffer(content, kind, head["rows"], at)
        at += out[name].nbytes
    assert at == len(content)
    return head, out


@pytest.fixture
def made(tmp_path) -> Made:
    return make_project(tmp_path / "session", 5)


def test_numbers_and_states_are_those_of_the_project(made):
    follower = Follower(made.project.path)
    assert follower.look()
    assert follower.state.tolist() == [DONE, DONE, DONE, WAITING, QUARANTINED]
    assert follower.columns["defocus"][:3] == pytest.approx([1.49, 1.5, 1.51])
    assert follower.columns["astigmatism"][:3] == pytest.approx(200)
    assert follower.columns["picks"][:3].tolist() == [9, 9, 9]  # of the scores 5 to 1 those above 2
    assert np.isnan(follower.columns["defocus"][3:]).all()
    counters = follower.counters()
    assert (counters["exposures"], counters["done"], counters["quarantined"], counters["picks"]) == (5, 3, 1, 27)
    assert "truncated" in follower.failures[4]["message"]


def test_only_what_changed_is_told(made):
    follower = Follower(made.project.path)
    follower.look()
    head, all_of_it = unpacked(follower.packed(-1, follower.epoch))
    assert all_of_it["row"].tolist() == [0, 1, 2, 3, 4]
    assert not follower.look()
    assert unpacked(follower.packed(head["sequence"], follower.epoch))[0]["rows"] == 0
    made.commit(3, steps=("motion",))
    assert follower.look()
    new, changed = unpacked(follower.packed(head["sequence"], follower.epoch))
    assert (changed["row"].tolist(), changed["state"].tolist()) == ([3], [STARTED])
    assert new["names"] == ["exposure_3"]
    assert unpacked(follower.packed(head["sequence"], "of another server"))[0]["rows"] == 5


def test_an_exposure_that_is_repeated_leaves_the_quarantine(made):
    follower = Follower(made.project.path)
    follower.look()
    made.commit(4)
    follower.look()
    assert follower.state[4] == DONE
    assert not follower.failures


def test_forgotten_exposures_are_left_out_and_come_back(made):
    follower = Follower(made.project.path)
    follower.look()
    made.project.forget_exposures(["exposure_1"])
    follower.look()
    assert follower.state[1] == LEFT_OUT
    assert follower.counters()["exposures"] == 4
    made.project.forget_exposures(["exposure_1"], undo=True)
    follower.look()
    assert follower.state[1] == DONE


def test_names_travel_with_the_registration(made):
    follower = Follower(made.project.path)
    follower.look()
    made.register("new one")
    follower.look()
    head, changed = unpacked(follower.packed(1, follower.epoch))
    assert (head["names"], changed["state"].tolist()) == (["new one"], [WAITING])


def test_another_result_of_a_step_starts_pages_afresh(made):
    follower = Follower(made.project.path)
    follower.look()
    epoch = follower.epoch
    made._step("ctf", ("defocus_u_angstrom", "defocus_v_angstrom"), per_item=True, key="k2")
    made.project.save()
    assert follower.look()
    assert follower.epoch != epoch
    assert np.isnan(follower.columns["defocus"]).all()
    assert follower.state[0] == STARTED


@pytest.mark.parametrize("harm", ["vanishes", "format", "garbage", "results"])
def test_a_project_that_cannot_be_read_is_a_problem_and_never_an_exception(made, tmp_path, harm):
    follower = Follower(made.project.path)
    follower.look()
    aside = tmp_path / "aside"
    shutil.copytree(made.project.path, aside)
    place = made.project.path / "project.json"
    if harm == "vanishes":
        shutil.rmtree(made.project.path)
    elif harm == "format":
        place.write_text(json.dumps({**json.loads(place.read_text()), "format": 99}))
    elif harm == "garbage":
        place.write_bytes(b"\xff\x00{")
    else:
        shutil.rmtree(made.project.path / "stages")
        made.register("one more")
    follower.look()
    assert follower.problem
    assert follower.counters()["done"] == 3  # what was read stays
    assert unpacked(follower.packed(-1, ""))[0]["rows"] >= 5
    shutil.rmtree(made.project.path, ignore_errors=True)
    aside.rename(made.project.path)
    follower.look()
    assert not follower.problem


def test_a_project_without_any_result_is_empty(tmp_path):
    Made(tmp_path / "empty")
    follower = Follower(tmp_path / "empty")
    follower.look()
    assert not follower.problem
    assert follower.counters()["exposures"] == 0
    assert unpacked(follower.packed(-1, ""))[0]["rows"] == 0


def test_missing_numbers_are_null_for_programs(made):
    follower = Follower(made.project.path)
    follower.look()
    text = json.dumps(follower.document(), allow_nan=False)
    assert json.loads(text)["columns"]["defocus"][3] is None
    assert set(json.loads(text)["columns"]) == {c.name for c in COLUMNS}


def test_the_record_of_a_row_is_that_of_the_whole_journal(made):
    made.commit(0)  # a second record of the row, and a failure that counts less
    made.fail(0, "later")
    for stage in ("motion", "ctf", "pick"):
        folder = made.project.path / "stages" / stage / "k1" / "journal"
        whole = Journal(folder).read().records
        assert {row: Journal(folder).record_of(row) for row in whole} == whole
        assert Journal(folder).record_of(12345) is None
    generation = made.project.generation("motion")
    lines = [crc for crc, record in generation.journal.read().lines[1] if record["ok"]]
    generation.journal.undo(1, "exposure_1", lines, "a test")
    assert generation.journal.record_of(1) is None


def test_a_journal_that_is_written_and_replaced_meanwhile_gives_its_records(made):
    folder = made.project.path / "stages" / "motion" / "k1" / "journal"
    journal = Journal(folder)
    assert journal.record_of(3) is None
    made.commit(3)
    assert journal.record_of(3) == Journal(folder).read().records[3]
    for path in folder.glob("*.jsonl"):
        lines = path.read_bytes().splitlines(keepends=True)
        part = path.with_suffix(".part")
        part.write_bytes(b"".join(lines[::-1]))
        part.rename(path)
    assert {row: journal.record_of(row) for row in range(4)} == {row: Journal(folder).read().records[row] for row in range(4)}


def test_pages_read_previews_and_never_the_micrograph(made, tmp_path):
    """With micrographs that cannot be read every picture is there; with previews that cannot be read one is not."""

    def empty(variable: str) -> int:
        found = [path for path in made.project.path.glob(f"stages/motion/*/{variable}/**/c/**/*") if path.is_file()]
        for path in found:
            path.write_bytes(b"")
        return len(found)

    with serving(Sessions({"": [made.project.path]}, Ledger(tmp_path / "audit")), cache=tmp_path / "cache") as site:
        assert empty("micrograph_sum") == 3
        for path in ("", "exposure/0", "thumbnail/0.jpg", "micrograph/0.jpg", "spectrum/0.jpg", "picture/0/1", "columns", "choose"):
            assert site.ask(f"/s/session/{path}")[0] == 200, path
        assert empty("micrograph_preview") == 3
        assert site.ask("/s/session/thumbnail/1.jpg")[0] == 409


def test_a_torn_last_line_changes_nothing_for_single_records(made):
    folder = made.project.path / "stages" / "motion" / "k1" / "journal"
    before = {row: Journal(folder).record_of(row) for row in range(3)}
    path = next(folder.glob("*.jsonl"))
    path.write_bytes(path.read_bytes() + b'00000000 {"row": 1, "ok"')
    assert {row: Journal(folder).record_of(row) for row in range(3)} == before


def test_the_server_stays_small(tmp_path):
    """With all pages opened, none of the packages that would multiply its memory has been imported."""
    make_project(tmp_path / "projects" / "one")
    pages = [
        "/",
        "/s/one/",
        "/s/one/columns",
        "/s/one/columns.json",
        "/s/one/exposure/0",
        "/s/one/thumbnail/0.jpg",
        "/s/one/spectrum/0.jpg",
    ]
    pages += ["/s/one/maps", "/s/one/map/postprocess", "/s/one/map/postprocess/surface", "/s/one/map/postprocess/section.png"]
    pages += [
        "/s/one/history?first=postprocess&second=classify2d",
        "/s/one/history.json",
        "/s/one/fsc?which=postprocess",
        "/admin/",
        "/cluster",
    ]
    pages += ["/s/one/average/1.png", "/s/one/quarantine", "/s/one/thresholds", "/metrics", "/api/v1/sessions", "/account", "/s/one/people"]
    pages += ["/s/one/particles", "/s/one/particles.json?step=pick", "/s/one/particles/columns?step=pick&names=", "/s/one/columns.parquet"]
    with Command(tmp_path / "projects", "--token", TOKEN, folder=tmp_path, environment={"PYTHONPROFILEIMPORTTIME": "1"}) as command:
        assert [(page, status) for page in pages if (status := command.site.ask(page)[0]) != 200] == []
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in (tmp_path / "dashboard.log").read_text().splitlines()}
    assert "uvicorn" in imported
    assert imported & {"xarray", "dask", "torch", "matplotlib", "pandas", "distributed", "scipy", "zarr", "pyarrow"} == set()


def test_the_command_shows_a_folder_of_projects(tmp_path):
    make_project(tmp_path / "projects" / "deep" / "one")
    with Command(tmp_path / "projects", "--token", TOKEN, folder=tmp_path) as command:
        assert command.said.endswith(f"/?token={TOKEN}")
        assert [s["id"] for s in command.site.json("/api/v1/sessions")] == ["one"]
        assert command.site.json("/s/one/exposure/0")["picks"]["accepted"] == [1] * 9 + [0] * 3
