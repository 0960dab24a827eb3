"""Writes cpio archives in the ``newc`` format, which the kernel unpacks as its initramfs.

Pure: no file system is needed, so a device node can be written without being root.
Format: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass

_TRAILER = "TRAILER!!!"


@dataclass(frozen=True)
class Entry:
    """One member. ``mode`` holds type and permissions as in stat(2); a symbolic link's ``data`` is its target."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def _member(entry: Entry, inode: int) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    numbers = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    return _padded(b"070701" + b"".join(b"%08x" % n for n in numbers) + name) + _padded(entry.data)


def newc(entries: Iterable[Entry]) -> bytes:
    """A whole archive: owners are root, times zero, so the same entries give the same bytes. Several may be joined."""
    body = b"".join(_member(entry, number) for number, entry in enumerate(entries, 1))
    body += _member(Entry(_TRAILER, 0), 0)
    return body + b"\0" * (-len(body) % 512)
