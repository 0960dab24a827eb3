"""Where the tree is built: in memory when there is enough of it, else on the cache's disk.

A tree in memory saves the time of writing, syncing and deleting some tens of thousands of files; it vanishes with the
sandbox, also when a build is killed. Owns the decision only.
"""

from __future__ import annotations

from pathlib import Path

#: The sandbox's own /tmp, a tmpfs. tmpfs(5): it may take half of the memory.
SANDBOX_TMP = "/tmp"
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


def workspace(need_bytes: int, scratch: Path) -> tuple[str, bool]:
    """The TMPDIR for the bootstrapper, and whether it is in memory."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        meminfo = ""
    if fits_in_memory(need_bytes, meminfo):
        return SANDBOX_TMP, True
    folder = scratch / "tree"
    folder.mkdir(exist_ok=True)
    return str(folder), False
