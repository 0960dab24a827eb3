"""Partitions, the table's bytes, and the boot code's patches."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recvirt.disk import gpt, grub
from recvirt.disk.layout import MIB, SECTOR, TYPE_ESP, Layout, derived_uuid, plan_layout
from recvirt.errors import ConfigError, StageError, VerificationError

SIZE = 96 * MIB
ESP = 8 * MIB


def written(layout: Layout, boot_code: bytes = b"code") -> io.BytesIO:
    disk = io.BytesIO(bytes(layout.size_bytes))
    gpt.write_table(disk, layout, boot_code)
    return disk


def test_partitions_follow_each_other_and_the_root_is_last() -> None:
    layout = plan_layout(SIZE, ESP, "seed")
    assert [part.name for part in layout.partitions] == ["bios", "esp", "root"]
    for before, after in zip(layout.partitions, layout.partitions[1:], strict=False):
        assert after.first_lba == before.last_lba + 1
    assert all(part.offset_bytes % MIB == 0 for part in layout.partitions)
    assert layout.root.offset_bytes + layout.root.size_bytes == SIZE - MIB
    assert layout.esp.size_bytes == ESP


@settings(max_examples=25, deadline=None)
@given(st.integers(200 * MIB, 300 * MIB))
def test_any_size_becomes_whole_mebibytes(size: int) -> None:
    assert plan_layout(size, 64 * MIB, "s").size_bytes == size // MIB * MIB


def test_identifiers_depend_on_the_seed_alone() -> None:
    one, same, other = (plan_layout(SIZE, ESP, seed) for seed in ("a", "a", "b"))
    assert one == same
    assert one.disk_uuid != other.disk_uuid
    uuids = {one.disk_uuid, one.root_fs_uuid, one.hash_seed, *(part.part_uuid for part in one.partitions)}
    assert len(uuids) == 6
    assert derived_uuid("a", "x").version == 4


@pytest.mark.parametrize(("size", "esp"), [(SIZE, 4 * MIB), (SIZE, 64 * MIB), (MIB, ESP)])
def test_sizes_that_can_not_be_are_refused(size: int, esp: int) -> None:
    with pytest.raises(ConfigError, match=r"image\.(size|esp_size)"):
        plan_layout(size, esp, "s")


def test_a_written_table_is_read_back() -> None:
    layout = plan_layout(SIZE, ESP, "s")
    table = gpt.read_table(written(layout))
    assert table.disk_uuid == layout.disk_uuid
    assert table.partitions == layout.partitions


def test_the_backup_table_mirrors_the_primary_one() -> None:
    data = written(plan_layout(SIZE, ESP, "s")).getvalue()
    primary, backup = data[SECTOR : 2 * SECTOR], data[-SECTOR:]
    assert struct.unpack_from("<QQ", primary, 24) == (1, SIZE // SECTOR - 1)
    assert struct.unpack_from("<QQ", backup, 24) == (SIZE // SECTOR - 1, 1)
    (lba,) = struct.unpack_from("<Q", backup, 72)
    assert lba == SIZE // SECTOR - 33
    assert data[lba * SECTOR : lba * SECTOR + 16384] == data[2 * SECTOR : 2 * SECTOR + 16384]
    blank = backup[:16] + bytes(4) + backup[20:92]
    assert struct.unpack_from("<I", backup, 16)[0] == zlib.crc32(blank)


def test_sector_0_protects_the_disk_and_holds_the_boot_code() -> None:
    sector = written(plan_layout(SIZE, ESP, "s"), b"CODE").getvalue()[:SECTOR]
    assert sector.startswith(b"CODE")
    assert sector[510:] == b"\x55\xaa"
    assert sector[450] == 0xEE
    assert struct.unpack_from("<II", sector, 454) == (1, SIZE // SECTOR - 1)


@pytest.mark.parametrize("offset", [SECTOR + 60, 2 * SECTOR + 200])
def test_a_damaged_table_is_refused(offset: int) -> None:
    disk = written(plan_layout(SIZE, ESP, "s"))
    disk.seek(offset)
    disk.write(b"\xff")
    with pytest.raises(VerificationError, match="damaged"):
        gpt.read_table(disk)


def _forged(**changes: int) -> io.BytesIO:
    disk = written(plan_layout(SIZE, ESP, "s"))
    data = bytearray(disk.getvalue())
    for offset, value in ((80, changes.get("count", 128)), (84, changes.get("entry_size", 128))):
        struct.pack_into("<I", data, SECTOR + offset, value)
    struct.pack_into("<I", data, SECTOR + 16, 0)
    struct.pack_into("<I", data, SECTOR + 16, zlib.crc32(bytes(data[SECTOR : SECTOR + 92])))
    return io.BytesIO(bytes(data))


@pytest.mark.parametrize("change", [{"count": 2**31}, {"entry_size": 0}, {"entry_size": 2**31}])
def test_a_table_that_claims_absurd_sizes_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(VerificationError, match="makes no sense"):
        gpt.read_table(_forged(**change))


def test_no_table_is_said_so() -> None:
    with pytest.raises(VerificationError, match="no GUID partition table"):
        gpt.read_table(io.BytesIO(bytes(4096)))


def test_boot_code_is_told_where_the_core_begins() -> None:
    image = bytes(range(256)) * 2
    code = grub.boot_code(image, 2048)
    assert len(code) == 440
    assert struct.unpack_from("<Q", code, 0x5C) == (2048,)
    assert code[0x66:0x68] == b"\x90\x90"
    assert code[:0x5C] == image[:0x5C]


def test_the_core_is_told_where_its_rest_lies() -> None:
    core = grub.embedded_core(b"x" * 1300, 2048)
    assert len(core) == 3 * SECTOR
    assert struct.unpack_from("<QHH", core, 0x1F4) == (2049, 2, 0x820)


def test_a_core_that_is_too_large_is_refused() -> None:
    layout = plan_layout(SIZE, ESP, "s")
    with pytest.raises(StageError, match="core image"):
        grub.write_core(io.BytesIO(bytes(SIZE)), layout, b"x" * (MIB + 1))


def _bootable() -> tuple[Layout, bytes, bytes]:
    layout = plan_layout(SIZE, ESP, "s")
    disk = written(layout, grub.boot_code(b"\xeb" * 512, layout.bios.first_lba))
    grub.write_core(disk, layout, b"y" * 5000)
    data = disk.getvalue()
    return layout, data[:SECTOR], data[layout.bios.offset_bytes :][:SECTOR]


def test_bios_code_that_is_whole_is_recognised() -> None:
    layout, sector, core = _bootable()
    assert grub.bios_code_problem(sector, layout.bios, core) == ""


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda s, c: (s[:510] + b"\0\0", c), "signature"),
        (lambda s, c: (bytes(440) + s[440:], c), "no boot code"),
        (lambda s, c: (s[:0x5C] + struct.pack("<Q", 7) + s[0x64:], c), "sector 7"),
        (lambda s, c: (s, bytes(SECTOR)), "no GRUB core"),
    ],
)
def test_bios_code_that_would_not_boot_is_told(spoil: object, why: str) -> None:
    layout, sector, core = _bootable()
    sector, core = spoil(sector, core)  # type: ignore[operator]
    assert why in grub.bios_code_problem(sector, layout.bios, core)


def test_core_images_find_the_menu_by_the_disk_they_come_from() -> None:
    layout = plan_layout(SIZE, ESP, "s")
    assert layout.root.number == 3 and layout.esp.number == 2
    assert "gpt3" in grub.PREFIX
    assert layout.esp.type_uuid == TYPE_ESP
    for modules in grub.MODULES.values():
        assert {"part_gpt", "ext2", "xfs", "btrfs", "fat", "linux", "loadenv", "regexp", "serial"} <= set(modules)
