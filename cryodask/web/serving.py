"""Starts a server: where it listens, and what it refuses to do openly."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from cryodask.account import state_folder
from cryodask.errors import InputError
from cryodask.tiers.policy import read_storage
from cryodask.web.app import create_app
from cryodask.web.control import HERE, Starter
from cryodask.web.directory import Directory
from cryodask.web.gate import Gate
from cryodask.web.ledger import Ledger
from cryodask.web.login import FacilityLogin, OwnLogin
from cryodask.web.sessions import Sessions, check_folders
from cryodask.web.settings import read_facility


def serve_own(folders: list[Path], *, port: int, token: str | None, prefix: str = "", say: Callable[[str], None] = print) -> None:
    """Show projects to oneself, on the loopback address, until interrupted.

    Parameters
    ----------
    folders : list of Path
        Projects, or folders that contain projects.
    port : int
        0: any free one.
    token : str, optional
        By default a new one; it is part of the address that is said.
    prefix : str
        Path before all addresses, where a proxy passes it on.
    say : callable
        Takes the address.
    """
    check_folders(folders)
    token = token or secrets.token_urlsafe(24)
    listening = _listen("127.0.0.1", port)
    shown = Sessions({"": folders}, Ledger(state_folder() / "dashboard", private=True))
    app = create_app(shown, OwnLogin(token), prefix=prefix, starter=Starter(HERE, strict=False))
    say(f"http://127.0.0.1:{listening.getsockname()[1]}{prefix}/?token={token}")
    _run(_config(app), listening)


def serve_facility(path: Path, *, say: Callable[[str], None] = print) -> None:
    """Serve a facility, as its file says, until interrupted.

    Raises
    ------
    ProjectFileError
        If the file is wrong, or would open the server to others without TLS or without a log-in.
    """
    settings = read_facility(path)
    check_folders(folder for folders in settings.folders.values() for folder in folders)
    state = settings.state_folder
    directory = Directory(Ledger(state / "people", private=True), settings.admins)
    listen = settings.listen
    login = FacilityLogin(settings.login, directory, _secret(state / "cookie-secret"), listen.proxies)
    shown = Sessions(settings.folders, Ledger(state / "audit", private=True))
    listening = _listen(listen.host, listen.port)
    starter = Starter(settings.start, strict=True)
    app = create_app(shown, login, prefix=listen.prefix, storage=read_storage(path), starter=starter, templates=settings.templates)
    kind = "http" if listen.certificate is None else "https"
    say(f"{kind}://{listen.host}:{listening.getsockname()[1]}{listen.prefix}/")
    _run(_config(app, listen.certificate, listen.key), listening)


def _secret(path: Path) -> str:
    """The secret in a file of this account only; made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        found = path.read_text(encoding="utf-8").strip()
        if found:
            return found
        fd = os.open(path, os.O_WRONLY)  # its first process was killed before it wrote
    with open(fd, "w", encoding="utf-8") as file:
        made = secrets.token_urlsafe(32)
        file.write(made)
    return made


def _config(app: Gate, certificate: Path | None = None, key: Path | None = None) -> uvicorn.Config:
    # the address of whoever connects is what the trusted proxy is recognised by: no header may replace it
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=1,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        raise InputError(
            f"Port {port} of {host} cannot be used: {error.strerror}.", "another program listens there", "choose another with --port"
        ) from error
    # from now on a connection waits for the server; whoever opens the address at once is not refused
    listening.listen()
    return listening


def _run(config: uvicorn.Config, listening: socket.socket) -> None:
    asyncio.run(uvicorn.Server(config).serve(sockets=[listening]))
