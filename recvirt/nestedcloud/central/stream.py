"""Events as they happen: server-sent events (WHATWG HTML, 9.2), resumed by ``Last-Event-ID``.

A client costs one coroutine, and no thread and no database connection while nothing happens: one watcher a process
looks for new events and wakes the clients. Needs an ASGI server.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from asgiref.sync import sync_to_async
from django.db import connections
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from rest_framework.exceptions import APIException

from recvirt.nestedcloud.central.auth import role_in, token_of
from recvirt.nestedcloud.central.models import ApiToken, Event, Project
from recvirt.nestedcloud.central.problems import MEDIA_TYPE
from recvirt.nestedcloud.central.serializers import EventSerializer

CLIENTS_MAX = 500
#: A comment that keeps proxies from closing the connection, and finds out that the client has.
_KEEP_ALIVE_SECONDS = 15.0
#: Then the client comes again: a token that was revoked meanwhile ends, and so does a client that has gone unnoticed.
_STREAM_SECONDS = 300.0
_LOOK_SECONDS = 0.5
#: An id that is missing belongs to a transaction that has not ended, or to one that was undone; so long it is waited for.
_GAP_SECONDS = 2.0
_BATCH = 200

T = TypeVar("T")


async def _query(function: Callable[..., T], *args: Any) -> T:
    """In a thread of the common pool, which keeps no connection afterwards."""

    def run() -> T:
        try:
            return function(*args)
        finally:
            # A test's connection in memory or in a transaction is another thread's.
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
            last = await _query(_last_id)
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
                moved = watcher.look(await _query(_ids_after, watcher.settled), time.monotonic())
            except Exception:
                # The database is away: the clients wait, and so does this.
                moved = False
            if moved:
                self._news.set()
                self._news = asyncio.Event()
            await asyncio.sleep(_LOOK_SECONDS)


_feeds: dict[int, _Feed] = {}


def _feed() -> _Feed:
    """The running loop's own."""
    key = id(asyncio.get_running_loop())
    if key not in _feeds:
        _feeds.clear()
        _feeds[key] = _Feed()
    return _feeds[key]


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


def _problem(status: int, kind: str, title: str) -> HttpResponse:
    answer = JsonResponse({"status": status, "type": kind, "title": title}, status=status, content_type=MEDIA_TYPE)
    if status == 401:
        answer["WWW-Authenticate"] = "Bearer"
    return answer


async def stream(request: HttpRequest, project: str) -> HttpResponse | StreamingHttpResponse:
    """The project's events from now on, or after ``Last-Event-ID``."""
    if request.method != "GET":
        return _problem(405, "method_not_allowed", "only GET")
    header = request.headers.get("Authorization", "").encode("latin-1", "replace")
    if not header:
        return _problem(401, "not_authenticated", "Authentication credentials were not provided.")
    try:
        found = await _query(_admit, header, request.META.get("REMOTE_ADDR", ""), project)
    except APIException as error:
        return _problem(error.status_code, str(error.get_codes()), str(error.detail))
    if found is None:
        return _problem(404, "not_found", "there is no such project")
    last = request.headers.get("Last-Event-ID", "")
    if last and not (last.isdecimal() and len(last) < 19):
        return _problem(400, "invalid", "Last-Event-ID is the id of an event")
    if _feed().clients >= CLIENTS_MAX:
        return _problem(503, "too-many-clients", "too many clients listen already; try again later")
    answer = StreamingHttpResponse(_follow(found, int(last) if last else None), content_type="text/event-stream")
    answer["Cache-Control"] = "no-store"
    answer["X-Accel-Buffering"] = "no"
    return answer


async def _follow(project: Project, last: int | None) -> AsyncIterator[str]:
    feed = _feed()
    await feed.join()
    try:
        assert feed.watcher is not None
        after = last if last is not None else feed.watcher.settled
        deadline = time.monotonic() + _STREAM_SECONDS
        yield "retry: 1000\n\n"
        while time.monotonic() < deadline:
            watcher = feed.watcher
            if after < watcher.settled:
                until = watcher.settled
                events = await _query(_events, project, after, until)
                for event in events:
                    yield f"id: {event['id']}\nevent: {event['kind']}\ndata: {json.dumps(event, default=str)}\n\n"
                after = until if len(events) < _BATCH else events[-1]["id"]
                continue
            await feed.news(min(_KEEP_ALIVE_SECONDS, max(0.1, deadline - time.monotonic())))
            if after >= watcher.settled:
                yield ": nothing new\n\n"
    finally:
        feed.leave()
