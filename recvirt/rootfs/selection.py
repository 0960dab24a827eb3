"""Which packages a profile asks for, and of which archive: its lists, its own names, and what its other keys imply."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from recvirt.archive import Archive
from recvirt.data import data_path
from recvirt.errors import Problem
from recvirt.model import Profile, Root
from recvirt.sandbox import ToolsRoot

#: Without these the tree is no machine: what the inside script and the boot rely on, and the list that brings it.
_BASICS = {
    "systemd-sysv": "base", "udev": "base", "passwd": "base", "iproute2": "base", "openssh-server": "base",
    "systemd-resolved": "base", "tzdata": "base",
}  # fmt: skip
_FILESYSTEM_PACKAGES = {"ext4": "e2fsprogs", "xfs": "xfsprogs", "btrfs": "btrfs-progs"}
#: Our own packages that every image has; the others go where a profile names them.
ALWAYS = ("recvirt-boot", "recvirt-nested-check")
_DEPENDS = re.compile(r"^(?:Pre-)?Depends:(?P<value>.*(?:\n[ \t].*)*)", re.MULTILINE)


def archive_of(root: Root, tools: ToolsRoot, cache_dir: Path, *, offline: bool) -> Archive:
    """The archive that a root section names."""
    return Archive(
        tools, cache_dir, suite=root.suite, mirror=root.mirror, components=root.components, snapshot=root.snapshot,
        snapshot_mirror=root.snapshot_mirror, keyring=Path(root.keyring) if root.keyring else None, offline=offline,
    )  # fmt: skip


def packages_wanted(
    profile: Profile, listed: Sequence[str], ours: Collection[str], ours_depend_on: Sequence[str]
) -> tuple[str, ...]:
    """The archive's packages to install, sorted. ``ours`` are the image's own, which come from elsewhere;
    ``ours_depend_on`` is what those depend on.
    """
    root = profile.root
    names = {"apt", *listed, *root.packages, *ours_depend_on, _FILESYSTEM_PACKAGES[profile.image.filesystem]}
    names -= set(ours)
    if root.locale.split(".")[0] not in ("C", "POSIX"):
        names.add("locales")
    if root.unattended_upgrades:
        names.add("unattended-upgrades")
    if any(user.sudo for user in root.users):
        names.add("sudo")
    if root.suite == "bookworm":
        # The other way to satisfy init-system-helpers converts the tree with perl, and stays.
        names.add("usr-is-merged")
    if profile.kernel.source == "debian":
        names |= {profile.kernel.debian_package, "initramfs-tools"}
    return tuple(sorted(names))


def own_packages(names: Iterable[str]) -> frozenset[str]:
    """Which packages of ours an image gets that asks for these names, with those of ours that they depend on."""
    folder = data_path("packages")
    ours = {path.parent.name for path in folder.glob("*/DEBIAN")}
    wanted = ours & {*ALWAYS, *names}
    while more := (ours & _depends(folder, wanted)) - wanted:
        wanted |= more
    return frozenset(wanted)


def _depends(folder: Path, packages: Iterable[str]) -> set[str]:
    names = set()
    for control in (folder / package / "DEBIAN/control" for package in packages):
        for match in _DEPENDS.finditer(control.read_text()):
            for clause in match["value"].replace("\n", " ").split(","):
                names.add(re.split(r"[\s(|:\[]", clause.strip(), maxsplit=1)[0])
    return names - {""}


def depends_of(folder: Path, packages: Collection[str]) -> tuple[str, ...]:
    """What these package folders below ``folder`` depend on, but for each other: the first of alternatives, without
    versions.
    """
    return tuple(sorted(_depends(folder, packages) - {path.name for path in folder.iterdir()}))


def missing_basics(profile: Profile, installed: frozenset[str]) -> list[Problem]:
    """What a profile promises or needs, but its packages don't bring."""
    file = f"profile {profile.name}"
    faults = [
        Problem(file, 0, "root.package_lists", f"nothing brings {name}: add the list {source}")
        for name, source in _BASICS.items()
        if name not in installed
    ]
    if profile.root.locale.startswith(("C.", "POSIX.")) and profile.root.locale != "C.UTF-8":
        faults.append(Problem(file, 0, "root.locale", f"{profile.root.locale} does not exist: C.UTF-8 does"))
    if profile.root.nfs is not None and "nfs-common" not in installed:
        faults.append(Problem(file, 0, "root.nfs", "nothing brings nfs-common: add the list nfs"))
    return faults
