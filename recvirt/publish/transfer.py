"""Sends many parts at once, and tells how far it has come: bytes, rate, time left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
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
        """At most ``size`` bytes."""
        data = self._stream.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        if data:
            self._progress.add(len(data))
        else:
            self._stream.close()
        return data
