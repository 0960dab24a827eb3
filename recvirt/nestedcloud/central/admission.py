"""Whether there is room: the project's quota, and a worker that can hold what was promised to all.

Called inside the transaction that makes the promise, with the rows that it counts locked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from django.db.models import QuerySet, Sum

from recvirt.nestedcloud.central.models import Instance, InstanceState, Project, Worker
from recvirt.nestedcloud.central.problems import NoCapacity, QuotaExceeded

#: A vCPU waits most of the time; memory does not, so it is never promised twice.
VCPUS_PER_CPU = 4
#: For the host itself.
MEMORY_RESERVE_BYTES = 512 * 1024**2


@dataclass(frozen=True)
class Need:
    """What an instance is promised: its maxima, since it may take them at any time."""

    instances: int = 0
    vcpus: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0


def _promised(instances: QuerySet[Instance]) -> Need:
    found = instances.exclude(state=InstanceState.DELETED).aggregate(
        vcpus=Sum("promised_vcpus"), memory=Sum("promised_memory_bytes"), disk=Sum("promised_disk_bytes")
    )
    count = instances.exclude(state=InstanceState.DELETED).count()
    return Need(count, found["vcpus"] or 0, found["memory"] or 0, found["disk"] or 0)


def storage_bytes(owner: Project | Worker) -> int:
    """Bytes promised to the volumes and images of a project, or on a worker."""
    volumes = owner.volumes.aggregate(total=Sum("promised_bytes"))["total"] or 0
    images = owner.images.aggregate(total=Sum("promised_bytes"))["total"] or 0
    return int(volumes) + int(images)


def check_quota(project: Project, need: Need) -> None:
    """QuotaExceeded says which quota, how much of it is used, and how much was asked for."""
    locked = Project.objects.select_for_update().get(pk=project.pk)
    used = _promised(locked.instances.all())
    used = replace(used, disk_bytes=used.disk_bytes + storage_bytes(locked))
    for what in ("instances", "vcpus", "memory_bytes", "disk_bytes"):
        limit, taken, wanted = getattr(locked, f"{what}_max"), getattr(used, what), getattr(need, what)
        if wanted > 0 and taken + wanted > limit:
            raise QuotaExceeded(
                f"the quota of {what} is {limit}: {taken} are used, {wanted} more are wanted", quota=what, limit=limit,
                used=taken, wanted=wanted,
            )  # fmt: skip


def place(need: Need) -> Worker:
    """The worker with the most memory left that has room. NoCapacity says what the fullest answer would have been."""
    best: tuple[int, Worker] | None = None
    reasons = []
    for worker in Worker.objects.select_for_update().order_by("name"):
        reason, left = _room(worker, need)
        if reason:
            reasons.append(f"{worker.name}: {reason}")
        elif best is None or left > best[0]:
            best = left, worker
    if best is None:
        raise NoCapacity("no worker has room: " + ("; ".join(reasons) or "there is none"))
    return best[1]


def check_worker(worker: Worker, need: Need) -> None:
    """NoCapacity unless this worker has room for so much more."""
    reason, _ = _room(Worker.objects.select_for_update().get(pk=worker.pk), need)
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


def check_worker_bytes(worker: Worker, wanted_bytes: int) -> None:
    """NoCapacity unless this worker has so much disk left."""
    reason, _ = _room_for_bytes(Worker.objects.select_for_update().get(pk=worker.pk), wanted_bytes)
    if reason:
        raise NoCapacity(f"{worker.name} has no room: {reason}")


def _room_for_bytes(worker: Worker, wanted_bytes: int) -> tuple[str, int]:
    if worker.revoked or not worker.is_up:
        return "it is away", 0
    if worker.draining:
        return "it is being emptied", 0
    used = _promised(worker.instances.all()).disk_bytes + storage_bytes(worker)
    left = worker.disk_bytes - used - wanted_bytes
    return (f"{-left} bytes of disk too few", left) if left < 0 else ("", left)


def _room(worker: Worker, need: Need) -> tuple[str, int]:
    """Why there is none (or nothing), and the bytes of memory that would be left."""
    if worker.revoked or not worker.is_up:
        return "it is away", 0
    if worker.draining:
        return "it is being emptied", 0
    used = _promised(worker.instances.all())
    vcpus = worker.vcpus * VCPUS_PER_CPU - used.vcpus - need.vcpus
    memory = worker.memory_bytes - MEMORY_RESERVE_BYTES - used.memory_bytes - need.memory_bytes
    if vcpus < 0:
        return f"{-vcpus} vCPUs too few", memory
    if memory < 0:
        return f"{-memory} bytes of memory too few", memory
    return "", memory
