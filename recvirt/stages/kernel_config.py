"""Resolves the kernel's configuration from the profile's fragments with the kernel tree's own tool.

Outputs: ``config`` (the whole ``.config``) and ``report.json`` (per requested symbol: value, fragment, reason; losses).
The release string gets a digest of configuration, source and compiler behind the profile's ``localversion``: two
kernels that differ have different names, install side by side, and never load each other's modules.
With ``kernel: debian`` the stock configuration is compared with the same fragments instead; nothing is fatal then.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recvirt.apt import Package
from recvirt.archive import Archive
from recvirt.data import fragment_path
from recvirt.errors import ConfigError
from recvirt.kconfig import stock
from recvirt.kconfig.dotconfig import parse_dotconfig
from recvirt.kconfig.fragment import Fragment, load_fragments, parse_version
from recvirt.kconfig.merge import merge
from recvirt.kconfig.origin import archive_for, source_of
from recvirt.kconfig.report import audit_losses, report
from recvirt.kconfig.resolve import Allowed, apply_allowances, find_losses, resolve
from recvirt.kconfig.source import UNPACKED_BYTES, Source, Unpacked, ensure_source
from recvirt.kconfig.symbols import kernel_version, read_index
from recvirt.kconfig.toolchain import config_tools
from recvirt.model import Profile
from recvirt.stages.base import Context, Work
from recvirt.store import FileRef
from recvirt.ui import reporter

ARCH = "x86_64"
_LOCALVERSION = re.compile(r'^CONFIG_LOCALVERSION=".*"$', re.M)
_NUMBERS = re.compile(r"^\d+\.\d+(\.\d+)?")


@dataclass(frozen=True)
class Wishes:
    """What the profile asks of any kernel."""

    fragments: tuple[FileRef, ...]
    overrides: tuple[tuple[str, str], ...]
    allow: tuple[Allowed, ...]


@dataclass(frozen=True)
class OwnInputs:
    """A kernel of our own."""

    wishes: Wishes
    source: Source
    localversion: str
    arch: str
    tools: tuple[str, ...]


@dataclass(frozen=True)
class StockInputs:
    """Debian's kernel: the pinned package whose configuration is looked at."""

    wishes: Wishes
    pin: str
    arch: str
    package: Package = field(compare=False, metadata={"key": False})
    archive: Archive = field(compare=False, metadata={"key": False})


class KernelConfig:
    """The stage."""

    name = "kernel_config"
    revision = 1
    needs: tuple[str, ...] = ()

    def inputs(self, profile: Profile, upstream: Mapping[str, str], context: Context) -> OwnInputs | StockInputs:
        """Fragments (read and checked here, so that their faults come before any work) and the pinned source."""
        del upstream
        wishes = _wishes(profile)
        kernel = profile.kernel
        if kernel.source == "debian":
            archive = archive_for(profile, profile.root.suite, context)
            package = stock.image_package(archive, kernel.debian_package)
            return StockInputs(wishes, package.pin, ARCH, package, archive)
        source = source_of(profile, context)
        return OwnInputs(wishes, source, kernel.localversion, ARCH, config_tools(context.tools))

    def build(self, inputs: OwnInputs | StockInputs, work: Work) -> None:
        """Write ``config`` and ``report.json``."""
        fragments = load_fragments((ref.name, ref.path) for ref in inputs.wishes.fragments)
        if isinstance(inputs, StockInputs):
            _audit_stock(inputs, fragments, work)
        else:
            _resolve_own(inputs, fragments, work)

    def space_bytes(self, inputs: OwnInputs | StockInputs) -> int:
        """Room for the unpacked source, or for the stock package."""
        return UNPACKED_BYTES if isinstance(inputs, OwnInputs) else 200_000_000


def _wishes(profile: Profile) -> Wishes:
    kernel = profile.kernel
    paths = [(fragment_name(reference), fragment_path(reference)) for reference in kernel.fragments]
    load_fragments(paths)
    if "LOCALVERSION" in kernel.overrides:
        raise ConfigError("kernel.overrides sets LOCALVERSION", hint="kernel.localversion is the place for it")
    allow = tuple(Allowed(a.symbol, a.reason, a.since, a.until) for a in kernel.allow)
    for item in allow:
        _check_bounds(item)
    return Wishes(tuple(FileRef.of(path, name) for name, path in paths), tuple(sorted(kernel.overrides.items())), allow)


def _check_bounds(item: Allowed) -> None:
    for bound in (item.since, item.until):
        try:
            parse_version(bound or "0.0")
        except ValueError as error:
            raise ConfigError(f"kernel.allow: {item.symbol}: {error}") from error


def fragment_name(reference: str) -> str:
    """A fragment's name: what a profile writes for a shipped one, or the file's name for one of its own."""
    return Path(reference).name.removesuffix(".config")


def _resolve_own(inputs: OwnInputs, fragments: tuple[Fragment, ...], work: Work) -> None:
    context, wishes = work.context, inputs.wishes
    source = ensure_source(inputs.source, context.tools, context.cache_dir, work.log, offline=context.offline)
    _, version = kernel_version(source.tree)
    merged = merge(fragments, dict(wishes.overrides), version, inputs.arch)
    if "LOCALVERSION" in merged.wanted:
        raise ConfigError("a fragment sets CONFIG_LOCALVERSION", hint="kernel.localversion is the place for it")
    build_dir = work.scratch / "build"
    build_dir.mkdir()
    resolved = resolve(source.tree, merged, context.tools, build_dir, work.log, inputs.arch)
    losses = find_losses(merged, resolved, lambda: read_index(source.tree, inputs.arch))
    losses = apply_allowances(losses, wishes.allow, version)
    text, release = with_release(resolved.text, inputs, source)
    (work.out / "config").write_text(text, encoding="utf-8")
    _write_report(
        work, mode="resolved", kernel_version=source.version, release=release, source=inputs.source.label,
        arch=inputs.arch, fragments=fragments, merged=merged, values=parse_dotconfig(text), losses=losses,
    )  # fmt: skip
    reporter.info(f"{release}: {len(merged.wanted)} symbols as asked, {len(losses)} allowed to differ")


def with_release(text: str, inputs: OwnInputs, source: Unpacked) -> tuple[str, str]:
    """The configuration with its LOCALVERSION, and ``uname -r``. The text names the compiler, so that counts too."""
    digest = hashlib.sha256(f"{_LOCALVERSION.sub('', text)}\n{inputs.source.key}".encode()).hexdigest()[:8]
    local = f"{inputs.localversion}-{digest}"
    changed, count = _LOCALVERSION.subn(f'CONFIG_LOCALVERSION="{local}"', text)
    if count != 1:
        raise ConfigError(
            "the resolved configuration has no CONFIG_LOCALVERSION", hint="is kernel.tree a whole kernel?"
        )
    return changed, f"{source.version}{local}"


def _audit_stock(inputs: StockInputs, fragments: tuple[Fragment, ...], work: Work) -> None:
    tools = work.context.tools
    release = stock.release_of(inputs.package)
    deb = inputs.archive.download(inputs.package)
    text = stock.config_text(tools, deb, f"./boot/config-{release}")
    numbers = _NUMBERS.match(release)
    if numbers is None:
        raise ConfigError(f"{release} tells no kernel version")
    merged = merge(fragments, dict(inputs.wishes.overrides), parse_version(numbers[0]), inputs.arch)
    values = parse_dotconfig(text)
    losses = audit_losses(merged, values)
    (work.out / "config").write_text(text, encoding="utf-8")
    _write_report(
        work, mode="audited", kernel_version=numbers[0], release=release,
        source=f"{inputs.package.name} {inputs.package.version}", arch=inputs.arch, fragments=fragments,
        merged=merged, values=values, losses=losses,
    )  # fmt: skip
    reporter.info(f"{release}: {len(losses)} of {len(merged.wanted)} requested symbols are set otherwise by Debian")


def _write_report(work: Work, **facts: Any) -> None:
    (work.out / "report.json").write_text(json.dumps(report(**facts), indent=1) + "\n", encoding="utf-8")
