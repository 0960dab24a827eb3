"""The image inside the image: an L2 that is a whole copy of it, booted under KVM in an L1, ready to run an L3.

The L1 gets the image *file* as a raw, read-only disk: its qcow2 bytes show no partition table, so that the L1's kernel
can't take the inner copy for its own root. On an overlay inside the L1 that disk becomes the L2's. Where the image has
libvirt, the L2 hangs on libvirt's default network, so that its own libvirt must choose another subnet.
"""

from __future__ import annotations

import gzip
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from recvirt.accept import boots
from recvirt.accept.context import TEST_USER, Acceptance
from recvirt.accept.guest import Guest
from recvirt.accept.results import Failed
from recvirt.errors import CommandError, GuestError
from recvirt.qemu import Disk, MachineSpec, QmpClient, SshAccess, make_seed
from recvirt.run import start, stop

#: Folder inside the L1.
FOLDER = "/var/tmp/recvirt-deep"
OUTER_BYTES = 4 * 1024**3
INNER_MIB = 1792
_MAC = "52:54:00:72:76:02"
_FORWARDED_PORT = 2222


@dataclass(frozen=True)
class Kernel:
    """What the L1 itself was booted with: its copy has the same partitions, so the same words lead to its root.

    It is handed over directly: a boot loader that reads megabytes by BIOS calls, each some exits of an emulated SVM,
    takes minutes, and is proved at the first level.
    """

    path: str
    initrd: str
    cmdline: str


def inner_argv(disk: str, seed: str, console: str, netdev: str, kernel: Kernel) -> list[str]:
    """QEMU inside the L1."""
    boot = ["-kernel", kernel.path, "-append", kernel.cmdline, *(["-initrd", kernel.initrd] if kernel.initrd else [])]
    return [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35", "-accel", "kvm",
        "-cpu", "host", "-smp", "2", "-m", f"{INNER_MIB}M", "-device", "virtio-rng-pci",
        "-drive", f"if=none,id=root,format=qcow2,cache=unsafe,file={disk}",
        "-device", "virtio-blk-pci,drive=root",
        "-drive", f"if=none,id=seed,format=raw,readonly=on,file={seed}", "-device", "virtio-blk-pci,drive=seed",
        "-netdev", netdev, "-device", f"virtio-net-pci,netdev=net0,mac={_MAC},romfile=",
        "-serial", f"file:{console}", "-qmp", "stdio", *boot,
    ]  # fmt: skip


@contextmanager
def deep(acceptance: Acceptance) -> Iterator[Guest]:
    """Yields the L2. Its ``facts`` hold the L1 (``outer``) and the control connection of its QEMU (``qmp``)."""
    folder = acceptance.work_dir / "deep"
    overlay = boots.fresh_overlay(acceptance, folder, boots.GROWTH_BYTES * 2)
    cloud = boots.cloud_config(acceptance, "deep")
    template = MachineSpec(memory_bytes=OUTER_BYTES, disks=(Disk(overlay), _image_as_bytes(acceptance, folder)))
    with boots.booted(acceptance, "deep", overlay, cloud, template) as outer:
        inner_folder = folder / "l2"
        inner_folder.mkdir(exist_ok=True)
        inner_cloud = boots.cloud_config(acceptance, "deep-l2")
        _prepare(outer, make_seed(acceptance.tools, inner_cloud, inner_folder))
        netdev = _network(outer)
        with _inner_qemu(outer, netdev) as qmp:
            access = _wait_login(outer, inner_folder, netdev)
            inner = Guest(acceptance, "deep-l2", access, None, inner_cloud)
            inner.facts.update({"outer": outer, "qmp": qmp})
            inner.facts["settled"] = inner.wait_settled()
            try:
                yield inner
            finally:
                access.close_shared()
                _keep_console(outer, inner_folder)


def _image_as_bytes(acceptance: Acceptance, folder: Path) -> Disk:
    image = acceptance.image
    if acceptance.image_facts.format != "qcow2":
        image = folder / "inner.qcow2"
        acceptance.tools.run(
            ["qemu-img", "convert", "-O", "qcow2", str(acceptance.image), str(image)],
            readable=[acceptance.image], writable=[folder],
        )  # fmt: skip
    return Disk(image, "raw", read_only=True)


def _prepare(outer: Guest, seed: Path) -> None:
    outer.out(f"mkdir -p {FOLDER}", root=False)
    outer.copy_in(gzip.compress(seed.read_bytes()), f"{FOLDER}/seed.img.gz")
    outer.out(f"gunzip -f {FOLDER}/seed.img.gz", root=False)
    # The disk whose first bytes are qcow2's magic number.
    find = 'for d in /dev/vd?; do [ "$(head -c 3 $d)" = QFI ] && echo $d; done; :'
    device = outer.out(find)
    if not device.startswith("/dev/vd"):
        raise GuestError("the L1 does not see the disk that holds the image's file")
    outer.out(f"qemu-img create -q -f qcow2 -b {device} -F qcow2 {FOLDER}/disk.qcow2")


def _network(outer: Guest) -> str:
    """libvirt's bridge where there is one, else QEMU's user network."""
    if "libvirt-daemon-system" not in outer.acceptance.promises.packages:
        return f"user,id=net0,hostfwd=tcp:127.0.0.1:{_FORWARDED_PORT}-:22"
    from recvirt.accept.checks.virtual import judge_libvirt_network

    outer.facts["subnet"] = judge_libvirt_network(outer)
    bridge = outer.out("virsh -c qemu:///system net-info default | awk '/^Bridge:/ {print $2}'")
    outer.out(f"mkdir -p /etc/qemu && echo 'allow {bridge}' > /etc/qemu/bridge.conf")
    return f"bridge,id=net0,br={bridge}"


def _kernel_of(outer: Guest) -> Kernel:
    release = outer.out("uname -r")
    initrd = f"/boot/initrd.img-{release}"
    words = [word for word in outer.out("cat /proc/cmdline").split() if not word.startswith("BOOT_IMAGE=")]
    has_initrd = outer.run(f"test -e {initrd}").status == 0
    return Kernel(f"/boot/vmlinuz-{release}", initrd if has_initrd else "", " ".join(words))


@contextmanager
def _inner_qemu(outer: Guest, netdev: str) -> Iterator[QmpClient]:
    """QEMU in the L1, with its control connection over SSH's own streams: it ends with the connection."""
    kernel = _kernel_of(outer)
    argv = inner_argv(f"{FOLDER}/disk.qcow2", f"{FOLDER}/seed.img", f"{FOLDER}/console.log", netdev, kernel)
    command = f"exec sudo -n {shlex.join(argv)}"
    process = start(
        outer.access.argv(command, shared=False), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin and process.stdout and process.stderr
    try:
        try:
            qmp = QmpClient(process.stdout, process.stdin)
        except GuestError as error:
            stop(process)
            said = process.stderr.read().decode("utf-8", "replace").strip()
            raise GuestError(f"QEMU in the L1 did not start: {said[-600:] or error.message}") from None
        outer.facts["l2-process"] = process
        yield qmp
    finally:
        outer.run("pkill -x qemu-system-x86 || :")
        stop(process)


def _wait_login(outer: Guest, folder: Path, netdev: str) -> SshAccess:
    acceptance = outer.acceptance
    limit = acceptance.patience(acceptance.profile.accept.boot_seconds) * 2
    process = outer.facts["l2-process"]
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = process.stderr.read().decode("utf-8", "replace").strip()
            raise GuestError(f"QEMU in the L1 ended: {said[-600:]}\n{_console_tail(outer)}")
        address = _address(outer, netdev)
        if address is not None:
            host, port = address
            access = SshAccess(folder, port, TEST_USER, acceptance.key, host, outer.access.config_path).write()
            try:
                if access.run("true", check=False, seconds=240).status == 0:
                    return access
            except CommandError:
                pass
        time.sleep(2)
    raise GuestError(f"no login to the L2 within {limit:.0f} s\n{_console_tail(outer)}")


def _address(outer: Guest, netdev: str) -> tuple[str, int] | None:
    if netdev.startswith("user,"):
        return "127.0.0.1", _FORWARDED_PORT
    leases = outer.run(f"virsh -q -c qemu:///system net-dhcp-leases default --mac {_MAC}").stdout.split()
    found = [word.split("/")[0] for word in leases if "/" in word and word[0].isdigit()]
    return (found[0], 22) if found else None


def _console_tail(outer: Guest) -> str:
    try:
        return outer.run(f"tail -n 20 {FOLDER}/console.log").stdout
    except (GuestError, Failed):
        return ""


def _keep_console(outer: Guest, folder: Path) -> None:
    try:
        (folder / "console.log").write_text(outer.run(f"cat {FOLDER}/console.log").stdout)
    except GuestError:
        pass
