"""What workers say changes rows here, and only here. Every report may come late, twice, or from somebody else.

Owns how an operation ends and what an instance then is, and what follows from heartbeats.
"""

from __future__ import annotations

import logging
import uuid
from datetime import timedelta

from django.conf import settings
from django.db import transaction
from django.db.models import Q
from django.utils import timezone

from recvirt.nestedcloud.central import addressing, forward_reports, storage_reports
from recvirt.nestedcloud.central.models import (
    ACTIVE_PHASES,
    Event,
    Instance,
    InstanceState,
    Operation,
    Worker,
)
from recvirt.nestedcloud.model import (
    DomainFacts,
    Heartbeat,
    Kind,
    ModelError,
    Phase,
    Power,
    Report,
    check_uuid,
    decode,
    encode,
)

log = logging.getLogger(__name__)

#: After so many attempts without an answer an operation has failed.
ATTEMPTS_MAX = 10
#: What is said of a removal that no worker can carry out: what was there need not count against anybody.
FORGOTTEN = "its worker was revoked: the cloud has forgotten it, and on the worker nothing was done"
_STATE_OF_POWER = {
    Power.RUNNING: InstanceState.ON, Power.STOPPED: InstanceState.OFF, Power.SUSPENDED: InstanceState.SUSPENDED,
    Power.CRASHED: InstanceState.FAILED, Power.ABSENT: InstanceState.FAILED,
}  # fmt: skip
#: What these leave an instance's power as, they meant to.
_MEANS_POWER = (
    Kind.LAUNCH, Kind.CLONE, Kind.START, Kind.STOP, Kind.REBOOT, Kind.SUSPEND, Kind.RESUME, Kind.REVERT, Kind.DELETE,
)  # fmt: skip


def apply(report: Report) -> bool:
    """Write a report down; False when it changes nothing any more."""
    with transaction.atomic():
        operation = Operation.objects.select_for_update().filter(pk=report.operation).first()
        if operation is None or str(operation.worker_id) != report.worker:
            log.warning("a report on %s by %s, who was not asked", report.operation, report.worker)
            return False
        if operation.worker is not None and operation.worker.revoked:
            log.warning("a report on %s by %s, who was revoked", report.operation, report.worker)
            return False
        # An attempt that was given up may yet succeed, and then it has; but only the last one may fail.
        stale = report.attempt < operation.attempt and report.phase is not Phase.SUCCEEDED
        if stale or (operation.is_final and not _was_given_up(operation, report)):
            return False
        now = timezone.now()
        operation.phase = report.phase.value
        operation.progress = max(0, min(100, report.progress))
        operation.message = report.message[:2000]
        operation.started = operation.started or now
        operation.lease_until = now + timedelta(seconds=settings.CONFIG.lease_seconds)
        if report.phase.is_final:
            _end(operation, report)
        else:
            operation.save()
        return True


def _end(operation: Operation, report: Report) -> None:
    operation.finished, operation.lease_until = timezone.now(), None
    operation.fault = report.fault.value if report.fault else ""
    operation.facts = dict(report.facts)
    _finish(operation, report)
    storage_reports.finish(operation, report.phase is Phase.SUCCEEDED, report.facts)
    forward_reports.finish(operation, report.phase is Phase.SUCCEEDED, report.facts)
    operation.save()
    Event.objects.create(
        project=operation.project, user=operation.user, kind=f"operation.{operation.phase}",
        subject=operation.uuid, data={"kind": operation.kind, "message": operation.message},
    )  # fmt: skip


def settle(operation: Operation, why: str) -> None:
    """End what no worker has to carry out, or can any more, as if it had been. Called in the transaction that makes the
    operation.
    """
    operation.phase, operation.progress, operation.message = Phase.SUCCEEDED.value, 100, why
    facts: dict[str, object] = {}
    if operation.kind == Kind.DETACH and operation.instance is not None:
        seen = operation.instance
        domain = DomainFacts(str(seen.pk), Power(seen.power), seen.generation)
        facts = {"attached": False, "domain": encode(domain)}
    _end(operation, Report(str(operation.pk), 0, str(operation.worker_id), Phase.SUCCEEDED, facts=facts))


def _was_given_up(operation: Operation, report: Report) -> bool:
    """Whether an operation that nobody answered for has been done all the same, and nothing was asked for since."""
    if report.phase is not Phase.SUCCEEDED or operation.phase != Phase.FAILED or operation.attempt <= ATTEMPTS_MAX:
        return False
    things = ((name, getattr(operation, f"{name}_id")) for name in ("instance", "volume", "image"))
    same = [Q(**{f"{name}_id": key}) for name, key in things if key is not None]
    later = Operation.objects.filter(created__gt=operation.created)
    return not any(later.filter(condition).exists() for condition in same)


def settle_promises(instance: Instance) -> None:
    """What an instance is promised is what it is, when nothing is being done to it."""
    instance.promised_vcpus = instance.vcpus_max
    instance.promised_memory_bytes = instance.memory_max_bytes
    instance.promised_disk_bytes = instance.disk_bytes


def _finish(operation: Operation, report: Report) -> None:
    if operation.instance_id is None:
        return
    instance = Instance.objects.select_for_update().get(pk=operation.instance_id)
    kind = Kind(operation.kind)
    if report.phase is Phase.SUCCEEDED:
        for name, value in operation.args.get("changes", {}).items():
            setattr(instance, name, value)
        if isinstance(report.facts.get("snapshots"), list):
            instance.snapshots = report.facts["snapshots"]
    elif kind in (Kind.LAUNCH, Kind.CLONE):
        instance.state = InstanceState.FAILED
    settle_promises(instance)
    if report.phase is Phase.SUCCEEDED:
        if kind is Kind.DELETE:
            instance.state, instance.power = InstanceState.DELETED, Power.ABSENT.value
            addressing.release(instance)
        else:
            _see_after(instance, kind, _domain_of(report))
    instance.power_seen = timezone.now()
    instance.save()


def _domain_of(report: Report) -> DomainFacts | None:
    data = report.facts.get("domain")
    try:
        return decode(DomainFacts, data) if data is not None else None
    except ModelError as error:
        log.warning("report on %s: %s", report.operation, error)
        return None


def _see_after(instance: Instance, kind: Kind, domain: DomainFacts | None) -> None:
    running = domain is not None and domain.power is Power.RUNNING
    if kind not in _MEANS_POWER and instance.state == InstanceState.ON and not running:
        return  # it went off by itself, or with its host: a heartbeat tells which, and what follows from it
    _see(instance, domain)


def _see(instance: Instance, domain: DomainFacts | None) -> None:
    power = domain.power if domain is not None else Power.ABSENT
    instance.power = power.value
    if power in _STATE_OF_POWER:
        instance.state = _STATE_OF_POWER[power]


def heard(beat: Heartbeat) -> list[str]:
    """Write a heartbeat down, and what follows from it. Returns the domains that nobody here knows.

    A guest that powered off by itself is off. One that ran when its host went down is started again: its owner did not
    ask for it to stop.
    """
    with transaction.atomic():
        worker = Worker.objects.select_for_update().filter(pk=beat.worker, revoked=False).first()
        if worker is None:
            log.warning("a heartbeat of %s, who is no worker here", beat.worker)
            return []
        restarted = bool(worker.boot_id) and worker.boot_id != beat.boot_id
        worker.last_seen = timezone.now()
        worker.vcpus, worker.memory_bytes, worker.disk_bytes = beat.vcpus, beat.memory_bytes, beat.disk_bytes
        worker.features, worker.protocol = dict(beat.features), beat.protocol
        worker.pool = _pool_of(beat)
        # What was made before workers said so.
        worker.volumes.filter(pool="").update(pool=worker.pool)
    domains = {domain.uuid: domain for domain in beat.domains}
    known = set()
    passed_over = False
    addressing.seen(worker, beat.addresses)
    for key in Instance.objects.filter(worker_id=beat.worker).values_list("uuid", flat=True):
        known.add(str(key))
        passed_over |= not _compare(key, domains.get(str(key)), restarted)
    # Only now, and only when all were looked at: before that, the next heartbeat finds the restart once more.
    if not (restarted and passed_over):
        worker.boot_id = beat.boot_id
    # Not the whole row: an administrator may have changed it meanwhile.
    worker.save(update_fields=[
        "last_seen", "vcpus", "memory_bytes", "disk_bytes", "features", "protocol", "boot_id", "pool",
    ])  # fmt: skip
    return sorted(set(domains) - known)


def _pool_of(beat: Heartbeat) -> str:
    """Which folder a worker's disks are in, as it says; nothing when it makes no sense."""
    try:
        return check_uuid(str(beat.features.get("pool", "")))
    except ModelError:
        return ""


def _compare(key: uuid.UUID, domain: DomainFacts | None, restarted: bool) -> bool:
    """Take over what a heartbeat says of an instance; False when that has to wait."""
    with transaction.atomic():
        instance = Instance.objects.select_for_update().get(pk=key)
        if instance.operations.filter(phase__in=ACTIVE_PHASES).exists():
            return False  # its report will tell
        settled = timezone.now() - timedelta(seconds=2 * settings.CONFIG.heartbeat_seconds)
        if instance.power_seen is not None and instance.power_seen > settled:
            return False  # the heartbeat may be older than the operation that has just ended
        power = domain.power if domain is not None else Power.ABSENT
        if instance.state in (InstanceState.DELETED, InstanceState.NEW, InstanceState.FAILED):
            if power.value != instance.power:
                instance.power = power.value
                instance.save(update_fields=["power"])
            return True
        was_on = instance.state == InstanceState.ON
        if restarted and was_on and power is not Power.RUNNING:
            _start_again(instance)
        elif power.value != instance.power or _STATE_OF_POWER.get(power, instance.state) != instance.state:
            _see(instance, domain)
            Event.objects.create(
                project=instance.project, kind="instance.power", subject=instance.uuid,
                data={"name": instance.name, "power": power.value, "state": instance.state},
            )  # fmt: skip
        instance.save()
        return True


def _start_again(instance: Instance) -> None:
    instance.generation += 1
    instance.power = Power.STOPPED.value
    operation = Operation.objects.create(
        project=instance.project, instance=instance, worker=instance.worker, kind=Kind.START.value,
        generation=instance.generation, message="its host was started anew",
    )  # fmt: skip
    Event.objects.create(
        project=instance.project, kind="operation.queued", subject=operation.uuid,
        data={"kind": Kind.START.value, "instance": str(instance.uuid), "name": instance.name, "why": "host restarted"},
    )  # fmt: skip
