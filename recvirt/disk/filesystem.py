"""Command lines that make the ESP and the root filesystem, without root and without mounting anything.

All of them give the same bytes for the same input where the tool can (see docs/image.md for those that can't).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


#: Unpacks the archive on standard input into memory that vanishes with the sandbox.
_UNPACK = """set -eu
mkdir /tmp/tree
tar --extract --file=- --directory=/tmp/tree --numeric-owner --same-permissions --xattrs --xattrs-include='*'
truncate --size="$2" "$1"
"""
#: mkfs.xfs takes a list of what to create; it keeps owners, modes and extended attributes, not times (set later).
_XFS = (
    _UNPACK
    + """xfs_protofile /tmp/tree >/tmp/proto
mkfs.xfs -q -f -K -L "$3" -m uuid="$4" -p /tmp/proto "$1"
"""
)
_BTRFS = (
    _UNPACK
    + """mkfs.btrfs -q -f -K -L "$3" -U "$4" --device-uuid "$5" --rootdir /tmp/tree "$1"
"""
)


def mkfs_tree_argv(kind: str, output: Path, layout: Layout) -> list[str]:
    """The script that makes an xfs or btrfs filesystem in a file of its own from an archive on standard input."""
    script = {"xfs": _XFS, "btrfs": _BTRFS}[kind]
    return [
        "sh", "-c", script, "mkfs", str(output), str(layout.root.size_bytes), ROOT_LABEL, str(layout.root_fs_uuid),
        str(layout.hash_seed),
    ]  # fmt: skip


def xfs_inodes_argv(device: Path) -> list[str]:
    """xfs_db(8): every inode with its path, a line each."""
    return ["xfs_db", "-r", "-c", "blockget -n", "-c", "ncheck", str(device)]


def xfs_time_commands(ncheck: str, times: Mapping[str, int], epoch: int) -> str:
    """Commands for ``xfs_db -x`` that give every inode the time it has in the archive (``epoch`` where it has none).

    Compiled Python modules, for one, are valid only while their source's time is what it was.

    ``ncheck`` is the listing of :func:`xfs_inodes_argv`. With the feature bigtime a time is stored as nanoseconds since
    December 1901 (fs/xfs/libxfs/xfs_format.h, XFS_BIGTIME_EPOCH_OFFSET), and xfs_db writes that number as it is.
    """

    def stored(seconds: int) -> int:
        return (seconds + 2**31) * 1_000_000_000

    lines = []
    for line in ncheck.splitlines():
        number, _, path = line.strip().partition(" ")
        if not number.isdigit():
            continue
        # ncheck shows a folder as "path/."
        name = path.strip().removesuffix("/.").strip("/")
        lines += [f"inode {number}", f"write core.mtime.sec {stored(times.get(name, epoch))}"]
    return "\n".join([*lines, "quit", ""])


def least_root_bytes(data_bytes: int, members: int, kind: str) -> int:
    """About how large a root partition must be for a tree: data in whole blocks, inodes, journal and some air."""
    journal = {"ext4": 64 * MIB, "xfs": 64 * MIB, "btrfs": 256 * MIB}[kind]
    return int((data_bytes + members * (4096 + 512)) * 1.05) + journal
