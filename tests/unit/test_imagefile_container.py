"""Image files as hostile input: formats are told from bytes, and what points to other files is refused."""

from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path

import pytest

from recvirt.disk.formats import vhd_footer
from recvirt.disk.gpt import write_table
from recvirt.disk.layout import MIB, derived_uuid, plan_layout
from recvirt.errors import VerificationError
from recvirt.imagefile.container import LARGEST_DISK, identify


def qcow2(
    path: Path, *, version: int = 3, backing: int = 0, size: int = 1 << 30, crypt: int = 0, feats: int = 0
) -> Path:
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", version, backing, 0, 16, size, crypt, 1, 0, 0, 1, 0, 0)
    path.write_bytes(header + struct.pack(">Q", feats) + bytes(4096))
    return path


def vmdk(path: Path, text: str, sectors: int = 2048) -> Path:
    header = struct.pack("<4sIIQ", b"KDMV", 3, 0x30001, sectors).ljust(512, b"\0")
    path.write_bytes(header + text.encode() + bytes(600))
    return path


GOOD_VMDK = '# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType="streamOptimized"\n'


def test_a_plain_qcow2_is_taken(tmp_path: Path) -> None:
    found = identify(qcow2(tmp_path / "a", feats=0b1000))
    assert (found.format, found.virtual_bytes) == ("qcow2", 1 << 30)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"backing": 104}, "backing file"),
        ({"crypt": 2}, "encrypted"),
        ({"feats": 0b100}, "data file"),
        ({"feats": 1 << 40}, "not known"),
        ({"version": 9}, "unknown version"),
        ({"size": LARGEST_DISK + 1}, "claims"),
        ({"size": 0}, "claims"),
    ],
)
def test_a_qcow2_that_is_not_whole_in_itself_is_refused(tmp_path: Path, changes: dict[str, int], why: str) -> None:
    with pytest.raises(VerificationError, match=why):
        identify(qcow2(tmp_path / "a", **changes))


def test_a_qcow2_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"QFI\xfb\0\0\0\3")
    with pytest.raises(VerificationError, match="cut short"):
        identify(tmp_path / "a")


def test_a_stream_optimized_vmdk_is_taken(tmp_path: Path) -> None:
    found = identify(vmdk(tmp_path / "a", GOOD_VMDK))
    assert (found.format, found.virtual_bytes) == ("vmdk", MIB)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (GOOD_VMDK.replace("ffffffff", "12345678"), "parent"),
        (GOOD_VMDK.replace("streamOptimized", "twoGbMaxExtentFlat"), "kind twoGbMaxExtentFlat"),
        ("nothing", "without a descriptor"),
    ],
)
def test_a_vmdk_that_points_elsewhere_is_refused(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(VerificationError, match=why):
        identify(vmdk(tmp_path / "a", text))


def test_a_bare_vmdk_descriptor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(GOOD_VMDK + 'RW 1 FLAT "/etc/shadow" 0\n')
    with pytest.raises(VerificationError, match="other files"):
        identify(tmp_path / "a")


def test_a_fixed_vhd_is_taken_and_a_dynamic_one_refused(tmp_path: Path) -> None:
    footer = bytearray(vhd_footer(MIB, derived_uuid("s", "v"), 0))
    (tmp_path / "a").write_bytes(bytes(MIB) + footer)
    assert identify(tmp_path / "a").format == "vhd"
    footer[63] = 3
    (tmp_path / "b").write_bytes(bytes(MIB) + footer)
    with pytest.raises(VerificationError, match="fixed size"):
        identify(tmp_path / "b")


def test_a_vhd_whose_footer_lies_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(MIB) + vhd_footer(2 * MIB, derived_uuid("s", "v"), 0))
    with pytest.raises(VerificationError, match="cut short"):
        identify(tmp_path / "a")


def test_a_raw_disk_is_known_by_its_table(tmp_path: Path) -> None:
    layout = plan_layout(96 * MIB, 8 * MIB, "s")
    with (tmp_path / "a").open("w+b") as stream:
        stream.truncate(layout.size_bytes)
        write_table(stream, layout)
    assert identify(tmp_path / "a").format == "raw"


def test_a_tar_is_taken_for_an_ova(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a", "w") as archive:
        archive.addfile(tarfile.TarInfo("x"), io.BytesIO())
    assert identify(tmp_path / "a").format == "ova"


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b\x08", b"hello" * 1000])
def test_what_is_no_image_is_said_so(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(VerificationError, match="not a disk image"):
        identify(tmp_path / "a")


def test_a_missing_file_and_a_folder_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="there is no file"):
        identify(tmp_path / "none")
    with pytest.raises(VerificationError, match="is not a file"):
        identify(tmp_path)
