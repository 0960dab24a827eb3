"""Programs out of Debian packages with the shared libraries that they need, found by what the files themselves say.

The packages were resolved and verified before (``archive``); none of them is installed: no script of theirs runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recvirt.errors import StageError
from recvirt.sandbox import ToolsRoot
from recvirt.tinyguest.tree import Tree

#: What is resolved in the suite; the last three make the root's partition and file system larger.
PACKAGES = ("busybox-static", "dropbear-bin", "fdisk", "util-linux", "e2fsprogs")
#: Of each program: where it is put.
PROGRAMS = (
    "usr/bin/busybox", "usr/sbin/dropbear", "usr/bin/dropbearkey", "usr/sbin/sfdisk", "usr/bin/partx",
    "usr/sbin/resize2fs",
)  # fmt: skip
_LIBRARIES = ("usr/lib/x86_64-linux-gnu", "usr/lib64")
_NEEDED = re.compile(r"\(NEEDED\)\s+Shared library: \[([^]/]+)\]")
_LOADER = re.compile(r"Requesting program interpreter: (/[^]]+)\]")


@dataclass(frozen=True)
class Linked:
    """What readelf(1) says of an executable or a library."""

    needed: tuple[str, ...]
    loader: str = ""


def parse_readelf(text: str) -> Linked:
    """The answer of ``readelf -dl``."""
    loader = _LOADER.search(text)
    return Linked(tuple(_NEEDED.findall(text)), loader[1] if loader else "")


@dataclass
class Unpacked:
    """Packages, each unpacked in ``folder/NAME``. ``used`` are those that gave a file."""

    folder: Path
    names: Sequence[str]
    used: set[str] = field(default_factory=set)

    def find(self, path: str) -> Path | None:
        """The file of a path below the merged /usr; before the merge a package had it one level higher."""
        for name in self.names:
            for candidate in (path, path.removeprefix("usr/")):
                found = self.folder / name / candidate
                if found.is_file():
                    self.used.add(name)
                    return found
        return None

    def get(self, path: str) -> Path:
        """The file; StageError when no package has it."""
        found = self.find(path)
        if found is None:
            raise StageError(f"no package of the tiny guest has {path}", hint=f"they are {', '.join(self.names)}")
        return found

    def library(self, name: str) -> tuple[str, Path]:
        """A library: its place in the tree, and its file."""
        for folder in _LIBRARIES:
            if (found := self.find(f"{folder}/{name}")) is not None:
                return f"{folder}/{name}", found
        raise StageError(f"no package of the tiny guest has the library {name}")


def unpack(tools: ToolsRoot, debs: Mapping[str, Path], folder: Path, log: Path) -> Unpacked:
    """Unpack the packages (name to file) below ``folder``."""
    folder.mkdir()
    for name, deb in debs.items():
        argv = ["dpkg-deb", "--extract", str(deb), str(folder / name)]
        tools.run(argv, readable=[deb], writable=[folder], log_path=log)
    return Unpacked(folder, tuple(debs))


def add_programs(tree: Tree, unpacked: Unpacked, linked: Callable[[Path], Linked]) -> None:
    """Put :data:`PROGRAMS` into the tree, with all libraries that they, and these again, name."""
    todo = [(path, unpacked.get(path)) for path in PROGRAMS]
    while todo:
        path, source = todo.pop()
        tree.file(path, source.read_bytes(), 0o755)
        facts = linked(source)
        names = [*facts.needed, *([Path(facts.loader).name] if facts.loader else [])]
        for place, found in map(unpacked.library, names):
            if place not in tree.entries:
                todo.append((place, found))
        if facts.loader:
            # The place that is written in the programs; /lib64 is below /usr.
            place, _ = unpacked.library(Path(facts.loader).name)
            tree.link(f"usr{facts.loader}", f"/{place}")


def add_copyrights(tree: Tree, unpacked: Unpacked) -> None:
    """The copyright files of the packages that gave something."""
    for name in sorted(unpacked.used):
        path = f"usr/share/doc/{name}/copyright"
        found = unpacked.folder / name / path
        # It may be a link to that of a package of the same source.
        if found.is_file():
            tree.file(path, found.read_bytes())
