"""A file system whose server does not answer, as an NFS server that is gone: whoever looks into it waits.

A FUSE mount (fuse(4)) whose other end nobody serves. When the server is back is played by unmounting it: those who wait
get an error then, as from a soft mount of NFS.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


def why_not() -> str:
    """Why that can't be done here; nothing when it can."""
    if os.geteuid() != 0:
        return "mounting wants root"
    return "" if os.access("/dev/fuse", os.R_OK | os.W_OK) else "there is no FUSE here"


@contextmanager
def dead(folder: Path) -> Iterator[None]:
    """``folder`` does not answer."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    try:
        if _libc.mount(b"dead", str(folder).encode(), b"fuse", 0, options):
            raise OSError(ctypes.get_errno(), "mount")
        try:
            yield
        finally:
            _libc.umount2(str(folder).encode(), _MNT_DETACH)
    finally:
        # Ends the connection: who waits gets an error.
        os.close(device)
