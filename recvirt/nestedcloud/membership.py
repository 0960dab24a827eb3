"""What a worker on another machine keeps of its membership in a cloud: who it is there, and what it opens doors with.

Written before anybody is asked, so that a request whose answer was lost is asked again in the same words. Owns the file
``worker.json`` and the lock under which it is changed; the conversation itself is in ``join``.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

from recvirt.nestedcloud import tunnel
from recvirt.nestedcloud.model import check_uuid
from recvirt.nestedcloud.pinned import LinkError
from recvirt.nestedcloud.provision import Machine, own_name, password_hash, write
from recvirt.nestedcloud.statuses import ExitStatus


@dataclass(frozen=True)
class Secrets:
    """A password at the broker and what is kept of it, and a private key where it is not the tunnel's yet."""

    password: str = field(repr=False)
    password_hash: str
    key: str = field(default="", repr=False)


@dataclass(frozen=True)
class Member:
    """This machine as a worker. ``fingerprint`` is the API's certificate (empty: the system's authorities vouch for
    it); ``coming`` are secrets that the central node may know already, and that are not used yet.
    """

    uuid: str
    name: str
    url: str
    fingerprint: str
    current: Secrets
    coming: Secrets | None = None
    joined: bool = False


@dataclass(frozen=True)
class Welcome:
    """What the central node tells a worker, looked at."""

    cloud: uuid.UUID
    name: str
    address: IPv6Address
    central_address: IPv6Address
    central_public_key: str
    port: int
    certificate_sha256: str


def path_of(machine: Machine) -> Path:
    """The file."""
    return tunnel.folder(machine) / "worker.json"


def new_secrets(key: str = "") -> Secrets:
    """A new password."""
    password = secrets.token_urlsafe(32)
    return Secrets(password, password_hash(password), key)


def load(machine: Machine) -> Member | None:
    """Who this machine is; None when it has not asked to be anybody. LinkError when the file is damaged."""
    try:
        data: dict[str, Any] = json.loads(path_of(machine).read_text())
        coming = data.pop("coming")
        current = Secrets(**data.pop("current"))
        return Member(**data, current=current, coming=Secrets(**coming) if coming else None)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise LinkError(
            f"{path_of(machine)} is damaged", "recvirt-cloud worker leave --force, then join anew",
            status=ExitStatus.CONFIG,
        ) from None  # fmt: skip


def save(machine: Machine, member: Member) -> Member:
    """Keep it, for root alone."""
    tunnel.folder(machine).mkdir(parents=True, exist_ok=True)
    write(machine, path_of(machine), json.dumps(asdict(member), indent=1) + "\n", reader=None, mode=0o600)
    return member


def required(machine: Machine) -> Member:
    """Who this machine is. LinkError when it is nobody."""
    found = load(machine)
    if found is None or not found.joined:
        raise LinkError(
            "this machine is no worker of another machine's cloud", "recvirt-cloud worker join URL --token TOKEN",
            status=ExitStatus.CONFIG,
        )  # fmt: skip
    return found


def new_member(url: str, name: str, fingerprint: str) -> Member:
    """Somebody new."""
    return Member(str(uuid.uuid4()), name or own_name(), url, fingerprint, new_secrets())


@contextmanager
def alone(machine: Machine) -> Iterator[None]:
    """One command at a time; the timer's waits for a person's, and the other way round."""
    path = machine.root / "run/recvirt-cloud-member.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_welcome(data: Mapping[str, Any], member: Member) -> Welcome:
    """The answer, if it is one for this worker. LinkError otherwise: it becomes root's configuration."""
    try:
        cloud = uuid.UUID(check_uuid(data["cloud"]))
        address = tunnel.parse_address(data["address"])
        found = Welcome(
            cloud, str(data["name"]), address, tunnel.parse_address(data["central_address"]),
            str(data["central_public_key"]),
            int(data["port"]), str(data["certificate_sha256"]),
        )  # fmt: skip
        good = (
            data["uuid"] == member.uuid and tunnel.is_key(found.central_public_key) and 0 < found.port < 65536
            and found.central_address == tunnel.central_address(cloud) and address in tunnel.prefix(cloud)
            and int(address) & (2**64 - 1) >= tunnel.INDEX_MIN
        )  # fmt: skip
    except (KeyError, ValueError, TypeError):
        good = False
    if not good:
        raise LinkError(
            "the central node's answer makes no sense", "is it of another version? recvirt-cloud --version on both"
        )
    return found
