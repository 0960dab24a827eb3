"""Which parts of the cache are old, and their removal. Owns the policy; the layout is the store's."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from recvirt.store import MANIFEST, Store, remove_tree

#: Caches that are shared between keys; only ``--all`` empties them, for they are what makes the next build quick.
SHARED = ("apt", "debs", "sources", "ccache", "downloads")


@dataclass(frozen=True)
class Removal:
    """One folder that goes (or went), its size on disk and the reason."""

    path: Path
    size_bytes: int
    why: str


def size_on_disk(path: Path) -> int:
    """Allocated bytes below ``path``; what vanishes meanwhile counts as nothing."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


@contextmanager
def _unless_locked(store: Store, name: str) -> Iterator[bool]:
    """Hold the lock of ``<stage>-<key>``; yields False if a build holds it."""
    folder = store.directory / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def clean_cache(
    store: Store, *, days: float | None, max_bytes: int | None, everything: bool, tools: bool, dry_run: bool
) -> list[Removal]:
    """Remove leftovers of killed builds, then outputs by age, then the least recently used until ``max_bytes`` are left.

    A tools root goes only when ``tools`` or ``everything`` is set. What a running build holds is left alone.
    """
    removals = [Removal(path, size_on_disk(path), "left by a killed build") for path in _folders(store, "work/*")]
    outputs: list[tuple[float, Removal]] = []
    for path in _folders(store, "objects/*/*"):
        is_tools = path.parent.name == "tools"
        used = _last_used(path)
        if everything or (tools and is_tools):
            removals.append(Removal(path, size_on_disk(path), "asked for"))
        elif not is_tools:
            outputs.append((used, Removal(path, size_on_disk(path), "")))
    outputs.sort(key=lambda pair: pair[0])
    kept_bytes = sum(item.size_bytes for _, item in outputs)
    for used, item in outputs:
        age_days = (time.time() - used) / 86400
        if days is not None and age_days >= days:
            why = f"not used for {age_days:.0f} days"
        elif max_bytes is not None and kept_bytes > max_bytes:
            why = "least recently used"
        else:
            continue
        kept_bytes -= item.size_bytes
        removals.append(Removal(item.path, item.size_bytes, why))
    if everything:
        removals += [Removal(p, size_on_disk(p), "asked for") for name in SHARED for p in _folders(store, name)]
    return [item for item in removals if dry_run or _remove(store, item)]


def _folders(store: Store, pattern: str) -> list[Path]:
    return sorted(path for path in store.directory.glob(pattern) if path.is_dir())


def _last_used(path: Path) -> float:
    try:
        return (path / MANIFEST).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove(store: Store, item: Removal) -> bool:
    relative = item.path.relative_to(store.directory).parts
    name = relative[1] if relative[0] == "work" else "-".join(relative[1:]) if relative[0] == "objects" else "shared"
    with _unless_locked(store, name) as free:
        if free and item.path.exists():
            remove_tree(item.path)
            return True
    return False
