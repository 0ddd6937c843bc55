"""Damaged STAR files: read as gemmi reads them, or refused with the line, never with a traceback.

By hand, with more of them:  ``python tests/test_star_mutants.py SAMPLES_FOLDER 5000``
"""

from __future__ import annotations

import contextlib
import gzip
import random
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import gemmi
import numpy as np

from cryodask.errors import StarError
from cryodask.formats import star
from cryodask.formats.star import read
from cryodask.formats.star.rows import read_blocks

SAMPLES = [
    "metadata/relion/relion31.star",
    "metadata/relion/relion5.star",
    "metadata/relion/relion31.6opticsgroups.star.gz",
    "metadata/relion/FinalRefinement-OriginalParticles-PfCRT.star",
    "metadata/cryosparc/empiar_10076_7.star",
    "metadata/pickers/manual_Falcon_2012_06_12-14_57_34_0.star",
    "betagal_10204/micrographs_ctf_official.star",
]
_ROWS = 6
_WORDS = [
    "nan",
    "inf",
    "True",
    "<NA>",
    "1_000",
    "\u0661",
    "1e400",
    "-",
    "''",
    '"a b"',
    "#",
    "_rlnX",
    "data_x",
    "loop_",
    "0x10",
    "1,5",
    "d'Arc",
    "a#b",
]
_BYTES = b"\0 \t\n\r'\"#_;0123456789.-+eEadlnox@/\xff\xc3"


def head_of(path: Path) -> str:
    """A file with the first rows of each table only."""
    text = (gzip.open(path, "rt") if path.suffix == ".gz" else open(path)).read()  # noqa: SIM115
    kept, rows = [], 0
    for line in text.splitlines():
        is_row = bool(line.strip()) and not line.lstrip().startswith(("_", "#", "data_", "loop_"))
        rows = rows + 1 if is_row else 0 if line.startswith("data_") else rows
        if not is_row or rows <= _ROWS:
            kept.append(line)
    return "\n".join(kept) + "\n"


def mutant(text: str, rng: random.Random) -> bytes:
    """A file with one to three faults: a byte, a word, a line, a column or a number is changed, moved, lost or doubled."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        lines = text.split("\n")
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        words = lines[at].split()
        kind = rng.randrange(9)
        if kind == 0 and words:
            words[rng.randrange(len(words))] = rng.choice(_WORDS)
            lines[at] = " ".join(words)
        elif kind == 1 and words:
            del words[rng.randrange(len(words))]
            lines[at] = " ".join(words)
        elif kind == 2:
            del lines[at]
        elif kind == 3:
            lines.insert(other, lines[at])
        elif kind == 4:
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 5:
            lines.insert(at, rng.choice(["", "# remark", "\t", "loop_", "data_x", "data_", ";", "stray", "_rlnX #9", "_rlnX 1"]))
        elif kind == 6:
            lines = "\n".join(lines)[: rng.randrange(len(text) + 1)].split("\n")
        elif kind == 7 and len(words) > 1:
            i, j = rng.sample(range(len(words)), 2)
            words[i], words[j] = words[j], words[i]
            lines[at] = " ".join(words)
        text = "\n".join(lines)
    data = bytearray(text.encode())
    if data and rng.random() < 0.4:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.choice(_BYTES)
    end = rng.random()
    return bytes(data) if end < 0.9 else bytes(data).replace(b"\n", b"\r\n") if end < 0.95 else b"\xef\xbb\xbf" + bytes(data)


def verdict(path: Path) -> str:
    """How a file was taken; raises if the readers disagree, or with anything but a StarError."""
    readers = (star.read_particles, star.read_micrographs, star.read_coordinates)
    for reader in readers:
        fast = _result(reader, path)
        with mock.patch.object(read, "scan", return_value=None):
            general = _result(reader, path)
        assert _alike(fast, general), (reader.__name__, fast, general)
    with contextlib.suppress(StarError):
        star.read_labels(path, "particles", "images", "")
    star.read_optics(path)
    try:
        ours = {name: block.columns for name, block in read_blocks(path).items()}
    except StarError:
        return "refused"
    try:
        theirs = gemmi.cif.read_string(path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n"))
    except (ValueError, RuntimeError, IndexError) as error:
        return f"not for gemmi: {str(error).splitlines()[0].split(': ', 1)[-1][:60]}"
    for name, columns in ours.items():
        block = next(b for b in theirs if b.name == name or (not name and b.name.strip() in ("", "#", " ")))
        for label, values in columns.items():
            assert [gemmi.cif.as_string(v) for v in block.find_values(f"_{label}")] == [_as_gemmi(v) for v in values], (name, label)
    assert len(theirs) == len(ours)
    return "as gemmi"


def _as_gemmi(value: str) -> str:
    return "" if value in ("?", ".") else value


def _result(reader, path: Path):
    try:
        return reader(path)
    except StarError as error:
        return str(error)


def _alike(a, b) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    return list(a) == list(b) and all(np.array_equal(a[n], b[n], equal_nan=a[n].dtype.kind == "f") and a[n].dtype == b[n].dtype for n in a)


def tried(texts: list[str], count: int, seed: int, folder: Path) -> Counter[str]:
    rng = random.Random(seed)
    path = folder / "mutant.star"
    out: Counter[str] = Counter()
    for number in range(count):
        path.write_bytes(mutant(texts[number % len(texts)], rng))
        out[verdict(path)] += 1
    return out


def test_damaged_files_read_as_gemmi_reads_them_or_are_refused(shared, tmp_path):
    texts = [head_of(shared / "data" / name) for name in SAMPLES]
    for text in texts:  # without damage
        (tmp_path / "whole.star").write_text(text)
        assert verdict(tmp_path / "whole.star") in ("as gemmi", "not for gemmi: expected block header (data_)"), text[:60]
    found = tried(texts, 210, 1, tmp_path)
    assert found["refused"] > 60
    assert found["as gemmi"] > 40


if __name__ == "__main__":
    import collections
    import tempfile
    import traceback

    bad = collections.Counter()
    total: Counter[str] = Counter()
    samples = [head_of(Path(sys.argv[1]) / name) for name in SAMPLES]
    rng = random.Random(7)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "mutant.star"
        for number in range(int(sys.argv[2])):
            data = mutant(samples[number % len(samples)], rng)
            path.write_bytes(data)
            try:
                total[verdict(path)] += 1
            except Exception as error:
                line = traceback.extract_tb(error.__traceback__)[-1]
                bad[f"{type(error).__name__} {line.filename.split('/')[-1]}:{line.lineno} {str(error)[:300]}"] += 1
                Path(tempfile.gettempdir(), f"bad_{number}.star").write_bytes(data)
    print(total, len(bad))
    for text, n in bad.most_common(12):
        print(n, text)
