"""Templates of sessions: project files in which the name of a session, and numbers that differ between sessions, are left open."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryodask.errors import InputError, ProjectFileError, StoreError
from cryodask.run.recipe import project_folder
from cryodask.run.started import Started
from cryodask.store.files import disk_errors, write_atomically
from cryodask.store.project import Project

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")
"""Names of sessions: they become names of folders, and are written into project files."""
_OPEN = re.compile(r"\{([a-z][a-z_]*)\}")
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


@dataclass(frozen=True)
class Template:
    """A template. ``numbers``: what is asked for besides the name. ``problem``: why it cannot be used; empty if it can."""

    name: str
    text: str
    numbers: tuple[str, ...] = ()
    problem: str = ""

    @classmethod
    def read(cls, path: Path) -> Template:
        """Read a project file with ``{name}``, and other words in braces that stand for numbers."""
        try:
            if any(_is_open(one) for one in (path, path.parent)):
                # it may name programs, which the account of the server would run
                return cls(path.stem, "", problem=f"Other accounts can change {path}, so it is not used.")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            return cls(path.stem, "", problem=f"{path} cannot be read: {error}.")
        asked = dict.fromkeys(_OPEN.findall(text))
        if "name" not in asked:
            return cls(path.stem, text, problem=f"{path} has no {{name}}: all its sessions would have the same movies and results.")
        return cls(path.stem, text, tuple(word for word in asked if word != "name"))

    def filled(self, session: str, values: Mapping[str, str]) -> str:
        """The project file of a session.

        Raises
        ------
        InputError
            If the name or a number is not valid, or a number is missing or not asked for.
        """
        if self.problem:
            raise InputError(self.problem, "", "correct the template")
        if not NAME.fullmatch(session):
            raise InputError(f"{session!r} cannot be the name of a session.", "", "use at most 60 letters, digits, - and _")
        if values.keys() != set(self.numbers):
            raise InputError(
                f"The template {self.name} asks for {', '.join(('a name', *self.numbers))}.",
                f"it was given {', '.join(('a name', *sorted(values)))}",
                "reload the page: the template may have changed",
            )
        for word, value in values.items():
            if not _NUMBER.fullmatch(value.strip()):
                raise InputError(f"{word.replace('_', ' ')}: {value!r} is not a number.", "", "write it like 1.05")
        given = {"name": session, **{word: value.strip() for word, value in values.items()}}
        return _OPEN.sub(lambda found: given[found[1]], self.text)


def _is_open(path: Path) -> bool:
    """Whether accounts other than this one and root can change a file or folder."""
    found = path.stat()
    return found.st_uid not in (os.getuid(), 0) or bool(found.st_mode & 0o022)


def templates_in(folder: Path | None) -> list[Template]:
    """The templates in a folder, by name; none if there is no folder."""
    if folder is None:
        return []
    return [Template.read(path) for path in sorted(folder.glob("*.y*ml"))]


def new_session(folder: Path, session: str, text: str) -> Path:
    """Make the folder of a new session with its project file; its run can then be started, and watches for movies.

    Parameters
    ----------
    folder : Path
        Folder of the projects of a microscope.
    session : str
        Name of the session, and of its folder.
    text : str
        Its project file.

    Returns
    -------
    Path
        The project.

    Raises
    ------
    StoreError
        If there is a session of that name, or nothing can be written.
    ProjectFileError
        If the text is no project file.
    """
    home = folder / session
    file = home / f"{session}.yaml"
    with disk_errors(folder):
        try:
            home.mkdir()
        except FileExistsError:
            raise StoreError(f"There is something called {session} in {folder} already.", "", "choose another name") from None
        write_atomically(file, text)
    try:
        place = project_folder(file)
        if place.parent != home.resolve():
            raise ProjectFileError(f"Results of {session} would be written into {place}.", "", "leave  folder  out of the template")
    except ProjectFileError:
        file.unlink()
        home.rmdir()
        raise
    project = Project.create(home / place.name, place.name)
    Started(file, ("--watch",), True).write(project.path)
    for path in (home, file, project.path, project.path / "started.json"):
        # what other accounts can change is not started
        path.chmod(path.stat().st_mode & ~0o022 & 0o7777)
    return project.path
