"""How operations on forwards end. Called in the transaction that writes the end down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recvirt.nestedcloud.central.models import Forward, ForwardState, Operation
from recvirt.nestedcloud.model import Kind


def finish(operation: Operation, succeeded: bool, facts: Mapping[str, Any]) -> None:
    """Write down which forwards are in effect. ``facts`` come from a worker: its ``forwards`` are empty when all are,
    else why not.
    """
    if operation.instance_id is None:
        return
    kind, own = Kind(operation.kind), Forward.objects.filter(nic__instance=operation.instance_id)
    if kind is Kind.DELETE and succeeded:
        own.delete()
        return
    changed = own.filter(pk=operation.args.get("forward")) if "forward" in operation.args else own.none()
    if kind is Kind.FORWARD_REMOVE and succeeded:
        changed.delete()
    elif kind is Kind.FORWARD_ADD and not succeeded:
        changed.update(state=ForwardState.FAILED, message=operation.message)
    elif kind is Kind.FORWARD_REMOVE:
        # It stays unwanted, and can be asked for again.
        changed.update(message=operation.message)
    why = facts.get("forwards")
    if isinstance(why, str):
        state = ForwardState.FAILED if why else ForwardState.ACTIVE
        own.exclude(state=ForwardState.REMOVING).update(state=state, message=why[:500])
