"""Archives: a folder, or an object store. Both take a file once under a key, never overwrite, and give its bytes back.

What an archive says about a copy is not believed: whoever copies reads the copy back (see archive.py).
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from cryodask.errors import ArchiveError, ProjectFileError
from cryodask.store.files import fsync_folder, write_pieces
from cryodask.tiers.checksums import pieces

_IN_ONE_REQUEST = 512 << 20
"""A larger file is sent in parts, for which stores have no condition."""
_RETRIES, _PATIENCE = 3, timedelta(seconds=30)


class Archive(Protocol):
    """A place for copies. ``url`` is what the ledger records."""

    url: str

    def put(self, key: str, path: Path) -> bool:
        """Copy a file; False if there is something under the key already, which is left as it is."""
        ...

    def read(self, key: str) -> Iterator[bytes]:
        """Bytes of a copy, in pieces."""
        ...


def open_archive(url: str) -> Archive:
    """The archive at a folder or at ``s3://BUCKET/PREFIX`` (``gs://``, ``az://``); credentials come from the environment.

    Raises
    ------
    ProjectFileError
        If the address is of no known kind.
    """
    scheme, found, rest = url.partition("://")
    if not found or scheme == "file":
        folder = (Path(rest) if found else Path(url).expanduser()).absolute()
        # as it is recorded and shown; links are followed only where a name like a/../b needs it, for a site may point them elsewhere later
        return FolderArchive(folder.resolve() if ".." in folder.parts else folder)
    if scheme not in ("s3", "s3a", "gs", "az"):
        raise ProjectFileError(f"{scheme}:// is not a kind of archive.", "", "give a folder, or s3://BUCKET/PREFIX")
    if "@" in rest:
        raise ProjectFileError(
            "The address of an archive holds credentials, which would be written into the project.",
            "",
            "give them in the environment, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    return ObjectArchive(url.rstrip("/"))


def safe_key(text: str) -> str:
    """A key that every store takes: other characters than letters, digits and ``/._=-`` become ``_`` and their code."""
    return re.sub(r"[^A-Za-z0-9/._=-]", lambda found: "".join(f"_{b:02x}" for b in os.fsencode(found[0])), text)


class FolderArchive:
    """An archive in a folder: a mounted disk, or a file system with tape behind it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, str(folder)

    def put(self, key: str, path: Path) -> bool:
        """Like :meth:`Archive.put`; the copy appears under its name when it is complete and on disk."""
        target = self.folder / key
        if target.exists():
            return False
        with _named(self.url, key):
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f"{target.name}.{socket.gethostname()}.{os.getpid()}.part")
            try:
                write_pieces(part, pieces(path))
                try:
                    os.link(part, target)  # unlike a rename it never replaces a file
                except FileExistsError:
                    return False
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(part)
            fsync_folder(target.parent)
        return True

    def read(self, key: str) -> Iterator[bytes]:
        """Like :meth:`Archive.read`."""
        with _named(self.url, key, reads=True):
            yield from pieces(self.folder / key)


class ObjectArchive:
    """An archive in an object store."""

    def __init__(self, url: str) -> None:
        try:
            from obstore.store import from_url
        except ModuleNotFoundError:
            raise ArchiveError(
                f"{url} needs the package obstore, which is not installed.", "", 'pip install "cryodask[facility]"'
            ) from None
        plain = any(os.environ.get(name, "").startswith("http://") for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
        options: dict[str, Any] = {"client_options": {"allow_http": plain}} if plain else {}
        self.url = url
        with _named(url):
            self._store: Any = from_url(url, retry_config={"max_retries": _RETRIES, "retry_timeout": _PATIENCE}, **options)

    def put(self, key: str, path: Path) -> bool:
        """Like :meth:`Archive.put`."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, NotFoundError

        with _named(self.url, key):
            try:
                obstore.head(self._store, key)
            except (NotFoundError, FileNotFoundError):
                pass
            else:  # some stores ignore the condition of a conditional put, and overwrite
                return False
            if path.stat().st_size > _IN_ONE_REQUEST:
                obstore.put(self._store, key, path, use_multipart=True)
                return True
            try:
                obstore.put(self._store, key, path.read_bytes(), mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def read(self, key: str) -> Iterator[bytes]:
        """Like :meth:`Archive.read`."""
        import obstore

        with _named(self.url, key, reads=True):
            for piece in obstore.get(self._store, key).stream():
                yield bytes(piece)


@contextmanager
def _named(url: str, key: str = "", *, reads: bool = False) -> Iterator[None]:
    """Turn the errors of a store into one that says where it happened."""
    try:
        yield
    except ArchiveError:
        raise
    except Exception as error:  # each kind of store has its own errors
        if reads and isinstance(error, FileNotFoundError):
            raise ArchiveError(f"{url} has no copy {key}.", "it was removed there", "look for it in the archive") from error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ArchiveError(
                f"{url} is full ({error.strerror}).",
                "its disk is full, or a quota is reached",
                "nothing was removed because of this; free space there, or choose another archive",
            ) from error
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ArchiveError(
            f"{url} cannot be used{f' for {key}' if key else ''}: {text[:300]}",
            "it is unreachable or full, or the credentials are missing or expired",
            "nothing was removed because of this; check the archive and repeat the command: it goes on where it stopped",
        ) from error
