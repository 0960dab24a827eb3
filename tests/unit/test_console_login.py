"""The login by signature on the serial console: the real script and the real ssh-keygen, with a user made up here."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from recvirt.data import data_path
from recvirt.qemu.ssh import make_key, sign

SCRIPT = data_path("templates", "root") / "usr/lib/recvirt/console-login"
ME = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()

#: What stands in for programs that need root, or a machine: each says how it was called.
STAND_INS = {
    "passwd": 'cat "$BOX/status"',
    "getent": 'echo "$2:x:1:1::$BOX/home:/bin/sh"',
    "runuser": 'shift 3; exec "$@"',
    "login": 'echo "login $*" >> "$BOX/calls"',
    "logger": 'shift 4; echo "logged $*" >> "$BOX/calls"',
    "sleep": ":",
}


class Box:
    """A folder with a home, the stand-ins, and one run of the script."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bin = path / "bin"
        self.home = path / "home"
        (self.home / ".ssh").mkdir(parents=True, mode=0o700)
        self.home.chmod(0o755)
        self.bin.mkdir()
        for name, text in STAND_INS.items():
            (self.bin / name).write_text(f"#!/bin/sh\n{text}\n")
            (self.bin / name).chmod(0o755)
        (path / "status").write_text(f"{ME} L 2026-01-01\n")
        (path / "run").mkdir()
        self.calls_path = path / "calls"
        self.calls_path.write_text("")

    def authorize(self, key: Path, options: str = "") -> Path:
        keys = self.home / ".ssh" / "authorized_keys"
        with keys.open("a") as stream:
            stream.write(options + key.with_name(f"{key.name}.pub").read_text())
        keys.chmod(0o600)
        return keys

    @property
    def calls(self) -> list[str]:
        return self.calls_path.read_text().splitlines()

    @contextmanager
    def started(self, user: str = ME) -> Iterator[subprocess.Popen[str]]:
        env = {"PATH": f"{self.bin}:{os.environ['PATH']}", "BOX": str(self.path), "RECVIRT_RUN": str(self.path / "run")}
        pipe = subprocess.PIPE
        process = subprocess.Popen(["sh", str(SCRIPT), "--", user], stdin=pipe, stdout=pipe, text=True, env=env)
        watchdog = threading.Timer(30, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()
            process.communicate()

    def answer(self, key: Path, *, namespace: str = "recvirt-console", word: str = "") -> str:
        """Sign what the script shows with ``key``; all that it printed."""
        with self.started() as process:
            assert process.stdin is not None and process.stdout is not None
            shown = ""
            while "gives up" not in shown:
                line = process.stdout.readline()
                assert line, shown
                shown += line
            asked = next(line for line in shown.splitlines() if "echo '" in line).split("'")[1]
            # The end of input is not sent: a console has none.
            process.stdin.write(sign(f"{word or asked}\n", key, namespace))
            process.stdin.flush()
            rest = process.stdout.read()
            process.wait()
        assert not list((self.path / "run").iterdir())
        return shown + rest


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return make_key(tmp_path)


def test_the_owner_of_a_key_gets_in(box: Box, key: Path) -> None:
    box.authorize(make_key(box.path, "another"))
    box.authorize(key)
    said = box.answer(key)
    assert f"Nobody has a password here; prove that you own an SSH key of {ME}." in said
    assert box.calls[-1] == f"login -f {ME}"
    assert f'logged Good "recvirt-console" signature for {ME} with ED25519 key SHA256:' in box.calls[0]


def refused(box: Box, said: str) -> None:
    assert "Login incorrect" in said
    assert box.calls == [f"logged refused: no signature by a key of {ME}"]


def test_a_stranger_s_key_is_refused(box: Box, key: Path) -> None:
    box.authorize(key)
    refused(box, box.answer(make_key(box.path, "stranger")))


def test_a_signature_for_something_else_is_refused(box: Box, key: Path) -> None:
    box.authorize(key)
    refused(box, box.answer(key, namespace="file"))


def test_a_signature_of_another_word_is_refused(box: Box, key: Path) -> None:
    box.authorize(key)
    refused(box, box.answer(key, word=f"{ME}@host {'0' * 32}"))


def test_each_login_asks_for_another_word(box: Box, key: Path) -> None:
    box.authorize(key)
    one, two = (next(line for line in box.answer(key).splitlines() if "echo '" in line) for _ in range(2))
    assert one != two


@pytest.mark.parametrize("options", ['command="/bin/true" ', 'expiry-time="20200101" ', "restrict ", "cert-authority "])
def test_a_key_with_options_is_left_to_sshd(box: Box, key: Path, options: str) -> None:
    box.authorize(key, options)
    refused(box, box.answer(key))


def test_keys_that_others_can_write_are_not_used(box: Box, key: Path) -> None:
    keys = box.authorize(key)
    keys.chmod(0o620)
    refused(box, box.answer(key))


def test_a_link_in_place_of_the_keys_is_not_followed(box: Box, key: Path) -> None:
    keys = box.authorize(key)
    keys.rename(box.path / "elsewhere")
    keys.symlink_to(box.path / "elsewhere")
    refused(box, box.answer(key))


def test_a_user_without_keys_is_asked_all_the_same(box: Box, key: Path) -> None:
    shutil.rmtree(box.home)
    refused(box, box.answer(key))


def test_an_empty_line_gives_up(box: Box, key: Path) -> None:
    box.authorize(key)
    with box.started() as process:
        said, _ = process.communicate("\n")
    assert process.returncode == 1
    refused(box, said)


def test_who_has_a_password_is_asked_for_it(box: Box) -> None:
    (box.path / "status").write_text(f"{ME} P 2026-01-01\n")
    with box.started() as process:
        process.communicate("")
    assert box.calls == [f"login -- {ME}"]


@pytest.mark.parametrize("name", ["", "-f", "-froot", "a b", "$(id)", "root\n", "Root", "../x", "a*", "ü"])
def test_a_name_that_is_none_is_refused_at_once(box: Box, name: str) -> None:
    with box.started(name) as process:
        said, _ = process.communicate("")
    assert "Login incorrect" in said and "echo '" not in said
    assert box.calls == ["logged refused: not a name"]
