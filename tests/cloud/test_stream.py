"""The event stream over a real ASGI server: resumed, closed to strangers, and held by no thread."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import requests
from django.core.cache import cache

from recvirt.nestedcloud.central import audit, relay, stream
from recvirt.nestedcloud.central.models import ApiToken, Event, Membership, Project
from recvirt.nestedcloud.client.api import Access, Api, ApiError
from recvirt.nestedcloud.client.sight_commands import _line, follow
from tests.cloud.conftest import make_user


def test_what_is_settled_has_no_gap_before_it() -> None:
    watcher = stream.Watcher(10)
    assert watcher.look([11, 12], 0.0) and watcher.settled == 12
    # 13 was given to a transaction that has not ended yet.
    assert not watcher.look([14, 15], 1.0) and watcher.settled == 12
    assert watcher.look([13, 14, 15], 1.5) and watcher.settled == 15
    # 16 was undone and never comes.
    assert not watcher.look([17], 2.0)
    assert not watcher.look([17], 3.9)
    assert watcher.look([17, 18], 4.1) and watcher.settled == 18
    # The next gap is waited for anew.
    assert not watcher.look([20], 4.2)


@dataclass
class Server:
    url: str
    project: Project
    token: str

    def get(self, token: str = "", project: str = "lab", **headers: str) -> requests.Response:
        words = {"Authorization": f"Bearer {token or self.token}", **headers}
        return requests.get(
            f"{self.url}/api/v1/projects/{project}/events/stream", headers=words, stream=True, timeout=10
        )

    def note(self, kind: str, **data: Any) -> Event:
        return audit.note(None, kind, None, self.project, **data)


@pytest.fixture
def server(transactional_db: None, settings: Any) -> Iterator[Server]:
    """The central node's application under uvicorn, in a thread."""
    uvicorn = pytest.importorskip("uvicorn")
    cache.clear()
    settings.ALLOWED_HOSTS = ["127.0.0.1"]
    from recvirt.nestedcloud.central.asgi import application

    project = Project.objects.create(name="lab")
    user = make_user("ada", project)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        config = uvicorn.Config(
            application, log_level="error", lifespan="off", timeout_graceful_shutdown=1, **relay.SERVER_OPTIONS
        )
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.01)
        yield Server(f"http://127.0.0.1:{port}", project, ApiToken.issue(user, "x")[1])
        running.should_exit = True
        thread.join(10)


def read(answer: requests.Response, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for line in answer.iter_lines(chunk_size=1, decode_unicode=True):
        if line.startswith("data: "):
            found.append(json.loads(line.removeprefix("data: ")))
        if len(found) == count:
            break
    return found


def test_events_come_as_they_happen_and_go_on_after_the_last_one(server: Server) -> None:
    first = server.note("one")
    with server.get(**{"Last-Event-ID": str(first.pk - 1)}) as answer:
        assert answer.status_code == 200 and answer.headers["Content-Type"] == "text/event-stream"
        assert answer.headers["Cache-Control"] == "no-store"
        threading.Timer(0.3, server.note, ("two",)).start()
        assert [event["kind"] for event in read(answer, 2)] == ["one", "two"]
    server.note("three")
    with server.get(**{"Last-Event-ID": str(first.pk)}) as answer:
        assert [event["kind"] for event in read(answer, 2)] == ["two", "three"]


def test_other_projects_events_stay_theirs(server: Server) -> None:
    first = server.note("mine")
    audit.note(None, "theirs", None, Project.objects.create(name="other"))
    audit.note(None, "nobody's", None, None)
    server.note("mine again")
    with server.get(**{"Last-Event-ID": str(first.pk - 1)}) as answer:
        assert [event["kind"] for event in read(answer, 2)] == ["mine", "mine again"]


def test_strangers_get_nothing(server: Server) -> None:
    eve = make_user("eve", other := Project.objects.create(name="other"))
    theirs = ApiToken.issue(eve, "x")[1]
    ada = Membership.objects.get(project=server.project).user
    Membership.objects.create(project=other, user=ada)
    scoped = ApiToken.issue(ada, "x", project=other)[1]
    assert requests.get(f"{server.url}/api/v1/projects/lab/events/stream", timeout=10).status_code == 401
    assert server.get("rvc_wrong").status_code == 401
    assert server.get(theirs).status_code == server.get(theirs, "absent").status_code == 404
    assert server.get(scoped).status_code == 404
    assert server.get(**{"Last-Event-ID": "x"}).status_code == 400
    assert requests.post(f"{server.url}/api/v1/projects/lab/events/stream", timeout=10).status_code == 405


def test_many_clients_take_no_thread_each(server: Server) -> None:
    count = 60
    with contextlib.ExitStack() as stack:
        first = server.note("start")
        answers = [stack.enter_context(server.get(**{"Last-Event-ID": str(first.pk)})) for _ in range(count)]
        assert all(answer.status_code == 200 for answer in answers)
        time.sleep(1.0)
        assert threading.active_count() < count / 2
        server.note("news")
        assert all(read(answer, 1)[0]["kind"] == "news" for answer in answers)


def test_there_is_an_end_to_clients(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CLIENTS_MAX", 1)
    with server.get() as one:
        lines = one.iter_lines(chunk_size=1)
        next(lines)
        assert server.get().status_code == 503
    # It is noticed at once that a client has gone.
    deadline = time.monotonic() + 5
    while server.get().status_code == 503:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stream_ends_after_a_while_and_the_client_goes_on(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "STREAM_SECONDS", 0.5)
    first = server.note("first")
    events = follow(Api(Access(server.url, server.token, "lab")), str(first.pk - 1))
    assert next(events)["kind"] == "first"
    time.sleep(1.0)
    server.note("second")
    assert next(events)["kind"] == "second"


def test_a_token_that_is_revoked_ends_a_stream(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "STREAM_SECONDS", 0.5)
    first = server.note("first")
    events = follow(Api(Access(server.url, server.token, "lab")), str(first.pk - 1))
    next(events)
    ApiToken.objects.all().delete()
    with pytest.raises(ApiError) as caught:
        next(events)
    assert caught.value.kind == "authentication_failed"


def test_an_event_can_t_move_the_terminal_s_cursor() -> None:
    event = {"at": "2027-01-01T08:00:00Z", "kind": "x", "user": None, "data": {"message": "a\x1b[2Jb\nc"}}
    assert _line(event) == "2027-01-01 08:00:00  x  -  message=a?[2Jb?c"
