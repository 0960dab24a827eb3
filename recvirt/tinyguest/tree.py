"""The guest's tree in memory, and as a tar whose bytes repeat."""

from __future__ import annotations

import io
import stat
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recvirt.errors import StageError
from recvirt.store import FileRef, sha256_of

#: Everything below /usr, as in Debian.
_MERGED = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64"}
_FOLDERS = {
    "dev": 0o755, "proc": 0o555, "sys": 0o555, "run": 0o755, "tmp": 0o1777, "mnt": 0o755, "root": 0o700,
    "etc/dropbear": 0o700, "var/lib": 0o755, "var/log": 0o755, "var/www": 0o755, "usr/bin": 0o755, "usr/sbin": 0o755,
    "usr/lib64": 0o755,
}  # fmt: skip
_LINKS = {"etc/resolv.conf": "/run/resolv.conf", "etc/mtab": "/proc/mounts", "var/run": "/run", "var/tmp": "/tmp"}
#: Files of ours that are programs, whatever a checkout or a wheel made of their modes.
_PROGRAMS = ("etc/init.d/", "etc/acpi/", "usr/lib/recvirt-guest/")
_DATA_SUFFIXES = (".awk",)
_APPLET_FOLDERS = {"bin": "usr/bin", "sbin": "usr/sbin", "usr/bin": "usr/bin", "usr/sbin": "usr/sbin"}


@dataclass(frozen=True)
class Entry:
    """A folder, a file (``data``) or a symbolic link (``link``); ``mode`` has the type too, as in stat(2)."""

    mode: int
    data: bytes = b""
    link: str = ""


@dataclass
class Tree:
    """Entries by path below the root; owners are root."""

    entries: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def skeleton(cls) -> Tree:
        """The folders and links that every such system has."""
        tree = cls()
        for path, target in {**_MERGED, **_LINKS}.items():
            tree.link(path, target)
        for path, mode in _FOLDERS.items():
            tree.folder(path, mode)
        return tree

    def _parents(self, path: str) -> None:
        for parent in Path(path).parents:
            name = parent.as_posix()
            if name != ".":
                self.entries.setdefault(name, Entry(stat.S_IFDIR | 0o755))

    def folder(self, path: str, mode: int = 0o755) -> None:
        """A folder, and those above it."""
        self._parents(path)
        self.entries[path] = Entry(stat.S_IFDIR | mode)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """A file, and the folders above it."""
        self._parents(path)
        self.entries[path] = Entry(stat.S_IFREG | mode, data)

    def link(self, path: str, target: str) -> None:
        """A symbolic link; one that is there, or a file, stays."""
        self._parents(path)
        self.entries.setdefault(path, Entry(stat.S_IFLNK | 0o777, link=target))

    def write(self, target: Path, epoch: int) -> None:
        """The tar: sorted, numeric owners, one time for all."""
        with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
            for path in ("", *sorted(self.entries)):
                entry = self.entries.get(path, Entry(stat.S_IFDIR | 0o755))
                info = tarfile.TarInfo(f"./{path}")
                info.mode, info.mtime = stat.S_IMODE(entry.mode), epoch
                if stat.S_ISREG(entry.mode):
                    info.size = len(entry.data)
                    archive.addfile(info, io.BytesIO(entry.data))
                    continue
                info.type = tarfile.SYMTYPE if stat.S_ISLNK(entry.mode) else tarfile.DIRTYPE
                info.linkname = entry.link
                archive.addfile(info)


def read_own_files(folder: Path) -> tuple[FileRef, ...]:
    """The files of ``resources/guest``, by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(FileRef.of(path, path.relative_to(folder).as_posix()) for path in paths)


def add_own_files(tree: Tree, files: Iterable[FileRef]) -> None:
    """Put them into the tree. StageError if one is no longer what its digest says: the key would lie."""
    for ref in files:
        if sha256_of(ref.path) != ref.sha256:
            raise StageError(f"{ref.path} changed during the build", hint="run the build again")
        program = ref.name.startswith(_PROGRAMS) and not ref.name.endswith(_DATA_SUFFIXES)
        tree.file(ref.name, ref.path.read_bytes(), 0o755 if program else 0o644)


def add_applets(tree: Tree, listed: str) -> None:
    """Links for busybox's own commands (``busybox --list-full``), where no other program stands."""
    for line in listed.splitlines():
        folder, _, name = line.strip().rpartition("/")
        if name and folder in _APPLET_FOLDERS and name != "busybox":
            place = _APPLET_FOLDERS[folder]
            tree.link(f"{place}/{name}", f"{'' if place == 'usr/bin' else '../bin/'}busybox")


def grub_cfg(release: str, cmdline: str) -> str:
    """A menu without a choice. ``cmdline`` holds nothing that GRUB would act on (``recvirt.disk.bootconf``)."""
    return f"linux /boot/vmlinuz-{release} {cmdline}\nboot\n"


def as_os_release(values: Mapping[str, str]) -> str:
    """os-release(5). The values hold no quotes."""
    return "".join(f'{name}="{value}"\n' for name, value in values.items())
