"""What is read from an image is its disk, byte for byte, and zeros are found wherever they are."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from recvirt.disk.formats import vhd_footer
from recvirt.errors import VerificationError
from recvirt.imagefile.container import identify
from recvirt.publish.qcow2 import Qcow2Reader
from recvirt.publish.reader import RawReader, candidate_blocks, data_blocks, open_disk
from tests.publish.support import MIB, convert, make_raw

KINDS = [
    ("plain",), ("zlib", "-c"), ("zstd", "-c", "-o", "compression_type=zstd"),
    ("small clusters", "-c", "-o", "cluster_size=4096"), ("large clusters", "-o", "cluster_size=2M"),
    ("old", "-o", "compat=0.10"), ("subsectors", "-c", "-o", "cluster_size=512"),
]  # fmt: skip


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options[0])
def test_a_qcow2_is_its_disk(tmp_path: Path, options: tuple[str, ...]) -> None:
    raw = make_raw(tmp_path / "disk.raw", size=20 * MIB + 512)
    reader = Qcow2Reader(convert(raw, tmp_path / "disk.qcow2", *options[1:]))
    content = raw.read_bytes()
    assert reader.size == len(content)
    assert reader.read(0, len(content)) == content
    for offset, length in ((0, 1), (65_535, 2), (MIB - 1, 70_000), (len(content) - 512, 4096)):
        assert reader.read(offset, length) == content[offset : offset + length]
    covered = list(reader.extents())
    outside, last = [], 0
    for start, end in [*covered, (len(content), len(content))]:
        outside.append(content[last:start])
        last = end
    assert not any(b"".join(outside))


def test_both_readers_find_the_same_blocks(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "disk.raw")
    content = raw.read_bytes()
    plain, packed = RawReader(raw, len(content)), Qcow2Reader(convert(raw, tmp_path / "disk.qcow2", "-c"))
    for size in (512, 65_536, 524_288, MIB, 3 * MIB):
        wanted = [n for n in range(-(-len(content) // size)) if any(content[n * size : (n + 1) * size])]
        assert data_blocks(plain, size) == data_blocks(packed, size) == wanted


def test_written_zeros_are_not_data(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(2 * MIB) + b"x" + bytes(2 * MIB - 1))
    assert data_blocks(RawReader(raw, 4 * MIB), MIB) == [2]
    assert list(candidate_blocks(RawReader(raw, 4 * MIB), MIB)) == [0, 1, 2, 3]


def test_of_a_full_disk_only_the_beginnings_of_blocks_are_read() -> None:
    class Disk:
        size, asked = 8 * MIB, 0

        def extents(self) -> Iterator[tuple[int, int]]:
            yield 0, self.size

        def read(self, offset: int, length: int) -> bytes:
            self.asked += length
            # The last block holds something in its last byte alone; the disk ends within it.
            return bytes(length - 1) + b"x" if offset + length == self.size or offset < 6 * MIB else bytes(length)

        def close(self) -> None:
            pass

    disk = Disk()
    assert data_blocks(disk, 3 * MIB) == [0, 1, 2]
    assert disk.asked <= 2 * MIB + 3 * 65_536


def test_a_vhd_is_read_without_its_footer(tmp_path: Path) -> None:
    import uuid

    raw = make_raw(tmp_path / "disk.vhd")
    content = raw.read_bytes()
    with raw.open("ab") as stream:
        stream.write(vhd_footer(len(content), uuid.uuid4(), 1_795_000_000))
    disk = open_disk(identify(raw))
    assert disk.size == len(content)
    assert disk.read(0, 1 << 30) == content


@pytest.mark.parametrize("place", [48, 65_536 + 8, 400_000])
def test_a_damaged_qcow2_is_told(tmp_path: Path, place: int) -> None:
    path = convert(make_raw(tmp_path / "disk.raw"), tmp_path / "disk.qcow2", "-c", "-o", "compression_type=zstd")
    with path.open("r+b") as stream:
        stream.truncate(max(place, 200_000))
    with pytest.raises(VerificationError):
        data_blocks(open_disk(identify(path)), 65_536)


def test_a_twenty_gib_disk_takes_no_memory(tmp_path: Path) -> None:
    path = make_raw(tmp_path / "disk.raw", size=20 * 1024 * MIB, pieces=8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 8 <= len(data_blocks(open_disk(identify(path)), 524_288)) <= 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", path, tmp_path / "disk.qcow2"], check=True)
    assert data_blocks(open_disk(identify(tmp_path / "disk.qcow2")), 524_288) == data_blocks(
        open_disk(identify(path)), 524_288
    )
