"""Tells workers what is to be done, and tells them again when nobody has answered; tells root who the workers are.

A row is claimed in one transaction, and published after it. Killed between the two, the row's lease runs out and it is
published once more; a worker that gets it twice finds the work done. Owns leases and attempts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta

from django.conf import settings
from django.db import close_old_connections, connection, transaction
from django.db.models import Q
from django.utils import timezone

from recvirt.nestedcloud.central import (
    bundled,
    forward_reports,
    health,
    peers,
    reports,
    schedules,
    storage_reports,
)
from recvirt.nestedcloud.central.first import PROJECT
from recvirt.nestedcloud.central.models import Event, Instance, InstanceState, Operation
from recvirt.nestedcloud.central.reports import ATTEMPTS_MAX
from recvirt.nestedcloud.central.specs import command_of
from recvirt.nestedcloud.model import Command, Fault, Kind, ModelError, Phase
from recvirt.nestedcloud.queue import COMMAND_SECONDS

log = logging.getLogger(__name__)

_LEASE_MAX_SECONDS = float(COMMAND_SECONDS)
_BATCH = 50
#: Between two looks whether a worker is there that brings in what packages have brought.
_BUNDLED_SECONDS = 30.0

#: Sends a command to a worker's queue.
Publish = Callable[[str, Command], None]


def tick(publish: Publish) -> int:
    """Publish what is due; how many operations that were."""
    count = 0
    while (claimed := _claim()) is not None:
        operation, command = claimed
        if command is not None:
            try:
                publish(str(operation.worker_id), command)
            except Exception:
                _take_back(operation)
                raise
        count += 1
        if count >= _BATCH:
            break
    return count


def _take_back(operation: Operation) -> None:
    """The broker is away: that is no attempt, and no lease need run out before the next one."""
    claimed = Operation.objects.filter(pk=operation.pk, attempt=operation.attempt, phase=Phase.SENT.value)
    claimed.update(phase=Phase.QUEUED.value, attempt=operation.attempt - 1, lease_until=None)


def _claim() -> tuple[Operation, Command | None] | None:
    now = timezone.now()
    due = Q(phase=Phase.QUEUED.value) | Q(phase__in=[Phase.SENT.value, Phase.RUNNING.value], lease_until__lt=now)
    with transaction.atomic():
        skip = connection.features.has_select_for_update_skip_locked
        operation = (
            Operation.objects.select_for_update(skip_locked=skip, of=("self",) if skip else ())
            .filter(due, worker__isnull=False)
            .filter(Q(lease_until__isnull=True) | Q(lease_until__lt=now))
            .order_by("created")
            .first()
        )
        if operation is None:
            return None
        if operation.worker is not None and operation.worker.revoked:
            _give_up(operation, f"its worker {operation.worker.name} was revoked", Fault.CONFLICT)
            return operation, None
        operation.attempt += 1
        if operation.attempt > ATTEMPTS_MAX:
            _give_up(operation, f"the worker did not answer {ATTEMPTS_MAX} times")
            return operation, None
        seconds = min(settings.CONFIG.lease_seconds * 2 ** (operation.attempt - 1), _LEASE_MAX_SECONDS)
        operation.lease_until = now + timedelta(seconds=seconds)
        operation.phase = Phase.SENT.value
        try:
            command = command_of(operation)
        except ModelError as error:
            _give_up(operation, str(error), Fault.INVALID)
            return operation, None
        operation.save()
        return operation, command


def _give_up(operation: Operation, message: str, fault: Fault = Fault.TIMED_OUT) -> None:
    operation.phase, operation.fault, operation.message = Phase.FAILED.value, fault.value, message
    operation.finished, operation.lease_until = timezone.now(), None
    operation.save()
    if operation.instance_id is not None:
        instance = Instance.objects.select_for_update().get(pk=operation.instance_id)
        if operation.kind in (Kind.LAUNCH, Kind.CLONE):
            instance.state = InstanceState.FAILED
        reports.settle_promises(instance)
        instance.save()
    storage_reports.finish(operation, False, {})
    forward_reports.finish(operation, False, {})
    Event.objects.create(
        project=operation.project, user=operation.user, kind="operation.failed", subject=operation.uuid,
        data={"kind": operation.kind, "message": message},
    )  # fmt: skip


def run(publish: Publish, *, pause_seconds: float = 0.5, stop: Callable[[], bool] = lambda: False) -> None:
    """Until ``stop``. A database or a broker that is away is waited for, and told about once."""
    trouble = ""
    next_look = time.monotonic()
    while not stop():
        try:
            close_old_connections()
            health.beat(health.DISPATCHER)
            if peers.publish():
                log.info("the list of workers on other machines has changed")
            busy = schedules.fire() + tick(publish)
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + _BUNDLED_SECONDS
                for said in bundled.ensure_from_afar(PROJECT):
                    log.info("%s", said)
            if trouble:
                log.warning("it works again")
            trouble = ""
        except Exception as error:
            # Whatever is away comes back; the rows wait.
            busy = 0
            if str(error) != trouble:
                trouble = str(error)
                log.error("nothing can be dispatched: %s: %s", type(error).__name__, error)
            time.sleep(2.0)
        if not busy:
            time.sleep(pause_seconds)
