"""Small Debian binary packages, written without dpkg-deb (deb(5))."""

from __future__ import annotations

import io
import tarfile


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def control_text(name: str, version: str, *, arch: str = "all", depends: str = "", essential: bool = False) -> str:
    """The control file of a package."""
    fields = [
        f"Package: {name}", f"Version: {version}", f"Architecture: {arch}", "Maintainer: Test <test@example.org>",
        "Section: misc", "Priority: optional", "Description: for tests",
    ]  # fmt: skip
    if depends:
        fields.append(f"Depends: {depends}")
    if essential:
        fields.append("Essential: yes")
    return "\n".join(fields) + "\n"


def make_deb(control: str, files: dict[str, bytes]) -> bytes:
    """The bytes of a .deb."""
    out = b"!<arch>\n"
    members = (
        ("debian-binary", b"2.0\n"),
        ("control.tar.gz", _tar({"control": control.encode()})),
        ("data.tar.gz", _tar(files)),
    )
    for name, content in members:
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        out += b"\n" * (len(content) % 2)
    return out
