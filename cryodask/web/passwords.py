"""Password files: one line ``NAME:scrypt:N:R:P:SALT:HASH`` per person, salt and hash in base64."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import threading
from pathlib import Path
from typing import NamedTuple

from cryodask.errors import InputError
from cryodask.store.files import write_atomically

_COST = (1 << 15, 8, 1)
_HASH_BYTES = 32
_MEMORY = 128 * _COST[0] * _COST[1] * 2
_ONE_AT_A_TIME = threading.BoundedSemaphore(2)
"""A check takes 32 MB and a tenth of a second: thousands at once must not take the server away from others."""
LONGEST = 1024


class _Hash(NamedTuple):
    """The part of a line after the name."""

    n: int
    r: int
    p: int
    salt: bytes
    hash: bytes

    @classmethod
    def of(cls, password: str) -> _Hash:
        salt = secrets.token_bytes(16)
        return cls(*_COST, salt, _scrypt(password, salt, *_COST))

    @classmethod
    def read(cls, text: str) -> _Hash | None:
        """From a line; None if it is not one that :meth:`text` has written, or would take more memory."""
        try:
            kind, n, r, p, salt, known = text.split(":")
            found = cls(int(n), int(r), int(p), base64.b64decode(salt, validate=True), base64.b64decode(known, validate=True))
        except ValueError:
            return None
        return found if kind == "scrypt" and found[:3] == _COST and len(found.hash) == _HASH_BYTES else None

    def text(self) -> str:
        return ":".join(("scrypt", *map(str, self[:3]), _text(self.salt), _text(self.hash)))

    def fits(self, password: str) -> bool:
        return hmac.compare_digest(_scrypt(password, self.salt, self.n, self.r, self.p), self.hash)


class PasswordFile:
    """The people of a password file; read again when it has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, ...] = ()
        self._lines: dict[str, str] = {}
        self._nobody = _Hash.of(secrets.token_urlsafe())

    def line(self, name: str) -> str | None:
        """The hash of a person; None if the person is not in the file."""
        there = os.stat(self.path)
        stamp = (there.st_ino, there.st_size, there.st_mtime_ns)
        if stamp != self._stamp:
            lines = (line.strip().partition(":") for line in self.path.read_text(encoding="utf-8").splitlines())
            self._lines = {name: rest for name, colon, rest in lines if colon and not name.startswith("#")}
            self._stamp = stamp
        return self._lines.get(name)

    def fits(self, name: str, password: str) -> bool:
        """Whether a password is that of a person; takes as long for people who are not in the file."""
        line = self.line(name)
        known = _Hash.read(line or "")
        with _ONE_AT_A_TIME:
            same = (known or self._nobody).fits(password[:LONGEST])
        return same and known is not None

    def write(self, name: str, password: str) -> None:
        """Add a person, or change the password; the file is readable by this account only."""
        if not name or any(c in name for c in ":\n\r#") or name != name.strip():
            raise InputError(f"{name!r} cannot be a log-in name.", "", "use letters, digits and . _ - @")
        if len(password) < 10:
            raise InputError("The password is shorter than ten characters.", "", "choose a longer one")
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if line.partition(":")[0] != name]
        if not self.path.exists():
            self.path.touch(mode=0o600)
        write_atomically(self.path, "\n".join([*kept, f"{name}:{_Hash.of(password).text()}"]) + "\n")
        self.path.chmod(0o600)


def _scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=n, r=r, p=p, maxmem=_MEMORY, dklen=_HASH_BYTES)


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
