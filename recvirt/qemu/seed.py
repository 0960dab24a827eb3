"""First-boot data for cloud-init: a NoCloud seed, which is a small FAT file system labelled ``CIDATA``.

The fields are documented in cloud-init's manual, "NoCloud". mtools writes the file system: nothing is mounted.
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


def pack_seed(tools: ToolsRoot, folder: Path) -> Path:
    """Make ``seed.img`` of the files ``user-data`` and ``meta-data`` in ``folder``."""
    seed = folder / "seed.img"
    user_data, meta_data = folder / "user-data", folder / "meta-data"
    with seed.open("wb") as stream:
        stream.truncate(_SEED_BYTES)
    # mtools' own mformat leaves what looks like a partition table: the kernel would show a partition of the same label.
    script = 'mkfs.vfat -n CIDATA "$1" >/dev/null && mcopy -i "$1" "$2" "$3" ::'
    tools.run(["sh", "-c", script, "sh", str(seed), str(user_data), str(meta_data)], writable=[folder])
    return seed
