"""A bound for what a request may bring, before anybody is asked who sends it.

Django on ASGI writes a request's body to a temporary file before any view or permission is looked at; without a bound
a stranger could fill the disk.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any

from recvirt.nestedcloud.spool import PIECE_BYTES_MAX

#: A piece of an upload, and a little.
BODY_BYTES_MAX = PIECE_BYTES_MAX + 65536

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Any, Any, Any], Awaitable[None]]


def bounded(application: Application) -> Callable[[Any, Any, Any], Coroutine[Any, Any, None]]:
    """The same application, with a 413 for a body that says it is too large, and an end for one that turns out so."""

    async def run(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await application(scope, receive, send)
            return
        length = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > BODY_BYTES_MAX:
            headers = [(b"content-type", b"application/problem+json"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 413, "headers": headers})
            body = b'{"status": 413, "type": "too-large", "title": "The request is too large: send it in pieces."}'
            await send({"type": "http.response.body", "body": body})
            return
        count = 0

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            # What comes in chunks says no length. To the application its sender has gone.
            return {"type": "http.disconnect"} if count > BODY_BYTES_MAX else message

        await application(scope, counted, send)

    return run
