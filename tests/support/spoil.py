"""Spoils an image offline: files of its ext4 root are read, written and removed with debugfs, nothing is booted."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

from recvirt.sandbox import ToolsRoot


class SpoiltImage:
    """A raw copy of an image (``path``), whose root file system can be changed."""

    def __init__(self, tools: ToolsRoot, image: Path, folder: Path) -> None:
        self.tools = tools
        self.folder = folder
        self.path = folder / "spoilt.raw"
        facts = json.loads((image.parent / "image.json").read_text())
        parts = {part["name"]: int(part["offset_bytes"]) for part in facts["partitions"]}
        self.root_offset, self.esp_offset = parts["root"], parts["esp"]
        argv = ["qemu-img", "convert", "-O", "raw", str(image), str(self.path)]
        tools.run(argv, readable=[image], writable=[folder])
        self._number = 0

    def _debugfs(self, *commands: str) -> str:
        """debugfs(8) tells faults on stderr and ends with 0 all the same."""
        target = f"{self.path}?offset={self.root_offset}"
        script = self.folder / "debugfs.txt"
        script.write_text("".join(f"{command}\n" for command in commands))
        done = self.tools.run(["debugfs", "-w", "-f", str(script), target], writable=[self.folder])
        faults = [line for line in done.stderr.splitlines() if not line.startswith("debugfs ")]
        if faults:
            raise RuntimeError(f"{commands}: {faults}")
        return done.stdout

    def read(self, path: str) -> str:
        """A file's text."""
        self._number += 1
        out = self.folder / f"read{self._number}"
        self._debugfs(f"dump {path} {out}")
        return out.read_text()

    def exists(self, path: str) -> bool:
        """Whether the file or folder is there."""
        try:
            self._debugfs(f"stat {path}")
        except RuntimeError:
            return False
        return True

    def make_dir(self, path: str, mode: int = 0o755) -> None:
        """A folder and those above it."""
        parent = path.rsplit("/", 1)[0]
        if parent and not self.exists(parent):
            self.make_dir(parent)
        if not self.exists(path):
            self._debugfs(f"mkdir {path}")
        self._debugfs(f"sif {path} mode 0{stat.S_IFDIR | mode:o}")

    def write(self, path: str, text: str | bytes, mode: int = 0o644) -> None:
        """Make or replace a file, owned by root."""
        self._number += 1
        source = self.folder / f"write{self._number}"
        source.write_bytes(text.encode() if isinstance(text, str) else text)
        self.make_dir_of(path)
        if self.exists(path):
            self._debugfs(f"rm {path}")
        self._debugfs(
            f"write {source} {path}", f"sif {path} uid 0", f"sif {path} gid 0",
            f"sif {path} mode 0{stat.S_IFREG | mode:o}",
        )  # fmt: skip

    def make_dir_of(self, path: str) -> None:
        """The folder of ``path``."""
        parent = path.rsplit("/", 1)[0]
        if parent and not self.exists(parent):
            self.make_dir(parent)

    def remove(self, path: str) -> None:
        """Remove a file; it must have been there, else nothing was spoilt."""
        self._debugfs(f"rm {path}")

    def link(self, path: str, target: str) -> None:
        """Make or replace a symbolic link."""
        self.make_dir_of(path)
        if self.exists(path):
            self._debugfs(f"rm {path}")
        self._debugfs(f"symlink {path} {target}")

    def change(self, path: str, edit: Callable[[str], str], mode: int = 0o644) -> None:
        """Rewrite a file's text; the edit must change something."""
        before = self.read(path)
        after = edit(before)
        if before == after:
            raise RuntimeError(f"nothing to spoil in {path}")
        self.write(path, after, mode)

    def append(self, path: str, text: str, mode: int = 0o644) -> None:
        """Add to a file's end."""
        self.change(path, lambda before: before + text, mode)

    def unit(self, name: str, text: str, target: str = "multi-user.target") -> None:
        """A systemd unit, enabled."""
        self.write(f"/etc/systemd/system/{name}", text)
        self.link(f"/etc/systemd/system/{target}.wants/{name}", f"/etc/systemd/system/{name}")

    def oneshot(self, name: str, command: str, order: str = "") -> None:
        """A service that runs a shell command once at each boot."""
        self.unit(
            f"{name}.service",
            f"[Unit]\nDescription={name}\n{order}\n[Service]\nType=oneshot\nExecStart=/bin/sh -c '{command}'\n"
            "[Install]\nWantedBy=multi-user.target\n",
        )

    def zero(self, offset: int, size: int) -> None:
        """Overwrite bytes of the disk."""
        with self.path.open("r+b") as stream:
            stream.seek(offset)
            stream.write(b"\0" * size)
