"""A few hundred damaged files: cryodask's own error, or what a second reader gives. By hand: ``python tests/_mutated.py 5000``."""

from __future__ import annotations

from pathlib import Path

import pytest
from _mutated import differences


@pytest.mark.parametrize(("kind", "least"), [("mrc", 60), ("tiff", 30)])
def test_a_mutated_file_is_refused_or_read_as_a_second_reader_reads_it(tmp_path: Path, kind: str, least: int) -> None:
    outcomes = differences(kind, 200, tmp_path, seed=7)
    wrong = {said: n for said, n in outcomes.items() if said.startswith(("differs", "libtiff"))}
    # mrcfile also wants the word MAP and a machine stamp; sizes and the length of the file decide as well
    wrong |= {s: n for s, n in outcomes.items() if s.startswith("mrcfile") and "Map ID" not in s and "machine stamp" not in s}
    assert not wrong
    assert outcomes["refused"] > least
    assert outcomes["read alike"] > least
