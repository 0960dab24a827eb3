"""The tools root: a Debian tree with the compiler, QEMU, GRUB, mkfs and the bootstrapper that every other stage uses.

Made by the host's mmdebstrap, so the host needs little; works as root and as an ordinary user (by sub-ids).
It is the ground that the pipeline stands on rather than a stage of it: its package versions are part of the other keys.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recvirt.cleaning import remove_for_good
from recvirt.errors import CommandError, StageError
from recvirt.run import find_tool, run
from recvirt.sandbox import ToolsRoot
from recvirt.store import Store, check_room, key_of
from recvirt.trust import ca_bundle
from recvirt.ui import reporter

REVISION = 1
#: The tar, what it is made from and what is made from it: about 1.1 GB each for the build tools.
_SPACE_BYTES = 3_500_000_000
_EXTRA_SPACE_BYTES = 1_500_000_000
SUITE = "trixie"
#: What a tools root holds, by purpose.
PACKAGES = {
    "archive": ("apt", "ca-certificates", "debian-archive-keyring", "gpgv", "mmdebstrap", "debootstrap", "arch-test"),
    "kernel": (
        "build-essential", "bc", "bison", "flex", "libelf-dev", "libssl-dev", "libdw-dev", "zlib1g-dev", "ccache",
        "cpio", "kmod", "rsync", "debhelper", "dpkg-dev", "fakeroot", "python3", "xz-utils", "zstd", "pahole", "patch",
        "git",
    ),
    "image": (
        "e2fsprogs", "libarchive13t64", "grub-pc-bin", "grub-efi-amd64-bin", "grub-common", "mtools", "dosfstools",
        "fdisk", "xfsprogs", "btrfs-progs", "qemu-utils", "busybox-static",
    ),
    # ganesha's memory file system serves a guest's NFS mounts as an ordinary user too, which no kernel server does.
    "vm": ("qemu-system-x86", "ovmf", "ipxe-qemu", "openssh-client", "nfs-ganesha", "nfs-ganesha-mem"),
    # Static programs of 50 kB that run with any suite's libc, as init, and in an L2.
    "guest programs": ("musl-tools",),
}  # fmt: skip
#: Optional sets for named checks: a tools root of its own each, because few people want them.
EXTRAS: dict[str, tuple[str, ...]] = {
    "bochs": (
        "bochs",
        "bochsbios",
        "vgabios",
        "bochs-term",
        "grub-pc-bin",
        "grub-common",
        "mtools",
        "kmod",
        "xz-utils",
        "zstd",
    ),
    # What benchmarks/run.py measures against. mkosi's own dependencies bring repart, ukify and the EFI boot loader.
    # reprepro: mkosi's own way to take a package that is not in an archive, here our kernel.
    "mkosi": (
        "mkosi",
        "systemd-boot",
        "uidmap",
        "dosfstools",
        "mtools",
        "e2fsprogs",
        "cpio",
        "zstd",
        "python3-pefile",
        "reprepro",
    ),
    # By which tests read a published mirror; Debian 12 has none.
    "incus": ("incus-client",),
    # The packages that the cloud runs on in an image, and what its tests want besides.
    "cloud": (
        "python3-celery",
        "python3-click",
        "python3-dateutil",
        "python3-django",
        "python3-djangorestframework",
        "python3-libvirt",
        "python3-psycopg2",
        "python3-pycdlib",
        "python3-requests",
        "python3-uvicorn",
        "python3-websockets",
        "python3-hypothesis",
        "python3-openapi-spec-validator",
        "python3-pytest",
        "python3-pytest-django",
        "python3-pytest-xdist",
        "e2fsprogs",
        "nginx-light",
        "openssl",
        "postgresql",
        "qemu-utils",
        "xfsprogs",
    ),
}


@dataclass(frozen=True)
class ToolsInputs:
    """What decides about a tools root. The archive's state is not in it: a tools root lives until it is refreshed."""

    suite: str
    packages: tuple[str, ...]
    mirror: str | None


def tools_inputs(extra: str | None = None, mirror: str | None = None) -> ToolsInputs:
    """The frozen inputs of the ordinary tools root, or of one extra set."""
    if extra:
        names: Sequence[str] = (*PACKAGES["archive"], *EXTRAS[extra])
    else:
        names = [name for group in PACKAGES.values() for name in group]
    return ToolsInputs(SUITE, tuple(sorted(set(names))), mirror)


def bootstrap_argv(inputs: ToolsInputs, tar_path: Path) -> list[str]:
    """mmdebstrap(1)'s command line; without a mirror of ours it uses its own default, with -updates and -security."""
    argv = [
        find_tool("mmdebstrap"), "--variant=minbase", "--mode=root", "--format=tar",
        '--aptopt=Acquire::Languages "none"', '--aptopt=Acquire::Retries "3"', "--dpkgopt=force-unsafe-io",
        "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
        f"--include={','.join(inputs.packages)}",
    ]  # fmt: skip
    if bundle := ca_bundle():
        # GnuTLS, which older releases of apt use, does not read SSL_CERT_FILE.
        argv.append(f'--aptopt=Acquire::https::CaInfo "{bundle}"')
    argv += [inputs.suite, str(tar_path)]
    return [*argv, inputs.mirror] if inputs.mirror else argv


def namespace_argv(*, as_root: bool) -> list[str]:
    """What makes the bootstrapper root in namespaces of its own, where everything it starts dies with it."""
    mapping = [] if as_root else ["--user", "--map-auto", "--map-root-user"]
    if mapping:
        find_tool("newuidmap")
    return [find_tool("unshare"), *mapping, "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]


def ensure_tools(
    store: Store, *, extra: str | None = None, mirror: str | None = None, log_dir: Path | None = None
) -> ToolsRoot:
    """The tools root from the cache, bootstrapped first if it is not there. StageError has the log's last lines."""
    inputs = tools_inputs(extra, mirror)
    key = key_of("tools", REVISION, inputs)
    if (output := store.get("tools", key)) is not None:
        return ToolsRoot(output.directory)
    with store.lock("tools", key):
        if (output := store.get("tools", key)) is not None:
            return ToolsRoot(output.directory)
        with reporter.step(f"tools root ({extra or 'build tools'}, Debian {inputs.suite})"):
            work = store.fresh_work_dir("tools", key)
            started = time.monotonic()
            log_dir = log_dir or store.directory / "logs"
            log_dir.mkdir(parents=True, exist_ok=True)
            try:
                check_room(store.directory, _EXTRA_SPACE_BYTES if extra else _SPACE_BYTES)
                _bootstrap(inputs, work, log_dir / f"tools-{extra or 'main'}.log")
                seconds = time.monotonic() - started
                output = store.commit("tools", key, work, label=extra or "main", inputs=inputs, seconds=seconds)
            except BaseException:
                remove_for_good(work)
                raise
    return ToolsRoot(output.directory)


def _bootstrap(inputs: ToolsInputs, work: Path, log_path: Path) -> None:
    rootfs = work / "out" / "rootfs"
    rootfs.mkdir(parents=True)
    log_path.write_text("")
    tar_path = work / "tools.tar"
    argv = [*namespace_argv(as_root=os.geteuid() == 0), *bootstrap_argv(inputs, tar_path)]
    try:
        # mmdebstrap's temporary tree belongs below our work folder: a killed run's leftovers go with it.
        run(argv, env={"TMPDIR": str(work)}, log_path=log_path, on_line=_show)
        # Ownership is of no use in there; without it an ordinary user can make and delete the tree.
        run(
            [find_tool("tar"), "--no-same-owner", "--exclude=./dev/*", "-C", str(rootfs), "-xf", str(tar_path)],
            log_path=log_path,
        )
    except CommandError as error:
        raise StageError(
            f"the tools root could not be made\n{error.message}",
            hint="check the network and recvirt doctor; --tools-mirror names another archive",
        ) from error
    tar_path.unlink()
    # The options above were for making it; left there they would overrule those of the archive's own state.
    (rootfs / "etc/apt/apt.conf.d/99mmdebstrap").unlink(missing_ok=True)
    for name in ("resolv.conf", "hosts"):
        # The sandbox binds the host's over them, and needs something to bind over.
        (rootfs / "etc" / name).touch()
    status = (rootfs / "var/lib/dpkg/status").read_text()
    (work / "out" / "packages.json").write_text(json.dumps(parse_status(status), indent=1, sort_keys=True))


def _show(line: str) -> None:
    """mmdebstrap says what it begins; the rest is for the log."""
    if line.startswith("I: ") and line.endswith("..."):
        reporter.info(line[3:-4] if line.endswith(" ...") else line[3:-3])


def parse_status(text: str) -> dict[str, str]:
    """Package to version, from a dpkg status file (deb-control(5))."""
    found: dict[str, str] = {}
    for paragraph in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
        if fields.get("Status", "").endswith(" installed"):
            found[fields["Package"]] = fields["Version"]
    return found
