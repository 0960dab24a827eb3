"""What is told about an image: its facts, and where its sources and licences are. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recvirt import __version__
from recvirt.disk.layout import Layout
from recvirt.disk.packages import Package

#: Where an image keeps its own facts.
IN_IMAGE = "usr/lib/recvirt/image.json"


def as_json(value: Any) -> str:
    """JSON as all our files have it."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Facts:
    """An image's facts before its files exist."""

    profile: str
    suite: str
    filesystem: str
    initramfs: str
    release: str
    kernel_package: str
    cmdline: str
    epoch: int
    stages: Mapping[str, str]
    tools: Sequence[str]
    layout: Layout
    packages: Sequence[Package]

    def as_json(self) -> dict[str, Any]:
        """What the image itself carries; image.json adds the files."""
        layout = self.layout
        return {
            "recvirt": __version__,
            "profile": self.profile,
            "suite": self.suite,
            "stages": dict(self.stages),
            "tools": list(self.tools),
            "epoch": self.epoch,
            "kernel": {"release": self.release, "package": self.kernel_package, "cmdline": self.cmdline},
            "initramfs": self.initramfs,
            "filesystem": self.filesystem,
            "root_fs_uuid": str(layout.root_fs_uuid),
            "virtual_bytes": layout.size_bytes,
            "disk_uuid": str(layout.disk_uuid),
            "boot": ["bios", "uefi"],
            "partitions": [
                {
                    "number": part.number,
                    "name": part.name,
                    "type": str(part.type_uuid),
                    "uuid": str(part.part_uuid),
                    "offset_bytes": part.offset_bytes,
                    "size_bytes": part.size_bytes,
                }
                for part in layout.partitions
            ],
            "packages": len(self.packages),
            "installed_kb": sum(package.installed_kb for package in self.packages),
        }


_NOTE = """Sources and licences of the image '{profile}'
{line}

This image holds {count} Debian packages of the suite {suite}, each under the licence in its copyright file
(in the image: /usr/share/doc/PACKAGE/copyright; the texts of common licences: /usr/share/common-licenses).

Sources of a Debian package: on a Debian system with a deb-src line for {suite},
    apt-get source --only-source SOURCE=VERSION
with the source name and version below.
{kernel}
Boot loader: GRUB, GPL-3+, built into /EFI/BOOT/BOOTX64.EFI and the BIOS boot partition from the Debian packages
{grub}

Package, version, source package, source version, copyright file:
"""


def sources_note(facts: Facts, build_info: Mapping[str, Any] | None, copyright_files: Collection[str]) -> str:
    """The text that accompanies an image: where the sources are, and each package's copyright file."""
    kernel = "\nThe kernel is Debian's own package; its source is listed with the others.\n"
    if build_info is not None:
        told = "\n".join(f"    {name}: {json.dumps(value)}" for name, value in sorted(build_info.items()))
        kernel = f"\nThe kernel {facts.release} (GPL-2.0, syscall note) was built by recvirt, from this:\n{told}\n"
    title = f"Sources and licences of the image '{facts.profile}'"
    head = _NOTE.format(
        profile=facts.profile, line="=" * len(title), count=len(facts.packages), suite=facts.suite, kernel=kernel,
        grub="    " + "\n    ".join(tool for tool in facts.tools if tool.startswith("grub-")),
    )  # fmt: skip
    lines = []
    for package in facts.packages:
        path = f"usr/share/doc/{package.name}/copyright"
        shown = f"/{path}" if path in copyright_files else f"see the source package {package.source_name}"
        lines.append(f"{package.name} {package.version} {package.source_name} {package.source_version} {shown}")
    return head + "\n".join(lines) + "\n"
