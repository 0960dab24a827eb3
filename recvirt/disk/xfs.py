"""What mkfs.xfs needs to fill a filesystem, and what must be set right afterwards. Pure functions.

mkfs.xfs (6.13) copies files named in a list ("protofile"), with owners and extended attributes. It knows neither times
nor the sticky bit, and the list that xfs_protofile(8) writes loses the set-user-ID bits; so the list is written here,
and xfs_db(8) sets modes and times in the finished filesystem.
"""

from __future__ import annotations

import stat
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from recvirt.errors import StageError

_TYPES = {
    tarfile.DIRTYPE: "d", tarfile.SYMTYPE: "l", tarfile.CHRTYPE: "c", tarfile.BLKTYPE: "b", tarfile.FIFOTYPE: "p",
}  # fmt: skip
_KINDS = {
    "d": stat.S_IFDIR,
    "l": stat.S_IFLNK,
    "c": stat.S_IFCHR,
    "b": stat.S_IFBLK,
    "p": stat.S_IFIFO,
    "-": stat.S_IFREG,
}
#: The modes that a list can't say.
_SPECIAL = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX


def _kind(info: tarfile.TarInfo) -> str:
    # A second name of a file becomes a file of its own: a list has no hard links.
    return _TYPES.get(info.type, "-")


def protofile(infos: Mapping[str, tarfile.TarInfo], tree: str) -> str:
    """The list for ``mkfs.xfs -p slashes_are_spaces=1``: ``infos`` by clean name, their contents below ``tree``.

    StageError for names that a list can't hold (blanks, in the paths of regular files and in the targets of links).
    """
    bad = [
        name for name, info in infos.items()
        if any(c.isspace() for c in (info.linkname if info.issym() else name)) and not info.isdir()
    ]  # fmt: skip
    if bad:
        raise StageError(
            f"mkfs.xfs can't take names with blanks: {', '.join(bad[:5])}", hint="image.filesystem: ext4 or btrfs can"
        )
    below: dict[str, list[str]] = {}
    for name in infos:
        if name:
            below.setdefault(name.rpartition("/")[0], []).append(name)
    root = infos.get("")
    owner = f"{root.uid} {root.gid}" if root else "0 0"
    lines = [
        "/",
        "0 0",
        f"d--{(root.mode if root else 0o755) & 0o777:03o} {owner}",
        *_entries("", infos, below, tree),
        "$",
        "",
    ]
    return "\n".join(lines)


def _entries(
    folder: str, infos: Mapping[str, tarfile.TarInfo], below: Mapping[str, list[str]], tree: str
) -> Iterator[str]:
    for name in sorted(below.get(folder, ())):
        info = infos[name]
        kind = _kind(info)
        extra = {"l": f" {info.linkname}", "-": f" {tree}/{name}"}.get(kind, "")
        if kind in "cb":
            extra = f" {info.devmajor} {info.devminor}"
        shown = name.rpartition("/")[2].replace(" ", "/")
        yield f"{shown} {kind}--{info.mode & 0o777:03o} {info.uid} {info.gid}{extra}"
        if kind == "d":
            yield from _entries(name, infos, below, tree)
            yield "$"


def inodes_argv(device: Path) -> list[str]:
    """xfs_db(8): every inode with its path, a line each."""
    return ["xfs_db", "-r", "-c", "blockget -n", "-c", "ncheck", str(device)]


def parse_inodes(text: str) -> dict[int, str]:
    """The listing of :func:`inodes_argv`: inode -> clean name (of several, one). Folders are shown as ``path/.``."""
    found = {}
    for line in text.splitlines():
        number, _, path = line.strip().partition(" ")
        if number.isdigit() and path.strip():
            found[int(number)] = path.strip().removesuffix("/.").strip("/")
    return found


def repair_commands(inodes: Mapping[int, str], infos: Mapping[str, tarfile.TarInfo], epoch: int) -> str:
    """Commands for ``xfs_db -x`` that set the modes that a list can't say, and all times (``epoch`` for unknown names).

    Compiled Python modules, for one, are valid only while their source's time is what it was. With the feature bigtime
    a time is stored as nanoseconds since December 1901 (fs/xfs/libxfs/xfs_format.h, XFS_BIGTIME_EPOCH_OFFSET), and
    xfs_db writes that number as it is.
    """
    lines = []
    for number, name in inodes.items():
        info = infos.get(name)
        seconds = int(info.mtime) if info is not None else epoch
        lines += [f"inode {number}", f"write core.mtime.sec {(seconds + 2**31) * 1_000_000_000}"]
        if info is not None and info.mode & _SPECIAL:
            lines.append(f"write core.mode 0{_KINDS[_kind(info)] | info.mode & 0o7777:o}")
    return "\n".join([*lines, "quit", ""])
