"""How operations on volumes and images end. Called in the transaction that writes the end down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recvirt.nestedcloud.central.models import DiskFormat, Image, ImageState, Operation, Volume, VolumeState
from recvirt.nestedcloud.model import Kind

_IMPORTS = (Kind.IMAGE_IMPORT, Kind.EXPORT)


def finish(operation: Operation, succeeded: bool, facts: Mapping[str, Any]) -> None:
    """Write down what the operation's volume and image then are. ``facts`` come from a worker."""
    kind = Kind(operation.kind)
    if operation.volume_id is not None:
        volume = Volume.objects.select_for_update().get(pk=operation.volume_id)
        _finish_volume(volume, operation, kind, succeeded, facts)
        volume.save()
    if operation.image_id is not None:
        image = Image.objects.select_for_update().get(pk=operation.image_id)
        _finish_image(image, kind, succeeded, facts)
        image.save()
    if kind is Kind.DELETE and succeeded and operation.instance_id is not None:
        # Volumes outlive their instance.
        Volume.objects.filter(instance_id=operation.instance_id).update(instance=None, slot=None)


def _finish_volume(volume: Volume, operation: Operation, kind: Kind, succeeded: bool, facts: Mapping[str, Any]) -> None:
    if succeeded:
        if kind is Kind.VOLUME_ALLOCATE:
            volume.state = VolumeState.READY
        elif kind is Kind.VOLUME_REMOVE:
            volume.state, volume.snapshots, volume.size_bytes = VolumeState.DELETED, {}, 0
        elif kind is Kind.VOLUME_SNAPSHOT:
            copied = volume.size_bytes if volume.format == DiskFormat.RAW else 0
            volume.snapshots = {**volume.snapshots, operation.args["snapshot"]: copied}
        elif kind is Kind.VOLUME_SNAPSHOT_REMOVE:
            gone = operation.args["snapshot"]
            volume.snapshots = {name: copied for name, copied in volume.snapshots.items() if name != gone}
        size = facts.get("size_bytes")
        if kind in (Kind.VOLUME_RESIZE, Kind.VOLUME_REVERT) and isinstance(size, int) and size > 0:
            volume.size_bytes = size
    elif kind is Kind.VOLUME_ALLOCATE:
        volume.state = VolumeState.FAILED
    # Kept as it was unless the worker says that the instance has it no more: two guests must never write to one volume.
    if kind in (Kind.ATTACH, Kind.DETACH) and facts.get("attached") is False:
        volume.instance, volume.slot = None, None
    volume.promised_bytes = volume.size_bytes + sum(volume.snapshots.values())


def _finish_image(image: Image, kind: Kind, succeeded: bool, facts: Mapping[str, Any]) -> None:
    if kind in _IMPORTS and succeeded:
        image.state = ImageState.READY
        image.sha256 = str(facts.get("sha256", ""))[:64]
        size = facts.get("virtual_bytes")
        image.virtual_bytes = size if isinstance(size, int) and size > 0 else 0
        image.promised_bytes = image.virtual_bytes
    elif kind in _IMPORTS:
        image.state, image.promised_bytes = ImageState.FAILED, 0
    elif kind is Kind.IMAGE_REMOVE:
        # One that could not be removed can only be removed.
        image.state = ImageState.DELETED if succeeded else ImageState.FAILED
        image.promised_bytes = 0 if succeeded else image.promised_bytes
