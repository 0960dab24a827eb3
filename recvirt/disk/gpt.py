"""Writes and reads GUID partition tables (UEFI specification 2.10, chapter 5).

Reading trusts nothing: sizes are bounded and both checksums must hold.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from recvirt.disk.layout import SECTOR, Layout, Partition
from recvirt.errors import VerificationError

_SIGNATURE = b"EFI PART"
_REVISION = 0x00010000
_HEADER_BYTES = 92
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_ENTRY = struct.Struct("<16s16sQQQ72s")
_ENTRIES = 128
_ENTRY_SECTORS = _ENTRIES * _ENTRY.size // SECTOR
#: Attribute bit 2, "legacy BIOS bootable", is left off: GRUB doesn't need it.
_NO_ATTRIBUTES = 0


@dataclass(frozen=True)
class Table:
    """What a disk's table says."""

    disk_uuid: uuid.UUID
    partitions: tuple[Partition, ...]


def _protective_mbr(boot_code: bytes, disk_sectors: int) -> bytes:
    """Sector 0: up to 440 bytes of boot code and one partition of type 0xEE over the whole disk."""
    if len(boot_code) > 440:
        raise ValueError("boot code is at most 440 bytes")
    count = min(disk_sectors - 1, 0xFFFFFFFF)
    # Marked active (0x80): some BIOSes start no disk that has no active partition. UEFI ignores the flag.
    record = struct.pack("<B3sB3sII", 0x80, b"\x00\x02\x00", 0xEE, b"\xff\xff\xff", 1, count)
    return boot_code.ljust(446, b"\0") + record.ljust(64, b"\0") + b"\x55\xaa"


def _entries(layout: Layout) -> bytes:
    packed = b"".join(
        _ENTRY.pack(
            part.type_uuid.bytes_le, part.part_uuid.bytes_le, part.first_lba, part.last_lba, _NO_ATTRIBUTES,
            part.name.encode("utf-16-le"),
        )
        for part in layout.partitions
    )  # fmt: skip
    return packed.ljust(_ENTRIES * _ENTRY.size, b"\0")


def _header(layout: Layout, entries: bytes, own_lba: int, other_lba: int, entries_lba: int) -> bytes:
    sectors = layout.size_bytes // SECTOR

    def pack(checksum: int) -> bytes:
        return _HEADER.pack(
            _SIGNATURE, _REVISION, _HEADER_BYTES, checksum, 0, own_lba, other_lba,
            2 + _ENTRY_SECTORS, sectors - 2 - _ENTRY_SECTORS, layout.disk_uuid.bytes_le,
            entries_lba, _ENTRIES, _ENTRY.size, zlib.crc32(entries),
        )  # fmt: skip

    return pack(zlib.crc32(pack(0))).ljust(SECTOR, b"\0")


def table_bytes(layout: Layout, boot_code: bytes = b"") -> dict[int, bytes]:
    """What to write where (byte offset -> bytes): protective MBR, primary table, backup table."""
    sectors = layout.size_bytes // SECTOR
    entries = _entries(layout)
    backup_entries_lba = sectors - 1 - _ENTRY_SECTORS
    return {
        0: _protective_mbr(boot_code, sectors),
        SECTOR: _header(layout, entries, 1, sectors - 1, 2),
        2 * SECTOR: entries,
        backup_entries_lba * SECTOR: entries,
        (sectors - 1) * SECTOR: _header(layout, entries, sectors - 1, 1, backup_entries_lba),
    }


def write_table(disk: BinaryIO, layout: Layout, boot_code: bytes = b"") -> None:
    """Write all of :func:`table_bytes` into an open disk."""
    for offset, data in table_bytes(layout, boot_code).items():
        disk.seek(offset)
        disk.write(data)


def read_table(disk: BinaryIO) -> Table:
    """The primary table of an open disk. VerificationError when there is none or it is damaged."""
    disk.seek(SECTOR)
    raw = disk.read(SECTOR)
    if len(raw) < SECTOR or not raw.startswith(_SIGNATURE):
        raise VerificationError("no GUID partition table", hint="is this a disk image made by recvirt?")
    fields = _HEADER.unpack(raw[: _HEADER.size])
    _, _, size, checksum, _, _, _, _, _, disk_guid, entries_lba, count, entry_size, entries_crc = fields
    if not _HEADER_BYTES <= size <= SECTOR or count > 1024 or entry_size != _ENTRY.size:
        raise VerificationError("the partition table's header makes no sense")
    if zlib.crc32(raw[:16] + bytes(4) + raw[20:size]) != checksum:
        raise VerificationError("the partition table's header is damaged (checksum)")
    disk.seek(entries_lba * SECTOR)
    entries = disk.read(count * entry_size)
    if zlib.crc32(entries) != entries_crc:
        raise VerificationError("the partition table's entries are damaged (checksum)")
    return Table(uuid.UUID(bytes_le=disk_guid), tuple(_parse_entries(entries, count)))


def _parse_entries(entries: bytes, count: int) -> list[Partition]:
    found = []
    for index in range(count):
        kind, own, first, last, _, name = _ENTRY.unpack_from(entries, index * _ENTRY.size)
        if kind == bytes(16):
            continue
        if last < first:
            raise VerificationError(f"partition {index + 1} ends before it begins")
        text = name.decode("utf-16-le", "replace").split("\0")[0]
        found.append(Partition(index + 1, text, uuid.UUID(bytes_le=kind), uuid.UUID(bytes_le=own), first, last))
    return found
