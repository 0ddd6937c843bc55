"""The sessions that a server shows: projects with their followers, who may see them, and the audit of what people do to them."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request

from cryodask.errors import InputError
from cryodask.web.follow import Follower, Pace
from cryodask.web.ledger import Ledger
from cryodask.web.people import Person, Right

_DEPTH = 2
"""Levels of folders below one that was named in which projects are looked for."""
_TICK_SECONDS = 0.1
_DISCOVER_SECONDS = 10.0


@dataclass(frozen=True)
class Session:
    """A followed project.

    Parameters
    ----------
    id : str
        Its part of addresses: the name of the folder, with a few letters more where that is not unique.
    path : Path
    microscope : str
        Where it was recorded; empty if unknown.
    follower : Follower
    """

    id: str
    path: Path
    microscope: str
    follower: Follower

    @property
    def name(self) -> str:
        """Name to show."""
        return self.path.name


class Sessions:
    """All sessions of a server, and the thread pool in which their projects are read.

    Parameters
    ----------
    folders : mapping of str to list of Path
        Projects and folders of projects by microscope (``""`` if unknown). Projects that appear later are found.
    audit : Ledger
        Where :meth:`record` writes.
    """

    def __init__(self, folders: dict[str, list[Path]], audit: Ledger) -> None:
        self._folders, self.audit = folders, audit
        self._sessions: dict[str, Session] = {}
        self._known: dict[Path, str] = {}
        self._paces: dict[str, Pace] = {}
        self._looking: set[str] = set()
        self._changed: dict[str, asyncio.Event] = {}
        self._discovered = float("-inf")
        self.pool = ThreadPoolExecutor(4, thread_name_prefix="look")

    def discover(self) -> None:
        """Add projects that are new in the folders."""
        self._discovered = time.monotonic()
        for microscope, folders in self._folders.items():
            for path in dict.fromkeys(found for folder in folders for found in projects_in(folder)):
                if path not in self._known:
                    name = self._id(path)
                    self._known[path] = name
                    self._sessions[name] = Session(name, path, microscope, Follower(path))

    def microscopes(self, person: Person) -> dict[str, Path]:
        """Microscopes that a person operates, and the folder for the new projects of each."""
        operated = (name for name in self._folders if name and person.may(Right.operate, "", name))
        return {name: self._folders[name][0] for name in operated if self._folders[name]}

    def folders(self) -> dict[str, list[Path]]:
        """The folders that are shown, by microscope."""
        return {name: list(some) for name, some in self._folders.items()}

    def found(self, path: Path) -> Session:
        """The session of a project that was made just now in one of the folders."""
        self.discover()
        return self._sessions[self._known[Path(os.path.abspath(path))]]

    def _id(self, path: Path) -> str:
        plain = re.sub(r"[^A-Za-z0-9._-]", "-", path.name).strip(".") or "project"
        if plain == path.name and plain not in self._sessions:
            return plain
        return f"{plain}-{hashlib.blake2b(os.fsencode(path), digest_size=3).hexdigest()}"

    def all(self) -> list[Session]:
        """All sessions, by id."""
        return [self._sessions[name] for name in sorted(self._sessions)]

    def visible(self, person: Person) -> list[Session]:
        """Sessions that a person may see."""
        return [s for s in self.all() if person.may(Right.see, s.id, s.microscope)]

    def get(self, id: str) -> Session | None:
        """A session by its id."""
        return self._sessions.get(id)

    def record(self, person: Person, action: str, session: Session | None = None, **details: Any) -> None:
        """Write a line of the audit; every change that a person makes has one."""
        about = {"session": session.id, "path": str(session.path)} if session is not None else {}
        self.audit.append({"person": person.name, "token": person.scopes is not None, "action": action, **about, **details})

    # --- looking ------------------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Look at the projects for as long as the server runs."""
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()
        while True:
            if time.monotonic() - self._discovered > _DISCOVER_SECONDS:
                await loop.run_in_executor(self.pool, self.discover)
            for session in self.all():
                pace = self._paces.setdefault(session.id, Pace())
                if session.id not in self._looking and pace.due(session.follower.viewers):
                    self._looking.add(session.id)
                    task = asyncio.create_task(self._look(session, pace))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
            await asyncio.sleep(_TICK_SECONDS)

    async def _look(self, session: Session, pace: Pace) -> None:
        try:
            if await asyncio.get_running_loop().run_in_executor(self.pool, session.follower.look):
                self.tell(session)
        finally:
            pace.took(session.follower.cpu_seconds)
            self._looking.discard(session.id)

    def tell(self, session: Session) -> None:
        """Wake the open pages of a session (from the event loop)."""
        self._changed.pop(session.id, asyncio.Event()).set()

    async def changed(self, session: Session, seconds: float) -> bool:
        """Wait for the next change of a session; False after ``seconds`` without one."""
        event = self._changed.setdefault(session.id, asyncio.Event())
        try:
            await asyncio.wait_for(event.wait(), seconds)
        except TimeoutError:
            return False
        return True


def projects_in(folder: Path) -> list[Path]:
    """Projects in a folder: itself, or what is at most two levels below it. Folders that cannot be read have none."""
    found: list[Path] = []
    _search(Path(os.path.abspath(folder)), _DEPTH, found)
    return found


def _search(folder: Path, depth: int, found: list[Path]) -> None:
    try:
        if (folder / "project.json").is_file():
            found.append(folder)
            return
        below = sorted(e.path for e in os.scandir(folder) if not e.name.startswith(".") and e.is_dir()) if depth else []
    except OSError:
        return
    for path in below:
        _search(Path(path), depth - 1, found)


def check_folders(folders: Iterable[Path]) -> None:
    """Refuse folders that do not exist.

    Raises
    ------
    InputError
    """
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"There is no folder {folder}.", "", "give projects, or folders that contain projects")


# --- for routes ------------------------------------------------------------------------------------------------------------------
def sessions_of(request: Request) -> Sessions:
    """The sessions of the server that answers a request."""
    found: Sessions = request.app.state.sessions
    return found


def caller(request: Request) -> Person:
    """The person who asks; set by the log-in (see login.py)."""
    person: Person | None = getattr(request.state, "person", None)
    if person is None:
        raise HTTPException(401)
    return person


def session_of(request: Request, id: str, right: Right = Right.see) -> Session:
    """The session that a request is about, if the caller has a right for it.

    Raises
    ------
    HTTPException
        404 for what the caller may not see, so that nobody learns which sessions there are; 403 for what the caller may see but not change.
    """
    session, person = sessions_of(request).get(id), caller(request)
    if session is None:
        raise HTTPException(404)
    if not person.may(right, session.id, session.microscope):
        raise HTTPException(403 if person.may(Right.see, session.id, session.microscope) else 404)
    return session


def record(request: Request, action: str, session: Session | None = None, **details: Any) -> None:
    """Write a line of the audit about what the caller of a request did."""
    sessions_of(request).record(caller(request), action, session, **details)


def _with(right: Right) -> Callable[[Request, str], Session]:
    def dependency(request: Request, id: str) -> Session:
        return session_of(request, id, right)

    return dependency


Caller = Annotated[Person, Depends(caller)]
Seen = Annotated[Session, Depends(_with(Right.see))]
"""Parameter of a route below ``/s/{id}``: the session, which the caller may see; the next ones: may edit, manage ..."""
Edited = Annotated[Session, Depends(_with(Right.edit))]
Managed = Annotated[Session, Depends(_with(Right.manage))]
Operated = Annotated[Session, Depends(_with(Right.operate))]
Administered = Annotated[Session, Depends(_with(Right.administer))]


def administrator(request: Request) -> Person:
    """The caller, who administers the facility; 404 for everybody else."""
    person = caller(request)
    if not person.administers():
        raise HTTPException(404)
    return person


Administrator = Annotated[Person, Depends(administrator)]
