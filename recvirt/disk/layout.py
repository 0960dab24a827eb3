"""Where everything lies on the disk, and the identifiers that it carries.

All identifiers come from one seed, so that the same inputs give the same bytes. Does not own: how a table is written
(:mod:`recvirt.disk.gpt`).
"""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass

from recvirt.errors import ConfigError

SECTOR = 512
MIB = 1024 * 1024

#: GPT partition types (UEFI specification 5.3.3; GRUB manual, "BIOS installation"; Discoverable Partitions).
TYPE_ESP = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
TYPE_BIOS_BOOT = uuid.UUID("21686148-6449-6e6f-744e-656564454649")
TYPE_ROOT_X86_64 = uuid.UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709")

ESP_LABEL = "RECVIRT-ESP"
ROOT_LABEL = "recvirt-root"

#: FAT32 has 65525 clusters or more (Microsoft's FAT specification): of one sector each, just below 33 MiB.
FAT32_FROM_BYTES = 34 * MIB
_SMALLEST_ESP = 8 * MIB
_SMALLEST_ROOT = 64 * MIB


@dataclass(frozen=True)
class Partition:
    """One partition: sectors of 512 bytes, ``last_lba`` included."""

    number: int
    name: str
    type_uuid: uuid.UUID
    part_uuid: uuid.UUID
    first_lba: int
    last_lba: int

    @property
    def offset_bytes(self) -> int:
        """Where it begins."""
        return self.first_lba * SECTOR

    @property
    def size_bytes(self) -> int:
        """How long it is."""
        return (self.last_lba - self.first_lba + 1) * SECTOR


@dataclass(frozen=True)
class Layout:
    """The whole disk. ``seed`` is what every identifier is derived from."""

    seed: str
    size_bytes: int
    disk_uuid: uuid.UUID
    bios: Partition
    esp: Partition
    root: Partition
    root_fs_uuid: uuid.UUID
    hash_seed: uuid.UUID
    esp_serial: str  # eight hex digits

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """In table order; the root is last, so that it can grow."""
        return (self.bios, self.esp, self.root)


def derived_uuid(seed: str, what: str) -> uuid.UUID:
    """A UUID (version 4 in shape: firmware and udev expect nothing else) that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"recvirt\0{seed}\0{what}".encode()).digest()
    return uuid.UUID(bytes=digest[:16], version=4)


def plan_layout(size_bytes: int, esp_bytes: int, seed: str) -> Layout:
    """The partitions of a disk: 1 MiB for GRUB's BIOS core, the ESP, and the root up to the last whole MiB.

    ``size_bytes`` is rounded down to whole MiB (Azure wants that of a VHD). ConfigError when the root would be tiny.
    """
    size_bytes -= size_bytes % MIB
    esp_bytes -= esp_bytes % MIB
    if esp_bytes < _SMALLEST_ESP:
        raise ConfigError(f"image.esp_size is {esp_bytes // MIB} MiB", hint=f"give it {_SMALLEST_ESP // MIB}M or more")
    esp_first = 2 * MIB // SECTOR
    root_first = esp_first + esp_bytes // SECTOR
    # The last MiB holds the backup table.
    root_last = (size_bytes - MIB) // SECTOR - 1
    if (root_last - root_first + 1) * SECTOR < _SMALLEST_ROOT:
        raise ConfigError(
            f"image.size leaves no room for the root: {size_bytes // MIB} MiB with an ESP of {esp_bytes // MIB} MiB",
            hint="raise image.size or lower image.esp_size",
        )

    def part(number: int, name: str, kind: uuid.UUID, first: int, last: int) -> Partition:
        return Partition(number, name, kind, derived_uuid(seed, f"part-{name}"), first, last)

    return Layout(
        seed=seed,
        size_bytes=size_bytes,
        disk_uuid=derived_uuid(seed, "disk"),
        bios=part(1, "bios", TYPE_BIOS_BOOT, MIB // SECTOR, esp_first - 1),
        esp=part(2, "esp", TYPE_ESP, esp_first, root_first - 1),
        root=part(3, "root", TYPE_ROOT_X86_64, root_first, root_last),
        root_fs_uuid=derived_uuid(seed, "root-fs"),
        hash_seed=derived_uuid(seed, "hash-seed"),
        esp_serial=derived_uuid(seed, "esp-serial").hex[:8].upper(),
    )
