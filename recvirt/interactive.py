"""A virtual machine for a person: the serial console in a terminal, a login over SSH, and state that lasts.

``<vm folder>``: ``overlay.qcow2`` (what the VM wrote), ``id_ed25519`` (the login's key), ``state.json`` (who runs it).
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import termios
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from recvirt.errors import ConfigError, GuestError, LockedError, RecvirtError
from recvirt.model import parse_size
from recvirt.qemu import (
    CloudConfig,
    Disk,
    Forward,
    MachineSpec,
    Nic,
    SshAccess,
    Vm,
    find_accelerator,
    image_info,
    make_key,
    make_overlay,
    make_seed,
    running,
)
from recvirt.qemu.argv import CONSOLE_LOG, CONSOLE_SOCKET, CONSOLE_SOCKET_2, Firmware
from recvirt.qemu.qmp import connect_unix
from recvirt.run import start, stop
from recvirt.sandbox import ToolsRoot
from recvirt.ui import reporter

USER = "recvirt"
_ESCAPE = b"\x1d"  # Ctrl-]
_BOOT_SECONDS = 300.0
_DOWN_SECONDS = 60.0


@dataclass(frozen=True)
class Wish:
    """What a person asked for."""

    firmware: Firmware
    memory: str
    cpus: int
    forwards: tuple[Forward, ...] = ()
    vnc: int | None = None
    ephemeral: bool = False
    fresh: bool = False
    seed_dir: Path | None = None
    with_ssh: bool = False
    groups: tuple[str, ...] = ("kvm",)  # of the login


def parse_forward(text: str) -> Forward:
    """``8080:80`` or ``80``; ConfigError for anything else."""
    words = text.split(":")
    if len(words) > 2 or not all(word.isdigit() and 0 < int(word) < 65536 for word in words):
        raise ConfigError(f"{text!r} is not [HOST:]GUEST, two port numbers", hint="for example: -p 8080:80")
    return Forward(int(words[-1]), int(words[0]) if len(words) == 2 else 0)


def parse_memory(text: str) -> int:
    """Bytes; ConfigError for what is no size, or too small to boot."""
    try:
        size = parse_size(text)
    except ValueError as error:
        raise ConfigError(f"--memory {text}: {error}") from None
    if size < 256 * 1024**2:
        raise ConfigError(f"--memory {text} is too little to boot", hint="256M at least")
    return size


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """One VM a folder at a time; the kernel lets go of the lock when its holder dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                f"a VM of {folder.parent.name} is running already", hint="recvirt console or recvirt ssh reach it"
            ) from None
        try:
            yield
        finally:
            (folder / "state.json").unlink(missing_ok=True)


def boot(find_tools: Callable[[], ToolsRoot], image: Path, folder: Path, wish: Wish) -> int:
    """Run the VM until its guest powers off or the person leaves; the status to exit with.

    The wish is judged before the tools are looked for, which may have to be made.
    """
    memory_bytes = parse_memory(wish.memory)
    tools = find_tools()
    with _held(folder):
        accelerator = find_accelerator(tools)
        disks, key = _disks(tools, image, folder, wish)
        spec = MachineSpec(
            accelerator=accelerator.name, firmware=wish.firmware, memory_bytes=memory_bytes, cpus=wish.cpus,
            disks=disks, nics=(Nic(forwards=(Forward(22), *wish.forwards)),), interactive=True, vnc=wish.vnc,
        )  # fmt: skip
        try:
            with running(tools, spec, folder) as vm:
                access = SshAccess(folder, vm.host_port(22), USER, key).write()
                _tell(folder, vm, access, wish)
                status = _ssh_session(vm, access) if wish.with_ssh else _console_session(vm)
                _shut_down(vm)
                return status
        finally:
            if wish.ephemeral:
                (folder / "ephemeral.qcow2").unlink(missing_ok=True)


def _disks(tools: ToolsRoot, image: Path, folder: Path, wish: Wish) -> tuple[tuple[Disk, ...], Path]:
    key = folder / "id_ed25519"
    if not key.exists():
        make_key(folder)
    overlay = folder / ("ephemeral.qcow2" if wish.ephemeral else "overlay.qcow2")
    # An overlay belongs to one image; on another one it would be garbage.
    stamp = f"{image} {image.stat().st_mtime_ns} {image.stat().st_size}\n"
    stamp_file = folder / "overlay.of"
    known = stamp_file.read_text() if stamp_file.exists() else ""
    if wish.ephemeral or wish.fresh or not overlay.exists() or known != stamp:
        if not wish.ephemeral and overlay.exists() and not wish.fresh:
            reporter.warn("the image was built anew: the VM begins anew too")
        make_overlay(tools, image, overlay, image_format=str(image_info(tools, image)["format"]))
        if not wish.ephemeral:
            stamp_file.write_text(stamp)
    seed = _own_seed(tools, folder, wish.seed_dir) if wish.seed_dir else _default_seed(tools, folder, key, wish.groups)
    return (Disk(overlay, bootable=True, backing=(image,)), Disk(seed, "raw", read_only=True)), key


def _default_seed(tools: ToolsRoot, folder: Path, key: Path, groups: tuple[str, ...]) -> Path:
    public = key.with_name(f"{key.name}.pub").read_text().strip()
    config = CloudConfig(instance_id="recvirt-boot", user=USER, ssh_keys=(public,), groups=groups)
    return make_seed(tools, config, folder)


def _own_seed(tools: ToolsRoot, folder: Path, seed_dir: Path) -> Path:
    from recvirt.qemu.seed import pack_seed

    for name in ("user-data", "meta-data"):
        source = seed_dir / name
        if not source.is_file():
            raise ConfigError(f"{source} is missing", hint="a NoCloud seed has user-data and meta-data")
        (folder / name).write_bytes(source.read_bytes())
    return pack_seed(tools, folder)


def _tell(folder: Path, vm: Vm, access: SshAccess, wish: Wish) -> None:
    ports = {forward.guest_port: vm.host_port(forward.guest_port) for forward in wish.forwards}
    state = {"pid": os.getpid(), "ssh_port": access.port, "forwards": ports}
    (folder / "state.json").write_text(json.dumps(state) + "\n")
    reporter.info(f"SSH: port {access.port} of 127.0.0.1 (recvirt ssh {folder.parent.name})")
    for guest_port, host_port in ports.items():
        reporter.info(f"forward: 127.0.0.1:{host_port} -> {guest_port}")
    if wish.vnc is not None:
        reporter.info(f"VNC: 127.0.0.1:{5900 + wish.vnc}")


def _shut_down(vm: Vm) -> None:
    if vm.process.poll() is not None:
        return
    reporter.info("shutting the VM down")
    try:
        vm.powerdown(_DOWN_SECONDS * (1 if vm.spec.accelerator == "kvm" else 3))
    except GuestError:
        reporter.warn("it did not power off in time and was ended")


def _console_session(vm: Vm) -> int:
    if not sys.stdin.isatty():
        return _follow_log(vm)
    reporter.info("serial console; Ctrl-] leaves and shuts the VM down")
    with connect_unix(vm.folder, CONSOLE_SOCKET, seconds=10) as connection:
        attach(connection)
    return 0


def _follow_log(vm: Vm) -> int:
    """Without a terminal: copy the console to stdout until the guest powers off."""
    position = 0
    while True:
        ended = vm.process.poll() is not None
        data = (vm.folder / CONSOLE_LOG).read_bytes() if (vm.folder / CONSOLE_LOG).exists() else b""
        sys.stdout.buffer.write(data[position:])
        sys.stdout.flush()
        position = len(data)
        if ended:
            return 0
        select.select([], [], [], 0.2)


def attach(connection: socket.socket) -> None:
    """Join this terminal and a console until Ctrl-] is typed or the other side closes."""
    keyboard = sys.stdin.fileno()
    saved = termios.tcgetattr(keyboard)
    try:
        tty.setraw(keyboard)
        while True:
            ready, _, _ = select.select([keyboard, connection], [], [])
            if connection in ready:
                data = connection.recv(65536)
                if not data:
                    return
                os.write(sys.stdout.fileno(), data)
            if keyboard in ready:
                typed = os.read(keyboard, 4096)
                if not typed or _ESCAPE in typed:
                    return
                connection.sendall(typed)
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, saved)
        print()


def _ssh_session(vm: Vm, access: SshAccess) -> int:
    factor = 1.0 if vm.spec.accelerator == "kvm" else 4.0
    with reporter.step("waiting for SSH"):
        vm.wait_ssh(access, _BOOT_SECONDS * factor)
    return _run_ssh(access, ())


def _run_ssh(access: SshAccess, command: Sequence[str]) -> int:
    """ssh with this terminal; its status."""
    argv = access.argv(*command, shared=False)
    if not command and sys.stdin.isatty():
        argv.insert(1, "-t")
    process = start(
        argv, stdin=sys.stdin.fileno() if _has_fileno() else subprocess.DEVNULL, stdout=None, stderr=None,
    )  # fmt: skip
    try:
        return process.wait()
    finally:
        stop(process)


def _has_fileno() -> bool:
    try:
        sys.stdin.fileno()
    except (OSError, ValueError):
        return False
    return True


def running_state(folder: Path) -> dict[str, object]:
    """state.json of a VM that runs now; RecvirtError with the next step if none does."""
    hint = f"start it in another terminal: recvirt boot {folder.parent.name}"
    try:
        with (folder / "lock").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        raise RecvirtError(f"no VM of {folder.parent.name} is running", hint=hint)
    except FileNotFoundError:
        raise RecvirtError(f"no VM of {folder.parent.name} is running", hint=hint) from None
    except BlockingIOError:
        pass
    try:
        state: dict[str, object] = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        raise RecvirtError(f"the VM of {folder.parent.name} is only starting", hint="try again in a moment") from None
    return state


def ssh(folder: Path, command: Sequence[str]) -> int:
    """Log in to the VM of ``folder``, or run a command there; ssh's status."""
    state = running_state(folder)
    access = SshAccess(folder, int(str(state["ssh_port"])), USER, folder / "id_ed25519")
    return _run_ssh(access, tuple(command))


def console(folder: Path) -> int:
    """Attach to the second console socket of the VM of ``folder``."""
    running_state(folder)
    if not sys.stdin.isatty():
        raise RecvirtError("console needs a terminal", hint=f"the log so far: {folder / CONSOLE_LOG}")
    reporter.info("serial console; Ctrl-] detaches")
    try:
        connection = connect_unix(folder, CONSOLE_SOCKET_2, seconds=5)
    except OSError as error:
        raise RecvirtError(f"the console can't be reached: {error}") from None
    with connection:
        attach(connection)
    return 0
