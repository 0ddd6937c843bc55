"""The event stream of a run: what listeners hear and files hold; a torn line, a full disk or a rotated file costs no other event."""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path

import pytest
from _told import Told

from cryodask.errors import ClusterError
from cryodask.run.events import (
    KINDS,
    Counted,
    Event,
    Events,
    ExposureCommitted,
    ExposureQuarantined,
    Iteration,
    Noted,
    RunEnded,
    RunStarted,
    event_of,
)
from cryodask.run.events import log as event_log
from cryodask.run.events.log import EventLog, event_files, follow, last_run, tail
from cryodask.run.events.progress import Pace, Terminal, text_of
from cryodask.run.events.quarantined import quarantined_lines
from cryodask.store.lines import checked_line


def committed(row: int, run: str = "r") -> ExposureCommitted:
    return ExposureCommitted(time=float(row), run=run, step="motion", row=row, name=f"m{row}")


def write(folder: Path, run: str, events: list[Event], **options) -> EventLog:
    log = EventLog(folder, run, **options)
    for event in events:
        log(event)
    log.close()
    return log


def end(run: str = "r") -> RunEnded:
    return RunEnded(time=9e9, run=run, state="finished", status=0)


def test_every_kind_survives_the_way_to_a_line_and_back():
    values = {"str": "x", "int": 3, "float": 1.5, "list[str]": ["a"], "int | None": None, "str | None": "m", "dict[str, Any]": {"a": 1.0}}
    assert len(KINDS) == 13
    for kind in KINDS.values():
        made = kind(**{name: values[str(about.annotation).replace("<class '", "").replace("'>", "").replace("typing.", "")]
                       for name, about in kind.model_fields.items()})  # fmt: skip
        line = json.loads(json.dumps(made.as_record()))
        assert line["event"] == kind.__name__
        assert {"time", "run"} <= set(line)
        assert event_of(line) == made
    assert event_of({"event": "OfALaterVersion", "time": 1.0, "run": "r"}) is None


def test_the_last_events_are_read_through_rotated_files(tmp_path):
    write(tmp_path, "20260101T000000-aaaaaa", [*(committed(i, "20260101T000000-aaaaaa") for i in range(50)), end("20260101T000000-aaaaaa")])
    later = [*(committed(i, "20260102T000000-bbbbbb") for i in range(2000)), end("20260102T000000-bbbbbb")]
    log = EventLog(tmp_path, "20260102T000000-bbbbbb", file_bytes=20_000)
    for event in later:
        log._written = float("-inf")  # as if time passed: each is written for itself
        log(event)
    log.close()
    assert len(event_files(tmp_path, "20260102")) > 5
    assert last_run(tmp_path) == "20260102T000000-bbbbbb"
    assert tail(tmp_path, 100) == later[-100:]
    assert tail(tmp_path, 2001) == later
    everything = tail(tmp_path, 10_000)
    assert len(everything) == 51 + 2001
    assert everything[50].status == 0


def test_a_torn_or_damaged_line_hides_no_other(tmp_path):
    write(tmp_path, "r", [*(committed(i) for i in range(10)), end()])
    (path,) = event_files(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[4] = lines[4].replace(b"m4", b"mX")
    path.write_bytes(b"".join(lines) + checked_line(committed(99).as_record())[:40])
    assert [e.row for e in tail(tmp_path, 100) if isinstance(e, ExposureCommitted)] == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_a_disk_that_is_full_for_a_while_costs_the_events_of_that_while_only(tmp_path, monkeypatch):
    real, full = event_log.write_all, threading.Event()

    def sometimes(fd: int, data: bytes) -> None:
        if full.is_set():
            os.write(fd, data[:10])  # torn
            raise OSError(28, "No space left on device")
        real(fd, data)

    monkeypatch.setattr(event_log, "write_all", sometimes)
    log = EventLog(tmp_path, "r")
    notes = [Noted(time=float(i), run="r", text=str(i)) for i in range(6)]
    for i, note in enumerate(notes):
        (full.set if i in (2, 3) else full.clear)()
        log(note)
    said = [e.text for e in tail(tmp_path, 100)]
    assert said == ["0", "1", "2 events before this one could not be written (was the disk full?)", "4", "5"]


def test_counts_are_written_now_and_then_and_only_if_they_changed(tmp_path, monkeypatch):
    monkeypatch.setattr("cryodask.run.events.log._COUNT_SECONDS", 0.0)
    log = EventLog(tmp_path, "r")
    for second, done in enumerate((1, 1, 1, 2, 2, 1)):
        log(Counted(time=float(second), run="r", step="motion", seen=4, done=done, quarantined=0, running=0, waiting=4 - done, workers=1))
    monkeypatch.setattr("cryodask.run.events.log._COUNT_SECONDS", 60.0)
    log(Counted(time=9.0, run="r", step="motion", seen=4, done=3, quarantined=0, running=0, waiting=1, workers=1))
    log(end())
    assert [(event.time, event.done) for event in tail(tmp_path, 100) if isinstance(event, Counted)] == [(0, 1), (3, 2), (5, 1)]


def test_a_listener_that_fails_is_dropped_and_one_that_joins_late_hears_everything():
    told, late = Told(), Told()

    def broken(event: Event) -> None:
        raise BrokenPipeError

    with Events([broken, told]) as events:
        events.say("before")
        events.join(late)
        events.say("after")
    assert told.events == late.events
    assert [type(e) for e in told.events] == [Noted, Noted, RunEnded]
    assert len({e.run for e in told.events}) == 1


@pytest.mark.parametrize(
    ("error", "state", "status"),
    [
        (KeyboardInterrupt(), "stopped: KeyboardInterrupt", 130),
        (OSError(28, "full"), "stopped: [Errno 28] full", 4),
        (ClusterError("The scheduler is gone.\nAnd more."), "stopped: The scheduler is gone.", 3),
    ],
)
def test_the_end_says_how_it_ended(error, state, status):
    told = Told()
    with pytest.raises(type(error)), Events([told]):
        raise error
    (last,) = told.events
    assert (last.state, last.status) == (state, status)


def test_followers_see_old_events_and_each_new_one_until_the_end(tmp_path):
    log = EventLog(tmp_path, "r", file_bytes=1)
    for i in range(5):
        log._written = float("-inf")
        log(committed(i))
    followed = follow(tmp_path, 2)
    assert [next(followed).row for _ in range(2)] == [3, 4]
    assert next(followed) is None
    log(Noted(time=1.0, run="r", text="hello"))
    assert next(followed).text == "hello"
    log(end())
    rest = list(followed)
    assert [e for e in rest if e is not None] == [end()]
    assert list(follow(tmp_path, 1)) == [end()], "where no run goes on it ends at once"
    assert list(follow(tmp_path / "nothing", 5)) == []


def test_pace_and_lines_for_people():
    pace = Pace()
    for event in (
        RunStarted(time=0.0, run="r", project="p", folder="f", inputs="9 movies", steps=["motion"], host="h", pid=1, version="1"),
        KINDS["StepStarted"](time=10.0, run="r", step="motion", steps=["motion"], total=9, kept=3),
        Counted(time=12.0, run="r", step="motion", seen=9, done=4, quarantined=1, running=2, waiting=2, workers=2),
    ):
        pace(event)
    assert pace.text(12.0) == "1.0/s, 4 s to go"
    pace(Counted(time=13.0, run="r", step="motion", seen=9, done=8, quarantined=1, running=0, waiting=0, workers=2))
    assert pace.text(13.0) == "2.0/s", "a watched session has no end that could be told"
    assert text_of(Iteration(time=0.0, run="r", step="refine3d", iteration=2, figures={"fsc_edge": 0.51234}), every_exposure=True) == (
        "refine3d: iteration 2  fsc edge 0.512"
    )


ADVICE = "\n  Usual reason: r\n  What to do: w"


@pytest.mark.parametrize("name", ["m{}", "a_{}_b"])
def test_exposures_with_the_same_reason_are_told_together(name):
    names = [name.format(i) for i in range(100)]
    about = {"stage": "ingest", "error": "MovieError"}
    failures = [{**about, "name": n, "message": f"/d/{n}.mrc ends after {7000 + i} bytes.{ADVICE}"} for i, n in enumerate(names)]
    failures.append({**about, "name": "x", "message": "/d/x.mrc has negative values."})
    lines = quarantined_lines(failures)
    assert lines[0] == f"quarantined in ingest: 100 exposures for one reason: {', '.join(names[:3])} and 97 more"
    assert lines[1:4] == [f"  {line.strip()}" for line in f"MovieError: {failures[0]['message']}".splitlines()]
    assert lines[4:] == ["quarantined in ingest: x", "  MovieError: /d/x.mrc has negative values."]
    assert len(quarantined_lines(failures, every=True)) == 100 * 4 + 2


def test_a_hundred_reasons_take_fewer_than_200_lines():
    names = [f"m{'x' * (i + 1)}" for i in range(100)]
    told = [f"bad {'y' * len(n)}.{ADVICE}" for n in names]
    failures = [{"stage": "s", "name": n, "error": "E", "message": message} for n, message in zip(names, told)]
    assert len(quarantined_lines(failures)) == 20 * 4 + 80
    stream = io.StringIO()
    terminal = Terminal(stream)
    for row, (n, message) in enumerate(zip(names, told)):
        terminal(ExposureQuarantined(time=0, run="r", step="s", row=row, name=n, message=message))
    assert len(stream.getvalue().splitlines()) == 20 * 3 + 80
