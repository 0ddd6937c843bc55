"""Text columns as codes into their distinct values, so that a million rows with five thousand names stay small."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

_MIX = np.uint64(0x9E3779B97F4A7C15)
_AT, _ZERO = ord("@"), ord("0")
_MOST_DIGITS = 18


@dataclass(frozen=True)
class Coded:
    """A text column: row i reads ``names[codes[i]]``; names are in order of first appearance."""

    codes: np.ndarray
    names: list[str]

    def decode(self) -> np.ndarray:
        """The texts, one object per row; rows with the same text share one string."""
        return np.array(self.names, dtype=object)[self.codes] if self.names else np.empty(0, dtype=object)


@dataclass(frozen=True)
class Images:
    """An image column ``NUMBER@STACK``: place in the stack from 0, and the stack."""

    index: np.ndarray
    stack: Coded


class Coder:
    """Gives each new text the next code, through any number of pieces of a column."""

    def __init__(self) -> None:
        self._code: dict[str, int] = {}
        self._pieces: list[np.ndarray] = []

    def add(self, codes: np.ndarray, names: Iterable[str]) -> None:
        """Append a piece that is coded into names of its own."""
        own = np.array([self._code.setdefault(name, len(self._code)) for name in names], dtype=np.int32)
        self._pieces.append(own[codes])

    def result(self) -> Coded:
        """The whole column."""
        codes = np.concatenate(self._pieces) if self._pieces else np.empty(0, dtype=np.int32)
        return Coded(codes, list(self._code))


def encode(texts: Iterable[Any]) -> Coded:
    """A text column from its values; other values become their printed form."""
    import pandas as pd

    codes, names = pd.factorize(np.array([str(t) for t in texts], dtype=object))
    return Coded(codes.astype(np.int32), [str(n) for n in names])


def split_image_names(names: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]] | None:
    """Split ASCII image names ``NUMBER@STACK`` without a loop over particles.

    Parameters
    ----------
    names : array of str, `(particle,)`

    Returns
    -------
    index, codes, stacks
        Place in the stack from 0, code of the stack, and the distinct stacks in order of first appearance; None if a name differs
        from this form.
    """
    text = names.astype("S")
    letters = text.view(np.uint8).reshape(len(text), -1)
    at = (letters == _AT).argmax(axis=1)
    index = np.empty(len(text), dtype=np.int64)
    stacks = np.zeros((len(text), -(-letters.shape[1] // 8) * 8), dtype=np.uint8)
    for digits in np.unique(at):
        rows = slice(None) if (at == digits).all() else np.flatnonzero(at == digits)
        number = _whole_numbers(letters[rows, :digits])
        rest = letters[rows, digits + 1 :]
        if number is None or not (rest.size and rest[:, 0].all()):
            return None
        index[rows] = number - 1
        stacks[rows, : rest.shape[1]] = rest
    return (index, *_distinct(stacks))


def _whole_numbers(letters: np.ndarray) -> np.ndarray | None:
    """Positive numbers from their digits, one row each; None if one is not."""
    digits = letters - np.uint8(_ZERO)
    if not 0 < digits.shape[1] <= _MOST_DIGITS or (digits > 9).any():
        return None
    number = digits @ 10 ** np.arange(digits.shape[1] - 1, -1, -1, dtype=np.int64)
    return number if (number > 0).all() else None


def _distinct(letters: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Codes and distinct texts, in order of first appearance, of rows of letters padded with 0 to whole 8-byte words."""
    import pandas as pd

    words = letters.view(np.uint64)
    mixed = np.zeros(len(words), dtype=np.uint64)
    for word in words.T:
        mixed = (mixed ^ word) * _MIX
        mixed ^= mixed >> np.uint64(29)
    codes, values = pd.factorize(mixed)
    first = np.empty(len(values), dtype=np.int64)
    first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)
    texts = letters.view(f"S{letters.shape[1]}").ravel()
    if (words != words[first[codes]]).any():  # two texts with one hash
        codes, values = pd.factorize(texts.astype(str).astype(object))
        return codes, [str(v) for v in values]
    return codes, [t.decode("ascii") for t in texts[first].tolist()]
