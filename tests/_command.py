"""The command line in this process, through its own entry point: what it says, and how it ends. A new process takes a second to import."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys

import pytest

from cryodask import cli


def command(*words: str | os.PathLike[str], folder: str | os.PathLike[str] = ".") -> subprocess.CompletedProcess[str]:
    """Carry out ``cryodask WORDS`` in a folder."""
    out, err = io.StringIO(), io.StringIO()
    arguments = ["cryodask", *map(os.fspath, words)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", arguments)
        patch.chdir(folder)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), out.getvalue(), err.getvalue())
