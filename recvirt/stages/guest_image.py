"""The stage ``guest_image``: a small disk image that boots by itself, for the Nested Cloud's first launch.

The kernel is the profile's own; everything else comes from a few Debian packages of its suite and from
``resources/guest``. Written like an image's disk, without loop device, mount or root; the same inputs give the same
bytes. Outputs: ``recvirt-guest.qcow2``, ``recvirt-guest.json``, and both as ``recvirt-guest-image.deb``.
Does not own: what is in the tree (:mod:`recvirt.tinyguest`), or where the package goes (``stages/image.py``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recvirt import __version__
from recvirt.archive import Package
from recvirt.data import data_path
from recvirt.disk import bootconf, formats
from recvirt.disk.bootcode import Loader
from recvirt.disk.layout import MIB, Layout, plan_layout
from recvirt.disk.packages import installed
from recvirt.disk.rootfill import Filler
from recvirt.disk.tarmerge import Merge, TarIndex
from recvirt.kconfig.debpackage import installed_kb, md5sums_text
from recvirt.kconfig.dotconfig import parse_dotconfig
from recvirt.model import Profile, Root
from recvirt.rootfs.localrepo import Deb, epoch_of, read_deb
from recvirt.rootfs.selection import archive_of
from recvirt.stages.base import Context, Work
from recvirt.store import FileRef, Upstream, canonical, sha256_of
from recvirt.tinyguest import modules, package
from recvirt.tinyguest.programs import (
    PACKAGES,
    Linked,
    Unpacked,
    add_copyrights,
    add_programs,
    parse_readelf,
    unpack,
)
from recvirt.tinyguest.tree import Tree, add_applets, add_own_files, as_os_release, grub_cfg, read_own_files
from recvirt.ui import format_bytes, reporter

#: An instance gets a larger disk, and the root grows: this is what an image takes that nobody has used.
SIZE_BYTES, ESP_BYTES = 256 * MIB, 10 * MIB
_CMDLINE = (
    # Memory that is added is used at once, whatever a kernel's own choice is.
    "memhp_default_state=online",
    # Without KVM a guest's timer may come too late for the check that a kernel makes of it, and the kernel would panic.
    "no_timer_check",
    # resize2fs opens a mounted file system's device for writing, which a hardened kernel refuses otherwise.
    "bdev_allow_write_mounted=1",
)
_TOOLS = (
    "dpkg", "e2fsprogs", "libarchive13t64", "mtools", "dosfstools", "qemu-utils", "libzstd1", "grub-common",
    "grub-pc-bin", "grub-efi-amd64-bin", "kmod", "zstd", "tar",
)  # fmt: skip


@dataclass(frozen=True)
class GuestImageInputs:
    """Everything that decides about the image's bytes."""

    suite: str
    version: str
    kernel: Upstream
    files: tuple[FileRef, ...]
    pins: tuple[str, ...]
    tools: tuple[str, ...]
    # Where the pinned packages come from says nothing about what they are.
    packages: tuple[Package, ...] = field(metadata={"key": False}, repr=False)
    root: Root = field(metadata={"key": False}, repr=False)

    @property
    def seed(self) -> str:
        """What the image's identifiers are derived from."""
        return hashlib.sha256(json.dumps(canonical(self), sort_keys=True).encode()).hexdigest()


class GuestImage:
    """The stage; see the module's words."""

    name = "guest_image"
    revision = 1
    needs: tuple[str, ...] = ("kernel_build",)

    def inputs(self, profile: Profile, upstream: Mapping[str, str], context: Context) -> GuestImageInputs:
        """The kernel's key, the pinned packages of the suite, and our files."""
        archive = archive_of(profile.root, context.tools, context.cache_dir, offline=context.offline)
        packages = archive.resolve(PACKAGES)
        return GuestImageInputs(
            suite=profile.root.suite,
            version=__version__,
            kernel=Upstream("kernel_build", upstream["kernel_build"]),
            files=read_own_files(data_path("guest")),
            pins=tuple(package.pin for package in packages),
            tools=context.tools.version_of(*_TOOLS),
            packages=packages,
            root=profile.root,
        )

    def space_bytes(self, inputs: GuestImageInputs) -> int:
        """Room for the packages, unpacked and packed, and the disk in its forms."""
        return 8 * sum(package.size_bytes for package in inputs.packages) + SIZE_BYTES

    def build(self, inputs: GuestImageInputs, work: Work) -> None:
        """Write the image and its package."""
        _Build(inputs, work).run()


class _Build:
    """One build: the few values that its steps share."""

    def __init__(self, inputs: GuestImageInputs, work: Work) -> None:
        self.inputs = inputs
        self.work = work
        self.tools = work.context.tools
        self.kernel_dir = work.upstream_dirs["kernel_build"]
        self.release = (self.kernel_dir / "release").read_text().strip()
        self.layout: Layout = plan_layout(SIZE_BYTES, ESP_BYTES, inputs.seed)
        self.disk = work.scratch / "disk.raw"
        self.epoch = 0

    def run(self) -> None:
        """All steps, in order."""
        wanted = modules.modules_wanted(parse_dotconfig((self.kernel_dir / "config").read_text(encoding="utf-8")))
        debs = self._fetch()
        self.epoch = epoch_of(debs)
        unpacked = unpack(
            self.tools, {deb.control_field("Package"): deb.path for deb in debs}, self.work.scratch / "debs",
            self.work.log,
        )  # fmt: skip
        tree = self._tree(unpacked)
        self._add_kernel(tree, wanted)
        with reporter.step("fill the guest's disk"):
            self._write_disk(tree)
        self._write_package(self._facts(debs, unpacked.used))

    def _fetch(self) -> list[Deb]:
        context = self.work.context
        archive = archive_of(self.inputs.root, context.tools, context.cache_dir, offline=context.offline)
        paths = archive.download_all(self.inputs.packages)
        return [read_deb(path, item.sha256) for path, item in zip(paths, self.inputs.packages, strict=True)]

    def _tree(self, unpacked: Unpacked) -> Tree:
        tree = Tree.skeleton()
        add_programs(tree, unpacked, self._linked)
        add_own_files(tree, self.inputs.files)
        # The guest's own list: another suite's busybox has other commands.
        busybox = unpacked.get("usr/bin/busybox")
        add_applets(tree, self.tools.run([str(busybox), "--list-full"], readable=[busybox]).stdout)
        add_copyrights(tree, unpacked)
        pretty = f"recvirt guest {__version__} (busybox of Debian {self.inputs.suite})"
        names = {"ID": "recvirt-guest", "NAME": "recvirt guest", "VERSION_ID": __version__, "PRETTY_NAME": pretty}
        tree.file("etc/os-release", as_os_release(names).encode())
        return tree

    def _linked(self, path: Path) -> Linked:
        return parse_readelf(self.tools.run(["readelf", "-dlW", str(path)], readable=[path]).stdout)

    def _add_kernel(self, tree: Tree, wanted: tuple[str, ...]) -> None:
        tree.file(f"boot/vmlinuz-{self.release}", (self.kernel_dir / "vmlinuz").read_bytes())
        tree.file(f"boot/config-{self.release}", (self.kernel_dir / "config").read_bytes())
        deb, folder = self.kernel_dir / "linux-image.deb", self.work.scratch / "kernel"
        folder.mkdir()
        self.tools.run(
            ["dpkg-deb", "--extract", str(deb), str(folder)], readable=[deb], writable=[folder], log_path=self.work.log
        )
        doc = f"usr/share/doc/linux-image-{self.release}/copyright"
        tree.file(doc, (folder / doc).read_bytes())
        source, base = folder / f"usr/lib/modules/{self.release}", self.work.scratch / "modules"
        target = base / f"lib/modules/{self.release}"
        for name in modules.closure((source / "modules.dep").read_text(), wanted):
            plain = target / f"{name.split('.ko')[0]}.ko"
            plain.parent.mkdir(parents=True, exist_ok=True)
            self._run(modules.unpack_argv(str(source / name), str(plain)))
        for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
            (target / name).write_bytes((source / name).read_bytes())
        self._run(["depmod", "--basedir", str(base), self.release])
        for path in sorted(target.rglob("*")):
            # The indexes in text are busybox's; those in binary are kmod's.
            if path.is_file() and path.suffix not in (".bin", ".modinfo"):
                tree.file(f"usr/{path.relative_to(base).as_posix()}", path.read_bytes())

    def _write_disk(self, tree: Tree) -> None:
        cmdline = bootconf.command_line(self.layout, "ext4", _CMDLINE)
        tree.file("boot/grub/grub.cfg", grub_cfg(self.release, cmdline).encode())
        archive = self.work.scratch / "root.tar"
        tree.write(archive, self.epoch)
        with self.disk.open("wb") as stream:
            stream.truncate(self.layout.size_bytes)
        filler = Filler(self.disk, self.layout, self.tools, self.work.scratch, self.work.log, self.epoch)
        filler.fill("ext4", Merge(TarIndex.read(archive), frozenset(), b""))
        loader = Loader(self.disk, self.layout, self.tools, self.work.scratch, self.work.log, self.epoch)
        esp = self.work.scratch / "esp"
        esp.mkdir()
        loader.write(esp)
        self._run(formats.qcow2_argv(self.disk, self.image), self.work.out)

    @property
    def image(self) -> Path:
        """The finished image."""
        return self.work.out / f"{package.IMAGE}.qcow2"

    def _facts(self, debs: list[Deb], used: set[str]) -> package.Facts:
        fields = [{name: deb.control_field(name) for name in ("Package", "Version", "Source")} for deb in debs]
        known = installed(
            {**item, "Source": item["Source"] or item["Package"], "Status": "install ok installed"} for item in fields
        )
        info = json.loads((self.kernel_dir / "build-info.json").read_text())
        return package.Facts(
            kernel=info["kernel_version"], source=info["source"], suite=self.inputs.suite, epoch=self.epoch,
            grub=tuple(tool for tool in self.inputs.tools if tool.startswith("grub-")),
            parts=tuple(
                f"{item.name} {item.version} (source {item.source_name} {item.source_version})"
                for item in known
                if item.name in used
            ),
        )  # fmt: skip

    def _write_package(self, facts: package.Facts) -> None:
        size, root = self.image.stat().st_size, self.work.scratch / "package"
        told = package.facts_json(
            facts, sha256=sha256_of(self.image), size_bytes=size, virtual_bytes=self.layout.size_bytes
        )
        (self.work.out / f"{package.IMAGE}.json").write_text(told)
        files = {
            f"{package.FOLDER}/{self.image.name}": self.image.read_bytes(),
            f"{package.FOLDER}/{package.IMAGE}.json": told.encode(),
            f"usr/share/doc/{package.NAME}/copyright": package.copyright_text(facts).encode(),
        }
        for name, data in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (root / "DEBIAN").mkdir()
        (root / "DEBIAN/control").write_text(package.control_text(facts, installed_kb(root), size))
        (root / "DEBIAN/md5sums").write_text(md5sums_text(root))
        for path in (root, *root.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        # The image is compressed already.
        deb = self.work.out / f"{package.NAME}.deb"
        self._run(["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(root), str(deb)], self.work.out)
        reporter.info(f"{package.IMAGE} {facts.version}: {format_bytes(size)}")

    def _run(self, argv: list[str], *writable: Path) -> None:
        env = {"SOURCE_DATE_EPOCH": str(self.epoch), "TZ": "UTC"}
        self.tools.run(argv, writable=[self.work.scratch, *writable], log_path=self.work.log, env=env)
