"""A person and a worker on a console over a real ASGI server: who may come, how often, how much, and why it ends."""

from __future__ import annotations

import contextlib
import socket as sockets
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from django.utils import timezone
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from recvirt.nestedcloud import console
from recvirt.nestedcloud.central import console_views, consoles, relay
from recvirt.nestedcloud.central.consoles import ConsoleTaken, Sessions, TooManyConsoles
from recvirt.nestedcloud.central.models import (
    ApiToken,
    Event,
    Instance,
    InstanceState,
    Membership,
    Project,
    Role,
    Worker,
)
from recvirt.nestedcloud.console import MESSAGE_BYTES_MAX, Close, ConsoleCall
from recvirt.nestedcloud.model import GIB, MIB
from tests.cloud.conftest import make_user, make_worker
from tests.cloud.test_stream import Server, server

__all__ = ["server"]

#: Seconds for what should happen at once: a busy machine takes longer, and only a failure waits for all of them.
PATIENCE = 60.0


def make_instance(project: Project, worker: Worker | None, name: str = "web", **values: Any) -> Instance:
    """One that runs, as far as the database says."""
    sizes = {"vcpus": 1, "vcpus_max": 1, "memory_bytes": 64 * MIB, "memory_max_bytes": 64 * MIB, "disk_bytes": GIB}
    promised = {"promised_vcpus": 1, "promised_memory_bytes": 64 * MIB, "promised_disk_bytes": GIB}
    fields = {"state": InstanceState.ON, **sizes, **promised, **values}
    return Instance.objects.create(project=project, worker=worker, name=name, **fields)


class Lab:
    """A server with an instance, and what its worker was sent."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.worker = make_worker(features={"console": True})
        self.instance = make_instance(server.project, self.worker)
        self.calls: list[tuple[str, ConsoleCall, float]] = []
        self.fails: Exception | None = None
        self.stack = contextlib.ExitStack()

    def console(self, worker: str, call: ConsoleCall, expires_seconds: float) -> None:
        if self.fails is not None:
            raise self.fails
        self.calls.append((worker, call, expires_seconds))

    def ask(self, token: str = "", what: str = "console", project: str = "lab", **body: Any) -> requests.Response:
        url = f"{self.server.url}/api/v1/projects/{project}/instances/web/{what}"
        words = {"Authorization": f"Bearer {token or self.server.token}"}
        return requests.post(url, json=body, headers=words, timeout=PATIENCE)

    def session(self, **words: Any) -> dict[str, Any]:
        answer = self.ask(**words)
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def dial(self, path: str, ticket: str, **words: Any) -> ClientConnection:
        given = {
            "subprotocols": console.offers(ticket), "compression": None, "max_size": MESSAGE_BYTES_MAX,
            "open_timeout": PATIENCE, "ping_interval": None, **words,
        }  # fmt: skip
        # Entered, because from version 17 on it only then connects.
        url = self.server.url.replace("http", "ws") + path
        made: ClientConnection = self.stack.enter_context(connect(url, **given))
        return made

    def person(self, session: dict[str, Any], **words: Any) -> ClientConnection:
        return self.dial(session["path"], session["ticket"], **words)

    def worker_of(self, session: dict[str, Any], **words: Any) -> ClientConnection:
        call = next(call for _, call, _ in self.calls if call.session == session["session"])
        return self.dial(f"{session['path']}/worker", call.ticket, **words)

    def both(self, **words: Any) -> tuple[ClientConnection, ClientConnection]:
        session = self.session(**words)
        worker = self.worker_of(session)
        return self.person(session), worker

    def kinds(self) -> list[str]:
        return list(Event.objects.order_by("id").values_list("kind", flat=True))


@pytest.fixture
def lab(server: Server, settings: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    settings.WORKER_LOST_SECONDS = 3600.0
    made = Lab(server)
    monkeypatch.setattr(console_views, "_sender", lambda: made)
    monkeypatch.setattr(relay, "JOIN_SECONDS", PATIENCE)
    yield made
    made.stack.close()
    wait_until(lambda: len(consoles.sessions) == 0 or not any(one.ends for one in consoles.sessions._sessions.values()))
    consoles.sessions._sessions.clear()


def wait_until(true: Any, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def closed(socket: ClientConnection) -> tuple[int, str]:
    """How it was closed; what came before is thrown away."""
    try:
        while True:
            socket.recv(timeout=PATIENCE)
    except ConnectionClosed as error:
        assert error.rcvd is not None
        return error.rcvd.code, error.rcvd.reason


def refused(work: Any, *args: Any, **words: Any) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as caught:
        work(*args, **words)
    response = caught.value.response
    return response.status_code, (response.body or b"").decode()


def test_what_is_typed_reaches_the_worker_and_what_it_answers_the_person(lab: Lab) -> None:
    session = lab.session()
    worker_uuid, call, seconds = lab.calls[0]
    assert (worker_uuid, call.instance, call.log, call.force) == (
        str(lab.worker.pk), str(lab.instance.pk), False, False,
    )  # fmt: skip
    assert 0 < seconds <= 60 and session["expires"] > timezone.now().isoformat()
    assert call.ticket != session["ticket"] and call.ticket not in repr(call)
    # The person is there first, and types before anybody listens.
    person = lab.person(session)
    assert person.subprotocol == console.PROTOCOL
    person.send(b"early ")
    worker = lab.worker_of(session)
    worker.send(console.READY)
    assert person.recv(timeout=PATIENCE) == console.READY
    person.send(b"typed\n")
    assert worker.recv(timeout=PATIENCE) + worker.recv(timeout=PATIENCE) == b"early typed\n"  # type: ignore[operator]
    everything = bytes(range(256))
    worker.send(everything)
    assert person.recv(timeout=PATIENCE) == everything
    person.close()
    assert closed(worker)[0] == Close.LEFT
    wait_until(lambda: "console.closed" in lab.kinds())
    assert lab.kinds() == ["console.asked", "console.opened", "console.closed"]
    last = Event.objects.get(kind="console.closed")
    assert last.user is not None and last.user.username == "ada" and last.subject == lab.instance.pk
    assert last.data["why"] == "the person has left"
    text = str(list(Event.objects.values_list("data", flat=True)))
    assert session["ticket"] not in text and call.ticket not in text


def test_a_stopped_instance_is_told_with_a_code_of_its_own(lab: Lab) -> None:
    person, worker = lab.both()
    worker.send(b"bye")
    worker.close(Close.STOPPED, "the instance has stopped")
    assert person.recv(timeout=PATIENCE) == b"bye"
    assert closed(person) == (Close.STOPPED, "the instance has stopped")


@pytest.mark.parametrize("code", [1001, 1011, Close.REVOKED, Close.TAKEN, 4999])
def test_a_worker_does_not_speak_for_the_central_node(lab: Lab, code: int) -> None:
    person, worker = lab.both()
    worker.close(code, "\x1b[2Jsomething")
    assert closed(person) == (Close.LOST, "the worker has gone away")


def test_a_worker_s_reason_can_t_move_the_cursor(lab: Lab) -> None:
    person, worker = lab.both()
    worker.close(Close.REFUSED, "no\x1b[2J")
    assert closed(person) == (Close.REFUSED, "no?[2J")


def test_a_worker_that_vanishes_ends_it(lab: Lab) -> None:
    person, worker = lab.both()
    worker.socket.shutdown(sockets.SHUT_RDWR)
    assert closed(person) == (Close.LOST, "the worker has gone away")


def test_a_ticket_opens_its_own_side_once(lab: Lab) -> None:
    session = lab.session()
    call = lab.calls[0][1]
    # Of the other side, of nobody, with none, in the URL.
    for path, ticket in (
        (session["path"], call.ticket), (f"{session['path']}/worker", session["ticket"]), (session["path"], "x"),
        (session["path"].replace(session["session"], "00000000-0000-4000-8000-000000000000"), session["ticket"]),
    ):  # fmt: skip
        status, body = refused(lab.dial, path, ticket)
        assert status == 403 and "ticket-not-valid" in body
    for offered in ([console.PROTOCOL], console.offers(session["ticket"])[1:], None):
        assert refused(lab.dial, session["path"], "", subprotocols=offered)[0] == 403
    assert refused(lab.dial, f"{session['path']}?ticket={session['ticket']}", "x")[0] == 403
    # None of that has used it up.
    first, worker = lab.person(session), lab.worker_of(session)
    assert refused(lab.person, session)[0] == refused(lab.worker_of, session)[0] == 403
    worker.send(b"still there")
    assert first.recv(timeout=PATIENCE) == b"still there"
    first.close()
    closed(worker)
    assert refused(lab.person, session)[0] == 403


def test_a_ticket_expires(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    session = lab.session()
    worker = lab.worker_of(session)
    monkeypatch.setattr(consoles.sessions, "_clock", lambda: time.monotonic() + consoles.TICKET_SECONDS + 1)
    assert refused(lab.person, session)[0] == 403
    worker.close()
    later = Sessions(lambda: now[0])
    now = [0.0]
    token = ApiToken.objects.select_related("user").get()
    one, ticket, _ = later.open(lab.instance, token)
    now[0] = consoles.TICKET_SECONDS + 1
    assert later.enter(one.uuid, "person", ticket) is None and len(later) == 0


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [("{own}", True), (None, True), ("http://evil.example", False), ("null", False), ("https://{host}", False),
     ("http://127.0.0.1:1", False), ("{own}.evil.example", False), ("", False)],
)  # fmt: skip
def test_a_page_of_another_site_opens_nothing(lab: Lab, origin: str | None, allowed: bool) -> None:
    session = lab.session()
    host = lab.server.url.removeprefix("http://")
    words = {} if origin is None else {"additional_headers": {"Origin": origin.format(own=lab.server.url, host=host)}}
    if allowed:
        lab.person(session, **words)
    else:
        status, body = refused(lab.person, session, **words)
        assert status == 403 and "wrong-origin" in body
        # Its ticket is still good for its owner.
        lab.person(session)


def test_behind_a_tls_front_the_origin_is_https(lab: Lab) -> None:
    session = lab.session()
    own = lab.server.url.replace("http://", "https://")
    lab.person(session, additional_headers={"Origin": own, "X-Forwarded-Proto": "https"})


def test_nothing_else_is_a_websocket(lab: Lab) -> None:
    for path in ("/", "/api/v1/whoami", "/api/v1/projects/lab/events/stream", "/api/v1/console/x"):
        assert refused(lab.dial, path, "x")[0] == 404
    answer = requests.get(lab.server.url + lab.session()["path"], timeout=PATIENCE)
    assert answer.status_code == 426 and answer.headers["Upgrade"] == "websocket"


def test_strangers_readers_and_read_only_tokens_get_no_ticket(lab: Lab) -> None:
    other = Project.objects.create(name="other")
    eve, rita = make_user("eve", other), make_user("rita", lab.server.project, Role.READER)
    ada = Membership.objects.get(project=lab.server.project, user__username="ada").user
    Membership.objects.create(project=other, user=ada)
    for what in ("console", "log"):
        for user, words, status in (
            (eve, {}, 404), (rita, {}, 403), (ada, {"read_only": True}, 403), (ada, {"project": other}, 404),
        ):  # fmt: skip
            assert lab.ask(ApiToken.issue(user, "x", **words)[1], what).status_code == status
        assert lab.ask("rvc_wrong", what).status_code == 401
        # A project that is one's own does not hold another one's instance.
        assert lab.ask(ApiToken.issue(eve, "y")[1], what, project="other").status_code == 404
    assert lab.calls == [] and len(consoles.sessions) == 0


def test_a_second_person_is_told_who_has_it_and_may_take_it(lab: Lab) -> None:
    bob = ApiToken.issue(make_user("bob", lab.server.project), "x")[1]
    person, worker = lab.both()
    answer = lab.ask(bob)
    assert (answer.status_code, answer.json()["type"], answer.json()["user"]) == (409, "console-taken", "ada")
    # One's own other window is refused as well.
    assert lab.ask().status_code == 409
    session = lab.session(token=bob, force=True)
    assert lab.calls[-1][1].force
    assert closed(person) == (Close.TAKEN, "bob has taken the console")
    assert closed(worker)[0] == Close.TAKEN
    second, worker = lab.person(session), lab.worker_of(session)
    worker.send(b"bob's")
    assert second.recv(timeout=PATIENCE) == b"bob's"
    # Logs are no consoles: any number, at any time.
    assert lab.ask(what="log").status_code == lab.ask(what="log").status_code == 201


def test_a_request_that_was_sent_twice_is_no_second_person(lab: Lab) -> None:
    first, second = lab.session(), lab.session()
    assert refused(lab.person, first)[0] == 403
    assert len(consoles.sessions) == 1
    lab.person(second), lab.worker_of(second)
    # What nobody came to is nobody's after a minute.
    bob = ApiToken.issue(make_user("bob", lab.server.project), "x")[1]
    assert lab.ask(bob).status_code == 409


def test_there_is_an_end_to_sessions(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consoles, "SESSIONS_MAX", 2)
    lab.session(what="log")
    lab.session()
    assert lab.ask(what="log").status_code == 503
    # Taking one's place makes no new one.
    assert lab.ask().status_code == 201
    assert issubclass(TooManyConsoles, Exception) and issubclass(ConsoleTaken, Exception)


@pytest.mark.parametrize("state", [InstanceState.OFF, InstanceState.FAILED, InstanceState.NEW])
def test_what_does_not_run_has_no_console_but_a_log(lab: Lab, state: str) -> None:
    Instance.objects.update(state=state)
    assert lab.ask().json()["type"] == "wrong-state"
    assert lab.ask(what="log", follow=True).status_code == 201
    assert (lab.calls[0][1].log, lab.calls[0][1].follow) == (True, True)
    Instance.objects.update(state=InstanceState.DELETED)
    assert lab.ask(what="log").status_code == 404


def test_a_worker_that_is_away_is_told_at_once(lab: Lab) -> None:
    Worker.objects.update(last_seen=None)
    answer = lab.ask()
    assert (answer.status_code, answer.json()["type"]) == (503, "worker-away")
    Worker.objects.update(last_seen=timezone.now(), features={})
    assert lab.ask().json()["type"] == "no-console"
    Worker.objects.update(features={"console": True})
    lab.fails = OSError("amqp://central:secret@127.0.0.1 refused")
    answer = lab.ask()
    assert answer.status_code == 503 and "secret" not in answer.text
    assert len(consoles.sessions) == 0 and lab.kinds() == []


def test_a_worker_that_does_not_answer_is_told_within_seconds(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "JOIN_SECONDS", 0.3)
    code, why = closed(lab.person(lab.session()))
    assert code == Close.NO_WORKER and "did not answer" in why
    assert len(consoles.sessions) == 0


def test_a_person_who_does_not_come_is_not_waited_for(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "JOIN_SECONDS", 0.2)
    # It waits for as long as the ticket is good, by a clock that stands still: no longer than for any other side.
    monkeypatch.setattr(consoles.sessions, "_clock", lambda: 0.0)
    assert closed(lab.worker_of(lab.session())) == (Close.LEFT, "the person did not come")


def test_a_person_who_leaves_before_the_worker_comes_frees_the_console(lab: Lab) -> None:
    bob = ApiToken.issue(make_user("bob", lab.server.project), "x")[1]
    person = lab.person(lab.session())
    person.send(b"typed, and never read by anybody")
    assert lab.ask(bob).status_code == 409
    person.close()
    lab.person(lab.session(token=bob, force=True)).close()
    # Without a word of typing it is noticed at once.
    wait_until(lambda: lab.ask(bob).status_code == 201, PATIENCE / 4)


def test_refusals_leave_no_fault_in_the_server_s_log(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    for path in ("/api/v1/console/x", lab.session()["path"]):
        assert refused(lab.dial, path, "x")[0] in (403, 404)
    time.sleep(0.5)
    assert [record for record in caplog.records if record.name.startswith("uvicorn")] == []


def test_a_message_that_is_too_large_ends_it(lab: Lab) -> None:
    person, worker = lab.both()
    person.send(b"x" * MESSAGE_BYTES_MAX)
    assert len(worker.recv(timeout=PATIENCE)) == MESSAGE_BYTES_MAX
    person.send(b"x" * (MESSAGE_BYTES_MAX + 1))
    assert closed(person)[0] == Close.TOO_LARGE
    assert closed(worker)[0] in (Close.TOO_LARGE, Close.LEFT)


def test_a_message_that_a_server_let_through_is_too_large_all_the_same(lab: Lab) -> None:
    session = consoles.sessions.open(lab.instance, ApiToken.objects.select_related("user").get())[0]
    assert relay._fault(session, "person", b"x" * (MESSAGE_BYTES_MAX + 1)) is not None
    assert relay._fault(session, "person", b"x" * MESSAGE_BYTES_MAX) is None


@pytest.mark.parametrize("text", ["ready", "typed", ""])
def test_a_person_has_no_words_for_the_worker(lab: Lab, text: str) -> None:
    person, worker = lab.both()
    person.send(text)
    assert closed(person)[0] == Close.UNSUPPORTED and closed(worker)[0] == Close.UNSUPPORTED


def test_a_worker_has_one_word_for_the_person(lab: Lab) -> None:
    person, worker = lab.both()
    worker.send("trust me")
    assert closed(person)[0] == Close.UNSUPPORTED


def test_a_log_takes_no_input_and_leaves_no_event(lab: Lab) -> None:
    person, worker = lab.both(what="log")
    worker.send(b"said")
    assert person.recv(timeout=PATIENCE) == b"said"
    person.send(b"x")
    assert closed(person)[0] == Close.UNSUPPORTED
    closed(worker)
    assert lab.kinds() == []


def test_a_person_who_never_reads_holds_no_memory(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "STUCK_SECONDS", 0.5)
    session = lab.session()
    worker = lab.worker_of(session)
    # By hand: a client that shakes hands and then reads nothing.
    host, port = lab.server.url.removeprefix("http://").split(":")
    with sockets.socket() as mute:
        mute.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 8192)
        mute.connect((host, int(port)))
        mute.sendall((
            f"GET {session['path']} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Protocol: {', '.join(console.offers(session['ticket']))}\r\n\r\n"
        ).encode())  # fmt: skip
        assert mute.recv(12) == b"HTTP/1.1 101"
        worker.socket.settimeout(0.2)
        sent, block = 0, b"x" * 32768
        # It is not taken any more long before this: the operating system's buffers are what there is.
        with pytest.raises((ConnectionClosed, OSError)):
            while sent < 256 * MIB:
                worker.send(block)
                sent += len(block)
        assert sent < 64 * MIB
        wait_until(lambda: len(consoles.sessions) == 0)
    assert Event.objects.filter(kind="console.asked").count() == 1


def test_no_more_is_on_its_way_than_the_guest_takes(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    person, worker = lab.both()
    for number in range(console.WINDOW + 2):
        person.send(b"%d" % number)
    for number in range(console.WINDOW):
        assert worker.recv(timeout=PATIENCE) == b"%d" % number
    with pytest.raises(TimeoutError):
        worker.recv(timeout=0.5)
    # The next one comes when one was taken, and the person is told of that.
    worker.send(console.TAKEN)
    assert worker.recv(timeout=PATIENCE) == b"%d" % console.WINDOW
    assert person.recv(timeout=PATIENCE) == console.TAKEN
    with pytest.raises(TimeoutError):
        worker.recv(timeout=0.5)


def test_a_worker_that_takes_nothing_is_told_of(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "STUCK_SECONDS", 0.5)
    person, worker = lab.both()
    for _ in range(console.WINDOW + 1):
        person.send(b"x")
    assert closed(person) == (Close.STUCK, "the worker does not read")
    assert closed(worker)[0] == Close.STUCK


@pytest.mark.parametrize(
    ("bound", "code", "words"), [("IDLE_SECONDS", Close.IDLE, "nothing"), ("TOTAL_SECONDS", Close.TOO_LONG, "open for")]
)
def test_there_is_an_end_to_time(lab: Lab, monkeypatch: pytest.MonkeyPatch, bound: str, code: int, words: str) -> None:
    monkeypatch.setattr(relay, "WATCH_SECONDS", 0.1)
    monkeypatch.setattr(relay, bound, 0.3)
    person, worker = lab.both()
    assert closed(person)[0] == code and words in (person.close_reason or "")
    assert closed(worker)[0] == code


def _revoke_token(lab: Lab) -> None:
    ApiToken.objects.all().delete()


def _expel(lab: Lab) -> None:
    Membership.objects.update(role=Role.READER)


def _deactivate(lab: Lab) -> None:
    Membership.objects.get().user.__class__.objects.update(is_active=False)


def _delete(lab: Lab) -> None:
    Instance.objects.update(state=InstanceState.DELETED)


@pytest.mark.parametrize("change", [_revoke_token, _expel, _deactivate, _delete])
def test_who_may_no_more_is_put_out(lab: Lab, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    monkeypatch.setattr(relay, "WATCH_SECONDS", 0.1)
    person, worker = lab.both()
    worker.send(b"hello")
    assert person.recv(timeout=PATIENCE) == b"hello"
    time.sleep(0.4)
    worker.send(b"still")
    assert person.recv(timeout=PATIENCE) == b"still"
    change(lab)
    assert closed(person)[0] == Close.REVOKED and closed(worker)[0] == Close.REVOKED


def test_a_database_that_is_away_does_not_put_anybody_out(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_session: Any) -> bool:
        raise OSError("the database is away")

    monkeypatch.setattr(relay, "WATCH_SECONDS", 0.1)
    monkeypatch.setattr(relay, "may_still", away)
    person, worker = lab.both()
    time.sleep(0.5)
    worker.send(b"still")
    assert person.recv(timeout=PATIENCE) == b"still"


def test_many_consoles_take_no_thread_each(lab: Lab) -> None:
    import threading

    pairs = []
    for number in range(10):
        session = lab.session(what="log")
        pairs.append((lab.person(session), lab.worker_of(session), b"%d" % number))
    # The clients of this test have a thread each; the server has none.
    of_clients = 2 * len(pairs) * 2
    assert threading.active_count() < of_clients + 15
    for person, worker, text in pairs:
        worker.send(text)
        assert person.recv(timeout=PATIENCE) == text


@pytest.mark.parametrize("text", ["", "plain", "ä" * 200, "a\nb\x1b[2J", "\ud800"])
def test_a_reason_fits_into_a_closing(text: str) -> None:
    made = console.reason(text)
    assert len(made.encode()) <= 123 and made.isprintable()


def test_a_ticket_is_found_among_what_is_offered() -> None:
    ticket = console.new_ticket()
    assert console.ticket_in(console.offers(ticket)) == ticket and len(ticket) >= 43
    assert console.ticket_in([*console.offers(ticket), "ticket.another"]) == ""
    assert console.ticket_in(["ticket." + ticket]) == console.ticket_in([]) == ""
    assert console.opens(ticket, console.digest_of(ticket)) and not console.opens("", console.digest_of(ticket))
    assert ticket not in console.digest_of(ticket)
