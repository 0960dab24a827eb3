"""A libvirtd of a test's own: sockets, state and logs below one folder, in a mount namespace, gone afterwards.

Domains of libvirt's test driver live in it, so they outlive a worker that is killed, as real ones do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import libvirt

os.environ["PATH"] += ":/usr/sbin:/sbin"
_START_SECONDS = 60.0
#: Dies with us, however we end.
_WITH_US = ("setpriv", "--pdeathsig", "KILL")
# What fails is told by the exception.
libvirt.registerErrorHandler(lambda _context, _error: None, None)
#: What libvirtd keeps outside of its configuration's reach.
_FOLDERS = ("/run/libvirt", "/var/lib/libvirt", "/etc/libvirt", "/var/cache/libvirt")
_PRELUDE = """
[ ! -e /dev/kvm ] || mount --bind /dev/null /dev/kvm
for target in "$@"; do
    mkdir -p "$target" "$FOLDER$target"
    mount --bind "$FOLDER$target" "$target"
done
[ -z "$LOGS" ] || setpriv --pdeathsig KILL virtlogd --config /dev/null --pid-file "$FOLDER/virtlogd.pid" &
exec libvirtd --config "$FOLDER/libvirtd.conf" --pid-file "$FOLDER/pid"
"""


def why_not() -> str:
    """Why none can be started here; nothing when it can."""
    if os.geteuid() != 0:
        return "a libvirtd of a test's own wants root"
    absent = [name for name in ("libvirtd", "virtlogd", "unshare") if shutil.which(name) is None]
    return f"wants {', '.join(absent)}" if absent else ""


def scratch(prefix: str) -> Path:
    """A folder of a test's own, in memory where that can be: what is tested syncs a lot."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix=prefix, dir=memory if os.access(memory, os.W_OK) else None))


class Libvirtd:
    """Start, kill and start again."""

    def __init__(self, folder: Path, *, logs: bool = False) -> None:
        """``logs``: with the daemon that QEMU's consoles are written to."""
        self.folder = folder
        self._logs = logs
        self._process: subprocess.Popen[bytes] | None = None
        self._holder: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        lines = [f'unix_sock_dir = "{folder}"', 'auth_unix_rw = "none"', 'auth_unix_ro = "none"']
        (folder / "libvirtd.conf").write_text("\n".join(lines) + "\n")

    @property
    def test_uri(self) -> str:
        """libvirt's test driver, inside it."""
        return f"test+unix:///default?socket={self.folder}/libvirt-sock"

    @property
    def qemu_uri(self) -> str:
        """QEMU's driver, inside it."""
        return f"qemu+unix:///system?socket={self.folder}/libvirt-sock"

    @property
    def network_uri(self) -> str:
        """libvirt's networks, inside it."""
        return f"network+unix:///system?socket={self.folder}/libvirt-sock"

    def start(self, *, hold: bool = True) -> None:
        """Start it and wait. ``hold``: what the test driver has is kept while nobody else is connected."""
        # Another process's mounts are not touched: they end with the namespace.
        with (self.folder / "log").open("ab") as log:
            words = [*_WITH_US, "unshare", "--mount", "sh", "-c", _PRELUDE, "sh", *_FOLDERS]
            environment = {**os.environ, "FOLDER": str(self.folder), "LOGS": "1" * self._logs}
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                libvirt.open(self.test_uri).close()
                break
            except libvirt.libvirtError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise RuntimeError((self.folder / "log").read_text()[-2000:]) from None
                time.sleep(0.1)
        if hold:
            code = "import libvirt, sys, time; c = libvirt.open(sys.argv[1]); time.sleep(1e6)"
            self._holder = subprocess.Popen([*_WITH_US, sys.executable, "-c", code, self.test_uri])

    def kill(self) -> None:
        """As kill -9 does. QEMU's guests live on, the test driver's do not."""
        for process in (self._process, self._holder):
            if process is not None:
                process.kill()
                process.wait()
        self._process = self._holder = None
