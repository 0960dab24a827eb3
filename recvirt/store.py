"""The cache: content keys, locks, and outputs that are either whole or absent.

Layout below the cache directory::

    objects/<stage>/<key>/   manifest.json and the outputs (read-only to everyone else)
    locks/<stage>-<key>      one flock(2) a key; held while building
    locks/use-<stage>-<key>  held, shared with others, by whoever uses an output: what is in use is not cleaned
    work/<stage>-<key>/      a build under way; left only by a killed one, and removed by whoever holds the lock next

``manifest.json`` is written last and the folder renamed into place after it was synced: a build killed at any instant
leaves a whole output or none. Does not own: what is built (the stages) nor in which order (the pipeline).
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from recvirt.errors import LockedError, SpaceError, VerificationError
from recvirt.ui import format_bytes, reporter

MANIFEST = "manifest.json"
#: In the names of folders below ``work`` that only wait for their deletion.
ASIDE = ".aside-"


@dataclass(frozen=True)
class FileRef:
    """A file that a stage reads. Its content counts for the key, not where it lies. ``name`` keeps order honest."""

    name: str
    sha256: str
    path: Path = dataclasses.field(compare=False)

    @classmethod
    def of(cls, path: Path, name: str = "") -> FileRef:
        """Read and hash ``path``."""
        return cls(name or path.name, sha256_of(path), path)


@dataclass(frozen=True)
class Upstream:
    """The output of an earlier stage, known by its key alone."""

    stage: str
    key: str


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical(value: Any) -> Any:
    """A JSON-able picture of frozen inputs: what the key is the hash of, and what ``plan`` compares."""
    if isinstance(value, FileRef):
        return {"name": value.name, "sha256": value.sha256}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: canonical(getattr(value, f.name)) for f in dataclasses.fields(value) if f.metadata.get("key", True)
        }
    if isinstance(value, (list, tuple)):
        return [canonical(item) for item in value]
    if isinstance(value, dict):
        return {str(k): canonical(v) for k, v in sorted(value.items())}
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"{type(value).__name__} can't be part of a cache key")


def key_of(stage: str, revision: int, inputs: Any) -> str:
    """The content key: the hash of the stage's name, its revision and its frozen inputs."""
    text = json.dumps([stage, revision, canonical(inputs)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Output:
    """A whole output in the cache."""

    stage: str
    key: str
    directory: Path
    manifest: dict[str, Any]

    def path(self, name: str) -> Path:
        """The path of one output file."""
        return self.directory / name


class Store:
    """The cache directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._in_use: dict[str, IO[str]] = {}  # lock files, open as long as this object lives

    def object_dir(self, stage: str, key: str) -> Path:
        """Where a whole output of ``stage`` lies (or would)."""
        return self.directory / "objects" / stage / key

    def get(self, stage: str, key: str) -> Output | None:
        """The whole output of ``key``, or None. Marks it as used now, and as in use while this object lives."""
        directory = self.object_dir(stage, key)
        if not directory.exists():
            return None
        self.hold(f"{stage}-{key}")
        manifest = _read_manifest(directory / MANIFEST)
        if manifest is None:
            return None
        for name, facts in manifest["outputs"].items():
            if not _is_untouched(directory / name, facts):
                reporter.warn(f"cached {stage} {key[:12]} is damaged ({name}); it is built again")
                return None
        try:
            os.utime(directory / MANIFEST)
        except OSError:
            pass  # a cache that is only read
        return Output(stage, key, directory, manifest)

    def hold(self, name: str) -> None:
        """Keep ``<stage>-<key>`` (or a shared folder) from being cleaned while this object lives."""
        path = self.directory / "locks" / f"use-{name}"
        if name in self._in_use:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = path.open("a")
        except OSError:
            return  # nothing can be removed from a cache that is only read
        fcntl.flock(stream, fcntl.LOCK_SH)
        self._in_use[name] = stream

    def verify(self, output: Output) -> None:
        """Compare every file of an output with the digest in its manifest; VerificationError on a difference."""
        for name, facts in output.manifest["outputs"].items():
            if sha256_of(output.directory / name) != facts["sha256"]:
                raise VerificationError(
                    f"{output.directory / name} is not what was built", hint="recvirt clean removes it"
                )

    def latest(self, stage: str, label: str) -> Output | None:
        """The most recently used output of ``stage`` with this label (the profile's name), to explain differences."""
        found: list[tuple[float, str]] = []
        for manifest in (self.directory / "objects" / stage).glob(f"*/{MANIFEST}"):
            try:
                if (_read_manifest(manifest) or {}).get("label") == label:
                    found.append((manifest.stat().st_mtime, manifest.parent.name))
            except OSError:
                continue
        return self.get(stage, max(found)[1]) if found else None

    @contextmanager
    def lock(
        self, stage: str, key: str, *, wait: bool = True, gave_up: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """Hold the lock of one key. Says so while it waits for another recvirt; see :func:`take_lock`."""
        folder = self.directory / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{stage}-{key}").open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise LockedError(f"another recvirt builds {stage} {key[:12]}") from None
                reporter.info(f"waiting for another recvirt that builds the same {stage}")
                take_lock(stream.fileno(), gave_up)
            yield

    def fresh_work_dir(self, stage: str, key: str) -> Path:
        """An empty folder to build in; what a killed build left there is removed. Call with the lock held."""
        folder = self.directory / "work" / f"{stage}-{key}"
        if folder.exists():
            with suppress(PermissionError):
                # Files of sub-ids need more than this; ``cleaning.sweep`` has it.
                remove_tree(self.set_aside(folder, stage, key))
        folder.mkdir(parents=True)
        return folder

    def set_aside(self, folder: Path, stage: str, key: str) -> Path:
        """Take a folder out of the way in one step, to be deleted at leisure; returns where it is now.

        What is half deleted must not look whole; and programs of a build that was just killed may still be dying in it.
        """
        aside = self.directory / "work" / f"{stage}-{key}{ASIDE}{os.getpid()}-{time.monotonic_ns()}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(aside)
        return aside

    def commit(self, stage: str, key: str, work_dir: Path, *, label: str, inputs: Any, seconds: float) -> Output:
        """Make ``work_dir/out`` the output of ``key``: digests, manifest, sync, rename. Call with the lock held."""
        out = work_dir / "out"
        outputs = {
            str(path.relative_to(out)): {
                "bytes": path.stat().st_size,
                "sha256": sha256_of(path),
                "mtime_ns": path.stat().st_mtime_ns,
            }
            for path in sorted(out.iterdir())
            if path.is_file()
        }
        manifest = {
            "stage": stage, "key": key, "label": label, "inputs": canonical(inputs), "outputs": outputs,
            "seconds": round(seconds, 3), "created": int(time.time()),
        }  # fmt: skip
        with (out / MANIFEST).open("w") as stream:
            json.dump(manifest, stream, indent=1, sort_keys=True)
            stream.flush()
            os.fsync(stream.fileno())
        target = self.object_dir(stage, key)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.hold(f"{stage}-{key}")
        damaged = self.set_aside(target, stage, key) if target.exists() else None
        out.rename(target)
        _sync_dir(target.parent)
        remove_tree(work_dir)
        if damaged is not None:
            remove_tree(damaged)
        return Output(stage, key, target, manifest)


def take_lock(descriptor: int, gave_up: Callable[[], bool] = lambda: False) -> None:
    """Wait for an exclusive flock(2). LockedError once ``gave_up()``: a thread that waits in flock can't be woken."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if gave_up():
                raise LockedError("gave up waiting for another recvirt") from None
            time.sleep(0.1)


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest, or None when there is none that makes sense: then there is no output either."""
    try:
        manifest = json.loads(path.read_text())
        whole = all(isinstance(facts["bytes"], int) for facts in manifest["outputs"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None


def _sync_dir(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_untouched(path: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a file still is what was built. Its size and time tell cheaply; the digest decides when the time moved
    (a restored backup is fine, a write through a link is not)."""
    try:
        found = path.stat()
        if found.st_size != facts["bytes"]:
            return False
        if found.st_mtime_ns == facts.get("mtime_ns", found.st_mtime_ns):
            return True
        if sha256_of(path) != facts["sha256"]:
            return False
        os.utime(path, ns=(found.st_atime_ns, facts["mtime_ns"]))
    except FileNotFoundError:
        return False
    except PermissionError:
        pass
    return True


def remove_tree(folder: Path) -> None:
    """Delete a tree, also one with read-only folders in it, and one in which programs are still dying."""

    def unlock(function: Any, path: str, _error: Any) -> None:
        os.chmod(os.path.dirname(path), 0o700)
        if Path(path).is_dir() and not Path(path).is_symlink():
            os.chmod(path, 0o700)
        function(path)

    for patience in (0.05, 0.2, 1.0, None):
        try:
            shutil.rmtree(folder, onerror=unlock)
            return
        except OSError:
            if not folder.exists():
                return
            if patience is None:
                raise
            time.sleep(patience)


def check_room(directory: Path, wanted_bytes: int) -> None:
    """Make ``directory`` and raise SpaceError if its disk has less than ``wanted_bytes`` free."""
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if wanted_bytes > free:
        raise SpaceError(
            f"about {format_bytes(wanted_bytes)} are needed below {directory}, {format_bytes(free)} are free",
            hint="free some room (recvirt clean), or set --cache-dir to a larger disk",
        )
