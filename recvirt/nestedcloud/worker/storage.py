"""Files of instances, volumes and images: made under another name, synced, renamed. A file is whole or not there.

Owns both mounts' contents. Names are UUIDs, never what a person typed. ``QemuStorage`` works with qemu-img;
``SparseStorage`` stands beside libvirt's test driver, whose domains open no disk.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from recvirt.nestedcloud.model import DiskSpec, Fault, InstanceSpec, check_uuid
from recvirt.nestedcloud.worker.errors import ActionError
from recvirt.nestedcloud.worker.host import Host
from recvirt.nestedcloud.worker.locks import held
from recvirt.nestedcloud.worker.seed import seed_image

#: Left free on the file systems, for logs and for the metadata of copy-on-write images.
RESERVE_BYTES = 256 * 1024**2
_TOOL_SECONDS = 600


class Storage(Protocol):
    """Files of one host."""

    host: Host

    def ensure_root(self, spec: InstanceSpec) -> None:
        """The root disk, as a copy-on-write copy of its image; one that is there is left as it is."""

    def ensure_seed(self, spec: InstanceSpec) -> None:
        """The first-boot data."""

    def grow(self, disk: DiskSpec) -> bool:
        """Make a disk that nobody uses larger; True when it was smaller. ActionError instead of shrinking."""

    def remove_instance(self, spec_uuid: str) -> None:
        """Root disk, first-boot data and console log, as far as they are there."""


@dataclass(frozen=True)
class Limits:
    """What a program may use that reads what a stranger wrote: bytes of memory, bytes of a file, seconds of a processor
    and of the clock.
    """

    file_bytes: int
    memory_bytes: int = 2 * 1024**3
    seconds: int = 1800

    def words(self) -> list[str]:
        """prlimit(1), to stand before the program: it sets them after the fork, whatever threads we have."""
        return ["prlimit", f"--as={self.memory_bytes}", f"--fsize={self.file_bytes}", f"--cpu={self.seconds}",
                "--core=0", "--"]  # fmt: skip


#: What a guest writes to; everything else is only read by QEMU.
DISK_MODE = 0o660


@contextmanager
def whole_file(path: Path, mode: int = 0o640) -> Iterator[Path]:
    """A name to write to; renamed to ``path`` at the end, or removed. Its group is whom QEMU runs as."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        yield part
        with part.open("rb") as stream:
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        part.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error) from None
    finally:
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """A rename is only sure when its folder is on the disk (fsync(2))."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(host: Host, target: str) -> None:
    """Remove what processes that were killed have left half made of a thing. Called with its lock held."""
    for folder in (host.images_dir, host.blocks_dir):
        for path in folder.glob(f".{check_uuid(target)}*"):
            path.unlink(missing_ok=True)


def storage_error(error: OSError) -> ActionError:
    """An operating system's error in our words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ActionError(Fault.NO_SPACE, f"no space left: {error.filename or error.strerror}")
    return ActionError(Fault.STORAGE, str(error))


def check_room(folder: Path, wanted_bytes: int) -> None:
    """ActionError unless ``folder`` has so much free, and a reserve."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise storage_error(error) from None
    if free < wanted_bytes + RESERVE_BYTES:
        raise ActionError(Fault.NO_SPACE, f"{folder} has {free} bytes free; {wanted_bytes + RESERVE_BYTES} are wanted")


class _Common:
    def __init__(self, host: Host) -> None:
        self.host = host

    def ensure_seed(self, spec: InstanceSpec) -> None:
        """See :class:`Storage`."""
        path = self.host.seed_path(spec.uuid)
        data = seed_image(spec)
        if path.exists() and path.read_bytes() == data:
            return
        with whole_file(path) as part:
            part.write_bytes(data)

    def remove_instance(self, spec_uuid: str) -> None:
        """See :class:`Storage`."""
        paths = [self.host.disk_path(spec_uuid, name) for name in ("qcow2", "raw")]
        paths += [self.host.seed_path(spec_uuid), self.host.console_log_path(spec_uuid)]
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise storage_error(error) from None


class SparseStorage(_Common):
    """Files of the right size, and nothing in them."""

    def ensure_root(self, spec: InstanceSpec) -> None:
        """See :class:`Storage`."""
        path = self.host.disk_path(spec.root.uuid, spec.root.format)
        if not path.exists():
            with whole_file(path, DISK_MODE) as part, part.open("wb") as stream:
                stream.truncate(spec.root.size_bytes)

    def grow(self, disk: DiskSpec) -> bool:
        """See :class:`Storage`."""
        path = self.host.disk_path(disk.uuid, disk.format)
        now = path.stat().st_size
        if now > disk.size_bytes:
            raise ActionError(Fault.NOT_SUPPORTED, "a disk can't be made smaller")
        if now < disk.size_bytes:
            os.truncate(path, disk.size_bytes)
        return now < disk.size_bytes


class QemuStorage(_Common):
    """qcow2 by qemu-img. ``run`` starts a program and returns its stdout."""

    def __init__(self, host: Host, run: Callable[[Sequence[str]], str] | None = None) -> None:
        super().__init__(host)
        self._run = run or run_tool

    def ensure_root(self, spec: InstanceSpec) -> None:
        """See :class:`Storage`."""
        path = self.host.disk_path(spec.root.uuid, spec.root.format)
        if path.exists():
            return
        if spec.root.image is None:
            raise ActionError(Fault.INVALID, "the root disk names no image")
        base = self.host.image_path(spec.root.image)
        if not base.is_file():
            raise ActionError(Fault.NOT_FOUND, f"the image {spec.root.image} is not on this host")
        check_room(self.host.blocks_dir, 0)
        with whole_file(path, DISK_MODE) as part:
            words = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base)]
            self._run([*words, str(part), str(spec.root.size_bytes)])

    def grow(self, disk: DiskSpec) -> bool:
        """See :class:`Storage`."""
        path = self.host.disk_path(disk.uuid, disk.format)
        # Of our own making, so its header may be believed.
        said = json.loads(self._run(["qemu-img", "info", "-U", "-f", disk.format, "--output=json", str(path)]))
        now = int(said["virtual-size"])
        if now > disk.size_bytes:
            raise ActionError(Fault.NOT_SUPPORTED, "a disk can't be made smaller")
        if now < disk.size_bytes:
            self._run(["qemu-img", "resize", "-q", "-f", disk.format, str(path), str(disk.size_bytes)])
        return now < disk.size_bytes


def run_tool(argv: Sequence[str], *, good: Sequence[int] = (0,), limits: Limits | None = None) -> str:
    """Run a program of the host; ActionError with what it said, unless it ends with a ``good`` status."""
    seconds = limits.seconds if limits is not None else _TOOL_SECONDS
    words = [*limits.words(), *argv] if limits is not None else argv
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=seconds,
            check=False, pass_fds=held(),
        )  # fmt: skip
    except FileNotFoundError:
        raise ActionError(Fault.STORAGE, f"{words[0]} is not installed on this host") from None
    except subprocess.TimeoutExpired:
        raise ActionError(Fault.TIMED_OUT, f"{argv[0]} did not end in {seconds} s") from None
    if done.returncode not in good:
        text = done.stderr.strip()[-500:]
        fault = Fault.NO_SPACE if "No space left on device" in text else Fault.STORAGE
        raise ActionError(fault, f"{argv[0]}: {text or f'status {done.returncode}'}")
    return done.stdout
