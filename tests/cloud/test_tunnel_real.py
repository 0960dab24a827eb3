"""The tunnel with real WireGuard (the kernel's, else wireguard-go) between machines in namespaces of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from recvirt.nestedcloud import peers, tunnel
from recvirt.nestedcloud.provision import ProvisionError, password_hash, toml
from tests.cloud.netns import ECHO, Box, cable, until

CLOUD = uuid.UUID("00000000-0000-4000-8000-000000000001")


def trouble() -> str:
    """Why this can't be tried here."""
    if "RECVIRT_TEST_DATABASE" in os.environ:
        return "another database changes nothing here"
    if os.geteuid() != 0 or shutil.which("wg") is None or shutil.which("unshare") is None:
        return "wants root, wg and unshare"
    made = subprocess.run(["unshare", "--net", "ip", "link", "add", "dev", "rvt", "type", "wireguard"],
                          capture_output=True, check=False).returncode == 0  # fmt: skip
    tun = shutil.which("wireguard-go") is not None and Path("/dev/net/tun").exists()
    return "" if made or tun else "neither this kernel nor wireguard-go has WireGuard"


pytestmark = [pytest.mark.slow, pytest.mark.skipif(trouble() != "", reason=trouble() or "-")]


@dataclass
class World:
    """A central node and two workers, each on a cable of its own."""

    central: Box
    workers: list[Box]
    endpoints: list[str]
    keys: list[str]

    @property
    def inside(self) -> str:
        """The central node in the tunnel."""
        return str(tunnel.central_address(CLOUD))

    def address(self, number: int) -> str:
        return str(tunnel.peer_address(CLOUD, 2 + number))

    def let_in(self, *numbers: int) -> None:
        """As the root service does with what the dispatcher writes. There is no broker, so its accounts fail."""
        listed = [
            {"uuid": f"{number}1111111-1111-4111-8111-111111111111", "public_key": self.keys[number],
             "address": self.address(number), "password_hash": password_hash("x")} for number in numbers
        ]  # fmt: skip
        path = self.central.machine.state / "peers.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"version": 1, "cloud": str(CLOUD), "peers": listed, "revoked": []}))
        path.chmod(0o640)
        with pytest.raises(ProvisionError, match="rabbitmqctl"):
            peers.apply(self.central.machine)

    def tell(self, number: int) -> None:
        """A worker's parameters, as a welcome brings them."""
        machine = self.workers[number].machine
        public = json.loads(tunnel.public_path(self.central.machine).read_text())["public_key"]
        central = tunnel.Peer(public, IPv6Address(self.inside), (self.endpoints[number], tunnel.PORT))
        tunnel.keep_worker(machine, CLOUD, IPv6Address(self.address(number)), central)
        tunnel.up(machine)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    boxes = [Box(tmp_path / name) for name in ("central", "one", "two")]
    try:
        central, *workers = boxes
        endpoints = [cable(central, worker, number)[0] for number, worker in enumerate(workers)]
        central.machine.etc.mkdir(parents=True)
        central.machine.central.write_text(toml({"cloud": str(CLOUD)}))
        tunnel.ensure_central(central.machine, CLOUD)
        tunnel.up(central.machine)
        keys = [tunnel.ensure_key(worker.machine) for worker in workers]
        central.start(["python3", "-c", ECHO, "5672"])
        yield World(central, workers, endpoints, keys)
    finally:
        for box in boxes:
            box.end()


def test_workers_reach_the_central_node_and_not_each_other_until_they_are_shut_out(world: World) -> None:
    for number in (0, 1):
        world.tell(number)
    one, two = world.workers
    # Nobody has let them in.
    assert not one.reaches(world.inside, 5672)
    world.let_in(0, 1)
    for worker in world.workers:
        assert until(lambda worker=worker: worker.reaches(world.inside, 5672))
        assert tunnel.is_fresh(worker.machine)
    two.start(["python3", "-c", ECHO, "5672"])
    assert until(lambda: two.reaches("::1", 5672))
    assert not one.reaches(world.address(1), 5672)
    shown = tunnel.status(world.central.machine)
    assert {peer["address"] for peer in shown["peers"]} == {world.address(0), world.address(1)}
    assert (tunnel.folder(world.central.machine) / "key").read_text().strip() not in json.dumps(shown)
    # Again changes nothing: the connection that is there goes on.
    tunnel.up(one.machine)
    assert one.reaches(world.inside, 5672)
    world.let_in(1)
    assert not one.reaches(world.inside, 5672)
    assert two.reaches(world.inside, 5672)


def test_a_new_key_of_the_central_node_is_told_to_its_worker(world: World) -> None:
    world.let_in(0)
    world.tell(0)
    (one, _) = world.workers
    assert until(lambda: one.reaches(world.inside, 5672))
    (world.central.machine.root / tunnel.APPLIED).parent.mkdir(parents=True, exist_ok=True)
    (world.central.machine.root / tunnel.APPLIED).write_text(
        json.dumps({"peers": [{"public_key": world.keys[0], "address": world.address(0)}]})
    )
    peers.rotate_tunnel(world.central.machine)
    assert not one.reaches(world.inside, 5672)
    world.tell(0)
    assert until(lambda: one.reaches(world.inside, 5672))


def test_without_the_interface_nothing_leaves_for_the_prefix(world: World) -> None:
    world.let_in(0)
    world.tell(0)
    (one, _) = world.workers
    assert until(lambda: one.reaches(world.inside, 5672))
    one.run(["ip", "-6", "route", "add", "default", "dev", "rvt0b"], "", None)
    tunnel.down(one.machine)
    tunnel.down(one.machine)
    assert not tunnel.is_up(one.machine)
    with pytest.raises(ProvisionError, match=r"unreachable|No route"):
        one.run(["ip", "-6", "route", "get", world.inside], "", None)
    tunnel.up(one.machine)
    assert until(lambda: one.reaches(world.inside, 5672))
    tunnel.forget(one.machine)
    assert not list(tunnel.folder(one.machine).iterdir())
    assert "rvt0b" in one.run(["ip", "-6", "route", "get", world.inside], "", None)
