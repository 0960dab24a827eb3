"""The Debian package of a built kernel: names, control file, maintainer scripts. Pure functions.

Like the packages of ``make bindeb-pkg`` it runs the hooks in ``/etc/kernel``; unlike them it needs no debhelper,
carries what depmod(8) makes, and can be installed into a tree from outside (``dpkg --root``, also without chroot),
where the hooks of the machine that does it must not run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from recvirt.errors import StageError

#: Raised when the package changes while the kernel does not: it is the last part of the version.
REVISION = 1
_RELEASE = re.compile(r"^[0-9][A-Za-z0-9.+~-]{2,63}$")  # uname(2): 64 characters
_CANDIDATE = re.compile(r"-rc(\d+)$")

_CONTROL = """\
Package: {package}
Version: {version}
Architecture: {arch}
Maintainer: The recvirt developers <recvirt@localhost>
Installed-Size: {installed_kb}
Provides: linux-image, linux-image-recvirt, wireguard-modules (= 1.0.0)
Suggests: initramfs-tools | dracut
Section: kernel
Priority: optional
Description: Linux {kernel_version} for VMs that are hypervisors
 A kernel with KVM, nested VMX and SVM, the drivers of the common clouds, and
 everything for the root disk built in, so that it boots without an initramfs.
 .
 Built from {source}.
"""

_SCRIPT = """\
#!/bin/sh
set -e
# Installed into a tree from outside: whoever does that looks after its boot.
[ -z "$DPKG_ROOT" ] || exit 0
export DEB_MAINT_PARAMS="$*"
for folder in /usr/share/kernel/{name}.d /etc/kernel/{name}.d; do
    [ ! -d "$folder" ] || run-parts --report --exit-on-error --arg={release} --arg=/boot/vmlinuz-{release} "$folder"
done
"""

_POSTRM_TAIL = """\
# depmod run by somebody else (DKMS) leaves files that dpkg does not know.
if [ "$1" = remove ] || [ "$1" = purge ]; then
    rm -f /usr/lib/modules/{release}/modules.*
    rmdir --ignore-fail-on-non-empty /usr/lib/modules/{release} 2>/dev/null || true
fi
"""

_COPYRIGHT = """\
This is Linux {kernel_version}, built by recvirt.

Source: {source}
{patches}
The source of this very kernel can be had from there; the configuration is
/boot/config-{release}.

Copyright (C) 1991-2026 Linus Torvalds and many others.

This package is free software; you can redistribute it and/or modify it under
the terms of the GNU General Public License as published by the Free Software
Foundation; version 2 dated June, 1991, with the Linux syscall note.

On Debian systems the text of the license is in /usr/share/common-licenses/GPL-2.
"""


def checked_release(release: str) -> str:
    """A release string that is safe in scripts and paths; StageError for another one."""
    if not _RELEASE.match(release):
        raise StageError(f"{release!r} can't be a kernel release", hint="kernel.localversion, or the tree's Makefile")
    return release


def package_name(release: str) -> str:
    """``linux-image-<uname -r>``, the name that apt protects from autoremoval and tools look for."""
    return f"linux-image-{release.lower()}"


def package_version(source_version: str, kernel_version: str) -> str:
    """The package's version: sorts by the source's, then by how we package. ``source_version`` is Debian's, or
    empty."""
    base = source_version or _CANDIDATE.sub(r"~rc\1", kernel_version) + "-0"
    return f"{base}+recvirt{REVISION}"


def control_text(
    *, release: str, version: str, kernel_version: str, installed_kb: int, source: str, arch: str = "amd64"
) -> str:
    """``DEBIAN/control`` (deb-control(5))."""
    return _CONTROL.format(
        package=package_name(release), version=version, arch=arch, installed_kb=installed_kb,
        kernel_version=kernel_version, source=source.replace("\n", " "),
    )  # fmt: skip


def maintainer_scripts(release: str) -> dict[str, str]:
    """The four maintainer scripts by name."""
    checked_release(release)
    names = ("preinst", "postinst", "prerm", "postrm")
    scripts = {name: _SCRIPT.format(name=name, release=release) for name in names}
    scripts["postrm"] += _POSTRM_TAIL.format(release=release)
    return scripts


def copyright_text(*, release: str, kernel_version: str, source: str, patches: Mapping[str, str]) -> str:
    """The copyright file; ``patches`` maps a patch's name to its SHA-256."""
    lines = [f"Patch: {name} (sha256 {digest})" for name, digest in patches.items()]
    return _COPYRIGHT.format(
        release=release, kernel_version=kernel_version, source=source, patches="\n".join(lines) + "\n" if lines else ""
    )


def md5sums_text(root: Path) -> str:
    """``DEBIAN/md5sums`` for the files below ``root`` (without ``DEBIAN``), as ``dpkg --verify`` reads it."""
    lines = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not path.is_symlink() and not name.startswith("DEBIAN/"):
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False))
            lines.append(f"{digest.hexdigest()}  {name}\n")
    return "".join(lines)


def installed_kb(root: Path) -> int:
    """The Installed-Size of a tree: each file rounded up to a KiB, each folder one (deb-substvars(5))."""
    total = 0
    for path in root.rglob("*"):
        if "DEBIAN" in path.relative_to(root).parts[:1]:
            continue
        total += -(-path.stat().st_size // 1024) if path.is_file() and not path.is_symlink() else 1
    return total
