"""What people ask for of images, and copies of instances. The order of locks is project, instance, image, worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.conf import settings
from django.contrib.auth.models import User
from django.db import transaction
from django.db.models import F

from recvirt.nestedcloud import spool
from recvirt.nestedcloud.central import addressing, admission, specs
from recvirt.nestedcloud.central.models import (
    DiskFormat,
    Image,
    ImageState,
    Instance,
    InstanceState,
    Operation,
    Project,
    Worker,
)
from recvirt.nestedcloud.central.operations import check_idle, digest_of, record, seen
from recvirt.nestedcloud.central.problems import NoCapacity, Refused, WrongState
from recvirt.nestedcloud.model import Kind, ModelError


def _new(project: Project, name: str, **values: Any) -> Image:
    """A row, after the quota was looked at. Called with the project locked."""
    admission.check_quota(project, admission.Need(disk_bytes=values["promised_bytes"]))
    if project.images.filter(name=name).exclude(state=ImageState.DELETED).exists():
        raise Refused(f"there is an image called {name}")
    image = Image(project=project, name=name, **values)
    try:
        specs.image_spec(image)
    except ModelError as error:
        raise Refused(str(error)) from None
    image.save()
    return image


def import_url(project: Project, user: User | None, wish: Mapping[str, Any], key: str | None = None) -> Operation:
    """A new image from ``wish["url"]``: name, format, sha256 (or empty), largest_bytes."""
    digest = digest_of(Kind.IMAGE_IMPORT, "", wish)
    with transaction.atomic():
        Project.objects.select_for_update().get(pk=project.pk)
        if (found := seen(project, user, key, digest)) is not None:
            return found
        image = _new(
            project, wish["name"], format=wish["format"], wanted_sha256=wish["sha256"],
            promised_bytes=wish["largest_bytes"],
        )  # fmt: skip
        worker = admission.place_bytes(wish["largest_bytes"])
        Image.objects.filter(pk=image.pk).update(worker=worker)
        args = {"url": wish["url"], "largest_bytes": wish["largest_bytes"]}
        return record(project, user, Kind.IMAGE_IMPORT, args, key, digest, worker=worker, image=image)


def begin_upload(project: Project, wish: Mapping[str, Any]) -> Image:
    """A new image that waits for its pieces: name, format, sha256 (or empty), upload_bytes, largest_bytes. Asked for
    again in the same words it is the same one, so that an upload can go on.
    """
    with transaction.atomic():
        Project.objects.select_for_update().get(pk=project.pk)
        same = project.images.filter(
            name=wish["name"], state=ImageState.UPLOADING, format=wish["format"], wanted_sha256=wish["sha256"],
            upload_bytes=wish["upload_bytes"],
        ).first()  # fmt: skip
        return same or _new(
            project, wish["name"], format=wish["format"], wanted_sha256=wish["sha256"], state=ImageState.UPLOADING,
            upload_bytes=wish["upload_bytes"], promised_bytes=max(wish["largest_bytes"], wish["upload_bytes"]),
        )  # fmt: skip


def put_piece(image: Image, offset: int, data: bytes) -> int:
    """A piece of an upload; how many bytes are there then. Refused says where the next one starts."""
    if image.state != ImageState.UPLOADING:
        raise WrongState(f"{image.name} is {image.state}, and not being uploaded", state=image.state)
    folder = settings.CONFIG.spool
    spool.identity(folder)
    try:
        return spool.write(folder, str(image.uuid), offset, data, image.upload_bytes)
    except spool.SpoolError as error:
        raise Refused(str(error), there=spool.size(folder, str(image.uuid))) from None


def finish_upload(image: Image, user: User | None, key: str | None = None) -> Operation:
    """Have a whole upload looked at, by a worker that sees the same folder as we do."""
    project = image.project
    if project is None:
        raise WrongState(f"{image.name} is everybody's, and not being uploaded")
    digest = digest_of(Kind.IMAGE_IMPORT, str(image.uuid), {})
    with transaction.atomic():
        Project.objects.select_for_update().get(pk=project.pk)
        if (found := seen(project, user, key, digest)) is not None:
            return found
        locked = Image.objects.select_for_update().get(pk=image.pk)
        check_idle(locked)
        if locked.state != ImageState.UPLOADING:
            raise WrongState(f"{locked.name} is {locked.state}, and not being uploaded", state=locked.state)
        there = spool.size(settings.CONFIG.spool, str(locked.uuid))
        if there != locked.upload_bytes:
            raise Refused(f"{there} of {locked.upload_bytes} bytes were uploaded", there=there)
        locked.worker = reader_of_uploads()
        if locked.worker is None:
            raise NoCapacity("no worker that can read uploads is up: one on the API's host, or one that mounts them")
        locked.state = ImageState.IMPORTING
        locked.save()
        args = {"largest_bytes": locked.promised_bytes}
        return record(project, user, Kind.IMAGE_IMPORT, args, key, digest, worker=locked.worker, image=locked)


def reader_of_uploads() -> Worker | None:
    """A worker that is up and sees the folder where uploads are, the one on this host before others."""
    mine = spool.identity(settings.CONFIG.spool)
    rows = Worker.objects.filter(revoked=False).order_by(F("peer__index").asc(nulls_first=True), "name")
    return next((worker for worker in rows if worker.is_up and worker.features.get("spool") == mine), None)


def remove(image: Image, project: Project, user: User | None, key: str | None = None) -> Operation:
    """Have an image no more. Refused while instances are copies of it: their disks hold only what differs from it."""
    digest = digest_of(Kind.IMAGE_REMOVE, str(image.uuid), {})
    with transaction.atomic():
        Project.objects.select_for_update().get(pk=project.pk)
        if (found := seen(project, user, key, digest)) is not None:
            return found
        locked = Image.objects.select_for_update().get(pk=image.pk)
        check_idle(locked)
        users = locked.instances.exclude(state=InstanceState.DELETED).order_by("name")
        if count := users.count():
            own = [instance.name for instance in users.filter(project=project)[:5]]
            named = f" ({', '.join(own)})" if own else ""
            raise Refused(
                f"{count} instance{'s' if count > 1 else ''}{named} hold{'' if count > 1 else 's'} only what differs "
                f"from {locked.name}: delete them first"
            )
        # Where workers share the images any of them can.
        reachable = locked.worker is not None and not locked.worker.revoked
        worker = locked.worker if reachable else admission.place_bytes(0)
        locked.state = ImageState.REMOVING
        locked.save()
        return record(project, user, Kind.IMAGE_REMOVE, {}, key, digest, worker=worker, image=locked)


def export(instance: Instance, name: str, user: User | None, key: str | None = None) -> Operation:
    """An instance's root disk as an image that needs no other one."""
    project = instance.project
    digest = digest_of(Kind.EXPORT, str(instance.uuid), {"image": name})
    with transaction.atomic():
        Project.objects.select_for_update().get(pk=project.pk)
        if (found := seen(project, user, key, digest)) is not None:
            return found
        locked = Instance.objects.select_for_update().get(pk=instance.pk)
        check_idle(locked)
        if locked.state not in (InstanceState.OFF, InstanceState.SUSPENDED) or locked.worker is None:
            raise WrongState(
                f"{locked.name} is {locked.state}: stop or suspend it first, so that its disk keeps still",
                state=locked.state,
            )
        image = _new(project, name, format=DiskFormat.QCOW2, promised_bytes=locked.disk_bytes, worker=locked.worker)
        locked.generation += 1
        locked.save()
        return record(project, user, Kind.EXPORT, {}, key, digest, worker=locked.worker, instance=locked, image=image)


def clone(source: Instance, name: str, user: User | None, key: str | None = None) -> Operation:
    """A new instance, off, that is as big as ``source`` and starts with what is on its root disk. Volumes stay where
    they are; the clone has addresses, name and first boot of its own.
    """
    project = source.project
    digest = digest_of(Kind.CLONE, str(source.uuid), {"name": name})
    with transaction.atomic():
        Project.objects.select_for_update().get(pk=project.pk)
        if (found := seen(project, user, key, digest)) is not None:
            return found
        locked = Instance.objects.select_for_update().get(pk=source.pk)
        check_idle(locked)
        if locked.state != InstanceState.OFF or locked.worker is None:
            raise WrongState(f"{locked.name} is {locked.state}: stop it first", state=locked.state)
        if project.instances.filter(name=name).exclude(state=InstanceState.DELETED).exists():
            raise Refused(f"there is an instance called {name}")
        need = admission.Need(1, locked.vcpus_max, locked.memory_max_bytes, locked.disk_bytes)
        admission.check_quota(project, need)
        admission.check_worker(locked.worker, need)
        fields = {field: getattr(locked, field) for field in (*specs.CHANGEABLE, "nest", "ssh_keys", "user_data")}
        made = Instance.objects.create(
            project=project, worker=locked.worker, image=locked.image, name=name, promised_vcpus=need.vcpus,
            promised_memory_bytes=need.memory_bytes, promised_disk_bytes=need.disk_bytes, **fields,
        )  # fmt: skip
        for nic in locked.nics.all():
            addressing.add_nic(made, nic.network, nic.position, nic.bandwidth_kib)
        return record(project, user, Kind.CLONE, {}, key, digest, worker=locked.worker, instance=made, source=locked)
