"""Puts a merged root archive into the root partition of a disk, as ext4, xfs or btrfs.

Owns which way each filesystem is filled. Does not own: the command lines (:mod:`recvirt.disk.filesystem`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recvirt.disk import filesystem, xfs
from recvirt.disk.layout import MIB, Layout
from recvirt.disk.sparse import copy_sparse
from recvirt.disk.tarmerge import Merge
from recvirt.errors import SpaceError, StageError
from recvirt.sandbox import ToolsRoot
from recvirt.ui import format_bytes


@dataclass(frozen=True)
class Filler:
    """What filling needs: the disk (a sparse file of full length), its layout, the tools, a scratch folder, a log."""

    disk: Path
    layout: Layout
    tools: ToolsRoot
    scratch: Path
    log: Path
    epoch: int

    @property
    def _env(self) -> dict[str, str]:
        return {"SOURCE_DATE_EPOCH": str(self.epoch), "TZ": "UTC"}

    def fill(self, kind: str, merge: Merge) -> None:
        """Make the filesystem and fill it. StageError when the partition is too small for the tree."""
        needed = filesystem.least_root_bytes(merge.data_bytes, merge.members, kind)
        if needed > self.layout.root.size_bytes:
            raise StageError(
                f"the tree needs a root partition of about {format_bytes(needed)}, "
                f"the image's has {format_bytes(self.layout.root.size_bytes)}",
                hint=f"set image.size to {-(-(needed + self.layout.root.offset_bytes) // (256 * MIB)) * 256}M or more",
            )
        if kind == "ext4":
            self._fill_ext4(merge)
        else:
            self._fill_from_tree(kind, merge)

    def _fill_ext4(self, merge: Merge) -> None:
        self.tools.run(
            filesystem.mkfs_ext4_argv(self.disk, self.layout, "-"), writable=[self.disk.parent], log_path=self.log,
            env=self._env, feed=merge.write,
        )  # fmt: skip

    def _fill_from_tree(self, kind: str, merge: Merge) -> None:
        check_memory(merge.data_bytes)
        device = self.scratch / "root.fs"
        if kind == "xfs":
            (self.scratch / "root.fs.proto").write_text(xfs.protofile(merge.infos, filesystem.TREE))
        self.tools.run(
            filesystem.mkfs_tree_argv(kind, device, self.layout), writable=[self.scratch], all_ids=True,
            log_path=self.log, env=self._env, feed=merge.write,
        )  # fmt: skip
        if kind == "xfs":
            self._repair_xfs(device, merge)
        copy_sparse(device, self.disk, target_offset=self.layout.root.offset_bytes, truncate=False)
        device.unlink()

    def _repair_xfs(self, device: Path, merge: Merge) -> None:
        inodes = xfs.parse_inodes(self.tools.run(xfs.inodes_argv(device), readable=[device]).stdout)
        missing = merge.infos.keys() - set(inodes.values()) - {""}
        names = [name for name in missing if not merge.infos[name].islnk()]
        if names:
            raise StageError(f"mkfs.xfs left out {len(names)} files: {', '.join(sorted(names)[:5])}")
        commands = xfs.repair_commands(inodes, merge.infos, self.epoch)
        self.tools.run(["xfs_db", "-x", str(device)], writable=[self.scratch], input_text=commands)


def check_memory(data_bytes: int, meminfo: Path = Path("/proc/meminfo")) -> None:
    """SpaceError unless a tree of ``data_bytes`` fits into memory: a tmpfs holds half of it at most (tmpfs(5))."""
    fields = {}
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024
    room = min(fields["MemTotal"] // 2, fields.get("MemAvailable", fields["MemTotal"]))
    if data_bytes * 1.1 > room:
        raise SpaceError(
            f"this image is made from a tree in memory: it takes {format_bytes(data_bytes * 1.1)}, "
            f"{format_bytes(room)} can be had",
            hint="image.filesystem: ext4 with image.initramfs: none needs no such tree",
        )
