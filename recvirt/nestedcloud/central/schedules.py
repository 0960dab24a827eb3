"""Operations at future times: what is due becomes an operation, exactly once, by the dispatcher's loop.

The rules, for a cloud that was away (or an instance that was busy) when something was due:

- Of several things that one schedule has missed, only the last one is done; the others are left out and counted.
- A single moment is done late for as long as its grace lasts (``grace_seconds``); later it is missed, and told.
- A window's beginning is done late for as long as the window lasts; its end is always done, since it frees what the
  window held.
- What is refused for now (the instance is busy, no room) is tried again for the same time.

A ``Firing`` row with a unique key is written in the transaction that makes the operation: a dispatcher that is killed
before the commit has done nothing, one that is killed after it has done it. The order of locks is schedule, project,
instance, worker.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from datetime import datetime, timedelta
from itertools import islice, takewhile
from typing import Any

from django.contrib.auth.models import User
from django.db import DatabaseError, connection, transaction
from django.db.models import Q
from django.utils import timezone
from rest_framework.exceptions import ValidationError
from rest_framework.serializers import Serializer

from recvirt.nestedcloud.central import audit, auth, operations, reservations, serializers
from recvirt.nestedcloud.central.admission import Need
from recvirt.nestedcloud.central.intervals import FOREVER
from recvirt.nestedcloud.central.models import Firing, Instance, InstanceState, Operation, Outcome, Project, Schedule
from recvirt.nestedcloud.central.problems import KeyReused, NoCapacity, OperationActive, QuotaExceeded, Refused
from recvirt.nestedcloud.central.recurrence import Edge, Plan, RecurrenceError
from recvirt.nestedcloud.model import Kind, ModelError

log = logging.getLogger(__name__)

#: What may be scheduled, and the body of the request that it is.
BODIES: Mapping[Kind, type[Serializer[Any]]] = {
    Kind.LAUNCH: serializers.LaunchSerializer,
    Kind.START: serializers.NothingSerializer,
    Kind.STOP: serializers.StopSerializer,
    Kind.REBOOT: serializers.NothingSerializer,
    Kind.SUSPEND: serializers.NothingSerializer,
    Kind.RESUME: serializers.NothingSerializer,
    Kind.DELETE: serializers.NothingSerializer,
    Kind.RESCALE: serializers.RescaleSerializer,
    Kind.SNAPSHOT: serializers.SnapshotSerializer,
    Kind.REVERT: serializers.SnapshotSerializer,
    Kind.SNAPSHOT_REMOVE: serializers.SnapshotSerializer,
}
#: What a window's end does.
END_KINDS: Mapping[Kind, Kind] = {
    Kind.LAUNCH: Kind.DELETE, Kind.START: Kind.STOP, Kind.STOP: Kind.START, Kind.RESUME: Kind.SUSPEND,
    Kind.SUSPEND: Kind.RESUME,
}  # fmt: skip
#: An instance in this state needs no such operation.
_REACHED: Mapping[Kind, str] = {
    Kind.START: InstanceState.ON, Kind.STOP: InstanceState.OFF, Kind.SUSPEND: InstanceState.SUSPENDED,
    Kind.RESUME: InstanceState.ON, Kind.DELETE: InstanceState.DELETED,
}  # fmt: skip
#: Room for launches that come again is kept so far ahead, and for so many of them.
HORIZON = timedelta(days=31)
HORIZON_COUNT = 62
COUNT_MAX = 200
RETRY = timedelta(seconds=10)
_BATCH = 50


def plan_of(schedule: Schedule) -> Plan:
    """When it is due."""
    window = timedelta(seconds=schedule.window_seconds) if schedule.window_seconds else None
    return Plan(schedule.begins, schedule.rule, schedule.zone, window)


def create(project: Project, user: User | None, wish: Mapping[str, Any], key: str | None = None) -> Schedule:
    """A new schedule with ``wish``'s validated fields. Room that it will need is reserved, or it is refused."""
    row_uuid = operations.row_of(project, user, key)
    with transaction.atomic():
        Project.objects.select_for_update().get(pk=project.pk)
        # Before anything is looked at: what was in time when it was asked first may be late now.
        if (before := project.schedules.filter(pk=row_uuid).first()) is not None:
            if (before.name, before.kind, before.begins) != (wish["name"], wish["kind"].value, wish["begins"]):
                raise KeyReused("this idempotency key stands for another request")
            return before
        return _create(project, user, wish, row_uuid)


def _create(project: Project, user: User | None, wish: Mapping[str, Any], row_uuid: uuid.UUID) -> Schedule:
    kind: Kind = wish["kind"]
    instance: Instance | None = wish.get("instance")
    window: timedelta | None = wish["ends"] - wish["begins"] if wish.get("ends") is not None else None
    body = checked_body(project, kind, wish["args"])
    if (instance is None) != (kind is Kind.LAUNCH):
        raise ValidationError({"instance": ["a launch has none, everything else wants one"]})
    if window is not None and kind not in END_KINDS:
        raise ValidationError({"ends": [f"a window is for {', '.join(END_KINDS)}; {kind} is done at a moment"]})
    if kind is Kind.LAUNCH and wish["rule"] and window is None:
        raise ValidationError({"ends": ["a launch that comes again wants a window: there can't be two of a name"]})
    if kind is Kind.LAUNCH and body.get("reservation"):
        raise ValidationError({"args": ["a scheduled launch reserves its own room"]})
    try:
        plan = Plan(wish["begins"], wish["rule"], wish["zone"], window)
        first = _first(plan, timezone.now())
    except RecurrenceError as error:
        raise ValidationError({"rule": [str(error)]}) from None
    if project.schedules.count() >= COUNT_MAX:
        raise Refused(f"the project has {COUNT_MAX} schedules already")
    if project.schedules.filter(name=wish["name"]).exists():
        raise Refused(f"there is a schedule called {wish['name']}")
    schedule = Schedule.objects.create(
        uuid=row_uuid, project=project, user=user, instance=instance, name=wish["name"], kind=kind.value,
        args=wish["args"], begins=wish["begins"], rule=wish["rule"], zone=wish["zone"],
        grace_seconds=wish["grace_seconds"],
        window_seconds=int(window.total_seconds()) if window is not None else None,
        next_at=first.at, next_is_end=not first.begins,
    )  # fmt: skip
    for moment in _to_reserve(schedule, plan, first.at):
        _reserve(schedule, moment, body)
    audit.note(user, "schedule.made", schedule.uuid, project, name=schedule.name, kind=schedule.kind,
               next_at=first.at.isoformat())  # fmt: skip
    return schedule


def checked_body(project: Project, kind: Kind, args: Mapping[str, Any]) -> dict[str, Any]:
    """The validated body of the request that is scheduled."""
    serializer = BODIES[kind](data=dict(args), context={"project": project})
    if not serializer.is_valid():
        raise ValidationError({"args": [serializer.errors]})
    return dict(serializer.validated_data)


def _first(plan: Plan, now: datetime) -> Edge:
    """What is due first: a window that is open now begins at once; what lies behind does not count."""
    first = next(plan.edges())
    if first.at > now:
        return first
    last, _ = plan.last_due(first, now)
    if plan.window is not None and last.begins:
        return last
    after = next(plan.edges(last), None)
    if after is None:
        raise RecurrenceError("all of it lies in the past")
    return after


def _to_reserve(schedule: Schedule, plan: Plan, start: datetime) -> list[datetime]:
    """The beginnings for which room has to be kept."""
    if schedule.kind not in (Kind.LAUNCH, Kind.RESCALE):
        return []
    moments = plan.moments(start - timedelta(microseconds=1))
    if schedule.kind == Kind.RESCALE:
        return list(islice(moments, 1))
    limit = start + HORIZON
    return list(takewhile(lambda moment: moment <= limit or moment == start, islice(moments, HORIZON_COUNT)))


def _reserve(schedule: Schedule, moment: datetime, body: Mapping[str, Any]) -> None:
    window = timedelta(seconds=schedule.window_seconds) if schedule.window_seconds else None
    worker = None
    if schedule.kind == Kind.LAUNCH:
        need = Need(1, body["vcpus_max"], body["memory_max_bytes"], body["disk_bytes"])
    else:
        instance = schedule.instance
        assert instance is not None
        try:
            more = operations.growth_of(instance, operations.args_of(Kind.RESCALE, body)["changes"])
        except ModelError as error:
            raise Refused(str(error)) from None
        need, worker = Need(0, *(max(0, item) for item in (more.vcpus, more.memory_bytes, more.disk_bytes))), None
        worker = instance.worker
        if need == Need():
            return
    ends = moment + window if window is not None else None
    reservations.reserve(schedule.project, schedule.user, moment, ends, need, schedule, worker)


def fire(now: datetime | None = None) -> int:
    """Do what is due; how many schedules that were."""
    count = 0
    while count < _BATCH and (fired := _fire_one(now or timezone.now())) is not None:
        count += 1
        _extend(fired)
    return count


def _fire_one(now: datetime) -> Schedule | None:
    due = Schedule.objects.filter(Q(retry_at=None) | Q(retry_at__lte=now), paused=False, next_at__lte=now)
    if not due.exists():
        return None
    with transaction.atomic():
        skip = connection.features.has_select_for_update_skip_locked
        schedule = due.select_for_update(skip_locked=skip).order_by("next_at").first()
        if schedule is None or schedule.next_at is None:
            return None
        plan = plan_of(schedule)
        edge, left_out = plan.last_due(Edge(schedule.next_at, not schedule.next_is_end), now)
        until = _deadline(schedule, plan, edge)
        if now > until:
            outcome, message, operation = Outcome.MISSED, f"its time was over at {until:%Y-%m-%d %H:%M:%S} UTC", None
        else:
            tried, message, operation = _try(schedule, edge)
            if tried is None:
                schedule.next_at, schedule.next_is_end = edge.at, not edge.begins
                schedule.retry_at = now + RETRY
                schedule.save()
                return schedule
            outcome = tried
        Firing.objects.create(
            schedule=schedule, at=edge.at, is_end=not edge.begins, outcome=outcome, message=message[:2000],
            left_out=left_out, operation=operation,
        )  # fmt: skip
        schedule.reservations.filter(begins__lte=edge.at).delete()
        gone = schedule.instance is not None and schedule.instance.state == InstanceState.DELETED
        following = next(plan.edges(edge), None) if not gone else None
        schedule.next_at = following.at if following is not None else None
        schedule.next_is_end = following is not None and not following.begins
        schedule.retry_at = None
        schedule.save()
        audit.note(
            schedule.user, f"schedule.{outcome}", schedule.uuid, schedule.project, name=schedule.name,
            kind=_kind_of(schedule, edge).value, at=edge.at.isoformat(), message=message, left_out=left_out,
        )  # fmt: skip
        return schedule


def _kind_of(schedule: Schedule, edge: Edge) -> Kind:
    kind = Kind(schedule.kind)
    return kind if edge.begins else END_KINDS[kind]


def _deadline(schedule: Schedule, plan: Plan, edge: Edge) -> datetime:
    if plan.window is None:
        return edge.at + timedelta(seconds=schedule.grace_seconds)
    return edge.at + plan.window if edge.begins else FOREVER


def _try(schedule: Schedule, edge: Edge) -> tuple[Outcome | None, str, Operation | None]:
    """What became of it; no outcome when it is to be tried again. A refusal undoes all but itself."""
    try:
        with transaction.atomic():
            # An end is always done: what it frees is promised to others.
            if edge.begins and not _may(schedule):
                return Outcome.REFUSED, "who made the schedule may not do that in the project any more", None
            if edge.begins and schedule.kind == Kind.LAUNCH and (before := launched_by(schedule)) is not None:
                # The window before this one ended while nobody was there to end it: first that, then this.
                operations.request(before, schedule.user, Kind.DELETE, {})
                return None, "", None
            # Its room was kept for this: it comes back if this is refused.
            schedule.reservations.filter(begins__lte=edge.at).delete()
            if schedule.kind == Kind.LAUNCH:
                return _launch(schedule, edge) if edge.begins else _end_launch(schedule)
            assert schedule.instance is not None
            return _ask(schedule, schedule.instance, _kind_of(schedule, edge), schedule.args if edge.begins else {})
    except (OperationActive, NoCapacity, QuotaExceeded) as error:
        return None, str(error.detail), None
    except (Refused, ValidationError) as error:
        return Outcome.REFUSED, str(error.detail), None
    except DatabaseError:
        raise
    except Exception as error:
        # One that can't be done must not hold up the others.
        log.exception("the schedule %s", schedule.uuid)
        return Outcome.REFUSED, f"it can't be done: {type(error).__name__}", None


def _may(schedule: Schedule) -> bool:
    if schedule.pinned:
        return True
    user = schedule.user
    return user is not None and user.is_active and auth.is_operator(auth.role_in(user, schedule.project))


def _ask(
    schedule: Schedule, instance: Instance, kind: Kind, args: Mapping[str, Any]
) -> tuple[Outcome, str, Operation | None]:
    instance.refresh_from_db()
    if _REACHED.get(kind) == instance.state:
        return Outcome.NOT_NEEDED, f"{instance.name} is {instance.state} already", None
    body = operations.args_of(kind, checked_body(schedule.project, kind, args))
    return Outcome.ASKED, "", operations.request(instance, schedule.user, kind, body)


def launched_by(schedule: Schedule) -> Instance | None:
    """The instance that a schedule has launched and that is still there."""
    asked = Operation.objects.filter(firings__schedule=schedule, kind=Kind.LAUNCH.value).values("instance")
    return Instance.objects.filter(pk__in=asked).exclude(state=InstanceState.DELETED).first()


def _launch(schedule: Schedule, edge: Edge) -> tuple[Outcome, str, Operation | None]:
    window = timedelta(seconds=schedule.window_seconds) if schedule.window_seconds else None
    wish = checked_body(schedule.project, Kind.LAUNCH, schedule.args)
    wish.setdefault("networks", [operations.default_network(schedule.project)])
    until = edge.at + window if window is not None else None
    return Outcome.ASKED, "", operations.launch(schedule.project, schedule.user, wish, until=until)


def _end_launch(schedule: Schedule) -> tuple[Outcome, str, Operation | None]:
    if (instance := launched_by(schedule)) is None:
        return Outcome.NOT_NEEDED, "there is no instance any more", None
    return _ask(schedule, instance, Kind.DELETE, {})


def _extend(schedule: Schedule) -> None:
    """Keep room for later launches of one that comes again. What can't be kept is told, and tried when it is due."""
    if schedule.kind != Kind.LAUNCH or not schedule.rule or schedule.next_at is None or schedule.retry_at is not None:
        return
    held = set(schedule.reservations.values_list("begins", flat=True))
    start = next(plan_of(schedule).moments(schedule.next_at - timedelta(microseconds=1)), None)
    if start is None:
        return
    try:
        body = checked_body(schedule.project, Kind.LAUNCH, schedule.args)
        for moment in _to_reserve(schedule, plan_of(schedule), start):
            if moment not in held:
                _reserve(schedule, moment, body)
    except (Refused, ValidationError) as error:
        audit.note(schedule.user, "schedule.not-reserved", schedule.uuid, schedule.project, name=schedule.name,
                   message=str(error.detail))  # fmt: skip


def pause(schedule: Schedule, user: User | None, paused: bool) -> Schedule:
    """Let nothing be due for a while, or go on. What was due in a pause is left out, but an open window begins."""
    with transaction.atomic():
        locked = _changeable(schedule)
        if paused:
            _refuse_held(locked)
        if locked.paused != paused:
            locked.paused, locked.retry_at = paused, None
            if not paused and locked.next_at is not None:
                _skip_to_now(locked)
            locked.save()
            audit.note(user, "schedule.paused" if paused else "schedule.resumed", locked.uuid, locked.project,
                       name=locked.name)  # fmt: skip
        return locked


def _skip_to_now(schedule: Schedule) -> None:
    now, plan = timezone.now(), plan_of(schedule)
    assert schedule.next_at is not None
    edge, _ = plan.last_due(Edge(schedule.next_at, not schedule.next_is_end), now)
    if edge.at <= now and plan.window is None:
        following = next(plan.edges(edge), None)
        schedule.next_at = following.at if following is not None else None
        schedule.reservations.filter(begins__lte=edge.at).delete()
    else:
        schedule.next_at, schedule.next_is_end = edge.at, not edge.begins


def remove(schedule: Schedule, user: User | None) -> None:
    """Forget a schedule and the room kept for it. Refused while something that it launched waits for its end."""
    with transaction.atomic():
        locked = _changeable(schedule)
        _refuse_held(locked)
        audit.note(user, "schedule.removed", locked.uuid, locked.project, name=locked.name)
        locked.delete()


def _refuse_held(schedule: Schedule) -> None:
    if schedule.window_seconds and (instance := launched_by(schedule)) is not None:
        raise Refused(
            f"it ends {instance.name}, whose room is promised to others then: delete that first",
            instance=instance.name,
        )


def _changeable(schedule: Schedule) -> Schedule:
    locked = Schedule.objects.select_for_update().get(pk=schedule.pk)
    instance = locked.instance
    if (
        locked.pinned
        and instance is not None
        and instance.state != InstanceState.DELETED
        and locked.next_at is not None
    ):
        raise Refused(
            f"it ends {instance.name}, whose room is promised to others then: delete that instead",
            instance=instance.name,
        )
    return locked
