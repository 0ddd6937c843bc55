"""Lines for sbatch that people add to jobs: options for which a cluster file has no setting, and nothing else.

They come after cryodask's own directives, and of two equal options the last one counts.
"""

from __future__ import annotations

import re
import shlex

_WITH_VALUE = {
    "acctg-freq", "bb", "bbf", "begin", "cluster-constraint", "constraint", "core-spec", "cpu-freq", "delay-boot", "dependency", "exclude",
    "gpu-bind", "gpu-freq", "hint", "licenses", "mail-type", "mail-user", "mcs-label", "mem-bind", "network", "nice", "nodefile",
    "nodelist", "power", "prefer", "priority", "profile", "propagate", "reservation", "switches", "thread-spec", "threads-per-core", "tmp",
    "wckey",
}  # fmt: skip
_WITHOUT_VALUE = {"contiguous", "exclusive", "get-user-env", "no-kill", "nice", "oversubscribe", "propagate"}
_SHORT = {
    "-C": "constraint", "-F": "nodefile", "-L": "licenses", "-S": "core-spec", "-d": "dependency", "-k": "no-kill", "-s": "oversubscribe",
    "-w": "nodelist", "-x": "exclude", "-b": "begin",
}  # fmt: skip

_SETTINGS = {
    "partition": "partition", "p": "partition", "account": "account", "A": "account", "qos": "qos", "q": "qos", "time": "walltime",
    "t": "walltime", "time-min": "walltime", "mem": "memory", "mem-per-cpu": "memory_option: mem-per-cpu", "mem-per-gpu": "memory",
    "cpus-per-task": "cores", "c": "cores", "ntasks": "processes", "n": "processes", "ntasks-per-node": "processes",
    "cpus-per-gpu": "cores", "gres": "gpus", "gpus": "gpus", "G": "gpus", "gpus-per-node": "gpus", "gpus-per-task": "gpus",
    "tres-per-task": "cores and gpus", "nodes": "count", "N": "count", "array": "count", "a": "count", "output": "logs", "o": "logs",
    "error": "logs", "e": "logs",
}  # fmt: skip
_REASONS = {
    "comment": "cryodask recognises its jobs by it", "job-name": "it names the log of a job", "J": "it names the log of a job",
    "open-mode": "a job could overwrite an existing log", "export": "jobs need the environment in which they were submitted",
    "requeue": "a lost job is replaced at once, under a new name", "no-requeue": "a lost job is replaced at once, under a new name",
    "wrap": "a job has a script already", "hold": "the job would never start", "H": "the job would never start",
    "clusters": "the queue of another cluster is not watched", "M": "the queue of another cluster is not watched",
}  # fmt: skip


def checked_directive(line: str) -> str:
    """A line of ``directives``; several options may share it.

    Raises
    ------
    ValueError
        For an option for which there is a setting, or that is not on the list.
    """
    words = shlex.split(line)
    if not words:
        raise ValueError("an empty line has no option for sbatch")
    while words:
        word = words.pop(0)
        name, value = _parsed(word)
        known = name in _WITHOUT_VALUE if value is None else bool(value) and name in _WITH_VALUE | {"exclusive", "get-user-env"}
        if value is None and name in _WITH_VALUE and name not in _WITHOUT_VALUE and words and not words[0].startswith("-"):
            known = bool(words.pop(0))
        if not known:
            raise ValueError(_why(word, name))
    return line


def unquoted(line: str) -> str:
    """A line as sbatch reads it: its words without quotes."""
    return " ".join(shlex.split(line))


def _parsed(word: str) -> tuple[str, str | None]:
    """The long name of an option, and the value in the same word."""
    if word.startswith("--"):
        name, equals, value = word[2:].partition("=")
        return name, value if equals else None
    name = _SHORT.get(word[:2], word)
    return name, word[2:] or None


def _why(word: str, name: str) -> str:
    option = word.partition("=")[0] if word.startswith("--") else word[:2]
    bare = option.lstrip("-")
    if not word.startswith("-"):
        return f"{word!r} is not an option of sbatch"
    if bare in _SETTINGS:
        return f"{option} is not allowed: use the setting {_SETTINGS[bare]}"
    if bare in _REASONS:
        return f"{option} is set by cryodask: {_REASONS[bare]}"
    if name in _WITH_VALUE:
        return f"{option} needs a value"
    known = ", ".join(f"--{n}" for n in sorted(_WITH_VALUE | _WITHOUT_VALUE))
    return f"{option} cannot be added. Options that can, each with its full name: {known}"


def checked_shell_line(line: str) -> str:
    """A line of ``environment``: a shell command, not a directive, which Slurm would obey.

    Raises
    ------
    ValueError
    """
    if re.match(r"\s*#\s*(SBATCH|PBS|BSUB)", line):
        raise ValueError("is a directive for the batch system, not a shell command: put it into directives")
    return line
