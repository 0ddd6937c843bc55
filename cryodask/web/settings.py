"""``facility.yaml``: what a facility's server shows, where it listens, and how people log in."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from cryodask.account import state_folder
from cryodask.documents import StrictModel, expand, read_yaml
from cryodask.errors import ProjectFileError
from cryodask.run.wrong_names import problems


class _Section(StrictModel):
    @field_validator("*", mode="after")
    @classmethod
    def _expanded(cls, value: Any) -> Any:
        return Path(expand(str(value))) if isinstance(value, Path) else value


class Listen(_Section):
    """Where the server listens."""

    host: str = Field(default="127.0.0.1", description="address; beyond loopback only with a certificate")
    port: int = Field(default=8443, ge=0, le=65535)
    certificate: Path | None = Field(default=None, description="TLS certificate, PEM")
    key: Path | None = Field(default=None, description="its key, PEM")
    prefix: str = Field(default="", pattern=r"^(/[A-Za-z0-9._~-]+)*$", description="path before all addresses that a proxy passes on")
    proxies: list[str] = Field(
        default_factory=list, description="addresses of proxies whose X-Forwarded-For tells who connects; failed log-ins are counted by it"
    )


class ProxyLogin(_Section):
    """Log-in by a proxy in front, which says who it is in a header. Without the secret anybody who reaches the port could say that."""

    header: str = "X-Remote-User"
    secret_file: Path = Field(description="file with the secret that the proxy sends in the header X-Proxy-Secret")
    addresses: list[str] = Field(default_factory=lambda: ["127.0.0.1", "::1"], description="addresses of the proxy")


class OidcLogin(_Section):
    """Log-in at an OpenID Connect provider."""

    issuer: str = Field(description="address of the provider; its configuration is at ISSUER/.well-known/openid-configuration")
    client_id: str
    client_secret_file: Path
    redirect: str = Field(description="address of this server's  login/oidc/back  as browsers see it")
    name_claim: str = Field(default="preferred_username", description="claim of the ID token with the log-in name")
    groups_claim: str = Field(default="groups", description="claim with the groups of a person")
    admin_groups: list[str] = Field(default_factory=list, description="groups whose members administer the facility")
    operator_groups: dict[str, list[str]] = Field(default_factory=dict, description="microscopes that members of a group operate")


class LoginSettings(_Section):
    """Ways to log in; at least one."""

    passwords: Path | None = Field(default=None, description="password file, written by  cryodask password")
    proxy: ProxyLogin | None = None
    oidc: OidcLogin | None = None


class FacilitySettings(_Section):
    """Content of ``facility.yaml``."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    microscopes: dict[str, list[Path]] = Field(default_factory=dict, description="folders with projects, by microscope")
    projects: list[Path] = Field(default_factory=list, description="folders with projects of no particular microscope")
    listen: Listen = Listen()
    login: LoginSettings = LoginSettings()
    admins: list[str] = Field(default_factory=list, description="people who administer the facility, whatever the administration page says")
    state: Path | None = Field(default=None, description="folder for people, tokens and audit; by default in the account's state")
    start: str | None = Field(
        default=None,
        description="where sessions are run that people start from their pages: 'here', in processes on this machine, or the name or file "
        "of a cluster, as its jobs; by default none are started",
    )
    templates: Path | None = Field(default=None, description="folder of project files from which operators make new sessions")
    storage: dict[str, Any] = Field(default_factory=dict, description="retention by category: see docs/storage.md")

    @model_validator(mode="after")
    def _is_safe(self) -> Self:
        ways = self.login
        if ways.passwords is None and ways.proxy is None and ways.oidc is None:
            raise ValueError("there is no way to log in: set login.passwords, login.proxy or login.oidc")
        if (self.listen.certificate is None) != (self.listen.key is None):
            raise ValueError("listen.certificate and listen.key belong together")
        if not is_loopback(self.listen.host) and self.listen.certificate is None:
            raise ValueError(
                f"listen.host {self.listen.host} can be reached from other machines: set listen.certificate and listen.key, or listen on "
                "127.0.0.1 behind a proxy with TLS"
            )
        if not self.microscopes and not self.projects:
            raise ValueError("nothing is shown: set microscopes or projects")
        return self

    @property
    def folders(self) -> dict[str, list[Path]]:
        """Folders with projects, by microscope."""
        return {**self.microscopes, **({"": self.projects} if self.projects else {})}

    @property
    def state_folder(self) -> Path:
        """Folder for people, tokens, audit and the secret of cookies."""
        return self.state or state_folder() / "facility" / self.name


def read_facility(path: Path) -> FacilitySettings:
    """Read and check ``facility.yaml``.

    Raises
    ------
    ProjectFileError
    """
    content = read_yaml(path, "facility file")
    if not isinstance(content, dict):
        raise ProjectFileError(f"{path} is not a facility file: it has no keys.", "", "see docs/facility/install.md for an example")
    try:
        made = FacilitySettings.model_validate(content)
    except ValidationError as error:
        raise ProjectFileError(f"{path}: {problems(error, FacilitySettings)}", "", "see docs/facility/install.md for all keys") from None
    here, found = path.absolute().parent, dict[str, Any]()
    if made.start is not None and made.start.endswith((".yaml", ".yml")):
        # runs begin in the folders of their projects
        cluster = (here / expand(made.start)).resolve()
        if not cluster.is_file():
            raise ProjectFileError(
                f"{path}: start names {cluster}, which is not there.", "", "correct the path, or give the name of a cluster"
            )
        found["start"] = str(cluster)
    if made.templates is not None:
        found["templates"] = here / made.templates
        if not found["templates"].is_dir():
            raise ProjectFileError(f"{path}: templates names {found['templates']}, which is no folder.", "", "correct the path")
    return made.model_copy(update=found)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
