"""A PostgreSQL cluster for one test run: in a folder of its own, on a socket only, gone afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DEBIAN = Path("/usr/lib/postgresql")


def programs() -> Path | None:
    """The folder with initdb and pg_ctl, of the newest version that is installed."""
    if (found := shutil.which("initdb")) is not None:
        return Path(found).resolve().parent
    versions = sorted(_DEBIAN.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return versions[-1].parent if versions else None


def _run(*words: str | Path) -> None:
    """As a user who is not root: PostgreSQL refuses that one."""
    prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*prefix, *map(str, words)], capture_output=True, text=True, cwd="/", timeout=120, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{words[0]}: {done.stdout}{done.stderr}")


def start(folder: Path) -> None:
    """Start a cluster that lies in ``folder``."""
    binaries = programs()
    assert binaries is not None
    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off -c max_connections=50"
    _run(binaries / "pg_ctl", "-D", folder / "data", "-w", "-l", folder / "log", "-o", options, "start")


def kill(folder: Path) -> None:
    """As kill -9 of its first process does: the others see it and end."""
    os.kill(int((folder / "data/postmaster.pid").read_text().split()[0]), signal.SIGKILL)


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """The environment (PGHOST, PGUSER) with which a running cluster is found. RuntimeError when it does not start."""
    binaries = programs()
    if binaries is None:
        raise RuntimeError("PostgreSQL is not installed (Debian's package postgresql)")
    with tempfile.TemporaryDirectory(prefix="recvirt-pg-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        data = folder / "data"
        _run(binaries / "initdb", "-D", data, "--username=cloud", "--auth=trust", "--encoding=UTF8", "--no-sync")
        start(folder)
        try:
            yield {"PGHOST": str(folder), "PGUSER": "cloud"}
        finally:
            _run(binaries / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
