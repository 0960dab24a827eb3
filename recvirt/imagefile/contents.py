"""What an image file holds: read once, from the file alone."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recvirt.disk import gpt, grub
from recvirt.disk.facts import IN_IMAGE
from recvirt.disk.layout import SECTOR, TYPE_BIOS_BOOT, TYPE_ESP, Partition
from recvirt.disk.packages import Package, installed, parse_status
from recvirt.errors import VerificationError
from recvirt.imagefile.container import Container, identify, raw_disk
from recvirt.imagefile.files import Entry, Reader, detect_filesystem, read_from_esp
from recvirt.imagefile.foreign import open_reader
from recvirt.sandbox import ToolsRoot

STATUS = "/var/lib/dpkg/status"
MENU = "/boot/grub/grub.cfg"
LOADER = "/EFI/BOOT/BOOTX64.EFI"
GRUBENV = "/recvirt/grubenv"
PROVENANCE = f"/{IN_IMAGE}"
_OS_RELEASE = "/usr/lib/os-release"
_KERNEL = re.compile(r"^vmlinuz-([A-Za-z0-9.+~_-]+)$")
_MACHINE_X86_64 = 0x8664


@dataclass
class Contents:
    """An opened image. ``tree()`` walks the whole root filesystem and is kept."""

    container: Container
    disk: Path
    table: gpt.Table
    root: Partition
    filesystem: str
    reader: Reader
    scratch: Path
    tools: ToolsRoot
    _tree: dict[str, Entry] | None = None
    _texts: dict[str, str] = field(default_factory=dict)

    def text(self, path: str) -> str:
        """A file of the root filesystem as text; empty when it isn't there."""
        if path not in self._texts:
            data = self.reader.read([path]).get(path, b"")
            self._texts[path] = data.decode("utf-8", "replace")
        return self._texts[path]

    def tree(self) -> dict[str, Entry]:
        """Every path of the root filesystem."""
        if self._tree is None:
            self._tree = self.reader.tree()
        return self._tree

    def packages(self) -> list[Package]:
        """The installed packages. VerificationError when dpkg's database isn't there."""
        status = parse_status(self.text(STATUS))
        if not status:
            raise VerificationError(f"{self.container.path} holds no dpkg database: no Debian system?")
        return installed(status.values())

    def kernels(self) -> list[str]:
        """The kernel releases in /boot, in no particular order."""
        matches = (_KERNEL.match(name) for name in self.reader.listing("/boot"))
        return sorted(match[1] for match in matches if match)

    def kernel_config(self, release: str) -> dict[str, str]:
        """A kernel's configuration: symbol -> value."""
        return parse_config(self.text(f"/boot/config-{release}"))

    def provenance(self) -> dict[str, Any]:
        """What the image says about its own making; empty when it says nothing."""
        try:
            told = json.loads(self.text(PROVENANCE) or "{}")
        except json.JSONDecodeError:
            return {}
        return told if isinstance(told, dict) else {}

    def os_release(self) -> dict[str, str]:
        """The fields of os-release(5)."""
        pairs = (line.split("=", 1) for line in self.text(_OS_RELEASE).splitlines() if "=" in line)
        return {name: value.strip('"') for name, value in pairs}

    def boot_methods(self) -> dict[str, str]:
        """``bios`` and ``uefi``: the empty string when the code is really there, else what is missing."""
        menu = self.text(MENU)
        trouble = menu_problem(menu, self.kernels())
        return {"bios": self._bios_problem() or trouble, "uefi": self._uefi_problem() or trouble}

    def _bios_problem(self) -> str:
        part = next((p for p in self.table.partitions if p.type_uuid == TYPE_BIOS_BOOT), None)
        if part is None:
            return "there is no BIOS boot partition"
        with self.disk.open("rb") as stream:
            sector = stream.read(SECTOR)
            stream.seek(part.offset_bytes)
            return grub.bios_code_problem(sector, part, stream.read(SECTOR))

    def _uefi_problem(self) -> str:
        part = self.esp()
        if part is None:
            return "there is no EFI system partition"
        if detect_filesystem(self.disk, part) != "vfat":
            return "the EFI system partition holds no FAT filesystem"
        files = read_from_esp(self.disk, part, [LOADER], self.tools, self.scratch)
        return loader_problem(files.get(LOADER, b""))

    def esp(self) -> Partition | None:
        """The EFI system partition."""
        return next((p for p in self.table.partitions if p.type_uuid == TYPE_ESP), None)

    def remembered_kernel(self) -> str:
        """The kernel that the boot loader takes by default, from the environment block on the ESP."""
        part = self.esp()
        if part is None:
            return ""
        block = read_from_esp(self.disk, part, [GRUBENV], self.tools, self.scratch).get(GRUBENV, b"")
        match = re.search(rb"^saved_entry=([A-Za-z0-9.+~_-]+)$", block, re.MULTILINE)
        return match[1].decode() if match else ""


def loader_problem(data: bytes) -> str:
    """Why a file is no UEFI program for x86-64; the empty string when it is one (PE/COFF: header's offset at 0x3c)."""
    if not data:
        return f"{LOADER} is missing"
    header = int.from_bytes(data[0x3C:0x40], "little")
    if data[:2] != b"MZ" or data[header : header + 4] != b"PE\0\0":
        return f"{LOADER} is no UEFI program"
    if int.from_bytes(data[header + 4 : header + 6], "little") != _MACHINE_X86_64:
        return f"{LOADER} is for another architecture"
    return ""


def menu_problem(menu: str, kernels: list[str]) -> str:
    """Why the menu can't start anything; the empty string when it names a kernel that is there."""
    if not menu:
        return f"{MENU} is missing"
    named = set(re.findall(r"^\s*linux /boot/vmlinuz-(\S+)", menu, re.MULTILINE))
    if not named & set(kernels):
        return f"{MENU} names no kernel that is there"
    return ""


def parse_config(text: str) -> dict[str, str]:
    """A kernel .config: symbol (without CONFIG_) -> value; ``n`` for those that are not set."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"^CONFIG_(\w+)=(.*)$|^# CONFIG_(\w+) is not set$", line)
        if match:
            found[match[1] or match[3]] = match[2] if match[1] else "n"
    return found


@contextmanager
def open_image(path: Path, tools: ToolsRoot) -> Iterator[Contents]:
    """Open an image file; what is unpacked for it vanishes at the end. VerificationError when it is no image."""
    container = identify(path)
    with tempfile.TemporaryDirectory(prefix="recvirt-") as folder:
        scratch = Path(folder)
        disk = raw_disk(container, scratch, tools)
        with disk.open("rb") as stream:
            table = gpt.read_table(stream)
        root = root_partition(table)
        kind, reader = open_reader(disk, root, tools, scratch)
        yield Contents(container, disk, table, root, kind, reader, scratch, tools)


def root_partition(table: gpt.Table) -> Partition:
    """The partition named ``root``, else the largest one."""
    if not table.partitions:
        raise VerificationError("the partition table is empty")
    named = [part for part in table.partitions if part.name == "root"]
    return named[0] if named else max(table.partitions, key=lambda part: part.size_bytes)


def package_sizes(packages: list[Package], tree: Mapping[str, Entry], lists: Mapping[str, list[str]]) -> dict[str, int]:
    """Bytes that each package's regular files take in the image (what path-excludes left out is not counted).

    ``lists`` maps a package to the paths in dpkg's list. The key ``""`` is for files that no package owns.
    """
    sizes: dict[str, int] = {}
    seen: set[str] = set()
    for package in packages:
        total = 0
        for path in lists.get(package.name, ()):
            real = _merged_usr(path)
            entry = tree.get(real)
            if entry is not None and real not in seen and not entry.is_dir:
                seen.add(real)
                total += entry.size_bytes
        sizes[package.name] = total
    sizes[""] = sum(entry.size_bytes for path, entry in tree.items() if path not in seen and not entry.is_dir)
    return sizes


def _merged_usr(path: str) -> str:
    # Packages may still say /lib/...; the files lie below /usr (Debian's merged /usr).
    top = path.split("/", 2)[1] if path.count("/") > 1 else ""
    return f"/usr{path}" if top in ("bin", "sbin", "lib", "lib32", "lib64", "libx32") else path


def dpkg_lists(contents: Contents) -> dict[str, list[str]]:
    """dpkg's lists of files, package by package."""
    folder = "/var/lib/dpkg/info"
    names = [name for name in contents.reader.listing(folder) if name.endswith(".list")]
    files = contents.reader.read([f"{folder}/{name}" for name in names])
    return {
        path.rpartition("/")[2].removesuffix(".list").split(":")[0]: data.decode("utf-8", "replace").splitlines()
        for path, data in files.items()
    }
