"""The files that the root stage writes into the tree: which, with what mode, when, and from which template.

The templates lie in ``resources/templates/root`` below the path they get in the image; those ending in ``.j2`` are
rendered (undefined names are errors, values are quoted by the filters ``sh``, ``unit`` and ``tojson``), the others are
copied as they are. Owns the table. Does not own: what packages bring, or users and links (``script``).
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from recvirt.model import Root


@dataclass(frozen=True)
class TreeFile:
    """A file of the image, owned by root. ``path`` is relative to the tree. The digest stands for ``data`` in keys."""

    path: str
    mode: int
    sha256: str
    data: bytes = field(metadata={"key": False}, repr=False)

    @classmethod
    def of(cls, path: str, data: bytes, mode: int = 0o644) -> TreeFile:
        """A file with this content."""
        return cls(path, mode, hashlib.sha256(data).hexdigest(), data)


@dataclass(frozen=True)
class Facts:
    """What templates and conditions may look at. ``installed`` holds the names of all packages of the tree."""

    profile: str
    root: Root
    installed: frozenset[str]
    filesystem: str
    kernel_is_debian: bool
    sources: tuple[str, ...]
    build: Mapping[str, Any]

    def has(self, package: str) -> bool:
        """Whether the tree gets this package."""
        return package in self.installed

    @property
    def public(self) -> dict[str, Any]:
        """The root section for /etc/recvirt/profile.json."""
        return public_root(self.root)

    @property
    def cloud_init(self) -> bool:
        """cloud-init is there and wanted."""
        return self.has("cloud-init") and self.root.cloud_init.enabled


#: Where the image keeps the keyring of a mirror that Debian's keys don't sign.
IMAGE_KEYRING = "/etc/apt/keyrings/mirror.gpg"
_DEBIAN_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_LOOPBACK = re.compile(r"localhost$|127\.|::1$|$")

Condition = Callable[[Facts], bool]


def _always(_: Facts) -> bool:
    return True


def _libvirt(facts: Facts) -> bool:
    return facts.has("libvirt-daemon-config-network")


def _nfs(facts: Facts) -> bool:
    return facts.root.nfs is not None and facts.has("nfs-common")


def _cloud_init(facts: Facts) -> bool:
    return facts.cloud_init


_UNITS = "etc/systemd/system"
#: path, mode, condition
RULES: tuple[tuple[str, int, Condition], ...] = (
    ("etc/apt/apt.conf.d/60recvirt", 0o644, _always),
    ("etc/apt/apt.conf.d/20auto-upgrades", 0o644, lambda f: f.root.unattended_upgrades),
    ("etc/apt/sources.list", 0o644, _always),
    ("etc/dpkg/dpkg.cfg.d/recvirt", 0o644, _always),
    ("etc/cloud/cloud.cfg.d/90_recvirt.cfg", 0o644, lambda f: f.has("cloud-init")),
    ("etc/cloud/cloud-init.disabled", 0o644, lambda f: f.has("cloud-init") and not f.cloud_init),
    ("etc/environment", 0o644, lambda f: f.has("libvirt-clients")),
    ("etc/fstab", 0o644, _always),
    ("etc/hostname", 0o644, _always),
    ("etc/hosts", 0o644, _always),
    ("etc/initramfs-tools/conf.d/recvirt", 0o644, lambda f: f.has("initramfs-tools")),
    ("etc/locale.conf", 0o644, _always),
    ("etc/modprobe.d/recvirt-nested.conf", 0o644, lambda f: f.root.nested),
    ("etc/modules-load.d/recvirt.conf", 0o644, lambda f: bool(f.root.modules)),
    ("etc/postgresql-common/createcluster.d/recvirt.conf", 0o644, lambda f: f.has("postgresql-common")),
    ("etc/recvirt/build.json", 0o644, _always),
    ("etc/recvirt/profile.json", 0o644, _always),
    ("etc/recvirt/nfs.conf", 0o644, _nfs),
    ("etc/repart.d/50-root.conf", 0o644, _always),
    ("etc/ssh/sshd_config.d/10-recvirt.conf", 0o644, _always),
    ("etc/sudoers.d/recvirt", 0o440, lambda f: any(user.sudo for user in f.root.users)),
    ("etc/sysctl.d/60-recvirt.conf", 0o644, _always),
    ("etc/systemd/journald.conf.d/50-recvirt.conf", 0o644, _always),
    ("etc/systemd/resolved.conf.d/50-recvirt.conf", 0o644, _always),
    ("etc/systemd/network/50-recvirt.network", 0o644, _always),
    ("etc/systemd/system-preset/50-recvirt.preset", 0o644, _always),
    ("etc/systemd/system.conf.d/60-recvirt.conf", 0o644, _always),
    (f"{_UNITS}/systemd-networkd-wait-online.service.d/recvirt.conf", 0o644, _always),
    (f"{_UNITS}/serial-getty@.service.d/recvirt.conf", 0o644, _always),
    (f"{_UNITS}/systemd-repart.service.d/recvirt.conf", 0o644, _always),
    (f"{_UNITS}/recvirt-first-boot.service", 0o644, _cloud_init),
    (f"{_UNITS}/recvirt-first-boot-done.service", 0o644, _cloud_init),
    (f"{_UNITS}/recvirt-gpt.service", 0o644, _always),
    (f"{_UNITS}/recvirt-ssh-keys.service", 0o644, _always),
    (f"{_UNITS}/recvirt-nfs.service", 0o644, _nfs),
    (f"{_UNITS}/recvirt-nfs.path", 0o644, _nfs),
    (f"{_UNITS}/recvirt-libvirt-network.service", 0o644, _libvirt),
    (f"{_UNITS}/recvirt-ssl-cert.service", 0o644, lambda f: f.has("ssl-cert")),
    ("etc/tmpfiles.d/recvirt.conf", 0o644, _always),
    ("usr/lib/recvirt/console-login", 0o755, _always),
    ("usr/lib/recvirt/first-boot", 0o755, _cloud_init),
    ("usr/lib/recvirt/gpt-mend", 0o755, _always),
    ("usr/lib/recvirt/ssh-keys", 0o755, _always),
    ("usr/lib/recvirt/nfs-apply", 0o755, _nfs),
    ("usr/lib/recvirt/libvirt-network", 0o755, _libvirt),
    ("usr/lib/systemd/system-generators/recvirt-nfs", 0o755, _nfs),
)


def environment(folder: Path) -> Environment:
    """A jinja2 environment over ``folder`` that refuses undefined names and knows how to quote."""
    loader = FileSystemLoader(folder)
    env = Environment(  # noqa: S701 - configuration files, not HTML
        loader=loader, undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    env.filters["sh"] = lambda value: shlex.quote(str(value))
    # systemd.unit(5): specifiers start with a percent sign, in every value.
    env.filters["unit"] = lambda value: str(value).replace("%", "%%")
    env.filters["pretty"] = lambda value: json.dumps(value, indent=1, sort_keys=True)
    return env


def render_files(facts: Facts, folder: Path) -> tuple[TreeFile, ...]:
    """Every file whose condition holds, sorted by path. A template that is missing or incomplete is an error."""
    env = environment(folder)
    values = {"root": facts.root, "facts": facts}
    found = []
    for path, mode, condition in RULES:
        if not condition(facts):
            continue
        if (folder / path).exists():
            text = (folder / path).read_text(encoding="utf-8")
        else:
            text = env.get_template(f"{path}.j2").render(values)
        found.append(TreeFile.of(path, text.encode(), mode))
    return tuple(sorted(found, key=lambda f: f.path))


def public_root(root: Root) -> dict[str, Any]:
    """The root section as it may stand in the image: without paths of the build machine and without the mirror."""
    hidden = {"overlays", "hooks", "keyring", "mirror", "snapshot_mirror"}
    return {name: value for name, value in root.model_dump(mode="json").items() if name not in hidden}


def image_sources(default_lines: Sequence[str], root: Root, make_lines: Callable[..., list[str]]) -> tuple[str, ...]:
    """The image's own sources.list(5) lines.

    A running VM can't upgrade from a mirror on the build machine's loopback, and shouldn't from a snapshot (which never
    gets security updates): it gets the default archive then. A mirror with a keyring of its own gets that keyring.
    ``make_lines`` is ``archive.sources_lines``.
    """
    host = urllib.parse.urlsplit(root.mirror or "").hostname or ""
    reachable = bool(root.mirror) and root.snapshot is None and not _LOOPBACK.match(host)
    keyring = Path(IMAGE_KEYRING) if reachable and root.keyring else Path(_DEBIAN_KEYRING)
    mirror = root.mirror if reachable else None
    return tuple(make_lines(default_lines, root.suite, mirror=mirror, components=root.components, keyring=keyring))
