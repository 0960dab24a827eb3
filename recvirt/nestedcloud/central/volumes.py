"""What people ask for of volumes. The order of locks is project, instance, volume, worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.contrib.auth.models import User
from django.db import transaction

from recvirt.nestedcloud.central import admission, pools, specs
from recvirt.nestedcloud.central.models import (
    DiskFormat,
    Instance,
    InstanceState,
    Operation,
    Project,
    Volume,
    VolumeState,
    Worker,
)
from recvirt.nestedcloud.central.operations import check_idle, digest_of, record, seen
from recvirt.nestedcloud.central.problems import Refused, WrongState
from recvirt.nestedcloud.model import SLOT_MAX, Kind, ModelError, check_name

#: Snapshots of one volume.
SNAPSHOTS_MAX = 32
_SNAPSHOT_KINDS = (Kind.VOLUME_SNAPSHOT, Kind.VOLUME_REVERT, Kind.VOLUME_SNAPSHOT_REMOVE)
_ATTACHABLE = (InstanceState.ON, InstanceState.OFF, InstanceState.SUSPENDED)


def allocate(project: Project, user: User | None, wish: Mapping[str, Any], key: str | None = None) -> Operation:
    """A new volume. ``wish`` has name, size_bytes, format, filesystem, and perhaps near, the instance it is for, or on,
    the worker that makes it.
    """
    near: Instance | None = wish.get("near")
    plain = {**wish, "near": str(near.uuid) if near is not None else None}
    if (on := wish.get("on")) is not None:
        plain["on"] = str(on.uuid)
    digest = digest_of(Kind.VOLUME_ALLOCATE, "", plain)
    with transaction.atomic():
        Project.objects.select_for_update().get(pk=project.pk)
        if (found := seen(project, user, key, digest)) is not None:
            return found
        admission.check_quota(project, admission.Need(disk_bytes=wish["size_bytes"]))
        if project.volumes.filter(name=wish["name"]).exclude(state=VolumeState.DELETED).exists():
            raise Refused(f"there is a volume called {wish['name']}")
        chosen: Worker | None = on or (near.worker if near is not None else None)
        if chosen is not None:
            worker = admission.check_worker_bytes(chosen, wish["size_bytes"])
        else:
            worker = admission.place_bytes(wish["size_bytes"])
        volume = Volume.objects.create(
            project=project, worker=worker, name=wish["name"], size_bytes=wish["size_bytes"], format=wish["format"],
            promised_bytes=wish["size_bytes"], filesystem=wish["filesystem"], pool=worker.pool,
        )  # fmt: skip
        _check(volume)
        return record(project, user, Kind.VOLUME_ALLOCATE, {}, key, digest, worker=worker, volume=volume)


def _check(volume: Volume, size_bytes: int | None = None) -> None:
    try:
        specs.volume_spec(volume, size_bytes)
    except ModelError as error:
        raise Refused(str(error)) from None


def request(
    volume: Volume, user: User | None, kind: Kind, args: Mapping[str, Any], key: str | None = None
) -> Operation:
    """Something to be done to a volume. Of one that is attached, its instance is held as well."""
    project = volume.project
    digest = digest_of(kind, str(volume.uuid), args)
    with transaction.atomic():
        Project.objects.select_for_update().get(pk=project.pk)
        if (found := seen(project, user, key, digest)) is not None:
            return found
        # The project's row is locked, so nothing is attached to or detached from anything meanwhile but by reports,
        # and those end an operation that is looked for below.
        instance = _instance_of(volume)
        locked = Volume.objects.select_for_update().get(pk=volume.pk)
        check_idle(locked)
        if kind is Kind.VOLUME_REMOVE and instance is not None:
            raise Refused(f"{locked.name} is attached to {instance.name}: detach it first", instance=str(instance.uuid))
        allowed = [VolumeState.READY]
        if kind is Kind.VOLUME_REMOVE:
            allowed += [VolumeState.NEW, VolumeState.FAILED]
        if locked.state not in allowed:
            raise WrongState(f"{kind} is not for a volume that is {locked.state}", state=locked.state)
        if kind is Kind.DETACH and instance is None:
            raise WrongState(f"{locked.name} is attached to nothing", state=locked.state)
        free = pools.why_free_already(locked, instance) if kind is Kind.DETACH and instance is not None else ""
        if instance is None:
            locked.worker = pools.hand_for(locked)
        checked = _checked(locked, instance, kind, args)
        locked.generation += 1
        locked.save()
        if instance is not None:
            check_idle(instance)
            instance.generation += 1
            instance.save()
            checked["slot"] = locked.slot
        return record(
            project, user, kind, checked, key, digest, worker=locked.worker, instance=instance, volume=locked,
            settled=free,
        )  # fmt: skip


def _instance_of(volume: Volume) -> Instance | None:
    """The instance that has it, locked."""
    key = Volume.objects.values_list("instance_id", flat=True).get(pk=volume.pk)
    return Instance.objects.select_for_update().get(pk=key) if key is not None else None


def _checked(volume: Volume, instance: Instance | None, kind: Kind, args: Mapping[str, Any]) -> dict[str, Any]:
    checked = dict(args)
    if kind is Kind.VOLUME_RESIZE:
        more = checked["size_bytes"] - volume.size_bytes
        if more <= 0:
            raise Refused(f"{volume.name} has {volume.size_bytes} bytes, and a volume can only become larger")
        _check(volume, checked["size_bytes"])
        _promise(volume, more)
    if kind in _SNAPSHOT_KINDS:
        if instance is not None and instance.state != InstanceState.OFF:
            raise WrongState(
                f"{instance.name} has {volume.name} and is {instance.state}: stop it or detach the volume first",
                state=instance.state,
            )
        _check_snapshot(volume, kind, str(checked.get("snapshot", "")))
        if kind is Kind.VOLUME_SNAPSHOT and volume.format == DiskFormat.RAW:
            _promise(volume, volume.size_bytes)
    return checked


def _promise(volume: Volume, more_bytes: int) -> None:
    admission.check_quota(volume.project, admission.Need(disk_bytes=more_bytes))
    admission.check_worker_bytes(volume.worker, more_bytes)
    volume.promised_bytes += more_bytes


def _check_snapshot(volume: Volume, kind: Kind, name: str) -> None:
    try:
        check_name(name)
    except ModelError as error:
        raise Refused(str(error)) from None
    if (name in volume.snapshots) == (kind is Kind.VOLUME_SNAPSHOT):
        raise Refused(f"{volume.name} has {'a' if kind is Kind.VOLUME_SNAPSHOT else 'no'} snapshot called {name}")
    if kind is Kind.VOLUME_SNAPSHOT and len(volume.snapshots) >= SNAPSHOTS_MAX:
        raise Refused(f"{volume.name} has {SNAPSHOTS_MAX} snapshots, and that is the bound: remove one first")


def attach(volume: Volume, instance: Instance, user: User | None, key: str | None = None) -> Operation:
    """Give an instance a volume. It is the instance's from now on, so that nobody else gets it meanwhile."""
    project = volume.project
    digest = digest_of(Kind.ATTACH, str(volume.uuid), {"instance": str(instance.uuid)})
    with transaction.atomic():
        Project.objects.select_for_update().get(pk=project.pk)
        if (found := seen(project, user, key, digest)) is not None:
            return found
        owner = Instance.objects.select_for_update().get(pk=instance.pk)
        locked = Volume.objects.select_for_update().get(pk=volume.pk)
        check_idle(locked)
        check_idle(owner)
        if locked.state != VolumeState.READY:
            raise WrongState(f"attach is not for a volume that is {locked.state}", state=locked.state)
        if locked.instance is not None:
            raise Refused(
                f"{locked.name} is attached to {locked.instance.name}: detach it first",
                instance=str(locked.instance_id),
            )
        if owner.state not in _ATTACHABLE:
            raise WrongState(f"attach is not for an instance that is {owner.state}", state=owner.state)
        if owner.worker is None or not pools.can_reach(owner.worker, locked):
            where = owner.worker.name if owner.worker is not None else "none yet"
            raise Refused(
                f"{owner.name} is on {where}, which can't reach {locked.name}; these can: {pools.who_has(locked)}"
            )
        pools.check_let_go(locked, owner.worker)
        taken = set(owner.volumes.values_list("slot", flat=True))
        slot = next((number for number in range(1, SLOT_MAX + 1) if number not in taken), None)
        if slot is None:
            raise Refused(f"{owner.name} has {SLOT_MAX} volumes, and that is the bound: detach one first")
        locked.instance, locked.slot, locked.worker = owner, slot, owner.worker
        locked.generation += 1
        locked.save()
        owner.generation += 1
        owner.save()
        return record(
            project, user, Kind.ATTACH, {"slot": slot}, key, digest, worker=owner.worker, instance=owner, volume=locked
        )
