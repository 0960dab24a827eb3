"""A small Linux guest started *inside* a guest, which has to prove that it ran, and ran under KVM.

Its kernel is the outer guest's own; its initramfs is one static busybox and a script. Proof of running: it answers a
fresh nonce with the nonce's SHA-256, which nobody can echo by accident. Proof of KVM: the outer guest's KVM counted its
exits (QMP ``query-stats``, fed by KVM_GET_STATS_FD, so no debugfs is needed). QMP travels over the SSH connection's own
streams: the outer guest needs no Python.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shlex
import subprocess
import threading
from dataclasses import dataclass, field
from typing import Any

from recvirt.accept.guest import Guest
from recvirt.accept.results import Failed
from recvirt.cpio import Entry, newc
from recvirt.errors import GuestError
from recvirt.qemu import QmpClient
from recvirt.run import start, stop
from recvirt.sandbox import ToolsRoot

#: Folder in the outer guest.
FOLDER = "/var/tmp/recvirt-l2"
_SECONDS = 60.0
#: A boot to user space takes tens of thousands; a guest that KVM never ran has none.
EXITS_MIN = 500

_INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
nonce=$(/bin/busybox sed -n 's/.*recvirt\\.nonce=\\([0-9a-f]*\\).*/\\1/p' /proc/cmdline)
answer=$(printf %s "$nonce" | /bin/busybox sha256sum | /bin/busybox cut -d' ' -f1)
nesting=$(/bin/busybox grep -o -w -m 1 -e svm -e vmx /proc/cpuinfo | /bin/busybox head -n 1)
hypervisor=$(/bin/busybox dmesg | /bin/busybox sed -n 's/.*Hypervisor detected: //p' | /bin/busybox head -n 1)
echo "RECVIRT-L2 answer=$answer nesting=${nesting:-none} hypervisor=${hypervisor:-none} kernel=$(/bin/busybox uname -r)"
/bin/busybox poweroff -f
"""


def initramfs(busybox: bytes) -> bytes:
    """The tiny guest's whole user space: busybox and an init that answers and powers off."""
    return newc(
        [
            Entry("bin", 0o40755),
            Entry("dev", 0o40755),
            Entry("proc", 0o40755),
            Entry("dev/console", 0o20600, device=(5, 1)),
            Entry("bin/busybox", 0o100755, busybox),
            Entry("init", 0o100755, _INIT.encode()),
        ]
    )


def busybox_of(tools: ToolsRoot) -> bytes:
    """The static busybox of the tools root."""
    return (tools.rootfs / "usr/bin/busybox").read_bytes()


@dataclass(frozen=True)
class TinyVm:
    """What a tiny guest proved. ``exits`` is by name, as KVM counts them."""

    answer_ok: bool
    nesting: str
    hypervisor: str
    kernel: str
    exits: dict[str, int] = field(default_factory=dict)


def tiny_argv(kernel: str, initrd: str, serial: str, nonce: str, memory_mib: int) -> list[str]:
    """QEMU inside the outer guest; it stops at the tiny guest's power-off, so that its counters can still be read."""
    return [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35",
        "-accel", "kvm", "-cpu", "host", "-m", f"{memory_mib}M", "-kernel", kernel, "-initrd", initrd,
        "-append", f"console=ttyS0 quiet panic=-1 recvirt.nonce={nonce}", "-serial", f"file:{serial}",
        "-qmp", "stdio", "-no-reboot", "-no-shutdown",
    ]  # fmt: skip


def parse_console(text: str, nonce: str) -> TinyVm | None:
    """What the tiny guest said of itself, or None when its line is not there."""
    match = re.search(r"RECVIRT-L2 answer=(\S*) nesting=(\S+) hypervisor=(.+) kernel=(\S+)", text)
    if not match:
        return None
    expected = hashlib.sha256(nonce.encode()).hexdigest()
    return TinyVm(match[1] == expected, match[2], match[3].strip(), match[4])


def sum_exits(stats: list[dict[str, Any]]) -> dict[str, int]:
    """The exit counters of all virtual CPUs, out of QMP's query-stats."""
    total: dict[str, int] = {}
    for provider in stats:
        if provider.get("provider") != "kvm":
            continue
        for item in provider.get("stats", []):
            if item["name"].endswith("exits") and isinstance(item["value"], int):
                total[item["name"]] = total.get(item["name"], 0) + item["value"]
    return total


def run_tiny_vm(guest: Guest, *, memory_mib: int = 256) -> TinyVm:
    """Start the tiny guest in ``guest`` as its ordinary user under KVM, and hear what it says.

    Raises GuestError (with what QEMU or the tiny guest said last) when it does not come up.
    """
    nonce = secrets.token_hex(16)
    _prepare(guest)
    serial = f"{FOLDER}/serial.log"
    limit = guest.acceptance.patience(_SECONDS)
    qemu = tiny_argv(f"{FOLDER}/vmlinuz", f"{FOLDER}/initrd", serial, nonce, memory_mib)
    command = f"rm -f {serial}; exec timeout -k 5 {limit:.0f} {shlex.join(qemu)}"
    process = start(
        guest.access.argv(command, shared=False), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin and process.stdout and process.stderr
    timer = threading.Timer(limit + 30, stop, (process,))
    timer.start()
    exits: dict[str, int] = {}
    try:
        qmp = QmpClient(process.stdout, process.stdin)
        qmp.wait_event("SHUTDOWN")
        exits = sum_exits(qmp.execute("query-stats", {"target": "vcpu"}))
        qmp.execute("quit")
        process.wait(limit)
    except (GuestError, subprocess.TimeoutExpired) as error:
        stop(process)
        said = process.stderr.read().decode("utf-8", "replace").strip().splitlines()[-3:]
        console = guest.run(f"tail -n 8 {serial} 2>/dev/null", root=False).stdout.strip()
        text = "; ".join(said) or str(error)
        raise GuestError(
            f"a VM in {guest.name} did not come up: {text}" + (f"\n{console}" if console else "")
        ) from None
    finally:
        timer.cancel()
        stop(process)
    console = guest.out(f"cat {serial}", root=False)
    found = parse_console(console, nonce)
    if found is None:
        raise GuestError(f"a VM in {guest.name} powered off without its words; its console: {console[-600:]!r}")
    return TinyVm(found.answer_ok, found.nesting, found.hypervisor, found.kernel, exits)


def _prepare(guest: Guest) -> None:
    """Put kernel and initramfs where the ordinary user can read them."""
    if guest.facts.get("tiny-vm-ready"):
        return
    # On a slow machine udev may still be loading modules, KVM's among them, when systemd has long settled.
    guest.run("udevadm settle --timeout=120", seconds=150)
    guest.out(f"mkdir -p {FOLDER}", root=False)
    guest.copy_in(initramfs(busybox_of(guest.acceptance.tools)), f"{FOLDER}/initrd")
    guest.out(f'install -m 644 "/boot/vmlinuz-$(uname -r)" {FOLDER}/vmlinuz')
    guest.facts["tiny-vm-ready"] = True


def prove(guest: Guest, *, deeper: bool) -> tuple[TinyVm, str]:
    """Run the tiny guest and judge it: the sentence for the report, or Failed."""
    found = run_tiny_vm(guest)
    exits, io_exits = found.exits.get("exits", 0), found.exits.get("io_exits", 0)
    if not found.answer_ok:
        raise Failed("the VM inside did not answer its nonce rightly")
    if exits < EXITS_MIN:
        raise Failed(f"KVM counted {exits} exits of the VM inside; it was not KVM that ran it")
    if deeper and found.nesting == "none":
        raise Failed("the VM inside sees neither vmx nor svm: nesting is off")
    return found, (
        f"answered its nonce; KVM counted {exits} exits ({io_exits} for I/O); kernel {found.kernel}; "
        f"it sees {found.nesting} and runs on {found.hypervisor}"
    )
