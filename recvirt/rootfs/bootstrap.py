"""Command lines of the bootstrappers. Both install from the pinned repository (``localrepo``) and need no network.

Owns: argv and the scripts that stand around them. Does not own: what is installed, or what happens afterwards.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from recvirt.rootfs.localrepo import MOUNT_POINT, source_line

#: Options for dpkg while building only: nobody needs a half-built tree after a power cut.
_UNSAFE = "force-unsafe-io"


def prune_command(dpkg_cfg: str, tree: str) -> str:
    """A shell command that removes what the policy excludes from ``tree`` (a shell word).

    For the Essential set alone, which is unpacked with tar before dpkg works: dpkg applies its own configuration to all
    else. find(1) and dpkg match alike (``*`` crosses slashes). dpkg lets the last match decide; in our policy an
    include always overrides, and follows its exclude.
    """
    gone, kept = [], []
    for line in dpkg_cfg.splitlines():
        name, _, pattern = line.partition("=")
        if name == "path-exclude":
            gone.append(f"-path {tree}{shlex.quote(pattern)}")
        elif name == "path-include":
            kept.append(f"-path {tree}{shlex.quote(pattern)}")
            # dpkg keeps folders and links below which an included file may lie.
            kept.append(f"! -type f -path {tree}{shlex.quote(pattern.rpartition('/')[0])}")
    if not gone:
        return ":"
    spare = f" ! \\( {' -o '.join(kept)} \\)" if kept else ""
    return f"find {tree}/usr/share -depth \\( {' -o '.join(gone)} \\){spare} \\( ! -type d -o -empty \\) -delete"


def inside_namespace(argv: Sequence[str], repo: str) -> list[str]:
    """``argv``, run with the repository at its mount point. ``/run`` of the sandbox belongs to the sandbox alone."""
    script = f'ln -s "$1" {MOUNT_POINT}; shift; exec "$@"'
    return ["sh", "-euc", script, "sh", repo, *argv]


def mmdebstrap_argv(
    *, suite: str, names: Sequence[str], dpkg_cfg: str, scratch: str, tar_path: str, preseed_tar: str
) -> list[str]:
    """mmdebstrap(1): Essential packages, apt and ``names``, then the outside script, then a tar.

    ``preseed_tar`` holds files that dpkg and maintainer scripts read, unpacked before any package. dpkg's policy comes
    with it, not by --dpkgopt: mmdebstrap would start a filter program for each package that it unpacks.
    """
    mount = f'mkdir -p "$1"{MOUNT_POINT} && mount -o bind,ro {MOUNT_POINT}/ "$1"{MOUNT_POINT}'
    argv = ["mmdebstrap", "--mode=root", "--variant=apt", "--format=tar", "--architectures=amd64", "--verbose"]
    # The cleanup script has done what is skipped here; apt's own leaves folders whose owner depends on where TMPDIR is.
    argv += ["--skip=check/signed-by,check/empty,cleanup/apt,cleanup/reproducible/machine-id"]
    argv += ['--aptopt=Acquire::Languages "none"', f"--dpkgopt={_UNSAFE}"]
    tree = '"$1"'
    if suite == "bookworm":
        # Later releases ship the merged layout inside base-files.
        argv += ["--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"]
    argv += [
        f"--setup-hook={mount}",
        f'--setup-hook=tar -x -C "$1" --keep-directory-symlink -f {shlex.quote(preseed_tar)}',
    ]
    argv += [f"--extract-hook={prune_command(dpkg_cfg, tree)}"]
    argv += [f'--customize-hook=sh {shlex.quote(scratch)}/outside.sh "$1"']
    return [*argv, f"--include={','.join(names)}", suite, tar_path, source_line(suite)]


def debootstrap_script(
    *, suite: str, names: Sequence[str], dpkg_cfg: str, scratch: str, tar_path: str, preseed_tar: str, epoch: int
) -> str:
    """A script that does with debootstrap(8), apt and tar what :func:`mmdebstrap_argv` asks of mmdebstrap."""
    at, target = shlex.quote(scratch), shlex.quote(tar_path)
    packages = " ".join(shlex.quote(name) for name in names)
    return f"""#!/bin/sh
set -eu
tree=$(mktemp -d "$TMPDIR/tree.XXXXXX")
chmod 755 "$tree"
mounted=
put_away() {{
    for place in $mounted; do umount -R -l "$tree/$place" || :; done
    rm -rf --one-file-system "$tree"
}}
trap put_away EXIT

tar -x -C "$tree" -f {shlex.quote(preseed_tar)}
echo {_UNSAFE} > "$tree/etc/dpkg/dpkg.cfg.d/99mmdebstrap"
debootstrap --variant=minbase --no-check-gpg {shlex.quote(suite)} "$tree" file:{MOUNT_POINT}
# It unpacks without dpkg at first, so that manual pages and links to them come along.
{prune_command(dpkg_cfg, '"$tree"')}
chroot "$tree" find /etc/alternatives -xtype l -delete

for place in proc sys dev; do
    # debootstrap may have left a mount of its own.
    umount -R -l "$tree/$place" 2>/dev/null || :
done
mount -t proc proc "$tree/proc"; mounted="proc"
mount -t sysfs sysfs "$tree/sys" && mounted="sys $mounted" || :
mount --rbind /dev "$tree/dev"; mounted="dev $mounted"
mkdir -p "$tree{MOUNT_POINT}"
mount -o bind,ro {MOUNT_POINT}/ "$tree{MOUNT_POINT}"

echo {shlex.quote(source_line(suite))} > "$tree/etc/apt/sources.list"
rm -f "$tree"/etc/apt/sources.list.d/*
printf '#!/bin/sh\nexit 101\n' > "$tree/usr/sbin/policy-rc.d"
chmod 755 "$tree/usr/sbin/policy-rc.d"
chroot "$tree" apt-get -qq -o 'Acquire::Languages=none' update
chroot "$tree" apt-get -y --no-install-recommends install {packages}
rm "$tree/usr/sbin/policy-rc.d"

sh {at}/outside.sh "$tree"
for place in $mounted; do umount -R -l "$tree/$place"; done
mounted=
rm -rf "$tree"/dev/* "$tree"/run/* "$tree"/debootstrap
mkdir -m 1777 "$tree/run/lock"
tar -C "$tree" --sort=name --mtime=@{epoch} --clamp-mtime --numeric-owner --one-file-system --format=pax \
    --pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime -cf {target} .
tar --concatenate --file={target} {at}/devices.tar
"""


class ConfiguredCounter:
    """Counts dpkg's "Setting up" lines and shows them as progress."""

    def __init__(self, total: int, show: Callable[[str, float, float | None, str], None]) -> None:
        self.total = total
        self.done = 0
        self._show = show

    def __call__(self, line: str) -> None:
        """One line of the bootstrapper's log."""
        if line.startswith("Setting up "):
            self.done += 1
            self._show("install", min(self.done, self.total), self.total, "packages")
