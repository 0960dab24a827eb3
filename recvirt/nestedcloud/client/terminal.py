"""A terminal that hands over every key, and is what it was afterwards, however the program ends."""

from __future__ import annotations

import os
import signal
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDINGS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def _leave(number: int, _frame: FrameType | None) -> None:
    # As a shell tells of a program that a signal has ended.
    raise SystemExit(128 + number)


@contextmanager
def raw_terminal(descriptor: int) -> Iterator[None]:
    """Raw mode (termios(3), cfmakeraw) while it lasts; nothing for what is no terminal. In the main thread.

    A signal that asks the program to end becomes SystemExit meanwhile, so that the terminal is put back first.
    """
    before = {number: signal.signal(number, _leave) for number in _ENDINGS}
    try:
        if not os.isatty(descriptor):
            yield
            return
        modes = termios.tcgetattr(descriptor)
        try:
            tty.setraw(descriptor, termios.TCSANOW)
            yield
        finally:
            termios.tcsetattr(descriptor, termios.TCSADRAIN, modes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
