"""``cryodask facility check``: whether a site is set up as its dashboard needs it, point by point."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cryodask.errors import CryodaskError, ProjectFileError
from cryodask.tiers.policy import read_storage
from cryodask.web.checking.disks import check_archive, check_projects, check_scratch, check_state
from cryodask.web.checking.finding import Finding, note, ok, problem
from cryodask.web.checking.network import check_certificate, check_port, check_provider
from cryodask.web.checking.programs import check_slurm
from cryodask.web.checking.secrets import check_secrets
from cryodask.web.session_templates import templates_in
from cryodask.web.settings import read_facility

__all__ = ["Finding", "check_facility"]


def check_facility(path: Path) -> Iterator[Finding]:
    """Test the set-up of a facility, from the account and on the host that its server uses.

    Reads only, except for temporary files in the project folders, the state folder and the scratch folder, which are removed again.

    Parameters
    ----------
    path : Path
        ``facility.yaml``.

    Yields
    ------
    Finding
        Each point as soon as it has been tested. Where the facility file is wrong there is only that one.
    """
    try:
        settings, storage = read_facility(path), read_storage(path)
    except ProjectFileError as error:
        yield problem("settings", error.what, error.way_out)
        return
    except (OSError, UnicodeDecodeError) as error:
        yield problem("settings", f"{path} cannot be read: {error}.", "give the facility file, readable by the account of the server")
        return
    yield ok("settings", f"{path} is valid.")
    if os.geteuid() == 0:
        yield note(
            "account", "This is root, who may read everything.", "run this as the account of the server:  sudo -u ACCOUNT cryodask ..."
        )
    else:
        yield ok("account", f"Tested as user {os.geteuid()}; the server must run as the same one.")
    yield from check_secrets(path, settings)
    for microscope, folders in settings.folders.items():
        for folder in folders:
            yield from _guarded(f"projects in {folder}", check_projects(microscope, folder))
    if settings.templates is not None:
        yield from _guarded("templates", _check_templates(settings.templates))
    yield from _guarded("state", check_state(settings.state_folder))
    yield from _guarded("scratch", check_scratch())
    if storage.archive:
        yield from _guarded("archive", check_archive(storage.archive))
    yield check_port(settings.listen)
    if settings.listen.certificate is not None and settings.listen.key is not None:
        yield check_certificate(settings.listen.certificate, settings.listen.key)
    if settings.login.oidc is not None:
        yield from check_provider(settings.login.oidc)
    yield from check_slurm()


def _check_templates(folder: Path) -> Iterator[Finding]:
    found = templates_in(folder)
    if not found:
        yield note("templates", f"{folder} has no template.", "write project files with {name} into it, see docs/facility/install.md")
    for one in found:
        if one.problem:
            yield problem("templates", one.problem, "correct it; its file and folder belong to this account or root, mode 644 and 755")
        else:
            yield ok("templates", f"{one.name} asks for {', '.join(('the name', *one.numbers))}.")


def _guarded(point: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Findings of a test that may itself fail, at a file system that goes away: the other points are tested all the same."""
    try:
        yield from findings
    except CryodaskError as error:
        yield problem(point, error.what, error.way_out)
    except OSError as error:
        yield problem(point, f"It could not be tested: {error}.", "check that its file system is mounted and answers")
