"""A running domain's serial console as an asyncio stream, over libvirt's own: nothing here waits for a guest.

libvirt tells of a stream's events from one loop for a whole process, in a thread of its own. A process that forks must
not have that loop, which is why the consoles have a process to themselves. Owns that loop and the stream.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from typing import Any

import libvirt

from recvirt.nestedcloud.model import Fault
from recvirt.nestedcloud.worker.errors import ActionError
from recvirt.nestedcloud.worker.hypervisor import fault_of

READ_BYTES = 16 * 1024
WRITE_BYTES = 4 * 1024
#: What libvirt answers where it would have to wait.
_LATER = -2
_ENDED = libvirt.VIR_STREAM_EVENT_ERROR | libvirt.VIR_STREAM_EVENT_HANGUP


@functools.cache
def ensure_event_loop() -> None:
    """Start libvirt's loop. Before the first connection is opened: one without it has no events."""
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=run, name="libvirt-events", daemon=True).start()


class ConsoleStream:
    """An open console. Made by :func:`open_console`; used from one asyncio loop.

    It wants a connection of its own: libvirtd reads no more of one while a guest does not take what came over it.
    """

    def __init__(self, stream: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._stream = stream
        self._loop = loop
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._lost = False
        stream.eventAddCallback(0, self._on_event, None)

    def _on_event(self, _stream: Any, events: int, _opaque: Any) -> None:
        """In libvirt's thread, and again and again until the bytes are fetched: so it listens no more until then."""
        self._stream.eventUpdateCallback(0)
        self._loop.call_soon_threadsafe(self._wake, events)

    def on_lost(self, *_: Any) -> None:
        """The connection is gone. In libvirt's thread; the stream itself may say nothing of it."""
        self._lost = True
        self._loop.call_soon_threadsafe(self._wake, _ENDED)

    def _wake(self, events: int) -> None:
        for event in [event for event in self._waiting if events & (event | _ENDED)]:
            future = self._waiting.pop(event)
            if not future.done():
                future.set_result(None)
        if self._waiting:
            self._listen()

    def _listen(self) -> None:
        self._stream.eventUpdateCallback(sum(self._waiting))

    async def _until(self, event: int) -> None:
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiting[event] = future
        try:
            self._listen()
            if not self._lost:
                await future
        finally:
            self._waiting.pop(event, None)

    async def read(self) -> bytes:
        """What the guest says next; nothing when the console has ended."""
        try:
            while not self._lost:
                data = self._stream.recv(READ_BYTES)
                if data != _LATER:
                    return bytes(data)
                await self._until(libvirt.VIR_STREAM_EVENT_READABLE)
        except libvirt.libvirtError:
            pass
        return b""

    async def write(self, data: bytes) -> bool:
        """Give the guest all of it, ``WRITE_BYTES`` at most, when it takes it; False when the console has ended."""
        try:
            while data and not self._lost:
                # It waits there for libvirtd, although the stream is one that should not.
                count = await asyncio.to_thread(self._stream.send, data)
                if count == _LATER:
                    await self._until(libvirt.VIR_STREAM_EVENT_WRITABLE)
                else:
                    data = data[count:]
        except libvirt.libvirtError:
            return False
        return not data

    def close(self) -> None:
        """Give the console back. May wait for libvirtd."""
        for work in (self._stream.eventRemoveCallback, self._stream.abort):
            try:
                work()
            except libvirt.libvirtError:
                # It has ended by itself.
                pass


def open_console(domain: Any, force: bool, loop: asyncio.AbstractEventLoop) -> ConsoleStream:
    """The first serial console of a running domain. May wait for libvirtd. ActionError when it can't be had."""
    try:
        if not domain.isActive():
            raise ActionError(Fault.CONFLICT, "the instance does not run")
        stream = domain.connect().newStream(libvirt.VIR_STREAM_NONBLOCK)
        domain.openConsole(None, stream, libvirt.VIR_DOMAIN_CONSOLE_FORCE if force else 0)
    except libvirt.libvirtError as error:
        known = fault_of(error)
        # libvirt has no code of its own for it.
        if "Active console session exists" in known.message:
            raise ActionError(Fault.CONFLICT, "somebody has it on the host itself; force takes it from them") from None
        raise known from None
    made = ConsoleStream(stream, loop)
    domain.connect().registerCloseCallback(made.on_lost, None)
    return made
