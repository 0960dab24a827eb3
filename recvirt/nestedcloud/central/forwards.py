"""What people ask for of forwards. The order of locks is project, instance; a port is taken by its row.

A forward is part of what its instance should be, so changing one is an operation on the instance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.contrib.auth.models import User
from django.db import IntegrityError, transaction

from recvirt.nestedcloud.addresses import MANAGEMENT_PORTS, UNPRIVILEGED_PORT
from recvirt.nestedcloud.central import addressing, specs
from recvirt.nestedcloud.central.models import (
    Forward,
    ForwardState,
    Instance,
    InstanceState,
    NetworkKind,
    Nic,
    Operation,
    Project,
)
from recvirt.nestedcloud.central.operations import check_idle, digest_of, record, seen
from recvirt.nestedcloud.central.problems import QuotaExceeded, Refused, WrongState
from recvirt.nestedcloud.model import Kind, ModelError

_READY = (InstanceState.ON, InstanceState.OFF, InstanceState.SUSPENDED)


def add(
    instance: Instance, user: User | None, wish: Mapping[str, Any], key: str | None = None, *, privileged: bool = False
) -> Operation:
    """A new forward. ``wish`` has protocol, host_port, guest_port, source (or empty), and perhaps network, a name.

    ``privileged``: the system's ports may be used as well.
    """
    project, digest = instance.project, digest_of(Kind.FORWARD_ADD, str(instance.uuid), wish)
    with transaction.atomic():
        locked_project = Project.objects.select_for_update().get(pk=project.pk)
        if (found := seen(project, user, key, digest)) is not None:
            return found
        _check_port(wish["host_port"], privileged)
        locked = Instance.objects.select_for_update().get(pk=instance.pk)
        check_idle(locked)
        if locked.state not in _READY:
            raise WrongState(f"forward-add is not for an instance that is {locked.state}", state=locked.state)
        if locked.worker is None or not locked.worker.features.get("forwards"):
            name = locked.worker.name if locked.worker is not None else "none"
            raise Refused(f"{locked.name}'s worker ({name}) forwards no ports")
        _check_quota(locked_project)
        addressing.complete(locked)
        nic = _nic(locked, wish.get("network"))
        forward = Forward(
            project=project, worker=locked.worker, nic=nic, protocol=wish["protocol"], host_port=wish["host_port"],
            guest_port=wish["guest_port"], source=wish["source"],
        )  # fmt: skip
        try:
            specs.forward_spec(forward)
        except ModelError as error:
            raise Refused(str(error)) from None
        try:
            with transaction.atomic():
                forward.save()
        except IntegrityError:
            # Perhaps another project's, of which nothing is told.
            raise Refused(f"port {forward} of {locked.worker.name} is taken: choose another one") from None
        return _record(locked, user, Kind.FORWARD_ADD, forward, key, digest)


def remove(forward: Forward, user: User | None, key: str | None = None) -> Operation:
    """Have a forward no more. Its port is free when the worker has said so."""
    project, digest = forward.project, digest_of(Kind.FORWARD_REMOVE, str(forward.uuid), {})
    with transaction.atomic():
        Project.objects.select_for_update().get(pk=project.pk)
        if (found := seen(project, user, key, digest)) is not None:
            return found
        locked = Instance.objects.select_for_update().get(pk=forward.nic.instance_id)
        check_idle(locked)
        there = Forward.objects.filter(pk=forward.pk).first()
        if there is None:
            raise Refused(f"the forward {forward} has just been removed")
        there.state = ForwardState.REMOVING
        there.save(update_fields=["state"])
        return _record(locked, user, Kind.FORWARD_REMOVE, there, key, digest)


def removed_before(project: Project, user: User | None, forward: str, key: str | None) -> Operation | None:
    """The operation with this key that removed a forward which is gone."""
    if key is None:
        return None
    return seen(project, user, key, digest_of(Kind.FORWARD_REMOVE, forward, {}))


def _check_port(port: int, privileged: bool) -> None:
    if port in MANAGEMENT_PORTS:
        raise Refused(f"port {port} is one that the cloud itself needs, and is never forwarded")
    if port < UNPRIVILEGED_PORT and not privileged:
        raise Refused(f"ports below {UNPRIVILEGED_PORT} are for the cloud's administrators: choose a higher one")


def _check_quota(project: Project) -> None:
    used = project.forwards.count()
    if used >= project.forwards_max:
        raise QuotaExceeded(
            f"the quota of forwards is {project.forwards_max}: {used} are used, 1 more is wanted", quota="forwards",
            limit=project.forwards_max, used=used, wanted=1,
        )  # fmt: skip


def _nic(instance: Instance, network: str | None) -> Nic:
    """The card that is meant: the one in the network of that name, or the first one that can be led to."""
    cards = list(instance.nics.select_related("network"))
    if network is not None:
        cards = [nic for nic in cards if nic.network.name == network]
        if not cards:
            raise Refused(f"{instance.name} has no card in a network called {network}")
    found = next((nic for nic in cards if nic.network.kind == NetworkKind.NAT and nic.address), None)
    if found is None:
        raise Refused(
            f"{instance.name} has no card {f'in {network} ' if network else ''}that ports can lead to: isolated "
            "networks are reached from nowhere, and bridged ones without the worker's help"
        )
    return found


def _record(
    instance: Instance, user: User | None, kind: Kind, forward: Forward, key: str | None, digest: str
) -> Operation:
    instance.generation += 1
    instance.save()
    args = {"forward": str(forward.uuid), "port": str(forward)}
    return record(instance.project, user, kind, args, key, digest, worker=instance.worker, instance=instance)
