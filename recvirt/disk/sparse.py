"""Copies files with holes. Does not own: what is in them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path


def data_ranges(descriptor: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """The ranges (start, end) of an open file that hold data; all of it where the filesystem knows no holes."""
    position = 0
    while position < size_bytes:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, min(end, size_bytes)
        position = end


def allocated_bytes(path: Path) -> int:
    """Bytes of a file that are not holes."""
    return path.stat().st_blocks * 512


def copy_sparse(source: Path, target: Path, *, target_offset: int = 0, truncate: bool = True) -> None:
    """Copy a file's data, holes left out, to ``target`` at an offset. A new target becomes just as long."""
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if truncate else 0)
    with source.open("rb") as reader:
        descriptor = os.open(target, flags, 0o644)
        try:
            size = os.fstat(reader.fileno()).st_size
            if truncate:
                os.ftruncate(descriptor, target_offset + size)
            for start, end in data_ranges(reader.fileno(), size):
                at = start
                while at < end:
                    done = os.copy_file_range(reader.fileno(), descriptor, end - at, at, target_offset + at)
                    if done == 0:
                        raise OSError(errno.EIO, f"{source} ends before its data")
                    at += done
        finally:
            os.close(descriptor)
