"""Whether files and folders with secrets belong to the account of the server, and to nobody else."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from cryodask.web.checking.finding import Finding, note, ok, problem
from cryodask.web.settings import FacilitySettings, is_loopback

_SHORTEST_SECRET = 16


def check_secrets(path: Path, settings: FacilitySettings) -> Iterator[Finding]:
    """Owners, permissions and content of everything that lets people in.

    Parameters
    ----------
    path : Path
        The facility file itself: whoever can change it decides who administers the facility.
    settings : FacilitySettings
        Its content.
    """
    yield _not_changed_by_others("settings", path) or ok("settings", f"{path} can be changed by its owner only.")
    login, state = settings.login, settings.state_folder
    if login.passwords is not None:
        yield _passwords(login.passwords)
    if login.proxy is not None:
        yield _secret("proxy secret", login.proxy.secret_file)
        wrong = [address for address in login.proxy.addresses if not _is_address(address)]
        if wrong:
            yield problem("proxy", f"{wrong[0]!r} is not an IP address, so no request comes from it.", "correct login.proxy.addresses")
        elif not all(map(is_loopback, login.proxy.addresses)) and settings.listen.certificate is None:
            yield note("proxy", "The server listens on the loopback address, so only a proxy on this host reaches it.")
    if login.oidc is not None:
        yield _secret("client secret", login.oidc.client_secret_file)
    if settings.listen.key is not None:
        yield _private("TLS key", settings.listen.key, 0o600) or ok("TLS key", f"{settings.listen.key} is private.")
    for name, mode in (("", 0o700), ("people", 0o700), ("audit", 0o700), ("cookie-secret", 0o600)):
        here = state / name
        if os.path.lexists(here):
            yield _private("state", here, mode) or ok("state", f"{here} is private.")
        elif not name:
            yield note("state", f"{here} does not exist yet; the server creates it when it starts.")


def _passwords(path: Path) -> Finding:
    wrong = _private("passwords", path, 0o600)
    if wrong is not None:
        return wrong
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return problem("passwords", f"{path} cannot be read: {error}.", "write it with  cryodask password")
    people = [line for line in lines if line.strip() and not line.startswith("#")]
    if not people:
        return problem("passwords", f"{path} has no people, so nobody can log in.", f"add one with  cryodask password {path} NAME")
    bad = next((n for n, line in enumerate(lines, 1) if line.strip() and not line.startswith("#") and line.count(":scrypt:") != 1), 0)
    if bad:
        return problem(
            "passwords", f"Line {bad} of {path} is not a name and a scrypt hash.", "set that password again with  cryodask password"
        )
    return ok("passwords", f"{path} is private; people in it: {len(people)}.")


def _secret(point: str, path: Path) -> Finding:
    wrong = _private(point, path, 0o600)
    if wrong is not None:
        return wrong
    try:
        length = len(path.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError) as error:
        return problem(point, f"{path} cannot be read: {error}.", "write the secret into it as one line of text")
    if length < _SHORTEST_SECRET:
        what = "is empty" if not length else f"has {length} characters, which can be guessed"
        return problem(point, f"The secret in {path} {what}.", f"use a random one:  openssl rand -hex 32 > {path}")
    return ok(point, f"{path} is private, with {length} characters.")


def _private(point: str, path: Path, mode: int) -> Finding | None:
    """A finding if others than the account of the server can read or replace something."""
    try:
        there = os.stat(path)
    except OSError as error:
        return problem(point, f"{path} cannot be read: {error.strerror}.", "create it, or correct the path in the facility file")
    if stat.S_ISDIR(there.st_mode) != (mode == 0o700):
        kind, other = ("folder", "file") if mode == 0o700 else ("file", "folder")
        return problem(point, f"{path} is a {other}, not a {kind}.", "move it away, or correct the path in the facility file")
    if there.st_uid != os.geteuid():
        return problem(
            point, f"{path} belongs to user {there.st_uid}, not to this account ({os.geteuid()}).", f"as root:  chown {os.geteuid()} {path}"
        )
    if there.st_mode & 0o077:
        found = stat.S_IMODE(there.st_mode)
        return problem(point, f"{path} is open to other accounts (mode {found:04o}).", f"chmod {mode:o} {path}")
    return _folder_of_others(point, path)


def _not_changed_by_others(point: str, path: Path) -> Finding | None:
    there = os.stat(path)
    if there.st_mode & 0o022:
        return problem(point, f"{path} can be changed by other accounts (mode {stat.S_IMODE(there.st_mode):04o}).", f"chmod go-w {path}")
    return _folder_of_others(point, path)


def _folder_of_others(point: str, path: Path) -> Finding | None:
    """Whoever can write a folder can replace the files in it, unless its sticky bit is set."""
    folder = path.absolute().parent
    mode = os.stat(folder).st_mode
    if mode & 0o022 and not mode & stat.S_ISVTX:
        return problem(point, f"Other accounts can replace {path}, because they can write its folder.", f"chmod go-w {folder}")
    return None


def _is_address(text: str) -> bool:
    import ipaddress

    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
