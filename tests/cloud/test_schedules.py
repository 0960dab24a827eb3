"""Operations at future times: fired once, late, missed, refused; and room that is promised ahead."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from django.utils import timezone
from rest_framework.exceptions import ValidationError

from recvirt.nestedcloud.central import audit, dispatcher, operations, reservations, schedules
from recvirt.nestedcloud.central.admission import Need
from recvirt.nestedcloud.central.models import (
    Event,
    Firing,
    Instance,
    Membership,
    Operation,
    Reservation,
    Schedule,
    Worker,
)
from recvirt.nestedcloud.central.problems import NoCapacity, QuotaExceeded, Refused
from recvirt.nestedcloud.model import GIB, MIB, Kind, Power
from tests.cloud.conftest import Cloud, make_worker
from tests.cloud.test_operations import finish, launched, wish

HOUR = timedelta(hours=1)
BODY = {"name": "batch", "image": "tiny", "memory_bytes": 4 * GIB, "memory_max_bytes": 8 * GIB}


def soon(**delta: float) -> datetime:
    return timezone.now().replace(microsecond=0) + timedelta(**(delta or {"hours": 1}))


def schedule(cloud: Cloud, kind: Kind, instance: Instance | None = None, **changes: Any) -> Schedule:
    values: dict[str, Any] = {
        "name": f"s-{kind}", "kind": kind, "instance": instance, "args": {}, "begins": soon(), "ends": None, "rule": "",
        "zone": "UTC", "grace_seconds": 600,
    }  # fmt: skip
    return schedules.create(cloud.project, cloud.user, {**values, **changes})


def fired(now: datetime) -> list[Firing]:
    before = set(Firing.objects.values_list("pk", flat=True))
    schedules.fire(now)
    return list(Firing.objects.exclude(pk__in=before).order_by("at"))


def only(now: datetime) -> Firing:
    (found,) = fired(now)
    return found


def active() -> Operation:
    found: Operation = Operation.objects.get(finished=None)
    return found


def test_nothing_is_due_before_its_time_and_then_once(cloud: Cloud) -> None:
    row = schedule(cloud, Kind.STOP, launched(cloud), args={"graceful_seconds": 5})
    assert row.next_at is not None and fired(row.next_at - timedelta(seconds=1)) == []
    firing = only(row.next_at)
    assert (firing.outcome, firing.operation) == ("asked", active())
    assert active().kind == "stop" and active().args == {"graceful_seconds": 5.0}
    assert active().user == cloud.user
    assert fired(row.next_at) == []
    row.refresh_from_db()
    assert row.next_at is None


def test_a_dispatcher_killed_before_the_commit_has_done_nothing(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    row = schedule(cloud, Kind.STOP, launched(cloud))

    class Killed(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    assert row.next_at is not None
    with monkeypatch.context() as patch:
        patch.setattr(audit, "note", die)
        with pytest.raises(Killed):
            schedules.fire(row.next_at)
    assert not Firing.objects.exists() and not Operation.objects.filter(finished=None).exists()
    assert only(row.next_at).outcome == "asked"


def test_a_busy_instance_is_tried_again_within_the_grace(cloud: Cloud) -> None:
    instance = launched(cloud)
    row = schedule(cloud, Kind.STOP, instance)
    busy = operations.request(instance, cloud.user, Kind.REBOOT, {})
    assert row.next_at is not None and fired(row.next_at) == []
    # Not at every turn of the loop.
    finish(busy)
    assert fired(row.next_at + timedelta(seconds=1)) == []
    assert only(row.next_at + schedules.RETRY).outcome == "asked"


def test_what_stays_busy_too_long_is_missed_and_told(cloud: Cloud) -> None:
    instance = launched(cloud)
    row = schedule(cloud, Kind.STOP, instance)
    operations.request(instance, cloud.user, Kind.REBOOT, {})
    assert row.next_at is not None and fired(row.next_at) == []
    assert only(row.next_at + timedelta(seconds=601)).outcome == "missed"
    event = Event.objects.get(kind="schedule.missed")
    assert event.data["name"] == row.name and "its time was over" in event.data["message"]


def test_of_several_missed_only_the_last_one_is_done(cloud: Cloud) -> None:
    row = schedule(cloud, Kind.SNAPSHOT, launched(cloud), args={"snapshot": "s"}, rule="FREQ=HOURLY")
    firing = only(row.begins + 5 * HOUR + timedelta(minutes=2))
    assert (firing.at, firing.left_out, firing.outcome) == (row.begins + 5 * HOUR, 5, "asked")
    row.refresh_from_db()
    assert row.next_at == row.begins + 6 * HOUR


def test_later_than_its_grace_it_is_skipped(cloud: Cloud) -> None:
    row = schedule(cloud, Kind.REBOOT, launched(cloud), rule="FREQ=HOURLY", grace_seconds=60)
    firing = only(row.begins + timedelta(seconds=61))
    assert (firing.outcome, firing.operation) == ("missed", None)


def test_a_window_is_on_from_to(cloud: Cloud) -> None:
    instance = launched(cloud)
    finish(operations.request(instance, cloud.user, Kind.STOP, {}), Power.STOPPED)
    row = schedule(cloud, Kind.START, instance, ends=soon(hours=3), rule="FREQ=DAILY")
    # Late, and the window is still open: far beyond the grace.
    assert only(row.begins + HOUR).outcome == "asked"
    finish(active())
    assert only(row.begins + 2 * HOUR).operation == active() and active().kind == "stop"
    finish(active(), Power.STOPPED)
    # A cloud that comes back after the end of the next day's window has only to stop what is stopped already.
    firing = only(row.begins + timedelta(days=1, hours=7))
    assert (firing.is_end, firing.left_out, firing.outcome) == (True, 1, "not-needed")


def test_a_window_that_is_open_when_it_is_made_begins_at_once(cloud: Cloud) -> None:
    instance = launched(cloud)
    finish(operations.request(instance, cloud.user, Kind.STOP, {}), Power.STOPPED)
    schedule(cloud, Kind.START, instance, begins=soon(hours=-1), ends=soon(hours=1))
    assert only(timezone.now()).outcome == "asked"


@pytest.mark.parametrize(
    ("kind", "changes", "field"),
    [
        (Kind.REBOOT, {"begins": soon(hours=-1)}, "rule"),
        (Kind.REBOOT, {"ends": soon(hours=2)}, "ends"),
        (Kind.RESCALE, {"args": {}}, "args"),
        (Kind.RESCALE, {"args": {"vcpus": 0}}, "args"),
        (Kind.STOP, {"args": {"seconds": 1}}, "args"),
        (Kind.STOP, {"rule": "FREQ=SECONDLY"}, "rule"),
        (Kind.STOP, {"zone": "Mars/Olympus"}, "rule"),
        (Kind.STOP, {"instance": None}, "instance"),
        (Kind.LAUNCH, {"args": BODY}, "instance"),
        (Kind.LAUNCH, {"args": BODY, "instance": None, "rule": "FREQ=DAILY"}, "ends"),
        (Kind.LAUNCH, {"args": {**BODY, "name": "../x"}, "instance": None}, "args"),
    ],
)
def test_a_schedule_that_can_t_be_is_refused(cloud: Cloud, kind: Kind, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        schedule(cloud, kind, **{"instance": launched(cloud), **changes})
    assert isinstance(caught.value.detail, dict) and list(caught.value.detail) == [field]
    assert not Schedule.objects.exists()


def test_who_lost_the_role_has_nothing_done_any_more(cloud: Cloud) -> None:
    row = schedule(cloud, Kind.STOP, launched(cloud))
    Membership.objects.update(role="reader")
    firing = only(row.begins)
    assert (firing.outcome, firing.operation) == ("refused", None) and "may not do that" in firing.message


@pytest.mark.parametrize("change", [{"is_active": False}, {"delete": True}])
def test_who_was_locked_out_has_nothing_done_either(cloud: Cloud, change: dict[str, bool]) -> None:
    row = schedule(cloud, Kind.STOP, launched(cloud))
    if change.pop("delete", False):
        cloud.user.delete()
    else:
        type(cloud.user).objects.update(**change)
    assert only(row.begins).outcome == "refused"


def test_one_that_breaks_does_not_hold_up_the_others(cloud: Cloud) -> None:
    one, two = launched(cloud), launched(cloud, name="two")
    broken = schedule(cloud, Kind.STOP, one, name="a")
    Schedule.objects.filter(pk=broken.pk).update(args=["no body"])
    schedule(cloud, Kind.STOP, two, name="b", begins=broken.begins)
    assert {firing.schedule.name: firing.outcome for firing in fired(broken.begins)} == {"a": "refused", "b": "asked"}


def test_pausing_leaves_out_what_was_due(cloud: Cloud) -> None:
    row = schedule(cloud, Kind.REBOOT, launched(cloud), rule="FREQ=HOURLY")
    schedules.pause(row, cloud.user, True)
    assert fired(row.begins + HOUR) == []
    Schedule.objects.update(begins=row.begins - 5 * HOUR, next_at=row.begins - 5 * HOUR)
    assert schedules.pause(row, cloud.user, False).next_at == row.begins


def test_a_launch_at_a_time_keeps_its_room(cloud: Cloud) -> None:
    row = schedule(cloud, Kind.LAUNCH, args=BODY)
    assert Reservation.objects.get().memory_bytes == 8 * GIB
    big = {"memory_bytes": 8 * GIB, "memory_max_bytes": 8 * GIB}
    with pytest.raises(NoCapacity):
        operations.launch(cloud.project, cloud.user, wish(cloud, **big))
    # What was promised is kept, and counted once.
    assert only(row.begins).outcome == "asked"
    assert active().kind == "launch" and not Reservation.objects.exists()


def test_a_launch_that_can_t_be_met_is_refused_at_once_with_the_next_slot(cloud: Cloud) -> None:
    schedule(cloud, Kind.LAUNCH, name="first", args=BODY, ends=soon(hours=3))
    again = {**BODY, "name": "two"}
    with pytest.raises(NoCapacity, match="the next free slot begins") as caught:
        schedule(cloud, Kind.LAUNCH, args=again, begins=soon(hours=2), ends=soon(hours=4))
    slot = datetime.fromisoformat(caught.value.extra["next_free"])
    assert slot == Schedule.objects.get().begins + 2 * HOUR
    assert Schedule.objects.count() == 1 and Reservation.objects.count() == 1
    schedule(cloud, Kind.LAUNCH, args=again, begins=slot, ends=slot + 2 * HOUR)


def test_where_no_slot_will_ever_do_that_is_said(cloud: Cloud) -> None:
    with pytest.raises(NoCapacity, match="no later time would do either") as caught:
        schedule(cloud, Kind.LAUNCH, args={**BODY, "memory_max_bytes": 999 * GIB // 16})
    assert caught.value.extra["next_free"] is None


def test_quotas_hold_for_a_later_time_too(cloud: Cloud) -> None:
    cloud.project.instances_max = 1
    cloud.project.save()
    schedule(cloud, Kind.LAUNCH, name="first", args=BODY, ends=soon(hours=3))
    make_worker("w2")
    with pytest.raises(QuotaExceeded, match="the next free slot begins") as caught:
        schedule(cloud, Kind.LAUNCH, args={**BODY, "name": "two"}, ends=soon(hours=2))
    assert datetime.fromisoformat(caught.value.extra["next_free"]) == Schedule.objects.get().begins + 2 * HOUR


def test_a_launch_for_a_window_is_deleted_at_its_end(cloud: Cloud) -> None:
    row = schedule(cloud, Kind.LAUNCH, args=BODY, ends=soon(hours=2), rule="FREQ=DAILY")
    assert Reservation.objects.count() == 32  # as far as the horizon
    only(row.begins)
    finish(active())
    instance = Instance.objects.get()
    assert instance.promised_until == row.begins + HOUR
    # Its end belongs to others: neither the schedule nor its pause may take it away.
    for change in (lambda: schedules.remove(row, cloud.user), lambda: schedules.pause(row, cloud.user, True)):
        with pytest.raises(Refused, match="promised to others"):
            change()
    only(row.begins + HOUR)
    assert active().kind == "delete"
    finish(active())
    # The next day, and the room for one more day.
    only(row.begins + timedelta(days=1))
    assert active().kind == "launch"
    assert Reservation.objects.order_by("-begins")[0].begins == row.begins + timedelta(days=33)


def test_the_end_of_a_window_comes_even_for_who_was_locked_out(cloud: Cloud) -> None:
    row = schedule(cloud, Kind.LAUNCH, args=BODY, ends=soon(hours=2))
    only(row.begins)
    finish(active())
    Membership.objects.all().delete()
    assert only(row.begins + 9 * HOUR).outcome == "asked" and active().kind == "delete"


def test_a_window_whose_end_was_missed_is_ended_before_the_next_one_begins(cloud: Cloud) -> None:
    row = schedule(cloud, Kind.LAUNCH, args=BODY, ends=soon(hours=2), rule="FREQ=DAILY")
    only(row.begins)
    finish(active())
    tomorrow = row.begins + timedelta(days=1, minutes=1)
    assert fired(tomorrow) == [] and active().kind == "delete"
    finish(active())
    firing = only(tomorrow + schedules.RETRY)
    assert firing.left_out in (0, 1) and active().kind == "launch"


def test_growing_at_a_time_keeps_its_room(cloud: Cloud) -> None:
    instance = launched(cloud)
    row = schedule(cloud, Kind.RESCALE, instance, args={"memory_max_bytes": 10 * GIB})
    kept = Reservation.objects.get()
    assert (kept.instances, kept.vcpus, kept.memory_bytes, kept.worker) == (0, 0, 9 * GIB, cloud.worker)
    with pytest.raises(NoCapacity):
        operations.launch(
            cloud.project, cloud.user, wish(cloud, name="two", memory_bytes=6 * GIB, memory_max_bytes=6 * GIB)
        )
    assert only(row.begins).outcome == "asked" and not Reservation.objects.exists()


def test_room_comes_back_when_what_it_was_for_is_refused_for_now(cloud: Cloud) -> None:
    instance = launched(cloud)
    row = schedule(cloud, Kind.RESCALE, instance, args={"memory_max_bytes": 10 * GIB})
    operations.request(instance, cloud.user, Kind.REBOOT, {})
    assert fired(row.begins) == [] and Reservation.objects.count() == 1
    only(row.begins + HOUR)
    assert not Reservation.objects.exists()


def test_a_reservation_is_used_by_the_launch_that_names_it(cloud: Cloud) -> None:
    begins, ends = timezone.now() - timedelta(seconds=5), soon(hours=2)
    kept = reservations.reserve(cloud.project, cloud.user, begins, ends, Need(1, 4, 10 * GIB, GIB))
    big = wish(cloud, memory_bytes=10 * GIB, memory_max_bytes=10 * GIB)
    with pytest.raises(NoCapacity):
        operations.launch(cloud.project, cloud.user, big)
    operation = operations.launch(cloud.project, cloud.user, {**big, "reservation": kept.pk}, "key")
    assert operation.instance is not None and operation.instance.promised_until == ends
    # Asked again with its key, it is the same one, although the reservation is gone.
    assert operations.launch(cloud.project, cloud.user, {**big, "reservation": kept.pk}, "key") == operation
    finish(operation)
    pinned = Schedule.objects.get()
    with pytest.raises(Refused, match="promised to others"):
        schedules.remove(pinned, cloud.user)
    # Somebody else's begins when it ends.
    reservations.reserve(cloud.project, cloud.user, ends, ends + HOUR, Need(1, 4, 10 * GIB, GIB))
    only(ends)
    assert active().kind == "delete"


def test_a_launch_on_a_reservation_that_failed_gives_its_room_back(cloud: Cloud) -> None:
    kept = reservations.reserve(cloud.project, cloud.user, timezone.now(), None, Need(1, 4, 10 * GIB, GIB))
    body = wish(cloud, memory_bytes=99 * GIB, memory_max_bytes=99 * GIB, reservation=kept.pk)
    with pytest.raises(QuotaExceeded):
        operations.launch(cloud.project, cloud.user, body)
    assert Reservation.objects.count() == 1


@pytest.mark.parametrize("state", ["later", "over", "another"])
def test_a_reservation_that_is_not_for_now_is_refused(cloud: Cloud, state: str) -> None:
    kept = reservations.reserve(cloud.project, cloud.user, soon(), soon(hours=2), Need(1, 1, GIB, GIB))
    if state == "over":
        Reservation.objects.update(begins=soon(hours=-2), ends=soon(hours=-1))
    if state == "another":
        Reservation.objects.update(project=type(cloud.project).objects.create(name="other"))
    with pytest.raises(Refused, match="reservation"):
        operations.launch(cloud.project, cloud.user, wish(cloud, reservation=kept.pk))


def test_a_worker_that_is_being_emptied_is_not_reserved(cloud: Cloud) -> None:
    Worker.objects.update(draining=True)
    with pytest.raises(NoCapacity):
        reservations.reserve(cloud.project, cloud.user, soon(), None, Need(1, 1, GIB, GIB))
    # One that is away may be back by then.
    Worker.objects.update(draining=False, last_seen=None)
    reservations.reserve(cloud.project, cloud.user, soon(), None, Need(1, 1, GIB, GIB))


@pytest.mark.parametrize(("begins", "ends"), [(400 * 24, None), (2, 1), (-3, -2)])
def test_times_that_can_t_be_are_refused(cloud: Cloud, begins: int, ends: int | None) -> None:
    with pytest.raises(Refused):
        end = soon(hours=ends) if ends is not None else None
        reservations.reserve(cloud.project, cloud.user, soon(hours=begins), end, Need(1, 1, GIB, GIB))


@pytest.mark.django_db(transaction=True)
def test_the_dispatcher_s_loop_fires(cloud: Cloud) -> None:
    row = schedule(cloud, Kind.STOP, launched(cloud))
    Schedule.objects.filter(pk=row.pk).update(next_at=timezone.now(), begins=timezone.now())
    turns = iter([False, True])
    sent: list[Any] = []
    dispatcher.run(lambda worker, command: sent.append(command), pause_seconds=0.0, stop=lambda: next(turns))
    assert [command.kind for command in sent] == [Kind.STOP]


def test_through_the_api(cloud: Cloud) -> None:
    launched(cloud)
    body = {"name": "night", "kind": "stop", "instance": "web", "begins": "2099-01-01T20:00:00", "rule": "FREQ=DAILY",
            "zone": "Europe/Budapest"}  # fmt: skip
    made = cloud.client.post(cloud.url("schedules"), body, format="json")
    assert made.status_code == 201, made.data
    assert made.data["next_at"] == "2099-01-01T19:00:00Z" and made.data["instance"] == "web"
    assert cloud.client.post(cloud.url("schedules"), body, format="json").status_code == 409
    assert cloud.client.post(cloud.url("schedules/night/pause"), {}, format="json").data["paused"] is True
    assert cloud.client.get(cloud.url("schedules/night/firings")).data["results"] == []
    wrong = cloud.client.post(cloud.url("schedules"), {**body, "name": "x", "zone": "Mars/X"}, format="json")
    assert wrong.status_code == 400 and list(wrong.data["errors"]) == ["zone"]
    assert cloud.client.delete(cloud.url("schedules/night")).status_code == 204
    kept = {"begins": f"{soon():%FT%TZ}", "vcpus": 2, "memory_bytes": 512 * MIB, "disk_bytes": GIB}
    row = cloud.client.post(cloud.url("reservations"), kept, format="json")
    assert row.status_code == 201, row.data
    full = cloud.client.post(cloud.url("reservations"), {**kept, "memory_bytes": 15 * GIB}, format="json")
    assert (full.status_code, full.data["next_free"]) == (503, None)
    assert cloud.client.delete(cloud.url(f"reservations/{row.data['uuid']}")).status_code == 204
