"""Rules in a zone: what is due when, over changes of clocks, and which rules are refused."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recvirt.nestedcloud.central.recurrence import Edge, Plan, RecurrenceError

BEGINS = datetime(2027, 3, 26, 7, 0, tzinfo=UTC)  # a Friday, 8 o'clock in Budapest


def some(plan: Plan, count: int) -> list[str]:
    return [f"{moment:%d %H:%M}" for moment in islice(plan.moments(), count)]


def test_eight_o_clock_stays_eight_o_clock_when_the_clocks_change() -> None:
    assert some(Plan(BEGINS, "FREQ=DAILY", "Europe/Budapest"), 4) == ["26 07:00", "27 07:00", "28 06:00", "29 06:00"]
    assert some(Plan(BEGINS, "FREQ=DAILY"), 4) == ["26 07:00", "27 07:00", "28 07:00", "29 07:00"]


def test_an_hour_that_does_not_exist_is_the_one_after_it_and_fires_once() -> None:
    plan = Plan(datetime(2027, 3, 28, 0, 30, tzinfo=UTC), "FREQ=HOURLY", "Europe/Budapest")
    assert some(plan, 3) == ["28 00:30", "28 01:30", "28 02:30"]


def test_an_hour_that_comes_twice_fires_the_first_time() -> None:
    plan = Plan(datetime(2027, 10, 30, 0, 30, tzinfo=UTC), "FREQ=DAILY", "Europe/Budapest")
    assert some(plan, 2) == ["30 00:30", "31 00:30"]


def test_working_days_count_and_until() -> None:
    assert some(Plan(BEGINS, "FREQ=WEEKLY;BYDAY=MO,TU,WE,TH,FR"), 2) == ["26 07:00", "29 07:00"]
    assert len(list(Plan(BEGINS, "FREQ=MONTHLY;BYDAY=-1FR;COUNT=3").moments())) == 3
    until = Plan(BEGINS, "FREQ=DAILY;UNTIL=20270329T060000Z", "Europe/Budapest")
    assert some(until, 9) == ["26 07:00", "27 07:00", "28 06:00", "29 06:00"]


@pytest.mark.parametrize(
    "rule",
    [
        "FREQ=SECONDLY", "FREQ=MINUTELY", "DAILY", "FREQ=DAILY;FREQ=DAILY", "FREQ=DAILY;BYDAY=MO",
        "FREQ=DAILY;BYHOUR=25",
        "FREQ=HOURLY;BYMONTH=2", "FREQ=HOURLY;BYMONTHDAY=30", "FREQ=DAILY;COUNT=0", "FREQ=DAILY;COUNT=99999",
        "FREQ=DAILY;INTERVAL=0", "FREQ=DAILY;INTERVAL=1.5", "FREQ=DAILY;UNTIL=20300101", "FREQ=DAILY\nDTSTART=1",
        "FREQ=DAILY;COUNT=1;UNTIL=20300101T000000Z", "FREQ=WEEKLY;BYDAY=XX", "freq=daily", "FREQ=DAILY;" + "X" * 200,
        "FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30", "FREQ=DAILY;UNTIL=20200101T000000Z", "FREQ=WEEKLY;BYDAY=9999999999MO",
        "FREQ=DAILY;UNTIL=99999999T999999Z", "FREQ=YEARLY;BYMONTH=13", "FREQ=DAILY;BYSECOND=1", "RRULE=FREQ,DAILY",
    ],
)  # fmt: skip
def test_a_rule_that_can_t_be_used_is_refused_quickly(rule: str) -> None:
    began = time.process_time()
    with pytest.raises(RecurrenceError):
        Plan(BEGINS, rule)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("zone", ["Mars/Olympus", "../../etc/passwd", "/etc/passwd", "", "\x00"])
def test_a_zone_that_is_none_is_refused(zone: str) -> None:
    with pytest.raises(RecurrenceError, match="no time zone"):
        Plan(BEGINS, "", zone)


def test_windows_may_touch_and_not_overlap() -> None:
    touching = Plan(BEGINS, "FREQ=DAILY", window=timedelta(hours=24))
    # At the moment at which one ends and the next one begins, the end comes first.
    assert [edge.begins for edge in islice(touching.edges(), 5)] == [True, False, True, False, True]
    with pytest.raises(RecurrenceError, match="reaches into the next one"):
        Plan(BEGINS, "FREQ=DAILY", window=timedelta(hours=24, seconds=1))
    with pytest.raises(RecurrenceError, match="ends after it begins"):
        Plan(BEGINS, window=timedelta(0))


def test_of_what_was_missed_the_last_one_is_found() -> None:
    plan = Plan(BEGINS, "FREQ=DAILY", window=timedelta(hours=10))
    first = Edge(BEGINS)
    assert plan.last_due(first, BEGINS) == (first, 0)
    noon = BEGINS + timedelta(days=2, hours=5)
    assert plan.last_due(first, noon) == (Edge(BEGINS + timedelta(days=2)), 4)
    night = BEGINS + timedelta(days=2, hours=12)
    assert plan.last_due(first, night) == (Edge(BEGINS + timedelta(days=2, hours=10), False), 5)


@given(
    st.sampled_from(["", "FREQ=HOURLY;INTERVAL=5", "FREQ=DAILY;BYHOUR=1,2,3", "FREQ=WEEKLY;INTERVAL=2;BYDAY=MO,SU",
                     "FREQ=MONTHLY;BYMONTHDAY=31", "FREQ=DAILY;COUNT=7"]),
    st.sampled_from(["UTC", "Europe/Budapest", "America/St_Johns", "Australia/Lord_Howe"]),
    st.datetimes(datetime(2026, 1, 1), datetime(2028, 1, 1), timezones=st.just(UTC)),
    st.sampled_from([None, timedelta(minutes=30)]),
)  # fmt: skip
def test_edges_rise_and_go_on_from_any_of_them(
    rule: str, zone: str, begins: datetime, window: timedelta | None
) -> None:
    plan = Plan(begins.replace(microsecond=0), rule, zone, window)
    edges = list(islice(plan.edges(), 12))
    assert edges == sorted(set(edges))
    for index, edge in enumerate(edges[:-1]):
        assert next(plan.edges(edge)) == edges[index + 1]
