"""(e): the size of the image, and of what a kernel puts into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.boot import OURS, STOCK
from benchmarks.results import Result, Row
from benchmarks.workplace import Site
from recvirt.imagefile.contents import open_image
from recvirt.sandbox import ToolsRoot

_PARTS = ("boot/vmlinuz-", "usr/lib/modules/", "boot/initrd.img-")


def kernel_bytes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of the kernel, its modules and its initramfs, from the files of an image (name to size)."""
    names = ("kernel", "modules", "initramfs")
    return {
        name: sum(size for path, size in sizes.items() if path.startswith(prefix))
        for name, prefix in zip(names, _PARTS, strict=True)
    }


def measure(tools: ToolsRoot, image: Path) -> dict[str, int]:
    """The image file's size and its kernel's, in bytes."""
    with open_image(image, tools) as contents:
        files = {name.lstrip("/"): entry.size_bytes for name, entry in contents.tree().items() if not entry.is_dir}
    return {"image": image.stat().st_size, **kernel_bytes(files)}


def benchmark(site: Site) -> Result:
    """Our image against the one with Debian's cloud kernel: the same tree otherwise."""
    for profile in (OURS, STOCK):
        site.recvirt("build", profile, log_name=f"build-{profile}")
    mine, stock = (measure(site.tools(), site.build_dir / name / "disk.qcow2") for name in (OURS, STOCK))
    rows = [
        Row.ratio("the image (qcow2, zstd)", mine["image"], stock["image"], "B", None),
        Row.ratio(
            "kernel and modules", mine["kernel"] + mine["modules"], stock["kernel"] + stock["modules"], "B", None,
            f"kernel {mine['kernel'] / 1e6:.1f} MB, Debian {stock['kernel'] / 1e6:.1f} MB "
            f"and an initramfs of {stock['initramfs'] / 1e6:.1f} MB",
        ),
    ]  # fmt: skip
    return Result("sizes", rows, {OURS: mine, STOCK: stock})
