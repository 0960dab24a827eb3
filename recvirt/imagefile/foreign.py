"""Reads xfs and btrfs roots: single files through GRUB's own drivers (grub-fstest(1)), whole trees through each
filesystem's debugger. Does not own: ext4, the common case (:mod:`recvirt.imagefile.files`).
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from recvirt.disk import xfs
from recvirt.disk.layout import Partition
from recvirt.disk.sparse import copy_range
from recvirt.errors import VerificationError
from recvirt.imagefile.files import (
    PLAIN_NAME,
    TIMEOUT_SECONDS,
    Entry,
    Ext4Reader,
    Reader,
    bounded,
    collect,
    detect_filesystem,
)
from recvirt.sandbox import ToolsRoot


@dataclass(frozen=True)
class GrubReader:
    """xfs and btrfs through GRUB's drivers. Slower: a program run a file or folder."""

    disk: Path
    part: Partition
    tools: ToolsRoot
    scratch: Path

    def _run(self, script: str, *words: str) -> str:
        done = self.tools.run(
            bounded(["sh", "-c", script, "grub", str(self.disk), f"(loop0,gpt{self.part.number})", *words]),
            readable=[self.disk], writable=[self.scratch], check=False, timeout_seconds=TIMEOUT_SECONDS,
        )  # fmt: skip
        return done.stdout

    def read(self, paths: Sequence[str]) -> dict[str, bytes]:
        """See :class:`Reader`."""
        wanted = [path for path in paths if PLAIN_NAME.match(path)]
        numbers = {path: number for number, path in enumerate(paths)}
        script = 'disk=$1 part=$2; shift 2; while [ $# -gt 0 ]; do grub-fstest "$disk" cp "$part$1" "$2"; shift 2; done'
        words = [word for path in wanted for word in (path, f"{self.scratch}/file-{numbers[path]}")]
        self._run(script, *words)
        return collect(paths, self.scratch)

    def listing(self, folder: str) -> dict[str, Entry]:
        """See :class:`Reader`."""
        if not PLAIN_NAME.match(folder):
            return {}
        return parse_grub_ls(self._run('grub-fstest "$1" ls -- -l "$2$3"', folder.rstrip("/") + "/"))

    def _tool(self, argv: Sequence[str], commands: str | None = None) -> str:
        return self.tools.run(
            bounded(argv), readable=[self.scratch], input_text=commands, timeout_seconds=TIMEOUT_SECONDS
        ).stdout

    def _partition_file(self) -> Path:
        """The partition as a file of its own: these debuggers know no offset."""
        device = self.scratch / "partition"
        copy_range(self.disk, self.part.offset_bytes, self.part.size_bytes, device)
        return device


def parse_grub_ls(text: str) -> dict[str, Entry]:
    """The output of GRUB's ``ls -l``: size (or ``DIR``), time, name (folders end with a slash)."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"^(DIR|\d+)\s+(?:\d{14}\s+|\?*\s*)(.+)$", line)
        if match is None:
            continue
        name = match[2].rstrip("/")
        if name in (".", "..", ""):
            continue
        is_dir = match[1] == "DIR"
        found[name] = Entry(stat.S_IFDIR if is_dir else stat.S_IFREG, 0 if is_dir else int(match[1]))
    return found


def _entry(mode: int, size: int) -> Entry:
    return Entry(mode, size if stat.S_ISREG(mode) else 0)


@dataclass(frozen=True)
class XfsReader(GrubReader):
    """xfs: xfs_db(8) lists every inode with its path, then tells mode and size of each."""

    def tree(self) -> dict[str, Entry]:
        """See :class:`Reader`."""
        device = self._partition_file()
        paths = xfs.parse_inodes(self._tool(xfs.inodes_argv(device)))
        commands = "".join(f"inode {number}\nprint core.mode core.size\n" for number in paths)
        told = self._tool(["xfs_db", "-r", str(device)], commands)
        device.unlink()
        return dict(parse_xfs_entries(paths, told))


def parse_xfs_entries(paths: dict[int, str], text: str) -> Iterable[tuple[str, Entry]]:
    """Absolute path and entry of each inode in ``paths``, whose modes and sizes ``text`` tells in the same order."""
    modes = [int(word, 8) for word in re.findall(r"core\.mode = (0[0-7]+)", text)]
    sizes = [int(word) for word in re.findall(r"core\.size = (\d+)", text)]
    if not len(modes) == len(sizes) == len(paths):
        raise VerificationError("the xfs filesystem is damaged: not every inode can be read")
    return [
        (f"/{path}", _entry(*facts)) for path, facts in zip(paths.values(), zip(modes, sizes, strict=True), strict=True)
    ]


@dataclass(frozen=True)
class BtrfsReader(GrubReader):
    """btrfs: the filesystem tree as btrfs-inspect-internal(8) dumps it."""

    def tree(self) -> dict[str, Entry]:
        """See :class:`Reader`."""
        device = self._partition_file()
        text = self._tool(["btrfs", "inspect-internal", "dump-tree", "-t", "fs", str(device)])
        device.unlink()
        return parse_btrfs_tree(text)


_BTRFS_TOP = 256
_BTRFS_ITEM = re.compile(r"^\titem \d+ key \((\d+) (\w+) ")
_BTRFS_SIZE = re.compile(r"^\t\tgeneration \d+ transid \d+ size (\d+) ")
_BTRFS_MODE = re.compile(r"^\t\tblock group \d+ mode ([0-7]+) ")
_BTRFS_LOCATION = re.compile(r"^\t\tlocation key \((\d+) INODE_ITEM ")


def _unescape(name: str) -> str:
    """btrfs-inspect-internal writes blanks and backslashes behind a backslash, other odd bytes as octal numbers."""

    def plain(match: re.Match[bytes]) -> bytes:
        if match[1]:
            return bytes([int(match[1], 8) & 0xFF])
        return {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"b": b"\b", b"f": b"\f"}.get(match[2], match[2])

    return re.sub(rb"\\(?:([0-7]{3})|(.))", plain, name.encode()).decode("utf-8", "replace")


def parse_btrfs_tree(text: str) -> dict[str, Entry]:
    """A dumped filesystem tree: absolute path -> entry."""
    sizes: dict[int, int] = {}
    modes: dict[int, int] = {}
    children: dict[int, list[tuple[str, int]]] = {}
    owner, kind, target = 0, "", 0
    for line in text.splitlines():
        if match := _BTRFS_ITEM.match(line):
            owner, kind = int(match[1]), match[2]
        elif kind == "INODE_ITEM" and (match := _BTRFS_SIZE.match(line)):
            sizes[owner] = int(match[1])
        elif kind == "INODE_ITEM" and (match := _BTRFS_MODE.match(line)):
            modes[owner] = int(match[1], 8)
        elif kind == "DIR_INDEX" and (match := _BTRFS_LOCATION.match(line)):
            target = int(match[1])
        elif kind == "DIR_INDEX" and line.startswith("\t\tname: "):
            children.setdefault(owner, []).append((_unescape(line[8:]), target))
    found: dict[str, Entry] = {}
    todo, seen = [("", _BTRFS_TOP)], {_BTRFS_TOP}
    while todo:
        folder, number = todo.pop()
        for name, child in children.get(number, ()):
            found[f"{folder}/{name}"] = entry = _entry(modes.get(child, 0), sizes.get(child, 0))
            if entry.is_dir and child not in seen:
                seen.add(child)
                todo.append((f"{folder}/{name}", child))
    return found


def open_reader(disk: Path, part: Partition, tools: ToolsRoot, scratch: Path) -> tuple[str, Reader]:
    """The filesystem of a partition and its reader. VerificationError when there is none that can be read."""
    kind = detect_filesystem(disk, part)
    if kind == "ext4":
        return kind, Ext4Reader(disk, part, tools, scratch)
    if kind == "xfs":
        return kind, XfsReader(disk, part, tools, scratch)
    if kind == "btrfs":
        return kind, BtrfsReader(disk, part, tools, scratch)
    raise VerificationError(
        f"partition {part.number} ({part.name}) holds no filesystem that recvirt reads", hint="ext4, xfs or btrfs"
    )
