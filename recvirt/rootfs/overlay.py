"""Overlay folders, and the tars by which files reach the tree.

An overlay's files become root's; modes are kept, and folders that the tree has already keep their own. Symbolic links
are copied as links, never followed, neither on the build machine nor (the tar is unpacked inside the tree) out of the
tree. Owns reading and freezing an overlay, and writing tars whose bytes depend on nothing else.
"""

from __future__ import annotations

import io
import stat
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from recvirt.errors import ConfigError, Problem, StageError
from recvirt.rootfs.files import TreeFile
from recvirt.store import FileRef, sha256_of


@dataclass(frozen=True)
class OverlayEntry:
    """One entry of an overlay: a file has ``ref``, a symbolic link ``link``, a folder neither. ``path`` is relative."""

    path: str
    mode: int
    ref: FileRef | None = None
    link: str | None = None


@dataclass(frozen=True)
class Overlay:
    """A frozen overlay: its name and entries, parents first."""

    name: str
    entries: tuple[OverlayEntry, ...]


def read_overlay(folder: Path) -> Overlay:
    """Freeze an overlay. Raises ConfigError with every entry that can't be part of an image."""
    if not folder.is_dir():
        raise ConfigError([Problem(str(folder), 0, "root.overlays", "is not a folder")])
    entries: list[OverlayEntry] = []
    problems: list[Problem] = []
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        info = path.lstat()
        mode = stat.S_IMODE(info.st_mode)
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            problems.append(Problem(str(folder), 0, repr(name), "the name is not UTF-8"))
            continue
        if stat.S_ISLNK(info.st_mode):
            entries.append(OverlayEntry(name, 0o777, link=str(path.readlink())))
        elif stat.S_ISDIR(info.st_mode):
            entries.append(OverlayEntry(name, mode))
        elif stat.S_ISREG(info.st_mode):
            try:
                entries.append(OverlayEntry(name, mode, ref=FileRef.of(path, name)))
            except OSError as error:
                problems.append(Problem(str(path), 0, "root.overlays", f"can't be read: {error.strerror}"))
        else:
            problems.append(Problem(str(path), 0, "root.overlays", "is neither a file, a folder nor a link"))
    if problems:
        raise ConfigError(problems)
    return Overlay(folder.name, tuple(entries))


def _walk(folder: Path) -> Iterable[Path]:
    for child in sorted(folder.iterdir(), key=lambda p: p.name):
        yield child
        if child.is_dir() and not child.is_symlink():
            yield from _walk(child)


def _header(path: str, mode: int, epoch: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.mode = mode
    info.mtime = epoch
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def write_overlay_tar(overlay: Overlay, target: Path, epoch: int) -> None:
    """Write an overlay as a tar. StageError if a file is not what it was when the overlay was read."""
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for entry in overlay.entries:
            info = _header(entry.path, entry.mode, epoch)
            if entry.ref is not None:
                if sha256_of(entry.ref.path) != entry.ref.sha256:
                    raise StageError(f"{entry.ref.path} changed while the image was built", hint="build again")
                data = entry.ref.path.read_bytes()
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
                continue
            info.type = tarfile.SYMTYPE if entry.link is not None else tarfile.DIRTYPE
            info.linkname = entry.link or ""
            archive.addfile(info)


def write_files_tar(files: Sequence[TreeFile], target: Path, epoch: int) -> None:
    """Write files of our own, and the folders above them, as a tar."""
    made: set[str] = set()
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for file in files:
            for parent in reversed(Path(file.path).parents):
                name = parent.as_posix()
                if name != "." and name not in made:
                    made.add(name)
                    folder = _header(name, 0o755, epoch)
                    folder.type = tarfile.DIRTYPE
                    archive.addfile(folder)
            info = _header(file.path, file.mode, epoch)
            info.size = len(file.data)
            archive.addfile(info, io.BytesIO(file.data))


#: Name, type and number of the nodes that a tree has before devtmpfs is mounted over them.
_DEVICES = (
    ("console", 5, 1), ("full", 1, 7), ("null", 1, 3), ("ptmx", 5, 2), ("random", 1, 8), ("tty", 5, 0),
    ("urandom", 1, 9), ("zero", 1, 5),
)  # fmt: skip
_DEVICE_LINKS = {"fd": "fd", "stderr": "fd/2", "stdin": "fd/0", "stdout": "fd/1"}


def write_devices_tar(target: Path, epoch: int) -> None:
    """Write the device nodes as a tar: only a tar can hold them where nobody may make any."""
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, major, minor in _DEVICES:
            node = _header(f"./dev/{name}", 0o666, epoch)
            node.type, node.devmajor, node.devminor = tarfile.CHRTYPE, major, minor
            archive.addfile(node)
        for name, where in _DEVICE_LINKS.items():
            link = _header(f"./dev/{name}", 0o777, epoch)
            link.type, link.linkname = tarfile.SYMTYPE, f"/proc/self/{where}"
            archive.addfile(link)
        for name in ("pts", "shm"):
            folder = _header(f"./dev/{name}", 0o755, epoch)
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
