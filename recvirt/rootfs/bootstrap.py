"""Command lines of the bootstrappers. Both install from the pinned repository (``localrepo``) and need no network.

Owns: argv and the scripts that stand around them. Does not own: what is installed, or what happens afterwards.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from recvirt.rootfs.localrepo import MOUNT_POINT, source_line

#: Options for dpkg while building only: nobody needs a half-built tree after a power cut.
_UNSAFE = "force-unsafe-io"


def exclusions(dpkg_cfg: str) -> list[str]:
    """The path-exclude and path-include lines of a dpkg.cfg(5), in order (the last match decides)."""
    return [line for line in dpkg_cfg.splitlines() if line.startswith(("path-exclude=", "path-include="))]


def inside_namespace(argv: Sequence[str], repo: str) -> list[str]:
    """``argv``, run with the repository at its mount point. ``/run`` of the sandbox belongs to the sandbox alone."""
    script = f'ln -s "$1" {MOUNT_POINT}; shift; exec "$@"'
    return ["sh", "-euc", script, "sh", repo, *argv]


def mmdebstrap_argv(
    *, suite: str, names: Sequence[str], dpkg_cfg: str, scratch: str, tar_path: str, preseed_tar: str
) -> list[str]:
    """mmdebstrap(1): Essential packages, apt and ``names``, then the outside script, then a tar.

    ``preseed_tar`` holds files that maintainer scripts read, unpacked before any package.
    """
    mount = f'mkdir -p "$1"{MOUNT_POINT} && mount -o bind,ro {MOUNT_POINT}/ "$1"{MOUNT_POINT}'
    argv = ["mmdebstrap", "--mode=root", "--variant=apt", "--format=tar", "--architectures=amd64", "--verbose"]
    argv += ["--skip=check/signed-by,check/empty,cleanup/reproducible/machine-id"]
    argv += ['--aptopt=Acquire::Languages "none"', f"--dpkgopt={_UNSAFE}"]
    argv += [f"--dpkgopt={line}" for line in exclusions(dpkg_cfg)]
    if suite == "bookworm":
        # Later releases ship the merged layout inside base-files.
        argv += ["--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"]
    argv += [f"--setup-hook={mount}", f'--setup-hook=tar -x -C "$1" --keep-directory-symlink -f {shlex.quote(preseed_tar)}']
    argv += [f'--customize-hook=sh {shlex.quote(scratch)}/outside.sh "$1"']
    return [*argv, f"--include={','.join(names)}", suite, tar_path, source_line(suite)]


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
