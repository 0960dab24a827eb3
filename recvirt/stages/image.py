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
from typing import Any

from recvirt.disk import bootconf, filesystem, formats, gpt, grub
from recvirt.disk.kernelpkg import SparseTree
from recvirt.disk.layout import Layout, plan_layout
from recvirt.disk.tarmerge import TarIndex, changes_archive, write_merged
from recvirt.errors import SpaceError, StageError
from recvirt.model import Profile, parse_size
from recvirt.stages.base import Context, Work
from recvirt.store import Upstream, canonical
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
    needs = ("root", "kernel_build")

    def inputs(self, profile: Profile, upstream: Mapping[str, str], context: Context) -> ImageInputs:
        """Frozen inputs. ConfigError for a command line or sizes that can't be."""
        image = profile.image
        inputs = ImageInputs(
            profile=profile.name,
            suite=profile.root.suite,
            root=Upstream("root", upstream["root"]),
            kernel=Upstream("kernel_build", upstream["kernel_build"]) if "kernel_build" in upstream else None,
            size_bytes=parse_size(image.size),
            esp_bytes=parse_size(image.esp_size),
            filesystem=image.filesystem,
            initramfs=image.initramfs,
            formats=tuple(sorted(set(image.formats))),
            boot_timeout=image.boot_timeout,
            cmdline=bootconf.check_words(profile.kernel.cmdline),
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
        self.release = ""

    def run(self) -> None:
        """All steps, in order."""
        self._check_space()
        with reporter.step("install the kernel"):
            dropped, changes = self._install_kernel()
        with reporter.step(f"fill the {self.inputs.filesystem} root"):
            self._make_disk()
            self._fill_root(dropped, changes)
        with reporter.step("write the boot code"):
            self._write_boot_code()
        with reporter.step(f"write {', '.join(self.inputs.formats)}"):
            self._write_formats()

    def _check_space(self) -> None:
        needed = formats.needed_bytes(self.index.data_bytes, self.inputs.formats)
        free = shutil.disk_usage(self.work.scratch).free
        if free < needed:
            raise SpaceError(
                f"the image needs about {format_bytes(needed)}, {self.work.scratch} has {format_bytes(free)} free",
                hint="free some room (recvirt clean --dry-run shows what the cache holds) or set --cache-dir",
            )

    def _install_kernel(self) -> tuple[set[str], bytes]:
        """The names that the root archive loses and the archive of what it gains."""
        sparse = SparseTree(self.tree, self.index, self.tools, self.work.log)
        sparse.unpack()
        before = sparse.snapshot()
        if self.inputs.kernel is not None:
            sparse.install(self.work.upstream_dirs["kernel_build"] / "linux-image.deb")
        kernels = sparse.kernels()
        if not kernels:
            raise StageError("there is no kernel in /boot", hint="add one to the profile's packages, or build one")
        self.release = kernels[0]
        conf = self.tree / "etc/recvirt/boot.conf"
        conf.parent.mkdir(parents=True, exist_ok=True)
        conf.write_text(bootconf.boot_conf(self.cmdline, self.inputs.boot_timeout))
        (self.tree / "boot/efi/recvirt").mkdir(parents=True, exist_ok=True)
        sparse.update_boot("--set-good", self.release)
        changes = sparse.changes(before)
        archive = changes_archive(self.tree, changes.written, self.index, self.epoch)
        gone = {name for name in changes.written if not (self.tree / name).is_dir()} | set(changes.removed)
        return gone, archive

    def _make_disk(self) -> None:
        with self.disk.open("wb") as stream:
            stream.truncate(self.layout.size_bytes)

    def _fill_root(self, dropped: set[str], changes: bytes) -> None:
        self.tools.run(
            filesystem.mkfs_ext4_argv(self.disk, self.layout, "-"),
            writable=[self.work.scratch], log_path=self.work.log, env={"SOURCE_DATE_EPOCH": str(self.epoch)},
            feed=lambda stream: write_merged(self.index, dropped, changes, stream),
        )  # fmt: skip

    def _write_boot_code(self) -> None:
        core, loader = self.work.scratch / "core.img", self.work.scratch / "BOOTX64.EFI"
        for target, output in (("i386-pc", core), ("x86_64-efi", loader)):
            self._run(grub.mkimage_argv(target, output))
        esp = self.tree / "boot/efi"
        (esp / "EFI/BOOT").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(loader, esp / "EFI/BOOT/BOOTX64.EFI")
        self._run(filesystem.mkfs_esp_argv(self.disk, self.layout))
        self._run(filesystem.copy_to_esp_argv(self.disk, self.layout, sorted(esp.iterdir())))
        boot_image = (self.tools.rootfs / "usr/lib/grub/i386-pc/boot.img").read_bytes()
        with self.disk.open("r+b") as stream:
            gpt.write_table(stream, self.layout, grub.boot_code(boot_image, self.layout.bios.first_lba))
            grub.write_core(stream, self.layout, core.read_bytes())

    def _run(self, argv: list[str]) -> None:
        env = {"SOURCE_DATE_EPOCH": str(self.epoch), "TZ": "UTC", "MTOOLS_SKIP_CHECK": "1"}
        self.tools.run(argv, writable=[self.work.scratch, self.work.out], log_path=self.work.log, env=env)

    def _write_formats(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._write_format, self.inputs.formats))

    def _write_format(self, name: str) -> None:
        output = self.work.out / formats.FILE_NAMES[name]
        if name == "qcow2":
            self._run(formats.qcow2_argv(self.disk, output, self.work.context.jobs))


def as_json(value: Any) -> str:
    """JSON as all our files have it."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"
