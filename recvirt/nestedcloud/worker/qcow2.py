"""What the header of an uploaded qcow2 may say. Pure, and never through a program that would follow it.

A backing file or an external data file makes QEMU open another file of the host by a name that the uploader chose
(QEMU's docs/interop/qcow2.rst). Such images are refused before any tool of QEMU's sees them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from recvirt.nestedcloud.model import GIB, Fault
from recvirt.nestedcloud.worker.errors import ActionError

_MAGIC = b"QFI\xfb"
_HEADER_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_FEATURES = struct.Struct(">QQQII")
#: Incompatible features (qcow2.rst): dirty, corrupt, external data file, compression type, extended L2.
_EXTERNAL_DATA, _CORRUPT = 1 << 2, 1 << 1
_KNOWN_FEATURES = 0b11011
#: Header extensions that name files.
_EXTENSIONS_REFUSED = {0xE2792ACA: "a backing file's format", 0x44415441: "an external data file"}
_HEADER_BYTES_MAX = 65536


@dataclass(frozen=True)
class Header:
    """Version and the size that a guest would see, in bytes."""

    version: int
    virtual_bytes: int


def _refuse(why: str) -> ActionError:
    return ActionError(Fault.INVALID, f"the image is refused: {why}")


def read_header(stream: BinaryIO, *, largest_bytes: int = 1024 * GIB) -> Header:
    """The header of a qcow2 that stands alone. ActionError says why one is refused.

    ``largest_bytes`` bounds what a few kilobytes may claim to unpack to.
    """
    data = stream.read(_HEADER_BYTES_MAX)
    if len(data) < _HEADER_V2.size or data[:4] != _MAGIC:
        raise _refuse("it is no qcow2")
    (_, version, backing_offset, backing_length, cluster_bits, size, crypt, *_rest) = _HEADER_V2.unpack_from(data)
    if version not in (2, 3):
        raise _refuse(f"version {version} of qcow2 is not known")
    if backing_offset or backing_length:
        raise _refuse("it has a backing file")
    if crypt:
        raise _refuse("it is encrypted")
    if not 9 <= cluster_bits <= 21:
        raise _refuse(f"clusters of 2^{cluster_bits} bytes")
    if not 0 < size <= largest_bytes:
        raise _refuse(f"it claims {size} bytes; {largest_bytes} at most are taken")
    extensions_at = _HEADER_V2.size
    if version == 3:
        if len(data) < _HEADER_V2.size + _FEATURES.size:
            raise _refuse("its header is cut off")
        incompatible, _, _, _, extensions_at = _FEATURES.unpack_from(data, _HEADER_V2.size)
        if incompatible & _EXTERNAL_DATA:
            raise _refuse("it has an external data file")
        if incompatible & _CORRUPT:
            raise _refuse("it is marked as corrupt")
        if incompatible & ~_KNOWN_FEATURES:
            raise _refuse(f"it needs features that are not known: {incompatible:#x}")
    _check_extensions(data, extensions_at)
    return Header(version, size)


def _check_extensions(data: bytes, offset: int) -> None:
    while offset + 8 <= len(data):
        kind, length = struct.unpack_from(">II", data, offset)
        if kind == 0:
            return
        if what := _EXTENSIONS_REFUSED.get(kind):
            raise _refuse(f"it names {what}")
        offset += 8 + (length + 7) // 8 * 8
    raise _refuse("its header never ends")
