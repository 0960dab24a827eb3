"""The consoles of a worker's instances: called to a session, it dials the central node and joins the guest to it.

A process of its own beside the one that carries out operations: neither waits for the other. Owns the WebSockets and
how many there are. Does not own libvirt's streams (``console_stream``).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import ssl
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from celery import Celery
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from recvirt.nestedcloud import console
from recvirt.nestedcloud.console import MESSAGE_BYTES_MAX, PING_SECONDS, Close, ConsoleCall
from recvirt.nestedcloud.model import Fault, ModelError, decode
from recvirt.nestedcloud.pinned import pinned_context
from recvirt.nestedcloud.queue import CONSOLE, console_queue, make_app
from recvirt.nestedcloud.worker.console_log import read_log
from recvirt.nestedcloud.worker.console_stream import (
    WRITE_BYTES,
    ConsoleStream,
    ensure_event_loop,
    open_console,
)
from recvirt.nestedcloud.worker.errors import ActionError
from recvirt.nestedcloud.worker.hypervisor import Hypervisor
from recvirt.nestedcloud.worker.service import Config, make_host

log = logging.getLogger(__name__)

CONSOLES_MAX = 50
DIAL_SECONDS = 10.0
#: A libvirtd that hangs is told of, and not waited for.
LIBVIRT_SECONDS = 15.0
#: A guest that takes nothing for so long does not read.
_WRITE_SECONDS = 10.0
#: For a libvirtd that asks a slow guest to take more before it reads on; it is given a minute.
_KEEP_ALIVE = (10, 6)
_LOG_PAUSE_SECONDS = 1.0
_STOP_LOOKS, _STOP_PAUSE_SECONDS = 10, 0.2

T = TypeVar("T")


class Consoles:
    """Those of one worker, all on one asyncio loop."""

    def __init__(
        self, api: str, hypervisors: Callable[[], Hypervisor], tls: Callable[[], ssl.SSLContext | None]
    ) -> None:  # fmt: skip
        """``api`` is the central node's URL; ``tls`` makes what its certificate is checked with, which may change.

        ``hypervisors`` makes one with a connection of its own: a guest that does not read stops what is on its own.
        """
        self._url = api.rstrip("/").replace("http", "ws", 1)
        self._hypervisors = hypervisors
        self._tls = tls
        self._open: dict[str, asyncio.Task[None]] = {}

    async def answer(self, call: ConsoleCall) -> None:
        """Bring a console, or its log, to a session, and stay until that ends."""
        if len(self._open) >= CONSOLES_MAX:
            log.error("%s consoles are open: there is no room for another one", CONSOLES_MAX)
            return
        task = asyncio.current_task()
        assert task is not None
        key = call.session if call.log else call.instance
        before = self._open.get(key)
        self._open[key] = task
        try:
            if before is not None:
                # Its session is over, or it would not be called to another one; the console must be free again.
                before.cancel()
                await asyncio.wait([before], timeout=LIBVIRT_SECONDS)
            await self._dial(call)
        finally:
            if self._open.get(key) is task:
                del self._open[key]

    async def _dial(self, call: ConsoleCall) -> None:
        url = f"{self._url}{console.PATH}{call.session}/worker"
        words: dict[str, Any] = {
            "subprotocols": console.offers(call.ticket), "max_size": MESSAGE_BYTES_MAX, "max_queue": 4,
            "compression": None, "open_timeout": DIAL_SECONDS, "close_timeout": 5,
            "ping_interval": PING_SECONDS, "ping_timeout": PING_SECONDS,
        }  # fmt: skip
        hypervisor = self._hypervisors()
        try:
            async with connect(url, ssl=self._tls(), **words) as socket:
                if socket.subprotocol != console.PROTOCOL:
                    log.error("%s answers, and knows no consoles", self._url)
                    return
                try:
                    await (_tell if call.log else _join)(call, hypervisor, socket)
                except ActionError as error:
                    await socket.close(Close.REFUSED, console.reason(error.message))
        except ConnectionClosed:
            pass
        except (OSError, WebSocketException) as error:
            log.error("the central node can't be reached for a console: %s: %s", type(error).__name__, error)
        finally:
            await _to_its_end(asyncio.to_thread(hypervisor.close))


async def _libvirt(work: Callable[[], T]) -> T:
    """In a thread: libvirtd is waited for."""
    try:
        async with asyncio.timeout(LIBVIRT_SECONDS):
            return await asyncio.to_thread(work)
    except TimeoutError:
        raise ActionError(Fault.TIMED_OUT, f"libvirt did not answer in {LIBVIRT_SECONDS:.0f} s") from None


async def _join(call: ConsoleCall, hypervisor: Hypervisor, socket: ClientConnection) -> None:
    loop = asyncio.get_running_loop()
    stream = await _libvirt(lambda: open_console(hypervisor.get(call.instance), call.force, loop))
    try:
        await socket.send(console.READY)
        works: list[Coroutine[Any, Any, tuple[int, str]]] = [
            _from_guest(call, hypervisor, stream, socket), _to_guest(stream, socket),
        ]  # fmt: skip
        tasks = [asyncio.create_task(work) for work in works]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        code, reason = next(iter(done)).result()
        await socket.close(code, console.reason(reason))
    except ActionError as error:
        # Told before the stream is closed, which may take libvirtd's time.
        await socket.close(Close.REFUSED, console.reason(error.message))
    finally:
        await _to_its_end(asyncio.to_thread(stream.close))


async def _from_guest(
    call: ConsoleCall, hypervisor: Hypervisor, stream: ConsoleStream, socket: ClientConnection
) -> tuple[int, str]:
    while data := await stream.read():
        await socket.send(data)
    # libvirt ends the console a moment before it says that the domain does not run.
    for _ in range(_STOP_LOOKS):
        if not await _libvirt(lambda: hypervisor.is_active(call.instance)):
            return Close.STOPPED, "the instance has stopped"
        await asyncio.sleep(_STOP_PAUSE_SECONDS)
    return Close.REFUSED, "libvirt has ended it: it was taken on the host itself, or libvirtd was started anew"


async def _to_guest(stream: ConsoleStream, socket: ClientConnection) -> tuple[int, str]:
    async for data in socket:
        if not isinstance(data, bytes):
            continue
        for start in range(0, len(data), WRITE_BYTES):
            try:
                async with asyncio.timeout(_WRITE_SECONDS):
                    goes_on = await stream.write(data[start : start + WRITE_BYTES])
            except TimeoutError:
                return Close.REFUSED, "the guest does not read its serial console"
            if not goes_on:
                # The other direction finds out why.
                await asyncio.Event().wait()
        await socket.send(console.TAKEN)
    return Close.LEFT, ""


async def _tell(call: ConsoleCall, hypervisor: Hypervisor, socket: ClientConnection) -> None:
    await _libvirt(lambda: hypervisor.get(call.instance))
    path = hypervisor.host.console_log_path(call.instance)
    await socket.send(console.READY)
    offset = 0
    while True:
        data, offset = await _libvirt(functools.partial(_read_log, hypervisor, path, offset))
        for start in range(0, len(data), MESSAGE_BYTES_MAX):
            await socket.send(data[start : start + MESSAGE_BYTES_MAX])
        if not call.follow:
            await socket.close(Close.LEFT)
            return
        try:
            async with asyncio.timeout(_LOG_PAUSE_SECONDS):
                await socket.wait_closed()
                return
        except TimeoutError:
            pass


def _read_log(hypervisor: Hypervisor, path: Path, offset: int) -> tuple[bytes, int]:
    return read_log(hypervisor.connection, path, offset)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Who cancels this waits for the work all the same: the console must be free for the next one."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def tls_context(config: Config) -> ssl.SSLContext | None:
    """What the central node's certificate is checked with; None where there is no TLS (on the loopback)."""
    if not config.api.startswith("https://"):
        return None
    if config.api_pinned:
        return pinned_context(Path(config.api_ca).read_text())
    return ssl.create_default_context(cafile=config.api_ca or None)


class ConsoleService:
    """The process: a Celery application that is called, and a loop in a thread that does the work."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.app: Celery = make_app(config.broker, (console_queue(config.uuid),))
        self._loop = asyncio.new_event_loop()
        # Each console may have one thread that writes and one that asks, and either may wait for a libvirtd that hangs.
        self._loop.set_default_executor(ThreadPoolExecutor(2 * CONSOLES_MAX, "libvirt"))
        ensure_event_loop()
        hypervisors = functools.partial(Hypervisor, config.libvirt, make_host(config), keep_alive=_KEEP_ALIVE)
        self._consoles = Consoles(config.api, hypervisors, functools.partial(tls_context, config))
        self._tasks: set[asyncio.Task[None]] = set()

        @self.app.task(name=CONSOLE)  # type: ignore[untyped-decorator]
        def answer(data: Any) -> None:
            try:
                call = decode(ConsoleCall, data)
            except ModelError as error:
                log.error("a call that is not understood: %s", error)
                return
            self._loop.call_soon_threadsafe(self._begin, call)

    def _begin(self, call: ConsoleCall) -> None:
        task = self._loop.create_task(self._consoles.answer(call))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a console has failed", exc_info=error)

    def run(self) -> None:
        """Answer calls until told to stop."""
        threading.Thread(target=self._loop.run_forever, name="consoles", daemon=True).start()
        words = ["worker", "--without-mingle", "--without-gossip", "--without-heartbeat", "--loglevel=WARNING"]
        words += [f"--queues={console_queue(self.config.uuid)}", "--pool=solo"]
        self.app.worker_main([*words, f"--hostname={self.config.name}-console@%h"])
