"""The Debian package that carries the finished image into a cloud's image. Pure functions.

Does not own: how it is packed (``stages/guest_image.py``), nor who reads it (``recvirt.nestedcloud``, which the builder
never imports: folder and facts are a format between the two).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from recvirt import __version__

NAME = "recvirt-guest-image"
#: What people call the image, and where a cloud looks for such.
IMAGE = "recvirt-guest"
FOLDER = "usr/share/recvirt-cloud/images"
_CONTROL = """\
Package: {name}
Version: {version}
Architecture: all
Maintainer: The recvirt developers <recvirt@localhost>
Installed-Size: {installed_kb}
Section: misc
Priority: optional
Description: tiny guest image for the Nested Cloud
 A disk image of {megabytes} MB with a kernel, busybox and an SSH server, so that a
 cloud can start its first virtual machine without a network.
"""
_COPYRIGHT = """\
This image was built by recvirt from these parts:

Linux {kernel} (GPL-2 with the syscall note), built from {source};
its configuration lies beside it in the image's /boot;
GRUB (GPL-3+), from the Debian packages {grub};
and Debian packages of the suite {suite}. Each is under the licences in its
copyright file, which the image has below /usr/share/doc:

{packages}

The source of a Debian package: on a Debian system with a deb-src line for
{suite}, apt-get source --only-source SOURCE=VERSION. The texts of common licences
are in /usr/share/common-licenses.
"""


@dataclass(frozen=True)
class Facts:
    """What is told about the image; the file itself says the rest. ``parts`` are lines for people."""

    kernel: str
    source: str
    suite: str
    epoch: int
    grub: tuple[str, ...]
    parts: tuple[str, ...]

    @property
    def version(self) -> str:
        """Sorts by our version, the kernel's, and the day of the newest part."""
        return f"{__version__}+{self.kernel}+{time.strftime('%Y%m%d', time.gmtime(self.epoch))}"


def facts_json(facts: Facts, *, sha256: str, size_bytes: int, virtual_bytes: int) -> str:
    """``recvirt-guest.json``, beside the image."""
    told = {
        "format": 1, "name": IMAGE, "file": f"{IMAGE}.qcow2", "disk_format": "qcow2", "version": facts.version,
        "sha256": sha256, "bytes": size_bytes, "virtual_bytes": virtual_bytes, "kernel": facts.kernel,
    }  # fmt: skip
    return json.dumps(told, indent=1, sort_keys=True) + "\n"


def control_text(facts: Facts, installed_kb: int, size_bytes: int) -> str:
    """``DEBIAN/control`` (deb-control(5))."""
    return _CONTROL.format(
        name=NAME, version=facts.version, installed_kb=installed_kb, megabytes=round(size_bytes / 1_000_000)
    )


def copyright_text(facts: Facts) -> str:
    """Licences and where the sources are."""
    return _COPYRIGHT.format(
        kernel=facts.kernel, source=facts.source, suite=facts.suite, grub=", ".join(facts.grub),
        packages=_indented(facts.parts),
    )  # fmt: skip


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)
