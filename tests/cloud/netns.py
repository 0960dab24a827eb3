"""Machines of a test's own: a network and a mount namespace each, joined by one cable. Root, Linux."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from recvirt.nestedcloud.provision import Machine, ProvisionError


class Box:
    """One machine: programs run in its namespaces, files are below a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        (root / "run").mkdir(exist_ok=True)
        # wireguard-go's sockets are named after interfaces alone, and both machines' have the same name.
        mount = "mkdir -p /run/wireguard && mount -t tmpfs none /run/wireguard"
        script = f"{mount} && ip link set lo up && echo && exec sleep 900"
        self._holder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "sh",
             "-c", script], stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._holder.stdout is not None
        self._holder.stdout.readline()
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        self.pid = int(children[0])

    def words(self, argv: Sequence[str]) -> list[str]:
        """A command line that runs in it; what it leaves behind ends with the machine."""
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "-p", "--", *argv]

    def run(self, argv: Sequence[str], text: str, user: str | None) -> str:
        """As ``provision.run_program``."""
        done = subprocess.run(self.words(argv), input=text, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode != 0:
            raise ProvisionError(f"{' '.join(argv[:3])}: {done.stderr.strip()}", done.returncode)
        return done.stdout

    @property
    def machine(self) -> Machine:
        """For what is tried."""
        owner = (os.geteuid(), os.getegid())
        return Machine(self.root, self.run, lambda _user: owner, lambda _text: None, lambda _url: False)

    def start(self, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        """A program that goes on."""
        return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *self.words(argv)])

    def reaches(self, host: str, port: int, seconds: float = 3.0) -> bool:
        """Whether something listens there, seen from here."""
        code = (
            "import socket,sys; s=socket.create_connection((sys.argv[1],int(sys.argv[2])),timeout=float(sys.argv[3]));"
            "s.sendall(b'x'); sys.exit(s.recv(1)!=b'x')"
        )
        words = self.words(["python3", "-c", code, host, str(port), str(seconds)])
        return subprocess.run(words, capture_output=True, check=False, timeout=30).returncode == 0

    def reaches_tls(self, host: str, port: int) -> bool:
        """Whether a TLS server answers there, whoever it is."""
        code = (
            "import socket,ssl,sys; c=ssl._create_unverified_context();"
            "c.wrap_socket(socket.create_connection((sys.argv[1],int(sys.argv[2])),timeout=3)).close()"
        )
        words = self.words(["python3", "-c", code, host, str(port)])
        return subprocess.run(words, capture_output=True, check=False, timeout=30).returncode == 0

    def end(self) -> None:
        """End everything in it."""
        self._holder.kill()
        self._holder.wait()


#: Gives back what it gets, on every address.
ECHO = (
    "import socketserver,sys,socket\n"
    "class H(socketserver.BaseRequestHandler):\n"
    "  def handle(self): self.request.sendall(self.request.recv(1))\n"
    "class S(socketserver.ThreadingTCPServer): address_family=socket.AF_INET6; allow_reuse_address=True\n"
    "S(('::',int(sys.argv[1])),H).serve_forever()\n"
)


def cable(one: Box, other: Box, number: int = 0) -> tuple[str, str]:
    """Connect two machines; their addresses."""
    ends = f"rvt{number}a", f"rvt{number}b"
    subprocess.run(["ip", "link", "add", ends[0], "netns", str(one.pid), "type", "veth", "peer", "name", ends[1],
                    "netns", str(other.pid)], check=True)  # fmt: skip
    addresses = f"10.99.{number}.1", f"10.99.{number}.2"
    for box, name, address in zip((one, other), ends, addresses, strict=True):
        box.run(["ip", "address", "add", f"{address}/24", "dev", name], "", None)
        box.run(["ip", "link", "set", name, "up"], "", None)
    return addresses


def until(look: object, seconds: float = 30.0) -> bool:
    """Whether it becomes true in time."""
    assert callable(look)
    deadline = time.monotonic() + seconds
    while not look():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.3)
    return True
