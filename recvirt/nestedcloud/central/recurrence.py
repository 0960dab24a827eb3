"""When a schedule is due: iCalendar rules (RFC 5545, RRULE) in a time zone, as moments. Pure: no database, no clock.

The rule is a small part of the RFC's, chosen so that looking for the next moment is always quick:

========  ======================================  =================================
FREQ      further parts                           example
========  ======================================  =================================
HOURLY    INTERVAL, BYMINUTE                      every 6 hours
DAILY     INTERVAL, BYHOUR, BYMINUTE              every day at 8
WEEKLY    the same and BYDAY                      Monday to Friday
MONTHLY   the same and BYMONTHDAY or BYDAY        the last Friday (``BYDAY=-1FR``)
YEARLY    the same and BYMONTH                    each 1 March
========  ======================================  =================================

Each may end by COUNT (10,000 at most) or by UNTIL (in UTC: ``20271231T235959Z``). Hours are those of the zone. One that
does not exist when clocks go forward is taken as the one after it; one that comes twice counts the first time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from dateutil.rrule import rrule, rrulestr

_SMALL = {"FREQ", "INTERVAL", "COUNT", "UNTIL", "BYMINUTE"}
_DAY = _SMALL | {"BYHOUR"}
_PARTS = {
    "HOURLY": _SMALL, "DAILY": _DAY, "WEEKLY": _DAY | {"BYDAY", "WKST"}, "MONTHLY": _DAY | {"BYDAY", "BYMONTHDAY"},
    "YEARLY": _DAY | {"BYDAY", "BYMONTHDAY", "BYMONTH"},
}  # fmt: skip
_TEXT_MAX = 200
_COUNT_MAX = 10000
_INTERVAL_MAX = 1000
#: A window may not reach into the next one; so many are looked at.
_WINDOWS_CHECKED = 200


class RecurrenceError(ValueError):
    """A rule, a zone or a window that can't be used."""


@dataclass(frozen=True, order=True)
class Edge:
    """A moment at which something is due. Of two at one moment the window's end comes first."""

    at: datetime
    begins: bool = True


@dataclass(frozen=True)
class Plan:
    """Moments from ``begins`` on by ``rule`` (none: only that one), each with a window's end if there is a window."""

    begins: datetime
    rule: str = ""
    zone: str = "UTC"
    window: timedelta | None = None

    def __post_init__(self) -> None:
        _zone(self.zone)
        if self.window is not None and self.window <= timedelta(0):
            raise RecurrenceError("a window ends after it begins")
        if self.rule:
            first = next(self.moments(), None)
            if first is None:
                raise RecurrenceError(f"the rule {self.rule} is never due")
            self._check_windows()

    def _check_windows(self) -> None:
        if self.window is None:
            return
        moments = self.moments()
        some = [moment for _, moment in zip(range(_WINDOWS_CHECKED), moments, strict=False)]
        for one, two in pairwise(some):
            if one + self.window > two:
                raise RecurrenceError(f"the window that begins {one.isoformat()} reaches into the next one")

    def _local(self, moment: datetime) -> datetime:
        return moment.astimezone(_zone(self.zone)).replace(tzinfo=None)

    def moments(self, after: datetime | None = None) -> Iterator[datetime]:
        """The beginnings, in UTC and in order; those later than ``after``."""
        if not self.rule:
            if after is None or self.begins > after:
                yield self.begins.astimezone(UTC)
            return
        last = after
        for local in _parse(self.rule, self._local(self.begins), _zone(self.zone)):
            try:
                moment = local.replace(tzinfo=_zone(self.zone)).astimezone(UTC)
            except OverflowError:
                return
            # Two local times may be one moment when clocks go forward.
            if last is None or moment > last:
                last = moment
                yield moment

    def edges(self, after: Edge | None = None) -> Iterator[Edge]:
        """All that is due, in order; what comes later than ``after``."""
        if self.window is None:
            for moment in self.moments(after.at if after is not None else None):
                yield Edge(moment)
            return
        # The window that ``after`` lies in began no earlier than one window before it.
        start = after.at - self.window - timedelta(microseconds=1) if after is not None else None
        for moment in self.moments(start):
            for edge in (Edge(moment), Edge(moment + self.window, False)):
                if after is None or after < edge:
                    yield edge

    def last_due(self, first: Edge, now: datetime) -> tuple[Edge, int]:
        """The last edge that is due by ``now``, from ``first`` on, and how many before it are left out."""
        found, left_out = first, 0
        for edge in self.edges(first):
            if edge.at > now:
                break
            found, left_out = edge, left_out + 1
        return found, left_out


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise RecurrenceError(f"there is no time zone called {name[:64]!r} (want one as Europe/Budapest)") from None


def _parse(text: str, begins: datetime, zone: ZoneInfo) -> rrule:
    """The rule from a local beginning on: dateutil counts in local time without a zone, as the RFC does."""
    if len(text) > _TEXT_MAX or not re.fullmatch(r"[A-Z]+=[A-Z0-9,+-]+(;[A-Z]+=[A-Z0-9,+-]+)*", text):
        raise RecurrenceError(f"a rule is as FREQ=DAILY;INTERVAL=2, {_TEXT_MAX} characters at most")
    pairs = [part.split("=", 1) for part in text.split(";")]
    parts = dict(pairs)
    if len(parts) != len(pairs):
        raise RecurrenceError("a part of the rule comes twice")
    allowed = _PARTS.get(parts.get("FREQ", ""))
    if allowed is None:
        raise RecurrenceError(f"FREQ is one of {', '.join(_PARTS)}")
    if unknown := sorted(set(parts) - allowed):
        raise RecurrenceError(f"{parts['FREQ']} does not go with {', '.join(unknown)}")
    for name, most in (("COUNT", _COUNT_MAX), ("INTERVAL", _INTERVAL_MAX)):
        if name in parts and not (parts[name].isdecimal() and 1 <= int(parts[name]) <= most):
            raise RecurrenceError(f"{name} is 1 to {most}")
    if parts["FREQ"] == "WEEKLY" and re.search(r"\d", parts.get("BYDAY", "")):
        raise RecurrenceError("the days of WEEKLY have no numbers: BYDAY=MO,FR")
    if "COUNT" in parts and "UNTIL" in parts:
        raise RecurrenceError("COUNT and UNTIL do not go together")
    if "UNTIL" in parts and not re.fullmatch(r"\d{8}T\d{6}Z", parts["UNTIL"]):
        raise RecurrenceError("UNTIL is in UTC, as 20271231T235959Z")
    return _build(parts, begins, zone)


def _build(parts: dict[str, str], begins: datetime, zone: ZoneInfo) -> rrule:
    try:
        if until := parts.pop("UNTIL", None):
            last = datetime.strptime(until, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
            parts["UNTIL"] = f"{last.astimezone(zone):%Y%m%dT%H%M%S}"
        rule = rrulestr(";".join(f"{name}={value}" for name, value in parts.items()), dtstart=begins)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise RecurrenceError(f"the rule can't be used: {error}") from None
    assert isinstance(rule, rrule)
    return rule
