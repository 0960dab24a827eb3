"""A software bill of materials as SPDX 2.3 JSON. Pure functions: the same packages give the same bytes."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from recvirt import __version__
from recvirt.disk.packages import Package

_NOTHING = "NOASSERTION"
#: Packages of our own: they have no place in Debian's archive, so no Debian package URL.
_OWN = re.compile(r"^recvirt(-|$)")


@dataclass(frozen=True)
class Subject:
    """The image that the document is about."""

    name: str
    suite: str
    kernel_package: str  # the package of a kernel of our own; empty for Debian's
    epoch: int
    identifier: uuid.UUID
    sha256: str = ""


def is_own(package: Package, subject: Subject) -> bool:
    """Whether a package was built by recvirt."""
    return bool(_OWN.match(package.name)) or package.name == subject.kernel_package


def package_url(package: Package, suite: str) -> str:
    """The purl of a Debian package."""
    return (
        f"pkg:deb/debian/{quote(package.name, safe='')}@{quote(package.version, safe='')}"
        f"?arch={package.arch}&distro=debian-{suite}"
    )


def _package_entry(package: Package, subject: Subject) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "SPDXID": _identifier(package),
        "name": package.name,
        "versionInfo": package.version,
        "downloadLocation": _NOTHING,
        "filesAnalyzed": False,
        "licenseConcluded": _NOTHING,
        "licenseDeclared": _NOTHING,
        "copyrightText": _NOTHING,
        "comment": f"licence: /usr/share/doc/{package.name}/copyright in the image",
        "sourceInfo": f"built from the source package {package.source_name} {package.source_version}",
    }
    if is_own(package, subject):
        entry["supplier"] = "Organization: recvirt"
        return entry
    entry["supplier"] = "Organization: Debian"
    entry["externalRefs"] = [
        {
            "referenceCategory": "PACKAGE-MANAGER",
            "referenceType": "purl",
            "referenceLocator": package_url(package, subject.suite),
        }
    ]
    return entry


def _identifier(package: Package) -> str:
    # SPDX allows letters, digits, dots and hyphens.
    return "SPDXRef-Package-" + re.sub(r"[^A-Za-z0-9.-]", "-", f"{package.name}-{package.arch}")


def document(packages: Sequence[Package], subject: Subject) -> dict[str, Any]:
    """The whole document: the image, and everything that it contains."""
    image: dict[str, Any] = {
        "SPDXID": "SPDXRef-Image",
        "name": subject.name,
        "downloadLocation": _NOTHING,
        "filesAnalyzed": False,
        "licenseConcluded": _NOTHING,
        "licenseDeclared": _NOTHING,
        "copyrightText": _NOTHING,
        "primaryPackagePurpose": "OPERATING-SYSTEM",
    }
    if subject.sha256:
        image["checksums"] = [{"algorithm": "SHA256", "checksumValue": subject.sha256}]
    relations = [("SPDXRef-DOCUMENT", "DESCRIBES", "SPDXRef-Image")]
    relations += [("SPDXRef-Image", "CONTAINS", _identifier(package)) for package in packages]
    return {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": subject.name,
        "documentNamespace": f"urn:uuid:{subject.identifier}",
        "creationInfo": {
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(subject.epoch)),
            "creators": [f"Tool: recvirt-{__version__}"],
        },
        "packages": [image, *(_package_entry(package, subject) for package in packages)],
        "relationships": [
            {"spdxElementId": one, "relationshipType": kind, "relatedSpdxElement": other}
            for one, kind, other in relations
        ],
    }
