"""What must hold when something died, was away, or came late. Each of these was wrong once."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import libvirt
import pytest
from django.db import OperationalError
from django.utils import timezone

from recvirt.nestedcloud.central import consumer, dispatcher, operations, reports
from recvirt.nestedcloud.central.models import Operation, Reservation, Schedule, Worker
from recvirt.nestedcloud.model import GIB, MIB, Command, Fault, ImageSpec, Kind, Phase, Power, Report, VolumeSpec
from recvirt.nestedcloud.queue import COMMAND_SECONDS, Sender
from recvirt.nestedcloud.worker import graves, service
from recvirt.nestedcloud.worker.errors import ActionError, UnreachableError
from recvirt.nestedcloud.worker.locks import BusyError, alone
from recvirt.nestedcloud.worker.storage import run_tool
from tests.cloud.conftest import Cloud
from tests.cloud.support import instance
from tests.cloud.test_operations import beat, facts, finish, launched, report, sent
from tests.cloud.test_worker import Bench, later


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.connection.close()


def command(kind: Kind, **things: Any) -> Command:
    return Command(str(uuid.uuid4()), 1, kind, 1, **things)


# A worker.


@pytest.mark.parametrize("kind", [Kind.LAUNCH, Kind.START])
def test_what_was_deleted_does_not_come_back_with_a_late_message(bench: Bench, kind: Kind) -> None:
    spec = bench.launched()
    assert bench.do(Kind.DELETE, later(spec)).phase is Phase.SUCCEEDED
    last = bench.do(kind, spec)
    assert (last.phase, last.fault) == (Phase.FAILED, Fault.CONFLICT) and "deleted" in last.message
    assert bench.files() == [] and bench.connection.listAllDomains() == []
    # It is the generation that counts: a delete that its owner was told had failed may be followed by something else.
    assert bench.do(Kind.START, later(later(spec))).phase is Phase.SUCCEEDED


def test_a_volume_and_an_image_do_not_come_back_either(bench: Bench) -> None:
    volume = VolumeSpec(str(uuid.uuid4()), "data", 1, 16 * MIB)
    image = ImageSpec(str(uuid.uuid4()), "raw", largest_bytes=MIB)
    spec = bench.launched()
    for made, gone in (
        (command(Kind.VOLUME_ALLOCATE, volume=volume), Kind.VOLUME_REMOVE),
        (command(Kind.EXPORT, instance=later(spec), image=image), Kind.IMAGE_REMOVE),
    ):
        if made.kind is Kind.EXPORT:
            bench.do(Kind.STOP, spec, graceful_seconds=0)
        assert bench.agent.execute(made, bench.reports.append).phase is Phase.SUCCEEDED, bench.reports[-1]
        removal = dataclasses.replace(made, kind=gone, instance=None)
        for _ in range(2):
            assert bench.agent.execute(removal, bench.reports.append).phase is Phase.SUCCEEDED, bench.reports[-1]
        assert bench.agent.execute(made, bench.reports.append).fault is Fault.CONFLICT
    assert not list(bench.host.images_dir.iterdir()) and bench.files() == [
        f"{spec.uuid}-seed.img", f"{spec.uuid}.qcow2",
    ]  # fmt: skip


def test_what_was_deleted_is_forgotten_in_the_end(tmp_path: Path) -> None:
    kept = graves.Graves(tmp_path / "gone")
    old, new = str(uuid.uuid4()), str(uuid.uuid4())
    kept.dig(old, 3)
    long_ago = time.time() - graves.KEPT_SECONDS - 60
    os.utime(tmp_path / "gone" / old, (long_ago, long_ago))
    kept.dig(new, 3)
    assert [path.name for path in (tmp_path / "gone").iterdir()] == [new]
    kept.check(old, 1)
    with pytest.raises(ActionError, match="deleted"):
        kept.check(new, 3)
    kept.check(new, 4)


def test_half_made_files_of_a_killed_process_go_with_the_next_attempt(bench: Bench) -> None:
    spec, other = instance(), str(uuid.uuid4())
    for name in (f".{spec.uuid}.qcow2.part-1", f".{spec.uuid}-seed.img.part-1", f".{other}.qcow2.part-1"):
        (bench.host.blocks_dir / name).touch()
    (bench.host.images_dir / f".{spec.uuid}.qcow2.fetched-1").touch()
    assert bench.do(Kind.LAUNCH, spec).phase is Phase.SUCCEEDED
    assert bench.files() == [f".{other}.qcow2.part-1", f"{spec.uuid}-seed.img", f"{spec.uuid}.qcow2"]
    assert not list(bench.host.images_dir.iterdir())


def _hold(folder: Path, target: str) -> None:
    with alone(folder, [target]):
        run_tool(["sh", "-c", 'touch "$1/runs"; while [ ! -e "$1/go" ]; do sleep 0.02; done', "sh", str(folder)])


def test_nobody_touches_what_a_program_of_a_killed_worker_still_works_on(tmp_path: Path) -> None:
    target = str(uuid.uuid4())
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path, target))
    process.start()
    _until((tmp_path / "runs").exists)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    try:
        with pytest.raises(BusyError), alone(tmp_path, [target]):
            pass
    finally:
        (tmp_path / "go").touch()
    _until(lambda: _is_free(tmp_path, target))


def _is_free(folder: Path, target: str) -> bool:
    try:
        with alone(folder, [target]):
            return True
    except BusyError:
        return False


def _until(done: Any) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("where", ["define", "start", "note"])
def test_a_rescale_by_a_restart_is_finished_by_the_next_attempt(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    spec = bench.launched()
    larger, operation = later(spec, vcpus_max=8), str(uuid.uuid4())
    hypervisor, calls = bench.agent.hypervisor, 0
    original = getattr(hypervisor, where)

    def die(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        # The first note says that it is going to be restarted.
        if calls == (2 if where == "note" else 1):
            raise Killed
        return original(*args)

    monkeypatch.setattr(hypervisor, where, die)
    with pytest.raises(Killed):
        bench.do(Kind.RESCALE, larger, operation, restart=True, graceful_seconds=1)
    monkeypatch.undo()
    last = bench.do(Kind.RESCALE, larger, operation, restart=True, graceful_seconds=1)
    assert last.phase is Phase.SUCCEEDED, last
    assert bench.power(spec) is Power.RUNNING
    domain = hypervisor.get(spec.uuid)
    assert hypervisor.maxima(domain)[0] == 8 and hypervisor.last_operation(domain) == operation


def test_one_that_was_off_is_not_started_by_the_second_attempt_of_a_rescale(bench: Bench) -> None:
    spec = bench.launched()
    bench.do(Kind.STOP, spec, graceful_seconds=0)
    operation = str(uuid.uuid4())
    for _ in range(2):
        assert bench.do(Kind.RESCALE, later(spec, vcpus_max=8), operation, restart=True).phase is Phase.SUCCEEDED
    assert bench.power(spec) is Power.STOPPED


def _break(times: int) -> libvirt.libvirtError:
    error = libvirt.libvirtError("")
    # (code, domain, message, ...): what a client gets whose libvirtd was killed.
    error.err = (libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_RPC, "client socket is closed", 2, "", "", "", -1, -1)
    return error


@pytest.mark.parametrize("verb", ["lookupByUUIDString", "metadata"])
def test_a_libvirtd_that_is_back_soon_fails_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    spec = bench.launched()
    owner = libvirt.virConnect if verb.startswith("lookup") else libvirt.virDomain
    original, left = getattr(owner, verb), [2]

    def broken(self: Any, *args: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise _break(left[0])
        return original(self, *args)

    monkeypatch.setattr(owner, verb, broken)
    monkeypatch.setattr("recvirt.nestedcloud.worker.agent._PAUSE_SECONDS", 0.0)
    # Without patience it is told at once, as what it is.
    last = bench.do(Kind.STOP, spec, graceful_seconds=0)
    assert (last.phase, last.fault) == (Phase.FAILED, Fault.HYPERVISOR), last
    left[0] = 2
    bench.agent = dataclasses.replace(bench.agent, patience_seconds=60.0)
    assert bench.do(Kind.STOP, spec, graceful_seconds=0).phase is Phase.SUCCEEDED, bench.reports[-1]
    assert any("waiting: libvirt" in made.message for made in bench.reports)


def test_a_volume_is_not_freed_because_libvirtd_is_away(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt before this one may have given it to the guest."""
    spec, volume = bench.launched(), VolumeSpec(str(uuid.uuid4()), "data", 1, 16 * MIB)

    def away(*_: Any) -> Any:
        raise UnreachableError(Fault.HYPERVISOR, "away")

    monkeypatch.setattr(bench.agent.hypervisor, "find", away)
    last = bench.agent.execute(
        dataclasses.replace(command(Kind.ATTACH, instance=spec, volume=volume), args={"slot": 1}), bench.reports.append
    )
    assert last.phase is Phase.FAILED and "attached" not in last.facts


def test_progress_that_can_t_be_told_stops_nothing_and_a_result_is_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recvirt.nestedcloud.worker.agent._PAUSE_SECONDS", 0.0)
    told: list[Report] = []
    refusals = [3]

    def send(made: Report) -> None:
        if not made.phase.is_final:
            raise ConnectionError("the broker is away")
        if refusals[0]:
            refusals[0] -= 1
            raise ConnectionError("the broker is away")
        told.append(made)

    spec = instance()
    agent = dataclasses.replace(bench.agent, patience_seconds=60.0)
    agent.execute(command(Kind.LAUNCH, instance=spec), send)
    assert [made.phase for made in told] == [Phase.SUCCEEDED] and bench.power(spec) is Power.RUNNING
    # For ever it is not: the lease runs out, and the work is found done.
    refusals[0] = 10**9
    with pytest.raises(ConnectionError):
        bench.agent.execute(command(Kind.START, instance=spec), send)


def test_heartbeats_go_on_after_the_broker_was_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kombu.exceptions import OperationalError as BrokerError

    config = service.Config(
        str(uuid.uuid4()), "w1", str(uuid.uuid4()), f"filesystem:{tmp_path}/queue", "test:///default", "test",
        str(tmp_path / "images"), str(tmp_path / "blocks"), str(tmp_path / "run"), heartbeat_seconds=0.0,
    )  # fmt: skip
    made = service.Service(config)
    tries: list[int] = []

    def heartbeat(*_: Any, **__: Any) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise BrokerError("[Errno 111] Connection refused")
        made._stopping.set()

    monkeypatch.setattr(made.sender, "heartbeat", heartbeat)
    made.beat()
    assert len(tries) == 3


@pytest.mark.parametrize(("broker", "word"), [("filesystem:", "expires"), ("amqp://127.0.0.1//", "expiration")])
def test_a_command_does_not_outlive_its_lease(tmp_path: Path, broker: str, word: str) -> None:
    """On another host the clock may be another one, so there the broker measures."""
    broker = f"{broker}{tmp_path}" if broker == "filesystem:" else broker
    options: dict[str, Any] = {}
    sender = Sender(broker)
    sender._app.send_task = lambda *_, **given: options.update(given)
    sender.command(str(uuid.uuid4()), command(Kind.START, instance=instance()))
    assert options[word] == COMMAND_SECONDS and dispatcher._LEASE_MAX_SECONDS <= COMMAND_SECONDS
    assert ("expires" in options) != ("expiration" in options)


# The central node.


def test_a_broker_that_is_away_costs_no_attempt_and_no_lease(cloud: Cloud) -> None:
    operation = operations.launch(cloud.project, cloud.user, _wish(cloud))

    def away(*_: Any) -> None:
        raise ConnectionError("away")

    for _ in range(reports.ATTEMPTS_MAX + 2):
        with pytest.raises(ConnectionError):
            dispatcher.tick(away)
    operation.refresh_from_db()
    assert (operation.phase, operation.attempt, operation.lease_until) == ("queued", 0, None)
    assert [made.attempt for _, made in sent()] == [1]


def _wish(cloud: Cloud) -> dict[str, Any]:
    from tests.cloud.test_operations import wish

    return wish(cloud)


def _give_up(operation: Operation) -> None:
    Operation.objects.filter(pk=operation.pk).update(
        attempt=reports.ATTEMPTS_MAX, phase="sent", lease_until=timezone.now() - timedelta(seconds=1)
    )
    assert dispatcher.tick(lambda *_: None) >= 1
    operation.refresh_from_db()
    assert (operation.phase, operation.fault) == ("failed", "timed-out")


def test_what_was_given_up_gives_its_promises_back_and_may_yet_succeed(cloud: Cloud) -> None:
    made = launched(cloud)
    changes = {"changes": {"vcpus_max": 8}}
    operation = operations.request(made, cloud.user, Kind.RESCALE, changes)
    made.refresh_from_db()
    assert made.promised_vcpus == 8
    _give_up(operation)
    made.refresh_from_db()
    assert (made.promised_vcpus, made.vcpus_max) == (4, 4)
    done: dict[str, Any] = {"attempt": 3, "facts": {"domain": _domain(made, 2)}}
    assert reports.apply(report(operation, **done))
    made.refresh_from_db()
    operation.refresh_from_db()
    assert (made.promised_vcpus, made.vcpus_max, operation.phase) == (8, 8, "succeeded")
    # Once it has, it has.
    assert not reports.apply(report(operation, **done))


def test_a_late_success_does_not_count_when_something_else_was_asked_for_since(cloud: Cloud) -> None:
    made = launched(cloud)
    operation = operations.request(made, cloud.user, Kind.RESCALE, {"changes": {"vcpus_max": 8}})
    _give_up(operation)
    operations.request(made, cloud.user, Kind.STOP, {})
    assert not reports.apply(report(operation, attempt=3, facts={"domain": _domain(made, 2)}))
    made.refresh_from_db()
    assert made.vcpus_max == 4


def test_a_failure_that_a_worker_told_stays_one(cloud: Cloud) -> None:
    made = launched(cloud)
    operation = operations.request(made, cloud.user, Kind.STOP, {})
    sent()
    operation.refresh_from_db()
    assert reports.apply(report(operation, Phase.FAILED, fault=Fault.TIMED_OUT))
    assert not reports.apply(report(operation))


def _domain(made: Any, generation: int, power: Power = Power.RUNNING) -> Any:
    from recvirt.nestedcloud.model import encode

    return encode(facts(str(made.pk), power, generation))


def test_an_instance_that_was_busy_when_its_host_went_down_is_started_again(cloud: Cloud) -> None:
    made = launched(cloud)
    reports.heard(beat(cloud, facts(str(made.pk))))
    operation = operations.request(made, cloud.user, Kind.SNAPSHOT, {"snapshot": "a"})
    down = facts(str(made.pk), Power.STOPPED)
    reports.heard(beat(cloud, down, boot_id="boot-2"))
    finish(operation, Power.STOPPED, snapshots=["a"])
    type(made).objects.update(power_seen=timezone.now() - timedelta(hours=1))
    reports.heard(beat(cloud, down, boot_id="boot-2"))
    ((_, again),) = sent()
    assert again.kind is Kind.START
    finish(Operation.objects.get(pk=again.operation))
    type(made).objects.update(power_seen=timezone.now() - timedelta(hours=1))
    # And once only: what goes off by itself later is off.
    reports.heard(beat(cloud, facts(str(made.pk)), boot_id="boot-2"))
    reports.heard(beat(cloud, down, boot_id="boot-2"))
    made.refresh_from_db()
    assert made.state == "off" and sent() == []


def test_an_instance_that_could_not_be_started_again_is_off(cloud: Cloud) -> None:
    made = launched(cloud)
    reports.heard(beat(cloud, facts(str(made.pk))))
    type(made).objects.update(power_seen=timezone.now() - timedelta(hours=1))
    down = facts(str(made.pk), Power.STOPPED)
    reports.heard(beat(cloud, down, boot_id="boot-2"))
    ((_, again),) = sent()
    operation = Operation.objects.get(pk=again.operation)
    assert reports.apply(report(operation, Phase.FAILED, fault=Fault.NO_SPACE))
    type(made).objects.update(power_seen=timezone.now() - timedelta(hours=1))
    reports.heard(beat(cloud, down, boot_id="boot-2"))
    made.refresh_from_db()
    assert (made.state, made.power) == ("off", "stopped")


def test_a_heartbeat_does_not_undo_what_an_administrator_has_just_said(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = launched(cloud)
    original = reports._compare

    def meanwhile(*args: Any) -> bool:
        Worker.objects.update(draining=True, revoked=True)
        return original(*args)

    monkeypatch.setattr(reports, "_compare", meanwhile)
    reports.heard(beat(cloud, facts(str(made.pk)), vcpus=3))
    worker = Worker.objects.get()
    assert worker.draining and worker.revoked and worker.vcpus == 3


def test_a_report_waits_for_the_database(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = operations.launch(cloud.project, cloud.user, _wish(cloud))
    sent()
    operation.refresh_from_db()
    original, away = reports.apply, [3]

    def apply(made: Report) -> bool:
        if away[0]:
            away[0] -= 1
            raise OperationalError("the database system is shutting down")
        return original(made)

    monkeypatch.setattr(reports, "apply", apply)
    monkeypatch.setattr(consumer, "_PAUSE_SECONDS", 0.0)
    # The test's transaction must not end with the connection.
    monkeypatch.setattr(consumer, "close_old_connections", lambda: None)
    consumer.write_down(report(operation, Phase.RUNNING, progress=7))
    operation.refresh_from_db()
    assert operation.progress == 7 and away == [0]


@pytest.mark.parametrize(
    ("path", "make"),
    [("instances/web", "instance"), ("volumes/data", "volume"), ("images/up", "image")],
)
def test_a_delete_that_is_asked_for_again_after_its_end_is_answered_alike(cloud: Cloud, path: str, make: str) -> None:
    """Its first answer was lost with the API."""
    from recvirt.nestedcloud.central.models import Image, ImageState, Volume, VolumeState

    if make == "instance":
        launched(cloud)
    elif make == "volume":
        Volume.objects.create(
            project=cloud.project, worker=cloud.worker, name="data", state=VolumeState.READY, size_bytes=GIB,
            promised_bytes=GIB,
        )  # fmt: skip
    else:
        Image.objects.create(project=cloud.project, name="up", state=ImageState.READY, worker=cloud.worker)
    key: dict[str, Any] = {"HTTP_IDEMPOTENCY_KEY": "one"}
    first = cloud.client.delete(cloud.url(path), **key)
    assert first.status_code == 202, first.json()
    sent()
    operation = Operation.objects.get(pk=first.json()["uuid"])
    assert reports.apply(report(operation, facts={"domain": None}))
    again = cloud.client.delete(cloud.url(path), **key)
    assert (again.status_code, again.json().get("uuid")) == (202, first.json()["uuid"])
    assert again.json()["phase"] == "succeeded"
    # Another request, or another thing.
    assert cloud.client.delete(cloud.url(path), HTTP_IDEMPOTENCY_KEY="two").status_code == 404
    assert cloud.client.delete(cloud.url(f"{path}x"), **key).status_code == 404
    assert cloud.client.delete(cloud.url(path)).status_code == 404


def test_room_is_reserved_once_for_one_key(cloud: Cloud) -> None:
    body = {"begins": "2020-01-01T00:00:00Z", "vcpus": 1, "memory_bytes": 64 * MIB, "disk_bytes": MIB}

    def ask(key: str | None, **changes: Any) -> Any:
        words: dict[str, Any] = {"HTTP_IDEMPOTENCY_KEY": key} if key else {}
        return cloud.client.post(cloud.url("reservations"), {**body, **changes}, format="json", **words)

    answers = [ask("one"), ask("one"), ask("two"), ask(None), ask(None)]
    assert [answer.status_code for answer in answers] == [201] * 5, answers[0].json()
    assert answers[0].json() == answers[1].json() and Reservation.objects.count() == 4
    assert ask("one", vcpus=2).json()["type"] == "idempotency-key-reused"


def test_a_schedule_that_is_asked_for_again_is_the_same_one(cloud: Cloud) -> None:
    launched(cloud)
    body = {"name": "nightly", "kind": "stop", "instance": "web", "begins": "2036-01-01T00:00:00Z"}

    def ask(key: str, **changes: Any) -> Any:
        words: dict[str, Any] = {"HTTP_IDEMPOTENCY_KEY": key}
        return cloud.client.post(cloud.url("schedules"), {**body, **changes}, format="json", **words)

    first, again = ask("one"), ask("one")
    assert (first.status_code, again.status_code) == (201, 201), again.json()
    assert first.json() == again.json() and Schedule.objects.count() == 1
    # It may be over by the time that it is asked for again.
    Schedule.objects.update(begins="2020-01-01T00:00:00Z")
    assert ask("one", begins="2020-01-01T00:00:00Z").status_code == 201
    assert ask("one", name="other").json()["type"] == "idempotency-key-reused"
    assert ask("two").status_code != 201
