"""A repository of exactly the pinned packages of one build, for the bootstrapper to install from.

The packages were verified against their digests before (``archive``); with this repository the bootstrapper needs no
network, can't see an archive that changed meanwhile, and reads an index of hundreds instead of tens of thousands of
packages. Owns: reading a .deb's control file and age, and the texts of Packages and Release. Formats: deb(5),
deb-control(5), and the Debian repository format.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

from recvirt.errors import VerificationError

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER_BYTES = 60
#: Where the repository is seen, inside the sandbox and inside the tree alike: no path of the host enters the tree.
MOUNT_POINT = "/run/packages"


@dataclass(frozen=True)
class Deb:
    """A .deb on disk: its control file's text, and when it was built (seconds since 1970)."""

    path: Path
    control: str
    built: int
    sha256: str
    size_bytes: int

    def control_field(self, name: str) -> str:
        """A one-line field of the control file, or the empty string."""
        for line in self.control.splitlines():
            key, colon, value = line.partition(":")
            if colon and key.lower() == name.lower():
                return value.strip()
        return ""


def read_deb(path: Path, sha256: str) -> Deb:
    """Read a package's control file and age. VerificationError for something that isn't a Debian package."""
    try:
        with path.open("rb") as stream:
            if stream.read(len(_AR_MAGIC)) != _AR_MAGIC:
                raise ValueError("no ar archive")
            name, built, size = _member(stream)
            if name != "debian-binary":
                raise ValueError(f"its first member is {name}")
            stream.seek(size + size % 2, os.SEEK_CUR)
            name, _, size = _member(stream)
            control = _control_text(name, stream.read(size))
    except (ValueError, OSError, lzma.LZMAError, zlib.error, tarfile.TarError, KeyError) as error:
        raise VerificationError(
            f"{path} is not a Debian package: {error}", hint="delete it; the next build fetches it again"
        ) from error
    return Deb(path, control, built, sha256, path.stat().st_size)


def _member(stream: io.BufferedReader) -> tuple[str, int, int]:
    header = stream.read(_AR_HEADER_BYTES)
    if len(header) != _AR_HEADER_BYTES or header[58:60] != b"`\n":
        raise ValueError("a member's header is damaged")
    return header[:16].decode("ascii").strip().rstrip("/"), int(header[16:28]), int(header[48:58])


def _control_text(member: str, data: bytes) -> str:
    if member == "control.tar.xz":
        data = lzma.decompress(data)
    elif member == "control.tar.gz":
        data = zlib.decompress(data, wbits=31)
    elif member != "control.tar":
        raise ValueError(f"its control member is {member}, which is not read here")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for name in ("./control", "control"):
            if name in archive.getnames():
                stream = archive.extractfile(name)
                if stream is not None:
                    return stream.read().decode("utf-8").strip() + "\n"
    raise ValueError("it has no control file")


def epoch_of(debs: Sequence[Deb]) -> int:
    """The build's epoch: when the newest of its packages was built. So the same packages always give the same epoch."""
    return max((deb.built for deb in debs), default=0)


def _pool_name(deb: Deb) -> str:
    # apt's names for cached files hold %3a for an epoch's colon, which a file: URL would decode.
    return deb.path.name.replace("%", "_")


def packages_text(debs: Sequence[Deb]) -> str:
    """The Packages index."""
    stanzas = [
        f"{deb.control}Filename: pool/{_pool_name(deb)}\nSize: {deb.size_bytes}\nSHA256: {deb.sha256}\n"
        for deb in sorted(debs, key=lambda deb: deb.path.name)
    ]
    return "\n".join(stanzas)


def release_text(suite: str, index: bytes, index_path: str, epoch: int) -> str:
    """The Release file. Unsigned: it never leaves the sandbox, and every package in it was verified."""
    return "\n".join(
        [
            "Origin: recvirt", f"Suite: {suite}", f"Codename: {suite}", f"Date: {formatdate(epoch, usegmt=True)}",
            "Architectures: amd64", "Components: main", "SHA256:",
            f" {hashlib.sha256(index).hexdigest()} {len(index)} {index_path}", "",
        ]
    )  # fmt: skip


def write_repo(folder: Path, debs: Sequence[Deb], suite: str) -> None:
    """Make ``folder`` the repository. The packages are hard links where the file system allows, else copies."""
    index_path = "main/binary-amd64/Packages"
    dist = folder / "dists" / suite
    (dist / index_path).parent.mkdir(parents=True)
    (folder / "pool").mkdir()
    for deb in debs:
        target = folder / "pool" / _pool_name(deb)
        try:
            os.link(deb.path, target)
        except OSError:
            shutil.copyfile(deb.path, target)
    index = packages_text(debs).encode()
    (dist / index_path).write_bytes(index)
    (dist / "Release").write_text(release_text(suite, index, index_path, epoch_of(debs)))


def source_line(suite: str) -> str:
    """The sources.list(5) line of the repository."""
    return f"deb [trusted=yes] file:{MOUNT_POINT} {suite} main"
