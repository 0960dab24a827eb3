"""Which images are old enough to go. Pure: providers list and delete, this decides."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import groupby

from recvirt.publish.provider import Remote


def choose(remotes: Sequence[Remote], *, keep: int, older_than_days: float, now: datetime) -> list[Remote]:
    """The images to delete, oldest first.

    Of each profile the newest ``keep`` stay, at least one; younger ones than ``older_than_days`` stay, and so does what
    is in use, as far as the provider can tell.
    """
    limit = now - timedelta(days=older_than_days)
    chosen: list[Remote] = []
    by_profile = sorted(remotes, key=lambda item: item.profile)
    for _profile, group in groupby(by_profile, key=lambda item: item.profile):
        # The name decides between two of one second, so that two runs agree.
        newest_first = sorted(group, key=lambda item: (item.created, item.name), reverse=True)
        chosen += [item for item in newest_first[max(keep, 1) :] if item.created < limit and item.in_use is not True]
    return sorted(chosen, key=lambda item: (item.created, item.name))
