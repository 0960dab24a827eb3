"""The boot loader for real, under QEMU: both firmwares start the image, and a kernel that fails is tried only once."""

from __future__ import annotations

import stat
import tarfile
from pathlib import Path

import pytest

from recvirt.archive import Archive
from recvirt.cpio import Entry, newc
from recvirt.imagefile.contents import GRUBENV, open_image
from recvirt.imagefile.files import read_from_esp
from recvirt.model import Image, Profile
from recvirt.qemu import Disk, MachineSpec, running
from recvirt.sandbox import ToolsRoot
from recvirt.stages.base import Context, Work
from recvirt.stages.image import ImageStage
from tests.support.images import RootArchive, make_kernel, make_root

pytestmark = pytest.mark.slow

GOOD, BAD, JUNK = "6.12.1-good", "6.12.2-bad", "6.12.3-junk"
#: Enough for a machine that does other things too.
SECONDS = 900
INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
echo "UP {name} $(/bin/busybox cat /proc/cmdline)" >/dev/console
{act}
"""


@pytest.fixture(scope="module")
def vmlinuz(tools: ToolsRoot, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Debian's cloud kernel."""
    archive = Archive(tools, shared_cache, suite="trixie")
    wanted = [p for p in archive.resolve(["linux-image-cloud-amd64"]) if p.name.startswith("linux-image-6")]
    package = archive.download(wanted[0])
    folder = tmp_path_factory.mktemp("kernel")
    tools.run(["dpkg-deb", "-x", str(package), str(folder)], readable=[package], writable=[folder])
    return next(folder.glob("boot/vmlinuz-*")).read_bytes()


def make_initrd(tools: ToolsRoot, name: str, act: str) -> bytes:
    """An initrd whose init says its name and the command line, then does ``act``."""
    busybox = (tools.rootfs / "usr/bin/busybox").read_bytes()
    folders = [Entry(folder, stat.S_IFDIR | 0o755) for folder in ("bin", "dev", "proc")]
    return newc(
        [
            *folders,
            Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
            Entry("bin/busybox", stat.S_IFREG | 0o755, busybox),
            Entry("init", stat.S_IFREG | 0o755, INIT.format(name=name, act=act).encode()),
        ]
    )


@pytest.fixture(scope="module")
def image(tools: ToolsRoot, vmlinuz: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with a good kernel, one whose init dies, and a file that is no kernel."""
    base = tmp_path_factory.mktemp("image")
    make_root(base / "root")
    with_kernels(base / "root/root.tar", vmlinuz, make_initrd(tools, BAD, "exit 1"))
    (base / "kernel").mkdir()
    initrd = make_initrd(tools, GOOD, "/bin/busybox poweroff -f")
    make_kernel(base / "kernel", tools, GOOD, vmlinuz=vmlinuz, initrd=initrd)
    for name in ("out", "scratch"):
        (base / name).mkdir()
    dirs = {"root": base / "root", "kernel_build": base / "kernel"}
    context = Context(tools, base / "cache", 2)
    work = Work(base / "out", base / "scratch", base / "log", context, dirs)
    profile = Profile(name="test", image=Image(size="512M", esp_size="34M", formats=("raw",)))
    stage = ImageStage()
    stage.build(stage.inputs(profile, {"root": "r", "kernel_build": "k"}, context), work)
    return work.out / "disk.raw"


def with_kernels(root_tar: Path, vmlinuz: bytes, bad_initrd: bytes) -> None:
    """Write the archive again, with two more kernels in /boot."""
    members: list[tuple[tarfile.TarInfo, bytes]] = []
    with tarfile.open(root_tar) as old:
        for info in old.getmembers():
            stream = old.extractfile(info) if info.isreg() else None
            members.append((info, stream.read() if stream else b""))
    archive = RootArchive(root_tar)
    for info, data in members:
        fields = {"type": info.type, "linkname": info.linkname, "pax_headers": info.pax_headers}
        archive.add(info.name.removeprefix("./"), data, mode=info.mode, owner=info.uid, **fields)
    archive.add(f"boot/vmlinuz-{BAD}", vmlinuz)
    archive.add(f"boot/initrd.img-{BAD}", bad_initrd)
    archive.add(f"boot/vmlinuz-{JUNK}", b"this is no kernel" * 100)
    archive.finish()


def remember(image: Path, tools: ToolsRoot, folder: Path, **words: str) -> Path:
    """A copy of the image whose environment block holds ``words``."""
    folder.mkdir(parents=True, exist_ok=True)
    copy, block = folder / "disk.raw", folder / "grubenv"
    tools.run(["cp", "--sparse=always", str(image), str(copy)], readable=[image], writable=[folder])
    text = "# GRUB Environment Block\n" + "".join(f"{name}={value}\n" for name, value in words.items())
    block.write_text(text.ljust(1024, "#"))
    tools.run(["mcopy", "-o", "-i", f"{copy}@@2M", str(block), f"::{GRUBENV}"], writable=[folder])
    return copy


def remembered(image: Path, tools: ToolsRoot, folder: Path) -> set[str]:
    """The words in an image's environment block."""
    with open_image(image, tools) as contents:
        esp = contents.esp()
        assert esp is not None
        block = read_from_esp(image, esp, [GRUBENV], tools, folder)[GRUBENV]
    # GRUB keeps a name whose value it has cleared.
    return {line for line in block.decode().splitlines() if "=" in line and not line.endswith("=")}


def boot(tools: ToolsRoot, disk: Path, firmware: str, folder: Path) -> str:
    """Boot until the machine turns itself off; what the console has shown."""
    spec = MachineSpec(
        firmware="uefi" if firmware == "uefi" else "bios", memory_bytes=512 * 1024**2, nics=(),
        disks=(Disk(disk, "raw", bootable=True),),
    )  # fmt: skip
    with running(tools, spec, folder / firmware) as machine:
        machine.wait_end(SECONDS)
        return machine.console_text()


@pytest.mark.parametrize("firmware", ["bios", "uefi"])
def test_a_kernel_that_dies_is_tried_once_and_the_good_one_comes_back(
    firmware: str, image: Path, tools: ToolsRoot, tmp_path: Path
) -> None:
    disk = remember(image, tools, tmp_path, saved_entry=GOOD, next_entry=BAD)
    console = boot(tools, disk, firmware, tmp_path)
    first, _, rest = console.partition(f"UP {GOOD}")
    assert f"UP {BAD} BOOT_IMAGE=/boot/vmlinuz-{BAD} " in first
    assert f"recvirt.trial={BAD}" in first.split(f"UP {BAD}")[1]
    assert "Kernel panic" in first
    assert first.count(f"UP {BAD}") == 1
    assert "recvirt.trial" not in rest
    assert remembered(disk, tools, tmp_path) == {f"saved_entry={GOOD}", f"tried_entry={BAD}"}


@pytest.mark.parametrize("firmware", ["bios", "uefi"])
def test_a_file_that_is_no_kernel_falls_back_at_once(
    firmware: str, image: Path, tools: ToolsRoot, tmp_path: Path
) -> None:
    disk = remember(image, tools, tmp_path, saved_entry=GOOD, next_entry=JUNK)
    console = boot(tools, disk, firmware, tmp_path)
    assert f"UP {GOOD}" in console
    assert remembered(disk, tools, tmp_path) == {f"saved_entry={GOOD}", f"tried_entry={JUNK}"}


def test_without_a_trial_the_good_kernel_starts_though_newer_ones_are_there(
    image: Path, tools: ToolsRoot, tmp_path: Path
) -> None:
    disk = remember(image, tools, tmp_path, saved_entry=GOOD)
    console = boot(tools, disk, "bios", tmp_path)
    assert f"UP {GOOD}" in console
    assert f"UP {BAD}" not in console


def test_both_consoles_and_the_root_are_on_the_command_line(image: Path, tools: ToolsRoot, tmp_path: Path) -> None:
    disk = remember(image, tools, tmp_path, saved_entry=GOOD)
    with open_image(disk, tools) as contents:
        part_uuid = contents.root.part_uuid
    line = boot(tools, disk, "uefi", tmp_path).split(f"UP {GOOD} ")[1].splitlines()[0]
    assert f"root=PARTUUID={part_uuid}" in line
    assert "console=tty0 console=ttyS0,115200" in line
