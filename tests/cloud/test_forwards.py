"""Forwards of ports: who may have which, how they reach the rules, and that nothing the worker writes is believed."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from recvirt.nestedcloud import portmap
from recvirt.nestedcloud.addresses import MANAGEMENT_PORTS, ForwardSpec, WantedForwards
from recvirt.nestedcloud.central import forwards, operations, reports
from recvirt.nestedcloud.central.forward_serializers import NewForwardSerializer
from recvirt.nestedcloud.central.models import Forward, Instance, Network, NetworkKind, Operation, Project, Role, Worker
from recvirt.nestedcloud.central.specs import command_of
from recvirt.nestedcloud.cli import main_group
from recvirt.nestedcloud.client.api import Access, Api
from recvirt.nestedcloud.codec import encode
from recvirt.nestedcloud.model import InstanceSpec, Kind, Phase, Power
from recvirt.nestedcloud.worker.errors import ActionError
from recvirt.nestedcloud.worker.forwarding import Forwarding
from tests.cloud.conftest import Cloud, client_of, make_user
from tests.cloud.support import instance
from tests.cloud.test_operations import finish, launched, report, sent

NETWORK = "11111111-1111-4111-8111-111111111111"
BRIDGES = json.dumps([
    {"ifname": "rv11111111", "addr_info": [{"local": "172.30.5.1", "prefixlen": 24}]},
    {"ifname": "virbr0", "addr_info": [{"local": "192.168.122.1", "prefixlen": 24}]},
])  # fmt: skip


@pytest.fixture
def web(cloud: Cloud) -> Instance:
    """An instance on a worker that forwards ports."""
    Worker.objects.update(features={"forwards": True})
    return launched(cloud)


def add(cloud: Cloud, client: Any = None, headers: dict[str, str] | None = None, **body: Any) -> Any:
    data = {"instance": "web", "host_port": 8080, "guest_port": 80, **body}
    return (client or cloud.client).post(cloud.url("forwards"), data, format="json", headers=headers)


def done(answer: Any, phase: Phase = Phase.SUCCEEDED, **facts: Any) -> None:
    """What the worker would have reported."""
    assert answer.status_code == 202, answer.data
    sent()
    operation = Operation.objects.get(pk=answer.data["uuid"])
    assert reports.apply(report(operation, phase, facts=facts, message=facts.get("forwards", "")))


# --- the API


def test_a_forward_from_its_request_to_its_end(cloud: Cloud, web: Instance) -> None:
    answer = add(cloud, source="192.0.2.0/24")
    assert answer.data["kind"] == "forward-add"
    command = sent()[0][1]
    assert command.instance is not None and command.generation == 2
    assert command.instance.forwards == (
        ForwardSpec("tcp", 8080, str(web.nics.get().network_id), "172.30.0.2", 80, "192.0.2.0/24"),
    )
    assert command.args["networks"]
    done(answer, forwards="")
    (shown,) = cloud.client.get(cloud.url("forwards")).data["results"]
    seen = {name: shown[name] for name in ("instance", "address", "state", "worker")}
    assert seen == {"instance": "web", "address": "172.30.0.2", "state": "active", "worker": "w1"}
    gone = cloud.client.delete(cloud.url(f"forwards/{shown['uuid']}"), headers={"Idempotency-Key": "k"})
    told = sent()[0][1].instance
    assert told is not None and told.forwards == ()
    done(gone, forwards="")
    assert not Forward.objects.exists()
    again = cloud.client.delete(cloud.url(f"forwards/{shown['uuid']}"), headers={"Idempotency-Key": "k"})
    assert again.data["uuid"] == gone.data["uuid"]
    assert cloud.client.delete(cloud.url(f"forwards/{shown['uuid']}")).status_code == 404


def test_what_could_not_be_done_is_told_and_can_be_removed(cloud: Cloud, web: Instance) -> None:
    done(add(cloud), Phase.FAILED, forwards="the network is not there")
    row = Forward.objects.get()
    assert (row.state, row.message) == ("failed", "the network is not there")
    done(cloud.client.delete(cloud.url(f"forwards/{row.uuid}")), Phase.FAILED)
    row.refresh_from_db()
    # It is unwanted from then on, whatever the worker could do.
    told = command_of(operations.request(web, None, Kind.STOP, {})).instance
    assert row.state == "removing" and told is not None and told.forwards == ()


def test_it_goes_with_its_instance(cloud: Cloud, web: Instance) -> None:
    done(add(cloud), forwards="")
    web.refresh_from_db()
    finish(operations.request(web, cloud.user, Kind.DELETE, {}), Power.ABSENT)
    assert not Forward.objects.exists()


@pytest.mark.parametrize("port", sorted(MANAGEMENT_PORTS))
def test_ports_of_the_cloud_are_nobodys(cloud: Cloud, web: Instance, port: int) -> None:
    cloud.user.is_superuser = True
    cloud.user.save()
    answer = add(cloud, host_port=port)
    assert answer.status_code == 409 and "the cloud itself needs" in answer.data["title"]


def test_the_systems_ports_are_the_administrators(cloud: Cloud, web: Instance) -> None:
    answer = add(cloud, host_port=80)
    assert answer.status_code == 409 and "administrators" in answer.data["title"]
    cloud.user.is_superuser = True
    cloud.user.save()
    assert add(cloud, host_port=80).status_code == 202


def test_a_port_is_one_forwards_on_its_worker_and_others_are_not_named(cloud: Cloud, web: Instance) -> None:
    done(add(cloud))
    other = Project.objects.create(name="other")
    client = client_of(make_user("eve", other))
    Network.objects.create(project=other, name="default", cidr="10.9.0.0/24")
    answer = client.post("/api/v1/projects/other/instances", {"name": "theirs", "image": "tiny"}, format="json")
    assert answer.status_code == 202, answer.data
    finish(Instance.objects.get(name="theirs").operations.get())
    body = {"instance": "theirs", "host_port": 8080, "guest_port": 80}
    answer = client.post("/api/v1/projects/other/forwards", body, format="json")
    assert answer.status_code == 409 and answer.data["title"] == "port 8080/tcp of w1 is taken: choose another one"
    # The same number of the other protocol is another port.
    assert client.post("/api/v1/projects/other/forwards", {**body, "protocol": "udp"}, format="json").status_code == 202
    assert Instance.objects.get(name="theirs").generation == 2


def test_another_projects_instance_and_forward_are_not_there(cloud: Cloud, web: Instance) -> None:
    done(add(cloud))
    client = client_of(make_user("eve", Project.objects.create(name="other")))
    body = {"instance": "web", "host_port": 9000, "guest_port": 80}
    answer = client.post("/api/v1/projects/other/forwards", body, format="json")
    assert answer.status_code == 400 and "no instance called web" in str(answer.data["errors"])
    row = Forward.objects.get()
    assert client.get(f"/api/v1/projects/other/forwards/{row.uuid}").status_code == 404
    assert client.delete(f"/api/v1/projects/other/forwards/{row.uuid}").status_code == 404


def test_a_quota_bounds_them(cloud: Cloud, web: Instance) -> None:
    Project.objects.update(forwards_max=1)
    done(add(cloud))
    answer = add(cloud, host_port=8081)
    assert (answer.status_code, answer.data["type"], answer.data["quota"]) == (403, "quota-exceeded", "forwards")


def test_the_same_key_makes_one(cloud: Cloud, web: Instance) -> None:
    one, two = (add(cloud, headers={"Idempotency-Key": "k"}) for _ in range(2))
    assert one.data["uuid"] == two.data["uuid"] and Forward.objects.count() == 1


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"host_port": 0}, "host_port"), ({"host_port": 65536}, "host_port"), ({"guest_port": 0}, "guest_port"),
        ({"protocol": "sctp"}, "protocol"), ({"source": "10.0.0.1/8"}, "source"), ({"source": "fd00::/8"}, "source"),
        ({"source": "1.1.1.1 accept"}, "source"), ({"instance": "absent"}, "instance"), ({"port": 1}, "port"),
    ],
)  # fmt: skip
def test_a_document_that_is_not_valid_is_refused_by_field(
    cloud: Cloud, web: Instance, body: dict[str, Any], field: str
) -> None:
    answer = add(cloud, **body)
    assert answer.status_code == 400 and list(answer.data["errors"]) == [field]
    assert not Forward.objects.exists()


@pytest.mark.parametrize("kind", [NetworkKind.ISOLATED, NetworkKind.BRIDGE])
def test_only_networks_with_nat_are_led_to(cloud: Cloud, web: Instance, kind: str) -> None:
    Network.objects.update(kind=kind)
    answer = add(cloud)
    assert answer.status_code == 409 and "no card" in answer.data["title"]


def test_a_worker_that_can_t_is_told(cloud: Cloud) -> None:
    launched(cloud)
    answer = add(cloud)
    assert answer.status_code == 409 and "forwards no ports" in answer.data["title"]


def test_a_reader_and_a_busy_instance(cloud: Cloud, web: Instance) -> None:
    reader = client_of(make_user("bob", cloud.project, Role.READER))
    assert add(cloud, reader).status_code == 403
    assert add(cloud).status_code == 202
    assert add(cloud, host_port=9000).data["type"] == "operation-active"
    with pytest.raises(Exception, match="is busy"):
        forwards.remove(Forward.objects.get(), cloud.user)


# --- the worker's side


class Applier:
    """The root service's part, as a thread: takes every file for done, or refuses all."""

    def __init__(self, folder: Path, refused: str = "") -> None:
        self.folder, self.applied, self.refused = folder, folder / "applied.json", refused
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    def _work(self) -> None:
        while not self.stop.wait(0.02):
            wishes = portmap.read_wishes(self.folder)
            state = {name: {"sha256": wish.sha256, "refused": self.refused} for name, wish in wishes.items()}
            part = self.applied.with_suffix(".part")
            part.write_text(json.dumps({"instances": state}))
            part.rename(self.applied)

    def end(self) -> None:
        self.stop.set()
        self.thread.join()


@pytest.fixture
def applier(tmp_path: Path) -> Iterator[Applier]:
    made = Applier(tmp_path)
    yield made
    made.end()


def forward(**changes: Any) -> ForwardSpec:
    values = {
        "protocol": "tcp", "host_port": 8080, "network": NETWORK, "address": "172.30.5.9", "guest_port": 80,
    }  # fmt: skip
    return ForwardSpec(**{**values, **changes})


def side(folder: Path, seconds: float = 5.0) -> Forwarding:
    return Forwarding(folder / "forwards", folder / "applied.json", seconds)


def with_forwards(*items: ForwardSpec, **changes: Any) -> InstanceSpec:
    return instance(forwards=items, **changes)


def test_a_worker_waits_for_what_the_service_says(tmp_path: Path, applier: Applier) -> None:
    spec = with_forwards(forward())
    assert side(tmp_path).ensure(spec, "op") == ""
    assert portmap.read_wishes(tmp_path)[spec.uuid].wanted == WantedForwards(spec.uuid, 1, "op", (forward(),))
    applier.refused = "no such network"
    time.sleep(0.1)
    assert side(tmp_path).ensure(spec, "op2") == "no such network"
    side(tmp_path).drop(spec.uuid)
    assert portmap.read_wishes(tmp_path) == {}
    side(tmp_path).drop(spec.uuid)


def test_a_service_that_is_silent_is_told(tmp_path: Path) -> None:
    spec = with_forwards(forward())
    assert "did not answer" in str(side(tmp_path, 0.2).ensure(spec, "op"))
    (tmp_path / "applied.json").write_text(json.dumps({"instances": {spec.uuid: {"sha256": "x", "refused": ""}}}))
    with pytest.raises(ActionError, match="did not answer"):
        side(tmp_path, 0.2).drop(spec.uuid)


def test_an_old_message_does_not_bring_a_forward_back(tmp_path: Path, applier: Applier) -> None:
    key = str(uuid.uuid4())
    assert side(tmp_path).ensure(with_forwards(uuid=key, generation=3), "op") is None
    assert side(tmp_path).ensure(with_forwards(forward(), uuid=key, generation=4), "op") == ""
    assert side(tmp_path).ensure(with_forwards(uuid=key, generation=5), "op") == ""
    with pytest.raises(ActionError, match="has been changed"):
        side(tmp_path).ensure(with_forwards(forward(), uuid=key, generation=4), "op")
    assert portmap.read_wishes(tmp_path)[key].wanted == WantedForwards(key, 5, "op", ())


# --- the root service's side


def programs(calls: list[tuple[list[str], str]], fail: Sequence[str] = (), chain: str = "") -> portmap.Run:
    def run(argv: Sequence[str], text: str) -> tuple[int, str, str]:
        calls.append((list(argv), text))
        if argv[0] == "ip":
            return 0, BRIDGES, ""
        if argv[0] == "iptables" and "-S" in argv:
            return (0, chain, "") if chain else (127, "", "iptables is not installed")
        if "list" in argv:
            return 1, "", "No such file or directory"
        return (1, "", "syntax error") if argv[0] in fail else (0, "", "")

    return run


def wish(folder: Path, *items: ForwardSpec, name: str = "", text: str | None = None) -> str:
    key = name or str(uuid.uuid4())
    (folder / "forwards").mkdir(exist_ok=True)
    words = text if text is not None else json.dumps(encode(WantedForwards(key, 1, "op", items)))
    (folder / f"forwards/{key}.json").write_text(words)
    return key


def test_the_table_is_loaded_whole_and_told_of(tmp_path: Path) -> None:
    calls: list[tuple[list[str], str]] = []
    key = wish(tmp_path, forward(), forward(protocol="udp", host_port=53000, source="192.0.2.0/24"))
    state = portmap.apply(tmp_path, tmp_path / "applied.json", programs(calls))
    assert state.instances[key].refused == ""
    (text,) = [text for argv, text in calls if argv == ["nft", "-f", "-"]]
    assert text.splitlines()[:2] == ["add table ip recvirt_forwards", "delete table ip recvirt_forwards"]
    assert "\t\ttcp dport 8080 ct mark set 0x72766677 dnat to 172.30.5.9:80\n" in text
    assert "\t\tip saddr 192.0.2.0/24 udp dport 53000 ct mark set 0x72766677 dnat to 172.30.5.9:80\n" in text
    assert json.loads((tmp_path / "applied.json").read_text())["instances"][key]["refused"] == ""


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"network": "99999999-1111-4111-8111-111111111111"}, "is not there"),
        ({"address": "172.30.6.9"}, "no guest's"), ({"address": "172.30.5.1"}, "no guest's"),
        ({"address": "172.30.5.255"}, "no guest's"), ({"address": "192.168.122.5"}, "no guest's"),
    ],
)  # fmt: skip
def test_an_address_outside_of_our_networks_is_led_to_by_nothing(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    calls: list[tuple[list[str], str]] = []
    key = wish(tmp_path, forward(**changes))
    state = portmap.apply(tmp_path, tmp_path / "applied.json", programs(calls))
    assert why in state.instances[key].refused
    assert "dnat to" not in "".join(text for _, text in calls)


@pytest.mark.parametrize(
    "changes",
    [
        {"protocol": "tcp dport 22 accept; tcp"}, {"host_port": 22}, {"host_port": 70000}, {"address": "::1"},
        {"address": "10.0.0.1\n"}, {"source": "0.0.0.0/0 accept"}, {"source": "10.0.0.1/8"}, {"network": "../x"},
        {"guest_port": True}, {"more": 1},
    ],
)  # fmt: skip
def test_a_wish_that_says_something_else_is_refused_whole(tmp_path: Path, changes: dict[str, Any]) -> None:
    key = str(uuid.uuid4())
    wanted = encode(WantedForwards(key, 1, "op", (forward(),)))
    wanted["forwards"][0] |= changes
    wish(tmp_path, name=key, text=json.dumps(wanted))
    found = portmap.read_wishes(tmp_path)[key]
    assert found.wanted is None and found.fault


def test_links_pipes_and_strange_names_are_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("root:x")
    wish(tmp_path, name="readme")
    names = [str(uuid.uuid4()) for _ in range(4)]
    folder = tmp_path / "forwards"
    (folder / f"{names[0]}.json").symlink_to(secret)
    os.mkfifo(folder / f"{names[1]}.json")
    (folder / f"{names[2]}.json").write_bytes(b" " * ((1 << 20) + 1))
    wish(tmp_path, name=names[3], text=json.dumps(encode(WantedForwards(names[0], 1, "op", ()))))
    found = portmap.read_wishes(tmp_path)
    assert set(found) == set(names) and all(item.wanted is None for item in found.values())
    assert "root" not in str(found)
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    folder.symlink_to(moved)
    with pytest.raises(portmap.PortmapError):
        portmap.read_wishes(tmp_path)


def test_a_port_is_the_first_ones(tmp_path: Path) -> None:
    first, second = sorted(str(uuid.uuid4()) for _ in range(2))
    for key in (first, second):
        wish(tmp_path, forward(), name=key)
    state = portmap.apply(tmp_path, tmp_path / "applied.json", programs([]))
    assert state.instances[first].refused == "" and "another instance's" in state.instances[second].refused


def test_rules_that_are_not_loaded_are_not_told_to_be(tmp_path: Path) -> None:
    wish(tmp_path, forward())
    with pytest.raises(portmap.PortmapError, match="syntax error"):
        portmap.apply(tmp_path, tmp_path / "applied.json", programs([], fail=["nft"]))
    assert not (tmp_path / "applied.json").exists()


def test_what_changes_meanwhile_is_not_missed(tmp_path: Path) -> None:
    real, calls, late = programs([]), [0], str(uuid.uuid4())

    def run(argv: Sequence[str], text: str) -> tuple[int, str, str]:
        if list(argv) == ["nft", "-f", "-"]:
            calls[0] += 1
            wish(tmp_path, forward(host_port=9000), name=late)
        return real(argv, text)

    wish(tmp_path, forward())
    assert late in portmap.apply(tmp_path, tmp_path / "applied.json", run).instances
    assert calls[0] == 2


_OURS = "-A FORWARD -m connmark --mark 0x72766677 -m comment --comment recvirt-forwards -j ACCEPT"


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ("-P FORWARD ACCEPT\n-A FORWARD -j LIBVIRT_FWI\n", ["-I"]),
        (f"-P FORWARD ACCEPT\n{_OURS}\n-A FORWARD -j LIBVIRT_FWI\n", []),
        (f"-P FORWARD ACCEPT\n-A FORWARD -j LIBVIRT_FWI\n{_OURS}\n", ["-D", "-I"]),
        ("-P FORWARD ACCEPT\n-A FORWARD -j DOCKER\n", []),
    ],
)  # fmt: skip
def test_our_rule_stands_before_libvirts_of_the_other_backend(tmp_path: Path, chain: str, expected: list[str]) -> None:
    calls: list[tuple[list[str], str]] = []
    wish(tmp_path, forward())
    portmap.apply(tmp_path, tmp_path / "applied.json", programs(calls, chain=chain))
    assert [argv[3] for argv, _ in calls if argv[0] == "iptables" and "-S" not in argv] == expected


# --- the command line


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Any]]:
    calls: list[tuple[str, str, Any]] = []

    def call(_self: Api, method: str, path: str, body: Any = None, **query: Any) -> Any:
        calls.append((method, path.removeprefix("projects/default/"), body))
        if method == "GET":
            row = {"uuid": "f1", "instance": "web", "host_port": 8080, "protocol": "tcp"}
            return {"results": [row], "next": None}
        return {"uuid": "u"}

    monkeypatch.setattr(Api, "call", call)
    access = Access("http://cloud", "t")
    monkeypatch.setattr("recvirt.nestedcloud.client.commands.load_access", lambda _project: access)
    return calls


def test_the_command_line_asks_in_valid_documents(
    cloud: Cloud, web: Instance, asked: list[tuple[str, str, Any]]
) -> None:
    words = ["forward", "add", "web", "8080:80", "--source", "192.0.2.0/24", "--protocol", "udp", "--no-wait"]
    assert CliRunner().invoke(main_group, words).exit_code == 0
    method, path, body = asked[0]
    assert (method, path) == ("POST", "forwards")
    assert NewForwardSerializer(data=body, context={"project": cloud.project}).is_valid(raise_exception=True)


def test_the_command_line_finds_what_is_to_be_removed(asked: list[tuple[str, str, Any]]) -> None:
    assert CliRunner().invoke(main_group, ["forward", "remove", "web", "8080", "--no-wait"]).exit_code == 0
    assert asked[-1][:2] == ("DELETE", "forwards/f1")
    result = CliRunner().invoke(main_group, ["forward", "remove", "web", "8080", "--protocol", "udp"])
    assert "does not lead to web" in str(result.exception)


@pytest.mark.parametrize("text", ["8080", "0:80", "80:70000", "a:b", "8080:80:1"])
def test_ports_that_are_none(text: str) -> None:
    result = CliRunner().invoke(main_group, ["forward", "add", "web", text])
    assert result.exit_code == 2 and "8080:80" in result.output
