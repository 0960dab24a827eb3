"""Debian's stock kernels: finding the image package behind a metapackage, and its configuration."""

from __future__ import annotations

import base64
import lzma
import re
from pathlib import Path

from recvirt.apt import Package
from recvirt.archive import Archive
from recvirt.errors import ConfigError
from recvirt.sandbox import ToolsRoot

_IMAGE = re.compile(r"^linux-image-(?P<release>\d.*)$")


def image_package(archive: Archive, name: str) -> Package:
    """The package that holds the kernel which ``name`` (``linux-image-cloud-amd64`` ...) installs."""
    found = [package for package in archive.resolve([name]) if _IMAGE.match(package.name)]
    if len(found) != 1:
        raise ConfigError(
            f"{name} brings {len(found)} kernels where one is wanted",
            hint="kernel.debian_package: linux-image-cloud-amd64",
        )
    return found[0]


def release_of(package: Package) -> str:
    """``uname -r`` of the kernel in an image package."""
    match = _IMAGE.match(package.name)
    if match is None:
        raise ConfigError(f"{package.name} is no kernel image package")
    return match["release"].removesuffix("-unsigned")


def config_text(tools: ToolsRoot, deb: Path, member: str) -> str:
    """The text of one file in a package (``./boot/config-...``; ``.xz`` is undone). Raises CommandError if it is not
    there."""
    script = 'set -o pipefail; dpkg-deb --fsys-tarfile "$1" | tar -xO "$2" | base64 -w0'
    data = base64.b64decode(tools.run(["bash", "-c", script, "bash", str(deb), member], readable=[deb]).stdout)
    if member.endswith(".xz"):
        data = lzma.decompress(data)
    return data.decode("utf-8")
