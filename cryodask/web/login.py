"""Log-in: who sends a request. The person of a request comes from a token, a signed cookie, or a trusted proxy.

A request may carry ``Authorization: Bearer TOKEN`` (programs, and the token of ``cryodask dashboard``, which may also be in the address as
``?token=TOKEN``), or the cookie that the log-in page sets. The cookie is HttpOnly and has no path of its own: a browser sends it back to
the place that it came from, behind any prefix.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Iterable
from getpass import getuser
from typing import TYPE_CHECKING, Any

from fastapi import Request
from itsdangerous import BadSignature, URLSafeTimedSerializer

from cryodask.errors import CryodaskError
from cryodask.web.attempts import Attempts
from cryodask.web.directory import Directory
from cryodask.web.passwords import PasswordFile
from cryodask.web.people import Person
from cryodask.web.settings import LoginSettings

if TYPE_CHECKING:
    from cryodask.web.oidc import Provider

COOKIE_SECONDS = 14 * 86400


class LogInError(CryodaskError):
    """A provider did not confirm who somebody is."""


class Login:
    """Base of the ways in which a server finds out who sends a request.

    Parameters
    ----------
    secret : str
        Signs the cookies; a server with the same secret accepts them, so people stay logged in when it restarts.
    """

    token_in_address = False
    directory: Directory | None = None
    provider: Provider | None = None

    def __init__(self, secret: str) -> None:
        self.attempts = Attempts()
        self.signer = URLSafeTimedSerializer(hashlib.blake2b(secret.encode(), person=b"cookie").hexdigest())
        self.cookie = f"cryodask-{hashlib.blake2b(secret.encode(), digest_size=3, person=b'name').hexdigest()}"

    def person_of(self, request: Request) -> Person | None:
        """The person who sends a request; None if nobody is logged in."""
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if given and kind.lower() == "bearer":
            return self.person_with_token(given.strip())
        content = self.read(request.cookies.get(self.cookie, ""), COOKIE_SECONDS)
        if content is not None:
            return self.person_remembered(content)
        return self.person_with_token(request.query_params.get("token", "")) if self.token_in_address else None

    def person_with_token(self, token: str) -> Person | None:
        """The person, or program of a person, that a token belongs to."""
        raise NotImplementedError

    def person_remembered(self, content: dict[str, Any]) -> Person | None:
        """The person of a cookie; None if it is not valid any more."""
        raise NotImplementedError

    def read(self, cookie: str, seconds: int) -> dict[str, Any] | None:
        """Content of a signed cookie; None if it is not ours, or too old."""
        try:
            found = self.signer.loads(cookie, max_age=seconds) if cookie else None
        except BadSignature:
            return None
        return found if isinstance(found, dict) else None


class OwnLogin(Login):
    """Log-in to a server of one's own, with the token in the address that was printed.

    Parameters
    ----------
    token : str
        Whoever has it is the account that runs the server.
    """

    token_in_address = True

    def __init__(self, token: str) -> None:
        super().__init__(token)
        self._token = token

    def person_with_token(self, token: str) -> Person | None:
        """Like :meth:`Login.person_with_token`."""
        same = token and hmac.compare_digest(token.encode(), self._token.encode())
        return Person(getuser(), admin=True) if same else None

    def person_remembered(self, content: dict[str, Any]) -> Person | None:
        """Like :meth:`Login.person_remembered`: the cookie was given for the token."""
        return Person(getuser(), admin=True)


class FacilityLogin(Login):
    """Log-in to the server of a facility.

    Parameters
    ----------
    settings : LoginSettings
    directory : Directory
    secret : str
        Signs the cookies.
    proxies : collection of str
        Addresses of proxies that tell who connects to them.
    """

    def __init__(self, settings: LoginSettings, directory: Directory, secret: str, proxies: Collection[str] = ()) -> None:
        super().__init__(secret)
        self.settings, self.directory, self._proxies = settings, directory, frozenset(proxies)
        self.passwords = PasswordFile(settings.passwords) if settings.passwords is not None else None
        if settings.oidc is not None:
            from cryodask.web.oidc import Provider

            self.provider = Provider(settings.oidc)
        self._proxy_secret = settings.proxy.secret_file.read_text(encoding="utf-8").strip() if settings.proxy is not None else ""

    def person_of(self, request: Request) -> Person | None:
        """Like :meth:`Login.person_of`; a trusted proxy comes first."""
        return self._named_by_proxy(request) or super().person_of(request)

    def _named_by_proxy(self, request: Request) -> Person | None:
        proxy = self.settings.proxy
        if proxy is None or not self._proxy_secret or request.client is None or request.client.host not in proxy.addresses:
            return None
        given = request.headers.get("x-proxy-secret", "")
        name = request.headers.get(proxy.header, "").strip()
        if not name or not hmac.compare_digest(given.encode(), self._proxy_secret.encode()):
            return None
        return self._of_directory.person(name)

    @property
    def _of_directory(self) -> Directory:
        assert self.directory is not None
        return self.directory

    def person_with_token(self, token: str) -> Person | None:
        """Like :meth:`Login.person_with_token`: API tokens."""
        return self._of_directory.person_with_token(token) if token else None

    def address_of(self, request: Request) -> str:
        """Address of whoever sends a request: that of the connection, or what our own proxy wrote last into X-Forwarded-For."""
        address = request.client.host if request.client is not None else ""
        told = request.headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
        return told if told and address in self._proxies else address

    def with_password(self, name: str, password: str) -> dict[str, Any] | None:
        """Content of the cookie for a person with a password; None if the password is wrong."""
        if self.passwords is None or not self.passwords.fits(name, password):
            return None
        return {"name": name, "by": "password", "stamp": self._stamp(name)}

    def with_oidc(self, name: str, groups: Iterable[str]) -> dict[str, Any]:
        """Content of the cookie for a person whom the provider has named."""
        return {"name": name, "by": "oidc", "groups": sorted(groups)}

    def person_remembered(self, content: dict[str, Any]) -> Person | None:
        """Like :meth:`Login.person_remembered`; a changed password ends all log-ins with the former one."""
        name = str(content.get("name", ""))
        if content.get("by") == "password":
            return self._of_directory.person(name) if name and content.get("stamp") == self._stamp(name) else None
        if content.get("by") != "oidc" or self.settings.oidc is None or not name:
            return None
        groups = set(content.get("groups", []))
        operated = [m for group, names in self.settings.oidc.operator_groups.items() if group in groups for m in names]
        return self._of_directory.person(name, admin=not groups.isdisjoint(self.settings.oidc.admin_groups), microscopes=operated)

    def _stamp(self, name: str) -> str:
        line = self.passwords.line(name) if self.passwords is not None else None
        return hashlib.blake2b(line.encode(), digest_size=6).hexdigest() if line else ""
