"""The worker's side of a console: it dials, joins and tells why it ends, whatever libvirt and the guest do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import libvirt
import pytest
from websockets.asyncio.server import ServerConnection, serve

from recvirt.nestedcloud import console
from recvirt.nestedcloud.console import MESSAGE_BYTES_MAX, Close, ConsoleCall, is_safe_url
from recvirt.nestedcloud.model import Fault, ModelError, Power, decode, encode
from recvirt.nestedcloud.queue import console_queue
from recvirt.nestedcloud.worker import console_log, consoles, service
from recvirt.nestedcloud.worker.console_stream import open_console
from recvirt.nestedcloud.worker.consoles import Consoles
from recvirt.nestedcloud.worker.errors import ActionError
from tests.cloud.test_worker import Bench, bench

__all__ = ["bench"]

SESSION, INSTANCE = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
PATIENCE = 60.0


def call_of(**values: Any) -> ConsoleCall:
    return ConsoleCall(**{"session": SESSION, "instance": INSTANCE, "ticket": "the-ticket", **values})


class Stream:
    """A guest that sends back what it gets; ``None`` in its mouth is its end."""

    def __init__(self) -> None:
        self.says: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.takes = True
        self.closed = 0

    async def read(self) -> bytes:
        return await self.says.get() or b""

    async def write(self, data: bytes) -> bool:
        if not self.takes:
            await asyncio.Event().wait()
        self.says.put_nowait(data)
        return True

    def close(self) -> None:
        self.closed += 1


class Guests:
    """A hypervisor, as far as consoles need one."""

    def __init__(self) -> None:
        self.active = True
        self.fails: Exception | None = None
        self.sleeps = 0.0
        self.host: Any = self
        self.connection = "the connection"
        self.closed = 0

    def close(self) -> None:
        self.closed += 1

    def get(self, uuid: str) -> str:
        time.sleep(self.sleeps)
        if self.fails is not None:
            raise self.fails
        return uuid

    def is_active(self, uuid: str) -> bool:
        self.get(uuid)
        return self.active

    def console_log_path(self, instance: str) -> Path:
        return Path(f"/{instance}.log")


class Central:
    """The other side, and what was opened when."""

    def __init__(self, url: str, guests: Guests) -> None:
        self.guests = guests
        self.arrived: asyncio.Queue[ServerConnection] = asyncio.Queue()
        self.streams: list[Stream] = []
        self.forced: list[bool] = []
        self.open_before: list[int] = []
        self.consoles = Consoles(url, lambda: guests, lambda: None)  # type: ignore[arg-type, return-value]
        self.tasks: list[asyncio.Task[None]] = []

    def open(self, _domain: str, force: bool, _loop: Any) -> Stream:
        self.open_before.append(sum(not stream.closed for stream in self.streams))
        self.forced.append(force)
        self.streams.append(Stream())
        return self.streams[-1]

    async def answer(self, **values: Any) -> ServerConnection:
        self.tasks.append(asyncio.create_task(self.consoles.answer(call_of(**values))))
        return await asyncio.wait_for(self.arrived.get(), PATIENCE)

    async def ended(self, socket: ServerConnection) -> tuple[int | None, str | None]:
        await asyncio.wait_for(socket.wait_closed(), PATIENCE)
        return socket.close_code, socket.close_reason


Test = Callable[[Central], Awaitable[None]]


def run(test: Test, monkeypatch: pytest.MonkeyPatch) -> Central:
    """Run a test against a server that keeps what arrives."""

    @contextlib.asynccontextmanager
    async def central() -> AsyncIterator[Central]:
        async def handle(socket: ServerConnection) -> None:
            made.arrived.put_nowait(socket)
            await socket.wait_closed()

        def choose(_socket: Any, offered: Any) -> Any:
            return console.PROTOCOL if console.ticket_in(offered) == "the-ticket" else None

        words: dict[str, Any] = {"subprotocols": [console.PROTOCOL], "select_subprotocol": choose}
        async with serve(handle, "127.0.0.1", 0, ping_interval=None, **words) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            made = Central(f"http://127.0.0.1:{port}", Guests())
            monkeypatch.setattr(consoles, "open_console", made.open)
            try:
                yield made
            finally:
                for task in made.tasks:
                    task.cancel()
                await asyncio.gather(*made.tasks, return_exceptions=True)

    async def whole() -> Central:
        async with central() as made, asyncio.timeout(2 * PATIENCE):
            await test(made)
        return made

    return asyncio.run(whole())


def test_a_guest_is_joined_to_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(central: Central) -> None:
        socket = await central.answer(force=True)
        assert socket.request is not None and socket.request.path == f"/api/v1/console/{SESSION}/worker"
        assert "ticket" not in socket.request.path and socket.subprotocol == console.PROTOCOL
        assert await socket.recv() == console.READY
        await socket.send(b"hello")
        # What the guest says, and that it has taken it, in any order.
        assert {await socket.recv(), await socket.recv()} == {b"hello", console.TAKEN}
        # It is given back whoever ends it.
        await socket.close(Close.TAKEN)
        await asyncio.wait_for(central.tasks[0], PATIENCE)

    done = run(test, monkeypatch)
    assert [stream.closed for stream in done.streams] == [1] and done.forced == [True] and done.guests.closed == 1


@pytest.mark.parametrize(
    ("active", "code", "words"), [(False, Close.STOPPED, "has stopped"), (True, Close.REFUSED, "on the host itself")]
)
def test_it_is_told_why_a_console_ends(monkeypatch: pytest.MonkeyPatch, active: bool, code: int, words: str) -> None:
    monkeypatch.setattr(consoles, "_STOP_PAUSE_SECONDS", 0.01)

    async def test(central: Central) -> None:
        socket = await central.answer()
        await socket.recv()
        central.guests.active = active
        central.streams[0].says.put_nowait(None)
        ended = await central.ended(socket)
        assert ended[0] == code and words in (ended[1] or "")
        # The person is told first, then libvirt gets its stream back.
        await asyncio.wait_for(central.tasks[0], PATIENCE)

    assert run(test, monkeypatch).streams[0].closed == 1


@pytest.mark.parametrize("log", [False, True])
def test_what_libvirt_says_reaches_the_person(monkeypatch: pytest.MonkeyPatch, log: bool) -> None:
    async def test(central: Central) -> None:
        central.guests.fails = ActionError(Fault.NOT_FOUND, "there is no domain on this host\x1b[2J")
        assert await central.ended(await central.answer(log=log)) == (
            Close.REFUSED, "there is no domain on this host?[2J",
        )  # fmt: skip

    run(test, monkeypatch)


def test_a_libvirt_that_hangs_is_told_of_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consoles, "LIBVIRT_SECONDS", 0.2)

    async def test(central: Central) -> None:
        central.guests.sleeps = 2.0
        monkeypatch.setattr(consoles, "open_console", lambda domain, *_: central.open(domain, False, None))
        code, why = await central.ended(await central.answer())
        assert code == Close.REFUSED and "did not answer" in (why or "")

    run(test, monkeypatch)


def test_a_guest_that_does_not_read_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consoles, "_WRITE_SECONDS", 0.2)

    async def test(central: Central) -> None:
        socket = await central.answer()
        await socket.recv()
        central.streams[0].takes = False
        await socket.send(b"x")
        code, why = await central.ended(socket)
        assert code == Close.REFUSED and "does not read" in (why or "")

    run(test, monkeypatch)


def test_another_session_for_the_same_instance_ends_the_one_before_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(central: Central) -> None:
        first = await central.answer()
        await first.recv()
        second = await central.answer(session=INSTANCE, force=True)
        await second.recv()
        await central.ended(first)
        await second.send(b"x")
        assert b"x" in {await second.recv(), await second.recv()}

    done = run(test, monkeypatch)
    assert done.open_before == [0, 0] and [stream.closed for stream in done.streams] == [1, 1]


def test_there_is_an_end_to_consoles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consoles, "CONSOLES_MAX", 1)

    async def test(central: Central) -> None:
        await (await central.answer()).recv()
        await asyncio.wait_for(central.consoles.answer(call_of(instance=SESSION)), PATIENCE)
        assert central.arrived.empty()

    assert len(run(test, monkeypatch).streams) == 1


def test_a_central_node_that_is_away_is_logged_without_the_ticket(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_ca() -> Any:
        raise FileNotFoundError("/etc/recvirt-cloud/tls/cert.pem")

    async def away(url: str, tls: Any) -> None:
        await Consoles(url, Guests, tls).answer(call_of())  # type: ignore[arg-type]

    asyncio.run(away("http://127.0.0.1:1", lambda: None))
    asyncio.run(away("https://127.0.0.1:1", no_ca))
    assert len(caplog.records) == 2 and "cert.pem" in caplog.text and "the-ticket" not in caplog.text


def test_what_speaks_another_protocol_gets_no_console(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(central: Central) -> None:
        await asyncio.wait_for(central.consoles.answer(call_of(ticket="another")), PATIENCE)

    with caplog.at_level(logging.ERROR, consoles.__name__):
        assert run(test, monkeypatch).streams == []
    assert "knows no consoles" in caplog.text and "another" not in caplog.text


def test_a_log_comes_in_pieces_and_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consoles, "_LOG_PAUSE_SECONDS", 0.05)
    said = [b"x" * (MESSAGE_BYTES_MAX + 10)]
    asked: list[Any] = []

    def read_log(connection: Any, path: Path, offset: int) -> tuple[bytes, int]:
        asked.append((connection, path.name, offset))
        data = b"".join(said)
        return data[offset:], len(data)

    monkeypatch.setattr(consoles, "read_log", read_log)

    async def test(central: Central) -> None:
        socket = await central.answer(log=True)
        assert await socket.recv() == console.READY
        assert len(await socket.recv()) == MESSAGE_BYTES_MAX and len(await socket.recv()) == 10
        assert await central.ended(socket) == (Close.LEFT, "")
        socket = await central.answer(log=True, follow=True)
        for _ in range(3):
            await socket.recv()
        said.append(b"news")
        assert await socket.recv() == b"news"
        await socket.close()
        await asyncio.wait_for(central.tasks[-1], PATIENCE)

    assert run(test, monkeypatch).streams == []
    assert asked[0] == ("the connection", f"{INSTANCE}.log", 0)
    assert MESSAGE_BYTES_MAX + 10 in [offset for _, _, offset in asked]


class Pool:
    """libvirt's storage, as far as a log needs it; ``files`` are what is in the folder, ``known`` what it has seen."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.known: set[str] = set()
        self.there = False
        self.made = ""

    def storagePoolLookupByName(self, name: str) -> Pool:  # noqa: N802
        if not self.there:
            error = libvirt.libvirtError("no pool")
            error.err = (libvirt.VIR_ERR_NO_STORAGE_POOL, 18, "no pool", 2, "", None, None, -1, -1)
            raise error
        assert name == console_log.POOL
        return self

    def storagePoolCreateXML(self, text: str) -> Pool:  # noqa: N802
        self.there, self.made = True, text
        return self

    def refresh(self) -> None:
        self.known = set(self.files)

    def storageVolLookupByName(self, name: str) -> Any:  # noqa: N802
        if name not in self.known:
            error = libvirt.libvirtError("no volume")
            error.err = (libvirt.VIR_ERR_NO_STORAGE_VOL, 18, "no volume", 2, "", None, None, -1, -1)
            raise error
        pool = self

        class Volume:
            def info(self) -> list[int]:
                return [0, len(pool.files[name]), 0]

            def download(self, stream: Any, offset: int, count: int) -> None:
                stream.data = pool.files[name][offset : offset + count]

        return Volume()

    def newStream(self) -> Any:  # noqa: N802
        class Fetch:
            data = b""

            def recv(self, count: int) -> bytes:
                piece, self.data = self.data[:count], self.data[count:]
                return piece

            def finish(self) -> None:
                assert self.data == b""

        return Fetch()


def test_a_log_is_read_on_from_where_it_was_and_from_the_start_when_it_was_begun_anew(tmp_path: Path) -> None:
    pool = Pool()
    path = tmp_path / 'a"<b>.log'
    assert console_log.read_log(pool, path, 0) == (b"", 0)
    assert pool.made.count("<path>") == 1 and str(path.parent) in pool.made
    pool.files[path.name] = b"first"
    assert console_log.read_log(pool, path, 0) == (b"first", 5)
    pool.files[path.name] += b" second"
    assert console_log.read_log(pool, path, 5) == (b" second", 12)
    assert console_log.read_log(pool, path, 12) == (b"", 12)
    pool.files[path.name] = b"anew"
    assert console_log.read_log(pool, path, 12) == (b"anew", 4)


def test_libvirt_s_test_driver_has_no_console_and_says_so(bench: Bench) -> None:
    spec = bench.launched()
    domain = bench.agent.hypervisor.get(spec.uuid)
    with pytest.raises(ActionError) as caught:
        open_console(domain, False, asyncio.new_event_loop())
    assert caught.value.fault is Fault.NOT_SUPPORTED
    domain.destroy()
    assert bench.power(spec) is Power.STOPPED and not bench.agent.hypervisor.is_active(spec.uuid)
    with pytest.raises(ActionError, match="does not run"):
        open_console(domain, False, asyncio.new_event_loop())
    assert not bench.agent.hypervisor.is_active(SESSION)


def config(tmp_path: Path, **values: Any) -> Path:
    words = {
        "uuid": SESSION, "name": "w1", "cloud": INSTANCE, "broker": "filesystem:/x", "libvirt": "test:///default",
        "domain_type": "test", "images_dir": str(tmp_path / "i"), "blocks_dir": str(tmp_path / "b"),
        "run_dir": str(tmp_path / "r"), **values,
    }  # fmt: skip
    path = tmp_path / "worker.toml"
    path.write_text("".join(f'{name} = "{value}"\n' for name, value in words.items()))
    return path


def test_the_central_node_of_an_image_is_where_it_is_looked_for(tmp_path: Path) -> None:
    found = service.load(config(tmp_path))
    assert (found.api, found.api_ca) == ("https://127.0.0.1", "/etc/recvirt-cloud/tls/cert.pem")
    with pytest.raises(service.ConfigError, match="https"):
        service.load(config(tmp_path, api="http://cloud.example.org"))
    assert consoles.tls_context(service.load(config(tmp_path, api="http://127.0.0.1:1"))) is None
    made = consoles.tls_context(service.load(config(tmp_path, api="https://cloud.example.org", api_ca="")))
    assert made is not None and made.check_hostname
    with pytest.raises(OSError):
        consoles.tls_context(service.load(config(tmp_path, api_ca=str(tmp_path / "absent"))))


def test_a_worker_says_whether_it_has_consoles(tmp_path: Path) -> None:
    loaded = service.load(config(tmp_path))
    assert service.make_agent(loaded, connection=object()).features["console"] is False
    loaded = service.load(config(tmp_path, domain_type="qemu"))
    assert service.make_agent(loaded, connection=object()).features["console"] is True


@pytest.mark.parametrize(
    ("url", "safe"),
    [("https://cloud.example.org", True), ("http://127.0.0.1:8780", True), ("http://localhost", True),
     ("http://[::1]:1", True), ("http://cloud.example.org", False), ("http://127.0.0.1.evil.example", False),
     ("http://localhost@evil.example", False), ("ftp://localhost", False), ("https://", False), ("http://[", False),
     ("", False)],
)  # fmt: skip
def test_a_secret_is_sent_where_nobody_reads_along(url: str, safe: bool) -> None:
    assert is_safe_url(url) is safe


def test_a_call_crosses_the_queue_and_shows_no_ticket() -> None:
    call = call_of(log=True)
    assert decode(ConsoleCall, encode(call)) == call and "the-ticket" not in repr(call)
    for bad in ({"session": "../x"}, {"instance": "x"}, {"log": 1}, {"more": True}):
        with pytest.raises(ModelError):
            decode(ConsoleCall, {**encode(call), **bad})
    assert console_queue(SESSION) == f"worker.{SESSION}.console"
