"""``columns.parquet``: the same numbers as the other answers, where pyarrow is installed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from _web import Site, make_project, serving

from cryodask.web import follow, parquet
from cryodask.web.ledger import Ledger
from cryodask.web.sessions import Sessions


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    make_project(tmp_path / "session", 5)
    with serving(Sessions({"": [tmp_path / "session"]}, Ledger(tmp_path / "audit")), cache=tmp_path / "cache") as site:
        yield site


def test_the_file_has_the_numbers_of_the_json_answer(site):
    pq = pytest.importorskip("pyarrow.parquet")
    status, headers, content = site.ask("/s/session/columns.parquet")
    assert (status, headers["content-type"]) == (200, "application/vnd.apache.parquet")
    table, known = pq.read_table(io.BytesIO(content)), site.json("/s/session/columns.json")
    assert table["row"].to_pylist() == known["row"]
    assert table["name"].to_pylist() == known["name"]
    assert table["state"].to_pylist() == [parquet.STATES[state] for state in known["state"]]
    for name, values in (known["columns"] | {"time": known["time"]}).items():
        found = table[name].to_pylist()
        assert [v is None for v in found] == [v is None for v in values], name
        assert [v for v in found if v is not None] == pytest.approx([v for v in values if v is not None], rel=1e-6), name
    assert None in table["defocus"].to_pylist()
    assert table.schema.field("defocus").metadata[b"unit"] == "µm".encode()


def test_states_have_the_words_of_their_numbers():
    names = {value: name for name, value in vars(follow).items() if name.isupper() and isinstance(value, int) and name != "FORMAT"}
    assert [names[n].lower().replace("_", " ") for n in range(5)] == list(parquet.STATES)


def test_without_pyarrow_the_answer_names_the_other_form(site, monkeypatch):
    monkeypatch.setattr(parquet, "available", lambda: False)
    status, _, body = site.ask("/s/session/columns.parquet")
    assert status == 501
    assert "columns.json" in json.loads(body)["what"]


def test_a_process_that_fails_is_an_error_with_its_last_words():
    with pytest.raises(OSError, match=r"could not be written: struct\.error"):
        parquet.as_parquet(b"")
