"""Which worker may have its hands on a volume: those that share the folder it lies in, one after another.

Two guests, or a guest and a tool, that write to one volume destroy it, and the locks of a host's own processes end
with the host. So another worker gets a volume only when the one before surely has let go: it has answered, or it was
shut out of tunnel and file server. Called with the volume's row locked.
"""

from __future__ import annotations

import json

from django.conf import settings
from django.db.models import QuerySet

from recvirt.nestedcloud.central.models import Instance, InstanceState, Volume, Worker
from recvirt.nestedcloud.central.problems import Refused
from recvirt.nestedcloud.central.reports import ATTEMPTS_MAX
from recvirt.nestedcloud.model import Phase, Power


def workers_of(pool: str) -> QuerySet[Worker]:
    """Who shares a folder of disks and has not been revoked."""
    return Worker.objects.filter(pool=pool, revoked=False).exclude(pool="").order_by("name")


def can_reach(worker: Worker, volume: Volume) -> bool:
    """Whether a worker's instances can have a volume: who had it before can, and who shares the folder."""
    return volume.worker_id == worker.pk or (volume.pool != "" and volume.pool == worker.pool)


def who_has(volume: Volume) -> str:
    """The workers that reach a volume, for people."""
    names = [worker.name for worker in workers_of(volume.pool)] or [volume.worker.name]
    return ", ".join(names)


def is_unanswered(thing: Instance | Volume) -> bool:
    """Whether the last thing asked of it was given up without an answer, and may still be done some time."""
    last = thing.operations.order_by("created").last()
    return last is not None and last.phase == Phase.FAILED and last.attempt > ATTEMPTS_MAX


def is_shut_out(worker: Worker) -> bool:
    """Whether tunnel and broker have dropped a revoked worker: root says so (``recvirt.nestedcloud.peers``)."""
    try:
        said = json.loads(settings.CONFIG.shut_out_path.read_text())
    except (OSError, ValueError):
        return False
    return worker.revoked and isinstance(said, list) and str(worker.pk) in said


def check_let_go(volume: Volume, successor: Worker) -> None:
    """Refused when another worker had a volume last and may still write to it."""
    last = volume.worker
    if last.pk == successor.pk or (last.revoked and is_shut_out(last)):
        return
    if last.revoked:
        raise Refused(
            f"{last.name}, which had {volume.name} last, was revoked and is not shut out of the tunnel yet: try again "
            "in a minute (on the central node: systemctl status recvirt-cloud-peers)"
        )
    if is_unanswered(volume):
        raise Refused(
            f"{last.name} has not answered what was asked of {volume.name} last and may still be at it: wait until it "
            "is back, or revoke it"
        )


def hand_for(volume: Volume) -> Worker:
    """Who does what is asked of a volume that no instance has: who had it last, else another one that reaches it."""
    last = volume.worker
    has_it = volume.pool in ("", last.pool)
    if (has_it and last.is_up) or (not last.revoked and is_unanswered(volume)):
        return last
    other = next((worker for worker in workers_of(volume.pool) if worker.is_up), None)
    if other is None:
        return last
    check_let_go(volume, other)
    return other


def why_free_already(volume: Volume, instance: Instance) -> str:
    """Why an instance need not be told that it loses a volume, and for others to use it: it is off, or shut out, and
    its worker can't be asked. Empty when its worker has to be.

    An instance is off for sure when its worker has said so and has answered everything since; what is started there
    later is described anew, without the volume.
    """
    worker = instance.worker
    if worker is None or worker.is_up or not workers_of(volume.pool).exclude(pk=worker.pk).exists():
        return ""
    if worker.revoked:
        return f"{worker.name} was revoked: it was not asked, and the volume is free for others once it is shut out"
    stopped = instance.state == InstanceState.OFF and instance.power in (Power.STOPPED, Power.CRASHED)
    if stopped and not is_unanswered(instance) and not is_unanswered(volume):
        return f"{worker.name} is away and {instance.name} was off: it was not asked"
    return ""
