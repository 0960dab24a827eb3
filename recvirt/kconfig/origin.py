"""From a profile's ``kernel`` to the source that it names, pinned: the archive is asked, files and trees are hashed."""

from __future__ import annotations

from pathlib import Path

from recvirt.archive import Archive
from recvirt.errors import ConfigError
from recvirt.kconfig import localtree
from recvirt.kconfig.source import Source, Where
from recvirt.model import Kernel, Profile
from recvirt.stages.base import Context
from recvirt.store import FileRef


def archive_for(profile: Profile, suite: str, context: Context) -> Archive:
    """The archive that kernel packages of ``suite`` come from: the root's own where it is the same release, so that a
    mirror or a snapshot of the profile counts for the kernel too; else the default one."""
    root = profile.root
    if suite.removesuffix("-backports") != root.suite:
        return Archive(context.tools, context.cache_dir, suite=suite, offline=context.offline)
    return Archive(
        context.tools, context.cache_dir, suite=suite, mirror=root.mirror, snapshot=root.snapshot,
        snapshot_mirror=root.snapshot_mirror, keyring=Path(root.keyring) if root.keyring else None,
        offline=context.offline,
    )  # fmt: skip


def source_of(profile: Profile, context: Context) -> Source:
    """The source of a kernel that is built. Raises ConfigError (missing file, no such package) and what apt says."""
    kernel = profile.kernel
    patches = tuple(_file_ref(path, "kernel.patches") for path in kernel.patches)
    if kernel.source == "tarball" and kernel.tarball is not None:
        return _tarball(kernel, patches)
    if kernel.source == "tree" and kernel.tree is not None:
        tree = Path(kernel.tree).resolve()
        digest, label = localtree.digest_of(context.tools, tree)
        return Source("tree", label, digest, patches=patches, where=Where(tree=tree))
    if kernel.source != "package":
        raise ConfigError(f"kernel.source is {kernel.source}, which names no source to build")
    archive = archive_for(profile, kernel.package.suite, context)
    package = archive.find(kernel.package.package)
    return Source(
        "package", f"{package.name} {package.version}", package.sha256, package.version, patches,
        where=Where(archive=archive, package=package),
    )  # fmt: skip


def _tarball(kernel: Kernel, patches: tuple[FileRef, ...]) -> Source:
    assert kernel.tarball is not None
    pinned = kernel.tarball
    keyring = _file_ref(pinned.keyring, "kernel.tarball.keyring") if pinned.keyring else None
    where = Where(url=pinned.url, signature_url=pinned.signature_url or "")
    label = pinned.url.rsplit("/", 1)[-1]
    return Source("tarball", label, pinned.sha256, patches=patches, keyring=keyring, where=where)


def _file_ref(path: str, key: str) -> FileRef:
    try:
        return FileRef.of(Path(path))
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}", hint=f"{key} names it") from error
