"""The WebSockets of a console: a person's and a worker's, joined. An ASGI application of its own, as ``stream`` is.

Nothing is kept: a message is read from one side when the one before has gone to the other. Owns the connections, their
bounds in time and size, and why they end. Does not own who may come (``consoles``).
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Coroutine
from typing import Any

from django.db.models import Q
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.utils import timezone

from recvirt.nestedcloud import console
from recvirt.nestedcloud.central import audit
from recvirt.nestedcloud.central.auth import is_operator, role_in
from recvirt.nestedcloud.central.consoles import Ending, Session, Side, sessions
from recvirt.nestedcloud.central.models import ApiToken, Instance, InstanceState, Project
from recvirt.nestedcloud.central.problems import MEDIA_TYPE
from recvirt.nestedcloud.central.stream import Receive, Scope, Send, query
from recvirt.nestedcloud.console import MESSAGE_BYTES_MAX, Close

log = logging.getLogger(__name__)

#: How long one side waits for the other one.
JOIN_SECONDS = 20.0
#: A message that can't be given to the other side by then never will: it does not read.
STUCK_SECONDS = 15.0
IDLE_SECONDS = 30 * 60.0
TOTAL_SECONDS = 8 * 3600.0
#: How often it is looked at these bounds, and whether the person still may.
WATCH_SECONDS = 15.0
_CLOSE_SECONDS = 5.0
#: What the server is told: bounds that it keeps itself.
SERVER_OPTIONS: dict[str, Any] = {
    "ws_max_size": MESSAGE_BYTES_MAX, "ws_max_queue": 4, "ws_per_message_deflate": False,
    "ws_ping_interval": console.PING_SECONDS, "ws_ping_timeout": console.PING_SECONDS,
}  # fmt: skip

_PATH = re.compile(rf"{console.PATH}([0-9a-f-]{{36}})(/worker)?")
_SCHEMES = {"ws": "http", "wss": "https"}


class _RefusedError(Exception):
    def __init__(self, status: int, kind: str, title: str) -> None:
        super().__init__(title)
        self.status, self.kind, self.title = status, kind, title


class _End:
    """One connection."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._closed = False

    async def get(self) -> bytes | str | Ending:
        """The next message, or how the connection was closed."""
        message = await self._receive()
        if message["type"] == "websocket.disconnect":
            self._closed = True
            return Ending(int(message.get("code") or 1005), str(message.get("reason") or ""))
        data: bytes | None = message.get("bytes")
        return data if data is not None else str(message.get("text") or "")

    async def put(self, data: bytes | str) -> bool:
        """Whether it could be sent. TimeoutError when the other one does not read."""
        if self._closed:
            return False
        try:
            async with asyncio.timeout(STUCK_SECONDS):
                await self._send({"type": "websocket.send", "bytes" if isinstance(data, bytes) else "text": data})
        except (OSError, RuntimeError) as error:
            # TimeoutError is an OSError. The others are the server's, for a connection that is gone.
            if isinstance(error, TimeoutError):
                raise
            return False
        return True

    async def close(self, ending: Ending) -> None:
        """Tell why, unless the connection is gone."""
        if self._closed:
            return
        self._closed = True
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                words = {"code": int(ending.code), "reason": console.reason(ending.reason)}
                await self._send({"type": "websocket.close", **words})
        except (OSError, RuntimeError):
            pass


def _is_own_origin(scope: Scope, headers: dict[bytes, bytes]) -> bool:
    """A page of another site must not connect; what is no browser says no origin."""
    origin = headers.get(b"origin")
    own = f"{_SCHEMES.get(scope.get('scheme', 'ws'))}://{headers.get(b'host', b'').decode('latin-1')}"
    return origin is None or origin.decode("latin-1").lower() == own.lower()


def _enter(scope: Scope) -> tuple[Session, Side]:
    found = _PATH.fullmatch(scope["path"])
    if found is None:
        raise _RefusedError(404, "not_found", "there is no WebSocket here")
    headers = {bytes(key).lower(): bytes(value) for key, value in scope["headers"]}
    if not _is_own_origin(scope, headers):
        raise _RefusedError(403, "wrong-origin", "a page of another site may not open a console")
    side: Side = "worker" if found[2] else "person"
    session = sessions.enter(found[1], side, console.ticket_in(scope.get("subprotocols", ())))
    if session is None:
        # The same for a session that never was, so that nothing is learned from it.
        raise _RefusedError(403, "ticket-not-valid", "the ticket opens nothing: it does so once, within a minute")
    return session, side


async def serve(scope: Scope, receive: Receive, send: Send) -> None:
    """One WebSocket: a person's or a worker's."""
    await receive()
    try:
        session, side = _enter(scope)
    except _RefusedError as refusal:
        await _refuse(scope, receive, send, refusal)
        return
    session.loop = asyncio.get_running_loop()
    end = _End(receive, send)
    try:
        await send({"type": "websocket.accept", "subprotocol": console.PROTOCOL})
        session.ends[side] = end
        if len(session.ends) == 2:
            session.both.set()
        await _until_over(session, side)
    except (OSError, RuntimeError):
        # It went while it was let in.
        session.end(Close.LOST, f"the {side} has gone")
    finally:
        ending = session.ending or Ending(Close.RESTART, "the API ends")
        session.end(ending.code, ending.reason)
        sessions.close(session)
        await end.close(ending)


async def _refuse(scope: Scope, receive: Receive, send: Send, refusal: _RefusedError) -> None:
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close"})
        return
    body = json.dumps({"status": refusal.status, "type": refusal.kind, "title": refusal.title}).encode()
    headers = [(b"content-type", MEDIA_TYPE.encode())]
    await send({"type": "websocket.http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})
    try:
        async with asyncio.timeout(_CLOSE_SECONDS):
            # To the server it is a fault, and worth a line of its log, to be done before the connection is gone.
            for _ in range(2):
                await receive()
    except TimeoutError:
        pass


async def _until_over(session: Session, side: Side) -> None:
    """Copy from one side until the session has ended; the person's side watches over it as well."""
    works: list[Coroutine[Any, Any, Any]] = [_pump(session, side), session.over.wait()]
    if side == "person":
        works.append(_watch(session))
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done() and (error := task.exception()) is not None:
                log.error("console %s: %s: %s", session.uuid, type(error).__name__, error)
                session.end(Close.LOST, "the API has failed; its log says why")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(session: Session, side: Side) -> None:
    own = session.ends[side]
    # The first message is waited for at once, to notice when one side goes before the other one has come.
    coming = asyncio.ensure_future(own.get())
    try:
        if not await _joined(session, side, coming):
            return
        other = session.ends["worker" if side == "person" else "person"]
        while not isinstance(message := await coming, Ending):
            if fault := _fault(session, side, message):
                session.end(*fault)
                return
            session.heard = time.monotonic()
            if side == "person":
                async with asyncio.timeout(STUCK_SECONDS):
                    await session.window.acquire()
            elif message == console.TAKEN:
                session.window.release()
            if not await other.put(message):
                # Its own side says why it went.
                await session.over.wait()
            coming = asyncio.ensure_future(own.get())
        session.end(*_told(side, message))
    except TimeoutError:
        session.end(Close.STUCK, f"the {'worker' if side == 'person' else 'person'} does not read")
    finally:
        coming.cancel()


async def _joined(session: Session, side: Side, coming: asyncio.Future[bytes | str | Ending]) -> bool:
    """Wait for the other side; False when there is nothing to wait for any more."""
    # A worker comes at once, and may wait for as long as the person's ticket is good.
    seconds = JOIN_SECONDS if side == "person" else max(JOIN_SECONDS, session.expires - time.monotonic())
    both = asyncio.ensure_future(session.both.wait())
    either: list[asyncio.Future[Any]] = [both, coming]
    try:
        async with asyncio.timeout(seconds):
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not both.done() and isinstance(message := coming.result(), Ending):
                session.end(*_told(side, message))
                return False
            await both
    except TimeoutError:
        if side == "person":
            session.end(Close.NO_WORKER, "the worker did not answer; its log may say why")
        else:
            session.end(Close.LEFT, "the person did not come")
        return False
    finally:
        both.cancel()
    return True


def _told(side: Side, ending: Ending) -> tuple[int, str]:
    """Why a session is over, when one side has closed its connection."""
    if side == "person":
        if ending.code == Close.TOO_LARGE:
            return Close.TOO_LARGE, f"a message has {MESSAGE_BYTES_MAX} bytes at most"
        return Close.LEFT, "the person has left"
    if ending.code in console.OF_A_WORKER:
        return ending.code, console.reason(ending.reason)
    return Close.LOST, "the worker has gone away"


def _fault(session: Session, side: Side, message: bytes | str) -> tuple[int, str] | None:
    if len(message) > MESSAGE_BYTES_MAX:
        return Close.TOO_LARGE, f"a message has {MESSAGE_BYTES_MAX} bytes at most"
    if isinstance(message, str) and (side == "person" or message not in (console.READY, console.TAKEN)):
        return Close.UNSUPPORTED, "a console's bytes come in binary messages"
    if side == "person" and session.log:
        return Close.UNSUPPORTED, "a log takes no input"
    return None


async def _watch(session: Session) -> None:
    """Until it has been open or idle for too long, or its person may no more."""
    await session.both.wait()
    began = time.monotonic()
    # Written to its end although the session may end meanwhile, so that each that opened is closed as well.
    opened = asyncio.ensure_future(_note(session, "console.opened"))
    try:
        await asyncio.shield(opened)
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            if now - began > TOTAL_SECONDS:
                session.end(Close.TOO_LONG, f"it was open for {TOTAL_SECONDS / 3600:.0f} hours")
            elif now - session.heard > IDLE_SECONDS:
                session.end(Close.IDLE, f"nothing was said for {IDLE_SECONDS / 60:.0f} minutes")
            elif not await _may_still(session):
                session.end(Close.REVOKED, "you may not use this console any more")
            else:
                continue
            return
    finally:
        seconds = round(time.monotonic() - began)
        why = session.ending.reason if session.ending is not None else ""
        await opened
        await _note(session, "console.closed", seconds=seconds, why=why)


async def _note(session: Session, kind: str, **data: Any) -> None:
    """Into the audit log, if the database is there; a log that is read changes nothing and leaves no event."""
    if session.log:
        return
    try:
        await query(_write_event, session, kind, data)
    except Exception as error:
        log.error("console %s: %s was not written down: %s", session.uuid, kind, error)


def _write_event(session: Session, kind: str, data: dict[str, Any]) -> None:
    token = ApiToken.objects.select_related("user").filter(pk=session.token).first()
    project = Project.objects.filter(pk=session.project).first()
    user = token.user if token is not None else None
    audit.note(user, kind, session.instance, project, name=session.instance_name, session=session.uuid, **data)


async def _may_still(session: Session) -> bool:
    try:
        return await query(may_still, session)
    except Exception as error:
        # The database is away. It was allowed when it was last there.
        log.error("console %s: it can't be looked whether it is still allowed: %s", session.uuid, error)
        return True


def may_still(session: Session) -> bool:
    """Whether the token is still good, its user still an operator there, and the instance still there."""
    valid = Q(expires__isnull=True) | Q(expires__gt=timezone.now())
    token = ApiToken.objects.select_related("user").filter(valid, pk=session.token, user__is_active=True).first()
    project = Project.objects.filter(pk=session.project).first()
    if token is None or project is None or not is_operator(role_in(token.user, project)):
        return False
    return Instance.objects.filter(pk=session.instance).exclude(state=InstanceState.DELETED).exists()


def console_socket(_request: HttpRequest, **_: uuid.UUID) -> HttpResponse:
    """Connect to a console session by WebSocket.

    The client offers two subprotocols: "recvirt.console.1", and "ticket." with the session's ticket behind it. Binary
    messages are the console's bytes; the text message "ready" says that from then on they are the guest's, and "taken"
    that it has taken one message: four at most should be on their way. The code and the reason of the closing say why
    it ended (4000: the instance has stopped).
    """
    title = "a console wants a WebSocket, and the ASGI application of recvirt.nestedcloud.central.asgi"
    answer = JsonResponse({"status": 426, "type": "no-websocket", "title": title}, status=426, content_type=MEDIA_TYPE)
    answer["Upgrade"], answer["Connection"] = "websocket", "Upgrade"
    return answer
