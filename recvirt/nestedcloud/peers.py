"""Lets workers on other machines into the tunnel and to the broker, and shuts out those that were revoked.

Runs as root on the central node, and believes nothing of what the dispatcher's file says until it has looked at each
word of it: who can write that file must not become root. Does what is missing: killed anywhere, the next run goes on.
"""

from __future__ import annotations

import json
import os
import stat
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

from recvirt.nestedcloud import tunnel
from recvirt.nestedcloud.credentials import is_password_hash
from recvirt.nestedcloud.model import check_uuid
from recvirt.nestedcloud.provision import (
    BROKER_USER,
    CENTRAL_USER,
    RABBITMQCTL,
    Machine,
    ProvisionError,
    ensure_certificate,
    permissions,
    read,
    write,
)

#: Room for ten thousand workers and more.
_BYTES_MAX = 4 * 1024**2
_VERSION = 1
_VHOST = "/"
#: rabbitmqctl's for a user that is not there (sysexits.h).
_NO_USER = 67
#: After a change of key or certificate; the workers' timers have asked for the new one by then.
SETTLE_SECONDS = 600
_FIELDS = {"uuid", "public_key", "address", "password_hash"}


class UntrustedError(ProvisionError):
    """The file is not what the dispatcher writes; nothing of it was applied."""


@dataclass(frozen=True)
class Account:
    """One worker, as looked at."""

    uuid: str
    public_key: str
    address: str
    password_hash: str


@dataclass(frozen=True)
class Wanted:
    """Who is in, and who must not be."""

    peers: tuple[Account, ...]
    revoked: tuple[str, ...]


def _text_of(machine: Machine, path: Path) -> str:
    """The dispatcher's file: no link, nothing special, and nobody else's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UntrustedError(f"{path} can't be read: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise UntrustedError(f"{path} is no plain file")
        if found.st_uid not in (0, machine.owner_of(CENTRAL_USER)[0]) or found.st_mode & 0o022:
            raise UntrustedError(f"{path} can be written by others than {CENTRAL_USER}")
        raw = stream.read(_BYTES_MAX + 1)
    if len(raw) > _BYTES_MAX:
        raise UntrustedError(f"{path} is larger than {_BYTES_MAX} bytes")
    try:
        return raw.decode("ascii")
    except UnicodeDecodeError:
        raise UntrustedError(f"{path} is not plain text") from None


def parse(text: str, cloud: uuid.UUID, own: Sequence[str]) -> Wanted:
    """The list, each word of it looked at; ``own`` are accounts that it must not name. UntrustedError says what is
    wrong.

    Duplicates are refused: of two peers with one address or key WireGuard would take the last one.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UntrustedError(f"it is not JSON: {error}") from None
    if not isinstance(data, dict) or set(data) != {"version", "cloud", "peers", "revoked"}:
        raise UntrustedError("want an object with version, cloud, peers and revoked")
    if data["version"] != _VERSION or data["cloud"] != str(cloud):
        raise UntrustedError("it is of another version, or of another cloud")
    if not isinstance(data["peers"], list) or not isinstance(data["revoked"], list):
        raise UntrustedError("peers and revoked: want lists")
    peers = tuple(_account(item, cloud) for item in data["peers"])
    revoked = tuple(_uuid(item) for item in data["revoked"])
    for what in ("uuid", "public_key", "address"):
        values = [getattr(peer, what) for peer in peers]
        if len(set(values)) != len(values):
            raise UntrustedError(f"two peers have the same {what}")
    named = [*(peer.uuid for peer in peers), *revoked]
    if len(set(named)) != len(named) or set(named) & set(own):
        raise UntrustedError("a worker is named twice, or is the central node's own")
    return Wanted(peers, revoked)


def _uuid(value: Any) -> str:
    try:
        return check_uuid(value) if isinstance(value, str) else check_uuid("")
    except ValueError:
        raise UntrustedError(f"{str(value)[:60]!r} is no UUID") from None


def _account(item: Any, cloud: uuid.UUID) -> Account:
    if not isinstance(item, dict) or set(item) != _FIELDS or not all(isinstance(value, str) for value in item.values()):
        raise UntrustedError("a peer has uuid, public_key, address and password_hash")
    account = Account(**{**item, "uuid": _uuid(item["uuid"])})
    if not tunnel.is_key(account.public_key):
        raise UntrustedError(f"the public key of {account.uuid} is none")
    if not is_password_hash(account.password_hash):
        raise UntrustedError(f"the password's hash of {account.uuid} is none")
    try:
        address = tunnel.parse_address(account.address)
    except ValueError:
        raise UntrustedError(f"the address of {account.uuid} is none") from None
    inside = address in tunnel.prefix(cloud) and int(address) & (2**64 - 1) >= tunnel.INDEX_MIN
    if not inside:
        raise UntrustedError(f"the address of {account.uuid} is not one for a worker of this cloud")
    return account


def _applied(machine: Machine) -> dict[str, Any]:
    """What an earlier run has done; nothing when that can't be told, and then all of it is done again."""
    try:
        data: dict[str, Any] = json.loads((machine.root / tunnel.APPLIED).read_text())
        accounts = {item["uuid"]: Account(**item) for item in data["peers"]}
        return {"peers": accounts, "revoked": set(data["revoked"]), "accounts_made": data["accounts_made"]}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {"peers": {}, "revoked": set(), "accounts_made": None}


def _accounts_made(machine: Machine) -> int:
    """Changes when the set-up has given the broker its accounts anew: it had lost all, or may allow something else."""
    try:
        return (machine.etc / "broker-permissions.json").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def definitions(accounts: Sequence[Account]) -> str:
    """Accounts and what they may do, as a document that RabbitMQ imports at once."""
    names = ("configure", "write", "read")
    return json.dumps({
        "users": [
            {"name": one.uuid, "password_hash": one.password_hash, "tags": [],
             "hashing_algorithm": "rabbit_password_hashing_sha256"}
            for one in accounts
        ],
        "permissions": [
            {"user": one.uuid, "vhost": _VHOST, **dict(zip(names, permissions(one.uuid), strict=True))}
            for one in accounts
        ],
    })  # fmt: skip


def _let_in(machine: Machine, accounts: Sequence[Account]) -> None:
    machine.tell(f"making {len(accounts)} accounts at the broker")
    path = machine.root / "run/recvirt-cloud-peers.json"
    write(machine, path, definitions(accounts), reader=BROKER_USER)
    try:
        machine.run([*RABBITMQCTL, "import_definitions", str(path)], "", None)
    finally:
        path.unlink()


def _shut_out(machine: Machine, worker: str) -> None:
    """RabbitMQ closes the connections of a user who is deleted."""
    machine.tell(f"shutting out {worker}")
    try:
        machine.run([*RABBITMQCTL, "delete_user", worker], "", None)
    except ProvisionError as error:
        if error.status != _NO_USER:
            raise
    for queue in (f"worker.{worker}", f"worker.{worker}.console"):
        try:
            machine.run([*RABBITMQCTL, "delete_queue", queue], "", None)
        except ProvisionError:
            # It never listened, or an earlier run was here. Nothing is sent there any more.
            continue


def apply(machine: Machine) -> bool:
    """Make tunnel and broker agree with the dispatcher's list; whether anything was to be done.

    ProvisionError when that does not work.

    Who was revoked once stays out, whatever a later list says: a database that was restored does not know.
    """
    path = machine.state / "peers.json"
    if not path.exists() and not path.is_symlink():
        return False
    cloud, own = _this_cloud(machine)
    wanted = parse(_text_of(machine, path), cloud, own)
    before, made = _applied(machine), _accounts_made(machine)
    revoked = before["revoked"] | set(wanted.revoked)
    for back in (peer.uuid for peer in wanted.peers if peer.uuid in before["revoked"]):
        machine.tell(f"{back} was revoked before, and stays out: let it join anew")
    peers = {peer.uuid: peer for peer in wanted.peers if peer.uuid not in before["revoked"]}
    # One that is in no list any more is out as well: it came after the backup that was restored.
    gone = sorted((set(before["peers"]) | set(wanted.revoked)) - set(peers) - before["revoked"])
    again = made != before["accounts_made"]
    changed = [peer for key, peer in peers.items() if again or not _same_account(before["peers"].get(key), peer)]
    if not gone and not changed and before["peers"] == peers:
        _tell_shut_out(machine, revoked)
        return False
    trouble = _sync(machine, list(peers.values()))
    for worker in gone:
        _shut_out(machine, worker)
    if changed:
        _let_in(machine, changed)
    if trouble is not None:
        raise trouble
    data = {"peers": [asdict(peer) for peer in peers.values()], "revoked": sorted(revoked | set(gone)),
            "accounts_made": made}  # fmt: skip
    folder = (machine.root / tunnel.APPLIED).parent
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write(machine, machine.root / tunnel.APPLIED, json.dumps(data, indent=1) + "\n", reader=None, mode=0o600)
    _tell_shut_out(machine, revoked | set(gone))
    return True


def _tell_shut_out(machine: Machine, workers: set[str]) -> None:
    """Who reaches neither the broker nor the files that are shared in the tunnel: others may write to them now."""
    text = json.dumps(sorted(workers)) + "\n"
    path = tunnel.shut_out_path(machine)
    if (path.read_text() if path.exists() else "[]\n") != text:
        write(machine, path, text, reader=None, mode=0o644)


def _same_account(before: Account | None, now: Account) -> bool:
    return before is not None and before.password_hash == now.password_hash


def _this_cloud(machine: Machine) -> tuple[uuid.UUID, list[str]]:
    central: Mapping[str, Any] = read(machine.central)
    try:
        cloud = uuid.UUID(central["cloud"])
    except (KeyError, ValueError):
        raise ProvisionError(f"{machine.central} names no cloud: this is no central node") from None
    worker = read(machine.worker).get("uuid")
    return cloud, [worker] if isinstance(worker, str) else []


def _sync(machine: Machine, peers: Sequence[Account]) -> ProvisionError | None:
    """The tunnel; what is wrong with it, so that who was revoked is shut out of the broker all the same."""
    try:
        if not tunnel.is_up(machine):
            tunnel.up(machine)
        tunnel.sync(machine, [tunnel.Peer(peer.public_key, IPv6Address(peer.address)) for peer in peers])
    except ProvisionError as error:
        return error
    return None


def rotate_tunnel(machine: Machine, *, force: bool = False) -> None:
    """Another key for the central node's end. Workers lose the tunnel, and ask for it by the public address."""
    cloud, _ = _this_cloud(machine)
    _check_settled(machine, machine.etc / "tls/cert.pem", force)
    tunnel.keep_key(machine, tunnel.new_key(machine))
    tunnel.ensure_central(machine, cloud)
    tunnel.up(machine)


def rotate_certificate(machine: Machine, *, force: bool = False) -> None:
    """Another certificate of the machine's own. Workers ask for its digest through the tunnel."""
    folder = machine.etc / "tls"
    key, certificate = folder / "key.pem", folder / "cert.pem"
    issuer = machine.run(["openssl", "x509", "-noout", "-issuer", "-in", str(certificate)], "", None)
    if "recvirt-cloud" not in issuer:
        raise tunnel.TunnelError(
            "the certificate is not one that the set-up made",
            f"put the new one into {certificate}, its key into {key}; systemctl reload recvirt-cloud-front.service",
        )
    _check_settled(machine, tunnel.folder(machine) / "key", force)
    before = [(path, path.with_name(f".{path.name}.before")) for path in (certificate, key)]
    for path, aside in before:
        path.rename(aside)
    try:
        ensure_certificate(machine)
    except ProvisionError:
        for path, aside in before:
            aside.rename(path)
        raise
    for _, aside in before:
        aside.unlink()
    machine.run(["systemctl", "reload", "recvirt-cloud-front.service"], "", None)


def _check_settled(machine: Machine, other: Path, force: bool) -> None:
    """Workers find a new key by the certificate, and a new certificate by the key: not both at once."""
    if force or not tunnel.applied_peers(machine) or not other.exists():
        return
    age = time.time() - other.stat().st_mtime
    if 0 <= age < SETTLE_SECONDS:
        raise tunnel.TunnelError(
            f"{other.name} was changed {age:.0f} s ago, and workers may not have heard of it",
            f"try again in {SETTLE_SECONDS - age:.0f} s; with --force workers may have to join anew",
        )
