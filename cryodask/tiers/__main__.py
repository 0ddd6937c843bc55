"""``python -m cryodask.tiers FOLDER SIZE``: carry out what is due, apart from the process that was asked; the policy is read from stdin."""

from __future__ import annotations

import sys
import time
from functools import partial

from cryodask.errors import CryodaskError
from cryodask.tiers.policy import Storage, execute, size_text


def main() -> None:
    """Entry point; what is printed goes into the log that pages show."""
    folder, size = sys.argv[1:]
    say = partial(print, flush=True)
    try:
        done = execute(folder, Storage.model_validate_json(sys.stdin.read()), size, say=say)
    except CryodaskError as error:
        say(error.problem)
        sys.exit(1)
    say(f"{time.strftime('%Y-%m-%d %H:%M')}: {done.removed} files, {size_text(done.bytes)}; {len(done.problems)} problems")


if __name__ == "__main__":
    main()
