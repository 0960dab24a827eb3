"""A machine that a part of the cloud is set up on: its folders, its programs, and files that others may not read.

Tests have another root folder, and programs of their own. Does not own: what is set up (``provision.py``).
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import subprocess
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: RabbitMQ's tools alone take minutes under emulation.
_COMMAND_SECONDS = 1800
#: What a machine may be for the cloud; a package of each brings a file of that name.
CENTRAL, WORKER = "central", "worker"
_ROLES = "usr/lib/recvirt-cloud/roles"


class ProvisionError(Exception):
    """A step did not work; the text says which, and what the program said. ``status`` is the program's, if it ran."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class UpgradeFailedError(ProvisionError):
    """The database could not be brought to this version, and is as it was. Trying again gives the same."""


#: argv, what it gets on stdin, and the user it runs as (None: root) -> its stdout.
Run = Callable[[Sequence[str], str, str | None], str]


def run_program(argv: Sequence[str], text: str, user: str | None) -> str:
    """Run a program; ProvisionError with what it said. Secrets come on stdin: everybody can read a command line."""
    words = ["runuser", "-u", user, "--", *argv] if user else list(argv)
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False, cwd="/"
        )
    except FileNotFoundError as error:
        raise ProvisionError(f"{error.filename} is not installed") from None
    except subprocess.TimeoutExpired:
        raise ProvisionError(f"{argv[0]} did not end in {_COMMAND_SECONDS} s") from None
    if done.returncode != 0:
        said = done.stderr.strip()[-800:] or f"status {done.returncode}"
        raise ProvisionError(f"{' '.join(argv[:3])}: {said}", done.returncode)
    return done.stdout


def can_log_in(url: str) -> bool:
    """Whether the broker takes a URL's account and password."""
    from kombu.connection import Connection

    try:
        with Connection(url, connect_timeout=20) as connection:  # type: ignore[no-untyped-call]
            connection.connect()
            return True
    except Exception:
        # Away, refused, of another protocol: all the same here, the set-up finds out which.
        return False


@dataclass(frozen=True)
class Machine:
    """Where everything lies; tests have another root folder, and programs of their own."""

    root: Path = Path("/")
    run: Run = run_program
    owner_of: Callable[[str], tuple[int, int]] = field(default=lambda user: pwd.getpwnam(user)[2:4])
    tell: Callable[[str], None] = print
    can_log_in: Callable[[str], bool] = can_log_in
    group_of: Callable[[str], int] = field(default=lambda group: grp.getgrnam(group).gr_gid)

    @property
    def roles(self) -> frozenset[str]:
        """What the installed packages make of it: CENTRAL, WORKER, both or none."""
        return frozenset(name for name in (CENTRAL, WORKER) if (self.root / _ROLES / name).exists())

    @property
    def etc(self) -> Path:
        """The configuration."""
        return self.root / "etc/recvirt-cloud"

    @property
    def state(self) -> Path:
        """What the central node keeps beside its database."""
        return self.root / "var/lib/recvirt-cloud"

    @property
    def spool(self) -> Path:
        """Uploads on their way from the API to the worker here."""
        return self.root / "var/lib/recvirt-cloud-spool"

    @property
    def logs(self) -> Path:
        """What serial consoles have said."""
        return self.root / "var/log/recvirt-cloud"

    @property
    def central(self) -> Path:
        """The central node's configuration."""
        return self.etc / "central.toml"

    @property
    def worker(self) -> Path:
        """The worker's configuration."""
        return self.etc / "worker.toml"


def write(machine: Machine, path: Path, text: str, *, reader: str | None, mode: int = 0o640) -> None:
    """A file of root's that one service may read (its group): whole or not there, and never open to others before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        if reader is not None:
            os.fchown(stream.fileno(), 0 if os.geteuid() == 0 else -1, machine.owner_of(reader)[1])
        os.fchmod(stream.fileno(), mode)
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.rename(path)


def toml(values: Mapping[str, Any]) -> str:
    """A flat TOML document; JSON's strings, numbers and lists are TOML's."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def read(path: Path) -> dict[str, Any]:
    """What a TOML file holds; nothing when it is not there."""
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
