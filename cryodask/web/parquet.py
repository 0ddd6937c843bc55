"""The numbers of all exposures as a Parquet file, for programs.

It is written by a process of its own (``python -m cryodask.web.parquet``): what pyarrow imports would stay in the memory of the server.
"""

from __future__ import annotations

import importlib.util
import io
import json
import struct
import subprocess
import sys

import numpy as np

_ANSWER_SECONDS = 60.0
STATES = ("waiting", "started", "done", "quarantined", "left out")
"""Words for the numbers of states; see follow.py."""


def available() -> bool:
    """Whether Parquet files can be written here."""
    return importlib.util.find_spec("pyarrow") is not None


def as_parquet(packed: bytes) -> bytes:
    """A Parquet file from columns as :meth:`cryodask.web.follow.Follower.packed` gives them.

    Raises
    ------
    OSError
        If the process that writes it failed.
    """
    command = [sys.executable, "-m", "cryodask.web.parquet"]
    done = subprocess.run(command, input=packed, capture_output=True, timeout=_ANSWER_SECONDS)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise OSError(f"the Parquet file could not be written: {said[-1]}")
    return done.stdout


def written(packed: bytes) -> bytes:
    """Like :func:`as_parquet`, in this process."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (length,) = struct.unpack_from("<I", packed)
    head = json.loads(packed[4 : 4 + length])
    rows, at = head["rows"], 4 + length
    kinds = [("time", "<f8"), ("row", "<u4"), *((c["name"], "<f4") for c in head["columns"]), ("state", "u1")]
    columns: dict[str, np.ndarray] = {}
    for name, kind in kinds:
        columns[name] = np.frombuffer(packed, kind, rows, at)
        at += columns[name].nbytes
    there = np.array([bool(name) for name in head["names"]], bool)
    states = np.array(STATES, dtype=object)[columns.pop("state")[there]]
    table = {
        "row": pa.array(columns.pop("row")[there]),
        "name": pa.array([name for name in head["names"] if name], pa.string()),
        "time": pa.array(columns.pop("time")[there], from_pandas=True),
        "state": pa.array(states, pa.string()).dictionary_encode(),
    }
    table |= {name: pa.array(values[there], from_pandas=True) for name, values in columns.items()}
    units = {c["name"]: {"title": c["title"], "unit": c["unit"]} for c in head["columns"]}
    units["time"] = {"title": "Time of the last result", "unit": "s since 1970-01-01 UTC"}
    fields = [pa.field(name, array.type, metadata=units.get(name)) for name, array in table.items()]
    out = io.BytesIO()
    pq.write_table(pa.table(list(table.values()), pa.schema(fields)), out)
    return out.getvalue()


if __name__ == "__main__":
    sys.stdout.buffer.write(written(sys.stdin.buffer.read()))
