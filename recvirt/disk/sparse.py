"""Copies files with holes. Does not own: what is in them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path


def data_ranges(descriptor: int, size_bytes: int, position: int = 0) -> Iterator[tuple[int, int]]:
    """The ranges (start, end) of an open file that hold data, from ``position`` on; without known holes, all of it."""
    while position < size_bytes:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if start >= size_bytes:
            return
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, min(end, size_bytes)
        position = end


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
                _copy(reader.fileno(), start, descriptor, target_offset + start, end - start)
        finally:
            os.close(descriptor)


def copy_range(source: Path, offset: int, length: int, target: Path) -> None:
    """Make ``target`` of ``length`` bytes of ``source`` from ``offset`` on, holes left out."""
    with source.open("rb") as reader, target.open("wb") as writer:
        size = min(os.fstat(reader.fileno()).st_size, offset + length)
        writer.truncate(length)
        for start, end in data_ranges(reader.fileno(), size, offset):
            _copy(reader.fileno(), start, writer.fileno(), start - offset, end - start)


def _copy(source: int, source_offset: int, target: int, target_offset: int, length: int) -> None:
    while length:
        done = os.copy_file_range(source, target, length, source_offset, target_offset)
        if done == 0:
            raise OSError(errno.EIO, "a file became shorter while it was copied")
        source_offset, target_offset, length = source_offset + done, target_offset + done, length - done
