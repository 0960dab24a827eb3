"""GRUB without ``grub-install``: core images for BIOS and UEFI, and where their sectors go.

The images know the disk that they were started from and nothing else, so one pair serves every image.
Does not own: the menu (the package ``recvirt-boot`` writes it).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from recvirt.disk.layout import SECTOR, Layout, Partition
from recvirt.errors import StageError

#: Where GRUB looks for grub.cfg: the third partition of the disk that it was started from.
PREFIX = "(,gpt3)/boot/grub"
#: No module can be loaded later (none is installed), so all that a menu or a person at its prompt needs is built in.
_COMMON = (
    "part_gpt", "part_msdos", "fat", "ext2", "xfs", "btrfs", "zstd", "gzio",
    "normal", "configfile", "linux", "boot", "test", "true", "regexp", "loadenv", "search", "search_fs_uuid",
    "search_label", "search_fs_file", "echo", "sleep", "ls", "cat", "help", "minicmd", "halt", "reboot",
    "serial", "terminal", "terminfo", "probe",
)  # fmt: skip
MODULES = {
    "i386-pc": ("biosdisk", *_COMMON),
    "x86_64-efi": (*_COMMON, "efi_gop", "efi_uga", "all_video", "efifwsetup", "chain"),
}

#: Offsets in boot.img (grub-core/boot/i386/pc/boot.S, include/grub/i386/pc/boot.h).
_BOOT_CODE_BYTES = 440
_KERNEL_SECTOR = 0x5C
_DRIVE_CHECK = 0x66
#: Offset of the last blocklist entry in diskboot.img, the core image's first sector: start, length, segment.
_BLOCKLIST = 0x1F4
_BLOCKLIST_ENTRY = struct.Struct("<QHH")
_SEGMENT = 0x820


def mkimage_argv(target: str, output: Path) -> list[str]:
    """grub-mkimage(1)'s command line for ``i386-pc`` or ``x86_64-efi``."""
    return ["grub-mkimage", "-O", target, "-o", str(output), "-p", PREFIX, *MODULES[target]]


def boot_code(boot_image: bytes, core_lba: int) -> bytes:
    """The first 440 bytes of sector 0: boot.img, told where the core image begins."""
    code = bytearray(boot_image[:_BOOT_CODE_BYTES])
    struct.pack_into("<Q", code, _KERNEL_SECTOR, core_lba)
    # On a hard disk the jump over the drive check becomes two NOPs, as grub-bios-setup does: some BIOSes pass a
    # wrong drive number.
    code[_DRIVE_CHECK : _DRIVE_CHECK + 2] = b"\x90\x90"
    return bytes(code)


def embedded_core(core_image: bytes, core_lba: int) -> bytes:
    """The core image, whole sectors, its blocklist telling where the rest of it lies."""
    sectors = -(-len(core_image) // SECTOR)
    core = bytearray(core_image.ljust(sectors * SECTOR, b"\0"))
    _BLOCKLIST_ENTRY.pack_into(core, _BLOCKLIST, core_lba + 1, sectors - 1, _SEGMENT)
    return bytes(core)


def write_core(disk: BinaryIO, layout: Layout, core_image: bytes) -> None:
    """Put the core image into the BIOS boot partition. StageError when it is too large."""
    core = embedded_core(core_image, layout.bios.first_lba)
    if len(core) > layout.bios.size_bytes:
        raise StageError(f"GRUB's core image has {len(core)} bytes, its partition {layout.bios.size_bytes}")
    disk.seek(layout.bios.offset_bytes)
    disk.write(core)


def bios_code_problem(sector: bytes, bios: Partition, first_core_sector: bytes) -> str:
    """Why a disk would not boot by BIOS: the empty string when boot code and core image point at each other."""
    if sector[510:512] != b"\x55\xaa":
        return "sector 0 has no boot signature"
    if not any(sector[:_BOOT_CODE_BYTES]):
        return "sector 0 holds no boot code"
    (core_lba,) = struct.unpack_from("<Q", sector, _KERNEL_SECTOR)
    if core_lba != bios.first_lba:
        return f"the boot code starts sector {core_lba}, not the BIOS boot partition ({bios.first_lba})"
    start, count, segment = _BLOCKLIST_ENTRY.unpack_from(first_core_sector, _BLOCKLIST)
    if start != core_lba + 1 or segment != _SEGMENT or not 0 < count < bios.size_bytes // SECTOR:
        return "the BIOS boot partition holds no GRUB core image"
    return ""
