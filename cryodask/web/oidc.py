"""Log-in at an OpenID Connect provider: authorisation code with PKCE, and an ID token whose signature, audience and nonce are checked."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import threading
import time
from typing import Any
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from cryodask.web.login import LogInError
from cryodask.web.settings import OidcLogin

_ANSWER_SECONDS = 10.0
_KEEP_SECONDS = 3600.0
_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA"]


class Provider:
    """The provider of one server."""

    def __init__(self, settings: OidcLogin) -> None:
        self.settings = settings
        self._secret = settings.client_secret_file.read_text(encoding="utf-8").strip()
        self._lock = threading.Lock()
        self._known: dict[str, Any] = {}
        self._read = float("-inf")

    def begin(self) -> tuple[str, dict[str, str]]:
        """The provider's address to send a browser to, and what must be remembered until it comes back."""
        memory = {"state": secrets.token_urlsafe(16), "nonce": secrets.token_urlsafe(16), "verifier": secrets.token_urlsafe(48)}
        query = {
            "response_type": "code",
            "client_id": self.settings.client_id,
            "redirect_uri": self.settings.redirect,
            "scope": "openid profile email",
            "state": memory["state"],
            "nonce": memory["nonce"],
            "code_challenge": _challenge(memory["verifier"]),
            "code_challenge_method": "S256",
        }
        return f"{self._about()['authorization_endpoint']}?{urlencode(query)}", memory

    def end(self, code: str, state: str, memory: dict[str, str]) -> tuple[str, list[str]]:
        """Log-in name and groups of the person that the provider sent back.

        Raises
        ------
        LogInError
        """
        if not state or state != memory.get("state"):
            raise LogInError("The provider's answer does not belong to this log-in.", "", "log in again")
        try:
            token = self._exchange(code, memory["verifier"])
            claims = self._claims(str(token["id_token"]), memory["nonce"])
        except LogInError:
            raise
        except Exception as error:  # whatever a provider, its network or a library makes of a wrong answer
            raise LogInError(f"The provider did not confirm the log-in: {type(error).__name__}.", "", "log in again") from error
        name = claims.get(self.settings.name_claim)
        if not isinstance(name, str) or not name:
            raise LogInError(f"The provider's answer has no claim {self.settings.name_claim}.", "", "correct login.oidc.name_claim")
        groups = claims.get(self.settings.groups_claim, [])
        return name, [str(group) for group in groups] if isinstance(groups, list) else []

    def _claims(self, token: str, nonce: str) -> dict[str, Any]:
        try:
            decoded = jwt.decode(token, self._keys(), algorithms=_ALGORITHMS)
        except (JoseError, ValueError):
            self._read = float("-inf")  # the provider may have new keys
            decoded = jwt.decode(token, self._keys(), algorithms=_ALGORITHMS)
        claims = dict(decoded.claims)
        jwt.JWTClaimsRegistry(
            iss={"essential": True, "value": self._about()["issuer"]},
            aud={"essential": True, "value": self.settings.client_id},
            exp={"essential": True},
            nonce={"essential": True, "value": nonce},
            leeway=60,
        ).validate(claims)
        return claims

    def _about(self) -> dict[str, Any]:
        with self._lock:
            if time.monotonic() - self._read > _KEEP_SECONDS:
                self._known = self._ask(f"{self.settings.issuer.rstrip('/')}/.well-known/openid-configuration")
                if self._known.get("issuer", "").rstrip("/") != self.settings.issuer.rstrip("/"):
                    raise LogInError(
                        f"{self.settings.issuer} says that it is {self._known.get('issuer')}.", "", "correct login.oidc.issuer"
                    )
                self._known["keys"] = self._ask(self._known["jwks_uri"])
                self._read = time.monotonic()
            return self._known

    def _keys(self) -> KeySet:
        return KeySet.import_key_set(self._about()["keys"])

    def _exchange(self, code: str, verifier: str) -> dict[str, Any]:
        """The tokens for a code, asked for with this server's own secret."""
        form = {"grant_type": "authorization_code", "code": code, "redirect_uri": self.settings.redirect, "code_verifier": verifier}
        known = f"{quote(self.settings.client_id, safe='')}:{quote(self._secret, safe='')}"
        headers = {"Authorization": f"Basic {base64.b64encode(known.encode()).decode()}", "Accept": "application/json"}
        with urlopen(Request(self._about()["token_endpoint"], urlencode(form).encode(), headers), timeout=_ANSWER_SECONDS) as answer:
            return dict(json.load(answer))

    def _ask(self, address: str) -> dict[str, Any]:
        if not address.startswith(("https://", "http://")):
            raise LogInError(f"{address} is not the address of a log-in provider.", "", "correct login.oidc.issuer")
        try:
            with urlopen(address, timeout=_ANSWER_SECONDS) as answer:
                return dict(json.load(answer))
        except (OSError, ValueError) as error:
            raise LogInError(f"The log-in provider does not answer at {address}: {error}.", "", "try again in a minute") from error


def _challenge(verifier: str) -> str:
    """What the provider gets of the verifier before the code (RFC 7636)."""
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
