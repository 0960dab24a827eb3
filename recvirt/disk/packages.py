"""The packages of an image, read from dpkg's status file. Pure functions.

Does not own: where the file comes from (a root archive, a sparse tree or an image file).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INSTALLED = "install ok installed"


@dataclass(frozen=True, order=True)
class Package:
    """One installed package. ``installed_kb`` is in KiB; ``source`` is dpkg's field: a name, maybe a (version)."""

    name: str
    arch: str
    version: str
    source: str
    installed_kb: int
    maintainer: str = ""
    section: str = ""

    @property
    def source_name(self) -> str:
        """The source package's name."""
        return self.source.split(" ")[0]

    @property
    def source_version(self) -> str:
        """The source package's version, which may differ from the binary's."""
        return self.source.partition("(")[2].rstrip(")") or self.version

    def as_json(self) -> dict[str, Any]:
        """The shape of packages.json: what the stage ``root`` writes too."""
        return {
            "name": self.name, "version": self.version, "arch": self.arch, "source": self.source_name,
            "source_version": self.source_version, "installed_kb": self.installed_kb,
        }  # fmt: skip


def parse_fields(text: str) -> list[dict[str, str]]:
    """The blocks of a control file; of fields that span lines only the first line is kept."""
    found = []
    for block in text.split("\n\n"):
        fields: dict[str, str] = {}
        for line in block.splitlines():
            if line[:1] not in (" ", "\t") and ":" in line:
                name, value = line.split(":", 1)
                fields[name] = value.strip()
        if fields:
            found.append(fields)
    return found


def parse_status(text: str) -> dict[str, dict[str, str]]:
    """dpkg's status file: ``package:arch`` -> its fields."""
    return {
        f"{fields['Package']}:{fields.get('Architecture', '')}": fields
        for fields in parse_fields(text)
        if "Package" in fields
    }


def installed(status: Iterable[dict[str, str]]) -> list[Package]:
    """The installed packages, sorted by name."""
    found = []
    for fields in status:
        if fields.get("Status") != INSTALLED:
            continue
        size = fields.get("Installed-Size", "0")
        found.append(
            Package(
                name=fields["Package"],
                arch=fields.get("Architecture", ""),
                version=fields.get("Version", ""),
                source=fields.get("Source", fields["Package"]),
                installed_kb=int(size) if size.isdigit() else 0,
                maintainer=fields.get("Maintainer", ""),
                section=fields.get("Section", ""),
            )
        )
    return sorted(found)


def owner_of(path: str, info_dir: Path) -> str:
    """The package that owns an absolute path, by dpkg's lists in ``info_dir``; the empty string when none does."""
    for listing in sorted(info_dir.glob("linux-image-*.list")) + sorted(info_dir.glob("*.list")):
        if path in listing.read_text(errors="replace").splitlines():
            return listing.stem.split(":")[0]
    return ""
