"""Watching a session while it is recorded: movies are taken when their files are complete."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryodask.errors import CryodaskError
from cryodask.formats.presence import show_name
from cryodask.run.recipe import Plan, movie_paths
from cryodask.run.sources import Files
from cryodask.run.stopping import Stop
from cryodask.store.project import Arrival, Project

_POLL_SECONDS = 2.0
_SETTLED_SECONDS = 10.0
_GIVEN_UP_SECONDS = 600.0
_FIRST_MOVIES, _FIRST_SECONDS = 3, 60.0


@dataclass(frozen=True)
class Until:
    """When a watched session is over, so that the later steps can run.

    ``idle_seconds``: no file has appeared or grown for this long. ``movies``: the project has this many movies.
    """

    idle_seconds: float | None = None
    movies: int | None = None


@dataclass
class Pending:
    """A file that is not yet taken: its size and time at the last check, since when they are unchanged, its frames (None: incomplete)."""

    size: int
    mtime: float
    since: float
    frames: int | None


class Arrivals:
    """Looks for new movies; passes each on once, when it is complete.

    A file is complete when it is readable to its end (its header and frame directory lie within its size) and has as many frames as the
    movies before it. A readable file with another number of frames, or the first of a session, must be unchanged for ten seconds: a camera
    that writes frame by frame leaves a valid, shorter movie after each frame. A file that is truncated and unchanged for ten minutes (or
    until the session is over) is passed on as well, so that its stage reports what is wrong: nothing is skipped silently.
    """

    def __init__(
        self,
        plan: Plan,
        project: Project,
        until: Until,
        say: Callable[[str], None],
        stop: Stop | None = None,
        *,
        poll_seconds: float = _POLL_SECONDS,
        settled_seconds: float = _SETTLED_SECONDS,
    ) -> None:
        self.until, self.say, self.settled_seconds = until, say, settled_seconds
        self.pending: dict[str, Pending] = {}
        self.expected_frames: set[int] = set()
        self.over = False
        self._plan = plan
        self._patterns = {name: plan.resolve(inputs.movies or "") for name, inputs in plan.data_sets.items()}
        self._source = next((s.label for s in plan.steps if s.stage.name == "ingest"), "ingest")
        self._files = Files(plan, project)
        self._data_set: dict[str, str] = {}
        self._stop = stop
        self._poll_seconds, self._next_poll = poll_seconds, 0.0
        # path of every movie passed on, by name, and their number of frames
        self._taken = {i.name: str(project.value_of(i, "movie_path")) for i in project.items() if "movie_path" in i.inputs}
        self._facts = {i.name: i.inputs for i in project.items()}
        self._data_set |= {path: str(self._facts[name].get("data_set", "")) for name, path in self._taken.items()}
        self._refused: set[str] = set()
        self._active = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for the next check."""
        return not self.over and time.monotonic() >= self._next_poll

    def first(self) -> list[Arrival]:
        """Wait for the first few complete movies of a session; returns at once if the project has movies already."""
        found: list[Arrival] = []
        started: float | None = None
        if not self._taken:
            self.say(f"waiting for movies: {', '.join(self._patterns.values())}")
        while not self.over and len(self._taken) < _FIRST_MOVIES:
            if self._stop is not None:
                self._stop.check()
            if self.due:
                found += self.poll()
            started = started or (time.monotonic() if found else None)
            if self._taken and (not found or time.monotonic() - (started or 0.0) > _FIRST_SECONDS):
                break
            time.sleep(0.05)
        return found

    def poll(self) -> list[Arrival]:
        """Movies that became complete since the last check, oldest first; decides whether the session is ``over``."""
        started = time.monotonic()
        paths = self._new_paths()
        for gone in set(self.pending) - set(paths):
            del self.pending[gone]
        complete = [path for path in paths if self._complete(path)]
        out = self._take(complete)
        self.over = self._is_over()
        if self.over:
            now = time.monotonic()
            rest = [path for path, p in self.pending.items() if now - p.since >= self.settled_seconds]
            out += self._take(rest)
            if self.pending:
                names = ", ".join(show_name(path) for path in sorted(self.pending)[:3])
                self.say(f"{len(self.pending)} files are still being written and are left for the next run: {names}")
        # do not overload a slow file system with listings
        self._next_poll = time.monotonic() + max(self._poll_seconds, 10 * (time.monotonic() - started))
        return out

    def in_other_sets(self) -> list[Arrival]:
        """Unchanged movies passed on before that the project file now lists in another (or renamed) data set."""
        listed = {path: name for name in self._patterns for path in movie_paths(self._plan, name)}
        moved = {n: p for n, p in self._taken.items() if p in listed and listed[p] != self._data_set[p]}
        self._data_set |= {path: listed[path] for path in moved.values()}
        found = {name: self._arrival(path) for name, path in moved.items()}
        out = {n: a for n, a in found.items() if {**a.inputs, "data_set": ""} == {**self._facts[n], "data_set": ""}}
        self._facts |= {name: arrival.inputs for name, arrival in out.items()}
        return list(out.values())

    def changed(self) -> list[Arrival]:
        """Movies passed on before whose file has changed in size or time; those that were moved away stay as they are."""
        out = []
        for name, path in self._taken.items():
            if Path(path).exists():
                now = self._arrival(path)
                if now.inputs != self._facts[name]:
                    self._facts[name] = now.inputs
                    out.append(now)
        return out

    def _new_paths(self) -> list[str]:
        known = {show_name(path) for path in self._taken.values()}
        found: list[str] = []
        for name in self._patterns:
            new = [p for p in movie_paths(self._plan, name) if show_name(p) not in known and p not in self._refused]
            self._data_set |= dict.fromkeys(new, name)
            found += new
        return sorted(found)

    def _arrival(self, path: str) -> Arrival:
        return self._files.arrival("movie_path", Path(path), self._source, self._data_set.get(path, ""))

    def _complete(self, path: str) -> bool:
        now = time.monotonic()
        try:
            stat = Path(path).stat()
        except OSError:
            self.pending.pop(path, None)
            return False
        seen = self.pending.get(path)
        if seen is None or (seen.size, seen.mtime) != (stat.st_size, stat.st_mtime):
            seen = self.pending[path] = Pending(stat.st_size, stat.st_mtime, now, _whole_frames(path))
            self._active = now
        still = now - seen.since
        if seen.frames is None:
            return still >= _GIVEN_UP_SECONDS
        return still >= self.settled_seconds or seen.frames in self.expected_frames

    def _take(self, paths: list[str]) -> list[Arrival]:
        out = []
        for path in sorted(paths, key=lambda p: (self.pending[p].mtime, p)):
            del self.pending[path]
            arrival = self._arrival(path)
            name = arrival.name
            if name in self._taken:
                self._refused.add(path)
                self.say(f"{show_name(path)} is skipped: {show_name(self._taken[name])} has the same name; rename one of them")
                continue
            self._taken[name], self._facts[name] = path, arrival.inputs
            out.append(arrival)
        return out

    def _is_over(self) -> bool:
        if self._stop is not None and self._stop.asked:
            return True
        if self._stop is not None and self._stop.ended:
            self.say("the session was ended by a person")
            return True
        if self.until.movies is not None and len(self._taken) >= self.until.movies:
            self.say(f"{len(self._taken)} movies have arrived: the session is over")
            return True
        idle = time.monotonic() - self._active
        if self.until.idle_seconds is not None and idle >= self.until.idle_seconds:
            self.say(f"nothing arrived for {idle:.0f} s: the session is over")
            return True
        return False


def _whole_frames(path: str) -> int | None:
    """Number of frames of a movie file; None while it is incomplete."""
    from cryodask.formats.movies import open_movie

    try:
        return len(open_movie(path))
    except (CryodaskError, OSError):
        return None
