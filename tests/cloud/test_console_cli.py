"""``console`` and ``logs`` as programs, against a real server; the worker's side is played by the test."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from recvirt.nestedcloud import console
from recvirt.nestedcloud.central.models import Worker
from recvirt.nestedcloud.cli import main_group
from recvirt.nestedcloud.client.api import VARIABLE, Access, save_access
from recvirt.nestedcloud.client.console_commands import _tamed
from recvirt.nestedcloud.client.terminal import raw_terminal
from recvirt.nestedcloud.console import MESSAGE_BYTES_MAX, Close
from tests.cloud.terminal import Terminal
from tests.cloud.test_console import PATIENCE, Lab, lab, wait_until
from tests.cloud.test_stream import server

__all__ = ["lab", "server"]


class Guest:
    """Answers each call as a worker does whose guest echoes."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.taken: list[bytes] = []
        self.greeting = b""
        self.farewell: tuple[int, str] | None = None
        self.answered = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            while self.answered < len(self.lab.calls):
                call = self.lab.calls[self.answered][1]
                self.answered += 1
                self._serve(call)

    def _serve(self, call: Any) -> None:
        from websockets.exceptions import ConnectionClosed

        socket = self.lab.dial(f"{console.PATH}{call.session}/worker", call.ticket)
        try:
            socket.send(console.READY)
            if self.greeting:
                socket.send(self.greeting)
            if self.farewell is not None:
                socket.close(*self.farewell)
                return
            while not self._stop.is_set():
                try:
                    data = socket.recv(timeout=0.1)
                except TimeoutError:
                    continue
                assert isinstance(data, bytes)
                self.taken.append(data)
                socket.send(data)
                socket.send(console.TAKEN)
        except ConnectionClosed:
            pass

    def close(self) -> None:
        self._stop.set()
        self._thread.join(PATIENCE)


class Shell:
    """Programs with an access file."""

    def __init__(self, lab: Lab, path: Path) -> None:
        self.guest = Guest(lab)
        self.env = {**os.environ, VARIABLE: str(path)}
        save_access(Access(lab.server.url, lab.server.token, "lab"), path)

    @staticmethod
    def words(*more: str) -> list[str]:
        return [sys.executable, "-m", "recvirt.nestedcloud", *more]

    def run(self, *more: str, text: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(self.words(*more), env=self.env, input=text, capture_output=True, check=False)

    def terminal(self, *more: str) -> Terminal:
        return Terminal(self.words(*more), self.env)


@pytest.fixture
def shell(lab: Lab, tmp_path: Path) -> Iterator[Shell]:
    made = Shell(lab, tmp_path / "client.toml")
    yield made
    made.guest.close()


def test_a_script_gets_what_the_guest_answers(shell: Shell) -> None:
    text = bytes(range(256)) * 512
    done = shell.run("console", "web", "--linger", "3", text=text)
    assert (done.returncode, done.stdout) == (0, text), done.stderr
    assert b"".join(shell.guest.taken) == text


def test_a_person_types_at_a_terminal_and_leaves_by_the_escape(shell: Shell) -> None:
    terminal = shell.terminal("console", "web")
    terminal.until(b"connected to web")
    assert terminal.said.startswith(b"Ctrl-] ends the console.") and terminal.modes() != terminal.before
    for typed in (b"hello", b"\x03\x1a\x1c\x04"):
        terminal.type(typed)
        terminal.until(typed)
    terminal.type(b"last\x1dnever sent")
    assert terminal.end() == 0
    wait_until(lambda: b"".join(shell.guest.taken) == b"hello\x03\x1a\x1c\x04last")


def test_the_escape_works_before_anybody_answers(lab: Lab, tmp_path: Path) -> None:
    shell = Shell(lab, tmp_path / "client.toml")
    shell.guest.close()
    terminal = shell.terminal("console", "web")
    wait_until(lambda: terminal.modes() != terminal.before)
    terminal.type(b"\x1d")
    assert terminal.end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_terminal_as_it_was(shell: Shell, number: int) -> None:
    terminal = shell.terminal("console", "web")
    terminal.until(b"connected to web")
    assert terminal.modes() != terminal.before
    terminal.process.send_signal(number)
    assert terminal.end() == 128 + number


@pytest.mark.parametrize(
    ("code", "why", "status"),
    [(Close.STOPPED, "the instance has stopped", 0), (Close.REFUSED, "it can't be opened", 3), (1011, "", 3)],
)
def test_it_says_why_it_ended(shell: Shell, code: int, why: str, status: int) -> None:
    shell.guest.greeting, shell.guest.farewell = b"bye\r\n", (code, why)
    done = shell.run("console", "web", "--linger", str(PATIENCE))
    assert done.returncode == status and done.stdout == b"bye\r\n"
    assert (why or "gone away").encode() in done.stderr


def test_refusals_are_one_line_and_a_status(lab: Lab, shell: Shell) -> None:
    Worker.objects.update(features={})
    done = shell.run("console", "web")
    assert done.returncode == 3 and done.stderr == b"error: the worker w1 has no serial consoles\n"
    done = shell.run("logs", "absent")
    assert done.returncode == 3 and b"no instance called absent" in done.stderr


def test_a_log_is_tame_on_a_terminal_and_whole_in_a_pipe(shell: Shell) -> None:
    said = b"boot\r\n\x1b[2J\x9bx\t\xc3\xa4\xff\n"
    shell.guest.greeting, shell.guest.farewell = said, (Close.LEFT, "")
    assert shell.run("logs", "web").stdout == said
    terminal = shell.terminal("logs", "web", "--follow")
    assert terminal.end() == 0
    assert b"boot\r\n?[2J" in terminal.said and b"\x1b" not in terminal.said and "ä".encode() in terminal.said


def test_the_api_is_one_process_with_bounds_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr("uvicorn.run", lambda *_, **words: told.update(words))
    monkeypatch.setenv("WEB_CONCURRENCY", "4")
    result = CliRunner().invoke(main_group, ["central", "serve"])
    assert result.exit_code == 0, result.output
    # Both ends of a console meet in its memory.
    assert told["workers"] == 1
    assert told["ws_max_size"] == MESSAGE_BYTES_MAX and told["ws_per_message_deflate"] is False


def test_what_moves_a_cursor_is_tamed() -> None:
    assert _tamed(b"a\x00\x07\x08\x1b]0;x\x7f\r\nb") == b"a????]0;x?\nb"
    assert _tamed(b"\xc2\x9b31m") == b"?31m"


def test_a_terminal_is_put_back_after_an_error_and_what_is_none_is_left() -> None:
    import termios

    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), raw_terminal(slave):
        assert termios.tcgetattr(slave) != before
        raise RuntimeError
    assert termios.tcgetattr(slave) == before and signal.getsignal(signal.SIGTERM) == handler
    reader, writer = os.pipe()
    with raw_terminal(reader):
        pass
    for descriptor in (master, slave, reader, writer):
        os.close(descriptor)
