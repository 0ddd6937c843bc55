"""Python and the command line in new processes in which no package has been looked for yet, without the second that a start takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

# what is imported here is imported once: nothing that looks for packages meanwhile, and nothing that starts threads
_FORKS = """
import json, os, sys, traceback
import cryodask.cli, cryodask.cli_plan, cryodask.formats.movies, cryodask.stages, cryodask.cluster.settings
for line in sys.stdin:
    asked = json.loads(line)
    process = os.fork()
    if process:
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
        continue
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(asked["said"], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(asked["folder"])
    sys.path[:0] = ["", *asked["path"]]
    os.environ.clear()
    os.environ.update(asked["environ"])
    status = 1
    try:
        exec(compile(asked["code"], "<string>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)
"""


class Fresh:
    """Starts such processes in folders; packages are installed in other folders."""

    def __enter__(self) -> Fresh:
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        self._environ = {"PYTHONPATH": path}
        self._said = tempfile.TemporaryDirectory()
        environ = {**os.environ, **self._environ}
        self._forks = subprocess.Popen(
            [sys.executable, "-c", _FORKS], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._forks.communicate()
        self._said.cleanup()

    def python(self, code: str, folder: Path, *installed: Path) -> subprocess.CompletedProcess[str]:
        """``python -c CODE``."""
        assert self._forks.stdin is not None
        assert self._forks.stdout is not None
        path = [*map(str, installed)]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, self._environ["PYTHONPATH"]])}
        asked = {"code": code, "folder": str(folder), "path": path, "environ": environ, "said": self._said.name}
        self._forks.stdin.write(json.dumps(asked) + "\n")
        self._forks.stdin.flush()
        status = int(self._forks.stdout.readline())
        out, err = ((Path(self._said.name) / name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess([code], status, out, err)

    def shell(self, line: str, folder: Path, *installed: Path) -> subprocess.CompletedProcess[str]:
        """A command line that begins with ``cryodask``."""
        code = f"import shlex, sys; from cryodask.cli import main; sys.argv = shlex.split({line!r}); main()"
        return self.python(code, folder, *installed)
