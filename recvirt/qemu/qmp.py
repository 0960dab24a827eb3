"""A small client for QEMU's machine protocol (QMP): one command at a time, events put aside.

Works over a UNIX socket as well as over any pair of streams (``-qmp stdio`` through SSH).
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from recvirt.errors import GuestError


class QmpError(GuestError):
    """QEMU refused a command, or does not answer."""


def connect_unix(folder: Path, name: str, *, seconds: float) -> socket.socket:
    """Connect to the socket ``name`` in ``folder``, however long its path is. Raises OSError after ``seconds``."""
    deadline = time.monotonic() + seconds
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        while True:
            client = socket.socket(socket.AF_UNIX)
            try:
                client.connect(f"/proc/self/fd/{descriptor}/{name}")
                return client
            except OSError:
                client.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
    finally:
        os.close(descriptor)


class QmpClient:
    """Speaks QMP over two byte streams. ``events`` collects what arrived between answers."""

    def __init__(self, reader: IO[bytes], writer: IO[bytes]) -> None:
        self._reader = reader
        self._writer = writer
        self.events: list[dict[str, Any]] = []
        greeting = self._read()
        version = greeting["QMP"]["version"]
        numbers = version["qemu"]
        self.version = f"{numbers['major']}.{numbers['minor']}.{numbers['micro']}"
        self.package = str(version.get("package", ""))
        self.execute("qmp_capabilities")

    @classmethod
    def over_socket(cls, client: socket.socket, *, timeout_seconds: float = 60.0) -> QmpClient:
        """A client on a connected socket; an answer that takes longer raises QmpError."""
        client.settimeout(timeout_seconds)
        return cls(client.makefile("rb"), client.makefile("wb"))

    def _read(self) -> dict[str, Any]:
        try:
            line = self._reader.readline()
        except OSError as error:
            raise QmpError(f"QEMU does not answer: {error}") from None
        if not line:
            raise QmpError("QEMU closed its control connection")
        message: dict[str, Any] = json.loads(line)
        return message

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Send one command and return what QEMU answers."""
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = dict(arguments)
        try:
            self._writer.write(json.dumps(request).encode() + b"\n")
            self._writer.flush()
        except (OSError, ValueError) as error:
            raise QmpError(f"QEMU does not listen: {error}") from None
        while True:
            message = self._read()
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise QmpError(f"QEMU refused {command}: {message['error'].get('desc', message['error'])}")
            self.events.append(message)

    def wait_event(self, name: str) -> dict[str, Any]:
        """The next event called ``name``; earlier ones that were put aside count. Blocks until the streams time out."""
        while True:
            for index, event in enumerate(self.events):
                if event.get("event") == name:
                    return self.events.pop(index)
            self.events.append(self._read())


def parse_forwards(text: str) -> dict[int, int]:
    """Guest port to host port, out of the monitor's ``info usernet``."""
    ports: dict[int, int] = {}
    for line in text.splitlines():
        words = line.split()
        if words and words[0].startswith("TCP[HOST_FORWARD]"):
            # TCP[HOST_FORWARD]  11  127.0.0.1 39995  10.0.2.15  22  0  0
            ports[int(words[5])] = int(words[3])
    return ports
