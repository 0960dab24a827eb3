"""What follows from a backup that was restored: the workers have gone on since it was taken.

An operation that was on its way then is not sent out again: it may have been done since, and a revert done twice loses
what came between. Workers refuse what looks older than what they have, so generations jump ahead.
"""

from __future__ import annotations

from django.db import transaction
from django.db.models import F

from recvirt.nestedcloud.central import reports
from recvirt.nestedcloud.central.models import ACTIVE_PHASES, Instance, Operation, Volume
from recvirt.nestedcloud.model import Fault, Phase, Report

#: More than anybody changes one instance between two backups.
_AHEAD = 10_000
MESSAGE = "a backup of the database was restored; ask again if it is still wanted"


def settle() -> int:
    """End what was under way when the backup was taken, put generations ahead; how many operations that were."""
    with transaction.atomic():
        active = list(Operation.objects.select_for_update().filter(phase__in=ACTIVE_PHASES))
        for operation in active:
            reports.apply(Report(
                str(operation.pk), operation.attempt, str(operation.worker_id), Phase.FAILED,
                progress=operation.progress, message=MESSAGE, fault=Fault.CONFLICT,
            ))  # fmt: skip
        for things in (Instance.objects, Volume.objects):
            things.update(generation=F("generation") + _AHEAD)
    return len(active)
