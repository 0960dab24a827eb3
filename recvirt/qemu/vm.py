"""A running virtual machine: started, watched, waited for, and surely ended.

Everything a VM leaves lies in its own folder; QEMU dies with recvirt (``setpriv --pdeathsig``, bwrap's
``--die-with-parent``), also when recvirt itself is killed.
"""

from __future__ import annotations

import math
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from subprocess import Popen

from recvirt import run as runner
from recvirt.errors import CommandError, GuestError
from recvirt.qemu import stuck
from recvirt.qemu.argv import (
    CONSOLE_LOG,
    CONSOLE_SOCKET,
    OVMF_VARIABLES,
    QMP_SOCKET,
    SPARE_PORT,
    UEFI_VARIABLES,
    MachineSpec,
    qemu_argv,
)
from recvirt.qemu.probe import KVM_DEVICE
from recvirt.qemu.qmp import QmpClient, QmpError, connect_unix, parse_forwards
from recvirt.qemu.ssh import SshAccess
from recvirt.sandbox import ToolsRoot
from recvirt.ui import format_bytes

QEMU_LOG = "qemu.log"
_ECHO_BYTES = 8
#: What the machine's hardware was doing when a wait ended in vain.
STATE_LOG = "machine-state.txt"
_STATE_COMMANDS = ("info status", "info cpus", "info registers -a", "info irq", "info pic", "info blockstats")
#: A silent guest's processors are looked at after so long; asleep with an interrupt in service at two looks is stuck.
_LOOK_SECONDS = 20.0
_POLL_SECONDS = 0.25
_STATUS_SECONDS = 5.0
#: States of a machine that will not run again by itself (QEMU's RunState).
_STOPPED = ("internal-error", "guest-panicked", "paused", "shutdown", "watchdog")
_TAIL_LINES = 25
#: For one try of a login: a guest under TCG on a busy machine may need minutes for PAM's first session.
_LOGIN_SECONDS = 240.0
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[()][A-Z0-9]|[=>c78])")


def clean_console(raw: bytes) -> str:
    """Console output as plain text: terminal escapes and carriage returns taken out."""
    return _ESCAPES.sub("", raw.decode("utf-8", "replace")).replace("\r", "").replace("\0", "")


class Vm:
    """One running guest. Made by :func:`running`."""

    def __init__(self, folder: Path, spec: MachineSpec, process: Popen[bytes]) -> None:
        self.folder = folder
        self.spec = spec
        self.process = process
        self.started = time.monotonic()
        self._mark = 0
        self._stuck: set[tuple[int, int]] = set()
        self._keyboard: socket.socket | None = None
        self._next_status = self.started + _STATUS_SECONDS
        try:
            self.qmp = QmpClient.over_socket(self._connect(QMP_SOCKET))
        except OSError:
            raise self.error("QEMU's control socket did not appear") from None
        except QmpError as error:
            raise self.error(error.message) from None

    def _connect(self, name: str) -> socket.socket:
        deadline = time.monotonic() + 60
        while True:
            try:
                return connect_unix(self.folder, name, seconds=0.5)
            except OSError:
                self.check_alive()
                if time.monotonic() > deadline:
                    raise

    @property
    def console_path(self) -> Path:
        """The log of the serial console."""
        return self.folder / CONSOLE_LOG

    def console_text(self, *, since_mark: bool = False) -> str:
        """What the serial console has shown so far, as plain text."""
        try:
            raw = self.console_path.read_bytes()
        except FileNotFoundError:
            raw = b""
        return clean_console(raw[self._mark if since_mark else 0 :])

    def mark(self) -> None:
        """Forget what the console has shown: :meth:`wait_for` looks only at what comes after (say, a reboot)."""
        self._mark = self._console_bytes()

    def _console_bytes(self) -> int:
        return self.console_path.stat().st_size if self.console_path.exists() else 0

    def type(self, text: str, seconds: float = 60.0) -> None:
        """Type one line on the serial console of an ``interactive`` machine, and wait until it was echoed.

        The connection then stays: QEMU's hub loses some of what the guest writes in the moment that one ends, in the
        log as well. GuestError when nothing is echoed for ``seconds``.
        """
        if self._keyboard is None:
            self._keyboard = connect_unix(self.folder, CONSOLE_SOCKET, seconds=10)
        self._drain()
        tail = text.encode().rstrip(b"\n")[-_ECHO_BYTES:]
        seen = b""
        self._keyboard.sendall(text.encode())
        self._keyboard.settimeout(seconds)
        try:
            while tail not in seen:
                seen += self._keyboard.recv(4096)
        except TimeoutError:
            raise self.error(f"what was typed did not come back in {seconds:.0f} s: {text!r}") from None

    def _drain(self) -> None:
        """Take what the guest wrote to the keyboard's connection; nobody else does, and a full one would stop it."""
        if self._keyboard is None:
            return
        self._keyboard.setblocking(False)
        with suppress(BlockingIOError):
            while self._keyboard.recv(65536):
                pass

    def error(self, message: str) -> GuestError:
        """A GuestError with the last lines of the console and of QEMU itself."""
        lines = [f"  | {line}" for line in self.console_text().splitlines() if line.strip()][-_TAIL_LINES:]
        qemu = self._qemu_words().strip().splitlines()[-5:]
        text = message + ("\n  last lines of the console:\n" + "\n".join(lines) if lines else "; its console is empty")
        text += "".join(f"\n  QEMU: {line}" for line in qemu)
        return GuestError(text, hint=f"the whole console log: {self.console_path}")

    def _qemu_words(self) -> str:
        log = self.folder / QEMU_LOG
        return log.read_text(errors="replace") if log.exists() else ""

    def check_alive(self) -> None:
        """GuestError when QEMU has ended, or has stopped the guest for good (which looks like silence otherwise)."""
        status = self.process.poll()
        if status is not None:
            error = self.error(f"the virtual machine ended by itself (QEMU's status {status})")
            if stuck.gave_itself_up(status, self._qemu_words()):
                raise stuck.EmulatorError(error.message, hint="QEMU broke, not the image: run it again")
            raise error
        if time.monotonic() < self._next_status:
            return
        self._next_status = time.monotonic() + _STATUS_SECONDS
        said = str(self.qmp.execute("query-status")["status"])
        if said == "io-error":
            events = [event["data"] for event in self.qmp.events if event.get("event") == "BLOCK_IO_ERROR"]
            why = str(events[-1].get("reason", "")) if events else "no reason given"
            free = shutil.disk_usage(self.folder).free
            raise GuestError(
                f"QEMU stopped the guest, for its disk could not be written: {why}",
                hint=f"{self.folder} has {format_bytes(free)} free: make room, then run it again",
            )
        if said in _STOPPED:
            raise self.error(f"QEMU stopped the guest: {said} ({self.keep_state()})")

    def wait_until(
        self, done: Callable[[], bool], seconds: float, what: str, *, silence_seconds: float = math.inf
    ) -> float:
        """Poll ``done`` until it holds; returns the seconds it took.

        GuestError when QEMU dies, time is up, or nothing new was on the console for ``silence_seconds``: systemd names
        there every few seconds what it waits for.
        """
        started = heard = looked = time.monotonic()
        size = self._console_bytes()
        while True:
            if done():
                return time.monotonic() - started
            self.check_alive()
            self._drain()
            if (now := self._console_bytes()) != size:
                size, heard = now, time.monotonic()
            if time.monotonic() - max(heard, looked) > _LOOK_SECONDS:
                looked = time.monotonic()
                self._check_processors()
            if time.monotonic() - heard > silence_seconds:
                raise self.error(
                    f"{what} did not come: the console has been silent for {silence_seconds:.0f} s "
                    f"({self.keep_state()})"
                )
            if time.monotonic() - started > seconds:
                raise self.error(f"{what} did not come in {seconds:.0f} s ({self.keep_state()})")
            time.sleep(_POLL_SECONDS)

    def keep_state(self) -> str:
        """Write what processors, interrupts and disks are doing into the VM's folder; one sentence on the processors.

        It tells a guest that waits for something (all of them halted) from one that spins, and both from a QEMU that
        hangs itself.
        """
        said = []
        try:
            for command in (*_STATE_COMMANDS, *(f"info lapic {number}" for number in range(self.spec.cpus))):
                text = self._monitor(command)
                said.append(f"(qemu) {command}\n{text}")
        except QmpError as error:
            said.append(error.message)
            return error.message
        finally:
            (self.folder / STATE_LOG).write_text("\n".join(said).replace("\r", ""))
        halted = re.findall(r"\bHLT=(\d)", "\n".join(said))
        return f"{halted.count('1')} of {len(halted)} processors idle"

    def _monitor(self, command: str) -> str:
        return str(self.qmp.execute("human-monitor-command", {"command-line": command}))

    def _check_processors(self) -> None:
        """EmulatorError when a processor was found stuck at two looks in a row (see :mod:`recvirt.qemu.stuck`)."""
        if self.spec.accelerator != "tcg":
            return
        found = {
            (number, vector)
            for number in stuck.sleeping(self._monitor("info registers -a"))
            for vector in stuck.in_service(self._monitor(f"info lapic {number}"))
        }
        if again := sorted(found & self._stuck):
            number, vector = again[0]
            raise stuck.EmulatorError(
                f"QEMU's emulation lost an interrupt: processor {number} sleeps with vector {vector} in service, so "
                f"its timer reaches it no more ({self.keep_state()})",
                hint="the image is not at fault: run it again",
            )
        self._stuck = found

    def wait_for(self, pattern: str, seconds: float) -> str:
        """Wait for a regular expression on the serial console (after the last :meth:`mark`); returns what matched."""
        compiled = re.compile(pattern)
        found: list[str] = []

        def look() -> bool:
            match = compiled.search(self.console_text(since_mark=True))
            found.extend([match[0]] if match else [])
            return match is not None

        self.wait_until(look, seconds, f"“{pattern}” on the console")
        return found[-1]

    def plug_disk(self, path: Path, serial: str) -> None:
        """Attach a raw disk to a machine that has a ``spare_port``. ``path`` must lie in a folder of its disks."""
        file, name = {"driver": "file", "filename": str(path)}, _plugged(serial)
        self.qmp.execute("blockdev-add", {"driver": "raw", "node-name": name, "file": file})
        device = {"driver": "virtio-blk-pci", "bus": SPARE_PORT, "id": name, "drive": name, "serial": serial}
        self.qmp.execute("device_add", device)

    def unplug_disk(self, serial: str, seconds: float) -> None:
        """Ask the guest to give a disk back, and take it. GuestError when it does not let go."""
        name = _plugged(serial)
        self.qmp.execute("device_del", {"id": name})

        def is_gone() -> bool:
            self.qmp.execute("query-status")  # events come with answers
            return any(
                event.get("event") == "DEVICE_DELETED" and event["data"].get("device") == name
                for event in self.qmp.events
            )

        self.wait_until(is_gone, seconds, f"the guest's leave to take the disk {serial}")
        self.qmp.events[:] = [event for event in self.qmp.events if event["data"].get("device") != name]
        self.qmp.execute("blockdev-del", {"node-name": name})

    def close(self) -> None:
        """Let go of the keyboard."""
        if self._keyboard is not None:
            self._keyboard.close()
            self._keyboard = None

    def host_port(self, guest_port: int) -> int:
        """The host's port that leads to ``guest_port``. QEMU itself bound a free one, so nobody races for it."""
        text = self._monitor("info usernet")
        try:
            return parse_forwards(text)[guest_port]
        except KeyError:
            raise GuestError(f"no port of the host leads to the guest's port {guest_port}") from None

    def ssh(self, user: str, key: Path) -> SshAccess:
        """SSH access to this guest (written, not yet tried)."""
        return SshAccess(self.folder, self.host_port(22), user, key).write()

    def wait_ssh(self, access: SshAccess, seconds: float, *, silence_seconds: float = math.inf) -> float:
        """Wait until ``access`` can run a command; returns the seconds it took."""

        def try_login() -> bool:
            if not access.banner():
                return False
            try:
                return access.run("true", check=False, seconds=_LOGIN_SECONDS).status == 0
            except CommandError:
                return False

        what = f"an SSH login as {access.user}"
        return self.wait_until(try_login, seconds, what, silence_seconds=silence_seconds)

    def wait_end(self, seconds: float) -> None:
        """Wait until QEMU has ended by itself, which the guest asked for."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                raise self.error(f"the guest did not power off in {seconds:.0f} s ({self.keep_state()})")
            time.sleep(_POLL_SECONDS)

    def powerdown(self, seconds: float) -> None:
        """Press the power button and wait for an orderly end."""
        self.qmp.execute("system_powerdown")
        self.wait_end(seconds)

    def power_cut(self) -> None:
        """End the machine from one instruction to the next; the guest learns nothing of it."""
        self.qmp.execute("quit")
        self.wait_end(60)

    def reset(self) -> None:
        """The reset button."""
        self.qmp.execute("system_reset")


def _plugged(serial: str) -> str:
    """QEMU's name of a disk that was plugged in: its names begin with a letter (qemu's id_wellformed)."""
    return f"plug-{serial}"


@contextmanager
def running(tools: ToolsRoot, spec: MachineSpec, folder: Path) -> Iterator[Vm]:
    """Start ``spec`` with ``folder`` for its logs and sockets; whatever happens, QEMU is gone at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    _prepare(tools, spec, folder)
    writable, readable = _bound_paths(spec)
    argv = tools.argv(
        qemu_argv(spec), writable=[folder, *writable], readable=readable, network=True, cwd=folder,
        devices=[KVM_DEVICE] if spec.accelerator == "kvm" else [],
    )  # fmt: skip
    with (folder / QEMU_LOG).open("wb") as log:
        process = runner.start(argv, stdout=log.fileno())
    try:
        with closing(Vm(folder, spec, process)) as vm:
            yield vm
    finally:
        runner.stop(process)
        (folder / QMP_SOCKET).unlink(missing_ok=True)


def _prepare(tools: ToolsRoot, spec: MachineSpec, folder: Path) -> None:
    for name in (QMP_SOCKET, CONSOLE_LOG):
        (folder / name).unlink(missing_ok=True)
    variables = folder / UEFI_VARIABLES
    if spec.firmware == "uefi" and not variables.exists():
        variables.write_bytes((tools.rootfs / OVMF_VARIABLES.lstrip("/")).read_bytes())


def _bound_paths(spec: MachineSpec) -> tuple[list[Path], list[Path]]:
    """Folders that QEMU writes in, and files that it reads: all that the sandbox lets it see."""
    writable = [disk.path.parent for disk in spec.disks if not disk.read_only]
    readable = [disk.path for disk in spec.disks if disk.read_only]
    readable += [path for disk in spec.disks for path in disk.backing]
    readable += [path for path in (spec.kernel, spec.initrd) if path is not None]
    return sorted(set(writable)), readable
