"""Forwards with the kernel's own nftables, beside rules as libvirt writes them, between network namespaces."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recvirt.nestedcloud import portmap
from recvirt.nestedcloud.addresses import ForwardSpec, WantedForwards
from recvirt.nestedcloud.codec import encode

os.environ["PATH"] += ":/usr/sbin:/sbin"
ROOT = Path(__file__).parents[2]
_ABSENT = [tool for tool in ("nft", "ip", "unshare", "setpriv") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces want root"),
    pytest.mark.skipif(bool(_ABSENT), reason=f"wants {', '.join(_ABSENT)}"),
]

NETWORK, OTHER = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
WEB, DB = "33333333-3333-4333-8333-333333333333", "44444444-4444-4444-8444-444444444444"
#: Interface of a namespace, its address, and the bridge (or nothing) on the host's side.
PLACES = {
    "client": ("10.77.0.2/24", "10.77.0.1/24", ""), "foreign": ("10.78.0.2/24", "10.78.0.1/24", ""),
    "web": ("172.30.5.9/24", "172.30.5.1/24", "rv11111111"), "peer": ("172.30.5.3/24", "172.30.5.1/24", "rv11111111"),
    "other": ("172.30.6.2/24", "172.30.6.1/24", "rv22222222"),
}  # fmt: skip


def libvirt_rules(*bridges: tuple[str, str]) -> str:
    """What libvirt 11 writes for NAT networks with its backend for nftables (seen on Debian 13)."""
    lines = [
        "table ip libvirt_network {",
        "chain guest_output {}", "chain guest_input {}", "chain guest_cross {}",
        "chain forward { type filter hook forward priority filter; policy accept;",
        "counter jump guest_cross; counter jump guest_input; counter jump guest_output; }",
        "chain guest_nat { type nat hook postrouting priority srcnat; policy accept; }", "}",
    ]  # fmt: skip
    return "\n".join([*lines, *(libvirt_network(*bridge) for bridge in bridges)]) + "\n"


def libvirt_network(bridge: str, net: str) -> str:
    """One network's rules; as libvirt does, before those of others."""
    rules = [
        f'guest_output iif "{bridge}" counter reject',
        f'guest_output ip saddr {net} iif "{bridge}" counter accept',
        f'guest_input oif "{bridge}" counter reject',
        f'guest_input oif "{bridge}" ip daddr {net} ct state established,related counter accept',
        f'guest_cross iif "{bridge}" oif "{bridge}" counter accept',
        f"guest_nat meta l4proto tcp ip saddr {net} ip daddr != {net} counter masquerade to :1024-65535",
    ]
    return "\n".join(f"insert rule ip libvirt_network {rule}" for rule in rules)


def run(*words: str, text: str = "") -> str:
    return subprocess.run(list(words), input=text, text=True, check=True, capture_output=True).stdout


def inside(place: str, function: Callable[[], Any]) -> Any:
    """What a function gives in another network namespace: a thread may be in one of its own."""
    found: list[Any] = []

    def there() -> None:
        with Path(f"/run/netns/{place}").open() as stream:
            if ctypes.CDLL(None, use_errno=True).setns(stream.fileno(), 0x40000000) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        found.append(function())

    thread = threading.Thread(target=there)
    thread.start()
    thread.join()
    return found[0]


def serve(place: str, kind: socket.SocketKind, port: int) -> None:
    """Tell everybody who comes where they come from, and who one is."""

    def opened() -> socket.socket:
        made = socket.socket(socket.AF_INET, kind)
        made.bind(("0.0.0.0", port))
        if kind == socket.SOCK_STREAM:
            made.listen()
        return made

    listening = inside(place, opened)

    def answer() -> None:
        while True:
            if kind == socket.SOCK_STREAM:
                connection, (peer, _) = listening.accept()
                connection.sendall(f"{place} {peer}".encode())
                connection.close()
            else:
                _, where = listening.recvfrom(100)
                listening.sendto(f"{place} {where[0]}".encode(), where)

    threading.Thread(target=answer, daemon=True).start()


def ask(sender: socket.socket) -> str:
    sender.settimeout(1.5)
    try:
        if sender.type == socket.SOCK_DGRAM:
            sender.send(b"?")
        return sender.recv(100).decode()
    except TimeoutError:
        return "timeout"
    except OSError as error:
        return type(error).__name__


def probe(place: str, address: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> str:
    """What is answered, or why nothing is."""

    def go() -> str:
        with socket.socket(socket.AF_INET, kind) as sender:
            sender.settimeout(1.5)
            try:
                sender.connect((address, port))
            except TimeoutError:
                return "timeout"
            except OSError as error:
                return type(error).__name__
            return ask(sender)

    return str(inside(place, go) if place else go())


def build() -> None:
    """The host with its two bridges, and everybody around it."""
    Path("/run/netns").mkdir()
    run("ip", "link", "set", "lo", "up")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    for bridge in ("rv11111111", "rv22222222"):
        run("ip", "link", "add", bridge, "type", "bridge")
    for place, (address, own, bridge) in PLACES.items():
        run("ip", "netns", "add", place)
        run("ip", "link", "add", f"v-{place}", "type", "veth", "peer", "name", "eth0", "netns", place)
        if bridge:
            run("ip", "link", "set", f"v-{place}", "master", bridge)
        subprocess.run(["ip", "address", "add", own, "dev", bridge or f"v-{place}"], check=False, capture_output=True)
        for link in (bridge or f"v-{place}", f"v-{place}"):
            run("ip", "link", "set", link, "up")
        for words in (
            f"link set lo up; address add {address} dev eth0; link set eth0 up; route add default via {own[:-3]}"
        ).split("; "):
            run("ip", "-n", place, *words.split())
    serve("web", socket.SOCK_STREAM, 80)
    serve("web", socket.SOCK_DGRAM, 53)
    serve("peer", socket.SOCK_STREAM, 80)


def wish(folder: Path, instance: str, *forwards: ForwardSpec) -> None:
    (folder / "forwards").mkdir(parents=True, exist_ok=True)
    (folder / f"forwards/{instance}.json").write_text(json.dumps(encode(WantedForwards(instance, 1, "op", forwards))))


def scene(folder: Path) -> dict[str, Any]:
    """Everything that is seen, by name."""
    build()
    nets = (("rv11111111", "172.30.5.0/24"), ("rv22222222", "172.30.6.0/24"))
    run("nft", "-f", "-", text=libvirt_rules(*nets))
    seen: dict[str, Any] = {"before": probe("client", "10.77.0.1", 8080)}
    tcp, udp = ForwardSpec("tcp", 8080, NETWORK, "172.30.5.9", 80), ForwardSpec("udp", 5353, NETWORK, "172.30.5.9", 53)
    some = ForwardSpec("tcp", 8081, NETWORK, "172.30.5.9", 80, "10.77.0.0/24")
    wish(folder, WEB, tcp, udp, some)
    wish(folder, DB, ForwardSpec("tcp", 8080, NETWORK, "172.30.5.3", 80),
         ForwardSpec("tcp", 9000, NETWORK, "10.77.0.2", 80))  # fmt: skip
    applied = folder / "applied.json"
    state = portmap.apply(folder, applied)
    seen["refused"] = {name: item.refused for name, item in state.instances.items()}
    seen |= {
        "tcp": probe("client", "10.77.0.1", 8080), "udp": probe("client", "10.77.0.1", 5353, socket.SOCK_DGRAM),
        "from the host": probe("", "10.77.0.1", 8080), "loopback": probe("", "127.0.0.1", 8080),
        "from a neighbour": probe("peer", "172.30.5.1", 8080), "from itself": probe("web", "10.77.0.1", 8080),
        "from another network": probe("other", "172.30.6.1", 8080),
        "source": probe("client", "10.77.0.1", 8081), "another source": probe("foreign", "10.78.0.1", 8081),
        "straight": probe("other", "172.30.5.9", 80), "another port": probe("client", "10.77.0.1", 8082),
    }  # fmt: skip
    table = run("nft", "list", "table", "ip", portmap.TABLE)
    # A network that is started later is inserted before all others; and the rules are loaded once more.
    run("nft", "-f", "-", text=libvirt_network(*nets[0]))
    seen["after another network"] = probe("client", "10.77.0.1", 8080)
    # Somebody's rule that came before ours.
    run("nft", "insert", "rule", "ip", "libvirt_network", "forward", "counter")
    portmap.apply(folder, applied)
    seen["again the same"] = run("nft", "list", "table", "ip", portmap.TABLE) == table
    lines = run("nft", "list", "chain", "ip", "libvirt_network", "forward").splitlines()
    seen["ours"] = [number for number, line in enumerate(lines) if "recvirt-forwards" in line]
    # A flow that stands ends with its forward.
    flow = inside("client", lambda: socket.create_connection(("10.77.0.1", 8080)))
    flow.close()

    def udp_flow() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.connect(("10.77.0.1", 5353))
        return made

    standing = inside("client", udp_flow)
    seen["standing"] = ask(standing)
    wish(folder, WEB, tcp)
    portmap.apply(folder, applied)
    seen["standing, removed"] = ask(standing)
    seen["kept"] = probe("client", "10.77.0.1", 8080)
    (folder / f"forwards/{WEB}.json").unlink()
    (folder / f"forwards/{DB}.json").unlink()
    portmap.apply(folder, applied)
    seen["gone"] = probe("client", "10.77.0.1", 8080)
    seen["libvirt's rules are there"] = run("nft", "list", "table", "ip", "libvirt_network").count("reject")
    return seen


def test_ports_lead_to_instances_past_libvirts_rules(tmp_path: Path) -> None:
    words = [sys.executable, str(Path(__file__)), str(tmp_path / "worker")]
    # Everything ends with the namespaces; a /run of its own keeps their names from the machine.
    line = 'mount -t tmpfs tmpfs /run && exec setpriv --pdeathsig KILL "$@"'
    done = subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-c", line, "sh", *words], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    refused = seen.pop("refused")
    assert refused[WEB] == ""
    assert "port 8080/tcp is another instance's" in refused[DB] and "10.77.0.2 is no guest's" in refused[DB]
    assert seen == {
        "before": "ConnectionRefusedError", "tcp": "web 10.77.0.2", "udp": "web 10.77.0.2",
        "from the host": "web 10.77.0.1", "loopback": "ConnectionRefusedError",
        # A bridge gives nothing back through the port that it came from.
        "from itself": "timeout",
        "from a neighbour": "web 172.30.5.1", "from another network": "web 172.30.5.1",
        "source": "web 10.77.0.2", "another source": "ConnectionRefusedError", "straight": "ConnectionRefusedError",
        "another port": "ConnectionRefusedError", "after another network": "web 10.77.0.2", "again the same": True,
        # After the table's, the chain's and the hook's line.
        "ours": [3], "standing": "web 10.77.0.2", "standing, removed": "timeout",
        "kept": "web 10.77.0.2", "gone": "ConnectionRefusedError", "libvirt's rules are there": 6,
    }  # fmt: skip


if __name__ == "__main__":
    sys.stdout.write(json.dumps(scene(Path(sys.argv[1]))))
    sys.stdout.flush()
    # Threads serve for ever.
    os._exit(0)
