"""Headers of uploaded images: those that would make QEMU open another file never get as far as QEMU."""

from __future__ import annotations

import io
import struct

import pytest

from recvirt.nestedcloud.model import GIB
from recvirt.nestedcloud.worker.errors import ActionError
from recvirt.nestedcloud.worker.qcow2 import read_header


def header(
    *, magic: bytes = b"QFI\xfb", version: int = 3, backing: tuple[int, int] = (0, 0), size: int = GIB, crypt: int = 0,
    cluster_bits: int = 16, features: int = 0, extensions: bytes = struct.pack(">II", 0, 0), length: int = 104,
) -> bytes:  # fmt: skip
    """A header, field by field as QEMU's docs/interop/qcow2.rst lists them."""
    data = struct.pack(
        ">4sIQIIQIIQQIIQ", magic, version, *backing, cluster_bits, size, crypt, 1, 65536, 131072, 1, 0, 0
    )
    if version == 3:
        data += struct.pack(">QQQII", features, 0, 0, 4, length)
    return data + extensions + bytes(512)


def read(data: bytes) -> object:
    return read_header(io.BytesIO(data))


@pytest.mark.parametrize("version", [2, 3])
def test_an_image_that_stands_alone_is_taken(version: int) -> None:
    found = read_header(io.BytesIO(header(version=version)))
    assert (found.version, found.virtual_bytes) == (version, GIB)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no qcow2"),
        (b"QFI\xfb", "no qcow2"),
        (header(magic=b"QFI\x00"), "no qcow2"),
        (header(version=4), "version 4"),
        (header(backing=(600, 11)), "backing file"),
        (header(backing=(0, 11)), "backing file"),
        (header(crypt=2), "encrypted"),
        (header(size=0), "claims 0 bytes"),
        (header(size=2**63), "claims"),
        (header(cluster_bits=40), "clusters"),
        (header(features=1 << 2), "external data file"),
        (header(features=1 << 1), "corrupt"),
        (header(features=1 << 7), "features that are not known"),
        (header(extensions=struct.pack(">II", 0xE2792ACA, 3) + b"raw" + bytes(13)), "backing file's format"),
        (header(extensions=struct.pack(">II", 0x44415441, 11) + b"/etc/passwd" + bytes(13)), "external data file"),
        (header(extensions=struct.pack(">II", 0x6803F857, 0xFFFFFFF0)), "never ends"),
        (header()[:80], "cut off"),
    ],
)
def test_an_image_that_names_other_files_or_lies_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(ActionError, match=words):
        read(data)


def test_an_extension_that_names_nothing_is_passed_over() -> None:
    names = struct.pack(">II", 0x6803F857, 5) + b"names" + bytes(3)
    found = read_header(io.BytesIO(header(extensions=names + struct.pack(">II", 0, 0))))
    assert found.virtual_bytes == GIB


def test_an_extension_behind_a_harmless_one_is_found() -> None:
    names = struct.pack(">II", 0x6803F857, 5) + b"names" + bytes(3)
    with pytest.raises(ActionError, match="external data file"):
        read(header(extensions=names + struct.pack(">II", 0x44415441, 1) + b"x" + bytes(15)))
