"""Amounts that are promised for a time, added up. Pure arithmetic: no database, no clock.

An interval holds its beginning and not its end. Amounts are tuples of equal length, compared place by place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

#: The end of what has none.
FOREVER = datetime.max.replace(tzinfo=UTC)

Amount = tuple[int, ...]


@dataclass(frozen=True)
class Claim:
    """``amount`` is taken from ``begins`` until ``ends``."""

    begins: datetime
    ends: datetime
    amount: Amount


def peak(claims: Iterable[Claim], begins: datetime, ends: datetime, places: int) -> Amount:
    """The most that is taken at one time in an interval, place by place. Zeros where nothing is."""
    changes: list[tuple[datetime, int, Amount]] = []
    for claim in claims:
        first, last = max(claim.begins, begins), min(claim.ends, ends)
        if first < last:
            changes += [(first, 1, claim.amount), (last, -1, claim.amount)]
    # What ends makes room for what begins at the same moment.
    changes.sort(key=lambda change: (change[0], change[1]))
    now, most = [0] * places, [0] * places
    for _, sign, amount in changes:
        for place, value in enumerate(amount):
            now[place] += sign * value
            most[place] = max(most[place], now[place])
    return tuple(most)


def lacking(claims: Iterable[Claim], capacity: Sequence[int], wanted: Claim) -> Amount:
    """What is too little for ``wanted``, place by place; all zeros when it fits.

    A place of which nothing is wanted lacks nothing, even where it is promised beyond the capacity.
    """
    used = peak(claims, wanted.begins, wanted.ends, len(capacity))
    return tuple(
        max(0, taken + more - limit) if more > 0 else 0
        for taken, more, limit in zip(used, wanted.amount, capacity, strict=True)
    )


def next_free(
    claims: Sequence[Claim], capacity: Sequence[int], amount: Amount, earliest: datetime, length: timedelta | None
) -> datetime | None:
    """The earliest beginning at which ``amount`` fits for ``length`` (None: from then on); None when it never does.

    Room appears only where something ends, so only those moments are tried.
    """
    for begins in sorted({earliest, *(claim.ends for claim in claims if earliest < claim.ends < FOREVER)}):
        ends = begins + length if length is not None else FOREVER
        if not any(lacking(claims, capacity, Claim(begins, ends, amount))):
            return begins
    return None
