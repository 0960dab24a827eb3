"""What the guest needs of a kernel: built in, or as the few modules that go with it. Pure functions.

Nothing but the root's own drivers has to be built in: whatever else is a module is loaded when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from recvirt.errors import StageError

#: Without these it does not come up to its first program, or nobody can reach it.
_BUILT_IN = (
    "EXT4_FS", "EFI_PARTITION", "VIRTIO_PCI", "VIRTIO_BLK", "SERIAL_8250_CONSOLE", "DEVTMPFS", "DEVTMPFS_MOUNT",
    "TMPFS", "UNIX", "PACKET", "ACPI_BUTTON",
)  # fmt: skip
#: Symbol -> module: its card, the power button, first-boot data.
_NEEDED = {"VIRTIO_NET": "virtio_net", "INPUT_EVDEV": "evdev", "ISO9660_FS": "isofs"}
#: What it uses when the kernel has it: memory that goes and comes, entropy, other seeds, volumes' file systems.
_WELCOME = {
    "VIRTIO_BALLOON": "virtio_balloon", "HW_RANDOM_VIRTIO": "virtio-rng", "VFAT_FS": "vfat",
    "NLS_CODEPAGE_437": "nls_cp437", "NLS_ISO8859_1": "nls_iso8859-1", "NLS_UTF8": "nls_utf8", "NLS_ASCII": "nls_ascii",
    "XFS_FS": "xfs",
}  # fmt: skip


def modules_wanted(config: Mapping[str, str]) -> tuple[str, ...]:
    """The modules of a kernel with this configuration (symbols without CONFIG_). StageError says what it lacks."""
    lacking = [symbol for symbol in _BUILT_IN if config.get(symbol) != "y"]
    lacking += [symbol for symbol in _NEEDED if config.get(symbol) not in ("y", "m")]
    if lacking:
        raise StageError(
            f"the kernel can't run the tiny guest: it lacks {', '.join(lacking)}",
            hint="add them to the kernel, or set image.guest_image: false",
        )
    return tuple(module for symbol, module in {**_NEEDED, **_WELCOME}.items() if config.get(symbol) == "m")


def _plain(name: str) -> str:
    """A module's name as the kernel has it, from a file's or from somebody's."""
    return PurePosixPath(name).name.split(".ko")[0].replace("-", "_")


def closure(modules_dep: str, wanted: Iterable[str]) -> tuple[str, ...]:
    """The files (paths as in modules.dep(5)) of modules and of all that they need. StageError for an unknown one."""
    needs = {}
    for line in modules_dep.splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
    by_name = {_plain(path): path for path in needs}
    found: set[str] = set()
    for name in wanted:
        if _plain(name) not in by_name:
            raise StageError(f"the kernel's package has no module {name}")
        # depmod lists everything that a module needs, not its next ones alone.
        file = by_name[_plain(name)]
        found |= {file, *needs[file]}
    return tuple(sorted(found))


def unpack_argv(path: str, output: str) -> list[str]:
    """How a module becomes a plain file: busybox hands the kernel what is in the file."""
    for suffix, program in ((".zst", "zstd"), (".xz", "xz"), (".gz", "gzip")):
        if path.endswith(suffix):
            return ["sh", "-c", f'exec {program} -dc "$1" >"$2"', "unpack", path, output]
    return ["cp", path, output]
