"""A wire between two parts of the cloud that can be cut: what is sent is kept back, as by a network that is away."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from typing import cast

_PIECE = 65536


class Wire:
    """Forwards connections from a port of its own to another one of this host."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._whole = threading.Event()
        self._whole.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Nothing comes through, and nobody is told."""
        self._whole.clear()

    def mend(self) -> None:
        """What was kept back comes through."""
        self._whole.set()

    def close(self) -> None:
        """No new connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._forward, args=(near,), daemon=True).start()

    def _forward(self, near: socket.socket) -> None:
        self._whole.wait()
        try:
            far = socket.create_connection(("127.0.0.1", self._target), 10)
        except OSError:
            near.close()
            return
        other = {near: far, far: near}
        with selectors.DefaultSelector() as selector, near, far:
            for end in other:
                selector.register(end, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    self._whole.wait()
                    end = cast("socket.socket", key.fileobj)
                    try:
                        data = end.recv(_PIECE)
                        if not data:
                            return
                        other[end].sendall(data)
                    except OSError:
                        return
                time.sleep(0)
