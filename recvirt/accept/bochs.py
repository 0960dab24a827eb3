"""The Intel side of nesting, on a machine without VMX: Bochs emulates a processor with VMX and EPT in software.

Our kernel boots there with the initramfs of ``recvirt-nested-check``, loads kvm_intel with nested and EPT, and runs a
tiny L2, which proves itself. Owns: the disk Bochs boots from, its configuration, the time box, and reading what the
machine said. Needs a tools root with the ``bochs`` set. Does not own: the words on the console (the package does).
Sources: bochsrc(5); the words and the report in docs/nested-check.md.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recvirt.disk.grub import boot_code, embedded_core
from recvirt.errors import AcceptanceError, GuestError, MissingToolError
from recvirt.run import start, stop
from recvirt.sandbox import ToolsRoot
from recvirt.ui import reporter

CPU_MODEL = "corei7_skylake_x"
MEMORY_MIB = 512
_SECTOR = 512
_PARTITION_LBA = 2048
_HEADS, _SECTORS_PER_TRACK = 16, 63
#: GRUB's core image goes between sector 0 and the partition, as on any disk with an MBR.
_CORE_LBA = 1
_FAT16_LBA = 0x0E
_GRUB_MODULES = ("biosdisk", "part_msdos", "fat", "linux", "serial", "terminal", "echo", "boot")
_WORD = "RECVIRT-L2 "
#: After one of these nothing good comes any more, and a kernel that panicked starts over and over.
_FATAL = re.compile(r"^(error: .*|grub( rescue)?> .*|.*Kernel panic - not syncing.*)$", re.MULTILINE)
_POLL_SECONDS = 0.5
_TAIL_LINES = 25


@dataclass(frozen=True)
class VmxResult:
    """What the emulated Intel machine said. ``problems`` is empty when kvm_intel ran the L2 as it should."""

    problems: tuple[str, ...]
    seconds: float
    kernel_release: str
    report: Mapping[str, Any] = field(default_factory=dict)  # recvirt-nested-check --json, from inside
    lines: tuple[str, ...] = ()  # the machine's own words
    console_path: Path | None = None

    @property
    def ok(self) -> bool:
        """Whether everything was proved."""
        return not self.problems


def run_vmx_check(
    tools: ToolsRoot, kernel_deb: Path, nested_check_deb: Path, work_dir: Path, *, timeout_seconds: float
) -> VmxResult:
    """Boot the kernel of ``kernel_deb`` on Bochs and let it run an L2 under kvm_intel.

    Takes one to four minutes. What Bochs leaves (``console.txt``, ``bochs.log``) stays in ``work_dir``.
    Raises AcceptanceError when the packages don't hold what is needed, GuestError with the last lines when the machine
    dies or is not done after ``timeout_seconds``; anything the machine itself reports is in the result.
    """
    if not (tools.rootfs / "usr/bin/bochs-bin").exists():
        raise MissingToolError("bochs", "bochs", hint="this check needs the tools root with the 'bochs' set")
    folder = work_dir.absolute() / "bochs"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    nonce = secrets.token_hex(8)
    try:
        kernel, initramfs, release = _unpack(tools, kernel_deb.absolute(), nested_check_deb.absolute(), folder)
        disk = _make_disk(tools, kernel, initramfs, grub_config(nonce), folder)
        (folder / "bochsrc").write_text(bochs_config(disk.stat().st_size))
        with reporter.step(f"Linux {release} on Bochs ({CPU_MODEL})"):
            seconds = _run(tools, folder, timeout_seconds)
    finally:
        # What was said stays; what it was said by is large and comes from elsewhere.
        shutil.rmtree(folder / "tree", ignore_errors=True)
        (folder / "disk.img").unlink(missing_ok=True)
    console = folder / "console.txt"
    return read_console(console.read_text(errors="replace"), nonce, seconds=seconds, release=release, path=console)


def grub_config(nonce: str) -> str:
    """GRUB's built-in script: everything through the serial port, no menu."""
    words = (
        "console=ttyS0,115200", "earlyprintk=ttyS0,115200", "panic=-1",
        # Bochs' clocks don't agree with each other well enough for the kernel's watchdog.
        "tsc=reliable", f"recvirt.nonce={nonce}", "recvirt.timeout=300", "kvm_intel.nested=1", "kvm_intel.ept=1",
    )  # fmt: skip
    lines = (
        "serial --unit=0 --speed=115200", "terminal_output serial",
        f"linux (hd0,msdos1)/vmlinuz {' '.join(words)}", "initrd (hd0,msdos1)/initrd", "boot",
    )  # fmt: skip
    return "\n".join(lines) + "\n"


def bochs_config(disk_bytes: int) -> str:
    """A bochsrc(5): one processor with VMX, a disk, the serial port into a file, and no need for a terminal.

    ``rfb`` is a screen that nobody looks at, in the sandbox's own network namespace. Paths are relative to the folder
    that Bochs runs in: a comma in an absolute one would end it.
    """
    cylinders = disk_bytes // (_HEADS * _SECTORS_PER_TRACK * _SECTOR)
    lines = (
        "config_interface: textconfig",
        'display_library: rfb, options="timeout=0"',
        "romimage: file=/usr/share/bochs/BIOS-bochs-latest, options=fastboot",
        "vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest",
        # Instructions a second decide how much work lies between two timer ticks, not how fast Bochs runs.
        f"cpu: model={CPU_MODEL}, count=1, ips=100000000, reset_on_triple_fault=0, ignore_bad_msrs=1",
        f"memory: guest={MEMORY_MIB}, host={MEMORY_MIB}",
        "ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14",
        "ata0-master: type=disk, path=disk.img, mode=flat, "
        f"cylinders={cylinders}, heads={_HEADS}, spt={_SECTORS_PER_TRACK}",
        "boot: disk",
        "com1: enabled=1, mode=file, dev=console.txt",
        "clock: sync=none, time0=utc",
        # Switching the power off is a panic for Bochs: fatal ends it.
        "panic: action=fatal",
        "error: action=ignore",
        "info: action=ignore",
        "log: bochs.log",
    )
    return "\n".join(lines) + "\n"


def master_boot_record(boot_image: bytes, sectors: int) -> bytes:
    """Sector 0: GRUB's boot code, and one active FAT partition up to the disk's end."""
    record = bytearray(_SECTOR)
    record[:440] = boot_code(boot_image, _CORE_LBA)
    size = sectors - _PARTITION_LBA
    struct.pack_into("<B3sB3sII", record, 446, 0x80, b"\xfe\xff\xff", _FAT16_LBA, b"\xfe\xff\xff", _PARTITION_LBA, size)
    record[510:] = b"\x55\xaa"
    return bytes(record)


def disk_sectors(content_bytes: int) -> int:
    """Sectors of a disk that holds files of this size, with room for the file system, in whole cylinders."""
    cylinder = _HEADS * _SECTORS_PER_TRACK
    wanted = _PARTITION_LBA + content_bytes * 9 // 8 // _SECTOR + 16 * 1024**2 // _SECTOR
    return -(-wanted // cylinder) * cylinder


def _unpack(tools: ToolsRoot, kernel_deb: Path, check_deb: Path, folder: Path) -> tuple[Path, Path, str]:
    tree, check = folder / "tree", folder / "tree/check"
    for deb, target in ((kernel_deb, tree), (check_deb, check)):
        if not deb.is_file():
            raise AcceptanceError(f"there is no {deb}", hint="build the profile first")
        target.mkdir()
        tools.run(["dpkg-deb", "--extract", str(deb), str(target)], readable=[deb], writable=[folder])
    kernels = sorted(tree.glob("boot/vmlinuz-*"))
    if len(kernels) != 1:
        raise AcceptanceError(f"{kernel_deb.name} holds {len(kernels)} kernels, not one")
    release = kernels[0].name.removeprefix("vmlinuz-")
    if not (tree / "lib").exists():
        (tree / "lib").symlink_to("usr/lib")
    tools.run(["depmod", "--basedir", str(tree), release], writable=[folder])
    initramfs = folder / "tree/initramfs.cpio"
    tools.run(
        [
            str(check / "usr/bin/recvirt-nested-check"), f"--root={tree}", f"--kernel-release={release}",
            f"--base={check}/usr/lib/recvirt/l2-initramfs.cpio", f"--write-initramfs={initramfs}",
        ],
        writable=[folder],
    )  # fmt: skip
    if b"kvm-intel.ko" not in initramfs.read_bytes():
        raise AcceptanceError(
            f"{kernel_deb.name} has no kvm_intel module",
            hint="the kernel needs CONFIG_KVM_INTEL=m (kernel config explain)",
        )
    return kernels[0], initramfs, release


def _make_disk(tools: ToolsRoot, kernel: Path, initramfs: Path, script: str, folder: Path) -> Path:
    (folder / "grub.cfg").write_text(script)
    core = folder / "core.img"
    argv = ["grub-mkimage", "-O", "i386-pc", "-o", str(core), "-p", "/", "-c", str(folder / "grub.cfg"), *_GRUB_MODULES]
    tools.run(argv, writable=[folder])
    boot_image = (tools.rootfs / "usr/lib/grub/i386-pc/boot.img").read_bytes()
    disk = folder / "disk.img"
    sectors = disk_sectors(kernel.stat().st_size + initramfs.stat().st_size)
    with disk.open("wb") as stream:
        stream.truncate(sectors * _SECTOR)
        stream.write(master_boot_record(boot_image, sectors))
        stream.write(embedded_core(core.read_bytes(), _CORE_LBA))
        if stream.tell() > _PARTITION_LBA * _SECTOR:
            raise AcceptanceError("GRUB's core image does not fit before the partition")
    volume = f"{disk}@@{_PARTITION_LBA * _SECTOR}"
    size = str(sectors - _PARTITION_LBA)
    geometry = ["-T", size, "-h", str(_HEADS), "-s", str(_SECTORS_PER_TRACK)]
    tools.run(["mformat", "-i", volume, *geometry, "::"], writable=[folder])
    for source, name in ((kernel, "vmlinuz"), (initramfs, "initrd")):
        tools.run(["mcopy", "-i", volume, str(source), f"::{name}"], writable=[folder])
    return disk


def _run(tools: ToolsRoot, folder: Path, timeout_seconds: float) -> float:
    """Run Bochs until the machine has said its last word. Returns the seconds; raises GuestError otherwise."""
    console = folder / "console.txt"
    console.write_bytes(b"")
    started = time.monotonic()
    with (folder / "bochs.out").open("wb") as output:
        argv = tools.argv(["bochs-bin", "-q", "-f", "bochsrc"], writable=[folder], cwd=folder)
        process = start(argv, stdout=output.fileno())
        try:
            while True:
                ended = process.poll() is not None
                seconds = time.monotonic() - started
                text = console.read_text(errors="replace").replace("\r", "")
                if f"{_WORD}end\n" in text:
                    return seconds
                if ended or seconds > timeout_seconds or _FATAL.search(text):
                    raise _silence(text, folder, ended=ended, seconds=seconds)
                reporter.progress("bochs", seconds, None, "s")
                time.sleep(_POLL_SECONDS)
        finally:
            stop(process)


def _silence(text: str, folder: Path, *, ended: bool, seconds: float) -> GuestError:
    fatal = _FATAL.search(text)
    if fatal:
        what = f"stopped: {fatal.group(0).strip()}"
    elif ended:
        what = "ended by itself"
    else:
        what = "was not done"
    lines = [line.rstrip() for line in text.splitlines() if line.strip()][-_TAIL_LINES:]
    if ended or not lines:
        noise = (folder / "bochs.out").read_text(errors="replace").splitlines()
        lines += [line for line in noise if ">>PANIC<<" in line or "error" in line.lower()][-5:]
    said = "\n".join(f"  | {line}" for line in lines) or "  | (nothing on its serial port)"
    return GuestError(
        f"the machine on Bochs {what} after {seconds:.0f} s; its last lines:\n{said}",
        hint=f"the whole console: {folder / 'console.txt'}, Bochs' own log: {folder / 'bochs.log'}",
    )


def answer_for(nonce: str) -> str:
    """What the machine must make of its nonce: FNV-1a, 64 bits, 16 hexadecimal digits."""
    value = 0xCBF29CE484222325
    for byte in nonce.encode():
        value = ((value ^ byte) * 0x100000001B3) % 2**64
    return f"{value:016x}"


def read_console(text: str, nonce: str, *, seconds: float, release: str, path: Path | None = None) -> VmxResult:
    """Judge what the machine said. Pure."""
    lines = tuple(line[len(_WORD) :] for line in text.replace("\r", "").splitlines() if line.startswith(_WORD))
    problems = []
    report: dict[str, Any] = {}
    for line in lines:
        if line.startswith("check "):
            try:
                report = json.loads(line.removeprefix("check "))
            except json.JSONDecodeError:
                problems.append("the report of recvirt-nested-check is not whole")
    if f"kernel {release}" not in lines:
        problems.append(f"the kernel that ran is not {release}")
    if f"nonce {nonce} answer {answer_for(nonce)}" not in lines:
        problems.append("the machine did not answer its nonce")
    problems += [line for line in lines if line.startswith("module ") and " failed: " in line]
    if "status 0" not in lines:
        status = next((line for line in lines if line.startswith("status ")), "no status")
        problems.append(f"recvirt-nested-check: {report.get('text', 'no report')} ({status})")
    problems += report_problems(report)
    return VmxResult(tuple(problems), seconds, release, report, lines, path)


def report_problems(report: Mapping[str, Any]) -> list[str]:
    """What a report lacks: VMX, kvm_intel with nested and EPT, two L2s proved by their answers and KVM's counters."""
    problems = []
    extension = report.get("cpu", {}).get("extension")
    if extension != "vmx":
        problems.append(f"the processor has {extension or 'no virtualization extension'}, not vmx")
    parameters = report.get("modules", {}).get("kvm_intel", {}).get("parameters", {})
    for name in ("nested", "ept"):
        if parameters.get(name) not in ("Y", "1"):
            problems.append(f"kvm_intel.{name} is {parameters.get(name)}, not Y")
    guests = report.get("l2", [])
    if [guest.get("mode") for guest in guests] != ["real", "long"]:
        problems.append("not both L2s were run")
    for guest in guests:
        counted = guest.get("kvm_counted", {}).get("exits") or 0
        if guest.get("state") != "proved":
            problems.append(f"L2 ({guest.get('mode')}): {guest.get('state')}, {guest.get('error')}")
        elif guest["answer"] != guest["expected"] or counted < guest["rounds"]:
            problems.append(f"L2 ({guest['mode']}): its proof does not hold ({counted} exits counted)")
    return problems
