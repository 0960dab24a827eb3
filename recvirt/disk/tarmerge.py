"""Puts changes into a root archive without unpacking it.

A root archive is an uncompressed tar with numeric owners. Only what is needed is unpacked, and the merged archive is
the old one's bytes, ranges of replaced members left out, followed by a small archive of changes.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from recvirt.errors import StageError

_CHUNK = 4 * 1024 * 1024
_END_OF_ARCHIVE = bytes(2 * 512)


def clean_name(name: str) -> str:
    """``./usr/bin/`` and ``/usr/bin`` become ``usr/bin``; the root itself is the empty string. StageError on ``..``."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise StageError(f"the root archive holds a name that leads out of it: {name!r}")
    return "/".join(parts)


@dataclass(frozen=True)
class Member:
    """One member and the bytes (header and data) that it takes in the archive."""

    name: str
    start: int
    end: int
    info: tarfile.TarInfo


@dataclass(frozen=True)
class TarIndex:
    """What an archive holds, in order."""

    path: Path
    members: tuple[Member, ...]

    @classmethod
    def read(cls, path: Path) -> TarIndex:
        """Index an uncompressed archive. StageError when it is none or is cut short."""
        try:
            with tarfile.open(path, "r:") as archive:
                infos = archive.getmembers()
                end = archive.offset
        except (tarfile.TarError, EOFError) as error:
            raise StageError(f"{path} is not a readable tar archive: {error}") from None
        if end > path.stat().st_size:
            raise StageError(f"{path} is cut short")
        ends = [info.offset for info in infos[1:]] + [end]
        members = (Member(clean_name(i.name), i.offset, e, i) for i, e in zip(infos, ends, strict=True))
        return cls(path, tuple(members))

    @cached_property
    def by_name(self) -> dict[str, Member]:
        """Members by clean name (of several with one name, the last)."""
        return {member.name: member for member in self.members}

    @cached_property
    def newest_mtime(self) -> int:
        """The newest time in the archive, in seconds since 1970."""
        return max((int(member.info.mtime) for member in self.members), default=0)

    @cached_property
    def data_bytes(self) -> int:
        """Size of all regular files."""
        return sum(member.info.size for member in self.members if member.info.isreg())


def extract(index: TarIndex, wanted: Callable[[str], bool], target: Path) -> None:
    """Unpack the members that are ``wanted`` (by clean name) below ``target``; owners and devices are left out."""
    links: list[tuple[Path, Path]] = []
    with index.path.open("rb") as stream:
        for member in index.members:
            if not member.name or not wanted(member.name):
                continue
            path = target / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            info = member.info
            if info.isdir():
                path.mkdir(exist_ok=True)
            elif info.issym():
                path.symlink_to(info.linkname)
            elif info.islnk():
                links.append((path, target / clean_name(info.linkname)))
            elif info.isreg():
                stream.seek(info.offset_data)
                path.write_bytes(stream.read(info.size))
                path.chmod(info.mode & 0o777 | 0o200)
                os.utime(path, (info.mtime, info.mtime))
    for path, source in links:
        if not source.exists():
            raise StageError(f"hard link {path} leads to {source}, which was not unpacked")
        os.link(source, path)


@dataclass(frozen=True)
class Fingerprint:
    """Enough of a file's state to see that it was changed."""

    mode: int
    size: int
    mtime_ns: int
    inode: int


def snapshot(tree: Path) -> dict[str, Fingerprint]:
    """The state of everything below ``tree``, by name."""
    found = {}
    for path in walk(tree):
        status = path.lstat()
        is_dir = stat.S_ISDIR(status.st_mode)
        # A folder's own times change with its entries, which are seen themselves.
        found[path.relative_to(tree).as_posix()] = Fingerprint(
            status.st_mode, 0 if is_dir else status.st_size, 0 if is_dir else status.st_mtime_ns, status.st_ino
        )
    return found


def walk(tree: Path) -> Iterator[Path]:
    """Everything below ``tree``, folders before their entries, sorted; symbolic links are not followed."""
    for entry in sorted(os.scandir(tree), key=lambda item: item.name):
        path = Path(entry.path)
        yield path
        if entry.is_dir(follow_symlinks=False):
            yield from walk(path)


@dataclass(frozen=True)
class Changes:
    """What became different: names to take from the tree, and names that are gone."""

    written: tuple[str, ...]
    removed: tuple[str, ...]


def compare(before: Mapping[str, Fingerprint], after: Mapping[str, Fingerprint]) -> Changes:
    """The difference of two snapshots."""
    written = sorted(name for name, state in after.items() if before.get(name) != state)
    return Changes(tuple(written), tuple(sorted(set(before) - set(after))))


def changes_archive(tree: Path, names: Iterable[str], index: TarIndex, epoch: int) -> bytes:
    """A tar of ``names`` below ``tree``: owned by root (or as in ``index``), no time after ``epoch``, sorted."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(names):
            info = archive.gettarinfo(str(tree / name), arcname=f"./{name}")
            old = index.by_name.get(name)
            if info.isdir() and old is not None:
                continue
            if info.islnk():
                # Two names of one file within the changes: keep them as one file each.
                info.type, info.linkname, info.size = tarfile.REGTYPE, "", (tree / name).stat().st_size
            info.uid, info.gid = (old.info.uid, old.info.gid) if old is not None else (0, 0)
            info.uname = info.gname = ""
            info.mtime = min(int(info.mtime), epoch)
            info.pax_headers = {}
            if info.isreg():
                with (tree / name).open("rb") as stream:
                    archive.addfile(info, stream)
            else:
                archive.addfile(info)
    return buffer.getvalue()


def _is_dropped(name: str, dropped: frozenset[str]) -> bool:
    while name:
        if name in dropped:
            return True
        name = name.rpartition("/")[0]
    return False


@dataclass(frozen=True)
class Merge:
    """A root archive without the members in ``dropped`` (clean names, with all below), plus an archive of changes."""

    index: TarIndex
    dropped: frozenset[str]
    changes: bytes

    @cached_property
    def _kept(self) -> tuple[Member, ...]:
        return tuple(member for member in self.index.members if not _is_dropped(member.name, self.dropped))

    @cached_property
    def _added(self) -> tuple[tarfile.TarInfo, ...]:
        if not self.changes:
            return ()
        with tarfile.open(fileobj=io.BytesIO(self.changes)) as archive:
            return tuple(archive.getmembers())

    @property
    def members(self) -> int:
        """How many files, folders and links the result holds."""
        return len(self._kept) + len(self._added)

    @property
    def data_bytes(self) -> int:
        """Size of all regular files of the result."""
        return sum(m.info.size for m in self._kept if m.info.isreg()) + sum(i.size for i in self._added if i.isreg())

    @property
    def infos(self) -> dict[str, tarfile.TarInfo]:
        """Clean name -> what the archive says about it."""
        kept = {member.name: member.info for member in self._kept}
        return kept | {clean_name(info.name): info for info in self._added}

    def ranges(self) -> list[tuple[int, int]]:
        """The byte ranges of the old archive that stay. StageError when a hard link that stays leads to what goes."""
        found: list[tuple[int, int]] = []
        for member in self._kept:
            if member.info.islnk() and _is_dropped(clean_name(member.info.linkname), self.dropped):
                raise StageError(f"{member.name} is a hard link to {member.info.linkname}, which is replaced")
            if found and found[-1][1] == member.start:
                found[-1] = (found[-1][0], member.end)
            else:
                found.append((member.start, member.end))
        return found

    def write(self, output: BinaryIO) -> None:
        """Write the merged archive: what stays, then the changes."""
        with self.index.path.open("rb") as source:
            for start, end in self.ranges():
                source.seek(start)
                left = end - start
                while left:
                    chunk = source.read(min(left, _CHUNK))
                    if not chunk:
                        raise StageError(f"{self.index.path} is cut short")
                    output.write(chunk)
                    left -= len(chunk)
        output.write(self.changes or _END_OF_ARCHIVE)
