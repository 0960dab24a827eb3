"""What central node and workers tell each other, and the words both use. Standard library only.

Everything that crosses the broker is one of the frozen dataclasses below, as JSON (:func:`encode`, :func:`decode`).
A message that does not fit raises :class:`ModelError` with the place of the fault: what a queue brings is not trusted.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import types
import typing
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

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


class ModelError(ValueError):
    """A value or a message that is not what it should be."""


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
    """A network card. ``bandwidth_kib`` is KiB/s each way; 0 is no bound."""

    network: str
    mac: str
    bandwidth_kib: int = 0

    def __post_init__(self) -> None:
        check_uuid(self.network)
        if not re.fullmatch(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}", self.mac) or int(self.mac[:2], 16) & 1:
            raise ModelError(f"{self.mac!r} is no unicast MAC address in lower case")
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
    """A network for instances. ``kind`` is nat, isolated or bridge; ``bridge`` names the host's for the last."""

    uuid: str
    name: str
    kind: str = "nat"
    cidr: str = ""
    bridge: str = ""


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
    process, where that holds the domains) was started anew: what ran before then no longer does.
    """

    worker: str
    name: str
    boot_id: str
    vcpus: int
    memory_bytes: int
    disk_bytes: int
    features: Mapping[str, Any]
    domains: tuple[DomainFacts, ...]
    protocol: int = PROTOCOL


T = TypeVar("T")


def encode(value: Any) -> Any:
    """JSON types only, from dataclasses, enums, tuples and mappings of them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    return value


def decode(wanted: type[T], data: Any) -> T:
    """The dataclass ``wanted`` out of parsed JSON. ModelError names what does not fit, and where."""
    result: T = _decode(wanted, data, wanted.__name__)
    return result


def _decode(wanted: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(wanted)
    if wanted is Any:
        return data
    if origin in (types.UnionType, typing.Union):
        if data is None:
            return None
        (inner,) = [item for item in typing.get_args(wanted) if item is not type(None)]
        return _decode(inner, data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise ModelError(f"{where}: want a list")
        inner = typing.get_args(wanted)[0]
        return tuple(_decode(inner, item, f"{where}[{index}]") for index, item in enumerate(data))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, dict):
            raise ModelError(f"{where}: want an object")
        return data
    if dataclasses.is_dataclass(wanted):
        return _decode_object(wanted, data, where)
    if issubclass(wanted, enum.Enum):
        try:
            return wanted(data)
        except ValueError:
            raise ModelError(f"{where}: {data!r} is none of {', '.join(item.value for item in wanted)}") from None
    # A bool is an int to Python, not to us.
    if not isinstance(data, wanted) or (isinstance(data, bool) and wanted is not bool):
        raise ModelError(f"{where}: want {wanted.__name__}, not {type(data).__name__}")
    return data


def _decode_object(wanted: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ModelError(f"{where}: want an object")
    hints = typing.get_type_hints(wanted)
    fields = {field.name: field for field in dataclasses.fields(wanted)}
    if unknown := sorted(set(data) - set(fields)):
        raise ModelError(f"{where}: unknown {', '.join(unknown)}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _decode(hints[name], data[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ModelError(f"{where}: {name} is missing")
    try:
        return wanted(**values)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None
