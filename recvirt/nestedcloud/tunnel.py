"""The tunnel between the machines of a cloud: its addresses, which the cloud's UUID gives."""

from __future__ import annotations

import hashlib
import uuid
from ipaddress import IPv6Address, IPv6Network

from recvirt.nestedcloud.machine import Machine

INTERFACE = "recvirt0"
PORT = 51820


def prefix(cloud: uuid.UUID) -> IPv6Network:
    """A cloud's own network (RFC 4193), so that clouds inside clouds collide with nothing."""
    return IPv6Network((b"\xfd" + hashlib.sha256(cloud.bytes).digest()[:5] + bytes(10), 64))


def central_address(cloud: uuid.UUID) -> IPv6Address:
    """Where workers find the central node."""
    return prefix(cloud)[1]


def ensure_central(machine: Machine, cloud: uuid.UUID) -> None:
    """The central node's key and parameters."""
    raise NotImplementedError
