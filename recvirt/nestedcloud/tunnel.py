"""The encrypted way between a cloud's central node and its workers on other machines: one WireGuard interface.

Addresses are IPv6 unique local ones (RFC 4193) made of the cloud's UUID, so that they collide with nothing, however
deeply clouds are nested. Standard library only. Owns the interface, its keys and ``tunnel.json``; who the peers are is
told to it (``peers`` on the central node, ``join`` on a worker).
"""

from __future__ import annotations

import base64
import binascii
import json
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

from recvirt.nestedcloud.provision import Machine, ProvisionError, write

INTERFACE = "recvirt0"
PORT = 51820
#: What is left of Ethernet's 1500 bytes, whether IPv4 or IPv6 carries it.
MTU = 1420
#: The central node's own place in the prefix; peers have the ones behind it.
CENTRAL_INDEX, INDEX_MIN, INDEX_MAX = 1, 2, 2**63 - 1
#: WireGuard makes a new session every two minutes while something is sent; older than this, the peer is not there.
HANDSHAKE_SECONDS = 180
#: A worker behind NAT stays reachable, and a session is never older than it must be.
_KEEPALIVE_SECONDS = 25
_KEY_BYTES = 32
#: Behind that of the interface.
_METRIC = "65535"
#: Where the root service for peers remembers what it has applied.
APPLIED = Path("var/lib/recvirt-cloud-peers/applied.json")


class TunnelError(ProvisionError):
    """The tunnel can't be as it should. ``hint`` says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Peer:
    """The other end. ``endpoint`` is where it listens (host, port); a worker is found by what it sends."""

    public_key: str
    address: IPv6Address
    endpoint: tuple[str, int] | None = None


def prefix(cloud: uuid.UUID) -> IPv6Network:
    """The cloud's own network: fd, 40 bits of a digest of its UUID, subnet 0."""
    return IPv6Network((b"\xfd" + sha256(cloud.bytes).digest()[:5] + bytes(10), 64))


def central_address(cloud: uuid.UUID) -> IPv6Address:
    """Where workers find broker, API and NFS."""
    return prefix(cloud)[CENTRAL_INDEX]


def peer_address(cloud: uuid.UUID, index: int) -> IPv6Address:
    """A worker's address. ValueError for an index that is none."""
    if not INDEX_MIN <= index <= INDEX_MAX:
        raise ValueError(f"index {index}: want {INDEX_MIN} or more")
    return prefix(cloud)[index]


def parse_address(text: str) -> IPv6Address:
    """An address in the one way of writing it. ValueError otherwise: a scope (``%``) may hold line ends."""
    found = IPv6Address(text)
    if str(found) != text or found.scope_id is not None:
        raise ValueError(f"{text[:60]!r} is no plain IPv6 address")
    return found


def is_key(text: str) -> bool:
    """Whether it is a public key as ``wg`` writes it: 32 bytes in base64, in the one way of writing them."""
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error, ValueError):
        return False
    return len(raw) == _KEY_BYTES and base64.b64encode(raw).decode() == text and any(raw)


def folder(machine: Machine) -> Path:
    """Keys and parameters."""
    return machine.etc / "tunnel"


def _key_path(machine: Machine) -> Path:
    return folder(machine) / "key"


def public_path(machine: Machine) -> Path:
    """What the central node's services may know of the tunnel."""
    return folder(machine) / "public.json"


def shut_out_path(machine: Machine) -> Path:
    """For the API: the revoked workers that the tunnel and the broker have dropped."""
    return folder(machine) / "shut-out.json"


def _config_path(machine: Machine) -> Path:
    return folder(machine) / "tunnel.json"


def _ensure_folder(machine: Machine) -> None:
    # Services look for what is public; the key has a mode of its own.
    folder(machine).mkdir(parents=True, exist_ok=True)
    folder(machine).chmod(0o755)


def new_key(machine: Machine) -> str:
    """A private key."""
    return machine.run(["wg", "genkey"], "", None).strip()


def public_of(machine: Machine, private: str) -> str:
    """The public key of a private one."""
    return machine.run(["wg", "pubkey"], f"{private}\n", None).strip()


def keep_key(machine: Machine, private: str) -> None:
    """Make a private key the machine's own: whole, or the one before."""
    _ensure_folder(machine)
    write(machine, _key_path(machine), f"{private}\n", reader=None, mode=0o600)


def ensure_key(machine: Machine) -> str:
    """The machine's public key; its private one is made if it is not there."""
    if not _key_path(machine).exists():
        keep_key(machine, new_key(machine))
    return public_of(machine, _key_path(machine).read_text().strip())


def ensure_central(machine: Machine, cloud: uuid.UUID) -> None:
    """The central node's key, parameters, and what its API tells workers of them. Again changes nothing."""
    public = ensure_key(machine)
    told = {"public_key": public, "address": str(central_address(cloud)), "port": PORT}
    _keep_json(machine, public_path(machine), told, mode=0o644)
    wanted = {"role": "central", "cloud": str(cloud), "address": str(central_address(cloud))}
    _keep_json(machine, _config_path(machine), wanted, mode=0o600)


def keep_worker(machine: Machine, cloud: uuid.UUID, address: IPv6Address, central: Peer) -> bool:
    """A worker's parameters; whether anything was new."""
    assert central.endpoint is not None
    _ensure_folder(machine)
    host, port = central.endpoint
    wanted = {
        "role": "worker", "cloud": str(cloud), "address": str(address),
        "central": {"public_key": central.public_key, "address": str(central.address), "host": host, "port": port},
    }  # fmt: skip
    return _keep_json(machine, _config_path(machine), wanted, mode=0o600)


def _keep_json(machine: Machine, path: Path, wanted: dict[str, Any], *, mode: int) -> bool:
    text = json.dumps(wanted, indent=1) + "\n"
    if path.exists() and path.read_text() == text:
        return False
    write(machine, path, text, reader=None, mode=mode)
    return True


def config(machine: Machine) -> dict[str, Any] | None:
    """The parameters; None where no tunnel was set up. TunnelError when they are damaged."""
    path = _config_path(machine)
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        parse_address(found["address"])
        uuid.UUID(found["cloud"])
        if found["role"] == "worker":
            parse_address(found["central"]["address"])
        return found
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise TunnelError(f"{path} is damaged: {error}", "on a worker: recvirt-cloud worker join again") from None


def applied_peers(machine: Machine) -> list[Peer]:
    """Those that the central node's root service has let in."""
    try:
        data = json.loads((machine.root / APPLIED).read_text())
        return [Peer(item["public_key"], parse_address(item["address"])) for item in data["peers"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        # It is made anew from the list that the dispatcher writes.
        return []


Resolve = Callable[[str, int], str]


def resolve(host: str, port: int) -> str:
    """The first address of a host; OSError when there is none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    return str(found[0][4][0])


def _peers_of(machine: Machine, found: dict[str, Any], resolver: Resolve) -> list[Peer]:
    if found["role"] == "central":
        return applied_peers(machine)
    central = found["central"]
    endpoint: tuple[str, int] | None = None
    try:
        # By us: wg waits for a name for a quarter of a minute, and then has taken nothing at all.
        endpoint = resolver(central["host"], central["port"]), central["port"]
    except OSError as error:
        machine.tell(f"{central['host']} has no address now ({error}); the next refresh tries again")
    return [Peer(central["public_key"], IPv6Address(central["address"]), endpoint)]


def document(private: str, peers: Sequence[Peer], *, keepalive: bool) -> str:
    """What ``wg syncconf`` gets."""
    lines = ["[Interface]", f"PrivateKey = {private}", f"ListenPort = {PORT}"]
    for peer in peers:
        lines += ["", "[Peer]", f"PublicKey = {peer.public_key}", f"AllowedIPs = {peer.address}/128"]
        if peer.endpoint is not None:
            host, port = peer.endpoint
            lines.append(f"Endpoint = {f'[{host}]' if ':' in host else host}:{port}")
        if keepalive:
            lines.append(f"PersistentKeepalive = {_KEEPALIVE_SECONDS}")
    return "\n".join(lines) + "\n"


def is_up(machine: Machine) -> bool:
    """Whether the interface is there."""
    try:
        machine.run(["ip", "link", "show", "dev", INTERFACE], "", None)
    except ProvisionError:
        return False
    return True


def _make_interface(machine: Machine) -> None:
    try:
        machine.run(["ip", "link", "add", "dev", INTERFACE, "type", "wireguard"], "", None)
        return
    except ProvisionError as error:
        kernel = str(error)
        if "File exists" in kernel:
            return
    try:
        machine.run(["wireguard-go", INTERFACE], "", None)
        machine.tell("this kernel has no WireGuard: wireguard-go carries the tunnel, more slowly")
    except ProvisionError as error:
        raise TunnelError(
            f"no WireGuard: the kernel has none ({kernel}), and {error}",
            "a kernel with CONFIG_WIREGUARD, or: apt install wireguard-go",
        ) from None


def sync(machine: Machine, peers: Sequence[Peer], *, keepalive: bool = False) -> None:
    """Make the interface's peers these; sessions of those that stay go on."""
    private = _key_path(machine).read_text().strip()
    path = machine.root / "run/recvirt-cloud-tunnel.conf"
    write(machine, path, document(private, peers, keepalive=keepalive), reader=None, mode=0o600)
    try:
        machine.run(["wg", "syncconf", INTERFACE, str(path)], "", None)
    finally:
        path.unlink()


def up(machine: Machine, resolver: Resolve = resolve) -> None:
    """The interface as the parameters say. Again changes nothing. TunnelError when there is no WireGuard."""
    found = config(machine)
    if found is None:
        raise TunnelError(
            "no tunnel was set up here",
            "on the central node: recvirt-cloud setup; on a worker: recvirt-cloud worker join",
        )
    # Without the interface nothing for the prefix may go where others could answer: the broker's password is in it.
    network = str(prefix(uuid.UUID(found["cloud"])))
    machine.run(["ip", "-6", "route", "replace", "unreachable", network, "metric", _METRIC], "", None)
    if not is_up(machine):
        _make_interface(machine)
    sync(machine, _peers_of(machine, found, resolver), keepalive=found["role"] == "worker")
    # nodad: nobody else is there, and a service may want the address at once.
    machine.run(["ip", "-6", "address", "replace", f"{found['address']}/64", "dev", INTERFACE, "nodad"], "", None)
    machine.run(["ip", "link", "set", "dev", INTERFACE, "mtu", str(MTU), "up"], "", None)


def down(machine: Machine) -> None:
    """No interface; where there is none, nothing."""
    if is_up(machine):
        machine.run(["ip", "link", "delete", "dev", INTERFACE], "", None)


def status(machine: Machine) -> dict[str, Any]:
    """What the tunnel is, without secrets: role, address, peers with the age of their last handshake in seconds."""
    found = config(machine)
    shown: dict[str, Any] = {
        "interface": INTERFACE, "up": is_up(machine), "role": found["role"] if found else None,
        "address": found["address"] if found else None, "peers": [],
    }  # fmt: skip
    if shown["up"]:
        # The first line has the private key.
        for line in machine.run(["wg", "show", INTERFACE, "dump"], "", None).splitlines()[1:]:
            key, _, endpoint, allowed, handshake, received, sent, _ = line.split("\t")
            age = max(0, int(time.time()) - int(handshake)) if int(handshake) else None
            shown["peers"].append({
                "public_key": key, "address": allowed.removesuffix("/128"),
                "endpoint": None if endpoint == "(none)" else endpoint, "handshake_seconds": age,
                "received_bytes": int(received), "sent_bytes": int(sent),
            })  # fmt: skip
    return shown


def is_fresh(machine: Machine) -> bool:
    """Whether some peer was there lately: on a worker, the central node."""
    ages = [peer["handshake_seconds"] for peer in status(machine)["peers"]]
    return any(age is not None and age <= HANDSHAKE_SECONDS for age in ages)


def forget(machine: Machine) -> None:
    """Take the interface down, and remove key and parameters."""
    down(machine)
    if (found := config(machine)) is not None:
        network = str(prefix(uuid.UUID(found["cloud"])))
        try:
            machine.run(["ip", "-6", "route", "delete", "unreachable", network, "metric", _METRIC], "", None)
        except ProvisionError:
            # It was never up since the machine was started.
            pass
    for path in (_config_path(machine), public_path(machine), _key_path(machine)):
        path.unlink(missing_ok=True)
