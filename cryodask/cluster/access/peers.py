"""Who is at the other end of a connection."""

from __future__ import annotations

import ssl
from contextvars import ContextVar
from dataclasses import dataclass
from time import time
from typing import Any

from distributed.comm import Comm


@dataclass(frozen=True)
class Peer:
    """The other end of a connection, from its certificate; all None without one.

    Parameters
    ----------
    name : str, optional
    role : str, optional
        ``scheduler``, ``worker``, ``owner`` or ``user``.
    serial : int, optional
        Serial number of the certificate.
    expires : float
        Expiry of the certificate, seconds since 1970; 0 if there is none.
    """

    name: str | None = None
    role: str | None = None
    serial: int | None = None
    expires: float = 0.0

    @classmethod
    def of(cls, comm: Comm) -> Peer:
        """From a connection."""
        return cls.of_certificate((comm.extra_info or {}).get("peercert"))

    @classmethod
    def of_certificate(cls, certificate: dict[str, Any] | None) -> Peer:
        """From a certificate as :meth:`ssl.SSLSocket.getpeercert` returns it."""
        if not certificate:
            return cls()
        subject = {kind: value for part in certificate.get("subject", ()) for kind, value in part}
        return cls(
            subject.get("commonName", ""),
            subject.get("organizationalUnitName", "user"),
            int(certificate.get("serialNumber", "0"), 16),
            ssl.cert_time_to_seconds(certificate["notAfter"]),
        )

    def has_expired(self) -> bool:
        """Whether the certificate has expired; OpenSSL does not check again when a session is resumed, or while a connection is open."""
        return 0.0 < self.expires < time()

    def __str__(self) -> str:
        return "nobody (no certificate)" if self.name is None else self.name


ASKING: ContextVar[Peer] = ContextVar("cryodask-asking")
"""Who sent the message that is being handled, for handlers whose answer depends on it."""


def asking() -> str | None:
    """Name of the person whose message is being handled; None for scheduler, workers and the owner."""
    peer = ASKING.get(_NOBODY)
    return peer.name if peer.role == "user" else None


_NOBODY = Peer()
