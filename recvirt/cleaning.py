"""Which parts of the cache are old, and their removal. Owns the policy; the layout is the store's."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from recvirt.errors import RecvirtError
from recvirt.run import find_tool, run
from recvirt.store import ASIDE, MANIFEST, Store, remove_tree
from recvirt.ui import reporter

#: Folders that stages share between keys: they make the next build quick, so only ``--all`` empties them.
SHARED = ("apt", "debs", "sources", "ccache", "downloads")
#: Those of them whose parts age: pattern, and the file of a part that tells when it was used last ("": the part
#: itself). ccache bounds itself.
_AGING = (
    ("debs/*.deb", ""), ("debs/partial/*", ""), ("downloads/*", ""), ("apt/*/", "updated.json"),
    ("sources/*/", "source.json"),
)  # fmt: skip


@dataclass(frozen=True)
class Removal:
    """One folder or file that goes (or went), its size on disk and the reason."""

    path: Path
    size_bytes: int
    why: str


def size_on_disk(path: Path) -> int:
    """Allocated bytes of a file, or of all below a folder; what vanishes meanwhile counts as nothing."""
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_blocks * 512
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                total += Path(folder, name).lstat().st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def remove_for_good(folder: Path) -> None:
    """Delete a tree, also one with files of an ordinary user's sub-ids, as a killed bootstrapper leaves.

    What can't be deleted is told, not raised: it stands in nobody's way.
    """
    try:
        remove_tree(folder)
    except PermissionError as error:
        if os.geteuid() == 0:
            reporter.warn(f"could not be removed: {error}")
            return
        inside = ["unshare", "--user", "--map-auto", "--map-root-user", "--", "rm", "-rf", "--", str(folder)]
        try:
            run([find_tool(inside[0]), *inside[1:]])
        except RecvirtError:
            reporter.warn(f"could not be removed: {error}")


@contextmanager
def _locked(store: Store, names: Sequence[str]) -> Iterator[bool]:
    """Hold these locks; yields False if another process holds one of them."""
    folder = store.directory / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for name in names:
            stream = stack.enter_context((folder / name).open("a"))
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
        yield True


def clean_cache(
    store: Store, *, days: float | None, max_bytes: int | None, everything: bool, tools: bool, dry_run: bool
) -> list[Removal]:
    """Remove leftovers of killed builds and what was not used for ``days``, then the least recently used outputs.

    The latter until outputs of ``max_bytes`` are left. Returns what was removed (or would be).
    A tools root goes only when ``tools`` or ``everything`` is set. What a running build holds or uses is left alone.
    """
    # Running builds have their work folders there too; their locks tell.
    found = [Removal(path, size_on_disk(path), "left by a killed build") for path in _entries(store, "work/*")]
    found += _asked_for(store, everything=everything, tools=tools)
    if not everything:
        found += _old_outputs(store, days=days, max_bytes=max_bytes)
        found += _old_downloads(store, days) if days is not None else []
    return [item for item in found if _remove(store, item, dry_run=dry_run)]


def sweep(store: Store) -> None:
    """Remove what killed builds left. Cheap when there is nothing."""
    for path in _entries(store, "work/*"):
        _remove(store, Removal(path, 0, ""), dry_run=False)


def _asked_for(store: Store, *, everything: bool, tools: bool) -> list[Removal]:
    pattern = "objects/*/*" if everything else "objects/tools/*" if tools else ""
    paths = _entries(store, pattern) if pattern else []
    if everything:
        paths += [path for name in SHARED for path in _entries(store, name)]
    return [Removal(path, size_on_disk(path), "asked for") for path in paths]


def _old_outputs(store: Store, *, days: float | None, max_bytes: int | None) -> list[Removal]:
    paths = [path for path in _entries(store, "objects/*/*") if path.parent.name != "tools"]
    outputs = sorted((_last_used(path), size_on_disk(path), path) for path in paths)
    kept_bytes = sum(size for _, size, _ in outputs)
    found = []
    for used, size, path in outputs:
        age_days = (time.time() - used) / 86400
        if days is not None and age_days >= days:
            why = f"not used for {age_days:.0f} days"
        elif max_bytes is not None and kept_bytes > max_bytes:
            why = "least recently used"
        else:
            continue
        kept_bytes -= size
        found.append(Removal(path, size, why))
    return found


def _old_downloads(store: Store, days: float) -> list[Removal]:
    found = []
    for pattern, stamp in _AGING:
        for path in _entries(store, pattern):
            age_days = (time.time() - _last_used(path, stamp)) / 86400
            if age_days >= days:
                found.append(Removal(path, size_on_disk(path), f"not used for {age_days:.0f} days"))
    return found


def _entries(store: Store, pattern: str) -> list[Path]:
    return sorted(store.directory.glob(pattern))


def _last_used(path: Path, stamp: str = MANIFEST) -> float:
    try:
        return (path / stamp).stat().st_mtime
    except FileNotFoundError:
        return path.lstat().st_mtime  # half made, and left so


def _remove(store: Store, item: Removal, *, dry_run: bool) -> bool:
    kind, *rest = item.path.relative_to(store.directory).parts
    if kind == "work":
        # Nobody but its builder uses a work folder.
        locks = [rest[0].partition(ASIDE)[0]]
    else:
        name = "-".join(rest) if kind == "objects" else "shared"
        locks = [name, f"use-{name}"]
    with _locked(store, locks) as free:
        if not free or not item.path.exists():
            return False
        if dry_run:
            return True
        if item.path.is_symlink() or not item.path.is_dir():
            item.path.unlink()
        elif kind == "work":
            remove_for_good(item.path)
        else:
            # In one step out of sight: what is half deleted must not look whole.
            remove_for_good(store.set_aside(item.path, *(rest if kind == "objects" else ("shared", kind))))
        return True
