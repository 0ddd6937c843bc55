"""Administration: people and their roles, tokens, and the audit; and the people of one session."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from cryodask.web.directory import OF_A_SESSION
from cryodask.web.pages import page
from cryodask.web.people import Role
from cryodask.web.routes.account import directory_of, login_of
from cryodask.web.routes.sessions import known_templates
from cryodask.web.sessions import Administrator, Managed, record, sessions_of

router = APIRouter()

_AUDIT_LINES = 300


class Roles(BaseModel):
    """All roles of a person."""

    admin: bool = False
    microscopes: list[str] = Field(default_factory=list, max_length=200)
    sessions: dict[str, Role] = Field(default_factory=dict, max_length=10_000)


class Member(BaseModel):
    """A person's role in one session; null takes it away."""

    name: str = Field(min_length=1, max_length=100)
    role: Role | None = None


@router.get("/admin/", include_in_schema=False)
def admin_page(request: Request, person: Administrator) -> Response:
    """People, tokens, microscopes, templates and the latest lines of the audit."""
    directory, shown = login_of(request).directory, sessions_of(request)
    return page(
        request,
        "admin.html",
        people=directory.people() if directory is not None else None,
        tokens=directory.tokens() if directory is not None else [],
        sessions=shown.all(),
        folders=shown.folders(),
        microscopes=sorted(name for name in shown.folders() if name),
        templates=known_templates(request),
        audit=shown.audit.records()[-_AUDIT_LINES:][::-1],
    )


@router.get("/api/v1/people")
def list_people(request: Request, person: Administrator) -> list[dict[str, Any]]:
    """Everybody who has a role."""
    found = directory_of(request).people().values()
    return [{"name": p.name, "admin": p.admin, "microscopes": sorted(p.microscopes), "sessions": dict(p.sessions)} for p in found]


@router.put("/api/v1/people/{name}")
def set_person(request: Request, person: Administrator, name: str, roles: Roles) -> dict[str, str]:
    """Give a person these roles and no others."""
    directory_of(request).set_person(name, admin=roles.admin, microscopes=roles.microscopes, sessions=roles.sessions)
    record(request, "set roles", name=name, **roles.model_dump(mode="json"))
    return {"name": name}


@router.delete("/api/v1/people/{name}")
def remove_person(request: Request, person: Administrator, name: str) -> dict[str, str]:
    """Take all roles and tokens of a person."""
    directory_of(request).remove_person(name)
    record(request, "removed a person", name=name)
    return {"removed": name}


@router.get("/api/v1/audit")
def audit(request: Request, person: Administrator) -> list[dict[str, Any]]:
    """The audit, oldest line first."""
    return sessions_of(request).audit.records()


@router.get("/s/{id}/people", include_in_schema=False)
def people_page(request: Request, session: Managed) -> Response:
    """Who has a role in a session."""
    directory = login_of(request).directory
    people = directory.people().values() if directory is not None else None
    members = [(p.name, p.sessions[session.id]) for p in people if session.id in p.sessions] if people is not None else None
    return page(request, "people.html", session=session, members=members, roles=OF_A_SESSION)


@router.post("/s/{id}/people")
def set_member(request: Request, session: Managed, member: Member) -> dict[str, str]:
    """Give a person a role in a session, or take it away."""
    if member.role is not None and member.role not in OF_A_SESSION:
        raise HTTPException(422, f"{member.role} is not a role for a session: use {', '.join(OF_A_SESSION)}.")
    directory_of(request).set_role(member.name, session.id, member.role)
    record(request, "set a role", session, name=member.name, role=member.role)
    return {"name": member.name}
