"""IPv4 addresses of instances' cards, and ports that a worker's host hands on to them. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from typing import Any

from recvirt.nestedcloud.codec import ModelError, decode

PROTOCOLS = ("tcp", "udp")
#: Below it ports are the system's (ip_unprivileged_port_start), and only administrators forward them.
UNPRIVILEGED_PORT = 1024
#: What the cloud itself is reached by: SSH, rpcbind, API, NFS, epmd, PostgreSQL, the broker, Erlang, the tunnel; and by
#: what its guests are served: DNS and DHCP.
MANAGEMENT_PORTS = frozenset({22, 53, 67, 68, 111, 443, 2049, 4369, 5432, 5672, 25672, 51820})


def check_mac(text: str) -> str:
    """The address itself; ModelError when it is none of a card."""
    if not re.fullmatch(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}", text) or int(text[:2], 16) & 1:
        raise ModelError(f"{text!r} is no unicast MAC address in lower case")
    return text


def check_address(text: str) -> str:
    """The address itself; ModelError when it is none that a guest can have."""
    try:
        address = IPv4Address(text)
    except AddressValueError:
        raise ModelError(f"{text!r} is no IPv4 address") from None
    if address.is_loopback or address.is_multicast or address.is_unspecified or address.is_reserved:
        raise ModelError(f"{text} is no address of a guest")
    return text


def check_source(text: str) -> str:
    """A network in its canonical form, as 192.0.2.0/24; ModelError otherwise."""
    try:
        return str(IPv4Network(text))
    except ValueError as error:
        raise ModelError(f"{text!r} is no IPv4 network: {error}") from None


def guest_addresses(cidr: str) -> list[str]:
    """What cards in a network can have, in order: all but the network's own, its host's and the broadcast address.

    ModelError when that is no network for guests.
    """
    try:
        block = IPv4Network(cidr)
    except ValueError as error:
        raise ModelError(f"{cidr!r}: {error}") from None
    if block.num_addresses < 8:
        raise ModelError(f"{cidr}: want an IPv4 network of at least 8 addresses")
    return [str(address) for address in list(block.hosts())[1:]]


@dataclass(frozen=True)
class HostSpec:
    """An address of a card."""

    mac: str
    address: str

    def __post_init__(self) -> None:
        check_mac(self.mac)
        check_address(self.address)


@dataclass(frozen=True)
class ForwardSpec:
    """A port of the worker's host that leads to a port of an instance.

    ``network`` is the UUID of the network with ``address``. ``source`` is the network that may come; empty: everybody.
    """

    protocol: str
    host_port: int
    network: str
    address: str
    guest_port: int
    source: str = ""

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ModelError(f"{self.protocol!r} is none of {', '.join(PROTOCOLS)}")
        for port in (self.host_port, self.guest_port):
            if not 1 <= port <= 65535:
                raise ModelError(f"port {port}: want 1 to 65535")
        if self.host_port in MANAGEMENT_PORTS:
            raise ModelError(f"port {self.host_port} is one that the cloud itself needs")
        if not re.fullmatch(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", self.network):
            raise ModelError(f"{self.network!r} is no UUID in lower case")
        check_address(self.address)
        if self.source and check_source(self.source) != self.source:
            raise ModelError(f"{self.source}: want its canonical form")


@dataclass(frozen=True)
class WantedForwards:
    """What a worker wants for one instance: the file that its root service reads."""

    instance: str
    generation: int
    operation: str
    forwards: tuple[ForwardSpec, ...] = ()


@dataclass(frozen=True)
class AppliedForwards:
    """What became of such a file: its SHA-256, and why something in it is not in effect (empty: all is)."""

    sha256: str
    refused: str = ""


@dataclass(frozen=True)
class AppliedState:
    """What the root service did last, by instance."""

    instances: Mapping[str, Any]

    def of(self, instance: str) -> AppliedForwards | None:
        """What became of an instance's file; None when there was none."""
        found = self.instances.get(instance)
        return decode(AppliedForwards, found) if found is not None else None
