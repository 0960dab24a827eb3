"""The cloud's firewall under the kernel's own nftables: who reaches which port from where, and what else is left alone.

Network namespaces stand for a machine and its neighbours; needs root, ``nft`` and ``ip``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from recvirt.data import data_path

#: Of management, and one that nobody knows.
TCP = (22, 53, 443, 2049, 4369, 5432, 5672, 8080, 9100)
UDP = (53, 67, 68, 111, 546, 547, 51820)
#: Cards of the machine, its address there, and the neighbour's.
NETWORKS = {
    "out0": ("10.81.1.1/24", "10.81.1.2/24"),
    "virbr0": ("10.81.2.1/24", "10.81.2.2/24"),
    "rv12345678": ("fd81:3::1/64", "fd81:3::2/64"),
    "recvirt0": ("fd81:4::1/64", "fd81:4::2/64"),
}
_SERVE = """
import selectors, socket, sys
tcp, udp = ([int(word) for word in text.split(",")] for text in sys.argv[1:3])
poll = selectors.DefaultSelector()
for port in tcp:
    server = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    poll.register(server, selectors.EVENT_READ, "tcp")
for port in udp:
    server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.bind(("::", port))
    poll.register(server, selectors.EVENT_READ, "udp")
print("ready", flush=True)
while True:
    for key, _ in poll.select():
        if key.data == "tcp":
            key.fileobj.accept()[0].close()
        else:
            data, who = key.fileobj.recvfrom(64)
            key.fileobj.sendto(data, who)
"""
_PROBE = """
import json, socket, sys, threading
host, source = sys.argv[1], int(sys.argv[4])
tcp, udp = ([int(word) for word in text.split(",") if word] for text in sys.argv[2:4])
family = socket.AF_INET6 if ":" in host else socket.AF_INET
found = []
def try_one(kind, port):
    with socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as probe:
        probe.settimeout(1.5)
        if source:
            probe.bind(("", source))
        try:
            probe.connect((host, port))
            if kind == "udp":
                probe.send(b"?")
                probe.recv(64)
        except OSError:
            return
        found.append([kind, port])
tries = [("tcp", port) for port in tcp] + [("udp", port) for port in udp]
threads = [threading.Thread(target=try_one, args=words) for words in tries]
for thread in threads:
    thread.start()
    if source:
        thread.join()
for thread in threads:
    thread.join()
print(json.dumps(sorted(found)))
"""
_PING = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as probe:
    probe.settimeout(5)
    # An echo request, and its checksum.
    probe.sendto(bytes.fromhex("0800f7ff00000000"), (sys.argv[1], 0))
    print("pong" if probe.recv(64)[20] == 0 else "?")
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("nft") or not shutil.which("ip"), reason="wants root, nft and ip"
    ),
]


class Space:
    """A network namespace, as long as a process of it lives."""

    def __init__(self) -> None:
        self.processes = [subprocess.Popen(["unshare", "--net", "sh", "-c", "echo up; exec sleep 600"],
                                           stdout=subprocess.PIPE, text=True)]  # fmt: skip
        assert self.processes[0].stdout is not None and self.processes[0].stdout.readline() == "up\n"
        self.pid = self.processes[0].pid
        # An address counts at once, instead of after a second or two.
        self.run("sysctl", "-q", "-w", "net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0")
        self.run("ip", "link", "set", "lo", "up")

    def argv(self, *words: str) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--", *words]

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(self.argv(*words), capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 or not check, done.stderr
        return done

    def serve(self) -> None:
        """Listen on every port, on every address."""
        words = self.argv(sys.executable, "-c", _SERVE, ",".join(map(str, TCP)), ",".join(map(str, UDP)))
        server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        self.processes.append(server)
        assert server.stdout is not None and server.stdout.readline() == "ready\n"

    def reaches(
        self, host: str, tcp: tuple[int, ...] = TCP, udp: tuple[int, ...] = UDP, source: int = 0
    ) -> set[tuple[str, int]]:
        """The ports of a host that answer."""
        words = [host, ",".join(map(str, tcp)), ",".join(map(str, udp)), str(source)]
        said = json.loads(self.run(sys.executable, "-c", _PROBE, *words).stdout)
        return {(kind, port) for kind, port in said}

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


class Machine:
    """A machine with the packages' rules, and a neighbour on each of its cards."""

    def __init__(self, folder: Path) -> None:
        self.space, self.folder = Space(), folder
        self.near = {name: Space() for name in NETWORKS}
        for name, (own, other) in NETWORKS.items():
            peer = self.near[name]
            self.space.run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(peer.pid))
            nodad = ["nodad"] if ":" in own else []
            self.space.run("ip", "address", "add", own, "dev", name, *nodad)
            self.space.run("ip", "link", "set", name, "up")
            peer.run("ip", "address", "add", other, "dev", "eth0", *nodad)
            peer.run("ip", "link", "set", "eth0", "up")
            for family, route in (("-4", "default"), ("-6", "default")):
                if (family == "-6") == (":" in own):
                    peer.run("ip", family, "route", "add", route, "via", own.split("/")[0])
        self.owner = folder / "etc"
        self.owner.mkdir()
        packages = data_path("packages")
        self.texts = {}
        for name in ("usr/share/recvirt-cloud/firewall.nft", "usr/lib/recvirt-cloud/firewall"):
            text = (packages / "recvirt-cloud/root" / name).read_text()
            text = text.replace("/etc/recvirt-cloud/firewall.d/", f"{self.owner}/")
            self.texts[Path(name).name] = text.replace("/usr/share/recvirt-cloud/", f"{folder}/")
        for name, text in self.texts.items():
            (folder / name).write_text(text)

    def load(self, *roles: str) -> subprocess.CompletedProcess[str]:
        """What the service does on a machine with these roles."""
        for name in ("firewall.d", "tunnel.d"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            for role in roles:
                source = data_path("packages") / f"recvirt-cloud-{role}/root/usr/share/recvirt-cloud" / name
                if source.is_dir():
                    shutil.copytree(source, self.folder / name, dirs_exist_ok=True)
        return self.space.run("sh", str(self.folder / "firewall"), check=False)

    def reached_from(self, card: str, **more: tuple[int, ...] | int) -> set[tuple[str, int]]:
        """What of this machine its neighbour on a card reaches."""
        return self.near[card].reaches(NETWORKS[card][0].split("/")[0], **more)  # type: ignore[arg-type]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    try:
        yield made
    finally:
        for space in (made.space, *made.near.values()):
            space.end()


EVERYTHING = {("tcp", port) for port in TCP} | {("udp", port) for port in UDP}
GUESTS = {("tcp", 53), ("udp", 53), ("udp", 67), ("udp", 547)}


def test_each_neighbour_reaches_what_is_for_it(machine: Machine) -> None:
    machine.space.serve()
    # The probe sees what is open: a firewall that is not loaded would not pass for one.
    assert machine.reached_from("out0") == machine.reached_from("recvirt0") == EVERYTHING
    loaded = machine.load("central", "worker")
    assert (loaded.returncode, loaded.stderr) == (0, "")
    assert machine.reached_from("out0") == {("tcp", 22), ("tcp", 443), ("udp", 51820)}
    assert machine.reached_from("recvirt0") == {("tcp", 443), ("tcp", 2049), ("tcp", 5672)}
    assert machine.reached_from("virbr0") == machine.reached_from("rv12345678") == GUESTS
    # Nor by the machine's address elsewhere.
    assert machine.near["virbr0"].reaches(NETWORKS["out0"][0].split("/")[0], udp=()) == {("tcp", 53)}
    # A DHCP server's answers come in, and nothing else of its port.
    assert machine.reached_from("out0", tcp=(), udp=(67, 68, 546), source=67) == {("udp", 68)}
    assert machine.space.reaches("127.0.0.1") == EVERYTHING


def test_a_worker_offers_nothing_but_ssh(machine: Machine) -> None:
    machine.space.serve()
    assert machine.load("worker").returncode == 0
    assert machine.reached_from("out0") == {("tcp", 22)}
    assert machine.reached_from("recvirt0") == set()
    assert machine.reached_from("virbr0") == GUESTS


def test_what_the_machine_asks_for_is_answered(machine: Machine) -> None:
    for card in ("out0", "recvirt0"):
        machine.near[card].serve()
    assert machine.load("worker").returncode == 0
    for card in ("out0", "recvirt0"):
        assert machine.space.reaches(NETWORKS[card][1].split("/")[0]) == EVERYTHING
    assert machine.near["out0"].run(sys.executable, "-c", _PING, "10.81.1.1").stdout == "pong\n"


def test_the_tunnel_is_no_way_into_networks_behind_a_machine(machine: Machine) -> None:
    for name in ("net.ipv6.conf.all.forwarding", "net.ipv4.ip_forward"):
        machine.space.run("sysctl", "-q", "-w", f"{name}=1")
    machine.near["recvirt0"].serve()
    machine.near["out0"].serve()
    target = NETWORKS["recvirt0"][1].split("/")[0]
    assert machine.near["rv12345678"].reaches(target, udp=()) == {("tcp", port) for port in TCP}
    assert machine.load("worker").returncode == 0
    assert machine.near["rv12345678"].reaches(target) == set()
    # Others are forwarded as libvirt and the owner want it.
    assert machine.near["virbr0"].reaches("10.81.1.2", udp=()) == {("tcp", port) for port in TCP}


def test_other_tables_stay_and_loading_again_changes_nothing(machine: Machine) -> None:
    chain = "chain x { type filter hook forward priority filter; ip saddr 10.9.0.0/24 drop; };"
    machine.space.run("nft", f"table ip libvirt_network {{ {chain} }}")
    before = machine.space.run("nft", "list", "table", "ip", "libvirt_network").stdout
    assert machine.load("central").returncode == 0
    rules = machine.space.run("nft", "list", "ruleset").stdout
    assert before in rules and "policy drop" in rules
    assert machine.load("central").returncode == 0
    assert machine.space.run("nft", "list", "ruleset").stdout == rules
    unit = data_path("packages") / "recvirt-cloud/root/usr/lib/systemd/system/recvirt-cloud-firewall.service"
    lines = unit.read_text().splitlines()
    stop = next(line.partition("=")[2].split() for line in lines if line.startswith("ExecStop="))
    machine.space.run("nft", *stop[1:])
    assert machine.space.run("nft", "list", "ruleset").stdout == before


def test_the_owner_s_rules_are_taken_and_a_wrong_one_does_not_open_the_machine(machine: Machine) -> None:
    machine.space.serve()
    (machine.owner / "README").write_text("no rule\n")
    (machine.owner / "metrics.nft").write_text('iifname "out0" tcp dport 9100 accept comment "metrics"\n')
    assert machine.load("central").returncode == 0
    assert ("tcp", 9100) in machine.reached_from("out0") - machine.reached_from("recvirt0")
    (machine.owner / "wrong.nft").write_text("tcp port 8080 accept\n")
    machine.space.run("nft", "flush", "ruleset")
    said = machine.load("central")
    assert said.returncode == 1 and "wrong.nft" in said.stderr and "hint:" in said.stderr
    assert machine.reached_from("out0") == {("tcp", 22), ("tcp", 443), ("udp", 51820)}
