"""Addresses and forwards on a network of a real libvirtd: its dnsmasq answers a card, its rules let a port through."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from recvirt.nestedcloud import portmap
from recvirt.nestedcloud.addresses import ForwardSpec
from recvirt.nestedcloud.model import NetworkSpec, NicSpec
from recvirt.nestedcloud.worker.errors import ActionError
from recvirt.nestedcloud.worker.host import Host
from recvirt.nestedcloud.worker.hypervisor import Hypervisor
from tests.cloud.faults.libvirtd import Libvirtd, why_not
from tests.cloud.support import instance
from tests.cloud.test_portmap_real import NETWORK, OTHER, ROOT, WEB, inside, probe, run, serve, wish

_ABSENT = [tool for tool in ("dnsmasq", "nft", "ip", "tc") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
    pytest.mark.skipif(bool(_ABSENT), reason=f"wants {', '.join(_ABSENT)}"),
]

_MAC, _STRANGER = "52:54:00:aa:bb:01", "52:54:00:aa:bb:02"


def offered(place: str, mac: str) -> str:
    """The address that a DHCP server offers a card (RFC 2131); empty when there is no answer."""

    def go() -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as talk:
            talk.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            talk.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
            talk.bind(("0.0.0.0", 68))
            talk.settimeout(8)
            hardware, number = bytes.fromhex(mac.replace(":", "")), os.urandom(4)
            # A request, over Ethernet, to be answered by broadcast; then the magic cookie and "discover".
            head = b"\x01\x01\x06\x00" + number + b"\x00\x00\x80\x00" + bytes(16) + hardware.ljust(16, b"\x00")
            talk.sendto(head + bytes(192) + b"\x63\x82\x53\x63\x35\x01\x01\xff", ("255.255.255.255", 67))
            try:
                while (answer := talk.recv(2000))[4:8] != number:
                    pass
            except TimeoutError:
                return ""
            return socket.inet_ntoa(answer[16:20])

    return str(inside(place, go))


def plug(place: str, mac: str, bridge: str) -> None:
    """A card without an address, as a guest's."""
    run("ip", "netns", "add", place)
    run("ip", "link", "add", f"v-{place}", "type", "veth", "peer", "name", "eth0", "netns", place)
    run("ip", "-n", place, "link", "set", "eth0", "address", mac)
    run("ip", "-n", place, "link", "set", "eth0", "up")
    if bridge:
        run("ip", "link", "set", f"v-{place}", "master", bridge)
    run("ip", "link", "set", f"v-{place}", "up")


def give(place: str, address: str, router: str) -> None:
    run("ip", "-n", place, "address", "add", address, "dev", "eth0")
    run("ip", "-n", place, "route", "add", "default", "via", router)


def kept(hypervisor: Hypervisor) -> int:
    """How often the card stands in what runs and in what will be started."""
    network = hypervisor.networks.find(NETWORK)
    assert network is not None
    return sum(network.XMLDesc(flag).count(_MAC) for flag in (0, 1))


def scene(folder: Path) -> dict[str, Any]:
    Path("/run/netns").mkdir()
    run("ip", "link", "set", "lo", "up")
    libvirtd = Libvirtd(folder / "libvirt")
    libvirtd.start(hold=False)
    host = Host(str(uuid.uuid4()), "qemu", folder, folder)
    hypervisor = Hypervisor(libvirtd.network_uri, host)
    spec = instance(nics=(NicSpec(NETWORK, _MAC, address="172.30.5.9"),))
    network = NetworkSpec(NETWORK, "default", "nat", "172.30.5.0/24")
    try:
        for _ in range(2):
            hypervisor.networks.ensure(network, spec)
    except ActionError as error:
        return {"skip": f"no network can be started here: {error.message}"}
    plug("web", _MAC, "rv11111111")
    plug("stranger", _STRANGER, "rv11111111")
    plug("client", "52:54:00:aa:bb:03", "")
    run("ip", "address", "add", "10.77.0.1/24", "dev", "v-client")
    give("client", "10.77.0.2/24", "10.77.0.1")
    seen: dict[str, Any] = {"kept": kept(hypervisor), "offered": offered("web", _MAC)}
    seen["a stranger is offered it"] = offered("stranger", _STRANGER) == "172.30.5.9"
    give("web", "172.30.5.9/24", "172.30.5.1")
    serve("web", socket.SOCK_STREAM, 80)
    wish(folder, WEB, ForwardSpec("tcp", 8080, NETWORK, "172.30.5.9", 80))
    portmap.apply(folder, folder / "applied.json")
    seen["forwarded"] = probe("client", "10.77.0.1", 8080)
    seen["straight"] = probe("client", "172.30.5.9", 80)
    hypervisor.networks.ensure(NetworkSpec(OTHER, "two", "nat", "172.30.6.0/24"))
    seen["after another network"] = probe("client", "10.77.0.1", 8080)
    libvirtd.kill()
    libvirtd.start(hold=False)
    seen["after libvirtd"] = probe("client", "10.77.0.1", 8080)
    hypervisor = Hypervisor(libvirtd.network_uri, host)
    hypervisor.networks.ensure(network, spec)
    seen["kept again"] = kept(hypervisor)
    hypervisor.networks.let_go(spec)
    seen["kept no more"] = kept(hypervisor)
    for key in (NETWORK, OTHER):
        hypervisor.networks.remove(key)
    hypervisor.close()
    libvirtd.kill()
    return seen


def test_a_card_gets_its_address_and_a_port_leads_to_it(tmp_path: Path) -> None:
    words = [sys.executable, str(Path(__file__)), str(tmp_path / "worker")]
    # As in test_portmap_real.py; dnsmasq ends with the namespace of processes.
    line = 'mount -t tmpfs tmpfs /run && exec "$@"'
    options = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    done = subprocess.run(
        ["unshare", *options, "sh", "-c", line, "sh", *words], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    if "skip" in seen:
        pytest.skip(seen["skip"])
    assert seen == {
        "kept": 2, "offered": "172.30.5.9", "a stranger is offered it": False, "forwarded": "web 10.77.0.2",
        "straight": "ConnectionRefusedError", "after another network": "web 10.77.0.2",
        "after libvirtd": "web 10.77.0.2", "kept again": 2, "kept no more": 0,
    }  # fmt: skip


if __name__ == "__main__":
    sys.stdout.write(json.dumps(scene(Path(sys.argv[1]))))
    sys.stdout.flush()
    # Threads serve for ever.
    os._exit(0)
