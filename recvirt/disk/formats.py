"""The file formats of an image, all made from one raw disk.

Owns the command lines of qemu-img(1) and the bytes that it would fill by chance: VHD footers, VMDK content identifiers.
Does not own: the OVA's descriptor (:mod:`recvirt.disk.ova`).
"""

from __future__ import annotations

import re
import struct
import uuid
from pathlib import Path
from typing import BinaryIO

from recvirt.disk.layout import MIB
from recvirt.errors import StageError

#: Format -> file name in the output.
FILE_NAMES = {
    "qcow2": "disk.qcow2", "raw": "disk.raw", "vhd": "disk.vhd", "vmdk": "disk.vmdk", "ova": "disk.ova",
}  # fmt: skip
#: Rough size of a format against the data in the raw disk: for the estimate of the room needed.
_SHARE = {"qcow2": 0.6, "raw": 1.0, "vhd": 1.0, "vmdk": 0.6, "ova": 0.6}

_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427s")
#: Seconds between 1970 and 2000, where a VHD's clock begins (Virtual Hard Disk Image Format Specification 1.0).
_VHD_EPOCH = 946_684_800


def qcow2_argv(raw: Path, output: Path) -> list[str]:
    """qemu-img(1): compressed with zstd. Clusters are written in order (no ``-W``), so that the bytes repeat."""
    return [
        "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-m", "8",
        "-o", "compression_type=zstd", str(raw), str(output),
    ]  # fmt: skip


def vmdk_argv(raw: Path, output: Path) -> list[str]:
    """qemu-img(1): a stream-optimized VMDK, as OVF packages carry."""
    return [
        "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized,adapter_type=lsilogic",
        str(raw), str(output),
    ]  # fmt: skip


def needed_bytes(data_bytes: int, formats: tuple[str, ...]) -> int:
    """Room that the raw disk and its formats take, in bytes, given the size of the data on it."""
    return int(data_bytes * 1.1) + sum(int(data_bytes * _SHARE[name]) for name in formats)


def vhd_footer(size_bytes: int, identifier: uuid.UUID, epoch: int) -> bytes:
    """The 512 bytes behind a fixed VHD's data. Azure takes sizes of whole MiB only."""
    if size_bytes % MIB:
        raise StageError(f"a fixed VHD of {size_bytes} bytes is not a whole number of MiB")
    # The largest geometry says that the size field counts, not the geometry (as qemu-img's force_size writes it).
    cylinders, heads, per_track = 65535, 16, 255

    def pack(checksum: int) -> bytes:
        return _FOOTER.pack(
            b"conectix", 2, 0x00010000, 0xFFFFFFFFFFFFFFFF, max(0, epoch - _VHD_EPOCH), b"qem2", 0x00050003, b"Wi2k",
            size_bytes, size_bytes, cylinders, heads, per_track, 2, checksum, identifier.bytes, 0, bytes(427),
        )  # fmt: skip

    return pack(~sum(pack(0)) & 0xFFFFFFFF)


def patch_vmdk(stream: BinaryIO, identifier: uuid.UUID) -> None:
    """Replace the content identifier that qemu-img drew by lot. StageError when there is no descriptor to patch."""
    stream.seek(0)
    head = stream.read(64 * 1024)
    match = re.search(rb"^CID=([0-9a-f]{8})$", head, re.MULTILINE)
    if match is None:
        raise StageError("the VMDK that qemu-img wrote has no content identifier")
    stream.seek(match.start(1))
    # fffffffe and ffffffff have meanings of their own.
    stream.write(identifier.hex[:7].encode() + b"1")
