"""Who may do what: roles, the rights that they give, and tokens of programs with scopes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Role(StrEnum):
    """Roles, from the least to the most. The first three belong to a session, ``operator`` to a microscope, ``admin`` to all."""

    viewer = "viewer"
    member = "member"
    pi = "pi"
    operator = "operator"
    admin = "admin"


class Right(StrEnum):
    """What a person may do with a session."""

    see = "see"
    """See its pages, pictures and numbers."""
    edit = "edit"
    """Edit picks and selections, set thresholds, write notes."""
    manage = "manage"
    """Add members, hand over, export, extend the retention."""
    operate = "operate"
    """Start, pause and end it."""
    administer = "administer"
    """Change people, shares and the retention policy, and remove data."""


_OF_ROLE = {
    Role.viewer: frozenset({Right.see}),
    Role.member: frozenset({Right.see, Right.edit}),
    Role.pi: frozenset({Right.see, Right.edit, Right.manage, Right.operate}),
    Role.operator: frozenset({Right.see, Right.edit, Right.manage, Right.operate}),
    Role.admin: frozenset(Right),
}

SCOPES = {"read": Right.see, "edit": Right.edit, "session": Right.operate}
"""Scopes of tokens, and the right that each gives; a token never manages or administers."""


@dataclass(frozen=True)
class Person:
    """Somebody who is logged in, or a program with a token of that person.

    Parameters
    ----------
    name : str
        Log-in name.
    admin : bool
        Whether the person administers the facility.
    microscopes : frozenset of str
        Microscopes of which the person is an operator.
    sessions : mapping of str to Role
        Roles in single sessions, by the id of the session.
    scopes : frozenset of str, optional
        Scopes of the token; None for a person in a browser.
    """

    name: str
    admin: bool = False
    microscopes: frozenset[str] = frozenset()
    sessions: Mapping[str, Role] = field(default_factory=dict)
    scopes: frozenset[str] | None = None

    def role(self, session: str, microscope: str) -> Role | None:
        """The person's role for a session at a microscope; None if there is none."""
        if self.admin:
            return Role.admin
        if microscope in self.microscopes:
            return Role.operator
        return self.sessions.get(session)

    def may(self, right: Right, session: str, microscope: str) -> bool:
        """Whether the person has a right for a session."""
        role = self.role(session, microscope)
        return role is not None and right in _OF_ROLE[role] and self._in_scope(right)

    def administers(self) -> bool:
        """Whether the person may change people and policies."""
        return self.admin and self.scopes is None

    def in_scope(self, scope: str) -> bool:
        """Whether a token reaches as far as a scope; always true in a browser."""
        return self.scopes is None or scope in self.scopes

    def _in_scope(self, right: Right) -> bool:
        return self.scopes is None or any(SCOPES[scope] is right for scope in self.scopes if scope in SCOPES)
