"""Installs the kernel's package inside the whole root, so that the image's own initramfs-tools make an initrd.

The tree lives in memory inside the sandbox and vanishes with it; what became different comes out as an archive.
"""

from __future__ import annotations

from pathlib import Path

from recvirt.disk.rootfill import check_memory
from recvirt.disk.tarmerge import Merge, TarIndex
from recvirt.errors import ConfigError
from recvirt.sandbox import ToolsRoot

TOOL = "usr/sbin/update-initramfs"

#: Words: root archive, package, folder for the results, epoch.
_SCRIPT = """set -eu
tree=/tmp/tree
mkdir $tree
# Device nodes can't be made in a user namespace; the sandbox's own are bound instead.
tar --extract --file="$1" --directory=$tree --numeric-owner --same-permissions --xattrs --xattrs-include='*' \\
    --exclude='./dev/*'
cd $tree
find . -xdev -mindepth 1 -print0 | LC_ALL=C sort -z >/tmp/before
touch /tmp/stamp
# Coarse file times must not hide a change.
sleep 0.05
mkdir -p proc dev
mount --rbind /proc proc
mount --rbind /dev dev
cp "$2" tmp/kernel.deb
chroot $tree env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 HOME=/root DEBIAN_FRONTEND=noninteractive \\
    SOURCE_DATE_EPOCH="$4" dpkg --force-unsafe-io --log=/dev/null --install /tmp/kernel.deb
rm tmp/kernel.deb
umount -l proc dev
rm -f var/lib/dpkg/lock var/lib/dpkg/lock-frontend var/lib/dpkg/triggers/Lock var/lib/dpkg/*-old
rm -rf tmp/* var/tmp/* var/cache/ldconfig/aux-cache
find . -xdev -mindepth 1 -print0 | LC_ALL=C sort -z >/tmp/after
LC_ALL=C comm -z -23 /tmp/before /tmp/after >"$3/removed"
LC_ALL=C comm -z -13 /tmp/before /tmp/after >/tmp/added
find . -xdev -mindepth 1 ! -type d -cnewer /tmp/stamp -print0 | LC_ALL=C sort -z >/tmp/changed
LC_ALL=C sort -z -u /tmp/added /tmp/changed >/tmp/names
tar --create --file="$3/changes.tar" --format=pax --pax-option=delete=atime,delete=ctime --numeric-owner --xattrs \\
    --no-recursion --null --verbatim-files-from --files-from=/tmp/names --mtime="@$4" --clamp-mtime
"""


def install_argv(root_tar: Path, package: Path, output: Path, epoch: int) -> list[str]:
    """The script that installs ``package`` and leaves ``changes.tar`` and ``removed`` in ``output``."""
    return ["sh", "-c", _SCRIPT, "install-kernel", str(root_tar), str(package), str(output), str(epoch)]


def check_tool(index: TarIndex) -> None:
    """ConfigError when the root can't make an initramfs."""
    if TOOL not in index.by_name:
        raise ConfigError(
            "image.initramfs is small, but the root has no update-initramfs",
            hint="add initramfs-tools to the profile's packages",
        )


def install(index: TarIndex, package: Path, scratch: Path, tools: ToolsRoot, log: Path) -> TarIndex:
    """A new root archive that holds the kernel, its initrd and what dpkg knows about both."""
    check_tool(index)
    check_memory(index.data_bytes + 3 * package.stat().st_size)
    folder = scratch / "initramfs"
    folder.mkdir()
    tools.run(
        install_argv(index.path, package, folder, index.newest_mtime), writable=[folder],
        readable=[index.path, package], all_ids=True, log_path=log,
    )  # fmt: skip
    changes = TarIndex.read(folder / "changes.tar")
    removed = [name for name in (folder / "removed").read_bytes().decode().split("\0") if name]
    gone = {name.removeprefix("./") for name in removed}
    gone |= {member.name for member in changes.members if not member.info.isdir()}
    merged = folder / "root.tar"
    with merged.open("wb") as stream:
        Merge(index, frozenset(gone), changes.path.read_bytes()).write(stream)
    return TarIndex.read(merged)
