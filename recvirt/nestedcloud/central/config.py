"""The central node's configuration: one TOML file, named by ``RECVIRT_CLOUD_CONFIG``.

Secrets are in files of their own that it names, so that the configuration itself can be shown to anybody.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

VARIABLE = "RECVIRT_CLOUD_CONFIG"
DEFAULT_PATH = Path("/etc/recvirt-cloud/central.toml")


class ConfigError(Exception):
    """The configuration can't be used."""


@dataclass(frozen=True)
class Config:
    """``database`` is ``sqlite:PATH`` or ``postgresql:NAME`` (over the local socket, as the service's own user).

    ``broker`` is a URL of Celery's; ``filesystem:PATH`` is a folder that all parts on one host share. Workers that join
    are told of what is at ``certificate_path`` (the TLS front's) and ``tunnel_path``.
    """

    cloud: str
    database: str
    broker: str
    secret_key_path: str
    state_dir: str
    allowed_hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    heartbeat_seconds: float = 5.0
    lease_seconds: float = 60.0
    spool_dir: str = ""
    certificate_path: str = "/etc/recvirt-cloud/tls/cert.pem"
    tunnel_path: str = "/etc/recvirt-cloud/tunnel/public.json"

    @property
    def spool(self) -> Path:
        """Where uploads wait for a worker of this host."""
        return Path(self.spool_dir) if self.spool_dir else Path(self.state_dir) / "spool"

    @property
    def shut_out_path(self) -> Path:
        """Where root says which revoked workers reach nothing any more."""
        return Path(self.tunnel_path).with_name("shut-out.json")

    @property
    def secret_key(self) -> str:
        """What Django signs with."""
        try:
            key = Path(self.secret_key_path).read_text().strip()
        except OSError as error:
            raise ConfigError(f"the secret key: {error}") from None
        if len(key) < 40:
            raise ConfigError(f"{self.secret_key_path} holds no secret key (40 characters or more)")
        return key


def load(path: Path | None = None) -> Config:
    """The configuration. ConfigError names what is wrong in which file."""
    path = path or Path(os.environ.get(VARIABLE, DEFAULT_PATH))
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{error}; {VARIABLE} names another file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    known = {field.name: field for field in fields(Config)}
    if unknown := sorted(set(data) - set(known)):
        raise ConfigError(f"{path}: unknown {', '.join(unknown)}")
    if isinstance(data.get("allowed_hosts"), list):
        data["allowed_hosts"] = tuple(data["allowed_hosts"])
    try:
        return Config(**data)
    except TypeError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix('Config.__init__() ')}") from None


def database_settings(text: str) -> dict[str, Any]:
    """Django's DATABASES entry."""
    engine, _, name = text.partition(":")
    if engine == "sqlite" and name:
        # Writers wait for each other instead of failing, and take the lock when they begin: no deadlock half-way.
        return {"ENGINE": "recvirt.nestedcloud.central.sqlite", "NAME": name, "OPTIONS": {"timeout": 30}}
    if engine == "postgresql" and name:
        return {"ENGINE": "django.db.backends.postgresql", "NAME": name, "CONN_MAX_AGE": 60, "CONN_HEALTH_CHECKS": True}
    raise ConfigError(f"database {text!r}: want sqlite:PATH or postgresql:NAME")
