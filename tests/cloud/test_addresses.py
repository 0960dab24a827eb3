"""Every card on a network of ours has an address of its own: chosen once, kept by DHCP, shown, and free again."""

from __future__ import annotations

import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree as ET

import libvirt
import pytest
from click.testing import CliRunner
from django.db import IntegrityError, transaction

from recvirt.nestedcloud.addresses import HostSpec, check_address, guest_addresses
from recvirt.nestedcloud.central import addressing, images, operations, reports
from recvirt.nestedcloud.central.models import Instance, Network, NetworkKind, Nic
from recvirt.nestedcloud.central.problems import NetworkFull, NoCapacity
from recvirt.nestedcloud.central.specs import command_of
from recvirt.nestedcloud.cli import main_group
from recvirt.nestedcloud.client import network_commands
from recvirt.nestedcloud.client.api import Api, ApiError
from recvirt.nestedcloud.client.network_commands import reached_here, wait_for_greeting
from recvirt.nestedcloud.model import InstanceSpec, Kind, ModelError, NetworkSpec, NicSpec, Phase, Power, encode
from recvirt.nestedcloud.worker import networks as networks_module
from tests.cloud.conftest import Cloud, make_worker
from tests.cloud.support import instance
from tests.cloud.test_operations import beat, finish, launched, report, sent, wish
from tests.cloud.test_worker import Bench


def address_of(row: Instance) -> str:
    return row.nics.get().address


def small(cloud: Cloud, **values: Any) -> Network:
    """A network with five addresses."""
    given = {"name": "small", "cidr": "10.5.0.0/29", **values}
    return Network.objects.create(project=cloud.project, **given)


# --- the central node


def test_addresses_are_a_networks_own_and_each_cards(cloud: Cloud) -> None:
    found = [address_of(launched(cloud, name=f"web{number}")) for number in range(3)]
    assert found == ["172.30.0.2", "172.30.0.3", "172.30.0.4"]
    other = small(cloud)
    assert address_of(launched(cloud, name="db", networks=[other])) == "10.5.0.2"


def test_a_full_network_refuses_at_once_and_leaves_nothing(cloud: Cloud) -> None:
    network = small(cloud)
    for number in range(5):
        launched(cloud, name=f"web{number}", networks=[network], memory_max_bytes=2**29)
    with pytest.raises(NetworkFull, match=r"small is full: all 5 addresses of 10\.5\.0\.0/29"):
        operations.launch(cloud.project, cloud.user, wish(cloud, name="more", networks=[network]))
    assert not Instance.objects.filter(name="more").exists()
    answer = cloud.client.post(
        cloud.url("instances"), {"name": "more", "image": "tiny", "networks": ["small"]}, format="json"
    )
    assert (answer.status_code, answer.data["type"]) == (409, "network-full")


def test_an_address_is_free_with_its_card_and_cools_down(cloud: Cloud) -> None:
    network = small(cloud)
    first = launched(cloud, name="a", networks=[network])
    finish(operations.request(first, cloud.user, Kind.DELETE, {}), Power.ABSENT)
    assert address_of(first) == ""
    found = [address_of(launched(cloud, name=f"b{n}", networks=[network], memory_max_bytes=2**29)) for n in range(5)]
    assert found == ["10.5.0.3", "10.5.0.4", "10.5.0.5", "10.5.0.6", "10.5.0.2"]


def test_a_deletion_that_failed_keeps_the_address(cloud: Cloud) -> None:
    row = launched(cloud)
    operation = operations.request(row, cloud.user, Kind.DELETE, {})
    sent()
    operation.refresh_from_db()
    assert reports.apply(report(operation, Phase.FAILED, message="no"))
    assert address_of(row) == "172.30.0.2"


def test_a_clone_has_an_address_of_its_own(cloud: Cloud) -> None:
    row = launched(cloud)
    finish(operations.request(row, cloud.user, Kind.STOP, {}), Power.STOPPED)
    row.refresh_from_db()
    made = images.clone(row, "copy", cloud.user).instance
    assert made is not None and address_of(made) == "172.30.0.3"


def test_a_card_of_an_older_version_gets_one_when_it_is_started(cloud: Cloud) -> None:
    row = launched(cloud)
    row.nics.update(address="")
    finish(operations.request(row, cloud.user, Kind.STOP, {}), Power.STOPPED)
    row.refresh_from_db()
    operation = operations.request(row, cloud.user, Kind.START, {})
    assert address_of(row) == "172.30.0.3"
    assert command_of(operation).instance is not None


def test_a_worker_is_told_the_addresses_of_its_own_cards(cloud: Cloud) -> None:
    launched(cloud, name="a")
    elsewhere = launched(cloud, name="b")
    Instance.objects.filter(pk=elsewhere.pk).update(worker=make_worker("w2"))
    command = command_of(operations.launch(cloud.project, cloud.user, wish(cloud, name="c")))
    assert command.instance is not None and command.instance.nics[0].address == "172.30.0.4"
    (network,) = command.args["networks"]
    assert [host["address"] for host in network["hosts"]] == ["172.30.0.2", "172.30.0.4"]


def test_addresses_are_shown(cloud: Cloud) -> None:
    launched(cloud)
    shown = cloud.client.get(cloud.url("instances/web")).data
    assert shown["address"] == shown["nics"][0]["address"] == "172.30.0.2"
    assert cloud.client.get(cloud.url("instances")).data["results"][0]["address"] == "172.30.0.2"


def test_on_a_bridge_it_is_what_the_worker_saw(cloud: Cloud) -> None:
    network = small(cloud, kind=NetworkKind.BRIDGE, cidr="", bridge="br0")
    row = launched(cloud, networks=[network])
    nic = row.nics.get()
    assert cloud.client.get(cloud.url("instances/web")).data["nics"][0]["address"] is None
    other = launched(cloud, name="nat")
    told = (HostSpec(nic.mac, "192.0.2.7"), HostSpec(other.nics.get().mac, "192.0.2.8"))
    reports.heard(beat(cloud, addresses=told))
    assert cloud.client.get(cloud.url("instances/web")).data["address"] == "192.0.2.7"
    # One that is kept is not what somebody says.
    assert cloud.client.get(cloud.url("instances/nat")).data["address"] == "172.30.0.2"


@pytest.mark.parametrize("text", ["127.0.0.1", "224.0.0.1", "0.0.0.0", "10.0.0.1; drop", "10.0.0.01", "fd00::1", ""])
def test_what_is_no_address_of_a_guest(text: str) -> None:
    with pytest.raises(ModelError):
        check_address(text)


def test_host_and_broadcast_are_nobodys() -> None:
    assert guest_addresses("10.5.0.0/29") == [f"10.5.0.{number}" for number in range(2, 7)]


_ROUTES = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t01001EAC\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth0\t00001EAC\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
rvaaaaaaaa\t00031EAC\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
"""


@pytest.mark.skipif(sys.byteorder != "little", reason="the routes above are a little-endian machine's")
def test_an_instance_of_another_cloud_takes_no_subnet_that_it_is_in(
    cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "route"
    path.write_text(_ROUTES)
    assert [str(block) for block in addressing.routed(path)] == ["172.30.0.0/24"]
    assert addressing.routed(tmp_path / "absent") == []
    found = addressing.routed(path)
    monkeypatch.setattr(addressing, "routed", lambda: found)
    assert addressing.free_cidr() == "172.30.1.0/24"
    monkeypatch.setattr(addressing, "routed", lambda: [IPv4Network("172.0.0.0/8")])
    with pytest.raises(NoCapacity, match="no subnet"):
        addressing.free_cidr()


# --- the worker, on libvirt's test driver


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.connection.close()


NETWORK = NetworkSpec(str(uuid.uuid4()), "default", "nat", "172.30.1.0/24")


def card(number: int, address: str = "") -> NicSpec:
    return NicSpec(NETWORK.uuid, f"52:54:00:00:00:{number:02x}", address=address or f"172.30.1.{number}")


def host(nic: NicSpec) -> HostSpec:
    return HostSpec(nic.mac, nic.address)


def kept(bench: Bench) -> list[tuple[str | None, str | None]]:
    """The reservations that libvirt has."""
    text = bench.connection.networkLookupByName(f"recvirt-{NETWORK.uuid[:8]}").XMLDesc()
    return [(item.get("mac"), item.get("ip")) for item in ET.fromstring(text).iterfind("ip/dhcp/host")]


def launch(bench: Bench, spec: InstanceSpec, *hosts: HostSpec) -> None:
    network = NetworkSpec(NETWORK.uuid, NETWORK.name, NETWORK.kind, NETWORK.cidr, hosts=hosts)
    last = bench.do(Kind.LAUNCH, spec, networks=[encode(network)])
    assert last.phase is Phase.SUCCEEDED, last.message


def test_dhcp_keeps_an_address_as_long_as_the_instance_is_there(bench: Bench) -> None:
    one, two = instance(nics=(card(2),)), instance(nics=(card(3),))
    for spec in (one, two, one):
        launch(bench, spec)
    assert kept(bench) == [("52:54:00:00:00:02", "172.30.1.2"), ("52:54:00:00:00:03", "172.30.1.3")]
    for _ in range(2):
        assert bench.do(Kind.DELETE, one).phase is Phase.SUCCEEDED
        assert kept(bench) == [("52:54:00:00:00:03", "172.30.1.3")]


def test_what_is_kept_comes_back_with_a_network_that_was_lost(bench: Bench) -> None:
    launch(bench, instance(nics=(card(2),)))
    network = bench.connection.networkLookupByName(f"recvirt-{NETWORK.uuid[:8]}")
    network.destroy()
    network.undefine()
    launch(bench, instance(nics=(card(3),)), host(card(2)), host(card(3)))
    assert len(kept(bench)) == 2


def test_the_instances_own_cards_come_before_what_an_old_message_says_of_others(bench: Bench) -> None:
    launch(bench, instance(nics=(card(2, "172.30.1.9"),)))
    # The address went on to another card; then comes a message from before that.
    fresh = card(3, "172.30.1.9")
    launch(bench, instance(nics=(fresh,)))
    assert kept(bench) == [(fresh.mac, "172.30.1.9")]
    launch(bench, instance(nics=(card(4),)), HostSpec(card(2).mac, "172.30.1.9"))
    assert sorted(kept(bench)) == [(fresh.mac, "172.30.1.9"), (card(4).mac, "172.30.1.4")]


def test_a_reservation_that_another_process_makes_meanwhile_is_taken(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(bench, instance(nics=(card(2),)))
    real, left = networks_module._kept, [0]

    def late(network: Any, flag: int) -> list[HostSpec]:
        found = real(network, flag)
        return [] if left and not left.pop() else found

    monkeypatch.setattr(networks_module, "_kept", late)
    launch(bench, instance(nics=(card(2),)))
    assert kept(bench) == [("52:54:00:00:00:02", "172.30.1.2")]


def test_what_libvirt_refuses_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise libvirt.libvirtError("no")

    monkeypatch.setattr(libvirt.virNetwork, "update", refuse)
    network = encode(NETWORK)
    assert bench.do(Kind.LAUNCH, instance(nics=(card(2),)), networks=[network]).phase is Phase.FAILED


class _Guest:
    """A running domain with a card in a bridged network and one elsewhere, and what its agent says."""

    def __init__(self, said: Any) -> None:
        self.said, self.asked = said, list[int]()

    def XMLDesc(self) -> str:  # noqa: N802 - libvirt's
        cards = "".join(
            f"<interface><mac address='52:54:00:00:00:0{number}'/><source network='recvirt-{network}'/></interface>"
            for number, network in ((1, "aaaaaaaa"), (2, "bbbbbbbb"))
        )
        return f"<domain><devices>{cards}</devices></domain>"

    def agentSetResponseTimeout(self, seconds: int) -> None:  # noqa: N802 - libvirt's
        assert seconds == 1

    def interfaceAddresses(self, source: int) -> Any:  # noqa: N802 - libvirt's
        self.asked.append(source)
        if isinstance(self.said, Exception) and len(self.asked) == 1:
            raise self.said
        return self.said if not isinstance(self.said, Exception) else _link("52:54:00:00:00:01", "192.0.2.9")


def _link(mac: str, *addresses: str) -> dict[str, Any]:
    return {"eth0": {"hwaddr": mac, "addrs": [{"addr": address} for address in addresses] or None}}


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (_link("52:54:00:00:00:01", "127.0.0.1", "fe80::1", "192.0.2.7", "192.0.2.8"), "192.0.2.7"),
        (_link("52:54:00:00:00:01"), None), (_link("52:54:00:00:00:02", "192.0.2.7"), None),
        (_link("not a card; drop", "192.0.2.7"), None), (libvirt.libvirtError("no agent"), "192.0.2.9"),
    ],
)  # fmt: skip
def test_of_what_a_guest_says_only_addresses_are_taken(bench: Bench, said: Any, found: str | None) -> None:
    for name, mode in (("aaaaaaaa", "bridge"), ("bbbbbbbb", "nat")):
        words = "<bridge name='br0'/>" if mode == "bridge" else "<ip address='10.1.2.1' prefix='24'/>"
        bench.connection.networkDefineXML(
            f"<network><name>recvirt-{name}</name><forward mode='{mode}'/>{words}</network>"
        )  # fmt: skip
    seen = bench.agent.hypervisor.networks.seen([_Guest(said)])
    assert seen == ((HostSpec("52:54:00:00:00:01", found),) if found else ())


def test_without_a_bridge_no_guest_is_asked(bench: Bench) -> None:
    guest = _Guest({})
    assert bench.agent.hypervisor.networks.seen([guest]) == () and guest.asked == []
    assert bench.agent.heartbeat().addresses == ()


# --- ssh, where an address leads somewhere


class _Cloud:
    """An API with one network."""

    def below(self, path: str) -> str:
        return path

    def pages(self, path: str) -> Iterator[dict[str, Any]]:
        assert path == "networks"
        yield {"name": "default", "uuid": NETWORK.uuid}


def test_ssh_goes_only_where_the_address_leads(tmp_path: Path) -> None:
    cloud: Api = _Cloud()  # type: ignore[assignment]
    nic = {"network": "default", "address": "172.30.1.2"}
    row = {"name": "web", "address": "172.30.1.2", "nics": [nic], "worker": "w1"}
    with pytest.raises(ApiError, match="its worker w1 alone") as caught:
        reached_here(cloud, row, tmp_path)
    assert "forward add web 2222:22" in caught.value.hint
    (tmp_path / f"rv{NETWORK.uuid[:8]}").mkdir()
    assert reached_here(cloud, row, tmp_path) == "172.30.1.2"
    with pytest.raises(ApiError, match="no address"):
        reached_here(cloud, {**row, "address": None, "nics": [{**nic, "address": None}]}, tmp_path)


class _Greeter:
    """A server that hangs up on the first callers, says something else to the next, and then greets."""

    def __init__(self, *says: bytes) -> None:
        self.says, self.calls = list(says), 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.socket.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                self.calls += 1
                connection.sendall(self.says.pop(0) if len(self.says) > 1 else self.says[0])


def test_ssh_waits_for_a_guest_that_boots(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    server = _Greeter(b"", b"HTTP/1.1 400", b"SSH-2.0-dropbear\r\n")
    with server.socket:
        assert wait_for_greeting("127.0.0.1", 30, server.port)
    assert server.calls == 3
    assert capsys.readouterr().err == "waiting for the SSH server at 127.0.0.1\n"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    assert not wait_for_greeting("127.0.0.1", 0, port)


@pytest.mark.parametrize(
    ("power", "words"), [("stopped", "web is stopped"), ("running", "no SSH server of web greets")]
)
def test_ssh_says_why_there_is_no_login(monkeypatch: pytest.MonkeyPatch, power: str, words: str) -> None:
    row = {"name": "web", "uuid": "u", "power": power}
    cloud = SimpleNamespace(below=str, call=lambda _method, _path: row)
    monkeypatch.setattr(network_commands, "api", lambda: cloud)
    monkeypatch.setattr(network_commands, "reached_here", lambda *_: "127.0.0.1")
    monkeypatch.setattr(network_commands, "wait_for_greeting", lambda *_: False)
    result = CliRunner().invoke(main_group, ["ssh", "web"])
    assert isinstance(result.exception, ApiError) and words in result.exception.message
    assert result.exception.hint.startswith("recvirt-cloud")


def test_one_address_is_one_cards_in_the_table_too(cloud: Cloud) -> None:
    row = launched(cloud)
    nic = row.nics.get()
    with pytest.raises(IntegrityError), transaction.atomic():
        Nic.objects.create(
            instance=row, network=nic.network, position=1, mac="52:54:00:ff:ff:ff", address=nic.address
        )  # fmt: skip
