"""Events as they happen: server-sent events (WHATWG HTML, 9.2), resumed by ``Last-Event-ID``.

A client costs one coroutine, and no thread and no database connection while nothing happens: one watcher a process
looks for new events and wakes the clients. It is an ASGI application of its own beside Django's, whose handler keeps a
thread for each request until its answer has ended.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from asgiref.sync import sync_to_async
from django.db import connections
from django.http import HttpRequest, HttpResponse, JsonResponse
from rest_framework.exceptions import APIException

from recvirt.nestedcloud.central.auth import role_in, token_of
from recvirt.nestedcloud.central.models import ApiToken, Event, Project
from recvirt.nestedcloud.central.problems import MEDIA_TYPE
from recvirt.nestedcloud.central.serializers import EventSerializer
from recvirt.nestedcloud.model import NAME

CLIENTS_MAX = 500
#: A comment that keeps proxies from closing the connection, and finds out that the client has.
_KEEP_ALIVE_SECONDS = 15.0
#: Then the client comes again: a token that was revoked meanwhile ends, and so does a client that has gone unnoticed.
STREAM_SECONDS = 300.0
_LOOK_SECONDS = 0.5
#: A missing id belongs to a transaction that has not ended, or to one that was undone: it is waited for so long.
_GAP_SECONDS = 2.0
_BATCH = 200

_PATH = re.compile(rf"/api/v1/projects/({NAME.pattern})/events/stream")

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


async def query(function: Callable[..., T], *args: Any) -> T:
    """In a thread of the common pool, which keeps no connection afterwards."""

    def run() -> T:
        try:
            return function(*args)
        finally:
            connections.close_all()

    result: T = await sync_to_async(run, thread_sensitive=False)()
    return result


def _ids_after(after: int) -> list[int]:
    return list(Event.objects.filter(id__gt=after).order_by("id").values_list("id", flat=True)[:_BATCH])


def _last_id() -> int:
    return Event.objects.order_by("-id").values_list("id", flat=True).first() or 0


class Watcher:
    """Knows up to which id all events are there: ``settled``. Ids are given before their transactions end."""

    def __init__(self, settled: int) -> None:
        self.settled = settled
        self._gap_since: float | None = None

    def look(self, ids: list[int], now: float) -> bool:
        """Take in the ids that are there after ``settled``; whether it has moved. ``now`` in seconds."""
        before = self.settled
        for number in ids:
            if number != self.settled + 1:
                if self._gap_since is None:
                    self._gap_since = now
                if now - self._gap_since < _GAP_SECONDS:
                    break
            self._gap_since = None
            self.settled = number
        return self.settled != before


class _Feed:
    """One process's watcher, which looks only while somebody listens."""

    def __init__(self) -> None:
        self.clients = 0
        self.watcher: Watcher | None = None
        self._news: asyncio.Event = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def join(self) -> None:
        self.clients += 1
        if self.watcher is None:
            last = await query(_last_id)
            if self.watcher is None:
                self.watcher = Watcher(last)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    def leave(self) -> None:
        self.clients -= 1
        if self.clients == 0 and self._task is not None:
            self._task.cancel()
            self._task, self.watcher = None, None

    async def news(self, seconds: float) -> None:
        """Return when there are some, or after a while."""
        try:
            await asyncio.wait_for(self._news.wait(), seconds)
        except TimeoutError:
            pass

    async def _run(self) -> None:
        while True:
            watcher = self.watcher
            if watcher is None:
                return
            try:
                moved = watcher.look(await query(_ids_after, watcher.settled), time.monotonic())
            except Exception:
                # The database is away: the clients wait, and so does this.
                moved = False
            if moved:
                self._news.set()
                self._news = asyncio.Event()
            await asyncio.sleep(_LOOK_SECONDS)


_feeds: WeakKeyDictionary[asyncio.AbstractEventLoop, _Feed] = WeakKeyDictionary()


def _feed() -> _Feed:
    """The running loop's own."""
    return _feeds.setdefault(asyncio.get_running_loop(), _Feed())


def _admit(header: bytes, address: str, name: str) -> Project | None:
    """The project, if the token opens it."""
    token: ApiToken = token_of(header, address)
    project = Project.objects.filter(name=name).first()
    if project is None or token.project_id not in (None, project.pk) or role_in(token.user, project) is None:
        return None
    return project


def _events(project: Project, after: int, until: int) -> list[dict[str, Any]]:
    rows = project.events.filter(id__gt=after, id__lte=until).select_related("user").order_by("id")[:_BATCH]
    return [dict(EventSerializer(row).data) for row in rows]


class _RefusedError(Exception):
    def __init__(self, status: int, kind: str, title: str) -> None:
        super().__init__(title)
        self.status, self.kind, self.title = status, kind, title


async def _check(scope: Scope, name: str) -> tuple[Project, int | None]:
    """The project, and the event to go on from."""
    if scope["method"] != "GET":
        raise _RefusedError(405, "method_not_allowed", "only GET")
    headers = {bytes(key).lower(): bytes(value) for key, value in scope["headers"]}
    header, last = headers.get(b"authorization"), headers.get(b"last-event-id", b"").decode("latin-1")
    if header is None:
        raise _RefusedError(401, "not_authenticated", "Authentication credentials were not provided.")
    address = scope["client"][0] if scope.get("client") else ""
    try:
        project = await query(_admit, header, address, name)
    except APIException as error:
        raise _RefusedError(error.status_code, str(error.get_codes()), str(error.detail)) from None
    if project is None:
        raise _RefusedError(404, "not_found", "there is no such project")
    if last and not (last.isdecimal() and last.isascii() and len(last) < 19):
        raise _RefusedError(400, "invalid", "Last-Event-ID is the id of an event")
    return project, int(last) if last else None


async def serve(scope: Scope, receive: Receive, send: Send, name: str) -> None:
    """Answer one request for the events of the project ``name``."""
    try:
        project, last = await _check(scope, name)
        feed = _feed()
        if feed.clients >= CLIENTS_MAX:
            raise _RefusedError(503, "too-many-clients", "too many clients listen already; try again later")
        await feed.join()
    except _RefusedError as refusal:
        await _refuse(send, refusal)
        return
    try:
        await _start(send, 200, "text/event-stream", [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")])
        following = asyncio.create_task(_follow(feed, project, last, send))
        leaving = asyncio.create_task(_left(receive))
        done, waiting = await asyncio.wait({following, leaving}, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        if following in done and following.exception() is None:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
    finally:
        feed.leave()


async def _start(send: Send, status: int, media: str, more: list[tuple[bytes, bytes]]) -> None:
    headers = [(b"content-type", media.encode()), (b"x-content-type-options", b"nosniff"), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _refuse(send: Send, refusal: _RefusedError) -> None:
    more = [(b"www-authenticate", b"Bearer")] if refusal.status == 401 else []
    body = json.dumps({"status": refusal.status, "type": refusal.kind, "title": refusal.title}).encode()
    await _start(send, refusal.status, MEDIA_TYPE, more)
    await send({"type": "http.response.body", "body": body})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _follow(feed: _Feed, project: Project, last: int | None, send: Send) -> None:
    async def say(text: str) -> None:
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    watcher = feed.watcher
    assert watcher is not None
    after = last if last is not None else watcher.settled
    deadline = time.monotonic() + STREAM_SECONDS
    await say("retry: 1000\n\n")
    while time.monotonic() < deadline:
        if after < watcher.settled:
            until = watcher.settled
            events = await query(_events, project, after, until)
            for event in events:
                await say(f"id: {event['id']}\nevent: {event['kind']}\ndata: {json.dumps(event, default=str)}\n\n")
            after = until if len(events) < _BATCH else events[-1]["id"]
            continue
        await feed.news(min(_KEEP_ALIVE_SECONDS, max(0.1, deadline - time.monotonic())))
        if after >= watcher.settled:
            await say(": nothing new\n\n")


def project_of(path: str) -> str | None:
    """The project whose stream is at a path."""
    found = _PATH.fullmatch(path)
    return found[1] if found else None


def stream(_request: HttpRequest, **_: str) -> HttpResponse:
    """Follow the project's events, from now on or after the one that the header Last-Event-ID names."""
    title = "the event stream wants the ASGI application of recvirt.nestedcloud.central.asgi"
    return JsonResponse({"status": 501, "type": "no-asgi", "title": title}, status=501, content_type=MEDIA_TYPE)
