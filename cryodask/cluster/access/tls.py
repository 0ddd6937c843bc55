"""Certificates: one authority per cluster, one certificate per user, and readable errors for refused connections.

The transport enforces that nobody connects without a certificate of this cluster's authority, and that a user's certificate is valid
for clients only, so that it can impersonate neither scheduler nor worker. Distributed compares neither host names nor roles: what
a connected peer may do is decided in ``guard.py``, from the name and the role in the certificate.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from distributed import Security

from cryodask.errors import ClusterError

Role = Literal["scheduler", "worker", "owner", "user"]
PersonRole = Literal["user", "viewer"]
_SERVICES: tuple[Role, ...] = ("scheduler", "worker")


class Authority:
    """Signs the certificates of a cluster; a folder that only its account can read.

    It contains ``ca.pem`` and ``ca-key.pem``, certificates and keys of the scheduler, the workers and every user, ``people.json`` (who is
    invited, into which lanes, with which certificate), and ``invitations/``.
    """

    def __init__(self, folder: Path, cluster: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.folder, self.cluster = folder, cluster
        self._certificate, self._key = certificate, key

    @classmethod
    def create(cls, folder: str | Path, *, owner: str, cluster: str = "cryodask", days: float = 3650) -> Authority:
        """A new authority, with certificates for the scheduler, the workers and the owner, valid as long as its own."""
        folder = Path(folder)
        if (folder / "ca.pem").exists():
            raise ClusterError(
                f"{folder} already contains an authority.",
                "the cluster was created before",
                "open it, or remove the folder to revoke all access",
            )
        _refuse_name(owner, "owner")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        key, name = ec.generate_private_key(ec.SECP256R1()), _subject(cluster, "authority", cluster)
        certificate = (
            _builder(name, name, key, days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        write_secret(folder / "ca-key.pem", _pem(key))
        write_secret(folder / "ca.pem", _pem(certificate))
        made = cls(folder, cluster, certificate, key)
        for service in _SERVICES:
            made.certificate(service, service, days=days)
        made.certificate(owner, "owner", days=days)
        return made

    @classmethod
    def open(cls, folder: str | Path) -> Authority:
        """The authority in a folder; refused if others can read its secrets."""
        folder = Path(folder)
        certificate = _certificate(read_secret(folder / "ca.pem"), folder / "ca.pem")
        key = serialization.load_pem_private_key(read_secret(folder / "ca-key.pem").encode(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return cls(folder, _names(certificate)[0], certificate, key)

    def certificate(self, name: str, role: Role = "user", *, days: float = 365) -> tuple[Path, Path]:
        """Certificate and key for a name, as two files; replaces an earlier one for the same name and role."""
        _refuse_name(name, role)
        paths = self.folder / f"{name}.pem", self.folder / f"{name}-key.pem"
        before = _names(_certificate(paths[0].read_text(), paths[0]))[1] if paths[0].exists() else role
        if before != role:
            raise ClusterError(
                f"{name} is the {before} of {self.cluster} and cannot become its {role}.",
                "the owner has full access and needs no invitation" if before == "owner" else "the name is taken",
                "choose another name",
            )
        key = ec.generate_private_key(ec.SECP256R1())
        # OpenSSL refuses a server with a client-only certificate
        usage = [ExtendedKeyUsageOID.CLIENT_AUTH] + ([ExtendedKeyUsageOID.SERVER_AUTH] if role in _SERVICES else [])
        certificate = (
            _builder(_subject(name, role, self.cluster), self._certificate.subject, key, days, self._certificate.not_valid_after_utc)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        write_secret(paths[0], _pem(certificate))
        write_secret(paths[1], _pem(key))
        return paths

    def invite(
        self, user: str, lanes: Iterable[str], *, address: str, days: float = 365, address_file: str = "", role: PersonRole = "user"
    ) -> Path:
        """One file that gives a user access: address, authority, certificate and key. A new invitation invalidates the old one.

        The first lane is used when the user asks for one that is not allowed; no lanes means all lanes. If the
        address changes, the new one is read from ``address_file``, which needs no protection: the server there must
        present a certificate of this authority. A ``viewer`` sees states and usage, and submits nothing.
        """
        if not address.startswith("tls://"):
            raise ClusterError(
                f"Nobody can be invited to {address}.", "the scheduler was started without certificates", "give its tls:// address"
            )
        target = self.folder / "invitations" / f"{self.cluster}-{user}.invite"
        with self._changing() as people:
            path, key = self.certificate(user, days=days)
            certificate = _certificate(path.read_text(), path)
            expires = certificate.not_valid_after_utc.isoformat()
            people[user] = {"lanes": list(lanes), "serial": f"{certificate.serial_number:X}", "expires": expires, "role": role}
            invitation = Invitation(
                cluster=self.cluster, address=address, address_file=address_file, user=user, lanes=people[user]["lanes"],
                expires=expires, authority=_pem(self._certificate), certificate=path.read_text(), key=key.read_text(),
            )  # fmt: skip
            target.parent.mkdir(mode=0o700, exist_ok=True)
            write_secret(target, json.dumps(asdict(invitation), indent=1))
        return target

    def revoke(self, user: str) -> None:
        """Revoke an invitation: the scheduler refuses that user from now on."""
        with self._changing() as people:
            self._entry(people, user)
            del people[user]

    def set_lanes(self, user: str, lanes: Iterable[str]) -> None:
        """Change the lanes of an invited user; the invitation stays valid."""
        with self._changing() as people:
            people[user] = {**self._entry(people, user), "lanes": list(lanes)}

    def people(self) -> dict[str, dict[str, Any]]:
        """Invited users: lanes, serial number of the valid certificate, and its expiry."""
        path = self.folder / "people.json"
        return json.loads(read_secret(path)) if path.exists() else {}

    @contextmanager
    def _changing(self) -> Iterator[dict[str, dict[str, Any]]]:
        """The invited users, to be changed: written at the end, by one process at a time."""
        with os.fdopen(os.open(self.folder / "people.lock", os.O_RDWR | os.O_CREAT, 0o600)) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            people = self.people()
            yield people
            write_secret(self.folder / "people.json", json.dumps(people, indent=1))

    def _entry(self, people: Mapping[str, dict[str, Any]], user: str) -> dict[str, Any]:
        if user not in people:
            raise ClusterError(
                f"{user} is not invited to {self.cluster}.",
                "the invitation was revoked, or never made",
                f"invited are {', '.join(sorted(people))}" if people else "invite them first; nobody is invited",
            )
        return people[user]


@dataclass(frozen=True)
class Invitation:
    """An invitation from :meth:`Authority.invite`; certificates and keys are PEM texts."""

    cluster: str
    address: str
    user: str
    lanes: list[str]
    expires: str
    authority: str
    certificate: str
    key: str
    address_file: str = ""

    @classmethod
    def read(cls, where: str | Path) -> Invitation:
        """Read a file, or by the name of a cluster ``~/.config/cryodask/NAME.invite``."""
        path = Path(where)
        if not path.is_file() and len(path.parts) == 1:
            path = invitation_of(str(where))
        try:
            return cls(**json.loads(read_secret(path)))
        except (TypeError, ValueError) as error:
            raise ClusterError(
                f"{path} is not a valid invitation: {error}", "it was truncated in transfer", "ask the cluster's owner for it again"
            ) from None

    def present_address(self) -> str:
        """The scheduler's current address if this account can read it; else the one in the invitation."""
        try:
            address = json.loads(Path(self.address_file).read_text(encoding="utf-8"))["address"]
        except (OSError, ValueError, KeyError, TypeError):
            return self.address
        return address if isinstance(address, str) and address.startswith("tls://") else self.address

    def security(self) -> Security:
        """Security for a Client that connects as this user."""
        _check(self.certificate, self.authority, f"the invitation of {self.user} to {self.cluster}")
        return _security(self.authority, {"client": (self.certificate, self.key)})


def invitation_of(cluster: str) -> Path:
    """Path where a user keeps the invitation to a cluster of that name."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "cryodask" / f"{Path(cluster).name}.invite"


def security(folder: str | Path, name: str) -> Security:
    """Security for one of an authority's names: ``scheduler``, ``worker``, or a user.

    Scheduler, workers and the owner's client are distinguished by separate certificates. Clients opened by tasks use the worker's.
    """
    folder = Path(folder)
    if not (folder / f"{name}.pem").exists():
        raise ClusterError(
            f"There is no certificate for {name} in {folder}.",
            "it was never created",
            f"ask the cluster's owner to run  cryodask cluster invite {name}",
        )
    pair = folder / f"{name}.pem", folder / f"{name}-key.pem"
    texts = [read_secret(path) for path in (folder / "ca.pem", *pair)]
    _check(texts[1], texts[0], str(pair[0]))
    roles = {"scheduler": ["scheduler"], "worker": ["worker", "client"]}.get(name, ["client"])
    return _security(str(folder / "ca.pem"), dict.fromkeys(roles, (str(pair[0]), str(pair[1]))))


def _security(authority: str, pairs: Mapping[str, tuple[str, str]]) -> Security:
    given = {f"tls_{role}_{kind}": text for role, pair in pairs.items() for kind, text in zip(("cert", "key"), pair)}
    return Security(require_encryption=True, tls_ca_file=authority, **given)


def worker_environment(folder: str | Path) -> dict[str, str]:
    """Environment for a plain ``dask worker`` to join the cluster, with its certificate and guard.

    The guard of its nanny must be requested on the command line (``--preload-nanny cryodask.cluster.guard``), where a missing option
    overrides the configuration; and so must closed pages (``--dashboard-address 127.0.0.1:0``), without which it does not start.
    """
    made = security(folder, "worker").get_tls_config_for_role("worker")
    tls = {"CA_FILE": made["ca_file"]}
    for role in ("WORKER", "CLIENT"):
        tls |= {f"{role}__CERT": made["cert"], f"{role}__KEY": made["key"]}
    return {
        "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "True",
        **{f"DASK_DISTRIBUTED__COMM__TLS__{name}": value for name, value in tls.items()},
        "DASK_DISTRIBUTED__WORKER__PRELOAD": '["cryodask.cluster.guard"]',
    }


# --- refusals in plain words -----------------------------------------------------------------------------------------------------
@contextmanager
def connection_errors(address: str) -> Iterator[None]:
    """Context manager: turns connection errors of a Client into one :class:`ClusterError`."""
    try:
        yield
    except ClusterError:
        raise
    except (OSError, TypeError, ValueError, RuntimeError, ImportError) as error:
        said = _explanation(address, error)
        if said is None:
            raise
        what, usual_reason, way_out = said
        raise ClusterError(what, usual_reason, way_out) from error


def _explanation(address: str, error: BaseException) -> tuple[str, str, str] | None:
    words, link = "", error
    while link is not None:
        words += f" {type(link).__name__}: {link}"
        link = link.__cause__ or link.__context__  # type: ignore[assignment]
    ask = "ask the cluster's owner for a new invitation"
    if "ssl_context" in words:
        return f"{address} requires a certificate.", "no invitation was given", f"{ask}, and connect with it"
    if "encryption required" in words:
        return (
            f"{address} is not encrypted, but this cluster is encrypted according to your certificate.",
            "the address is out of date",
            "use its tls:// address",
        )
    if "unsuitable" in words or ("certificate verify failed" in words.lower() and "expired" not in words):
        return (
            f"{address} does not belong to the cluster of your certificate.",
            "the invitation is for another cluster, or out of date",
            ask,
        )
    if "expired" in words.lower():
        return f"{address}: a certificate has expired.", "certificates are valid for a limited time", ask
    if "_ALERT_" in words:
        return (
            f"{address} does not recognise the authority of your certificate.",
            "the invitation is for another cluster, or out of date",
            ask,
        )
    if "wrong_version_number" in words.lower() or "record layer failure" in words.lower():
        return (
            f"{address} does not speak TLS.",
            "the scheduler was started without certificates",
            "use its tcp:// address, on the machine where it runs",
        )
    if isinstance(error, PermissionError | ImportError):
        what, _, rest = str(error).partition("\n")
        reason, _, way = rest.partition("\n")
        return what, reason.removeprefix("  Usual reason: "), way.removeprefix("  What to do: ")
    if "Timed out trying to connect" in words:
        return f"No scheduler answers at {address}.", "it has ended, or a firewall is in between", "restart it and use its new address"
    if "CommClosedError" in words and address.startswith("tcp://"):
        return (
            f"{address} closed an unencrypted connection.",
            "the cluster requires certificates, or the scheduler is ending",
            "use its tls:// address, or restart it",
        )
    if "CommClosedError" in words or "IOStream is not idle" in words:  # tornado's message if it closes before the encryption starts
        return (
            f"{address} closed the connection.",
            "your certificate was refused, or the scheduler is ending",
            f"check that it is running; otherwise {ask}",
        )
    if isinstance(error, OSError):
        return (
            f"No scheduler answers at {address}: {error}",
            "it has ended, or a firewall is in between",
            "restart it and use its new address",
        )
    return None


# --- certificates and secret files -----------------------------------------------------------------------------------------------
def _refuse_name(name: str, role: Role) -> None:
    """Refuse invalid names: a name becomes two files, NAME.pem and NAME-key.pem, which must not clash with others."""
    if (
        not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]*", name)
        or name.endswith("-key")
        or (name in (*_SERVICES, "ca")) != (role in _SERVICES)
    ):
        raise ClusterError(
            f"{name!r} cannot be the name of {'an' if role == 'owner' else 'a'} {role}.",
            "it has a character that is not allowed, or is reserved",
            "use letters, digits and . _ @ -, and no -key at the end",
        )


def _subject(name: str, role: str, cluster: str) -> x509.Name:
    values = {NameOID.ORGANIZATION_NAME: cluster, NameOID.ORGANIZATIONAL_UNIT_NAME: role, NameOID.COMMON_NAME: name}
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in values.items()])


def _names(certificate: x509.Certificate) -> tuple[str, str]:
    kinds = NameOID.COMMON_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME
    name, role = (str(certificate.subject.get_attributes_for_oid(kind)[0].value) for kind in kinds)
    return name, role


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: float, latest: datetime | None = None
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    # valid from an hour ago, because clocks of a cluster's machines differ
    end = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - timedelta(hours=1))
        .not_valid_after(end if latest is None else min(end, latest))
    )


def _pem(made: x509.Certificate | ec.EllipticCurvePrivateKey) -> str:
    if isinstance(made, x509.Certificate):
        return made.public_bytes(serialization.Encoding.PEM).decode()
    return made.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()


def _certificate(text: str, where: Any) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(text.encode())
    except ValueError as error:
        raise ClusterError(f"{where} has no valid certificate: {error}", "the file is truncated", "make a new one") from None


def _check(text: str, authority: str, where: str) -> None:
    certificate = _certificate(text, where)
    try:
        certificate.verify_directly_issued_by(_certificate(authority, where))
    except (ValueError, TypeError, InvalidSignature):
        raise ClusterError(
            f"{where}: the certificate was signed by another authority.", "the cluster was recreated", "ask its owner for a new invitation"
        ) from None
    end = certificate.not_valid_after_utc
    if end < datetime.now(UTC):
        raise ClusterError(
            f"{where}: the certificate expired on {end:%Y-%m-%d %H:%M} UTC.",
            "certificates are valid for a limited time",
            "ask the cluster's owner for a new invitation",
        )


def write_secret(path: Path, text: str) -> None:
    """Write a file that only this account can read, atomically."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def read_secret(path: Path) -> str:
    """Read a file that only this account can read; ClusterError otherwise."""
    try:
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise ClusterError(
                f"{path} is readable by others (mode {mode:o}).",
                "it was copied with open permissions",
                f"run  chmod 600 {path}, or ask for a new invitation",
            )
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ClusterError(
            f"There is no {path}.", "the path is wrong, or the file was never created", "check the folder of the cluster's files"
        ) from None
    except PermissionError:
        raise ClusterError(
            f"You cannot read {path}.", "it belongs to another account", "use the invitation that the cluster's owner gave you"
        ) from None
