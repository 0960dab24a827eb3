"""Reads a qcow2's disk at any place, from several threads, without a raw copy of it on the disk.

Format: QEMU's docs/interop/qcow2.txt. What points elsewhere (backing and data files) or is encrypted was refused by
:func:`recvirt.imagefile.container.identify`; internal snapshots are passed over.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import zstandard

from recvirt.errors import VerificationError

_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COMPRESSED = 1 << 62
_ZERO = 1
_ZLIB, _ZSTD = 0, 1
#: L2 tables kept: 64 of 64 KiB map 32 GiB.
_TABLES_KEPT = 64


class Qcow2Reader:
    """The virtual disk of a qcow2 file. VerificationError for what is damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._file_bytes = os.fstat(self._descriptor).st_size
        head = os.pread(self._descriptor, 512, 0)
        self._cluster_bits, self.size = struct.unpack_from(">IQ", head, 20)
        entries, table = struct.unpack_from(">IQ", head, 36)
        version, length = struct.unpack_from(">I", head, 4)[0], struct.unpack_from(">I", head, 100)[0]
        self._compression = head[104] if version == 3 and length > 104 else _ZLIB
        if not 9 <= self._cluster_bits <= 21 or self._compression not in (_ZLIB, _ZSTD):
            raise self._damaged("its header makes no sense")
        self._cluster = 1 << self._cluster_bits
        self._per_table = self._cluster // 8
        needed = -(-self.size // (self._cluster * self._per_table))
        if entries < needed:
            raise self._damaged("its first table is too short")
        self._l1 = struct.unpack(f">{needed}Q", self._pread(table, needed * 8))
        self._tables: dict[int, tuple[int, ...]] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let the file go."""
        os.close(self._descriptor)

    def extents(self) -> Iterator[tuple[int, int]]:
        """The ranges (start, end) that may hold something else than zeros, in order, cluster by cluster."""
        for number, entry in enumerate(self._l1):
            if not entry & _OFFSET:
                continue
            base = number * self._per_table
            for index, cluster in enumerate(self._table(number)):
                start = (base + index) << self._cluster_bits
                if start < self.size and self._holds_data(cluster):
                    yield start, min(start + self._cluster, self.size)

    @staticmethod
    def _holds_data(entry: int) -> bool:
        return bool(entry & _COMPRESSED) or bool(entry & _OFFSET and not entry & _ZERO)

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on; the disk's end cuts them short."""
        end = min(offset + length, self.size)
        parts = []
        while offset < end:
            within = offset & (self._cluster - 1)
            count = min(self._cluster - within, end - offset)
            parts.append(self._cluster_part(offset >> self._cluster_bits, within, count))
            offset += count
        return b"".join(parts)

    def _cluster_part(self, number: int, within: int, count: int) -> bytes:
        table, index = divmod(number, self._per_table)
        entry = self._table(table)[index] if self._l1[table] & _OFFSET else 0
        if not self._holds_data(entry):
            return bytes(count)
        if entry & _COMPRESSED:
            return self._decompressed(entry)[within : within + count]
        return self._pread((entry & _OFFSET) + within, count)

    def _decompressed(self, entry: int) -> bytes:
        shift = 62 - (self._cluster_bits - 8)
        offset = entry & ((1 << shift) - 1)
        sectors = ((entry & (_COMPRESSED - 1)) >> shift) + 1
        data = self._pread(offset, min(sectors * 512 - (offset & 511), self._file_bytes - offset))
        try:
            if self._compression == _ZSTD:
                plain = zstandard.ZstdDecompressor().decompressobj().decompress(data)
            else:
                plain = zlib.decompressobj(-12).decompress(data, self._cluster)
        except (zstandard.ZstdError, zlib.error) as error:
            raise self._damaged(f"a compressed cluster can't be read ({error})") from None
        if len(plain) != self._cluster:
            raise self._damaged("a compressed cluster is cut short")
        return plain

    def _table(self, number: int) -> tuple[int, ...]:
        with self._lock:
            found = self._tables.get(number)
            if found is None:
                raw = self._pread(self._l1[number] & _OFFSET, self._cluster)
                found = struct.unpack(f">{self._per_table}Q", raw)
                while len(self._tables) >= _TABLES_KEPT:
                    del self._tables[next(iter(self._tables))]
                self._tables[number] = found
            return found

    def _pread(self, offset: int, length: int) -> bytes:
        data = os.pread(self._descriptor, length, offset)
        if len(data) != length:
            raise self._damaged("it ends too early")
        return data

    def _damaged(self, why: str) -> VerificationError:
        return VerificationError(f"{self._path} is damaged: {why}", hint="qemu-img check tells more; build it again")
