"""A small made-up root archive and kernel packages: enough for dpkg, the boot menu and the image stage."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

from recvirt.data import data_path
from recvirt.sandbox import ToolsRoot

EPOCH = 1_780_000_000
#: A capability in the form the kernel stores it (cap_net_raw+ep), as an extended attribute of a file.
CAPABILITY = b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
STATUS = """\
Package: base
Status: install ok installed
Architecture: amd64
Version: 1.0
Installed-Size: 10
Maintainer: Test <test@example.org>
Description: for tests

Package: recvirt-boot
Status: install ok installed
Architecture: all
Version: 0.1.0
Installed-Size: 20
Maintainer: Test <test@example.org>
Description: for tests
"""
_FOLDERS = (
    "boot", "boot/efi", "etc", "etc/dpkg", "etc/dpkg/dpkg.cfg.d", "usr", "usr/bin", "usr/lib", "usr/sbin", "usr/share",
    "var", "var/lib", "var/lib/dpkg", "var/lib/dpkg/alternatives", "var/lib/dpkg/info", "var/lib/dpkg/triggers",
    "var/lib/dpkg/updates", "home", "home/someone",
)  # fmt: skip


class RootArchive:
    """Writes a root archive member by member."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - closed in finish()

    def add(self, name: str, data: bytes = b"", *, mode: int = 0o644, owner: int = 0, **changes: object) -> None:
        info = tarfile.TarInfo(f"./{name}")
        info.size, info.mode, info.uid, info.gid, info.mtime = len(data), mode, owner, owner, EPOCH - 1000
        for field, value in changes.items():
            setattr(info, field, value)
        self._tar.addfile(info, io.BytesIO(data))

    def finish(self) -> Path:
        self._tar.close()
        return self.path


def make_root(folder: Path, *, boot_package: bool = True, filler_bytes: int = 0) -> Path:
    """``folder/root.tar``: merged /usr, a dpkg database, and files with everything that is easily lost."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = RootArchive(folder / "root.tar")
    archive.add("", type=tarfile.DIRTYPE, mode=0o755)
    for name in _FOLDERS:
        archive.add(name, type=tarfile.DIRTYPE, mode=0o755)
    for name in ("bin", "sbin", "lib"):
        archive.add(name, type=tarfile.SYMTYPE, linkname=f"usr/{name}", mode=0o777)
    texts = {
        "var/lib/dpkg/status": STATUS, "var/lib/dpkg/info/base.list": "/.\n/usr/bin/tool\n",
        "var/lib/dpkg/info/recvirt-boot.list": "/.\n/usr/sbin/recvirt-update-boot\n",
        "var/lib/dpkg/info/format": "1\n", "etc/passwd": "root:x:0:0::/root:/bin/sh\n", "etc/group": "root:x:0:\n",
        "usr/lib/os-release": 'PRETTY_NAME="Test GNU/Linux"\nVERSION_CODENAME=trixie\n',
        "etc/dpkg/dpkg.cfg.d/left-out": "path-exclude=/usr/share/doc/*\n",
    }  # fmt: skip
    for name, text in texts.items():
        archive.add(name, text.encode())
    archive.add("usr/bin/tool", b"tool" * 1000, mode=0o4755)
    archive.add("usr/bin/same-tool", type=tarfile.LNKTYPE, linkname="./usr/bin/tool", mode=0o4755)
    capability = CAPABILITY.decode("utf-8", "surrogateescape")
    archive.add("usr/bin/ping", b"ping", mode=0o755, pax_headers={"SCHILY.xattr.security.capability": capability})
    archive.add("home/someone/file", b"mine", mode=0o600, owner=1000)
    archive.add("home/someone/n\u00e4me", b"not ascii", owner=100000)
    archive.add("usr/share/filler", bytes(range(256)) * (filler_bytes // 256))
    if boot_package:
        script = data_path("packages", "recvirt-boot", "root", "usr", "sbin", "recvirt-update-boot")
        archive.add("usr/sbin/recvirt-update-boot", script.read_bytes(), mode=0o755)
    return archive.finish()


_SCRIPT = """#!/bin/sh
set -e
export DEB_MAINT_PARAMS="$*"
test -d /etc/kernel/{name}.d && run-parts --arg="{release}" --arg="/boot/vmlinuz-{release}" /etc/kernel/{name}.d
{more}
exit 0
"""


def make_kernel(
    folder: Path,
    tools: ToolsRoot,
    release: str = "6.12.1-test",
    *,
    vmlinuz: bytes = b"kernel",
    initrd: bytes = b"",
    postinst: str = "",
) -> Path:
    """``folder/linux-image.deb`` as the kernel's ``bindeb-pkg`` makes it, and ``build-info.json``."""
    tree = folder / "tree"
    modules = tree / f"lib/modules/{release}/kernel"
    for path in (tree / "DEBIAN", tree / "boot", modules, tree / f"usr/share/doc/linux-image-{release}"):
        path.mkdir(parents=True)
    (tree / f"boot/vmlinuz-{release}").write_bytes(vmlinuz)
    if initrd:
        (tree / f"boot/initrd.img-{release}").write_bytes(initrd)
    (tree / f"boot/config-{release}").write_text("CONFIG_KVM=m\n# CONFIG_DRM is not set\n")
    (modules / "kvm.ko").write_bytes(b"module")
    (tree / f"usr/share/doc/linux-image-{release}/changelog").write_text("left out\n")
    for name in ("preinst", "postinst", "prerm", "postrm"):
        script = tree / "DEBIAN" / name
        script.write_text(_SCRIPT.format(name=name, release=release, more=postinst if name == "postinst" else ""))
        script.chmod(0o755)
    (tree / "DEBIAN/control").write_text(
        f"Package: linux-image-{release}\nVersion: 1\nArchitecture: amd64\nMaintainer: Test <test@example.org>\n"
        f"Source: linux-upstream\nInstalled-Size: 100\nDescription: kernel for tests\n"
    )
    package = folder / "linux-image.deb"
    tools.run(
        ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(package)], writable=[folder],
        env={"SOURCE_DATE_EPOCH": str(EPOCH)},
    )  # fmt: skip
    shutil.rmtree(tree)
    (folder / "build-info.json").write_text(json.dumps({"source": "a test"}))
    return package
