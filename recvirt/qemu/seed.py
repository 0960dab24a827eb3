"""First-boot data for cloud-init: a small FAT file system, a NoCloud seed or a config drive.

The fields are documented in cloud-init's manual, "NoCloud" and "Config drive". mtools writes the file system:
nothing is mounted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recvirt.sandbox import ToolsRoot

_SEED_BYTES = 2 * 1024**2


@dataclass(frozen=True)
class CloudConfig:
    """What a test guest is told. ``instance_id`` makes cloud-init see a new machine when it changes."""

    instance_id: str
    hostname: str = ""
    user: str = ""
    ssh_keys: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()  # path, content
    run: tuple[Sequence[str], ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def user_data(self) -> str:
        """The ``#cloud-config`` document. JSON is YAML, so every value is quoted by construction."""
        data: dict[str, Any] = {}
        if self.hostname:
            data["hostname"] = self.hostname
        if self.user:
            user: dict[str, Any] = {
                "name": self.user, "shell": "/bin/bash", "lock_passwd": True,
                "sudo": "ALL=(ALL) NOPASSWD:ALL", "ssh_authorized_keys": list(self.ssh_keys),
            }  # fmt: skip
            if self.groups:
                user["groups"] = list(self.groups)
            data["users"] = ["default", user]
        if self.files:
            data["write_files"] = [{"path": path, "content": content} for path, content in self.files]
        if self.run:
            data["runcmd"] = [list(words) for words in self.run]
        data.update(self.extra)
        return "#cloud-config\n" + json.dumps(data, indent=1) + "\n"

    def meta_data(self) -> str:
        """The instance's identity."""
        data = {"instance-id": self.instance_id}
        if self.hostname:
            data["local-hostname"] = self.hostname
        return json.dumps(data) + "\n"


def make_seed(tools: ToolsRoot, config: CloudConfig, folder: Path) -> Path:
    """Write ``seed.img`` into ``folder``."""
    (folder / "user-data").write_text(config.user_data())
    (folder / "meta-data").write_text(config.meta_data())
    return pack_seed(tools, folder)


def make_config_drive(tools: ToolsRoot, config: CloudConfig, folder: Path) -> Path:
    """Write ``config-drive.img`` into ``folder``: the same as OpenStack tells its machines, on a disk."""
    data = {"uuid": config.instance_id, "name": config.hostname or config.instance_id}
    if config.hostname:
        data["hostname"] = config.hostname
    tree = folder / "openstack"
    latest = tree / "latest"
    latest.mkdir(parents=True, exist_ok=True)
    (latest / "meta_data.json").write_text(json.dumps(data) + "\n")
    (latest / "user_data").write_text(config.user_data())
    return _pack(tools, folder / "config-drive.img", "CONFIG-2", [tree])


def pack_seed(tools: ToolsRoot, folder: Path) -> Path:
    """Make ``seed.img`` of the files ``user-data`` and ``meta-data`` in ``folder``."""
    return _pack(tools, folder / "seed.img", "CIDATA", [folder / "user-data", folder / "meta-data"])


def _pack(tools: ToolsRoot, image: Path, label: str, contents: list[Path]) -> Path:
    with image.open("wb") as stream:
        stream.truncate(_SEED_BYTES)
    # mtools' own mformat leaves what looks like a partition table: the kernel would show a partition of the same label.
    script = 'image=$1; mkfs.vfat -n "$2" "$image" >/dev/null; shift 2; mcopy -s -i "$image" "$@" ::'
    tools.run(["sh", "-ec", script, "sh", str(image), label, *map(str, contents)], writable=[image.parent])
    return image
