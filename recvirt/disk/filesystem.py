"""Command lines that make the ESP and the root filesystem, without root and without mounting anything.

All of them give the same bytes for the same input where the tool can (see docs/image.md for those that can't).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recvirt.disk.layout import ESP_LABEL, FAT32_FROM_BYTES, MIB, ROOT_LABEL, Layout


def mkfs_esp_argv(disk: Path, layout: Layout) -> list[str]:
    """mkfs.fat(8) into the ESP's place on the disk. ``--invariant`` leaves the clock out."""
    bits, cluster = ("32", "1") if layout.esp.size_bytes >= FAT32_FROM_BYTES else ("16", "4")
    return [
        "mkfs.fat", "-F", bits, "-s", cluster, "-n", ESP_LABEL, "--invariant", "-i", layout.esp_serial,
        "--mbr=n", "--offset", str(layout.esp.first_lba), str(disk), str(layout.esp.size_bytes // 1024),
    ]  # fmt: skip


def copy_to_esp_argv(disk: Path, layout: Layout, sources: Sequence[Path]) -> list[str]:
    """mcopy(1) of files and folders into the ESP's root; ``-m`` keeps their times."""
    return [
        "mcopy", "-s", "-m", "-Q", "-i", f"{disk}@@{layout.esp.offset_bytes}", *map(str, sources), "::/",
    ]  # fmt: skip


def mkfs_ext4_argv(disk: Path, layout: Layout, source: str) -> list[str]:
    """mke2fs(8) at the root's place on the disk, filled from ``source`` (a tar archive, ``-`` for standard input).

    One percent for root instead of five: the filesystem grows to whatever disk it meets. A fresh disk is all zeros,
    so nothing needs to be zeroed now or by the kernel later.
    """
    extended = (
        f"offset={layout.root.offset_bytes}", f"hash_seed={layout.hash_seed}", "assume_storage_prezeroed=1",
        "nodiscard", "root_owner=0:0",
    )  # fmt: skip
    return [
        "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "1", "-L", ROOT_LABEL, "-U", str(layout.root_fs_uuid),
        "-E", ",".join(extended), "-d", source, str(disk), f"{layout.root.size_bytes // 1024}k",
    ]  # fmt: skip


#: Where an archive is unpacked: memory that vanishes with the sandbox.
TREE = "/tmp/tree"
_UNPACK = f"""set -eu
mkdir {TREE}
tar --extract --file=- --directory={TREE} --numeric-owner --same-permissions --xattrs --xattrs-include='*'
truncate --size="$2" "$1"
"""
#: mkfs.xfs takes a list of what to create (:mod:`recvirt.disk.xfs`).
_XFS = (
    _UNPACK
    + """mkfs.xfs -q -f -K -L "$3" -m uuid="$4" -p slashes_are_spaces=1,file="$1.proto" "$1"
"""
)
_BTRFS = (
    _UNPACK
    + f"""mkfs.btrfs -q -f -K -L "$3" -U "$4" --device-uuid "$5" --rootdir {TREE} "$1"
"""
)


def mkfs_tree_argv(kind: str, output: Path, layout: Layout) -> list[str]:
    """The script that makes an xfs or btrfs filesystem in a file of its own from an archive on standard input."""
    script = {"xfs": _XFS, "btrfs": _BTRFS}[kind]
    return [
        "sh", "-c", script, "mkfs", str(output), str(layout.root.size_bytes), ROOT_LABEL, str(layout.root_fs_uuid),
        str(layout.hash_seed),
    ]  # fmt: skip


def least_root_bytes(data_bytes: int, members: int, kind: str) -> int:
    """About how large a root partition must be for a tree: data in whole blocks, inodes, journal and some air."""
    journal = {"ext4": 64 * MIB, "xfs": 64 * MIB, "btrfs": 256 * MIB}[kind]
    return int((data_bytes + members * (4096 + 512)) * 1.05) + journal
