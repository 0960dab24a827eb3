"""Whether there is room: the project's quota, and a worker that can hold what was promised to all.

Called inside the transaction that makes the promise, with the rows that it counts locked.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from django.db.models import Q, Sum
from django.utils import timezone

from recvirt.nestedcloud.central.intervals import FOREVER, Amount, Claim, peak
from recvirt.nestedcloud.central.models import InstanceState, Project, Worker
from recvirt.nestedcloud.central.problems import NoCapacity, QuotaExceeded

#: A vCPU waits most of the time; memory does not, so it is never promised twice.
VCPUS_PER_CPU = 4
#: For the host itself.
MEMORY_RESERVE_BYTES = 512 * 1024**2
#: An instance whose time is over is taken for gone after so long.
OVERDUE = timedelta(minutes=5)
_MANY = 2**62
LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Need:
    """What an instance is promised: its maxima, since it may take them at any time."""

    instances: int = 0
    vcpus: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True)
class Span:
    """The time for which something is promised: from now on if it has no beginning."""

    begins: datetime | None = None
    ends: datetime = FOREVER


NOW_ON = Span()


def amount_of(need: Need) -> Amount:
    """For the arithmetic of intervals."""
    return need.instances, need.vcpus, need.memory_bytes, need.disk_bytes


def claims_of(owner: Project | Worker) -> list[Claim]:
    """What is promised in a project or on a worker: by instances, volumes and images from now on, by reservations in
    their time.
    """
    now = timezone.now()
    claims = []
    for vcpus, memory, disk, until in owner.instances.exclude(state=InstanceState.DELETED).values_list(
        "promised_vcpus", "promised_memory_bytes", "promised_disk_bytes", "promised_until"
    ):
        # One that is overdue is being deleted; it is there until it is gone.
        ends = FOREVER if until is None else max(until, now + OVERDUE)
        claims.append(Claim(LONG_AGO, ends, (1, vcpus, memory, disk)))
    if stored := storage_bytes(owner):
        claims.append(Claim(LONG_AGO, FOREVER, (0, 0, 0, stored)))
    for row in owner.reservations.filter(Q(ends=None) | Q(ends__gt=now)):
        amount = (row.instances, row.vcpus, row.memory_bytes, row.disk_bytes)
        claims.append(Claim(row.begins, row.ends or FOREVER, amount))
    return claims


def storage_bytes(owner: Project | Worker) -> int:
    """Bytes promised to the volumes and images of a project, or on a worker."""
    volumes = owner.volumes.aggregate(total=Sum("promised_bytes"))["total"] or 0
    images = owner.images.aggregate(total=Sum("promised_bytes"))["total"] or 0
    return int(volumes) + int(images)


def promised(owner: Project | Worker, span: Span) -> Need:
    """The most that is promised at one time within a span."""
    begins = span.begins or timezone.now()
    return Need(*peak(claims_of(owner), begins, span.ends, 4))


def check_quota(project: Project, need: Need, span: Span = NOW_ON) -> None:
    """QuotaExceeded says which quota, how much of it is used, and how much was asked for."""
    locked = Project.objects.select_for_update().get(pk=project.pk)
    used = promised(locked, span)
    for what in ("instances", "vcpus", "memory_bytes", "disk_bytes"):
        limit, taken, wanted = getattr(locked, f"{what}_max"), getattr(used, what), getattr(need, what)
        if wanted > 0 and taken + wanted > limit:
            raise QuotaExceeded(
                f"the quota of {what} is {limit}: {taken} are used, {wanted} more are wanted", quota=what, limit=limit,
                used=taken, wanted=wanted,
            )  # fmt: skip


def place(need: Need, span: Span = NOW_ON) -> Worker:
    """The worker with the most memory left that has room. NoCapacity says what the fullest answer would have been.

    One that is away now may be promised for later.
    """
    best: tuple[int, Worker] | None = None
    reasons = []
    for worker in Worker.objects.select_for_update().order_by("name"):
        reason, left = _room(worker, need, span)
        if reason:
            reasons.append(f"{worker.name}: {reason}")
        elif best is None or left > best[0]:
            best = left, worker
    if best is None:
        raise NoCapacity("no worker has room: " + ("; ".join(reasons) or "there is none"))
    return best[1]


def check_worker(worker: Worker, need: Need, span: Span = NOW_ON) -> None:
    """NoCapacity unless this worker has room for so much more."""
    reason, _ = _room(Worker.objects.select_for_update().get(pk=worker.pk), need, span)
    if reason:
        raise NoCapacity(f"{worker.name} has no room: {reason}")


def place_bytes(wanted_bytes: int) -> Worker:
    """The worker with the most disk left that was not promised away. NoCapacity says why there is none."""
    best: tuple[int, Worker] | None = None
    reasons = []
    for worker in Worker.objects.select_for_update().order_by("name"):
        reason, left = _room_for_bytes(worker, wanted_bytes)
        if reason:
            reasons.append(f"{worker.name}: {reason}")
        elif best is None or left > best[0]:
            best = left, worker
    if best is None:
        raise NoCapacity("no worker has room: " + ("; ".join(reasons) or "there is none"))
    return best[1]


def check_worker_bytes(worker: Worker, wanted_bytes: int) -> Worker:
    """The worker, locked. NoCapacity unless it has so much disk left."""
    # Those that share its disks are locked as well, in one order: what is promised on any of them counts.
    rows = Worker.objects.select_for_update().filter(Q(pk=worker.pk) | _mates(worker)).order_by("name")
    locked = next(row for row in rows if row.pk == worker.pk)
    reason, _ = _room_for_bytes(locked, wanted_bytes)
    if reason:
        raise NoCapacity(f"{worker.name} has no room: {reason}")
    return locked


def _mates(worker: Worker) -> Q:
    """Who has its disks in the same folder, whether it may still use them or not."""
    return Q(pool=worker.pool) & ~Q(pool="") & ~Q(pk=worker.pk)


def _room_for_bytes(worker: Worker, wanted_bytes: int) -> tuple[str, int]:
    if worker.revoked or not worker.is_up:
        return "it is away", 0
    if worker.draining:
        return "it is being emptied", 0
    sharing = (worker, *Worker.objects.filter(_mates(worker)))
    left = worker.disk_bytes - sum(promised(each, NOW_ON).disk_bytes for each in sharing) - wanted_bytes
    return (f"{-left} bytes of disk too few", left) if left < 0 else ("", left)


def capacity_of(worker: Worker) -> Need:
    """What may be promised on a worker. Instances and disks are bounded by quotas."""
    return Need(_MANY, worker.vcpus * VCPUS_PER_CPU, max(0, worker.memory_bytes - MEMORY_RESERVE_BYTES), _MANY)


def _room(worker: Worker, need: Need, span: Span) -> tuple[str, int]:
    """Why there is none (or nothing), and the bytes of memory that would be left."""
    if worker.revoked or (span.begins is None and not worker.is_up):
        return "it is away", 0
    if worker.draining:
        return "it is being emptied", 0
    used, capacity = promised(worker, span), capacity_of(worker)
    vcpus = capacity.vcpus - used.vcpus - need.vcpus
    memory = capacity.memory_bytes - used.memory_bytes - need.memory_bytes
    if vcpus < 0:
        return f"{-vcpus} vCPUs too few", memory
    if memory < 0:
        return f"{-memory} bytes of memory too few", memory
    return "", memory
