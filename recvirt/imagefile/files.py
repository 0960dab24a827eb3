"""Reads files out of a filesystem inside a raw disk, without mounting it.

ext4 is read by debugfs(8), the ESP by mtools(1), others in :mod:`recvirt.imagefile.foreign`, each in the sandbox and
with a bound on what a single file may bring. Names are data: those that no command can hold are passed over.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from recvirt.disk.layout import Partition
from recvirt.errors import VerificationError
from recvirt.sandbox import ToolsRoot

#: No file that is read here is larger in an honest image (dpkg's status: a few MB).
_LARGEST_FILE = 64 * 1024**2
_LIMIT_BLOCKS = _LARGEST_FILE // 512
TIMEOUT_SECONDS = 300
PLAIN_NAME = re.compile(r'^[^\x00-\x1f\x7f"]+$')
_DEEPEST = 64


@dataclass(frozen=True)
class Entry:
    """One name in a folder. ``mode`` holds the type too (inode(7)); ``size_bytes`` is 0 for all but regular files."""

    mode: int
    size_bytes: int

    @property
    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return stat.S_ISDIR(self.mode)


def detect_filesystem(disk: Path, part: Partition) -> str:
    """``ext4``, ``xfs``, ``btrfs``, ``vfat`` or the empty string, from the superblock's magic number."""
    with disk.open("rb") as stream:
        stream.seek(part.offset_bytes)
        head = stream.read(0x11000)
    if head[1080:1082] == b"\x53\xef":
        return "ext4"
    if head[:4] == b"XFSB":
        return "xfs"
    if head[0x10040:0x10048] == b"_BHRfS_M":
        return "btrfs"
    if head[510:512] == b"\x55\xaa" and (head[82:87] == b"FAT32" or head[54:58] in (b"FAT1", b"FAT ")):
        return "vfat"
    return ""


class Reader(Protocol):
    """Reads one filesystem."""

    def read(self, paths: Sequence[str]) -> dict[str, bytes]:
        """The contents of those absolute paths that are there."""
        ...

    def listing(self, folder: str) -> dict[str, Entry]:
        """The names in one folder; empty when it isn't there."""
        ...

    def tree(self) -> dict[str, Entry]:
        """Every absolute path."""
        ...


def printable(text: str) -> str:
    """``text`` without what a terminal would act on: an image's names and versions are chosen by whoever made it."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def bounded(argv: Sequence[str]) -> list[str]:
    """``argv`` with a bound on the size of any file that it writes (setrlimit(2), RLIMIT_FSIZE)."""
    return ["sh", "-c", f'ulimit -f {_LIMIT_BLOCKS}; exec "$@"', "bounded", *argv]


def collect(paths: Sequence[str], scratch: Path) -> dict[str, bytes]:
    """What a tool wrote into ``scratch/file-NUMBER`` for each of ``paths``; the files are removed."""
    found = {}
    for number, path in enumerate(paths):
        output = scratch / f"file-{number}"
        if output.is_file() and not output.is_symlink():
            found[path] = output.read_bytes()
            output.unlink()
    return found


@dataclass(frozen=True)
class Ext4Reader:
    """ext2, ext3 and ext4 through debugfs, which only reads (no ``-w``)."""

    disk: Path
    part: Partition
    tools: ToolsRoot
    scratch: Path

    def _run(self, commands: Iterable[str]) -> str:
        script = self.scratch / "commands"
        script.write_text("".join(f"{line}\n" for line in commands))
        argv = ["debugfs", "-f", str(script), f"{self.disk}?offset={self.part.offset_bytes}"]
        done = self.tools.run(
            bounded(argv), readable=[self.disk], writable=[self.scratch], timeout_seconds=TIMEOUT_SECONDS
        )
        return done.stdout

    def read(self, paths: Sequence[str]) -> dict[str, bytes]:
        """See :class:`Reader`. Symbolic links are followed by debugfs within the filesystem."""
        self._run(f'dump "{path}" {self.scratch}/file-{i}' for i, path in enumerate(paths) if PLAIN_NAME.match(path))
        return collect(paths, self.scratch)

    def listing(self, folder: str) -> dict[str, Entry]:
        """See :class:`Reader`."""
        return self._listings([folder]).get(folder, {})

    def tree(self) -> dict[str, Entry]:
        """See :class:`Reader`: one run of debugfs a level."""
        found: dict[str, Entry] = {}
        level = ["/"]
        for _ in range(_DEEPEST):
            below = []
            for parent, entries in self._listings(level).items():
                for name, entry in entries.items():
                    path = f"{parent.rstrip('/')}/{name}"
                    found[path] = entry
                    if entry.is_dir:
                        below.append(path)
            if not below:
                return found
            level = below
        raise VerificationError("the filesystem's folders are nested without end")

    def _listings(self, folders: Sequence[str]) -> dict[str, dict[str, Entry]]:
        return parse_debugfs_ls(self._run(f'ls -p "{folder}"' for folder in folders if PLAIN_NAME.match(folder)))


def parse_debugfs_ls(text: str) -> dict[str, dict[str, Entry]]:
    """The output of ``ls -p`` commands: folder -> name -> entry. A line is ``/inode/mode/uid/gid/name/size/``."""
    found: dict[str, dict[str, Entry]] = {}
    current: dict[str, Entry] = {}
    for line in text.splitlines():
        if line.startswith('debugfs: ls -p "'):
            current = found.setdefault(line[16:-1], {})
            continue
        fields = line.split("/")
        if len(fields) != 8 or not fields[1].isdigit() or fields[5] in (".", "..", ""):
            continue
        mode = int(fields[2], 8)
        regular = stat.S_ISREG(mode) and fields[6].isdigit()
        current[fields[5]] = Entry(mode, int(fields[6]) if regular else 0)
    return found


def read_from_esp(
    disk: Path, part: Partition, paths: Sequence[str], tools: ToolsRoot, scratch: Path
) -> dict[str, bytes]:
    """The contents of those absolute paths on the ESP that are there."""
    for number, path in enumerate(paths):
        argv = ["mcopy", "-n", "-i", f"{disk}@@{part.offset_bytes}", f"::{path}", f"{scratch}/file-{number}"]
        tools.run(
            bounded(argv), readable=[disk], writable=[scratch], check=False, env={"MTOOLS_SKIP_CHECK": "1"},
            timeout_seconds=60,
        )  # fmt: skip
    return collect(paths, scratch)
