"""What a person gets from a build: the files below ``build/<profile>/``, taken from the stages' outputs.

Owns: which outputs are products, how they get there without putting the cache at risk, and taking away what a later
build no longer makes. Does not own: the outputs themselves (``store``), or when they are made (``pipeline``).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from recvirt.errors import RecvirtError
from recvirt.store import MANIFEST, Output

#: stage -> file names (a trailing * matches any ending).
PRODUCTS = {
    "kernel_config": ("config", "report.json"),
    "kernel_build": ("build-info.json",),
    "image": ("disk.*", "*.json", "*.txt", "*.ovf"),
}
#: Remembers which files are ours to take away again, a list a stage.
_LIST = ".products.json"
#: linux/fs.h, FICLONE: share a file's blocks where the file system can.
_FICLONE = 0x40049409


def publish(outputs: Mapping[str, Output], product_dir: Path) -> list[Path]:
    """Make the products of ``outputs`` appear in ``product_dir``, and those that are no longer made disappear.

    Each file is replaced in one step. Products of stages that are not among ``outputs`` stay as they are.
    """
    wanted = {stage: _products_of(stage, output) for stage, output in outputs.items() if stage in PRODUCTS}
    with (product_dir / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in product_dir.glob(".*.part-*"):
            left.unlink()  # a killed run's; whoever is alive would hold the lock
        before = _read_list(product_dir)
        after = {**before, **{stage: sorted(files) for stage, files in wanted.items()}}
        # Told before it is done: a killed run's successor knows what may be there.
        _write_list(product_dir, {s: sorted({*before.get(s, ()), *after[s]}) for s in after})
        for files in wanted.values():
            for name, source in files.items():
                link_or_copy(source, product_dir / name)
        for name in {n for names in before.values() for n in names} - {n for names in after.values() for n in names}:
            (product_dir / name).unlink(missing_ok=True)
        _write_list(product_dir, after)
    return sorted(product_dir / name for files in wanted.values() for name in files)


def _products_of(stage: str, output: Output) -> dict[str, Path]:
    found = {}
    for pattern in PRODUCTS[stage]:
        for source in sorted(output.directory.glob(pattern)):
            if source.name != MANIFEST:
                found[source.name if stage == "image" else f"{stage}-{source.name}"] = source
    return found


def _read_list(product_dir: Path) -> dict[str, list[str]]:
    try:
        data = json.loads((product_dir / _LIST).read_text())
        # Names only: nothing outside the folder can be taken away, whatever the list says.
        return {str(stage): [Path(str(name)).name for name in names] for stage, names in data.items()}
    except (FileNotFoundError, ValueError, AttributeError, TypeError):
        return {}


def _write_list(product_dir: Path, products: Mapping[str, list[str]]) -> None:
    text = json.dumps(products, indent=1, sort_keys=True)
    path = product_dir / _LIST
    if not path.exists() or path.read_text() != text:
        partial = product_dir / f"{_LIST}.part"
        partial.write_text(text)
        partial.replace(path)


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` the same content as ``source``, in one step.

    An ordinary user gets a hard link to the read-only file; root could write through one, and so gets a copy (its
    blocks shared where the file system can). A copy that was changed since (its time tells) is made again.
    """
    found = source.stat()
    with suppress(FileNotFoundError):
        there = target.stat()
        if os.path.samestat(found, there) and os.geteuid() != 0:
            return
        if (there.st_size, there.st_mtime_ns) == (found.st_size, found.st_mtime_ns) and there.st_ino != found.st_ino:
            return
    partial = target.with_name(f".{target.name}.part-{os.getpid()}-{threading.get_ident()}")
    try:
        if os.geteuid() == 0 or not _linked(source, partial):
            _copy(source, partial)
            os.utime(partial, ns=(found.st_atime_ns, found.st_mtime_ns))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _linked(source: Path, target: Path) -> bool:
    try:
        source.chmod(0o444)
        os.link(source, target)
    except OSError:
        return False  # another file system, or one without links
    return True


def _copy(source: Path, target: Path) -> None:
    """Copy a file that may be sparse. ``target`` must not exist: writing into an existing link would be a disaster."""
    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new, _FICLONE, old.fileno())
            return
        except OSError:
            pass
        size = os.fstat(old.fileno()).st_size
        os.truncate(new.fileno(), size)
        offset = 0
        while (data := _next_data(old.fileno(), offset, size)) is not None:
            start, end = data
            os.lseek(old.fileno(), start, os.SEEK_SET)
            os.lseek(new.fileno(), start, os.SEEK_SET)
            while start < end:
                start += _copied(old.fileno(), new.fileno(), end - start)
            offset = end


def _next_data(descriptor: int, offset: int, size: int) -> tuple[int, int] | None:
    """Where the next data from ``offset`` on begins and ends (lseek(2), SEEK_DATA); None after the last."""
    if offset >= size:
        return None
    try:
        start = os.lseek(descriptor, offset, os.SEEK_DATA)
        return start, os.lseek(descriptor, start, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        return offset, size  # a file system that knows no holes


def _copied(source: int, target: int, count: int) -> int:
    """Copy up to ``count`` bytes at the files' positions; returns how many."""
    done = os.sendfile(target, source, None, min(count, 1 << 30))
    if done == 0:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return done


def built_image(profile_name: str, build_dir: Path) -> Path:
    """The image of a profile that was built before; RecvirtError with the command to run if there is none."""
    for name in ("disk.qcow2", "disk.raw"):
        path = build_dir / profile_name / name
        if path.exists():
            return path
    others = sorted(path.name for path in (build_dir / profile_name).glob("disk.*"))
    if others:
        raise RecvirtError(
            f"{profile_name} was built as {', '.join(others)} only; a VM here boots from qcow2 or raw",
            hint=f"recvirt build {profile_name} --set image.formats+=qcow2",
        )
    raise RecvirtError(
        f"there is no image of {profile_name} in {build_dir}", hint=f"build it: recvirt build {profile_name}"
    )


def disk_is_full(*folders: Path, below_bytes: int = 8 << 20) -> Path | None:
    """The first of ``folders`` whose disk has no room left, to tell a full disk from another failure."""
    for folder in folders:
        with suppress(OSError):
            if shutil.disk_usage(folder).free < below_bytes:
                return folder
    return None
