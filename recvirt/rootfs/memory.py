"""Where the tree is built: in memory when there is enough of it, else on the cache's disk.

A tree in memory saves the time of writing, syncing and deleting some tens of thousands of files; it vanishes with the
sandbox, also when a build is killed. A tree on disk may hold files of other owners (an ordinary user's sub-ids), which
only the sandbox can delete: what a killed build left is removed by the next one. Owns the choice and that removal.
"""

from __future__ import annotations

import fcntl
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recvirt.sandbox import ToolsRoot

#: The sandbox's own /tmp, a tmpfs. tmpfs(5): it may take half of the memory.
SANDBOX_TMP = Path("/tmp")
#: Left to everything else that runs meanwhile (a kernel build, for one).
_RESERVE_BYTES = 1024**3


def fits_in_memory(need_bytes: int, meminfo: str) -> bool:
    """Whether a tree of ``need_bytes`` fits, by the text of /proc/meminfo (proc(5))."""
    facts = {}
    for line in meminfo.splitlines():
        name, _, rest = line.partition(":")
        if rest.strip().endswith("kB"):
            facts[name] = int(rest.split()[0]) * 1024
    available = facts.get("MemAvailable", 0)
    return need_bytes <= facts.get("MemTotal", 0) // 2 and need_bytes + _RESERVE_BYTES <= available


@contextmanager
def workspace(need_bytes: int, tools: ToolsRoot, trees_dir: Path) -> Iterator[Path]:
    """The bootstrapper's TMPDIR: in memory, or a folder below ``trees_dir`` that is removed afterwards."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        meminfo = ""
    sweep(tools, trees_dir)
    if fits_in_memory(need_bytes, meminfo):
        yield SANDBOX_TMP
        return
    folder = trees_dir / uuid.uuid4().hex[:12]
    trees_dir.mkdir(parents=True, exist_ok=True)
    with (trees_dir / f"{folder.name}.lock").open("w") as lock:
        # Locked before the folder is there, so that nobody takes it for an abandoned one.
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir()
        try:
            yield folder
        finally:
            _remove(tools, folder)
            Path(lock.name).unlink(missing_ok=True)


def sweep(tools: ToolsRoot, trees_dir: Path) -> None:
    """Remove trees whose build is no more."""
    if not trees_dir.is_dir():
        return
    for folder in sorted(path for path in trees_dir.iterdir() if path.is_dir()):
        lock_path = trees_dir / f"{folder.name}.lock"
        with lock_path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            _remove(tools, folder)
            lock_path.unlink(missing_ok=True)


def _remove(tools: ToolsRoot, folder: Path) -> None:
    tools.run(["rm", "-rf", "--one-file-system", str(folder)], writable=[folder.parent], all_ids=True)
