"""Files of volumes: made with their file system in them, grown, kept and brought back; never mounted on the host.

A volume's content is its guest's, so programs that read it (e2fsck, resize2fs) run within bounds. The generation in a
small file beside it tells an older message from a newer one. ``QemuVolumes`` works with the host's own programs;
``SparseVolumes`` stands beside libvirt's test driver.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from recvirt.nestedcloud.model import Fault, VolumeSpec
from recvirt.nestedcloud.worker.errors import ActionError
from recvirt.nestedcloud.worker.host import Host
from recvirt.nestedcloud.worker.storage import DISK_MODE, Limits, check_room, run_tool, storage_error, whole_file

#: What a label may have: ext4 16 bytes (mkfs.ext4(8)), xfs 12 (mkfs.xfs(8)).
_LABEL_BYTES = {"ext4": 16, "xfs": 12}
#: e2fsck(8): no errors, or errors corrected.
_E2FSCK_GOOD = (0, 1)


class Volumes(Protocol):
    """Volumes of one host."""

    def make(self, spec: VolumeSpec, operation: str) -> None:
        """The file, with its file system; one that is there is left as it is."""

    def grow(self, spec: VolumeSpec, operation: str) -> str:
        """Make one that nobody uses larger, with its file system; what is left to do, in words."""

    def note(self, spec: VolumeSpec, operation: str) -> None:
        """Remember generation and operation, for something done elsewhere."""

    def check_fresh(self, spec: VolumeSpec) -> None:
        """ActionError when the volume was changed by a later request."""

    def size(self, spec: VolumeSpec) -> int:
        """Bytes that a guest sees. ActionError when there is no such volume."""

    def snapshot(self, spec: VolumeSpec, name: str, operation: str) -> None:
        """Keep what is in it under a name, unless that is there."""

    def revert(self, spec: VolumeSpec, name: str, operation: str) -> None:
        """Back to what was kept. Once an operation."""

    def remove_snapshot(self, spec: VolumeSpec, name: str, operation: str) -> None:
        """Forget what was kept, unless it is gone."""

    def remove(self, spec: VolumeSpec) -> None:
        """The file and all that was kept of it, as far as it is there."""


def guest_has_to(filesystem: str) -> str:
    """What the guest does after its volume grew."""
    return {
        "ext4": "the guest grows the file system: resize2fs DEVICE",
        "xfs": "the guest grows the file system, mounted: xfs_growfs MOUNTPOINT",
    }.get(filesystem, "")


class _Common:
    def __init__(self, host: Host) -> None:
        self.host = host

    def path(self, spec: VolumeSpec) -> Path:
        """Where it is."""
        return self.host.disk_path(spec.uuid, spec.format)

    def _existing(self, spec: VolumeSpec) -> Path:
        path = self.path(spec)
        if not path.is_file():
            raise ActionError(Fault.NOT_FOUND, f"the volume {spec.name} is not on this host")
        return path

    def _facts(self, spec: VolumeSpec) -> dict[str, object]:
        try:
            found = json.loads(self.host.volume_facts_path(spec.uuid).read_text())
        except FileNotFoundError:
            return {}
        return found if isinstance(found, dict) else {}

    def note(self, spec: VolumeSpec, operation: str) -> None:
        """See :class:`Volumes`."""
        with whole_file(self.host.volume_facts_path(spec.uuid)) as part:
            part.write_text(json.dumps({"generation": spec.generation, "operation": operation}))

    def check_fresh(self, spec: VolumeSpec) -> None:
        """See :class:`Volumes`."""
        generation = self._facts(spec).get("generation", 0)
        if isinstance(generation, int) and generation > spec.generation:
            raise ActionError(Fault.CONFLICT, f"{spec.name} has been changed since this was asked for")

    def _is_done(self, spec: VolumeSpec, operation: str) -> bool:
        return self._facts(spec).get("operation") == operation

    def remove(self, spec: VolumeSpec) -> None:
        """See :class:`Volumes`."""
        self.check_fresh(spec)
        # The file of facts goes last: killed before, the next attempt still knows the generation.
        paths = [self.path(spec), *self.host.blocks_dir.glob(f"{spec.uuid}-*.raw")]
        for path in (*paths, self.host.volume_facts_path(spec.uuid)):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise storage_error(error) from None

    def _snapshot_path(self, spec: VolumeSpec, name: str) -> Path:
        path = self.host.volume_snapshot_path(spec.uuid, name)
        if not path.is_file():
            raise ActionError(Fault.NOT_FOUND, f"{spec.name} has no snapshot called {name}")
        return path


class SparseVolumes(_Common):
    """Files of the right size, and nothing in them."""

    def make(self, spec: VolumeSpec, operation: str) -> None:
        """See :class:`Volumes`."""
        self.check_fresh(spec)
        if not self.path(spec).exists():
            with whole_file(self.path(spec), DISK_MODE) as part, part.open("wb") as stream:
                stream.truncate(spec.size_bytes)
        self.note(spec, operation)

    def size(self, spec: VolumeSpec) -> int:
        """See :class:`Volumes`."""
        return self._existing(spec).stat().st_size

    def grow(self, spec: VolumeSpec, operation: str) -> str:
        """See :class:`Volumes`."""
        self.check_fresh(spec)
        if self.size(spec) > spec.size_bytes:
            raise ActionError(Fault.NOT_SUPPORTED, "a volume can't be made smaller")
        os.truncate(self.path(spec), spec.size_bytes)
        self.note(spec, operation)
        return guest_has_to(spec.filesystem) if spec.filesystem == "xfs" else ""

    def snapshot(self, spec: VolumeSpec, name: str, operation: str) -> None:
        """See :class:`Volumes`."""
        self.check_fresh(spec)
        target = self.host.volume_snapshot_path(spec.uuid, name)
        if not target.exists():
            with whole_file(target, DISK_MODE) as part, part.open("wb") as stream:
                stream.truncate(self.size(spec))
        self.note(spec, operation)

    def revert(self, spec: VolumeSpec, name: str, operation: str) -> None:
        """See :class:`Volumes`."""
        self.check_fresh(spec)
        if not self._is_done(spec, operation):
            os.truncate(self._existing(spec), self._snapshot_path(spec, name).stat().st_size)
        self.note(spec, operation)

    def remove_snapshot(self, spec: VolumeSpec, name: str, operation: str) -> None:
        """See :class:`Volumes`."""
        self.check_fresh(spec)
        self.host.volume_snapshot_path(spec.uuid, name).unlink(missing_ok=True)
        self.note(spec, operation)


class QemuVolumes(_Common):
    """By mkfs, e2fsck, resize2fs and qemu-img."""

    def __init__(self, host: Host, run: Callable[..., str] = run_tool) -> None:
        super().__init__(host)
        self._run = run

    def make(self, spec: VolumeSpec, operation: str) -> None:
        """See :class:`Volumes`."""
        self.check_fresh(spec)
        path = self.path(spec)
        if not path.exists():
            check_room(self.host.blocks_dir, 0)
            if spec.format == "qcow2" and spec.filesystem == "none":
                with whole_file(path, DISK_MODE) as part:
                    self._run(["qemu-img", "create", "-q", "-f", "qcow2", str(part), str(spec.size_bytes)])
            elif spec.format == "qcow2":
                with ExitStack() as stack:
                    raw = stack.enter_context(self._scratch(spec))
                    self._format(raw, spec)
                    self._to_qcow2(raw, path)
            else:
                with whole_file(path, DISK_MODE) as part:
                    self._format(part, spec)
        self.note(spec, operation)

    def _format(self, path: Path, spec: VolumeSpec) -> None:
        with path.open("wb") as stream:
            stream.truncate(spec.size_bytes)
        if spec.filesystem == "none":
            return
        label = spec.name[: _LABEL_BYTES[spec.filesystem]]
        if spec.filesystem == "ext4":
            words = ["mkfs.ext4", "-q", "-F", "-L", label, "-U", spec.uuid, str(path)]
        else:
            words = ["mkfs.xfs", "-q", "-f", "-L", label, "-m", f"uuid={spec.uuid}", str(path)]
        self._run(words)

    def _to_qcow2(self, raw: Path, path: Path) -> None:
        with whole_file(path, DISK_MODE) as part:
            self._run(["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", str(raw), str(part)])

    def _scratch(self, spec: VolumeSpec) -> _Scratch:
        return _Scratch(self.host.blocks_dir / f".{spec.uuid}.raw.part-{os.getpid()}")

    def size(self, spec: VolumeSpec) -> int:
        """See :class:`Volumes`."""
        # Of our own making, and the guest never reaches its header, so that may be believed.
        words = ["qemu-img", "info", "-U", "-f", spec.format, "--output=json", str(self._existing(spec))]
        return int(json.loads(self._run(words))["virtual-size"])

    def grow(self, spec: VolumeSpec, operation: str) -> str:
        """See :class:`Volumes`."""
        self.check_fresh(spec)
        now = self.size(spec)
        path = self.path(spec)
        if now > spec.size_bytes:
            raise ActionError(Fault.NOT_SUPPORTED, "a volume can't be made smaller")
        if now < spec.size_bytes:
            self._run(["qemu-img", "resize", "-q", "-f", spec.format, str(path), str(spec.size_bytes)])
        # Also when the size is right: the last attempt may have ended here.
        how = self._grow_filesystem(spec, path)
        self.note(spec, operation)
        return how

    def _grow_filesystem(self, spec: VolumeSpec, path: Path) -> str:
        if spec.filesystem != "ext4":
            return guest_has_to(spec.filesystem)
        if spec.format == "qcow2" and self._has_snapshots(path):
            return f"it has snapshots, so {guest_has_to('ext4')}"
        limits = Limits(file_bytes=spec.size_bytes)
        try:
            if spec.format == "raw":
                self._resize2fs(path, limits)
            else:
                with self._scratch(spec) as raw:
                    self._run(["qemu-img", "convert", "-q", "-f", "qcow2", "-O", "raw", str(path), str(raw)])
                    self._resize2fs(raw, limits)
                    self._to_qcow2(raw, path)
        except ActionError as error:
            if error.fault is not Fault.STORAGE:
                raise
            # The volume did grow, and what its guest keeps in it is the guest's business.
            return f"its file system was left as it is ({error.message}); {guest_has_to('ext4')}"
        return "with its file system"

    def _resize2fs(self, path: Path, limits: Limits) -> None:
        self._run(["e2fsck", "-f", "-p", str(path)], good=_E2FSCK_GOOD, limits=limits)
        self._run(["resize2fs", str(path)], limits=limits)

    def _has_snapshots(self, path: Path) -> bool:
        return bool(self._snapshots(path))

    def _snapshots(self, path: Path) -> list[str]:
        said = json.loads(self._run(["qemu-img", "info", "-U", "-f", "qcow2", "--output=json", str(path)]))
        return [str(item["name"]) for item in said.get("snapshots", ())]

    def _copy(self, source: Path, target: Path) -> None:
        """A sparse copy; a reflink where the file system can (cp(1))."""
        check_room(self.host.blocks_dir, source.stat().st_blocks * 512)
        with whole_file(target, DISK_MODE) as part:
            self._run(["cp", "--sparse=always", "--reflink=auto", "--", str(source), str(part)])

    def snapshot(self, spec: VolumeSpec, name: str, operation: str) -> None:
        """See :class:`Volumes`."""
        self.check_fresh(spec)
        path = self._existing(spec)
        if spec.format == "qcow2":
            if name not in self._snapshots(path):
                self._run(["qemu-img", "snapshot", "-q", "-c", name, str(path)])
        elif not (target := self.host.volume_snapshot_path(spec.uuid, name)).exists():
            self._copy(path, target)
        self.note(spec, operation)

    def revert(self, spec: VolumeSpec, name: str, operation: str) -> None:
        """See :class:`Volumes`."""
        self.check_fresh(spec)
        path = self._existing(spec)
        if not self._is_done(spec, operation):
            if spec.format == "raw":
                self._copy(self._snapshot_path(spec, name), path)
            elif name not in self._snapshots(path):
                raise ActionError(Fault.NOT_FOUND, f"{spec.name} has no snapshot called {name}")
            else:
                self._run(["qemu-img", "snapshot", "-q", "-a", name, str(path)])
        self.note(spec, operation)

    def remove_snapshot(self, spec: VolumeSpec, name: str, operation: str) -> None:
        """See :class:`Volumes`."""
        self.check_fresh(spec)
        path = self._existing(spec)
        if spec.format == "raw":
            self.host.volume_snapshot_path(spec.uuid, name).unlink(missing_ok=True)
        elif name in self._snapshots(path):
            self._run(["qemu-img", "snapshot", "-q", "-d", name, str(path)])
        self.note(spec, operation)


class _Scratch:
    """A name for a file that is gone afterwards."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)


def make_volumes(host: Host) -> Volumes:
    """What suits the host's hypervisor."""
    return SparseVolumes(host) if host.domain_type == "test" else QemuVolumes(host)
