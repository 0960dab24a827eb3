"""Who did what. Everything that is changed leaves an event; secrets never go into one."""

from __future__ import annotations

import uuid
from typing import Any

from recvirt.nestedcloud.central.models import Event, Project


def note(
    user: Any, kind: str, subject: uuid.UUID | None = None, project: Project | None = None, /, **data: Any
) -> Event:
    """Write down what a user has done, in the transaction that does it. ``data`` is what may be shown."""
    return Event.objects.create(user=user, kind=kind, subject=subject, project=project, data=data)
