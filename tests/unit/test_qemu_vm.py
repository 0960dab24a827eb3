"""A running VM, with a stand-in for QEMU: waiting, dying, ending, and what is said then."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from recvirt.accept import boots
from recvirt.accept.boots import bytes_written
from recvirt.errors import GuestError
from recvirt.qemu import Disk, MachineSpec, running
from recvirt.qemu import vm as vm_module
from recvirt.qemu.stuck import EmulatorError
from recvirt.qemu.vm import clean_console
from recvirt.sandbox import ToolsRoot

FAKE = Path(__file__).parent.parent / "support" / "fake_qemu.py"


class FakeTools(ToolsRoot):
    """Runs the stand-in on the host, with the words of the machine."""

    environment: ClassVar[dict[str, str]] = {}
    seen: ClassVar[dict[str, Any]] = {}

    def argv(self, command: Sequence[str], **options: Any) -> list[str]:
        FakeTools.seen = options
        settings = [f"{name}={value}" for name, value in FakeTools.environment.items()]
        return ["env", f"--chdir={options['cwd']}", *settings, sys.executable, str(FAKE), *command]


@pytest.fixture
def tools(tmp_path: Path) -> FakeTools:
    FakeTools.environment = {}
    return FakeTools(tmp_path / "tools")


def test_waits_for_words_and_ends_quietly(tools: FakeTools, tmp_path: Path) -> None:
    FakeTools.environment = {"FAKE_CONSOLE": "Linux version 6.12\nlogin:"}
    with running(tools, MachineSpec(), tmp_path / "vm") as vm:
        assert vm.wait_for(r"version \d+", 5) == "version 6"
        assert vm.host_port(22) == 39995
        with pytest.raises(GuestError, match="port 80"):
            vm.host_port(80)
        assert bytes_written(vm) == 42
        pid = vm.process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not (tmp_path / "vm" / "qmp.sock").exists()


def test_words_before_the_mark_do_not_count(tools: FakeTools, tmp_path: Path) -> None:
    FakeTools.environment = {"FAKE_CONSOLE": "first boot\n"}
    with running(tools, MachineSpec(), tmp_path / "vm") as vm:
        vm.wait_for("boot", 5)
        vm.mark()
        with pytest.raises(GuestError, match="did not come in 0 s"):
            vm.wait_for("boot", 0.3)
        vm.reset()
        assert vm.wait_for("second boot", 5)


def test_silence_is_an_error_with_the_last_lines(tools: FakeTools, tmp_path: Path) -> None:
    FakeTools.environment = {"FAKE_CONSOLE": "\x1b[0mKernel panic - not syncing\r\n"}
    with running(tools, MachineSpec(), tmp_path / "vm") as vm, pytest.raises(GuestError) as caught:
        vm.wait_for("login:", 0.3)
    assert "| Kernel panic - not syncing" in caught.value.message
    assert "console.log" in caught.value.hint


def test_a_wait_in_vain_tells_what_the_processors_do(tools: FakeTools, tmp_path: Path) -> None:
    with running(tools, MachineSpec(), tmp_path / "vm") as vm:
        with pytest.raises(GuestError, match="1 of 2 processors idle"):
            vm.wait_for("login:", 0.1)
        state = (tmp_path / "vm" / "machine-state.txt").read_text()
        assert "(qemu) info registers -a\nCPU#0\nRFL=" in state and "(qemu) info lapic 0\nSPIV" in state
        vm.process.kill()
        vm.process.wait()
        assert "control connection" in vm.keep_state() or "does not listen" in vm.keep_state()


def test_a_processor_that_sleeps_with_an_interrupt_in_service_is_the_emulators_fault(
    tools: FakeTools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vm_module, "_LOOK_SECONDS", 0.1)
    FakeTools.environment = {"FAKE_ISR": "48 236"}
    spec = MachineSpec()
    with running(tools, spec, tmp_path / "vm") as vm, pytest.raises(EmulatorError) as caught:
        vm.wait_for("login:", 60)
    assert "processor 0 sleeps with vector 48 in service" in caught.value.message
    # Not under KVM, whose interrupts are the hardware's; and not of a processor that is awake, as the other one is.
    with running(tools, replace(spec, accelerator="kvm"), tmp_path / "kvm") as vm, pytest.raises(GuestError) as other:
        vm.wait_for("login:", 1)
    FakeTools.environment = {}
    with running(tools, spec, tmp_path / "sound") as vm, pytest.raises(GuestError) as third:
        vm.wait_for("login:", 1)
    assert not isinstance(other.value, EmulatorError) and not isinstance(third.value, EmulatorError)


@pytest.mark.parametrize(
    ("words", "number", "its_own"),
    [
        ("hw/pci/msix.c:228: msix_table_mmio_write: Assertion `addr + size <= 16' failed.\n", signal.SIGABRT, True),
        ("ERROR:accel/tcg/cpu-exec.c:9:cpu_exec: assertion failed: (cpu == current_cpu)\n", signal.SIGABRT, True),
        ("error: failed to set MSR 0x48 to 0x0\n", signal.SIGABRT, False),
        ("x: Assertion `y' failed.\n", signal.SIGKILL, False),
    ],
)
def test_an_assertion_of_qemus_own_is_the_emulators_fault(
    tools: FakeTools, tmp_path: Path, words: str, number: int, its_own: bool
) -> None:
    with running(tools, MachineSpec(), tmp_path / "vm") as vm, pytest.raises(GuestError) as caught:
        with (tmp_path / "vm" / vm_module.QEMU_LOG).open("a") as stream:
            stream.write(words)
        vm.process.send_signal(number)
        vm.process.wait()
        vm.check_alive()
    assert isinstance(caught.value, EmulatorError) == its_own
    assert words.strip() in caught.value.message


def test_a_boot_that_the_emulator_lost_is_begun_anew_from_the_same_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = tmp_path / "overlay.qcow2"
    overlay.write_text("as made")
    tries: list[str] = []

    class Machine:
        qmp = SimpleNamespace(version="10.0.0", package="")

        def ssh(self, user: str, key: Path) -> str:
            return user

        def wait_ssh(self, access: str, seconds: float, *, silence_seconds: float) -> float:
            tries.append(overlay.read_text())
            overlay.write_text("half a boot")
            if len(tries) < lost + 1:
                raise EmulatorError("lost")
            return 7.0

    @contextmanager
    def machine(*_: Any) -> Iterator[Machine]:
        yield Machine()

    monkeypatch.setattr(boots, "running", machine)
    added: list[str] = []
    acceptance: Any = SimpleNamespace(
        patience=lambda seconds: seconds, profile=SimpleNamespace(accept=SimpleNamespace(boot_seconds=1)), tools=None,
        key=tmp_path, add=lambda name, _: added.append(name),
    )  # fmt: skip
    for lost in (0, boots.EMULATOR_TRIES - 1, boots.EMULATOR_TRIES):
        overlay.write_text("as made")
        tries.clear()
        added.clear()
        with ExitStack() as stack:
            if lost < boots.EMULATOR_TRIES:
                assert boots._up(acceptance, "x", MachineSpec(), tmp_path, overlay, stack)[2] == 7.0
                assert tries == ["as made"] * (lost + 1) and len(added) == lost
                assert not overlay.with_suffix(".before").exists()
            else:
                with pytest.raises(EmulatorError):
                    boots._up(acceptance, "x", MachineSpec(), tmp_path, overlay, stack)


def test_a_full_disk_is_told_at_once_and_not_waited_for(
    tools: FakeTools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vm_module, "_STATUS_SECONDS", 0.0)
    FakeTools.environment = {"FAKE_STATUS": "io-error"}
    with running(tools, MachineSpec(), tmp_path / "full") as vm, pytest.raises(GuestError) as caught:
        vm.wait_for("login:", 60)
    assert "No space left on device" in caught.value.message and " free" in caught.value.hint
    FakeTools.environment = {"FAKE_STATUS": "guest-panicked"}
    with running(tools, MachineSpec(), tmp_path / "panic") as vm, pytest.raises(GuestError, match="guest-panicked"):
        vm.wait_for("login:", 60)


def test_a_guest_that_says_nothing_more_is_given_up_early(tools: FakeTools, tmp_path: Path) -> None:
    FakeTools.environment = {"FAKE_CONSOLE": "Starting something ...\n"}
    with running(tools, MachineSpec(), tmp_path / "vm") as vm, pytest.raises(GuestError) as caught:
        vm.wait_until(lambda: False, 60, "a login", silence_seconds=0.5)
    assert "a login did not come: the console has been silent for 0 s" in caught.value.message
    assert "| Starting something" in caught.value.message


def test_an_empty_console_is_named(tools: FakeTools, tmp_path: Path) -> None:
    with running(tools, MachineSpec(), tmp_path / "vm") as vm, pytest.raises(GuestError, match="console is empty"):
        vm.wait_for("login:", 0.1)


def test_a_machine_that_dies_at_once_tells_qemus_own_words(tools: FakeTools, tmp_path: Path) -> None:
    FakeTools.environment = {"FAKE_DIE": "3"}
    with pytest.raises(GuestError) as caught, running(tools, MachineSpec(), tmp_path / "vm"):
        pass
    assert "status 3" in caught.value.message
    assert "QEMU: qemu-system-x86_64: it broke" in caught.value.message


def test_a_machine_that_dies_while_waited_for_is_not_waited_for(tools: FakeTools, tmp_path: Path) -> None:
    with running(tools, MachineSpec(), tmp_path / "vm") as vm:
        vm.process.kill()
        with pytest.raises(GuestError, match="ended by itself"):
            vm.wait_for("login:", 60)


def test_power_button_and_power_cut_both_wait_for_the_end(tools: FakeTools, tmp_path: Path) -> None:
    with running(tools, MachineSpec(), tmp_path / "a") as vm:
        vm.powerdown(10)
        assert vm.process.poll() == 0
    with running(tools, MachineSpec(), tmp_path / "b") as vm:
        vm.power_cut()
        assert vm.process.poll() == 0


def test_an_old_console_is_not_read_as_a_new_one(tools: FakeTools, tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / "console.log").write_text("login:")
    with running(tools, MachineSpec(), tmp_path / "vm") as vm, pytest.raises(GuestError):
        vm.wait_for("login:", 0.3)


def test_the_sandbox_may_write_overlays_and_only_read_what_lies_below_them(tools: FakeTools, tmp_path: Path) -> None:
    image, overlay, seed = tmp_path / "i" / "disk.qcow2", tmp_path / "o" / "x.qcow2", tmp_path / "s" / "seed.img"
    disks = (Disk(overlay, backing=(image,)), Disk(seed, "raw", read_only=True))
    with running(tools, MachineSpec(disks=disks), tmp_path / "vm"):
        pass
    assert FakeTools.seen["writable"] == [tmp_path / "vm", tmp_path / "o"]
    assert FakeTools.seen["readable"] == [seed, image]
    assert FakeTools.seen["devices"] == []


def test_escapes_and_returns_are_no_text() -> None:
    assert clean_console(b"\x1b[2J\x1b[01;32m[  OK  ]\x1b[0m Started\r\n\x1b(Bx\0y\xff") == "[  OK  ] Started\nxy\ufffd"
