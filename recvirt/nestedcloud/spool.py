"""Uploads on their way from the API to a worker that sees the same folder. Standard library only.

The API writes pieces and never looks at them; the worker copies a whole one out before it looks. Neither trusts what
the other left in the folder: names are UUIDs, and a link is not followed.
"""

from __future__ import annotations

import os
import stat
import uuid
from pathlib import Path
from typing import BinaryIO

from recvirt.nestedcloud.model import ModelError, check_uuid

#: Of a piece of an upload, in bytes.
PIECE_BYTES_MAX = 8 * 1024**2


class SpoolError(ModelError):
    """An upload that is not as it should be."""


def identity(folder: Path) -> str:
    """What tells two programs, perhaps on two machines, that they see one folder; made by the first one that asks."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o770)
    path = folder / "identity"
    if not path.exists():
        part = folder / f".identity-{os.getpid()}"
        part.write_text(str(uuid.uuid4()))
        try:
            # Unlike a rename, a link never takes another one's place.
            os.link(part, path)
        except FileExistsError:
            pass
        finally:
            part.unlink()
    return check_uuid(path.read_text().strip())


def _path(folder: Path, upload: str) -> Path:
    return folder / f"{check_uuid(upload)}.upload"


def _open(folder: Path, upload: str, flags: int) -> int:
    try:
        descriptor = os.open(_path(folder, upload), flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o640)
    except FileNotFoundError:
        raise SpoolError("nothing was uploaded") from None
    except OSError as error:
        raise SpoolError(f"the upload can't be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SpoolError("the upload is no file")
    return descriptor


def write(folder: Path, upload: str, offset: int, data: bytes, size_bytes: int) -> int:
    """Put a piece at ``offset``; how many bytes are there then. One that comes twice is written twice, to the same
    place. SpoolError when it leaves a hole or goes beyond ``size_bytes``.
    """
    descriptor = _open(folder, upload, os.O_RDWR | os.O_CREAT)
    try:
        now = os.fstat(descriptor).st_size
        if not 0 <= offset <= now:
            raise SpoolError(f"{now} bytes are there: the next piece starts at {now}, not at {offset}")
        if offset + len(data) > size_bytes:
            raise SpoolError(f"{offset + len(data)} bytes are more than the {size_bytes} that were announced")
        view = memoryview(data)
        while view:
            count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count
        return max(now, offset)
    finally:
        os.close(descriptor)


def size(folder: Path, upload: str) -> int:
    """How many bytes are there."""
    try:
        descriptor = _open(folder, upload, os.O_RDONLY)
    except SpoolError:
        return 0
    try:
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def read(folder: Path, upload: str) -> BinaryIO:
    """The upload, to be read once. SpoolError when it is not there, or is no file."""
    return os.fdopen(_open(folder, upload, os.O_RDONLY), "rb")


def remove(folder: Path, upload: str) -> None:
    """Have it no more."""
    _path(folder, upload).unlink(missing_ok=True)
