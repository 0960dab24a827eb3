"""A program on a pseudo-terminal, for tests of what people see and type."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import termios
import time
from typing import Any

#: Seconds for what should happen at once; a busy machine without KVM takes long.
PATIENCE = 600.0


class Terminal:
    """A program on a terminal, as a person has it."""

    def __init__(self, words: list[str], env: dict[str, str]) -> None:
        self.master, slave = pty.openpty()
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.said = b""
        self.process = subprocess.Popen(
            words, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True
        )  # fmt: skip

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def until(self, text: bytes) -> None:
        deadline = time.monotonic() + PATIENCE
        while text not in self.said:
            ended = self.process.poll() is not None
            assert time.monotonic() < deadline, self.said
            if select.select([self.master], [], [], 0.5)[0]:
                self.said += os.read(self.master, 65536)
            else:
                assert not ended, self.said

    def modes(self) -> Any:
        return termios.tcgetattr(self.slave)

    def end(self) -> int:
        """Its status; the terminal must be as before."""
        status = self.process.wait(PATIENCE)
        assert self.modes() == self.before
        with contextlib.suppress(OSError):
            while select.select([self.master], [], [], 0.5)[0]:
                self.said += os.read(self.master, 65536)
        os.close(self.slave)
        os.close(self.master)
        return status
