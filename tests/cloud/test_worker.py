"""Actions on libvirt's own test driver: each one twice, late, and where something is missing."""

from __future__ import annotations

import dataclasses
import fcntl
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from recvirt.nestedcloud.model import (
    GIB,
    MIB,
    Command,
    Fault,
    InstanceSpec,
    Kind,
    NetworkSpec,
    NicSpec,
    Phase,
    Power,
    Report,
    encode,
)
from recvirt.nestedcloud.worker.actions import ACTIONS
from recvirt.nestedcloud.worker.agent import Agent, BusyError
from recvirt.nestedcloud.worker.errors import ActionError
from recvirt.nestedcloud.worker.host import Host
from recvirt.nestedcloud.worker.hypervisor import Hypervisor
from recvirt.nestedcloud.worker.storage import SparseStorage
from tests.cloud.support import instance


class Bench:
    """A worker on a connection of its own, and what it reported."""

    def __init__(self, folder: Path) -> None:
        self.host = Host(str(uuid.uuid4()), "test", folder / "images", folder / "blocks", log_dir=folder)
        for path in (self.host.images_dir, self.host.blocks_dir):
            path.mkdir()
        # A node of its own: test:///default is shared by all connections of a process.
        (folder / "node.xml").write_text("<node><cpu><nodes>1</nodes></cpu><memory>8388608</memory></node>")
        self.connection = libvirt.open(f"test://{folder}/node.xml")
        hypervisor = Hypervisor("test", self.host, shared=self.connection)
        self.agent = Agent(
            str(uuid.uuid4()), "w1", hypervisor, SparseStorage(self.host), folder / "run", "boot-1", {"type": "test"}
        )
        self.reports: list[Report] = []

    def do(self, kind: Kind, spec: InstanceSpec | None, operation: str = "", **args: Any) -> Report:
        command = Command(operation or str(uuid.uuid4()), 1, kind, spec.generation if spec else 1, spec, args=args)
        return self.agent.execute(command, self.reports.append)

    def launched(self, **changes: Any) -> InstanceSpec:
        spec = instance(**changes)
        assert self.do(Kind.LAUNCH, spec).phase is Phase.SUCCEEDED, self.reports[-1]
        return spec

    def power(self, spec: InstanceSpec) -> Power:
        return self.agent.hypervisor.power(self.agent.hypervisor.get(spec.uuid))

    def files(self) -> list[str]:
        return sorted(path.name for path in self.host.blocks_dir.iterdir() if path != self.host.graves_dir)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.connection.close()


def later(spec: InstanceSpec, **changes: Any) -> InstanceSpec:
    return dataclasses.replace(spec, generation=spec.generation + 1, **changes)


def test_a_launch_leaves_a_running_domain_and_its_files(bench: Bench) -> None:
    network = NetworkSpec(str(uuid.uuid4()), "default", "nat", "172.30.1.0/24")
    spec = instance(nics=(NicSpec(network.uuid, "52:54:00:00:00:01"),))
    last = bench.do(Kind.LAUNCH, spec, networks=[encode(network)])
    assert last.phase is Phase.SUCCEEDED, last.message
    assert last.facts["domain"] == {
        "uuid": spec.uuid, "power": "running", "generation": 1, "vcpus": 1, "memory_bytes": 512 * MIB,
    }  # fmt: skip
    assert bench.files() == [f"{spec.uuid}-seed.img", f"{spec.uuid}.qcow2"]
    assert [report.progress for report in bench.reports] == sorted(report.progress for report in bench.reports)
    assert bench.connection.networkLookupByName(f"recvirt-{network.uuid[:8]}").isActive()


@pytest.mark.parametrize("kind", [Kind.LAUNCH, Kind.START])
def test_what_was_done_is_not_done_again(bench: Bench, kind: Kind) -> None:
    spec = bench.launched()
    before = bench.connection.lookupByUUIDString(spec.uuid).ID()
    assert bench.do(kind, spec).phase is Phase.SUCCEEDED
    assert bench.connection.lookupByUUIDString(spec.uuid).ID() == before
    assert bench.connection.numOfDomains() == 1


def test_a_domain_that_is_gone_is_made_again_by_a_start(bench: Bench) -> None:
    spec = bench.launched()
    domain = bench.connection.lookupByUUIDString(spec.uuid)
    domain.destroy()
    domain.undefine()
    assert bench.do(Kind.START, spec).phase is Phase.SUCCEEDED
    assert bench.power(spec) is Power.RUNNING


def test_stopping_is_graceful_first_and_idempotent(bench: Bench) -> None:
    spec = bench.launched()
    for _ in range(2):
        last = bench.do(Kind.STOP, spec, graceful_seconds=5)
        assert last.phase is Phase.SUCCEEDED and last.facts["graceful"] is True
    assert bench.power(spec) is Power.STOPPED


def test_suspending_and_resuming(bench: Bench) -> None:
    spec = bench.launched()
    for kind, power in ((Kind.SUSPEND, Power.SUSPENDED), (Kind.RESUME, Power.RUNNING)):
        for _ in range(2):
            assert bench.do(kind, spec).facts["domain"]["power"] == power
    bench.do(Kind.STOP, spec, graceful_seconds=0)
    last = bench.do(Kind.SUSPEND, spec)
    assert (last.phase, last.fault) == (Phase.FAILED, Fault.CONFLICT)


def test_a_reboot_happens_once_an_operation(bench: Bench) -> None:
    spec = bench.launched()
    calls: list[Any] = []
    bench.agent.hypervisor.reboot = calls.append  # type: ignore[assignment,method-assign]
    operation = str(uuid.uuid4())
    for _ in range(2):
        assert bench.do(Kind.REBOOT, spec, operation).phase is Phase.SUCCEEDED
    assert len(calls) == 1
    bench.do(Kind.REBOOT, spec)
    assert len(calls) == 2


def test_deleting_leaves_nothing_and_may_come_twice(bench: Bench) -> None:
    spec = bench.launched()
    bench.do(Kind.SNAPSHOT, spec, snapshot="a")
    for _ in range(2):
        assert bench.do(Kind.DELETE, spec).phase is Phase.SUCCEEDED, bench.reports[-1]
    assert bench.files() == [] and bench.connection.listAllDomains() == []


def test_rescaling_as_it_runs(bench: Bench) -> None:
    spec = bench.launched()
    larger = later(spec, vcpus=3, memory_bytes=768 * MIB)
    last = bench.do(Kind.RESCALE, larger)
    assert last.facts["how"] == "as it runs", last
    assert (last.facts["domain"]["vcpus"], last.facts["domain"]["memory_bytes"]) == (3, 768 * MIB)
    assert last.facts["domain"]["generation"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"vcpus_max": 8}, "8 vCPUs instead of 4"), ({"memory_max_bytes": 2 * GIB}, "bytes of memory instead of")],
)
def test_what_needs_a_restart_is_named_and_done_when_allowed(bench: Bench, changes: Any, words: str) -> None:
    spec = bench.launched()
    larger = later(spec, **changes)
    refused = bench.do(Kind.RESCALE, larger)
    assert (refused.phase, refused.fault) == (Phase.FAILED, Fault.RESTART_NEEDED) and words in refused.message
    done = bench.do(Kind.RESCALE, larger, restart=True, graceful_seconds=1)
    assert done.facts["how"] == "by a restart", done
    assert bench.power(spec) is Power.RUNNING


def test_taking_a_processor_away_needs_a_restart(bench: Bench) -> None:
    spec = bench.launched(vcpus=2)
    last = bench.do(Kind.RESCALE, later(spec, vcpus=1))
    assert last.fault is Fault.RESTART_NEEDED and "does not give one back" in last.message


def test_rescaling_while_it_is_off(bench: Bench) -> None:
    spec = bench.launched()
    bench.do(Kind.STOP, spec, graceful_seconds=0)
    root = dataclasses.replace(spec.root, size_bytes=2 * GIB)
    last = bench.do(Kind.RESCALE, later(spec, vcpus=2, root=root))
    assert last.facts["how"] == "while it was off"
    assert bench.host.disk_path(spec.uuid, "qcow2").stat().st_size == 2 * GIB


def test_an_older_command_does_not_undo_a_newer_one(bench: Bench) -> None:
    spec = bench.launched()
    assert bench.do(Kind.RESCALE, later(spec, vcpus=2)).phase is Phase.SUCCEEDED
    for kind in (Kind.LAUNCH, Kind.STOP, Kind.RESCALE, Kind.DELETE):
        last = bench.do(kind, spec)
        assert (last.phase, last.fault) == (Phase.FAILED, Fault.CONFLICT), kind


def test_snapshot_and_revert(bench: Bench) -> None:
    spec = bench.launched()
    for _ in range(2):
        assert bench.do(Kind.SNAPSHOT, spec, snapshot="before").facts["snapshots"] == ["before"]
    bench.do(Kind.STOP, spec, graceful_seconds=0)
    assert bench.do(Kind.REVERT, spec, snapshot="before").facts["domain"]["power"] == "running"
    for _ in range(2):
        assert bench.do(Kind.SNAPSHOT_REMOVE, spec, snapshot="before").facts["snapshots"] == []
    last = bench.do(Kind.REVERT, spec, snapshot="before")
    assert (last.phase, last.fault) == (Phase.FAILED, Fault.NOT_FOUND)


@pytest.mark.parametrize("name", ["", "../x", "a b", "<a>", "A"])
def test_a_snapshot_s_name_is_checked_here_too(bench: Bench, name: str) -> None:
    assert bench.do(Kind.SNAPSHOT, bench.launched(), snapshot=name).fault is Fault.INVALID


def test_somebody_else_s_domain_is_not_touched(bench: Bench) -> None:
    key = str(uuid.uuid4())
    bench.connection.defineXML(
        f"<domain type='test'><name>theirs</name><uuid>{key}</uuid><memory>1024</memory>"
        "<os><type>hvm</type></os></domain>"
    )
    for kind in (Kind.LAUNCH, Kind.DELETE, Kind.STOP):
        assert bench.do(kind, instance(uuid=key)).fault is Fault.CONFLICT
    assert bench.agent.heartbeat().domains == ()
    assert bench.connection.lookupByUUIDString(key).name() == "theirs"


def test_a_heartbeat_tells_what_is_there(bench: Bench) -> None:
    spec = bench.launched()
    beat = bench.agent.heartbeat()
    assert [(domain.uuid, domain.power) for domain in beat.domains] == [(spec.uuid, Power.RUNNING)]
    assert beat.vcpus >= 1 and beat.memory_bytes > 0 and beat.disk_bytes > 0


def test_two_at_once_are_not_let_in(bench: Bench, tmp_path: Path) -> None:
    spec = instance()
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / f"{spec.uuid}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(BusyError):
            bench.do(Kind.LAUNCH, spec)
    assert bench.reports == []
    assert bench.do(Kind.LAUNCH, spec).phase is Phase.SUCCEEDED


def test_a_worker_without_the_verb_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {kind: action for kind, action in ACTIONS.items() if kind is not Kind.EXPORT}
    monkeypatch.setattr("recvirt.nestedcloud.worker.agent.ACTIONS", known)
    assert bench.do(Kind.EXPORT, instance()).fault is Fault.NOT_SUPPORTED


def test_a_full_disk_is_told_and_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("recvirt.nestedcloud.worker.storage.sync_folder", full)
    last = bench.do(Kind.LAUNCH, instance())
    assert (last.phase, last.fault) == (Phase.FAILED, Fault.NO_SPACE)
    assert not list(bench.host.blocks_dir.glob(".*"))


def test_a_libvirt_that_is_away_is_told(tmp_path: Path) -> None:
    host = Host(str(uuid.uuid4()), "test", tmp_path, tmp_path)
    hypervisor = Hypervisor("test:///absent/node.xml", host)
    agent = Agent(str(uuid.uuid4()), "w1", hypervisor, SparseStorage(host), tmp_path / "run", "boot", {})
    reports: list[Report] = []
    last = agent.execute(Command(str(uuid.uuid4()), 1, Kind.STOP, 1, instance()), reports.append)
    assert (last.phase, last.fault) == (Phase.FAILED, Fault.HYPERVISOR) and "libvirt at test:///absent" in last.message


def _stale(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The next answers to whether a network runs are from before somebody else started it."""
    real, left = libvirt.virNetwork.isActive, [0] * times
    monkeypatch.setattr(libvirt.virNetwork, "isActive", lambda self: left.pop() if left else real(self))


def test_a_network_that_another_process_starts_meanwhile_is_taken(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    hypervisor = Hypervisor("test", bench.host, shared=bench.connection)
    spec = NetworkSpec(str(uuid.uuid4()), "lan", "nat", "172.30.9.0/24")
    hypervisor.networks.ensure(spec)
    _stale(monkeypatch, 1)
    hypervisor.networks.ensure(spec)
    _stale(monkeypatch, 2)
    with pytest.raises(ActionError, match="already"):
        hypervisor.networks.ensure(spec)
