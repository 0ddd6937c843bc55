"""What a stage function is given to run in: scratch, random numbers, reports, and the programs of others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dask
import numpy as np
import pytest

from cryodask.context import Context
from cryodask.errors import ClusterError, ProgramError, ProgramMissingError
from cryodask.programs import Program

_SAYS = """#!/bin/bash
[ "$1" = --version ] && { echo "says version 1.2.3"; exit; }
"""


@pytest.fixture
def home(tmp_path):
    """Where scratch folders are made."""
    (tmp_path / "node").mkdir()
    with dask.config.set({"temporary-directory": str(tmp_path / "node")}):
        yield tmp_path / "node"


@pytest.fixture
def says(tmp_path, monkeypatch):
    """Make a program ``says`` of some lines of shell, and a context of a stage that declares it."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def make(lines: str, **options) -> Context:
        path = tmp_path / "bin" / "says"
        path.write_text(_SAYS + lines)
        path.chmod(0o755)
        program = Program("says")
        return Context(programs={program: program.version()}, **options)

    return make


# --- scratch -----------------------------------------------------------------------------------------------------------------------
def test_scratch_is_made_when_asked_for_and_gone_afterwards_however_the_function_ends(home):
    with Context():
        assert not list(home.iterdir())

    def stage() -> None:
        with Context() as context:
            assert context.scratch == context.scratch
            assert not list(context.scratch.iterdir())
            (context.scratch / "file").write_text("x")
            raise OSError("failed")

    with pytest.raises(OSError, match="failed"):
        stage()
    assert not list(home.iterdir())


def test_what_a_killed_process_left_in_scratch_goes_with_the_next_and_what_is_in_use_stays(home):
    code = (
        "import dask, sys, time; from cryodask.context import Context\n"
        "dask.config.set({'temporary-directory': sys.argv[1]}); c = Context(); (c.scratch / 'file').write_text('x')\n"
        "print(c.scratch, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(home)], stdout=subprocess.PIPE, text=True)
    theirs = Path(process.stdout.readline().strip())
    try:
        with Context() as context:
            assert context.scratch.is_dir()
            assert (theirs / "file").is_file(), "its process is alive"
            process.send_signal(signal.SIGKILL)
            process.wait()
            with Context() as later:
                assert later.scratch.is_dir()
                assert not theirs.exists()
                assert context.scratch.is_dir()
    finally:
        process.kill()
        process.wait()
    assert not list(home.iterdir())


# --- random numbers and reports ----------------------------------------------------------------------------------------------------
def test_random_numbers_depend_on_the_seeds_and_on_nothing_else():
    one, again, other = (Context().rng(7, row).random(4) for row in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, Context().rng(1, 7).random(4))
    assert Context().rng(-1, 2**70).random() == Context("cuda").rng(-1, 2**70).random()


def test_reports_are_handed_on_and_a_fraction_is_one():
    told = []
    context = Context(on_report=lambda fraction, figures: told.append((fraction, figures)))
    context.report(0.25, resolution_angstrom=7.5)
    Context().report(1.0)
    assert told == [(0.25, {"resolution_angstrom": 7.5})]
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        context.report(25)


# --- programs of others ------------------------------------------------------------------------------------------------------------
def test_a_program_runs_in_scratch_with_the_threads_of_the_function_and_its_output_is_kept(home, says, tmp_path):
    context = says(
        'echo "$# $1 threads $OMP_NUM_THREADS"; pwd; echo "to stderr" >&2; echo out > out.txt', threads=3, log=tmp_path / "a" / "log"
    )
    with context:
        printed = context.run("says", ["two words", 4.5], outputs=["out.txt"])
        assert printed.splitlines() == ["2 two words threads 3", str(context.scratch), "to stderr"]
        assert (context.scratch / "out.txt").read_text() == "out\n"
        context.run("says", ["again"])
    kept = (tmp_path / "a" / "log").read_text()
    assert kept.startswith("$ says two words 4.5\n2 two words")
    assert "$ says again\n" in kept
    with says("echo anew", log=tmp_path / "a" / "log") as context:
        context.run("says", [])
    assert (tmp_path / "a" / "log").read_text() == "$ says\nanew\n", "of the last attempt"
    assert not list(home.iterdir())


def test_a_program_that_fails_is_an_error_of_the_item_with_the_last_lines_of_its_output(home, says, tmp_path):
    with says("seq 100; echo 'ERROR: no such map'; exit 7", log=tmp_path / "log") as context:
        with pytest.raises(
            ProgramError, match=r"(?s)says failed with exit status 7.*log:\n.*  \| 100\n  \| ERROR: no such map\n  What to do: "
        ) as raised:
            context.run("says", [])
        assert raised.value.on_failure == "quarantine"
        assert "| 50" not in str(raised.value)
        assert str(tmp_path / "log") in str(raised.value)
    with says("kill -SEGV $$") as context, pytest.raises(ProgramError, match="was killed by SIGSEGV; it printed nothing"):
        context.run("says", [])
    assert not list(home.iterdir())


def test_a_missing_or_empty_output_is_an_error_of_the_item(says):
    with says("touch empty; echo x > there; echo done") as context:
        with pytest.raises(ProgramError, match=r"exited with status 0, but did not write empty, absent; (?s:.*)done"):
            context.run("says", [], outputs=["there", "empty", "absent"])


def test_a_program_that_takes_too_long_ends_with_all_that_it_started(says, tmp_path):
    with says(f"sleep 1000 & echo $! > {tmp_path}/child; echo begun; wait") as context:
        with pytest.raises(ProgramError, match=r"took longer than 5 s and was killed; (?s:.*)begun"):
            context.run("says", [], timeout_seconds=5)
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 120
    while Path(f"/proc/{child}").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text(encoding="utf-8"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_only_programs_that_the_stage_declares_run_for_their_version_is_part_of_the_key(says, tmp_path):
    with says("echo") as context:
        with pytest.raises(ValueError, match=r"ls is not declared by this stage \(says declared\)"):
            context.run("ls", [])
        program = tmp_path / "bin" / "says"
        program.write_text(_SAYS.replace("1.2.3", "1.3.0"))
        with pytest.raises(ClusterError, match=r"has says 1.3.0, but this run was planned with 1.2.3"):
            context.run("says", [])
        program.unlink()
        with pytest.raises(ClusterError, match=r"A worker cannot run says\. says is not on the PATH"):
            context.run("says", [])


def test_a_program_that_says_no_version_is_as_good_as_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProgramMissingError, match=r"(?s)nothing_of_the_kind is not on the PATH.*What to do: load its module"):
        Program("nothing_of_the_kind", install="load its module").version()
    (tmp_path / "odd").write_text("#!/bin/sh\necho libodd.so.3: cannot open shared object file; exit 127\n")
    (tmp_path / "odd").chmod(0o755)
    with pytest.raises(ProgramMissingError, match=r"reports no version: libodd\.so\.3: cannot open"):
        Program("odd").version()


# --- torch -------------------------------------------------------------------------------------------------------------------------
def test_torch_has_one_thread_in_a_worker_whether_it_was_imported_before_or_in_the_stage():
    code = """
from cryodask.run.devices import on_device
import sys
with on_device("cpu"):
    assert "torch" not in sys.modules
    import torch
    print(torch.get_num_threads())
torch.set_num_threads(2)
with on_device("cpu"):
    print(torch.get_num_threads())
"""
    several = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    shown = subprocess.run([sys.executable, "-c", code], env=several, capture_output=True, text=True, check=False)
    assert shown.stdout.split() == ["1", "1"], shown.stderr
