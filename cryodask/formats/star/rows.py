"""The lines of a STAR file as blocks of texts: the general reader, which accepts any layout and refuses what it cannot read, with the line.

A quote opens at the start of a value and closes before a blank, as in CIF; ``#`` at the start of a value begins a comment. Blank lines and
comments may stand anywhere, lines may end as on any system, and a list of pairs is a table of one row. ``data_`` and ``loop_`` are
keywords in any case, and names of columns and tables are the same in any case, as in CIF (Hall, Allen and Brown 1991).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cryodask.errors import StarError
from cryodask.formats.star.names import canonical

_BLANKS = " \t\x0b\x0c"
_TOKEN = re.compile(
    r"""'(?:[^']|'(?=[^ \t\x0b\x0c]))*'(?![^ \t\x0b\x0c])|"(?:[^"]|"(?=[^ \t\x0b\x0c]))*"(?![^ \t\x0b\x0c])|[^ \t\x0b\x0c]+"""
)


@dataclass
class Block:
    """A table: values by column, as texts without their quotes. ``pairs``: it was written as a list of pairs, so it has one row."""

    columns: dict[str, list[str]] = field(default_factory=dict)
    pairs: bool = True


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, whatever ends them.

    Raises
    ------
    StarError
        If it cannot be read, or is not text in UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise StarError(f"{path} cannot be read: {error.strerror}.", "", "check the path") from error
    except UnicodeDecodeError as error:
        raise StarError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}.", "", "check the path") from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if "\0" in text:
        number = next(n for n, line in enumerate(lines, 1) if "\0" in line)
        raise refused(path, number, "a zero byte", "the disk was full or the copy was cut off when it was written", "copy the file again")
    return lines


def read_blocks(path: Path) -> dict[str, Block]:
    """All tables of a STAR file by name, without ``data_``.

    Raises
    ------
    StarError
        With the line: a row that is longer or shorter than its header, or stands before ``loop_``; a table or column that occurs twice;
        a quote that is not closed; text of several lines.
    """
    blocks: dict[str, Block] = {}
    at: dict[str, int] = {}
    reader: _BlockReader | None = None
    for number, line in enumerate(read_lines(path), 1):
        words = split_line(path, number, line)
        if not words:
            continue
        if reader is None or reader.ends_with(words):
            if not is_data(words[0]) or len(words) > 1:
                raise refused(path, number, f"{shown(words)} outside any table", "", "every table begins with a line data_NAME")
            name = canonical(words[0][len("data_") :])
            if name in blocks:
                raise refused(
                    path, number, f"the table data_{name} occurs twice (first in line {at[name]})", "files were joined by hand", "keep one"
                )
            at[name], blocks[name] = number, Block()
            reader = _BlockReader(path, name, blocks[name])
        else:
            reader.take(number, words)
    if not blocks:
        raise StarError(f"{path} has no data_ block.", "it is not a STAR file, or is empty", "check the path")
    return blocks


class _BlockReader:
    """Takes the lines of one block."""

    def __init__(self, path: Path, name: str, block: Block) -> None:
        self._path, self._name, self._block = path, name, block
        self._at: dict[str, int] = {}
        self._values: list[list[str]] = []
        self._loop = self._rows = False

    def ends_with(self, words: list[str]) -> bool:
        """Whether a line begins the next block: a row may begin with a name such as ``data_1/a.mrc``.

        In a table of one column only ``data_`` in small letters does, because RELION takes any other spelling for a value.
        """
        columns = len(self._values) if self._loop else 0
        return is_data(words[0]) and not (len(words) == columns and (columns > 1 or not words[0].startswith("data_")))

    def take(self, number: int, words: list[str]) -> None:
        if is_loop(words[0]) and len(words) == 1:
            if self._at or self._loop:
                raise self._refused(number, "a second loop_", "a line data_NAME is missing before it", "add it")
            self._loop, self._block.pairs = True, False
        elif words[0].startswith("_") and len(words) == (1 if self._loop else 2) and not self._rows:
            self._label(number, words)
        elif self._loop and not words[0].startswith("_") and not is_loop(words[0]):
            self._row(number, words)
        else:
            self._misplaced(number, words)

    def _label(self, number: int, words: list[str]) -> None:
        label = canonical(words[0][1:])
        if label in self._at:
            raise self._refused(
                number, f"the column _{label} occurs twice (first in line {self._at[label]})", "columns were joined by hand", "keep one"
            )
        self._at[label] = number
        self._block.columns[label] = [unquoted(w) for w in words[1:]]
        self._values.append(self._block.columns[label])

    def _row(self, number: int, words: list[str]) -> None:
        if len(words) != len(self._values):
            raise self._refused(
                number,
                f"{len(words)} values for {len(self._values)} columns",
                "the file is truncated, or a name contains a blank",
                "write the file again",
            )
        self._rows = True
        for values, word in zip(self._values, words):
            values.append(unquoted(word))

    def _misplaced(self, number: int, words: list[str]) -> None:
        if self._loop:
            where = "after the rows began" if self._rows else "in a list of columns"
            raise self._refused(number, f"{shown(words)} {where}", "a line was moved, or data_NAME is missing before it", "fix that line")
        if words[0].startswith("_"):
            raise self._refused(
                number,
                f"{len(words) - 1} values for the name {words[0]}, outside a loop",
                "loop_ is missing, or a name contains a blank",
                "fix that line",
            )
        raise self._refused(number, f"the row {shown(words)} stands before loop_", "a line was moved while editing", "fix that line")

    def _refused(self, number: int, what: str, usual_reason: str, way_out: str) -> StarError:
        return refused(self._path, number, f"{what}, in data_{self._name}", usual_reason, way_out)


def is_data(word: str) -> bool:
    """Whether a word that is not quoted begins a block."""
    return word[: len("data_")].lower() == "data_"


def is_loop(word: str) -> bool:
    """Whether a word that is not quoted begins a loop."""
    return word.lower() == "loop_"


def split_line(path: Path, number: int, line: str) -> list[str]:
    """Values of a line, still quoted, without its comment."""
    if "#" not in line and "'" not in line and '"' not in line and not line.startswith(";"):
        return [w for w in _on_blanks(line) if w]
    if line.startswith(";"):
        raise refused(path, number, "text of several lines (;)", "", "write it in one line")
    words = list(_words(line))
    for word in words:
        if word[0] in "'\"" and (len(word) < 2 or word[-1] != word[0]):
            raise refused(path, number, f"no closing quotation mark after {word[:40]}", "", "close the quote, and rerun")
    return words


def _on_blanks(line: str) -> list[str]:
    return line.translate(_TO_SPACE).split(" ")


_TO_SPACE = str.maketrans(dict.fromkeys(_BLANKS, " "))


def _words(line: str) -> Iterator[str]:
    for found in _TOKEN.finditer(line):
        if found[0].startswith("#"):
            return
        yield found[0]


def unquoted(word: str) -> str:
    """A value without its quotes."""
    return word[1:-1] if word[0] in "'\"" else word


def shown(words: list[str]) -> str:
    """The beginning of a line, for messages."""
    text = " ".join(words)
    return repr(text if len(text) <= 60 else text[:57] + "...")


def refused(path: Path, number: int, what: str, usual_reason: str, way_out: str) -> StarError:
    """Error for a line."""
    return StarError(f"{path}, line {number}: {what}.", usual_reason, way_out)
