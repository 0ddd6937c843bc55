"""Certificates: one authority a cluster, one certificate a person, and plain words when a connection is refused.

What the transport itself enforces: nobody connects without a certificate of this cluster's authority, and a person's certificate is good
for connecting only, so that it can pose neither as the scheduler nor as a worker. Distributed compares no host names and no roles: who may
do what once connected is decided in ``guard.py``, from the name and the role in the certificate.
"""

from __future__ import annotations

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
_SERVICES: tuple[Role, ...] = ("scheduler", "worker")


class Authority:
    """What signs the certificates of one cluster: a folder that nobody but its account can read.

    It holds ``ca.pem`` and ``ca-key.pem``, certificate and key of the scheduler, the workers and every person, ``people.json`` (who is
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
                f"{folder} already holds an authority.", "the cluster was made before", "open it, or remove the folder to shut out all"
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
        """Certificate and key for a name, as two files; one made before for that name and role is replaced."""
        _refuse_name(name, role)
        paths = self.folder / f"{name}.pem", self.folder / f"{name}-key.pem"
        before = _names(_certificate(paths[0].read_text(), paths[0]))[1] if paths[0].exists() else role
        if before != role:
            raise ClusterError(
                f"{name} is the {before} of {self.cluster} and cannot become its {role}.",
                "the owner has every right and needs no invitation" if before == "owner" else "the name is taken",
                "leave that name out",
            )
        key = ec.generate_private_key(ec.SECP256R1())
        # OpenSSL itself refuses a server whose certificate is for clients only
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

    def invite(self, user: str, lanes: Iterable[str], *, address: str, days: float = 365, address_file: str = "") -> Path:
        """One file that lets a person in: address, authority, certificate and key. Another invitation makes the one before worthless.

        The first lane is the one that counts when a person names one that is not allowed; no lanes at all means every lane. If the
        address changes, the new one is looked up in ``address_file``, which needs no protection: who stands at an address must
        show a certificate of this authority.
        """
        if not address.startswith("tls://"):
            raise ClusterError(
                f"Nobody can be invited to {address}.", "the scheduler was started without certificates", "give its tls:// address"
            )
        path, key = self.certificate(user, days=days)
        certificate = _certificate(path.read_text(), path)
        expires = certificate.not_valid_after_utc.isoformat()
        entry: dict[str, Any] = {"lanes": list(lanes), "serial": f"{certificate.serial_number:X}", "expires": expires}
        self._write_people({**self.people(), user: entry})
        invitation = Invitation(
            cluster=self.cluster, address=address, address_file=address_file, user=user, lanes=entry["lanes"], expires=expires,
            authority=_pem(self._certificate), certificate=path.read_text(), key=key.read_text(),
        )  # fmt: skip
        folder = self.folder / "invitations"
        folder.mkdir(mode=0o700, exist_ok=True)
        target = folder / f"{self.cluster}-{user}.invite"
        write_secret(target, json.dumps(asdict(invitation), indent=1))
        return target

    def revoke(self, user: str) -> None:
        """Take an invitation back: the scheduler refuses that person from now on."""
        people = self.people()
        if people.pop(user, None) is None:
            raise ClusterError(f"{user} is not invited to {self.cluster}.", "a typing error", f"invited are {', '.join(sorted(people))}")
        self._write_people(people)

    def people(self) -> dict[str, dict[str, Any]]:
        """Who is invited: lanes, serial number of the certificate that counts, and its expiry."""
        path = self.folder / "people.json"
        return json.loads(read_secret(path)) if path.exists() else {}

    def _write_people(self, people: Mapping[str, Any]) -> None:
        write_secret(self.folder / "people.json", json.dumps(people, indent=1))

    def set_lanes(self, user: str, lanes: Iterable[str]) -> None:
        """Change the lanes of somebody who is invited; the invitation stays good."""
        people = self.people()
        people[user] = {**people[user], "lanes": list(lanes)}
        self._write_people(people)


@dataclass(frozen=True)
class Invitation:
    """What :meth:`Authority.invite` hands to a person; certificates and keys are PEM texts."""

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
        """From a file, or by the name of a cluster from ``~/.config/cryodask/NAME.invite``."""
        path = Path(where)
        if not path.is_file() and len(path.parts) == 1:
            path = invitation_of(str(where))
        try:
            return cls(**json.loads(read_secret(path)))
        except (TypeError, ValueError) as error:
            raise ClusterError(f"{path} is no invitation: {error}", "it was cut off on its way", "ask the cluster's owner again") from None

    def present_address(self) -> str:
        """Where the scheduler is now, as far as this account can read it; else where it was at the time of the invitation."""
        try:
            address = json.loads(Path(self.address_file).read_text())["address"]
        except (OSError, ValueError, KeyError, TypeError):
            return self.address
        return address if isinstance(address, str) and address.startswith("tls://") else self.address

    def security(self) -> Security:
        """What a Client needs to connect as this person."""
        _check(self.certificate, self.authority, f"the invitation of {self.user} to {self.cluster}")
        return _security(self.authority, {"client": (self.certificate, self.key)})


def invitation_of(cluster: str) -> Path:
    """Where a person keeps the invitation to a cluster of that name."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "cryodask" / f"{Path(cluster).name}.invite"


def security(folder: str | Path, name: str) -> Security:
    """Security for one of an authority's names: ``scheduler``, ``worker``, or a person.

    Each is told apart by its certificate, so scheduler, workers and the owner's client get one each. A worker's is used by clients that
    its tasks open as well.
    """
    folder = Path(folder)
    if not (folder / f"{name}.pem").exists():
        raise ClusterError(
            f"There is no certificate for {name} in {folder}.",
            "nobody made one",
            f"let the cluster's owner run  cryodask cluster invite {name}",
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
    """Environment in which a plain ``dask worker`` joins the cluster, with its certificate and its guard.

    The guard of its nanny must be asked for on the command line (``--preload-nanny cryodask.cluster.guard``), where an option that is not
    given overrides the configuration; and so must closed pages (``--dashboard-address 127.0.0.1:0``), without which it does not start.
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
    """Within, whatever a Client raises because it cannot connect becomes one :class:`ClusterError`."""
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
        return f"{address} lets nobody in without a certificate.", "no invitation was given", f"{ask}, and connect with it"
    if "encryption required" in words:
        return f"{address} is not encrypted, but your certificate says that this cluster is.", "an old address", "use its tls:// address"
    if "unsuitable" in words or ("certificate verify failed" in words.lower() and "expired" not in words):
        return f"{address} does not belong to the cluster of your certificate.", "an invitation to another cluster, or an old one", ask
    if "expired" in words.lower():
        return f"{address}: a certificate has expired.", "certificates are made for a limited time", ask
    if "_ALERT_" in words:
        return f"{address} does not know who signed your certificate.", "an invitation to another cluster, or an old one", ask
    if "wrong_version_number" in words.lower() or "record layer failure" in words.lower():
        return (
            f"{address} does not speak TLS.",
            "the scheduler was started without certificates",
            "use its tcp:// address, from its own machine",
        )
    if isinstance(error, PermissionError | ImportError):
        what, _, rest = str(error).partition("\n")
        reason, _, way = rest.partition("\n")
        return what, reason.removeprefix("  Usual reason: "), way.removeprefix("  What to do: ")
    if "Timed out trying to connect" in words:
        return f"No scheduler answers at {address}.", "it has ended, or a firewall is between", "start it again and give its new address"
    if "CommClosedError" in words and address.startswith("tcp://"):
        return f"{address} hung up on an unencrypted connection.", "the cluster is reached with certificates only", "use its tls:// address"
    if "CommClosedError" in words or "IOStream is not idle" in words:  # tornado's words where it hangs up before the encryption begins
        return f"{address} hung up.", "your certificate was refused, or the scheduler is ending", f"look whether it runs; else {ask}"
    if isinstance(error, OSError):
        return (
            f"No scheduler answers at {address}: {error}",
            "it has ended, or a firewall is between",
            "start it again and give its new address",
        )
    return None


# --- certificates and secret files -----------------------------------------------------------------------------------------------
def _refuse_name(name: str, role: Role) -> None:
    """A name becomes two files, NAME.pem and NAME-key.pem, which must be nobody else's."""
    if (
        not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]*", name)
        or name.endswith("-key")
        or (name in (*_SERVICES, "ca")) != (role in _SERVICES)
    ):
        raise ClusterError(
            f"{name!r} cannot be the name of {'an' if role == 'owner' else 'a'} {role}.",
            "a sign that no account has, or a name kept for us",
            "letters, digits and . _ @ -, and no -key at the end",
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
    # clocks of a cluster's machines differ: valid from an hour ago
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
        raise ClusterError(f"{where} holds no certificate: {error}", "the file was cut off", "make a new one") from None


def _check(text: str, authority: str, where: str) -> None:
    certificate = _certificate(text, where)
    try:
        certificate.verify_directly_issued_by(_certificate(authority, where))
    except (ValueError, TypeError, InvalidSignature):
        raise ClusterError(
            f"{where}: the certificate was signed by another authority.", "the cluster was made anew", "ask its owner for a new invitation"
        ) from None
    end = certificate.not_valid_after_utc
    if end < datetime.now(UTC):
        raise ClusterError(
            f"{where}: the certificate expired on {end:%Y-%m-%d %H:%M} UTC.",
            "certificates are made for a limited time",
            "ask the cluster's owner for a new invitation",
        )


def write_secret(path: Path, text: str) -> None:
    """A file for this account alone, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def read_secret(path: Path) -> str:
    """The text of a file that this account alone can read; ClusterError otherwise."""
    try:
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise ClusterError(
                f"{path} can be read by others (mode {mode:o}).",
                "it was copied with open permissions",
                f"chmod 600 {path}, or a new invitation",
            )
        return path.read_text()
    except FileNotFoundError:
        raise ClusterError(
            f"There is no {path}.", "a typing error, or nothing was made there", "look where the cluster's files lie"
        ) from None
    except PermissionError:
        raise ClusterError(
            f"{path} cannot be read by you.", "it belongs to another account", "use the invitation that the cluster's owner gave you"
        ) from None
