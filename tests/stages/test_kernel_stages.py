"""The two kernel stages for real: the shipped fragments on real trees, and a small kernel built, booted and rebuilt.

The small kernel (a console, an initramfs, one module) takes about two minutes of CPU a build; sources come from the
archive, into the ordinary cache, where they are shared with ordinary builds.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from recvirt.cpio import Entry, newc
from recvirt.errors import ConfigError
from recvirt.kconfig.dotconfig import parse_dotconfig
from recvirt.kconfig.expression import N, evaluate
from recvirt.kconfig.symbols import read_index
from recvirt.model import Profile
from recvirt.profile import load_profile
from recvirt.sandbox import ToolsRoot
from recvirt.stages.base import Context, Work
from recvirt.stages.kernel_build import KernelBuild
from recvirt.stages.kernel_config import KernelConfig
from recvirt.store import key_of

pytestmark = pytest.mark.slow

TINY = """\
# A kernel that says hello.

# Enough to boot an initramfs with a serial console, and one module.
CONFIG_64BIT=y
CONFIG_EXPERT=y
CONFIG_PRINTK=y
CONFIG_TTY=y
CONFIG_SERIAL_8250=y
CONFIG_SERIAL_8250_CONSOLE=y
CONFIG_BLK_DEV_INITRD=y
CONFIG_BINFMT_ELF=y
CONFIG_BINFMT_SCRIPT=m
CONFIG_MODULES=y
CONFIG_MODULE_COMPRESS=y
CONFIG_MODULE_COMPRESS_ZSTD=y
CONFIG_MODULE_COMPRESS_ALL=y
CONFIG_KERNEL_ZSTD=y
CONFIG_PROC_FS=y
CONFIG_ACPI=y
CONFIG_PCI=y
"""
HELLO = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
echo "TINY $(/bin/busybox uname -r) $(/bin/busybox uname -v)"
/bin/busybox poweroff -f
"""


@pytest.fixture
def cached(tools: ToolsRoot, shared_cache: Path) -> Context:
    """A context on the ordinary cache."""
    return Context(tools=tools, cache_dir=shared_cache, jobs=len(os.sched_getaffinity(0)))


def work_at(folder: Path, context: Context, upstream: Mapping[str, Path] | None = None) -> Work:
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True)
    return Work(folder / "out", folder / "scratch", folder / "log", context, upstream or {})


def configure(profile: Profile, context: Context, folder: Path) -> tuple[str, Work]:
    stage = KernelConfig()
    inputs = stage.inputs(profile, {}, context)
    work = work_at(folder, context)
    stage.build(inputs, work)
    return key_of(stage.name, stage.revision, inputs), work


@pytest.mark.parametrize("name", ["default", "debug", "kernel-7"])
def test_the_shipped_fragments_resolve_without_a_loss(name: str, cached: Context, tmp_path: Path) -> None:
    profile = load_profile(name).model
    _, work = configure(profile, cached, tmp_path / "config")
    told = json.loads((work.out / "report.json").read_text())
    assert told["counts"]["lost"] == 0 and told["counts"]["requested"] > 800
    config = parse_dotconfig((work.out / "config").read_text())
    assert config["LOCALVERSION"].startswith('"-recvirt-') and told["release"].endswith(
        config["LOCALVERSION"].strip('"')
    )
    source = KernelConfig().inputs(profile, {}, cached).source  # type: ignore[union-attr]
    index = read_index(cached.cache_dir / "sources" / source.key / "tree")
    wrong = [
        symbol
        for symbol, value in config.items()
        if value in ("y", "m") and symbol in index and not index.active_selectors(symbol, config)
        if all(d.depends is not None and evaluate(d.depends, config) == N for d in index.definitions[symbol])
    ]
    assert wrong == [], "the index reads these trees' dependencies wrongly"
    assert [symbol for symbol in config if symbol not in index] == []


def test_a_loss_is_refused_and_named(cached: Context, tmp_path: Path) -> None:
    profile = load_profile("default", ["kernel.overrides={NO_SUCH: y, PCI: n}"]).model
    with pytest.raises(ConfigError) as caught:
        configure(profile, cached, tmp_path / "config")
    text = str(caught.value)
    assert "profile: kernel.overrides: CONFIG_NO_SUCH: wanted y, got n: unknown symbol" in text
    assert "CONFIG_BLK_DEV_NVME: wanted y, got n: unmet dependency: needs y from:" in text


def test_the_stock_kernel_is_audited(cached: Context, tmp_path: Path) -> None:
    _, work = configure(load_profile("debian-kernel").model, cached, tmp_path / "config")
    told = json.loads((work.out / "report.json").read_text())
    assert told["mode"] == "audited" and "cloud-amd64" in told["release"]
    assert told["symbols"]["ATA_PIIX"]["loss"]["kind"] == "module instead of built in"
    assert told["symbols"]["KVM_INTEL"]["value"] == "m" and "loss" not in told["symbols"]["KVM_INTEL"]


@pytest.fixture
def tiny(tmp_path: Path) -> Profile:
    fragment = tmp_path / "tiny.config"
    fragment.write_text(TINY)
    loaded = load_profile("default").model
    kernel = loaded.kernel.model_copy(update={"fragments": (str(fragment),), "overrides": {}, "allow": ()})
    return loaded.model_copy(update={"kernel": kernel})


def build_tiny(profile: Profile, context: Context, folder: Path) -> Work:
    key, config = configure(profile, context, folder / "config")
    stage = KernelBuild()
    inputs = stage.inputs(profile, {"kernel_config": key}, context)
    work = work_at(folder / "build", context, {"kernel_config": config.out})
    stage.build(inputs, work)
    return work


def cold_cache(cached: Context, folder: Path) -> Context:
    """A cache with what the archive said and the unpacked sources, and nothing else: nothing was compiled before."""
    (folder / "sources").mkdir(parents=True)
    for name in ("apt", "debs"):
        (folder / name).symlink_to(cached.cache_dir / name)
    for path in (cached.cache_dir / "sources").glob("*/source.json"):
        (folder / "sources" / path.parent.name).symlink_to(path.parent)
    return dataclasses.replace(cached, cache_dir=folder)


def boot(tools: ToolsRoot, work: Work) -> str:
    busybox = (tools.rootfs / "usr/bin/busybox").read_bytes()
    entries = [
        Entry("bin", 0o40755), Entry("dev", 0o40755), Entry("proc", 0o40755), Entry("bin/busybox", 0o100755, busybox),
        Entry("dev/console", 0o20600, device=(5, 1)), Entry("hello", 0o100755, HELLO.encode()),
    ]  # fmt: skip
    (work.scratch / "initramfs").write_bytes(newc(entries))
    argv = [
        "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "256", "-nodefaults",
        "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", str(work.out / "vmlinuz"),
        "-initrd", str(work.scratch / "initramfs"),
        "-append", "console=ttyS0 panic=-1 rdinit=/bin/busybox -- sh /hello",
    ]  # fmt: skip
    return tools.run(argv, readable=[work.out, work.scratch], timeout_seconds=300).stdout


def test_a_kernel_is_built_boots_installs_and_repeats(
    tiny: Profile, cached: Context, tools: ToolsRoot, tmp_path: Path
) -> None:
    configure(tiny, cached, tmp_path / "unpack")
    first = build_tiny(tiny, cold_cache(cached, tmp_path / "cache-1"), tmp_path / "first")
    release = (first.out / "release").read_text().strip()
    info = json.loads((first.out / "build-info.json").read_text())
    assert info["warnings"] == [] and info["modules"] == 1 and info["steps"] > 300
    assert f"TINY {release} #1 " in boot(tools, first)

    tree = tmp_path / "tree"
    for name in ("updates", "info", "triggers"):
        (tree / "var/lib/dpkg" / name).mkdir(parents=True)
    (tree / "var/lib/dpkg/status").write_text("")
    deb = first.out / "linux-image.deb"
    tools.run(
        ["dpkg", f"--root={tree}", "--force-script-chrootless", "--force-not-root", "--install", str(deb)],
        readable=[deb], writable=[tree],
    )  # fmt: skip
    assert (tree / f"boot/vmlinuz-{release}").read_bytes() == (first.out / "vmlinuz").read_bytes()
    modules = tree / "usr/lib/modules" / release
    assert "binfmt_script.ko.zst" in (modules / "modules.dep").read_text() and (modules / "modules.dep.bin").exists()
    assert f"Package: linux-image-{release}" in (tree / "var/lib/dpkg/status").read_text()
    done = tools.run(["dpkg", f"--root={tree}", "--verify"], readable=[tree])
    assert done.stdout == ""

    # Elsewhere, with nothing compiled before, fewer jobs and another time: the same bytes.
    elsewhere = dataclasses.replace(cold_cache(cached, tmp_path / "cache-2"), jobs=1)
    second = build_tiny(tiny, elsewhere, tmp_path / "deeper" / "second")
    cold = json.loads((second.out / "build-info.json").read_text())["ccache"]
    # A few sources are compiled twice in one build.
    assert cold["hits"] < 0.05 * cold["misses"]
    assert (second.out / "linux-image.deb").read_bytes() == deb.read_bytes()

    # A change of the configuration compiles what it touches, and the way back leads to the same bytes.
    fragment = Path(tiny.kernel.fragments[0])
    fragment.write_text(TINY + "CONFIG_IKCONFIG=y\n")
    changed = build_tiny(tiny, elsewhere, tmp_path / "changed")
    assert (changed.out / "release").read_text().strip() != release
    steps = [json.loads((work.out / "build-info.json").read_text())["steps"] for work in (second, changed)]
    assert steps[1] < 0.5 * steps[0] and (changed.out / "vmlinuz").read_bytes() != (first.out / "vmlinuz").read_bytes()
    fragment.write_text(TINY)
    third = build_tiny(tiny, elsewhere, tmp_path / "third")
    assert (third.out / "linux-image.deb").read_bytes() == deb.read_bytes()
