"""The people of a facility and the tokens of their programs, from the lines of a ledger; the last line about each counts."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any

from cryodask.errors import InputError
from cryodask.web.ledger import Ledger
from cryodask.web.people import SCOPES, Person, Role

OF_A_SESSION = (Role.viewer, Role.member, Role.pi)


class Directory:
    """People and tokens.

    Parameters
    ----------
    ledger : Ledger
        Private: it has the hashes of tokens.
    admins : iterable of str
        People who administer the facility in any case.
    """

    def __init__(self, ledger: Ledger, admins: Iterable[str] = ()) -> None:
        self._ledger, self._admins = ledger, frozenset(admins)

    # --- people -------------------------------------------------------------------------------------------------------------
    def people(self) -> dict[str, Person]:
        """Everybody who has a role, by log-in name."""
        found: dict[str, Person] = {name: Person(name, admin=True) for name in self._admins}
        for line in self._ledger.records():
            if line.get("kind") != "person":
                continue
            name = line["name"]
            if line.get("removed"):
                found.pop(name, None)
            else:
                sessions = {id: Role(role) for id, role in line["sessions"].items()}
                found[name] = Person(name, bool(line["admin"]), frozenset(line["microscopes"]), sessions)
            if name in self._admins:
                found[name] = Person(name, admin=True)
        return dict(sorted(found.items()))

    def person(self, name: str, *, admin: bool = False, microscopes: Iterable[str] = ()) -> Person:
        """A person who has logged in, with roles from the directory and those of the groups that the provider named; perhaps none."""
        known = self.people().get(name, Person(name))
        return Person(name, known.admin or admin, known.microscopes | frozenset(microscopes), known.sessions)

    def set_person(self, name: str, *, admin: bool, microscopes: Iterable[str], sessions: Mapping[str, Role]) -> None:
        """Give a person these roles and no others."""
        if not name.strip() or len(name) > 100:
            raise InputError("A log-in name has 1 to 100 characters.", "", "enter the name with which the person logs in")
        wrong = [role for role in sessions.values() if role not in OF_A_SESSION]
        if wrong:
            raise InputError(f"{wrong[0]} is not a role for a session.", "", f"use {', '.join(OF_A_SESSION)}")
        roles = {id: role.value for id, role in sessions.items()}
        self._ledger.append({"kind": "person", "name": name, "admin": admin, "microscopes": sorted(microscopes), "sessions": roles})

    def set_role(self, name: str, session: str, role: Role | None) -> None:
        """Give a person a role in one session; None takes it away."""
        known = self.people().get(name, Person(name))
        sessions = {id: r for id, r in known.sessions.items() if id != session} | ({session: role} if role else {})
        self.set_person(name, admin=known.admin and name not in self._admins, microscopes=known.microscopes, sessions=sessions)

    def remove_person(self, name: str) -> None:
        """Take all roles of a person, and the tokens."""
        self._ledger.append({"kind": "person", "name": name, "removed": True})
        for token in self.tokens(name):
            self.revoke(token["id"])

    # --- tokens -------------------------------------------------------------------------------------------------------------
    def tokens(self, name: str | None = None) -> list[dict[str, Any]]:
        """Valid tokens (of one person): ``id``, ``person``, ``about``, ``scopes``, ``expires``."""
        found: dict[str, dict[str, Any]] = {}
        for line in self._ledger.records():
            if line.get("kind") == "token":
                found[line["id"]] = line
            elif line.get("kind") == "revoked":
                found.pop(line["id"], None)
        now = time.time()
        return [t for t in found.values() if t["expires"] > now and name in (None, t["person"])]

    def make_token(self, person: str, about: str, scopes: Iterable[str], days: float) -> str:
        """A new token; it is shown once and stored as a hash."""
        scopes = sorted(set(scopes))
        unknown = [scope for scope in scopes if scope not in SCOPES]
        if unknown or not scopes:
            raise InputError(f"{', '.join(unknown) or 'No scope'} is not a scope.", "", f"use {', '.join(SCOPES)}")
        id, secret = secrets.token_hex(6), secrets.token_urlsafe(24)
        line = {"kind": "token", "id": id, "person": person, "about": about[:200], "scopes": scopes}
        self._ledger.append({**line, "expires": time.time() + days * 86400, "hash": _hash(secret)})
        return f"{id}.{secret}"

    def revoke(self, id: str) -> None:
        """Make a token invalid."""
        self._ledger.append({"kind": "revoked", "id": id})

    def person_with_token(self, token: str) -> Person | None:
        """The program that a token belongs to: its person, limited to the scopes."""
        id, _, secret = token.partition(".")
        found = next((t for t in self.tokens() if t["id"] == id), None)
        if found is None or not hmac.compare_digest(found["hash"], _hash(secret)):
            return None
        person = self.person(found["person"])
        return Person(person.name, person.admin, person.microscopes, person.sessions, frozenset(found["scopes"]))


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
