"""The serial console of an instance, and what it has said."""

from __future__ import annotations

import json
import os
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

from recvirt.nestedcloud import console as protocol
from recvirt.nestedcloud.client.api import Access, Api, ApiError
from recvirt.nestedcloud.client.commands import api
from recvirt.nestedcloud.client.terminal import raw_terminal
from recvirt.nestedcloud.console import MESSAGE_BYTES_MAX, PING_SECONDS, Close

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

#: Ctrl-], as telnet and virsh have it.
ESCAPE = b"\x1d"
_DIAL_SECONDS = 20
_READ_BYTES = 4096
#: Why a console ended, for programs; the others are no errors.
_KINDS = {
    Close.IDLE: "console-idle", Close.TOO_LONG: "console-too-long", Close.TAKEN: "console-taken",
    Close.NO_WORKER: "worker-away", Close.REFUSED: "console-refused", Close.REVOKED: "forbidden",
    Close.LOST: "worker-away", Close.STUCK: "console-stuck", Close.RESTART: "unreachable",
}  # fmt: skip


@contextmanager
def _connected(access: Access, session: dict[str, Any]) -> Iterator[ClientConnection]:
    """The session's WebSocket. ApiError when it can't be had."""
    from websockets.exceptions import InvalidStatus, WebSocketException
    from websockets.sync.client import connect

    url = access.url.rstrip("/").replace("http", "ws", 1) + session["path"]
    tls = ssl.create_default_context(cafile=access.ca or None) if url.startswith("wss://") else None
    words: dict[str, Any] = {
        "subprotocols": protocol.offers(session["ticket"]), "compression": None, "max_size": MESSAGE_BYTES_MAX,
        "max_queue": 4, "open_timeout": _DIAL_SECONDS, "close_timeout": 2, "ping_interval": PING_SECONDS,
        "ping_timeout": PING_SECONDS,
    }  # fmt: skip
    stack = ExitStack()
    try:
        # Only entered: before version 17 it connects when it is called.
        socket = stack.enter_context(connect(url, ssl=tls, **words))
    except InvalidStatus as error:
        raise _refusal(error.response.status_code, bytes(error.response.body or b"")) from None
    except (OSError, WebSocketException) as error:
        raise ApiError(f"{access.url} does not answer: {error}", kind="unreachable") from None
    with stack:
        if socket.subprotocol != protocol.PROTOCOL:
            raise ApiError(f"{access.url} knows no consoles", kind="protocol")
        yield socket


def _refusal(status: int, body: bytes) -> ApiError:
    try:
        data = json.loads(body)
        return ApiError(str(data["title"]), kind=str(data["type"]), data=data)
    except (ValueError, KeyError, TypeError):
        return ApiError(f"the console was refused with status {status}", kind="protocol")


def _messages(socket: ClientConnection) -> Iterator[bytes | str]:
    """What comes, until it ends. ApiError when it did not end as it should."""
    from websockets.exceptions import ConnectionClosed

    while True:
        try:
            message = socket.recv()
        except ConnectionClosed as error:
            said = error.rcvd
            if said is None:
                raise ApiError("the connection broke", kind="unreachable", hint="try again") from None
            if said.code in _KINDS:
                hint = "--force takes it" if said.code == Close.REFUSED and "force" in said.reason else ""
                kind = _KINDS[Close(said.code)]
                raise ApiError(f"the console was closed: {said.reason}", kind=kind, hint=hint) from None
            if said.code not in (Close.LEFT, Close.STOPPED):
                raise ApiError(f"the console was closed: {said.reason or said.code}", kind="protocol") from None
            return
        yield message


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


class _Keys:
    """What is typed, in a thread: to the guest, until the escape or the end."""

    def __init__(self, socket: ClientConnection, descriptor: int, linger_seconds: float) -> None:
        self._socket = socket
        self._descriptor = descriptor
        self._linger = linger_seconds
        self.heard = time.monotonic()
        #: The guest is there; it may be sent so many messages; and the person has left.
        self.ready, self.window, self.left = threading.Event(), threading.Semaphore(protocol.WINDOW), False

    def start(self) -> None:
        """Begin."""
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        from websockets.exceptions import ConnectionClosed

        terminal = os.isatty(self._descriptor)
        try:
            while data := os.read(self._descriptor, _READ_BYTES):
                typed, escape, _ = data.partition(ESCAPE) if terminal else (data, b"", b"")
                if typed:
                    # A person is never that fast, and wants the escape to be seen.
                    if not terminal:
                        self.window.acquire()
                    self._socket.send(typed)
                if escape:
                    break
            else:
                self._wait_for_answers()
            self.left = True
            self._socket.close()
        except (ConnectionClosed, OSError):
            # The other direction says why.
            pass

    def _wait_for_answers(self) -> None:
        self.ready.wait()
        # The guest has taken all of it.
        for _ in range(protocol.WINDOW):
            self.window.acquire()
        self.heard = time.monotonic()
        while (rest := self.heard + self._linger - time.monotonic()) > 0:
            time.sleep(rest)


@click.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Take it from whoever has it.")
@click.option("--linger", default=2.0, show_default=True, metavar="SECONDS",
              help="After the end of input that is no terminal: go on until nothing was said for so long.")  # fmt: skip
def console(name: str, force: bool, linger: float) -> None:
    """Be at an instance's serial console. Ctrl-] ends it.

    \b
    Examples:
      recvirt-cloud console web
      printf 'root\\nuptime\\n' | recvirt-cloud console web
    """
    cloud = api()
    stdin, stdout = sys.stdin.fileno(), sys.stdout.fileno()
    if os.isatty(stdin):
        click.echo("Ctrl-] ends the console.", err=True)
    session = cloud.call("POST", cloud.below(f"instances/{name}/console"), {"force": force})
    with _connected(cloud.access, session) as socket:
        keys = _Keys(socket, stdin, linger)
        try:
            with raw_terminal(stdin):
                keys.start()
                for message in _messages(socket):
                    if isinstance(message, bytes):
                        keys.heard = time.monotonic()
                        _write(stdout, message)
                    elif message == protocol.READY:
                        keys.ready.set()
                        click.echo(f"connected to {name}\r", err=True)
                    else:
                        keys.window.release()
        except ApiError:
            if not keys.left:
                raise
        else:
            click.echo(f"\n{socket.close_reason or 'the console is closed'}", err=True)


@click.command()
@click.argument("name")
@click.option("--follow", "-f", is_flag=True, help="Go on, as it says more.")
def logs(name: str, follow: bool) -> None:
    """Show what an instance's serial console has said since its last start.

    On a terminal everything that would move its cursor is shown as a question mark.

    \b
    Examples:
      recvirt-cloud logs web
      recvirt-cloud logs web --follow > boot.log
    """
    cloud: Api = api()
    session = cloud.call("POST", cloud.below(f"instances/{name}/log"), {"follow": follow})
    stdout = sys.stdout.fileno()
    tame = os.isatty(stdout)
    with _connected(cloud.access, session) as socket:
        try:
            for message in _messages(socket):
                if isinstance(message, bytes):
                    _write(stdout, _tamed(message) if tame else message)
        except KeyboardInterrupt:
            pass


#: Control characters except tab and line feed; a carriage return before a line feed says nothing.
_TAMING = {code: ord("?") for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n\r"} | {ord("\r"): None}


def _tamed(data: bytes) -> bytes:
    return data.decode(errors="replace").translate(_TAMING).encode()


CONSOLE_COMMANDS = (console, logs)
