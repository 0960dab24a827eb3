"""Google's archive: GNU tar finds the disk in it, its bytes repeat, and it can be gone on with anywhere."""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
from pathlib import Path

import pytest

from recvirt.publish.source import Source, load_source
from recvirt.publish.sparsetar import SparseTar, Stream, headers, number
from tests.publish.support import make_image

GIB = 1 << 30


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return load_source(make_image(tmp_path_factory.mktemp("image"), pieces=12), lambda _d, _p: None)


@pytest.fixture(scope="module")
def archive(source: Source) -> bytes:
    return b"".join(SparseTar(source, 1_795_000_000).compressed())


def test_gnu_tar_unpacks_the_disk_with_its_holes(source: Source, archive: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(archive)
    listed = subprocess.check_output(["tar", "tzf", "a.tar.gz"], cwd=tmp_path, text=True)
    assert listed == "disk.raw\n"
    subprocess.run(["tar", "xSzf", "a.tar.gz"], cwd=tmp_path, check=True)
    disk = tmp_path / "disk.raw"
    assert disk.stat().st_size == GIB
    assert disk.stat().st_blocks * 512 < 40 << 20
    subprocess.run(["qemu-img", "compare", "-f", "qcow2", "-F", "raw", source.path, disk], check=True)
    with tarfile.open(tmp_path / "a.tar.gz") as other, source.disk() as reader:
        member = other.extractfile("disk.raw")
        assert member is not None
        assert member.read(reader.size) == reader.read(0, reader.size)


def test_the_bytes_repeat(source: Source, archive: bytes) -> None:
    assert b"".join(SparseTar(source, 1_795_000_000).compressed()) == archive


def test_the_stream_goes_on_at_any_byte(source: Source, archive: bytes) -> None:
    tar = SparseTar(source, 1_795_000_000)
    for offset in (0, 1, 65_535, 65_536, 1_000_000, len(archive) - 1):
        stream = Stream(tar, 65_536)
        data = stream.seek(offset)
        assert data
        assert archive[offset : offset + len(data)] == data
        while not stream.is_last:
            stream.step()
        assert stream.md5() == hashlib.md5(archive).digest()
    assert Stream(tar, 65_536).seek(len(archive) + 1) is None


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 24, 25, 26, 46, 500])
def test_any_number_of_extents_fits(count: int, tmp_path: Path) -> None:
    extents = [(n * 2 * 65_536, 65_536) for n in range(count)]
    path = tmp_path / "a.tar"
    body = b"".join(bytes([1 + n % 200]) * 65_536 for n in range(count))
    path.write_bytes(headers(b"disk.raw", extents, 1 << 30, 0) + body + bytes(10_240))
    subprocess.run(["tar", "xSf", "a.tar"], cwd=tmp_path, check=True)
    with (tmp_path / "disk.raw").open("rb") as stream:
        for n in range(count):
            stream.seek(n * 2 * 65_536)
            assert stream.read(65_537) == bytes([1 + n % 200]) * 65_536 + b"\0"
    assert (tmp_path / "disk.raw").stat().st_size == 1 << 30


def test_large_numbers_are_written_in_base_256() -> None:
    assert number(8, 12) == b"00000000010\0"
    assert tarfile.nti(number(20 * 1024**3, 12)) == 20 * 1024**3  # type: ignore[attr-defined]
