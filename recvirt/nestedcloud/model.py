"""What central node and workers tell each other, and the words both use. Standard library only.

Everything that crosses the broker is one of the frozen dataclasses below, as JSON (:func:`encode`, :func:`decode`).
A message that does not fit raises :class:`ModelError` with the place of the fault: what a queue brings is not trusted.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recvirt.nestedcloud.addresses import ForwardSpec, HostSpec, check_address, check_mac
from recvirt.nestedcloud.codec import ModelError as ModelError
from recvirt.nestedcloud.codec import decode as decode
from recvirt.nestedcloud.codec import encode as encode

#: Version of the messages. A worker refuses a newer one, and the central node says which workers are too old.
PROTOCOL = 1

MIB = 1024**2
GIB = 1024**3

#: A DNS label (RFC 1123): names of instances are their guests' host names too.
NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
#: The last slot for a volume; the root disk has 0, the first-boot data the one behind.
SLOT_MAX = 24
#: File systems for volumes, and the smallest volume in bytes that their makers take (mkfs.ext4(8), mkfs.xfs(8)).
FILESYSTEM_BYTES_MIN = {"none": MIB, "ext4": 8 * MIB, "xfs": 300 * MIB}
#: Lower and upper bound of ``InstanceSpec.priority``; 50 is what everybody gets.
PRIORITY_MIN, PRIORITY_DEFAULT, PRIORITY_MAX = 1, 50, 100


class Power(enum.StrEnum):
    """What a hypervisor says of a domain."""

    ABSENT = "absent"
    STOPPED = "stopped"
    RUNNING = "running"
    SUSPENDED = "suspended"
    CRASHED = "crashed"
    UNKNOWN = "unknown"


class Kind(enum.StrEnum):
    """Operations. Those on an instance come first."""

    LAUNCH = "launch"
    START = "start"
    STOP = "stop"
    REBOOT = "reboot"
    SUSPEND = "suspend"
    RESUME = "resume"
    DELETE = "delete"
    RESCALE = "rescale"
    SNAPSHOT = "snapshot"
    REVERT = "revert"
    SNAPSHOT_REMOVE = "snapshot-remove"
    CLONE = "clone"
    EXPORT = "export"
    ATTACH = "attach"
    DETACH = "detach"
    VOLUME_ALLOCATE = "volume-allocate"
    VOLUME_RESIZE = "volume-resize"
    VOLUME_SNAPSHOT = "volume-snapshot"
    VOLUME_REVERT = "volume-revert"
    VOLUME_SNAPSHOT_REMOVE = "volume-snapshot-remove"
    VOLUME_REMOVE = "volume-remove"
    IMAGE_IMPORT = "image-import"
    IMAGE_REMOVE = "image-remove"
    NETWORK_ENSURE = "network-ensure"
    NETWORK_REMOVE = "network-remove"
    FORWARD_ADD = "forward-add"
    FORWARD_REMOVE = "forward-remove"


class Phase(enum.StrEnum):
    """Where an operation is. The last three are final."""

    QUEUED = "queued"
    SENT = "sent"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Nothing comes after it."""
        return self in (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED)


class Fault(enum.StrEnum):
    """Why an operation failed, for programs. People read the sentence beside it."""

    INVALID = "invalid"
    NOT_FOUND = "not-found"
    CONFLICT = "conflict"
    NO_SPACE = "no-space"
    NOT_SUPPORTED = "not-supported"
    RESTART_NEEDED = "restart-needed"
    TIMED_OUT = "timed-out"
    HYPERVISOR = "hypervisor"
    STORAGE = "storage"
    INTERNAL = "internal"


def check_name(text: str) -> str:
    """The name itself; ModelError when it is no DNS label."""
    if not NAME.fullmatch(text):
        raise ModelError(f"{text!r} is no name: letters a to z, digits and hyphens, 63 at most, not a hyphen at an end")
    return text


def check_uuid(text: str) -> str:
    """The identifier in its canonical form; ModelError otherwise. It becomes part of file names."""
    try:
        if str(uuid.UUID(text)) == text:
            return text
    except ValueError:
        pass
    raise ModelError(f"{text!r} is no UUID in lower case")


@dataclass(frozen=True)
class DiskSpec:
    """A disk of an instance.

    ``uuid`` names its file; the root disk has the instance's. ``size_bytes`` is what the guest sees. ``image`` is the
    image that a root disk starts as a copy of. ``slot`` is where it is plugged in: 0 for the root disk, 1 to 24 for a
    volume, which keeps its slot while others come and go.
    """

    uuid: str
    size_bytes: int
    format: str = "qcow2"
    image: str | None = None
    slot: int = 0

    def __post_init__(self) -> None:
        check_uuid(self.uuid)
        if self.image is not None:
            check_uuid(self.image)
        if not 0 <= self.slot <= SLOT_MAX:
            raise ModelError(f"slot {self.slot}: want 0 to {SLOT_MAX}")
        if self.format not in ("raw", "qcow2"):
            raise ModelError(f"disks are raw or qcow2, not {self.format!r}")
        if self.size_bytes <= 0 or self.size_bytes % 512:
            raise ModelError(f"a disk of {self.size_bytes} bytes: want whole sectors of 512")


@dataclass(frozen=True)
class NicSpec:
    """A network card. ``bandwidth_kib`` is KiB/s each way; 0 is no bound. ``address`` is the IPv4 address that its
    network's DHCP keeps for it, or empty where others hand them out.
    """

    network: str
    mac: str
    bandwidth_kib: int = 0
    address: str = ""

    def __post_init__(self) -> None:
        check_uuid(self.network)
        check_mac(self.mac)
        if self.address:
            check_address(self.address)
        if self.bandwidth_kib < 0:
            raise ModelError("a negative bandwidth")


@dataclass(frozen=True)
class InstanceSpec:
    """What an instance should be. ``generation`` rises with every change of it."""

    uuid: str
    name: str
    generation: int
    vcpus: int
    vcpus_max: int
    memory_bytes: int
    memory_max_bytes: int
    root: DiskSpec
    priority: int = PRIORITY_DEFAULT
    nest: bool = False
    nics: tuple[NicSpec, ...] = ()
    volumes: tuple[DiskSpec, ...] = ()
    ssh_keys: tuple[str, ...] = ()
    user_data: str = ""
    forwards: tuple[ForwardSpec, ...] = ()

    def __post_init__(self) -> None:
        check_uuid(self.uuid)
        check_name(self.name)
        if not 1 <= self.vcpus <= self.vcpus_max <= 512:
            raise ModelError(f"{self.vcpus} vCPUs of at most {self.vcpus_max}: want 1 <= now <= at most <= 512")
        if not 32 * MIB <= self.memory_bytes <= self.memory_max_bytes:
            raise ModelError("memory: want 32 MiB <= now <= at most")
        if self.memory_bytes % MIB or self.memory_max_bytes % MIB:
            raise ModelError("memory comes in whole MiB")
        if not PRIORITY_MIN <= self.priority <= PRIORITY_MAX:
            raise ModelError(f"priority {self.priority}: want {PRIORITY_MIN} to {PRIORITY_MAX}")
        slots = [volume.slot for volume in self.volumes]
        if 0 in slots or len(set(slots)) != len(slots):
            raise ModelError("each volume wants a slot of its own, from 1")
        for key in self.ssh_keys:
            if "\n" in key or not key.strip():
                raise ModelError("an SSH key is one line")


@dataclass(frozen=True)
class NetworkSpec:
    """A network for instances. ``kind`` is nat, isolated or bridge; ``bridge`` names the host's for the last.

    ``hosts`` are the addresses that are kept for cards on the worker that is told.
    """

    uuid: str
    name: str
    kind: str = "nat"
    cidr: str = ""
    bridge: str = ""
    hosts: tuple[HostSpec, ...] = ()


@dataclass(frozen=True)
class VolumeSpec:
    """What a volume should be. ``name`` gives the file system its label; ``generation`` rises with every change."""

    uuid: str
    name: str
    generation: int
    size_bytes: int
    format: str = "raw"
    filesystem: str = "none"

    def __post_init__(self) -> None:
        DiskSpec(self.uuid, self.size_bytes, self.format)
        check_name(self.name)
        if self.filesystem not in FILESYSTEM_BYTES_MIN:
            raise ModelError(f"{self.filesystem!r} is none of {', '.join(FILESYSTEM_BYTES_MIN)}")
        if self.size_bytes < FILESYSTEM_BYTES_MIN[self.filesystem]:
            smallest = FILESYSTEM_BYTES_MIN[self.filesystem] // MIB
            raise ModelError(f"a volume with file system {self.filesystem} wants {smallest} MiB or more")
        if self.size_bytes % MIB:
            raise ModelError("a volume comes in whole MiB")


@dataclass(frozen=True)
class ImageSpec:
    """An image of the catalogue. ``format`` is that of what is brought in: from ``url``, from what the host's packages
    brought (``bundled:NAME``), or from the spool of uploads when that is empty. ``sha256`` is the digest that is
    wanted, or empty. ``largest_bytes`` bounds what is fetched and what a guest would see.
    """

    uuid: str
    format: str = "qcow2"
    url: str = ""
    sha256: str = ""
    largest_bytes: int = 0

    def __post_init__(self) -> None:
        check_uuid(self.uuid)
        if self.format not in ("raw", "qcow2"):
            raise ModelError(f"images are raw or qcow2, not {self.format!r}")
        if self.sha256 and not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ModelError("a SHA-256 digest has 64 hexadecimal digits in lower case")


@dataclass(frozen=True)
class Command:
    """From the central node to a worker: a wake-up with the state to be reached, not a step to be done blindly.

    A worker that gets it twice, or late, looks at what is there and does only what is missing.
    """

    operation: str
    attempt: int
    kind: Kind
    generation: int
    instance: InstanceSpec | None = None
    network: NetworkSpec | None = None
    volume: VolumeSpec | None = None
    image: ImageSpec | None = None
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    protocol: int = PROTOCOL

    def __post_init__(self) -> None:
        check_uuid(self.operation)
        if self.protocol > PROTOCOL:
            raise ModelError(f"protocol {self.protocol} is newer than this worker's {PROTOCOL}")


@dataclass(frozen=True)
class Report:
    """From a worker: how far an operation is. ``facts`` are what it found (power, addresses, sizes)."""

    operation: str
    attempt: int
    worker: str
    phase: Phase
    progress: int = 0
    message: str = ""
    fault: Fault | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class DomainFacts:
    """One domain of ours on a hypervisor. ``generation`` is what its metadata say."""

    uuid: str
    power: Power
    generation: int
    vcpus: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True)
class Heartbeat:
    """What a worker says of itself every few seconds. ``boot_id`` changes when its host (or its only hypervisor's
    process, where that holds the domains) was started anew: what ran before then no longer does. ``addresses`` are what
    it has seen on cards whose addresses others hand out.
    """

    worker: str
    name: str
    boot_id: str
    vcpus: int
    memory_bytes: int
    disk_bytes: int
    features: Mapping[str, Any]
    domains: tuple[DomainFacts, ...]
    addresses: tuple[HostSpec, ...] = ()
    protocol: int = PROTOCOL
