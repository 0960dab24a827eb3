"""``disk.raw`` in a gzipped tar as Google wants it, made on the way: GNU's old sparse format, holes as holes.

The bytes repeat for the same image, so an upload that was cut goes on at any byte: the stream is made again and what
was sent is passed over. Format: GNU tar's manual, "Storing Sparse Files", old GNU format.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator, Sequence

from recvirt.publish.reader import DiskReader
from recvirt.publish.source import Source

_BLOCK = 512
_GIB = 1 << 30
#: Zeros are looked for in pieces of this size.
GRAIN = 64 * 1024
_READ = 1 << 20
_IN_HEADER, _IN_EXTENSION = 4, 21
#: Quick: what is left of a system image is mostly code, and the line is rarely faster than this.
_LEVEL = 6
_GZIP = 31


def number(value: int, width: int) -> bytes:
    """A number field of a tar header: octal with a NUL; too large ones in base 256 (GNU)."""
    if value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return b"\x80" + value.to_bytes(width - 1, "big")


def headers(name: bytes, extents: Sequence[tuple[int, int]], real_size: int, when: int) -> bytes:
    """The header of a sparse member and its extensions. ``extents`` are (offset, length)."""
    entries = [*extents]
    if not entries or sum(entries[-1]) != real_size:
        entries.append((real_size, 0))  # the file ends in a hole
    stored = sum(length for _, length in entries)
    packed = [number(offset, 12) + number(length, 12) for offset, length in entries]
    first, rest = packed[:_IN_HEADER], packed[_IN_HEADER:]
    header = bytearray(_BLOCK)
    struct.pack_into(
        "100s8s8s8s12s12s8sc100s8s32s32s", header, 0, name, number(0o644, 8), number(0, 8), number(0, 8),
        number(stored, 12), number(when, 12), b" " * 8, b"S", b"", b"ustar  \0", b"root", b"root",
    )  # fmt: skip
    header[386 : 386 + 24 * len(first)] = b"".join(first)
    header[482] = bool(rest)
    header[483:495] = number(real_size, 12)
    header[148:156] = b"%06o\0 " % sum(header)
    blocks = [bytes(header)]
    while rest:
        part, rest = rest[:_IN_EXTENSION], rest[_IN_EXTENSION:]
        block = b"".join(part).ljust(24 * _IN_EXTENSION, b"\0") + bytes([bool(rest)])
        blocks.append(block.ljust(_BLOCK, b"\0"))
    return b"".join(blocks)


class SparseTar:
    """The stream for one image."""

    def __init__(self, image: Source, when: int) -> None:
        self._image = image
        self._when = when
        self.real_size = -(-image.virtual_bytes // _GIB) * _GIB
        self.extents: list[tuple[int, int]] = []
        for block in image.blocks(GRAIN):
            offset = block * GRAIN
            if self.extents and sum(self.extents[-1]) == offset:
                self.extents[-1] = (self.extents[-1][0], self.extents[-1][1] + GRAIN)
            else:
                self.extents.append((offset, GRAIN))
        self.data_bytes = sum(length for _, length in self.extents)

    def plain(self, disk: DiskReader) -> Iterator[bytes]:
        """The tar, uncompressed."""
        head = headers(b"disk.raw", self.extents, self.real_size, self._when)
        yield head
        for start, length in self.extents:
            for offset in range(start, start + length, _READ):
                count = min(_READ, start + length - offset)
                yield disk.read(offset, count).ljust(count, b"\0")
        # Two blocks of zeros, and whole records of twenty blocks, as tar writes them.
        written = len(head) + self.data_bytes
        end = -(-(written + 2 * _BLOCK) // (20 * _BLOCK)) * (20 * _BLOCK)
        yield bytes(end - written)

    def compressed(self) -> Iterator[bytes]:
        """The tar, gzipped, without a time in its header."""
        packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)
        with self._image.disk() as disk:
            for data in self.plain(disk):
                yield packer.compress(data)
        yield packer.flush()


class Stream:
    """The compressed bytes in chunks of one size, from any chunk on, with the digest of all of them."""

    def __init__(self, tar: SparseTar, chunk: int) -> None:
        self._chunk = chunk
        self._source = tar.compressed()
        self._buffer = bytearray()
        self._md5 = hashlib.md5(usedforsecurity=False)
        self.offset = 0
        self.data = b""
        self.is_last = False
        self.step()

    def step(self) -> None:
        """The next chunk into :attr:`data`; the last one may be short."""
        self.offset += len(self.data)
        while len(self._buffer) <= self._chunk:
            part = next(self._source, None)
            if part is None:
                self.is_last = True
                break
            self._buffer += part
        count = len(self._buffer) if self.is_last else self._chunk
        self.data = bytes(self._buffer[:count])
        del self._buffer[:count]
        self._md5.update(self.data)

    def seek(self, offset: int) -> bytes | None:
        """Go forward to ``offset``; what is left of its chunk. None when it lies behind, or beyond the end."""
        while offset >= self.offset + len(self.data) and not self.is_last:
            self.step()
        within = offset - self.offset
        return self.data[within:] if 0 <= within <= len(self.data) else None

    def md5(self) -> bytes:
        """The digest of all bytes up to the end of the present chunk."""
        return self._md5.digest()
