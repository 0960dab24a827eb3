"""Rows as the specifications that workers get."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any

from recvirt.nestedcloud.addresses import ForwardSpec, HostSpec
from recvirt.nestedcloud.central.models import (
    Forward,
    ForwardState,
    Image,
    Instance,
    Network,
    Nic,
    Operation,
    Volume,
    Worker,
)
from recvirt.nestedcloud.model import (
    Command,
    DiskSpec,
    ImageSpec,
    InstanceSpec,
    Kind,
    NetworkSpec,
    NicSpec,
    VolumeSpec,
    encode,
)

#: What ``rescale`` may change.
CHANGEABLE = ("vcpus", "vcpus_max", "memory_bytes", "memory_max_bytes", "disk_bytes", "priority")
#: What a worker is told the networks for: whatever may start a guest, or leads to one.
_WITH_NETWORKS = (Kind.LAUNCH, Kind.START, Kind.RESCALE, Kind.FORWARD_ADD)


def new_mac() -> str:
    """QEMU's own prefix and 24 random bits; the table refuses one that is taken."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))


def network_spec(network: Network, worker: Worker | None = None) -> NetworkSpec:
    """A network for a worker, with the addresses of the cards that are there."""
    kept = network.nics.filter(instance__worker=worker).exclude(address="") if worker is not None else ()
    hosts = tuple(HostSpec(nic.mac, nic.address) for nic in kept)
    return NetworkSpec(str(network.uuid), network.name, network.kind, network.cidr, network.bridge, hosts)


def nic_spec(nic: Nic) -> NicSpec:
    """A card for a worker."""
    return NicSpec(str(nic.network_id), nic.mac, nic.bandwidth_kib, nic.address)


def forward_spec(forward: Forward) -> ForwardSpec:
    """A forward for a worker. ModelError when that can't be."""
    return ForwardSpec(
        forward.protocol, forward.host_port, str(forward.nic.network_id), forward.nic.address, forward.guest_port,
        forward.source,
    )  # fmt: skip


def forwards_of(instance: Instance) -> tuple[ForwardSpec, ...]:
    """Those that an instance should have."""
    rows = Forward.objects.filter(nic__instance=instance).exclude(state=ForwardState.REMOVING).select_related("nic")
    return tuple(forward_spec(row) for row in rows)


def volume_disk(volume: Volume) -> DiskSpec:
    """An attached volume as a disk of its instance."""
    return DiskSpec(str(volume.uuid), volume.size_bytes, volume.format, slot=volume.slot or 0)


def volume_spec(volume: Volume, size_bytes: int | None = None) -> VolumeSpec:
    """A volume for a worker. ModelError when that can't be."""
    return VolumeSpec(
        str(volume.uuid), volume.name, volume.generation, size_bytes or volume.size_bytes, volume.format,
        volume.filesystem,
    )  # fmt: skip


def image_spec(image: Image, url: str = "", largest_bytes: int = 0) -> ImageSpec:
    """An image for a worker. ModelError when that can't be."""
    return ImageSpec(str(image.uuid), image.format, url, image.wanted_sha256, largest_bytes)


def instance_spec(instance: Instance, changes: Mapping[str, Any] | None = None) -> InstanceSpec:
    """What an instance should be, with changes that are not yet in its row. ModelError when that can't be."""
    values = {name: getattr(instance, name) for name in CHANGEABLE} | dict(changes or {})
    disk_bytes = values.pop("disk_bytes")
    image = str(instance.image_id) if instance.image_id else None
    return InstanceSpec(
        uuid=str(instance.uuid), name=instance.name, generation=instance.generation,
        root=DiskSpec(str(instance.uuid), disk_bytes, image=image), nest=instance.nest,
        nics=tuple(nic_spec(nic) for nic in instance.nics.all()),
        volumes=tuple(volume_disk(volume) for volume in instance.volumes.order_by("slot")),
        ssh_keys=tuple(instance.ssh_keys),
        user_data=instance.user_data, forwards=forwards_of(instance), **values,
    )  # fmt: skip


def command_of(operation: Operation) -> Command:
    """What the worker of an operation is told, as things stand now."""
    instance = operation.instance
    args = dict(operation.args)
    changes = args.pop("changes", None)
    spec = instance_spec(instance, changes) if instance is not None else None
    if instance is not None and operation.kind in _WITH_NETWORKS:
        networks = Network.objects.filter(nics__instance=instance).distinct().order_by("uuid")
        args["networks"] = [encode(network_spec(network, operation.worker)) for network in networks]
    if spec is not None:
        spec = dataclasses.replace(spec, generation=operation.generation)
    if spec is not None and operation.kind == Kind.DETACH:
        spec = dataclasses.replace(
            spec, volumes=tuple(disk for disk in spec.volumes if disk.uuid != str(operation.volume_id))
        )
    network = network_spec(operation.network) if operation.network is not None else None
    volume = None
    if operation.volume is not None:
        volume = volume_spec(operation.volume, args.pop("size_bytes", None))
    image = None
    if operation.image is not None:
        image = image_spec(operation.image, args.pop("url", ""), args.pop("largest_bytes", 0))
    if operation.source_id is not None:
        args["source"] = str(operation.source_id)
    return Command(
        str(operation.uuid), operation.attempt, Kind(operation.kind), operation.generation, spec, network, volume,
        image, args,
    )  # fmt: skip
