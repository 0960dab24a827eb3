"""mkosi, set up to build what a profile of ours builds: the same suite, packages and kernel into a bootable disk.

Owns: mkosi's configuration and command line. It runs in a tools root of its own, with the workspace on disk (its
default) or on a tmpfs. In mkosi's favour: no documentation (our images have none either), its packages cached, no
network, and a raw disk is enough (ours is also compressed to qcow2).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recvirt.sandbox import ToolsRoot
from recvirt.store import remove_tree

#: What mkosi's own boot loader needs inside the image; it has no say in what is compared.
BOOT_PACKAGES = ("systemd-boot",)
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


@dataclass(frozen=True)
class Setup:
    """One comparison: what to install, and the folder that everything of mkosi's lies in."""

    folder: Path
    suite: str
    packages: tuple[str, ...]
    kernel_package: str
    kernel_deb: Path | None = None  # None: the package comes from the archive

    def part(self, name: str) -> Path:
        """A folder of the setup."""
        return self.folder / name


def conf_text(setup: Setup, *, workspace: Path, cache_only: bool, manifest: bool) -> str:
    """mkosi.conf (mkosi(1)). Everything that isn't named keeps mkosi's default."""
    packages = sorted({*setup.packages, setup.kernel_package, *BOOT_PACKAGES})
    lines = [
        "[Distribution]", "Distribution=debian", f"Release={setup.suite}",
        "[Output]", "Format=disk", "Output=image", f"OutputDirectory={setup.part('out')}",
        *(["ManifestFormat=json"] if manifest else []),
        "[Content]", "Bootable=yes", "WithDocs=no", "Packages=", *(f"    {name}" for name in packages),
        *([f"PackageDirectories={setup.part('kernel')}"] if setup.kernel_deb else []),
        "[Build]", f"PackageCacheDirectory={setup.part('packages')}", f"WorkspaceDirectory={workspace}",
        f"CacheOnly={'always' if cache_only else 'auto'}", f"SandboxTrees={setup.part('sandbox')}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def sources_text(lines: Sequence[str]) -> str:
    """A sources file in deb822 format for the one-line sources ``lines`` (sources.list(5)).

    mkosi's own list adds source packages and the archive of debugging symbols, which nothing here needs.
    """
    stanzas = []
    for line in lines:
        words = line.split()
        if words and words[0] == "deb":
            uri, suite, *components = [
                word for word in words[1:] if not word.startswith("[") and not word.endswith("]")
            ]
            stanzas.append(
                f"Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: {' '.join(components)}\nSigned-By: {KEYRING}\n"
            )
    return "\n".join(stanzas)


def prepare(setup: Setup, tools: ToolsRoot) -> None:
    """Lay out the setup's folders."""
    for name in ("out", "packages", "workspace", "kernel", "src", "sandbox/etc/apt/sources.list.d"):
        setup.part(name).mkdir(parents=True, exist_ok=True)
    for old in setup.part("kernel").iterdir():
        old.unlink()
    if setup.kernel_deb is not None:
        shutil.copyfile(setup.kernel_deb, setup.part("kernel") / f"{setup.kernel_package}_1_amd64.deb")
    lines = (tools.rootfs / "etc/apt/sources.list").read_text().splitlines()
    (setup.part("sandbox") / "etc/apt/sources.list.d/mkosi.sources").write_text(sources_text(lines))


def build_argv(
    setup: Setup, tools: ToolsRoot, *, in_memory: bool, cache_only: bool, manifest: bool = False
) -> list[str]:
    """The host command that builds the image. Writes mkosi.conf."""
    # The sandbox's /tmp is a tmpfs of half the memory. One bind for all else, so that mkosi can rename, not copy.
    workspace = Path("/tmp") if in_memory else setup.part("workspace")
    conf = conf_text(setup, workspace=workspace, cache_only=cache_only, manifest=manifest)
    (setup.part("src") / "mkosi.conf").write_text(conf)
    return tools.argv(
        ["mkosi", "--force", "build"],
        writable=[setup.folder],
        cwd=setup.part("src"),
        network=not cache_only,
        all_ids=True,
    )


def clear(setup: Setup) -> None:
    """Remove what a run made; the package cache stays."""
    for name in ("out", "workspace"):
        remove_tree(setup.part(name))
        setup.part(name).mkdir()


def installed(setup: Setup) -> dict[str, str]:
    """Package to version in the image built last, from its manifest (built with ``manifest``)."""
    manifest = json.loads((setup.part("out") / "image.manifest").read_text())
    return {item["name"]: item["version"] for item in manifest["packages"] if item["type"] == "deb"}
