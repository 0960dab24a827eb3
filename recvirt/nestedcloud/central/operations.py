"""What people ask for becomes a row, in the same transaction as the promise that goes with it.

The order of locks is project, instance, worker, everywhere, so that two requests never wait for each other. Owns which
operation is allowed when. Does not own how it is carried out (``dispatcher``, the workers).
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from django.contrib.auth.models import User
from django.db import transaction

from recvirt.nestedcloud.central import addressing, admission, reports, reservations, specs
from recvirt.nestedcloud.central.intervals import FOREVER
from recvirt.nestedcloud.central.models import (
    ACTIVE_PHASES,
    Event,
    Image,
    ImageState,
    Instance,
    InstanceState,
    Network,
    Operation,
    Project,
    Volume,
    Worker,
)
from recvirt.nestedcloud.central.problems import KeyReused, OperationActive, Refused, WorkerRevoked, WrongState
from recvirt.nestedcloud.model import Kind, ModelError, check_name

#: The states in which an operation makes sense.
ALLOWED: Mapping[Kind, tuple[str, ...]] = {
    Kind.START: (InstanceState.OFF, InstanceState.FAILED),
    Kind.STOP: (InstanceState.ON, InstanceState.SUSPENDED),
    Kind.REBOOT: (InstanceState.ON,),
    Kind.SUSPEND: (InstanceState.ON,),
    Kind.RESUME: (InstanceState.SUSPENDED,),
    Kind.DELETE: (
        InstanceState.NEW,
        InstanceState.ON,
        InstanceState.OFF,
        InstanceState.SUSPENDED,
        InstanceState.FAILED,
    ),
    Kind.RESCALE: (InstanceState.ON, InstanceState.OFF),
    Kind.SNAPSHOT: (InstanceState.ON, InstanceState.OFF),
    Kind.REVERT: (InstanceState.ON, InstanceState.OFF),
    Kind.SNAPSHOT_REMOVE: (InstanceState.ON, InstanceState.OFF, InstanceState.SUSPENDED),
}
#: What can be forgotten when the worker that has it is out of reach for good.
_REMOVALS = (Kind.DELETE, Kind.VOLUME_REMOVE)
_SNAPSHOT_KINDS = (Kind.SNAPSHOT, Kind.REVERT, Kind.SNAPSHOT_REMOVE)


def args_of(kind: Kind, body: Mapping[str, Any]) -> dict[str, Any]:
    """An operation's arguments from a request's validated body."""
    args = dict(body)
    return {"restart": args.pop("restart"), "changes": args} if kind is Kind.RESCALE else args


def growth_of(instance: Instance, changes: Mapping[str, Any]) -> admission.Need:
    """What a change of size takes beyond what the instance has. ModelError when it can't be of that size."""
    spec = specs.instance_spec(instance, changes)
    return admission.Need(
        0, spec.vcpus_max - instance.vcpus_max, spec.memory_max_bytes - instance.memory_max_bytes,
        spec.root.size_bytes - instance.disk_bytes,
    )  # fmt: skip


def digest_of(kind: Kind, target: str, args: Mapping[str, Any]) -> str:
    """What a request says, so that a key can be held to it."""
    text = json.dumps([kind.value, target, args], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def row_of(project: Project, user: User | None, key: str | None) -> uuid.UUID:
    """The identifier of what a request makes beside operations: the same one for a key that comes again."""
    return uuid.uuid5(project.pk, json.dumps([user.pk if user is not None else None, key])) if key else uuid.uuid4()


def seen(project: Project, user: User | None, key: str | None, digest: str) -> Operation | None:
    """The operation that this key made before. KeyReused when it was another request, or somebody else's."""
    if key is None:
        return None
    found = Operation.objects.filter(project=project, idempotency_key=key).first()
    if found is not None and found.user_id != (user.pk if user is not None else None):
        raise KeyReused("this idempotency key was used by somebody else")
    if found is not None and found.request_digest != digest:
        raise KeyReused("this idempotency key stands for another request", operation=str(found.uuid))
    return found


def launch(
    project: Project, user: User | None, wish: Mapping[str, Any], key: str | None = None, until: datetime | None = None
) -> Operation:
    """A new instance. ``wish`` has the serializer's validated fields; image and networks are rows.

    ``until`` is when the caller deletes it again; one on a reservation is deleted when that ends.
    """
    plain = {name: str(value) if isinstance(value, Image) else value for name, value in wish.items()}
    plain["networks"] = [str(network.uuid) for network in wish["networks"]]
    digest = digest_of(Kind.LAUNCH, "", plain)
    with transaction.atomic():
        need = admission.Need(1, wish["vcpus_max"], wish["memory_max_bytes"], wish["disk_bytes"])
        # The project's row is locked first: of two requests with one key, the second one finds the first one's.
        Project.objects.select_for_update().get(pk=project.pk)
        if (found := seen(project, user, key, digest)) is not None:
            return found
        kept = reservations.take(project, wish["reservation"]) if wish.get("reservation") else None
        until = kept.ends if kept is not None else until
        span = admission.Span(ends=until or FOREVER)
        admission.check_quota(project, need, span)
        # Locked, so that it is not removed at the same time.
        image = Image.objects.select_for_update().get(pk=wish["image"].pk)
        if image.state != ImageState.READY:
            raise WrongState(f"the image {image.name} is {image.state}")
        if image.virtual_bytes > wish["disk_bytes"]:
            raise Refused(f"the image {image.name} wants a disk of {image.virtual_bytes} bytes")
        taken = project.instances.filter(name=wish["name"]).exclude(state=InstanceState.DELETED).first()
        if taken is not None:
            raise Refused(f"there is an instance called {taken.name}", instance=str(taken.uuid))
        worker = admission.place(need, span)
        fields = {name: wish[name] for name in (*specs.CHANGEABLE, "name", "nest", "ssh_keys", "user_data")}
        instance = Instance.objects.create(
            project=project, worker=worker, image=image, promised_vcpus=need.vcpus,
            promised_memory_bytes=need.memory_bytes, promised_disk_bytes=need.disk_bytes, promised_until=until,
            **fields,
        )  # fmt: skip
        for position, network in enumerate(wish["networks"]):
            addressing.add_nic(instance, network, position)
        try:
            specs.instance_spec(instance)
        except ModelError as error:
            raise Refused(str(error)) from None
        if kept is not None and kept.ends is not None:
            reservations.pin_end(instance, user, kept.ends)
        return _record(project, user, Kind.LAUNCH, instance, {}, key, digest)


def request(
    instance: Instance, user: User | None, kind: Kind, args: Mapping[str, Any], key: str | None = None
) -> Operation:
    """Something to be done to an instance. OperationActive, WrongState and others say why not."""
    project = instance.project
    digest = digest_of(kind, str(instance.uuid), args)
    with transaction.atomic():
        Project.objects.select_for_update().get(pk=project.pk)
        if (found := seen(project, user, key, digest)) is not None:
            return found
        locked = Instance.objects.select_for_update().get(pk=instance.pk)
        check_idle(locked)
        if locked.state not in ALLOWED[kind]:
            raise WrongState(f"{kind} is not for an instance that is {locked.state}", state=locked.state)
        checked = _checked(locked, kind, args)
        if kind is Kind.START:
            addressing.complete(locked)
        locked.generation += 1
        locked.save()
        return _record(project, user, kind, locked, checked, key, digest)


def _checked(instance: Instance, kind: Kind, args: Mapping[str, Any]) -> dict[str, Any]:
    checked = dict(args)
    if kind is Kind.RESCALE:
        changes = dict(checked.get("changes", {}))
        try:
            need = growth_of(instance, changes)
        except ModelError as error:
            raise Refused(str(error)) from None
        if need.disk_bytes < 0:
            raise Refused("a disk can't be made smaller")
        span = admission.Span(ends=instance.promised_until or FOREVER)
        admission.check_quota(instance.project, need, span)
        if instance.worker is not None and (need.vcpus > 0 or need.memory_bytes > 0):
            admission.check_worker(instance.worker, need, span)
        instance.promised_vcpus += max(0, need.vcpus)
        instance.promised_memory_bytes += max(0, need.memory_bytes)
        instance.promised_disk_bytes += max(0, need.disk_bytes)
    if kind in _SNAPSHOT_KINDS:
        try:
            name = check_name(str(checked.get("snapshot", "")))
        except ModelError as error:
            raise Refused(str(error)) from None
        if kind is not Kind.SNAPSHOT_REMOVE and (volume := instance.volumes.first()) is not None:
            # A snapshot would hold the volume's state or bring back a description that still names it.
            raise Refused(
                f"{instance.name} has the volume {volume.name}: detach it first; volumes have snapshots of their own"
            )
        if (name in instance.snapshots) == (kind is Kind.SNAPSHOT):
            raise Refused(f"there is {'a' if kind is Kind.SNAPSHOT else 'no'} snapshot called {name}")
    return checked


def check_idle(locked: Instance | Volume | Image) -> None:
    """OperationActive, naming it, when something is being done to it. Called with its row locked."""
    active = locked.operations.filter(phase__in=ACTIVE_PHASES).first()
    if active is None and isinstance(locked, Instance):
        active = locked.clonings.filter(phase__in=ACTIVE_PHASES).first()
    if active is not None:
        raise OperationActive(
            f"{locked.name} is busy: {active.kind} has been {active.phase} since {active.created:%H:%M:%S}",
            operation=str(active.uuid),
        )


def _record(
    project: Project, user: User | None, kind: Kind, instance: Instance, args: dict[str, Any], key: str | None,
    digest: str,
) -> Operation:  # fmt: skip
    return record(project, user, kind, args, key, digest, instance=instance, worker=instance.worker)


def record(
    project: Project, user: User | None, kind: Kind, args: dict[str, Any], key: str | None, digest: str, *,
    worker: Worker | None, instance: Instance | None = None, volume: Volume | None = None, image: Image | None = None,
    source: Instance | None = None, settled: str = "",
) -> Operation:  # fmt: skip
    """The row of an operation, and the event that it was asked for. WorkerRevoked when nobody would carry it out.

    ``settled`` says why it has succeeded already, if it has: no worker is asked then.
    """
    out_of_reach = worker is not None and worker.revoked
    if worker is not None and out_of_reach and kind not in _REMOVALS and not settled:
        raise WorkerRevoked(f"the worker {worker.name} was revoked: what is there can't be reached any more")
    target = volume or image or instance
    operation = Operation.objects.create(
        project=project, user=user, instance=instance, volume=volume, image=image, source=source, worker=worker,
        kind=kind.value, args=args, idempotency_key=key, request_digest=digest,
        generation=instance.generation if instance is not None else 0,
    )  # fmt: skip
    about = {"instance": instance, "volume": volume, "image": image, "source": source}
    Event.objects.create(
        project=project, user=user, kind=f"operation.{operation.phase}", subject=operation.uuid,
        data={"kind": kind.value, "name": target.name if target is not None else "",
              **{what: str(row.uuid) for what, row in about.items() if row is not None}},
    )  # fmt: skip
    if settled or out_of_reach:
        reports.settle(operation, settled or reports.FORGOTTEN)
    return operation


def default_network(project: Project) -> Network:
    """The project's own NAT network, made when it is first wanted."""
    with transaction.atomic():
        Project.objects.select_for_update().get(pk=project.pk)
        found = project.networks.filter(name="default").first()
        return found or Network.objects.create(project=project, name="default", cidr=addressing.free_cidr())
