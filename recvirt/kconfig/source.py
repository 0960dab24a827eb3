"""Kernel sources: what identifies them, and the unpacked copy that the kernel stages share.

Three kinds: a Debian ``linux-source-*`` package (verified through apt), a release tarball (verified by digest, and by a
signature over the uncompressed tar when one is given), and a local tree or git checkout. A source is unpacked and
patched once, below ``sources/<digest>/``: ``tree/`` and, last, ``source.json``. A killed run leaves nothing that
looks whole.
Does not own: archives (:mod:`recvirt.archive`), downloads (:mod:`recvirt.kconfig.tarball`), the look at a local tree
(:mod:`recvirt.kconfig.localtree`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from recvirt.apt import Package
from recvirt.archive import Archive
from recvirt.errors import CommandError, StageError
from recvirt.kconfig import localtree, tarball
from recvirt.kconfig.symbols import kernel_version
from recvirt.sandbox import ToolsRoot
from recvirt.store import FileRef, remove_tree
from recvirt.ui import reporter

#: Raised when unpacking or patching changes what a tree holds.
REVISION = 1
#: The time of a tree that has none of its own: any fixed moment in the past serves.
DEFAULT_EPOCH = 1_577_836_800  # 2020-01-01 00:00 UTC
#: An unpacked kernel, generously.
UNPACKED_BYTES = 2_000_000_000

Kind = Literal["package", "tarball", "tree"]


@dataclass(frozen=True)
class Where:
    """How to get at a source. Not part of any key: the content's digest is."""

    archive: Archive | None = None
    package: Package | None = None
    url: str = ""
    signature_url: str = ""
    tree: Path | None = None


@dataclass(frozen=True)
class Source:
    """A source, pinned by what it holds. ``label`` names it for people; ``version`` is a Debian version, or empty."""

    kind: Kind
    label: str
    digest: str
    version: str = ""
    patches: tuple[FileRef, ...] = ()
    keyring: FileRef | None = None
    where: Where = field(default=Where(), compare=False, metadata={"key": False})

    @property
    def key(self) -> str:
        """Names the unpacked copy: content, patches in order, and how they are put together."""
        parts = [str(REVISION), self.kind, self.digest, *(patch.sha256 for patch in self.patches)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Unpacked:
    """A source on disk. ``epoch`` (seconds) is the source's own time: the build's timestamps are made of it."""

    tree: Path
    version: str  # as the Makefile says it: 6.12.117, 7.4.0-rc1
    epoch: int

    @classmethod
    def read(cls, folder: Path) -> Unpacked | None:
        """The whole copy in ``folder``, or None."""
        try:
            facts = json.loads((folder / "source.json").read_text())
            os.utime(folder / "source.json")  # used now: recvirt clean goes by it
            return cls(folder / "tree", str(facts["version"]), int(facts["epoch"]))
        except (OSError, ValueError, KeyError):
            return None


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reporter.info(f"waiting for another recvirt that unpacks {what}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def ensure_source(source: Source, tools: ToolsRoot, cache_dir: Path, log: Path, *, offline: bool = False) -> Unpacked:
    """The unpacked, patched source: reused, or fetched, verified, unpacked and patched now."""
    folder = cache_dir / "sources" / source.key
    if (found := Unpacked.read(folder)) is not None:
        return found
    with _locked(cache_dir / "sources" / f"{source.key}.lock", source.label):
        if (found := Unpacked.read(folder)) is not None:
            return found
        partial = folder.with_name(f"{source.key}.part")
        for leftover in (partial, folder):
            if leftover.exists():
                remove_tree(leftover)
        (partial / "tree").mkdir(parents=True)
        try:
            with reporter.step(f"kernel source: {source.label}"):
                _fill(source, tools, cache_dir, partial, log, offline)
            partial.rename(folder)
        except BaseException:
            remove_tree(partial)
            raise
    whole = Unpacked.read(folder)
    assert whole is not None
    return whole


def _fill(source: Source, tools: ToolsRoot, cache_dir: Path, partial: Path, log: Path, offline: bool) -> None:
    tree = partial / "tree"
    if source.kind == "package":
        _unpack_package(source, tools, tree, log)
    elif source.kind == "tarball":
        path = tarball.fetch(source.where.url, source.digest, cache_dir / "downloads", offline=offline)
        if source.keyring is not None:
            signature = tarball.fetch_signature(source.where.signature_url, cache_dir / "downloads", offline=offline)
            tarball.verify_signature(tools, path, signature, source.keyring.path, partial)
        tarball.unpack(tools, path, tree, log)
    else:
        assert source.where.tree is not None
        localtree.copy(tools, source.where.tree, tree, source.digest, log)
    for patch in source.patches:
        apply_patch(tools, patch, tree, log)
    version, _ = kernel_version(tree)
    epoch = localtree.epoch_of(tools, source.where.tree) if source.where.tree else _makefile_epoch(tree)
    (partial / "source.json").write_text(
        json.dumps({"version": version, "epoch": epoch, "label": source.label, "digest": source.digest})
    )


def _makefile_epoch(tree: Path) -> int:
    # Patches touch what they change, never this: a release sets its version before it is packed.
    seconds = int((tree / "Makefile").stat().st_mtime)
    return seconds if seconds > 0 else DEFAULT_EPOCH


def _unpack_package(source: Source, tools: ToolsRoot, tree: Path, log: Path) -> None:
    archive, package = source.where.archive, source.where.package
    assert archive is not None and package is not None
    deb = archive.download(package)
    # linux-source-6.12 holds usr/src/linux-source-6.12.tar.xz with one folder at its top.
    inner = f"./usr/src/{package.name}.tar.xz"
    script = (
        'set -o pipefail; dpkg-deb --fsys-tarfile "$1" | tar -xO "$3" | xz -dc -T2 | '
        'tar -x --strip-components=1 --no-same-owner -C "$2" -f -'
    )
    tools.run(
        ["bash", "-c", script, "bash", str(deb), str(tree), inner], readable=[deb], writable=[tree], log_path=log,
        hint=f"{package.name} should hold {inner}: kernel.package.package names a linux-source-* package",
    )  # fmt: skip


def apply_patch(tools: ToolsRoot, patch: FileRef, tree: Path, log: Path) -> None:
    """Apply one patch (``-p1``, no fuzz). Raises StageError naming it."""
    try:
        tools.run(
            ["patch", "-p1", "--batch", "--forward", "--fuzz=0", "--no-backup-if-mismatch", "-i", str(patch.path)],
            readable=[patch.path], writable=[tree], cwd=tree, log_path=log,
        )  # fmt: skip
    except CommandError as error:
        raise StageError(
            f"{patch.name} does not apply to this kernel\n{error.message}",
            hint="make it anew against this version (kernel.patches are applied in order, -p1)",
        ) from error
