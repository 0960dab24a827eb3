"""Room that is kept for a time: a reservation is granted whole and at once, or refused with the next free slot.

Each is for one instance and is bound to a worker when it is made, so that what fits now still fits then. Owns when room
may be promised for later. Does not own the sums (``admission``, ``intervals``).
"""

from __future__ import annotations

import uuid
from datetime import datetime, timedelta

from django.contrib.auth.models import User
from django.db import transaction
from django.db.models import Q, QuerySet
from django.utils import timezone

from recvirt.nestedcloud.central import admission, audit
from recvirt.nestedcloud.central.admission import Need, Span
from recvirt.nestedcloud.central.intervals import FOREVER, Claim, next_free
from recvirt.nestedcloud.central.models import Instance, Project, Reservation, Schedule, Worker
from recvirt.nestedcloud.central.problems import KeyReused, NoCapacity, QuotaExceeded, Refused
from recvirt.nestedcloud.model import Kind

#: Nothing is promised further ahead.
AHEAD_MAX = timedelta(days=366)
#: As many a project may hold; each one is looked at whenever something is placed.
COUNT_MAX = 500
#: The longest that something missed is still done.
GRACE_MAX_SECONDS = 7 * 86400


def reserve(
    project: Project, user: User | None, begins: datetime, ends: datetime | None, need: Need,
    schedule: Schedule | None = None, worker: Worker | None = None, row_uuid: uuid.UUID | None = None,
) -> Reservation:  # fmt: skip
    """Keep room for ``need``. QuotaExceeded and NoCapacity have ``next_free``: the next beginning that would do.

    ``worker`` is the only one that will do (where an instance is already). ``row_uuid`` is the row's, which is there
    already when the same request came before.
    """
    now = timezone.now()
    if begins > now + AHEAD_MAX:
        raise Refused(f"nothing is reserved more than {AHEAD_MAX.days} days ahead")
    if ends is not None and ends <= max(begins, now):
        raise Refused("a reservation ends after it begins, and later than now")
    span = Span(max(begins, now), ends or FOREVER)
    with transaction.atomic():
        Project.objects.select_for_update().get(pk=project.pk)
        if (before := project.reservations.filter(pk=row_uuid).first()) is not None:
            same = (before.begins, before.ends, before.vcpus, before.memory_bytes, before.disk_bytes)
            if same != (begins, ends, need.vcpus, need.memory_bytes, need.disk_bytes):
                raise KeyReused("this idempotency key stands for another request")
            return before
        if current(project.reservations.all(), now).count() >= COUNT_MAX:
            raise Refused(f"the project holds {COUNT_MAX} reservations already")
        try:
            admission.check_quota(project, need, span)
            if worker is not None:
                admission.check_worker(worker, need, span)
            else:
                worker = admission.place(need, span)
        except (QuotaExceeded, NoCapacity) as refusal:
            length = ends - span.begins if ends is not None and span.begins is not None else None
            slot = next_slot(project, need, begins=max(begins, now), length=length, worker=worker)
            told = (
                f"the next free slot begins {slot:%Y-%m-%d %H:%M:%S} UTC" if slot else "no later time would do either"
            )
            raise type(refusal)(
                f"{refusal.detail}; {told}", **refusal.extra | {"next_free": slot.isoformat() if slot else None}
            ) from None
        row = Reservation.objects.create(
            uuid=row_uuid or uuid.uuid4(), project=project, user=user, worker=worker, schedule=schedule,
            begins=begins, ends=ends,
            instances=need.instances, vcpus=need.vcpus, memory_bytes=need.memory_bytes, disk_bytes=need.disk_bytes,
        )  # fmt: skip
        audit.note(user, "reservation.made", row.uuid, project, begins=begins.isoformat(), vcpus=need.vcpus,
                   ends=ends.isoformat() if ends else None, memory_bytes=need.memory_bytes)  # fmt: skip
        return row


def next_slot(
    project: Project, need: Need, *, begins: datetime, length: timedelta | None, worker: Worker | None = None
) -> datetime | None:
    """The earliest time from ``begins`` on at which the project's quota and one worker both have room."""
    amount = admission.amount_of(need)
    quota = (project.instances_max, project.vcpus_max, project.memory_bytes_max, project.disk_bytes_max)
    mine = admission.claims_of(project)
    workers = [worker] if worker is not None else list(Worker.objects.filter(revoked=False, draining=False))
    found: list[datetime] = []
    for place in workers:
        capacity, claims = admission.amount_of(admission.capacity_of(place)), admission.claims_of(place)
        slot = _both(claims, capacity, mine, quota, amount, begins, length)
        if slot is not None:
            found.append(slot)
    slot = min(found, default=None)
    return slot if slot is not None and slot <= timezone.now() + AHEAD_MAX else None


def _both(
    claims: list[Claim], capacity: tuple[int, ...], mine: list[Claim], quota: tuple[int, ...],
    amount: tuple[int, ...], begins: datetime, length: timedelta | None,
) -> datetime | None:  # fmt: skip
    """The first time that fits both: each answer is where the other one looks on, until they agree."""
    slot: datetime | None = begins
    while slot is not None:
        one = next_free(claims, capacity, amount, slot, length)
        if one is None:
            return None
        two = next_free(mine, quota, amount, one, length)
        if two == one:
            return one
        slot = two
    return None


def current(rows: QuerySet[Reservation], now: datetime) -> QuerySet[Reservation]:
    """Those whose time is not over."""
    return rows.filter(Q(ends=None) | Q(ends__gt=now))


def release(reservation: Reservation, user: User | None) -> None:
    """Give the room back. Refused for one that a schedule holds."""
    with transaction.atomic():
        locked = Reservation.objects.select_for_update().get(pk=reservation.pk)
        if locked.schedule is not None:
            raise Refused(f"the schedule {locked.schedule.name} holds it: remove that", schedule=locked.schedule.name)
        audit.note(user, "reservation.released", locked.uuid, locked.project)
        locked.delete()


def take(project: Project, reservation: uuid.UUID) -> Reservation:
    """Use a reservation up, in the transaction of the launch that it was made for; the project's row is locked."""
    row = project.reservations.select_for_update().filter(pk=reservation, schedule=None).first()
    now = timezone.now()
    if row is None or (row.ends is not None and row.ends <= now):
        raise Refused("there is no such reservation, or its time is over")
    if row.begins > now:
        raise Refused(f"the reservation begins {row.begins:%Y-%m-%d %H:%M:%S} UTC")
    kept = Reservation.objects.get(pk=row.pk)
    row.delete()
    return kept


def pin_end(instance: Instance, user: User | None, ends: datetime) -> Schedule:
    """Delete an instance when the time that it was launched for is over: its room is promised to others then."""
    return Schedule.objects.create(
        project=instance.project, user=user, instance=instance, name=f"end-{instance.uuid}", kind=Kind.DELETE.value,
        begins=ends, next_at=ends, pinned=True, grace_seconds=GRACE_MAX_SECONDS,
    )  # fmt: skip
