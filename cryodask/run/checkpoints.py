"""Checkpoints of the block runner: state and columns of an iteration in one file, renamed into place once it is safely on disk."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import cloudpickle
import numpy as np

from cryodask.stage import Columns, State
from cryodask.store.files import disk_errors, write_atomically


def write_checkpoint(folder: Path, state: State, columns: Columns) -> Path:
    """Write ``iteration-NNNN.npz``: fsync, rename, fsync of the folder."""
    path = folder / f"iteration-{int(state['iteration']):04d}.npz"
    buffer = io.BytesIO()
    plain = {k: v for k, v in state.items() if not isinstance(v, np.ndarray)}
    arrays = {f"state/{k}": v for k, v in state.items() if isinstance(v, np.ndarray)}
    arrays |= {f"column/{k}": v for k, v in columns.items()}
    arrays["plain"] = np.frombuffer(cloudpickle.dumps(plain), np.uint8)
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    with disk_errors(folder):
        write_atomically(path, buffer.getvalue())
    return path


def last_checkpoint(folder: Path) -> tuple[Path | None, State, Columns]:
    """The last readable checkpoint; damaged ones are set aside."""
    for path in sorted(folder.glob("iteration-*.npz"), reverse=True):
        try:
            return path, *read_checkpoint(path)
        except (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, ValueError, KeyError, EOFError):
            os.rename(path, path.with_suffix(".damaged"))
    return None, {}, {}


def read_checkpoint(path: Path) -> tuple[State, Columns]:
    """State and columns of a checkpoint."""
    with np.load(path) as stored:
        columns = {name.removeprefix("column/"): stored[name] for name in stored.files if name.startswith("column/")}
    return read_state(path), columns


def read_state(path: Path) -> State:
    """State of a checkpoint, without reading its columns."""
    with np.load(path) as stored:
        state: State = cloudpickle.loads(stored["plain"].tobytes())
        return state | {name.removeprefix("state/"): stored[name] for name in stored.files if name.startswith("state/")}
