"""The disk inside an image file, read in blocks; holes and blocks of zeros are passed over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from recvirt.disk.sparse import data_ranges
from recvirt.errors import VerificationError
from recvirt.imagefile.container import Container

#: A block is looked through in such pieces: most have something else than zeros in the first.
_LOOK_BYTES = 64 * 1024
#: Formats whose disk can be read as it lies there.
READABLE = ("raw", "vhd", "qcow2")


class DiskReader(Protocol):
    """A disk that several threads may read at once."""

    size: int

    def extents(self) -> Iterator[tuple[int, int]]:
        """The ranges (start, end) that may hold something else than zeros, in order."""

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the disk; its end cuts them short."""

    def close(self) -> None:
        """Let the file go."""


class RawReader:
    """A raw file, or a fixed VHD without its footer."""

    def __init__(self, path: Path, size: int) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._path = path
        self.size = size

    def extents(self) -> Iterator[tuple[int, int]]:
        """What the file system has data for."""
        return data_ranges(self._descriptor, self.size)

    def read(self, offset: int, length: int) -> bytes:
        """Read at a place of its own: no thread moves another's."""
        wanted = min(length, self.size - offset)
        data = os.pread(self._descriptor, wanted, offset)
        if len(data) != wanted:
            raise VerificationError(f"{self._path} became shorter while it was read")
        return data

    def close(self) -> None:
        """Let the file go."""
        os.close(self._descriptor)


def open_disk(container: Container) -> DiskReader:
    """The disk in a file. VerificationError for a format that can't be read in place."""
    if container.format in ("raw", "vhd"):
        return RawReader(container.path, container.virtual_bytes)
    if container.format == "qcow2":
        # Its library is wanted only here.
        from recvirt.publish.qcow2 import Qcow2Reader

        return Qcow2Reader(container.path)
    raise VerificationError(
        f"the disk in {container.path} ({container.format}) can't be read in place",
        hint=f"publish one of {', '.join(READABLE)}: recvirt build --set image.formats+=qcow2",
    )


def is_zero(data: bytes) -> bool:
    """Whether all bytes are zero (one memcmp, which ends at the first other byte)."""
    return data == bytes(len(data))


def candidate_blocks(disk: DiskReader, block_bytes: int) -> Iterator[int]:
    """The numbers of the blocks that holes don't cover, in order."""
    last = -1
    for start, end in disk.extents():
        for number in range(max(start // block_bytes, last + 1), (end - 1) // block_bytes + 1):
            yield number
            last = number


def data_blocks(disk: DiskReader, block_bytes: int) -> list[int]:
    """The numbers of the blocks that hold something else than zeros. Of most no more than the beginning is read."""
    return [number for number in candidate_blocks(disk, block_bytes) if _holds_something(disk, number, block_bytes)]


def _holds_something(disk: DiskReader, number: int, block_bytes: int) -> bool:
    start, end = number * block_bytes, min((number + 1) * block_bytes, disk.size)
    return any(
        not is_zero(disk.read(place, min(_LOOK_BYTES, end - place))) for place in range(start, end, _LOOK_BYTES)
    )
