"""NFS servers for the guests' mounts: one that works, and two ways of being away.

The working one is ganesha with its memory file system: as an ordinary user too it may open every file it serves, which
its VFS and the kernel's server may not. It listens on the loopback only; guests reach it as 10.0.2.2.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from recvirt.errors import GuestError
from recvirt.run import start, stop
from recvirt.sandbox import ToolsRoot

#: What guests on QEMU's user network call the host.
HOST_ADDRESS = "10.0.2.2"
EXPORTS = ("images", "blocks")
_READY = "NFS SERVER INITIALIZED"
_START_SECONDS = 60.0
_TRIES = 5


def ganesha_config(folder: Path, port: int) -> str:
    """NFS version 4 alone, on the loopback, two exports in memory. Options: ganesha-core-config(8) and relatives."""
    blocks = [
        f"NFS_CORE_PARAM {{ Protocols = 4; Bind_addr = 127.0.0.1; NFS_Port = {port}; Enable_NLM = false;"
        " Enable_RQUOTA = false; Enable_UDP = false; allow_set_io_flusher_fail = true; }",
        f'NFSV4 {{ Graceless = true; RecoveryBackend = fs; RecoveryRoot = "{folder}/recovery"; Minor_Versions = 1,2;'
        " Only_Numeric_Owners = true; }",
        # The memory file system keeps this much of each file.
        "MEM { Inode_Size = 1114112; }",
    ]
    for number, name in enumerate(EXPORTS, 1):
        blocks.append(
            f'EXPORT {{ Export_Id = {number}; Path = "/{name}"; Pseudo = "/{name}"; Access_Type = RW;'
            " Squash = No_Root_Squash; SecType = sys; Protocols = 4; FSAL { Name = MEM; } }"
        )
    return "\n".join(blocks) + "\n"


def nfs_conf(images: str, images_options: str, blocks: str, blocks_options: str) -> str:
    """The text of a guest's /etc/recvirt/nfs.conf."""
    return (
        f"IMAGES_SOURCE={images}\nIMAGES_OPTIONS={images_options}\n"
        f"BLOCKS_SOURCE={blocks}\nBLOCKS_OPTIONS={blocks_options}\n"
    )


@contextmanager
def nfs_server(tools: ToolsRoot, folder: Path) -> Iterator[int]:
    """Serve ``EXPORTS``; yields the port on the loopback."""
    (folder / "recovery").mkdir(parents=True, exist_ok=True)
    log = folder / "ganesha.log"
    config = folder / "ganesha.conf"
    for _ in range(_TRIES):
        # ganesha can't choose a port itself; when another program was quicker it ends, and the next one is tried.
        port = 20000 + secrets.randbelow(12000)
        config.write_text(ganesha_config(folder, port))
        log.unlink(missing_ok=True)
        words = ["ganesha.nfsd", "-F", "-f", str(config), "-L", str(log), "-p", str(folder / "pid"), "-N", "NIV_EVENT"]
        with (folder / "ganesha.out").open("wb") as out:
            process = start(tools.argv(words, writable=[folder], network=True), stdout=out.fileno())
        try:
            if _wait_ready(process.poll, log):
                yield port
                return
        finally:
            stop(process)
    tail = log.read_text(errors="replace").splitlines()[-5:] if log.exists() else []
    raise GuestError("the NFS server of the test host does not start:\n" + "\n".join(tail))


def _wait_ready(poll: Callable[[], int | None], log: Path) -> bool:
    deadline = time.monotonic() + _START_SECONDS
    while poll() is None and time.monotonic() < deadline:
        if log.exists() and _READY in log.read_text(errors="replace"):
            return True
        time.sleep(0.1)
    return False


@contextmanager
def silent_server() -> Iterator[int]:
    """A port that accepts connections and never answers: the worst kind of being away. Yields the port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=16)
    kept: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                kept.append(listener.accept()[0])
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        # shutdown() wakes the thread in accept(); close() alone would not.
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in kept:
            connection.close()


@contextmanager
def refusing_port() -> Iterator[int]:
    """A port that nobody listens on and nobody else can take meanwhile: bound, never listening. Yields the port."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
