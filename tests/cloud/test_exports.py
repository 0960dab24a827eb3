"""What the central node offers in the tunnel: who listens there, what is exported to whom, and when nothing is."""

from __future__ import annotations

import configparser
import os
import re
import stat
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from recvirt.data import data_path
from recvirt.nestedcloud import exports, provision, tunnel
from recvirt.nestedcloud.machine import Machine, ProvisionError, read
from tests.cloud.test_provision import Programs, has_roles, machine, programs

__all__ = ["machine", "programs"]

CLOUD = uuid.UUID("6f1f9a3e-0000-4000-8000-000000000001")
RESTART = ("systemctl", "--no-block", "restart", "nfs-server.service")
STOP = ("systemctl", "--no-block", "stop", "nfs-server.service")


@pytest.fixture
def numbered(machine: Machine) -> Machine:
    """A machine where users have the numbers that sysusers.d gives them."""
    groups = {"recvirt-spool": 643}
    return replace(machine, owner_of=lambda _user: (641, 641), group_of=lambda group: groups.get(group, 642))


def listener(machine: Machine) -> Path:
    return machine.root / "etc/rabbitmq/conf.d/60-recvirt-cloud-tunnel.conf"


def table(machine: Machine) -> Path:
    return machine.root / "etc/exports.d/recvirt-cloud.exports"


def host(machine: Machine) -> Path:
    return machine.root / "etc/nfs.conf.d/60-recvirt-cloud-tunnel.conf"


def test_the_numbers_are_those_that_the_package_asks_for() -> None:
    text = data_path("packages", "recvirt-cloud", "root", "usr", "lib", "sysusers.d", "recvirt-cloud.conf").read_text()
    assert re.search(rf"(?m)^u recvirt-worker {exports.WORKER_UID} ", text)
    assert re.search(rf"(?m)^g recvirt-disks {exports.DISKS_GID}$", text)
    assert re.search(rf"(?m)^g recvirt-spool {exports.SPOOL_GID}$", text)


def test_uploads_are_not_shared_under_another_number(numbered: Machine) -> None:
    exports.ensure(replace(numbered, group_of=lambda group: {"recvirt-spool": 990}.get(group, 642)), CLOUD)
    assert "spool" not in table(numbered).read_text() and "images" in table(numbered).read_text()


def test_broker_and_file_server_are_there_for_the_tunnel_alone(numbered: Machine, programs: Programs) -> None:
    exports.ensure(numbered, CLOUD)
    address, prefix = tunnel.central_address(CLOUD), tunnel.prefix(CLOUD)
    assert f"listeners.tcp.tunnel = {address}:5672\n" in listener(numbered).read_text()
    assert exports.broker_host(numbered) == f"[{address}]"
    lines = table(numbered).read_text().splitlines()
    assert [line.split()[0] for line in lines] == [
        "/var/lib/recvirt/images", "/var/lib/recvirt/blocks", "/var/lib/recvirt-cloud-spool",
    ]  # fmt: skip
    for line in lines:
        _, who = line.split()
        assert who.startswith(f"{prefix}(") and "root_squash" in who and "no_root_squash" not in who
        assert ",sync," in who
    assert f"host={address}\n" in host(numbered).read_text()
    assert RESTART in programs.named("systemctl")
    # Read by services that are not root.
    assert all(stat.S_IMODE(path(numbered).stat().st_mode) == 0o644 for path in (listener, table, host))


def test_again_changes_nothing_and_restarts_nothing(numbered: Machine, programs: Programs) -> None:
    exports.ensure(numbered, CLOUD)
    programs.calls.clear()
    exports.ensure(numbered, CLOUD)
    assert programs.named("systemctl") == [("systemctl", "start", "recvirt-cloud-tunnel.service")]


@pytest.mark.parametrize("fault", ["no programs", "no service", "no address"])
def test_without_a_tunnel_the_cloud_of_one_machine_goes_on(
    numbered: Machine, programs: Programs, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    exports.ensure(numbered, CLOUD)
    programs.calls.clear()
    told: list[str] = []

    def broken(*_: object) -> None:
        if fault == "no programs":
            raise ProvisionError("wg is not installed")
        programs.interface = "5: recvirt0    inet6 fe80::1/64 scope link\n"

    monkeypatch.setattr(tunnel, "ensure_central", broken)
    if fault == "no service":
        programs.fails = ("recvirt-cloud-tunnel.service", 1)
    exports.ensure(replace(numbered, tell=told.append), CLOUD)
    assert len(told) == 1 and "no workers on other machines; the cloud of this one goes on: " in told[0]
    # A broker that is told to listen on an address that is not there does not start.
    assert not listener(numbered).exists() and exports.broker_host(numbered) is None
    assert not table(numbered).exists() and not host(numbered).exists()
    assert STOP in programs.named("systemctl")


@pytest.mark.parametrize(("text", "left"), [
    ("IMAGES_SOURCE=nas:/i\nBLOCKS_SOURCE=nas:/b\n", []),
    ("IMAGES_SOURCE=nas:/i\nBLOCKS_SOURCE=\n", ["/var/lib/recvirt/blocks"]),
    ("IMAGES_SOURCE=nas:/i\nIMAGES_SOURCE=\"\"\r\n",
     ["/var/lib/recvirt/images", "/var/lib/recvirt/blocks"]),
])  # fmt: skip
def test_what_comes_from_a_file_server_is_not_handed_on(numbered: Machine, text: str, left: list[str]) -> None:
    (numbered.root / "etc/recvirt").mkdir(parents=True)
    (numbered.root / "etc/recvirt/nfs.conf").write_text(text)
    exports.ensure(numbered, CLOUD)
    lines = table(numbered).read_text().splitlines() if table(numbered).exists() else []
    # Uploads are always this machine's.
    assert [line.split()[0] for line in lines] == [*left, "/var/lib/recvirt-cloud-spool"]
    assert host(numbered).exists() and listener(numbered).exists()


def test_a_file_server_that_user_data_name_later_takes_over(
    numbered: Machine, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the broker waits for does not wait for cloud-init; the set-up does, and looks again."""
    # Nobody of that number may own folders of a test's.
    monkeypatch.setattr(provision, "_ensure_folder", lambda _machine, path, *_: path.mkdir(parents=True, exist_ok=True))
    made = replace(numbered, owner_of=lambda user: (641 if user == "recvirt-worker" else os.geteuid(), os.getegid()))
    provision.prepare(made)
    assert table(made).exists()
    (made.root / "etc/recvirt").mkdir(parents=True)
    (made.root / "etc/recvirt/nfs.conf").write_text("IMAGES_SOURCE=nas:/i\nBLOCKS_SOURCE=nas:/b\n")
    provision.setup(made)
    assert [line.split()[0] for line in table(made).read_text().splitlines()] == ["/var/lib/recvirt-cloud-spool"]
    text = (data_path("packages") / "recvirt-cloud/root/usr/lib/systemd/system/recvirt-cloud-setup.service").read_text()
    assert "After=cloud-init.service cloud-init-network.service recvirt-nfs.service\n" in text


def test_an_older_installation_s_numbers_are_told_and_not_shared(machine: Machine) -> None:
    told: list[str] = []
    older = replace(machine, owner_of=lambda _user: (998, 998), group_of=lambda _group: 997, tell=told.append)
    exports.ensure(older, CLOUD)
    assert not table(older).exists() and listener(older).exists()
    assert len(told) == 1 and "998 and 997 here, and 641 and 642 there" in told[0]


def test_the_broker_is_started_again_only_when_it_does_not_listen_there(machine: Machine, programs: Programs) -> None:
    restart = ("systemctl", "restart", "rabbitmq-server.service")
    provision.setup(machine)
    assert restart not in programs.named("systemctl")
    programs.listens = False
    provision.setup(machine)
    assert programs.named("systemctl").count(restart) == 1
    provision.setup(machine)
    assert programs.named("systemctl").count(restart) == 1


def test_what_the_broker_waits_for_needs_neither_broker_nor_database(machine: Machine, programs: Programs) -> None:
    provision.prepare(machine)
    assert {argv[0] for argv, _, _ in programs.calls} == {"systemctl", "ip"}
    assert listener(machine).exists() and not machine.worker.exists()
    cloud = read(machine.central)["cloud"]
    provision.setup(machine)
    assert read(machine.central)["cloud"] == read(machine.worker)["cloud"] == cloud
    has_roles(machine, "worker")
    programs.calls.clear()
    provision.prepare(machine)
    assert programs.calls == []


def test_nothing_of_nfs_listens_but_its_one_port() -> None:
    """rpc.mountd listens as soon as version 2 or 3 is on, and 2 counts as on until it is named. By Debian's default
    (manage-gids) it would look QEMU's groups up among this machine's users.
    """
    path = data_path("packages") / "recvirt-cloud-central/root/etc/nfs.conf.d/50-recvirt-cloud.conf"
    conf = configparser.ConfigParser()
    conf.read(path)
    found = dict(conf["nfsd"])
    assert [name for name, value in found.items() if name.startswith("vers") and value == "y"] == ["vers4", "vers4.2"]
    assert all(found[name] == "n" for name in ("vers2", "vers3", "vers4.0", "vers4.1", "udp"))
    assert conf["mountd"]["manage-gids"] == "n"
