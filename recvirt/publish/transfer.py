"""Sends many parts at once, and tells how far it has come: bytes, rate, time left."""

from __future__ import annotations

import io
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from recvirt.ui import format_bytes, format_seconds, reporter

#: Rates are over this many seconds, so that they follow the line and still don't jump.
_WINDOW = 15.0
_TICK = 0.2


class Progress:
    """Bytes that were sent of a total. Threads may add at once."""

    def __init__(self, name: str, total: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._total = total
        self._clock = clock
        self._lock = threading.Lock()
        self._marks = [(clock(), 0)]
        self._told = clock()
        self.sent = 0

    def add(self, count: int) -> None:
        """So many more bytes have arrived."""
        with self._lock:
            self.sent += count
            now = self._clock()
            if now - self._told < _TICK and self.sent != self._total:
                return
            self._told = now
            self._marks.append((now, self.sent))
            while len(self._marks) > 2 and now - self._marks[0][0] > _WINDOW:
                del self._marks[0]
            reporter.progress(f"{self._name} ({self.pace()})", self.sent, self._total, "bytes")

    def restart(self, sent: int = 0) -> None:
        """So much is there, and the rest is sent, perhaps again: another try of a body, or another run's upload."""
        with self._lock:
            self.sent = sent
            self._marks = [(self._clock(), sent)]

    def pace(self) -> str:
        """Rate and time left, for people."""
        (first, before), (last, now) = self._marks[0], self._marks[-1]
        rate = (now - before) / (last - first) if last > first else 0.0
        if rate <= 0:
            return "starting"
        left = f", {format_seconds((self._total - self.sent) / rate)} left" if self._total else ""
        return f"{format_bytes(rate)}/s{left}"


def send_all(parts: Iterable[int], send: Callable[[int], None], workers: int) -> None:
    """Call ``send`` for every part, ``workers`` at a time. The first failure stops the rest and is raised.

    Never more parts are under way than there are workers: memory stays flat however long the list is.
    """
    if workers <= 1:
        for part in parts:
            send(part)
        return
    waiting: Iterator[int] = iter(parts)
    with ThreadPoolExecutor(workers, thread_name_prefix="send") as pool:
        running: set[Future[None]] = set()
        try:
            for part in waiting:
                running.add(pool.submit(send, part))
                if len(running) >= workers:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            for future in running:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class FileBody:
    """A file, or ``length`` bytes of it from ``start`` on, as a request's body, with progress.

    Knows its length; each try opens a fresh one.
    """

    def __init__(self, path: Path, progress: Progress, start: int = 0, length: int | None = None) -> None:
        self._stream = path.open("rb")
        self._stream.seek(start)
        self._length = path.stat().st_size - start if length is None else length
        self._left = self._length
        self._progress = progress
        progress.restart(start)

    def __len__(self) -> int:
        return self._length

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes; at the end nothing, however often one asks."""
        data = self._stream.read(self._left if size < 0 else min(size, self._left)) if self._left else b""
        self._left -= len(data)
        if data:
            self._progress.add(len(data))
        else:
            self._left = 0
            self._stream.close()
        return data


class Form:
    """A file with a few words before it, as a form's upload (multipart/form-data, RFC 7578), never whole in memory."""

    def __init__(self, words: Mapping[str, str], field: str, name: str, path: Path) -> None:
        boundary = f"recvirt-{uuid.uuid4().hex}"
        self.kind = f"multipart/form-data; boundary={boundary}"
        parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in words.items()]
        parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n')
        parts.append("Content-Type: application/octet-stream\r\n\r\n")
        self._head, self._tail = "".join(parts).encode(), f"\r\n--{boundary}--\r\n".encode()
        self._path = path

    def opened(self, progress: Progress) -> FormBody:
        """A fresh body, for one try."""
        return FormBody(self._head, FileBody(self._path, progress), self._tail)


class FormBody:
    """A :class:`Form` being sent."""

    def __init__(self, head: bytes, body: FileBody, tail: bytes) -> None:
        self._head, self._body, self._tail = io.BytesIO(head), body, io.BytesIO(tail)
        self._length = len(head) + len(body) + len(tail)

    def __len__(self) -> int:
        return self._length

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes."""
        return self._head.read(size) or self._body.read(size) or self._tail.read(size)
