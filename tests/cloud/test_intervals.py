"""Sums of what is promised for a time, against a count of every minute."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from recvirt.nestedcloud.central.intervals import FOREVER, Claim, lacking, next_free, peak

ZERO = datetime(2027, 1, 1, tzinfo=UTC)
HORIZON = 40


def at(minute: int) -> datetime:
    return ZERO + timedelta(minutes=minute)


@st.composite
def claims(draw: st.DrawFn) -> list[Claim]:
    found = []
    for _ in range(draw(st.integers(0, 8))):
        begins = draw(st.integers(0, HORIZON - 1))
        length = draw(st.integers(0, 15))
        ends = FOREVER if draw(st.booleans()) and length == 0 else at(begins + length)
        found.append(Claim(at(begins), ends, (draw(st.integers(0, 5)), draw(st.integers(0, 5)))))
    return found


def counted(some: list[Claim], minute: int) -> tuple[int, int]:
    """What is taken in one minute."""
    amounts = [claim.amount for claim in some if claim.begins <= at(minute) < claim.ends]
    return sum(one for one, _ in amounts), sum(two for _, two in amounts)


@given(claims(), st.integers(0, HORIZON), st.integers(1, 20))
def test_the_peak_is_that_of_the_fullest_minute(some: list[Claim], begins: int, length: int) -> None:
    minutes = [counted(some, minute) for minute in range(begins, begins + length)]
    expected = max(one for one, _ in minutes), max(two for _, two in minutes)
    assert peak(some, at(begins), at(begins + length), 2) == expected


@given(claims(), st.tuples(st.integers(0, 5), st.integers(0, 5)), st.integers(0, HORIZON), st.integers(1, 20))
def test_the_next_free_slot_fits_and_is_the_first(
    some: list[Claim], amount: tuple[int, int], earliest: int, length: int
) -> None:
    capacity = (6, 6)

    def fits(minute: int) -> bool:
        return all(
            not wanted or used + wanted <= limit
            for each in range(minute, minute + length)
            for used, wanted, limit in zip(counted(some, each), amount, capacity, strict=True)
        )

    expected = next((minute for minute in range(earliest, 2 * HORIZON + 40) if fits(minute)), None)
    found = next_free(some, capacity, amount, at(earliest), timedelta(minutes=length))
    assert found == (at(expected) if expected is not None else None)


def test_what_ends_makes_room_for_what_begins_then() -> None:
    some = [Claim(at(0), at(10), (4,)), Claim(at(10), at(20), (4,))]
    assert peak(some, at(0), at(20), 1) == (4,)
    assert next_free(some, (4,), (4,), at(0), None) == at(20)
    assert next_free([Claim(at(0), FOREVER, (1,))], (4,), (4,), at(0), None) is None


def test_a_place_of_which_nothing_is_wanted_lacks_nothing() -> None:
    some = [Claim(at(0), FOREVER, (9, 1))]
    assert lacking(some, (4, 4), Claim(at(0), at(1), (0, 2))) == (0, 0)
    assert lacking(some, (4, 4), Claim(at(0), at(1), (1, 5))) == (6, 2)
