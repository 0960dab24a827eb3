"""The file around a disk: finds out its format, refuses what points elsewhere, and gives the raw disk.

A qcow2 with a backing or data file, a VMDK with a parent or an extent elsewhere would make qemu-img open files that
whoever made the image chose; such files are refused from their headers, before any tool opens them.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path

from recvirt.disk.layout import SECTOR
from recvirt.errors import SpaceError, VerificationError
from recvirt.sandbox import ToolsRoot
from recvirt.ui import format_bytes

#: No image of ours comes near; a header that claims more is not believed.
LARGEST_DISK = 16 * 1024**4
_QCOW2 = struct.Struct(">4sIQIIQIIQQIIQ")
#: qcow2's incompatible features that are harmless: dirty, corrupt (seen by the check), compression type.
_QCOW2_HARMLESS = 0b1011
_QCOW2_DATA_FILE = 0b0100
_FORMAT_HINT = "known: raw, qcow2, fixed VHD, VMDK and OVA; is it whole, and not compressed?"


@dataclass(frozen=True)
class Container:
    """A file and its format: ``raw``, ``qcow2``, ``vhd``, ``vmdk`` or ``ova``."""

    path: Path
    format: str
    virtual_bytes: int


def _refuse(path: Path, why: str) -> VerificationError:
    return VerificationError(f"{path}: {why}", hint="make it one whole file first: qemu-img convert -O qcow2 IN OUT")


def identify(path: Path) -> Container:
    """The format of ``path``, from its bytes. VerificationError for what is no disk image or needs other files."""
    if not path.is_file():
        raise VerificationError(f"{path} is not a file" if path.exists() else f"there is no file {path}")
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(64 * 1024)
        stream.seek(max(0, size - SECTOR))
        tail = stream.read(SECTOR)
    if head.startswith(b"QFI\xfb"):
        return _qcow2(path, head)
    if head.startswith(b"KDMV"):
        return _vmdk(path, head)
    if head.startswith(b"# Disk DescriptorFile"):
        raise _refuse(path, "a VMDK descriptor whose data lies in other files")
    if tail.startswith(b"conectix"):
        return _vhd(path, tail, size)
    if head[SECTOR : SECTOR + 8] == b"EFI PART":
        return Container(path, "raw", _believable(path, size))
    if head[257:262] == b"ustar":
        return Container(path, "ova", 0)
    raise VerificationError(f"{path} is not a disk image that recvirt knows", hint=_FORMAT_HINT)


def _believable(path: Path, size: int) -> int:
    if not 0 < size <= LARGEST_DISK:
        raise VerificationError(f"{path} claims a disk of {size} bytes")
    return size


def _qcow2(path: Path, head: bytes) -> Container:
    if len(head) < 104:
        raise VerificationError(f"{path} is cut short")
    fields = _QCOW2.unpack_from(head)
    version, backing, size, encryption = fields[1], fields[2], fields[5], fields[6]
    if version not in (2, 3):
        raise VerificationError(f"{path} is a qcow2 of the unknown version {version}")
    if backing:
        raise _refuse(path, "a qcow2 with a backing file: half of it lies elsewhere")
    if encryption:
        raise _refuse(path, "an encrypted qcow2")
    features = struct.unpack_from(">Q", head, 72)[0] if version == 3 else 0
    if features & _QCOW2_DATA_FILE:
        raise _refuse(path, "a qcow2 with an external data file")
    if features & ~(_QCOW2_HARMLESS | _QCOW2_DATA_FILE):
        raise _refuse(path, f"a qcow2 with features that are not known here ({features:#x})")
    return Container(path, "qcow2", _believable(path, size))


def _vmdk(path: Path, head: bytes) -> Container:
    capacity = struct.unpack_from("<Q", head, 12)[0] * SECTOR
    text = head.decode("latin-1")
    parent = re.search(r"^parentCID=([0-9a-fA-F]+)", text, re.MULTILINE)
    kind = re.search(r'^createType="([A-Za-z]+)"', text, re.MULTILINE)
    if parent is None or kind is None:
        raise VerificationError(f"{path} is a VMDK without a descriptor")
    if parent[1].lower() != "ffffffff":
        raise _refuse(path, "a VMDK with a parent: half of it lies elsewhere")
    if kind[1] not in ("streamOptimized", "monolithicSparse"):
        raise _refuse(path, f"a VMDK of the kind {kind[1]}")
    return Container(path, "vmdk", _believable(path, capacity))


def _vhd(path: Path, footer: bytes, size: int) -> Container:
    current, kind = struct.unpack_from(">Q", footer, 48)[0], struct.unpack_from(">I", footer, 60)[0]
    if kind != 2:
        raise _refuse(path, "a VHD that is not of fixed size")
    if current != size - SECTOR:
        raise VerificationError(f"{path} is cut short: its footer says {current} bytes, it has {size - SECTOR}")
    return Container(path, "vhd", _believable(path, current))


def raw_disk(container: Container, scratch: Path, tools: ToolsRoot) -> Path:
    """The disk as a raw file: the file itself where it is one, else a sparse copy in ``scratch``.

    SpaceError when the data doesn't fit; CommandError when qemu-img finds the file damaged.
    """
    path = container.path.resolve()
    if container.format in ("raw", "vhd"):
        return path
    if container.format == "ova":
        inner = identify(_from_ova(path, scratch))
        if inner.format != "vmdk":
            raise VerificationError(f"{container.path}: its disk is no VMDK")
        return raw_disk(inner, scratch, tools)
    output = scratch / "disk.raw"
    measured = tools.run(
        ["qemu-img", "measure", "--output=json", "-f", container.format, "-O", "raw", str(path)], readable=[path],
        timeout_seconds=120,
    )  # fmt: skip
    _check_room(int(json.loads(measured.stdout)["required"]), container.virtual_bytes, scratch)
    tools.run(
        ["qemu-img", "convert", "-f", container.format, "-O", "raw", "-W", str(path), str(output)], readable=[path],
        writable=[scratch], timeout_seconds=1800, hint="is the image whole? qemu-img check tells more",
    )  # fmt: skip
    return output


def _check_room(data_bytes: int, virtual_bytes: int, scratch: Path) -> None:
    # What a file claims may be wrong; it can't need more than the whole disk.
    needed = min(data_bytes, virtual_bytes)
    free = shutil.disk_usage(scratch).free
    if needed > free:
        raise SpaceError(
            f"reading the image takes {format_bytes(needed)}, {scratch} has {format_bytes(free)} free",
            hint="set TMPDIR to a folder with more room",
        )


def _from_ova(path: Path, scratch: Path) -> Path:
    target = scratch / "disk.vmdk"
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isreg() and member.name.endswith(".vmdk"):
                    _check_room(member.size, path.stat().st_size, scratch)
                    source = archive.extractfile(member)
                    assert source is not None
                    with source, target.open("wb") as stream:
                        shutil.copyfileobj(source, stream, 1024 * 1024)
                    return target
    except tarfile.TarError as error:
        raise VerificationError(f"{path} is a damaged tar archive: {error}") from None
    raise VerificationError(f"{path} is a tar archive without a VMDK: no OVA", hint=_FORMAT_HINT)
