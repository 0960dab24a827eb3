"""The root stage: a Debian tree with its packages, users and configuration, as a tar whose bytes repeat.

The packages are resolved, verified and pinned first (``archive``); the bootstrapper then installs exactly those from a
repository of their own, without network. Owns the order of the work and the checks of its result. Does not own: the
texts (``rootfs/``), partitions, file systems, kernels of our own, the boot menu (the image stage).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recvirt import __version__
from recvirt.archive import Archive, Package, sources_lines
from recvirt.data import data_path, package_list_path
from recvirt.errors import ConfigError, StageError
from recvirt.model import Profile, Root
from recvirt.rootfs import bootstrap, localrepo, script
from recvirt.rootfs.files import IMAGE_KEYRING, Facts, TreeFile, image_sources, render_files
from recvirt.rootfs.lists import read_lists
from recvirt.rootfs.memory import SANDBOX_TMP, workspace
from recvirt.rootfs.overlay import Overlay, read_overlay, write_devices_tar, write_files_tar, write_overlay_tar
from recvirt.rootfs.selection import archive_of, depends_of, missing_basics, own_packages, packages_wanted
from recvirt.stages.base import Context, Work
from recvirt.store import FileRef, Upstream
from recvirt.ui import format_bytes, reporter

_TOOLS = ("mmdebstrap", "debootstrap", "apt", "dpkg", "tar", "coreutils", "perl-base")
#: Unpacked before any package, because dpkg and maintainer scripts read them.
_PRESEED = (
    "etc/initramfs-tools/conf.d/recvirt", "etc/dpkg/dpkg.cfg.d/recvirt",
    "etc/postgresql-common/createcluster.d/recvirt.conf",
)  # fmt: skip
#: A .deb's installed size, roughly; and room for what configuring makes.
_UNPACKED_RATIO = 4.5


@dataclass(frozen=True)
class HookRef:
    """One hook of the profile, frozen."""

    where: str
    file: FileRef


@dataclass(frozen=True)
class RootInputs:
    """Everything that decides about the tree."""

    suite: str
    bootstrapper: str
    names: tuple[str, ...]
    pins: tuple[str, ...]
    files: tuple[TreeFile, ...]
    inside: str
    overlays: tuple[Overlay, ...]
    hooks: tuple[HookRef, ...]
    keyring: FileRef | None
    guest_debs: Upstream
    tools: tuple[str, ...]
    # Where the pinned packages come from says nothing about what they are.
    packages: tuple[Package, ...] = field(metadata={"key": False}, repr=False)
    root: Root = field(metadata={"key": False}, repr=False)


class RootStage:
    """The stage: ``root.tar`` (numeric owners, uncompressed) and ``packages.json``."""

    name = "root"
    revision = 1
    needs: tuple[str, ...] = ("guest_debs",)

    def inputs(self, profile: Profile, upstream: Mapping[str, str], context: Context) -> RootInputs:
        """Resolve the packages and render everything. Raises ConfigError with all faults found."""
        root = profile.root
        listed = read_lists([package_list_path(name) for name in root.package_lists], root.suite)
        ours = own_packages([*listed, *root.packages])
        names = packages_wanted(profile, listed, ours, depends_of(data_path("packages"), ours))
        archive = archive_of(root, context.tools, context.cache_dir, offline=context.offline)
        packages = archive.resolve(names, essential=True)
        installed = frozenset(package.name for package in packages)
        if faults := missing_basics(profile, installed):
            raise ConfigError(faults)
        keyring = FileRef.of(Path(root.keyring)) if root.keyring else None
        facts = make_facts(profile, installed, context, len(packages))
        files = render_files(facts, data_path("templates", "root"))
        if keyring and any(IMAGE_KEYRING in line for line in facts.sources):
            files += (TreeFile.of(IMAGE_KEYRING.lstrip("/"), keyring.path.read_bytes()),)
        return RootInputs(
            suite=root.suite,
            bootstrapper=root.bootstrapper,
            names=names,
            pins=tuple(package.pin for package in packages),
            files=files,
            inside=script.inside_script(facts, [file.path for file in files]),
            overlays=tuple(read_overlay(Path(folder)) for folder in root.overlays),
            hooks=tuple(HookRef(hook.where, FileRef.of(Path(hook.path))) for hook in root.hooks),
            keyring=keyring,
            guest_debs=Upstream("guest_debs", upstream["guest_debs"]),
            tools=context.tools.version_of(*_TOOLS),
            packages=packages,
            root=root,
        )

    def space_bytes(self, inputs: RootInputs) -> int:
        """Room on the cache's disk: the packages, the tar, and a tree when memory is too small for it."""
        size = sum(package.size_bytes for package in inputs.packages)
        return int(size * (1 + 2 * _UNPACKED_RATIO))

    def build(self, inputs: RootInputs, work: Work) -> None:
        """Write ``root.tar`` and ``packages.json``."""
        context = work.context
        archive = archive_of(inputs.root, context.tools, context.cache_dir, offline=context.offline)
        with reporter.step(f"packages ({len(inputs.packages)})"):
            debs = fetch(archive, inputs, work)
        epoch = localrepo.epoch_of(debs)
        repo = work.scratch / "repo"
        localrepo.write_repo(repo, debs, inputs.suite)
        prepare(inputs, work.scratch, epoch)
        ours = [deb.control_field("Package") for deb in debs if deb.path.parent == work.upstream_dirs["guest_debs"]]
        with reporter.step(f"{inputs.bootstrapper} {inputs.suite}"):
            run_bootstrap(inputs, work, repo, epoch, [*inputs.names, *ours])
        installed = script.parse_packages((work.scratch / "packages.tsv").read_text())
        check_installed(debs, installed)
        (work.out / "packages.json").write_text(json.dumps(installed, indent=1) + "\n")


def make_facts(profile: Profile, installed: frozenset[str], context: Context, count: int) -> Facts:
    """What the templates may look at."""
    default = (context.tools.rootfs / "etc/apt/sources.list").read_text().splitlines()
    build = {"recvirt": __version__, "suite": profile.root.suite, "packages": count}
    return Facts(
        profile=profile.name, root=profile.root, installed=installed, filesystem=profile.image.filesystem,
        kernel_is_debian=profile.kernel.source == "debian", sources=image_sources(default, profile.root, sources_lines),
        build=build,
    )  # fmt: skip


def fetch(archive: Archive, inputs: RootInputs, work: Work) -> list[localrepo.Deb]:
    """The pinned packages and our own, read. Each was verified against its digest."""
    paths = archive.download_all(inputs.packages)
    debs = [localrepo.read_deb(path, package.sha256) for path, package in zip(paths, inputs.packages, strict=True)]
    ours = sorted(work.upstream_dirs["guest_debs"].glob("*.deb"))
    return debs + [localrepo.read_deb(path, FileRef.of(path).sha256) for path in ours]


def prepare(inputs: RootInputs, scratch: Path, epoch: int) -> None:
    """Write what the outside script needs into ``scratch``."""
    write_files_tar(inputs.files, scratch / "files.tar", epoch)
    write_files_tar([file for file in inputs.files if file.path in _PRESEED], scratch / "preseed.tar", epoch)
    write_devices_tar(scratch / "devices.tar", epoch)
    steps = []
    for i, overlay in enumerate(inputs.overlays):
        path = scratch / f"overlay-{i}.tar"
        write_overlay_tar(overlay, path, epoch)
        steps.append(script.Step("overlay", overlay.name, str(path)))
    for i, hook in enumerate(inputs.hooks):
        path = scratch / f"hook-{i}"
        path.write_bytes(hook.file.path.read_bytes())
        path.chmod(0o755)
        if FileRef.of(path).sha256 != hook.file.sha256:
            raise StageError(f"{hook.file.path} changed while the image was built", hint="build again")
        steps.append(script.Step(hook.where, hook.file.name, str(path)))
    (scratch / "inside.sh").write_text(inputs.inside)
    (scratch / "cleanup.sh").write_text(script.cleanup_script())
    (scratch / "outside.sh").write_text(script.outside_script(steps, str(scratch)))


def run_bootstrap(inputs: RootInputs, work: Work, repo: Path, epoch: int, names: list[str]) -> None:
    """Bootstrap into ``root.tar``."""
    dpkg_cfg = next(file.data.decode() for file in inputs.files if file.path == "etc/dpkg/dpkg.cfg.d/recvirt")
    argv = _bootstrap_argv(inputs, work, epoch, names, dpkg_cfg)
    need = int(sum(package.size_bytes for package in inputs.packages) * _UNPACKED_RATIO)
    counter = bootstrap.ConfiguredCounter(len(inputs.packages), reporter.progress)
    context = work.context
    with workspace(need, context.tools, context.cache_dir / "trees") as tree_dir:
        where = "in memory" if tree_dir == SANDBOX_TMP else f"in {tree_dir}: memory is too small for it"
        reporter.info(f"the tree (about {format_bytes(need)}) is made {where}")
        context.tools.run(
            bootstrap.inside_namespace(argv, str(repo)),
            writable=[work.scratch, work.out, *([] if tree_dir == SANDBOX_TMP else [tree_dir])],
            all_ids=True,
            env={
                "TMPDIR": str(tree_dir),
                "SOURCE_DATE_EPOCH": str(epoch),
                "PYTHONHASHSEED": "0",
                # Kernel packages make no initramfs: the inside script does, when everything is in place.
                "INITRD": "No",
            },
            log_path=work.log,
            on_line=counter,
        )


def _bootstrap_argv(inputs: RootInputs, work: Work, epoch: int, names: list[str], dpkg_cfg: str) -> list[str]:
    scratch, tar_path = str(work.scratch), str(work.out / "root.tar")
    preseed_tar = f"{scratch}/preseed.tar"
    if inputs.bootstrapper == "mmdebstrap":
        return bootstrap.mmdebstrap_argv(
            suite=inputs.suite, names=names, dpkg_cfg=dpkg_cfg, scratch=scratch, tar_path=tar_path,
            preseed_tar=preseed_tar,
        )  # fmt: skip
    text = bootstrap.debootstrap_script(
        suite=inputs.suite, names=names, dpkg_cfg=dpkg_cfg, scratch=scratch, tar_path=tar_path, preseed_tar=preseed_tar,
        epoch=epoch,
    )  # fmt: skip
    (work.scratch / "debootstrap.sh").write_text(text)
    return ["sh", f"{scratch}/debootstrap.sh"]


def check_installed(debs: list[localrepo.Deb], installed: list[dict[str, object]]) -> None:
    """Compare what dpkg has with what was resolved: the key promised exactly that."""
    has = {(item["name"], item["version"]) for item in installed}
    wanted = {(deb.control_field("Package"), deb.control_field("Version")) for deb in debs}
    if has == wanted:
        return
    lines = [f"  not installed: {name} {version}" for name, version in sorted(map(str_pair, wanted - has))]
    lines += [f"  not resolved: {name} {version}" for name, version in sorted(map(str_pair, has - wanted))]
    raise StageError(
        "the tree does not hold the packages that were resolved:\n" + "\n".join(lines[:20]),
        hint="a hook may have added or removed packages: name them in root.packages instead",
    )


def str_pair(pair: tuple[object, object]) -> tuple[str, str]:
    """A pair as text, for sorting."""
    return str(pair[0]), str(pair[1])
