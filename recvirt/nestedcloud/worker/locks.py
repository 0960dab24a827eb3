"""One hand at a time on each thing of a host. The kernel lets go of a lock when nobody holds its file any more.

The files are on the host (``run_dir``), also where its disks are shared: between two workers it is the central node
that sees to it, by one active operation a volume and by asking another worker only when the last one has answered
(``central.pools``).
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path

_held: ContextVar[tuple[int, ...]] = ContextVar("held", default=())


class BusyError(Exception):
    """Another process works on the same thing."""


@contextmanager
def alone(run_dir: Path, targets: Sequence[str]) -> Iterator[None]:
    """Hold the locks of all ``targets``. BusyError when one is held by somebody else."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        streams = [stack.enter_context((run_dir / f"{target}.lock").open("w")) for target in targets]
        for target, stream in zip(targets, streams, strict=True):
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(target) from None
        token = _held.set(tuple(stream.fileno() for stream in streams))
        try:
            yield
        finally:
            _held.reset(token)


def held() -> tuple[int, ...]:
    """The files of the locks that are held here. A program that is started has to inherit them: should we be killed, it
    goes on, and nobody else may touch what it works on before it has ended.
    """
    return _held.get()
