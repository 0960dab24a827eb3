"""``boot``, ``ssh`` and ``console``: wishes, state, and a terminal joined to a console. QEMU is a stand-in."""

from __future__ import annotations

import json
import os
import pty
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from recvirt import interactive
from recvirt.cli import cli
from recvirt.errors import ConfigError, LockedError, RecvirtError
from recvirt.qemu import Accelerator, Forward
from tests.unit.test_qemu_vm import FakeTools


@pytest.mark.parametrize(("text", "expected"), [("80", Forward(80, 0)), ("8080:80", Forward(80, 8080))])
def test_forwards_are_read(text: str, expected: Forward) -> None:
    assert interactive.parse_forward(text) == expected


@pytest.mark.parametrize("text", ["", "x", "80:", ":80", "1:2:3", "0", "70000", "80:0", "-1:80"])
def test_what_is_no_forward_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        interactive.parse_forward(text)
    assert "8080:80" in caught.value.hint


def test_memory_is_a_size_that_can_boot() -> None:
    assert interactive.parse_memory("2G") == 2 * 1024**3
    for text in ("two", "1M", ""):
        with pytest.raises(ConfigError, match="--memory"):
            interactive.parse_memory(text)


def test_without_a_running_vm_the_next_step_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "default" / "vm"
    for make in (False, True):
        if make:
            folder.mkdir(parents=True)
            (folder / "lock").touch()
        with pytest.raises(RecvirtError, match="no VM of default is running") as caught:
            interactive.running_state(folder)
        assert "recvirt boot default" in caught.value.hint


def test_a_second_vm_of_the_same_folder_is_refused_and_the_first_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "default" / "vm"
    with interactive._held(folder):
        with pytest.raises(LockedError, match="running already"), interactive._held(folder):
            pass
        with pytest.raises(RecvirtError, match="only starting"):
            interactive.running_state(folder)
        (folder / "state.json").write_text('{"ssh_port": 5}')
        assert interactive.running_state(folder) == {"ssh_port": 5}
    assert not (folder / "state.json").exists()


def test_a_terminal_is_joined_to_a_console_until_ctrl_bracket(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    ours, theirs = socket.socketpair()
    with os.fdopen(slave, "r+b", buffering=0) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        monkeypatch.setattr(sys, "stdout", os.fdopen(os.dup(slave), "w"))
        thread = threading.Thread(target=interactive.attach, args=(ours,))
        thread.start()
        theirs.sendall(b"login: ")
        assert os.read(master, 100) == b"login: "
        os.write(master, b"root\x03")
        # Raw: even Ctrl-C belongs to the guest.
        assert theirs.recv(100) == b"root\x03"
        os.write(master, b"\x1d")
        thread.join(10)
        assert not thread.is_alive()
    os.close(master)


def test_a_console_that_closes_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    ours, theirs = socket.socketpair()
    with os.fdopen(slave, "r+b", buffering=0) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        theirs.close()
        interactive.attach(ours)
    os.close(master)
    assert ours.fileno() >= 0


class Fakes:
    """Records what boot() asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.overlays: list[Path] = []
        monkeypatch.setattr(interactive, "find_accelerator", lambda _tools: Accelerator("tcg", "test"))
        monkeypatch.setattr(interactive, "image_info", lambda _tools, _image: {"format": "qcow2"})
        monkeypatch.setattr(interactive, "make_overlay", self.overlay)
        monkeypatch.setattr(interactive, "make_seed", lambda _tools, _config, folder: folder / "seed.img")

    def overlay(self, _tools: Any, _image: Path, overlay: Path, **_more: Any) -> Path:
        self.overlays.append(overlay)
        overlay.touch()
        return overlay


def wish(**more: Any) -> interactive.Wish:
    return interactive.Wish(firmware="bios", memory="1G", cpus=1, **more)


def test_what_the_vm_wrote_lasts_until_the_image_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fakes = Fakes(monkeypatch)
    tools = FakeTools(tmp_path / "tools")
    folder = tmp_path / "default" / "vm"
    image = tmp_path / "disk.qcow2"
    image.write_text("one")
    seen: list[dict[str, Any]] = []

    def session(vm: Any) -> int:
        seen.append(json.loads((folder / "state.json").read_text()))
        return 7

    monkeypatch.setattr(interactive, "_console_session", session)
    for change in (None, None, "two", None):
        if change:
            image.write_text(change * 2)
        assert interactive.boot(lambda: tools, image, folder, wish()) == 7
    assert len(fakes.overlays) == 2
    assert interactive.boot(lambda: tools, image, folder, wish(fresh=True)) == 7
    assert interactive.boot(lambda: tools, image, folder, wish(ephemeral=True)) == 7
    assert [path.name for path in fakes.overlays] == ["overlay.qcow2"] * 3 + ["ephemeral.qcow2"]
    assert not (folder / "ephemeral.qcow2").exists() and (folder / "overlay.qcow2").exists()
    assert seen[0]["ssh_port"] == 39995 and seen[0]["pid"] == os.getpid()
    assert not (folder / "state.json").exists()


def test_a_wrong_size_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        interactive.boot(
            lambda: pytest.fail("tools were looked for"),
            tmp_path / "i",
            tmp_path / "vm",
            interactive.Wish("bios", "lots", 1),
        )
    assert not (tmp_path / "vm").exists()


def test_commands_name_the_next_step(tmp_path: Path) -> None:
    for words in (["ssh", "default"], ["console", "default"]):
        result = CliRunner().invoke(cli, ["--build-dir", str(tmp_path), *words])
        assert isinstance(result.exception, RecvirtError) and "no VM of default" in str(result.exception)
    result = CliRunner().invoke(cli, ["--build-dir", str(tmp_path), "ssh", "../x"])
    assert isinstance(result.exception, RecvirtError) and "not the name of a profile" in str(result.exception)


def test_an_image_without_its_facts_needs_a_profile(tmp_path: Path) -> None:
    (tmp_path / "disk.qcow2").touch()
    result = CliRunner().invoke(cli, ["test", str(tmp_path / "disk.qcow2")])
    assert isinstance(result.exception, ConfigError) and "--profile" in result.exception.hint


def test_an_upgrade_wants_the_disk_that_is_upgraded(tmp_path: Path) -> None:
    words = ["test", "nested-cloud", "--check", "cloud-upgrades-under-instances"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2
    assert "--upgrade-from DISK" in result.output
    assert CliRunner().invoke(cli, [*words, "--upgrade-from", str(tmp_path / "absent.qcow2")]).exit_code == 2
