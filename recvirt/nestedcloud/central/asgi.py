"""What an ASGI server runs: Django, and beside it what is open for long and must not hold a thread."""

from __future__ import annotations

import os
from typing import Any

from django.core.asgi import get_asgi_application

from recvirt.nestedcloud.central.bodies import bounded

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "recvirt.nestedcloud.central.settings")
django_application: Any = bounded(get_asgi_application())

from recvirt.nestedcloud.central import relay, stream  # noqa: E402


async def application(scope: stream.Scope, receive: stream.Receive, send: stream.Send) -> None:
    """Hand a connection to whom it is for."""
    if scope["type"] == "websocket":
        await relay.serve(scope, receive, send)
        return
    project = stream.project_of(scope["path"]) if scope["type"] == "http" else None
    if project is not None:
        await stream.serve(scope, receive, send, project)
    else:
        await django_application(scope, receive, send)
