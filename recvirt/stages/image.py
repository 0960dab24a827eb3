"""The stage ``image``: root archive + kernel package -> a disk that boots on BIOS and UEFI, in every format wanted.

No loop device, no mount, no root: partitions, boot code and filesystems are written into a plain file inside the tools
root. Everything random is derived from the inputs, so the same inputs give the same bytes.
Does not own: how each part is written (:mod:`recvirt.disk`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recvirt.disk import bootconf, formats, initramfs, packages, spdx
from recvirt.disk.bootcode import Loader
from recvirt.disk.convert import Converter
from recvirt.disk.facts import IN_IMAGE, Facts, as_json, sources_note
from recvirt.disk.kernelpkg import STATUS, SparseTree
from recvirt.disk.layout import Layout, derived_uuid, plan_layout
from recvirt.disk.rootfill import Filler
from recvirt.disk.tarmerge import Merge, TarIndex, changes_archive
from recvirt.errors import SpaceError, StageError
from recvirt.model import Profile, parse_size
from recvirt.stages.base import Context, Work
from recvirt.store import Upstream, canonical, sha256_of
from recvirt.ui import format_bytes, reporter

#: Packages of the tools root whose version may change the bytes.
_TOOLS = (
    "dpkg", "e2fsprogs", "libarchive13t64", "mtools", "dosfstools", "xfsprogs", "btrfs-progs", "qemu-utils", "libzstd1",
    "grub-common", "grub-pc-bin", "grub-efi-amd64-bin", "tar",
)  # fmt: skip


@dataclass(frozen=True)
class ImageInputs:
    """Everything that decides about the image's bytes."""

    profile: str
    suite: str
    root: Upstream
    kernel: Upstream | None
    guest_image: Upstream | None
    size_bytes: int
    esp_bytes: int
    filesystem: str
    initramfs: str
    formats: tuple[str, ...]
    boot_timeout: int
    cmdline: tuple[str, ...]
    tools: tuple[str, ...]

    @property
    def seed(self) -> str:
        """What the image's identifiers are derived from. The formats wanted don't matter to them."""
        picture = {name: value for name, value in canonical(self).items() if name != "formats"}
        return hashlib.sha256(json.dumps(picture, sort_keys=True).encode()).hexdigest()


class ImageStage:
    """The stage; see the module's words."""

    name = "image"
    revision = 1
    needs: tuple[str, ...] = ("root", "kernel_build", "guest_image")

    def inputs(self, profile: Profile, upstream: Mapping[str, str], context: Context) -> ImageInputs:
        """Frozen inputs. ConfigError for a command line or sizes that can't be."""
        image = profile.image
        inputs = ImageInputs(
            profile=profile.name,
            suite=profile.root.suite,
            root=Upstream("root", upstream["root"]),
            kernel=_upstream("kernel_build", upstream),
            guest_image=_upstream("guest_image", upstream),
            size_bytes=parse_size(image.size),
            esp_bytes=parse_size(image.esp_size),
            filesystem=image.filesystem,
            initramfs=image.initramfs,
            formats=tuple(sorted(set(image.formats))),
            boot_timeout=image.boot_timeout,
            cmdline=profile.kernel.cmdline,
            tools=context.tools.version_of(*_TOOLS),
        )
        plan_layout(inputs.size_bytes, inputs.esp_bytes, inputs.seed)
        return inputs

    def space_bytes(self, inputs: ImageInputs) -> int:
        """Room that a build wants, before the root's real size is known."""
        return formats.needed_bytes(min(inputs.size_bytes, 1_000_000_000), inputs.formats)

    def build(self, inputs: ImageInputs, work: Work) -> None:
        """Write the disk in its formats and what tells about it."""
        _Build(inputs, work).run()


def _upstream(stage: str, keys: Mapping[str, str]) -> Upstream | None:
    """The output of a stage that not every profile has."""
    return Upstream(stage, keys[stage]) if stage in keys else None


class _Build:
    """One build: the few values that its steps share."""

    def __init__(self, inputs: ImageInputs, work: Work) -> None:
        self.inputs = inputs
        self.work = work
        self.tools = work.context.tools
        self.layout: Layout = plan_layout(inputs.size_bytes, inputs.esp_bytes, inputs.seed)
        self.index = TarIndex.read(work.upstream_dirs["root"] / "root.tar")
        self.epoch = self.index.newest_mtime
        self.cmdline = bootconf.command_line(self.layout, inputs.filesystem, inputs.cmdline)
        self.tree = work.scratch / "kernel" / "tree"
        self.disk = work.scratch / "disk.raw"

    def run(self) -> None:
        """All steps, in order."""
        self._check_space()
        with reporter.step("install the kernel"):
            merge, facts = self._install_kernel()
        with reporter.step(f"fill the {self.inputs.filesystem} root"):
            with self.disk.open("wb") as stream:
                stream.truncate(self.layout.size_bytes)
            filler = Filler(self.disk, self.layout, self.tools, self.work.scratch, self.work.log, self.epoch)
            filler.fill(self.inputs.filesystem, merge)
        with reporter.step("write the boot code"):
            Loader(self.disk, self.layout, self.tools, self.work.scratch, self.work.log, self.epoch).write(
                self.tree / "boot/efi"
            )
        with reporter.step(f"write {', '.join(self.inputs.formats)}"):
            files = self._write_formats()
        self._write_facts(facts, files)

    def _check_space(self) -> None:
        needed = formats.needed_bytes(self.index.data_bytes, self.inputs.formats)
        free = shutil.disk_usage(self.work.scratch).free
        if free < needed:
            raise SpaceError(
                f"the image needs about {format_bytes(needed)}, {self.work.scratch} has {format_bytes(free)} free",
                hint="free some room (recvirt clean --dry-run shows what the cache holds) or set --cache-dir",
            )

    def _install_kernel(self) -> tuple[Merge, Facts]:
        """What becomes of the root archive, and the facts about it."""
        package = self._kernel_package()
        if package is not None and self.inputs.initramfs == "small":
            self.index = initramfs.install(self.index, package, self.work.scratch, self.tools, self.work.log)
            package = None
        sparse = SparseTree(self.tree, self.index, self.tools, self.work.log)
        sparse.unpack()
        before = sparse.snapshot()
        if package is not None:
            sparse.install(package)
        if self.inputs.guest_image is not None:
            sparse.install(self.work.upstream_dirs["guest_image"] / "recvirt-guest-image.deb")
        kernels = sparse.kernels()
        if not kernels:
            raise StageError("there is no kernel in /boot", hint="add one to the profile's packages, or build one")
        facts = self._facts(kernels[0])
        self._write_in_image(facts)
        sparse.update_boot("--set-good", kernels[0])
        changes = sparse.changes(before)
        archive = changes_archive(self.tree, changes.written, self.index, self.epoch)
        gone = {name for name in changes.written if not (self.tree / name).is_dir()} | set(changes.removed)
        return Merge(self.index, frozenset(gone), archive), facts

    def _kernel_package(self) -> Path | None:
        if self.inputs.kernel is None:
            return None
        return self.work.upstream_dirs["kernel_build"] / "linux-image.deb"

    def _facts(self, release: str) -> Facts:
        installed = packages.installed(packages.parse_status((self.tree / STATUS).read_text()).values())
        owner = packages.owner_of(f"/boot/vmlinuz-{release}", self.tree / "var/lib/dpkg/info")
        upstream = (self.inputs.root, self.inputs.kernel, self.inputs.guest_image)
        stages = {up.stage: up.key for up in upstream if up is not None}
        return Facts(
            profile=self.inputs.profile, suite=self.inputs.suite, filesystem=self.inputs.filesystem,
            initramfs="none" if not (self.tree / f"boot/initrd.img-{release}").exists() else "small",
            release=release, kernel_package=owner, cmdline=self.cmdline, epoch=self.epoch, stages=stages,
            tools=self.inputs.tools, layout=self.layout, packages=installed,
        )  # fmt: skip

    def _write_in_image(self, facts: Facts) -> None:
        for name, text in (
            ("etc/recvirt/boot.conf", bootconf.boot_conf(self.cmdline, self.inputs.boot_timeout)),
            (IN_IMAGE, as_json(facts.as_json())),
        ):
            path = self.tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (self.tree / "boot/efi/recvirt").mkdir(parents=True, exist_ok=True)

    def _write_formats(self) -> list[Path]:
        converter = Converter(
            self.disk, self.layout, self.work.out, self.work.scratch, self.tools, self.work.log,
            name=f"recvirt-{self.inputs.profile}", product=f"Debian {self.inputs.suite}, recvirt", epoch=self.epoch,
        )  # fmt: skip
        return converter.write(self.inputs.formats)

    def _write_facts(self, facts: Facts, files: list[Path]) -> None:
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(sha256_of, files))
        told: dict[str, dict[str, Any]] = {
            path.name: {"format": name, "bytes": path.stat().st_size, "sha256": digest}
            for name, path, digest in zip(self.inputs.formats, files, digests, strict=True)
        }
        # One digest names the image; of several formats that which most people use.
        named = next((path for path in files if path.suffix == ".qcow2"), files[0])
        subject = spdx.Subject(
            name=f"recvirt-{facts.profile}", suite=facts.suite, epoch=facts.epoch,
            kernel_package=facts.kernel_package if self.inputs.kernel is not None else "",
            identifier=derived_uuid(self.inputs.seed, "sbom"), sha256=told[named.name]["sha256"],
        )  # fmt: skip
        info = None
        if self.inputs.kernel is not None:
            info = json.loads((self.work.upstream_dirs["kernel_build"] / "build-info.json").read_text())
        texts = {
            "image.json": as_json({**facts.as_json(), "files": told}),
            "packages.json": as_json([package.as_json() for package in facts.packages]),
            "sbom.json": as_json(spdx.document(facts.packages, subject)),
            "sources.txt": sources_note(facts, info, self.index.by_name),
        }
        for name, text in texts.items():
            (self.work.out / name).write_text(text)
