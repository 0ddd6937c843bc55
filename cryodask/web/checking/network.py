"""Whether the server can listen, its certificate is valid, and the log-in provider answers."""

from __future__ import annotations

import errno
import json
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

from cryodask.web.checking.finding import Finding, note, ok, problem
from cryodask.web.settings import Listen, OidcLogin, is_loopback

_ANSWER_SECONDS = 10.0
_EXPIRES_DAYS = 30
_LEEWAY_SECONDS = 60.0
"""How far clocks may be apart for the tokens of a provider to be accepted; see oidc.py."""


def check_port(listen: Listen) -> Finding:
    """Whether the server can listen where it should, or does so already."""
    where = f"{listen.host}:{listen.port}"
    try:
        with socket.socket(socket.AF_INET6 if ":" in listen.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((listen.host, listen.port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            if _dashboard_answers(listen):
                return ok("port", f"The dashboard answers at {where}.")
            return problem("port", f"Another program listens at {where}.", "stop it, or choose another listen.port")
        if error.errno == errno.EACCES:
            return problem("port", f"This account may not listen at {where}.", "choose a port from 1024 on, or a proxy in front")
        return problem("port", f"The server cannot listen at {where}: {error.strerror or error}.", "correct listen.host")
    return ok("port", f"{where} is free.")


def _dashboard_answers(listen: Listen) -> bool:
    kind = "http" if listen.certificate is None else "https"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen.host, listen.host)
    address = f"{kind}://{f'[{host}]' if ':' in host else host}:{listen.port}/healthz"
    # the certificate has the name that browsers use, not this address
    trust = ssl._create_unverified_context() if kind == "https" else None
    try:
        with urlopen(address, timeout=_ANSWER_SECONDS, context=trust) as answer:
            return bool(answer.read(16) == b"ok\n")
    except (OSError, ValueError):
        return False


def check_certificate(certificate: Path, key: Path) -> Finding:
    """Whether certificate and key can be read, belong together, and stay valid for another 30 days."""
    from cryptography import x509

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # without a password of its own, OpenSSL would ask on the terminal
        context.load_cert_chain(certificate, key, password="")
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
    except ssl.SSLError as error:
        said = "do not belong together" if "MISMATCH" in str(error) else f"cannot be used: {error.reason or error}"
        return problem(
            "TLS", f"{certificate} and {key} {said}.", "use the certificate (PEM, with its chain) and the key without a password"
        )
    except (OSError, ValueError) as error:
        return problem("TLS", f"{certificate} or {key} cannot be read: {error}.", "correct listen.certificate and listen.key")
    now = datetime.now(UTC)
    days = (found.not_valid_after_utc - now).days
    until = f"{found.not_valid_after_utc:%Y-%m-%d}"
    if found.not_valid_before_utc > now:
        return problem("TLS", f"{certificate} is not valid before {found.not_valid_before_utc:%Y-%m-%d}.", "check the clock of this host")
    if days < 0:
        return problem("TLS", f"{certificate} expired on {until}.", "renew it and restart the server")
    if days < _EXPIRES_DAYS:
        return problem("TLS", f"{certificate} expires in {days} days, on {until}.", "renew it and restart the server")
    return ok("TLS", f"{certificate} is valid until {until}.")


def check_provider(login: OidcLogin) -> Iterator[Finding]:
    """Whether the provider describes itself, has keys, and has the same time."""
    issuer = login.issuer.rstrip("/")
    if not issuer.startswith(("https://", "http://")):
        yield problem("provider", f"{login.issuer!r} is not an address.", "correct login.oidc.issuer")
        return
    if not issuer.startswith("https://") and not is_loopback(urlsplit(issuer).hostname or ""):
        yield problem("provider", f"{issuer} is asked without TLS.", "use its https address in login.oidc.issuer")
    if not urlsplit(login.redirect).path.endswith("/login/oidc/back"):
        yield problem(
            "provider", f"{login.redirect} is not where this server takes log-ins.", "end login.oidc.redirect with /login/oidc/back"
        )
    where = f"{issuer}/.well-known/openid-configuration"
    try:
        about, date = _asked(where)
        names = ("issuer", "authorization_endpoint", "token_endpoint", "jwks_uri")
        missing = [name for name in names if not isinstance(about.get(name), str)]
        if missing:
            yield problem("provider", f"{where} has no {', '.join(missing)}.", "correct login.oidc.issuer")
            return
        if about["issuer"].rstrip("/") != issuer:
            yield problem("provider", f"{issuer} says that it is {about['issuer']}.", "use that address in login.oidc.issuer")
            return
        where = about["jwks_uri"]
        if not _asked(where)[0].get("keys"):
            yield problem("provider", f"{where} has no keys.", "ask the operator of the provider")
            return
    except (OSError, ValueError) as error:
        yield problem("provider", f"{where} does not answer as it should: {error}.", "check the address, and that this host may reach it")
        return
    yield ok("provider", f"{issuer} answers.")
    if date is None:
        yield note("provider clock", f"{issuer} does not say its time.")
    elif abs(date - time.time()) > _LEEWAY_SECONDS:
        apart = f"The clock of {issuer} differs from this host's by {abs(date - time.time()):.0f} s, so log-ins fail."
        yield problem("provider clock", apart, "synchronise this host's clock (chrony, NTP)")
    else:
        yield ok("provider clock", f"It agrees with this host's within {_LEEWAY_SECONDS:.0f} s.")


def _asked(address: str) -> tuple[dict[str, Any], float | None]:
    """A JSON object at an address, and the time that the answer states."""
    if not address.startswith(("https://", "http://")):
        raise ValueError("it is not an http address")
    with urlopen(address, timeout=_ANSWER_SECONDS) as answer:
        found, said = json.load(answer), answer.headers.get("Date")
    if not isinstance(found, dict):
        raise ValueError("the answer is not a JSON object")
    return found, parsedate_to_datetime(said).timestamp() if said else None
