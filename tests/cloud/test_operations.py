"""From a request to an instance that is: dispatching, reports, leases, and what may not be done at once."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from recvirt.nestedcloud.central import dispatcher, operations, reports
from recvirt.nestedcloud.central.models import Event, Instance, Operation, Worker
from recvirt.nestedcloud.central.problems import (
    KeyReused,
    NoCapacity,
    OperationActive,
    QuotaExceeded,
    Refused,
    WrongState,
)
from recvirt.nestedcloud.model import (
    GIB,
    MIB,
    Command,
    DomainFacts,
    Fault,
    Heartbeat,
    Kind,
    Phase,
    Power,
    Report,
    encode,
)
from tests.cloud.conftest import Cloud, make_worker


def wish(cloud: Cloud, **changes: Any) -> dict[str, Any]:
    values = {
        "name": "web", "image": cloud.image, "networks": [operations.default_network(cloud.project)], "vcpus": 1,
        "vcpus_max": 4, "memory_bytes": 512 * MIB, "memory_max_bytes": GIB, "disk_bytes": GIB, "priority": 50,
        "nest": False, "ssh_keys": [], "user_data": "",
    }  # fmt: skip
    return {**values, **changes}


def launched(cloud: Cloud, **changes: Any) -> Instance:
    """An instance that runs."""
    operation = operations.launch(cloud.project, cloud.user, wish(cloud, **changes))
    finish(operation)
    assert operation.instance is not None
    operation.instance.refresh_from_db()
    return operation.instance


def sent() -> list[tuple[str, Command]]:
    """What a dispatcher publishes now."""
    found: list[tuple[str, Command]] = []
    dispatcher.tick(lambda worker, command: found.append((worker, command)))
    return found


def facts(instance_uuid: str, power: Power = Power.RUNNING, generation: int = 1) -> DomainFacts:
    return DomainFacts(instance_uuid, power, generation, 1, GIB)


def report(operation: Operation, phase: Phase = Phase.SUCCEEDED, **values: Any) -> Report:
    given = {"attempt": operation.attempt, "worker": str(operation.worker_id), **values}
    return Report(operation=str(operation.uuid), phase=phase, **given)


def finish(operation: Operation, power: Power = Power.RUNNING, **more: Any) -> None:
    """What a worker that carried it out would have reported."""
    sent()
    operation.refresh_from_db()
    domain = encode(facts(str(operation.instance_id), power))
    assert reports.apply(report(operation, facts={"domain": domain, **more}))


def beat(cloud: Cloud, *domains: DomainFacts, boot_id: str = "boot-1", **values: Any) -> Heartbeat:
    given: dict[str, Any] = {
        "worker": str(cloud.worker.uuid), "name": "w1", "boot_id": boot_id, "vcpus": 8, "memory_bytes": 16 * GIB,
        "disk_bytes": 100 * GIB, "features": {}, "domains": tuple(domains),
    }  # fmt: skip
    return Heartbeat(**{**given, **values})


def settle(instance: Instance) -> None:
    """As if its last operation had ended a while ago."""
    Instance.objects.filter(pk=instance.pk).update(power_seen=timezone.now() - timedelta(hours=1))


def test_a_launch_is_told_to_the_worker_with_everything_it_needs(cloud: Cloud) -> None:
    operation = operations.launch(cloud.project, cloud.user, wish(cloud, user_data="#!/bin/sh\n"))
    ((worker, command),) = sent()
    assert worker == str(cloud.worker.uuid)
    assert command.kind is Kind.LAUNCH and command.attempt == 1 and command.operation == str(operation.uuid)
    assert command.instance is not None
    assert command.instance.user_data == "#!/bin/sh\n" and command.instance.root.image == str(cloud.image.uuid)
    (network,) = command.args["networks"]
    assert command.instance.nics[0].network == network["uuid"] and network["cidr"] == "172.30.0.0/24"


def test_a_launch_that_succeeded_is_on(cloud: Cloud) -> None:
    instance = launched(cloud)
    assert (instance.state, instance.power) == ("on", "running")
    operation = instance.operations.get()
    assert (operation.phase, operation.lease_until) == ("succeeded", None) and operation.finished is not None


def test_nothing_is_sent_twice_while_its_lease_runs(cloud: Cloud) -> None:
    operations.launch(cloud.project, cloud.user, wish(cloud))
    assert len(sent()) == 1 and sent() == []


def test_what_nobody_answers_is_sent_again_and_given_up_in_the_end(cloud: Cloud) -> None:
    operation = operations.launch(cloud.project, cloud.user, wish(cloud))
    for attempt in range(1, reports.ATTEMPTS_MAX + 1):
        ((_, command),) = sent()
        assert command.attempt == attempt
        Operation.objects.update(lease_until=timezone.now() - timedelta(seconds=1))
    assert sent() == []
    operation.refresh_from_db()
    assert (operation.phase, operation.fault) == ("failed", "timed-out")
    assert operation.instance is not None and operation.instance.state == "failed"


def test_a_report_that_comes_late_still_counts_if_it_is_of_success(cloud: Cloud) -> None:
    operation = operations.launch(cloud.project, cloud.user, wish(cloud))
    sent()
    Operation.objects.update(lease_until=timezone.now() - timedelta(seconds=1))
    sent()
    operation.refresh_from_db()
    assert operation.attempt == 2
    late = {"attempt": 1, "fault": Fault.STORAGE}
    assert not reports.apply(report(operation, Phase.FAILED, **late))
    assert not reports.apply(report(operation, Phase.RUNNING, attempt=1))
    assert reports.apply(report(operation, attempt=1, facts={"domain": encode(facts(str(operation.instance_id)))}))


def test_a_report_counts_once_and_only_from_who_was_asked(cloud: Cloud) -> None:
    operation = operations.launch(cloud.project, cloud.user, wish(cloud))
    sent()
    operation.refresh_from_db()
    other = make_worker("w2")
    assert not reports.apply(report(operation, worker=str(other.uuid)))
    assert reports.apply(report(operation, facts={"domain": encode(facts(str(operation.instance_id)))}))
    assert not reports.apply(report(operation, Phase.FAILED, fault=Fault.INTERNAL))
    operation.refresh_from_db()
    assert operation.phase == "succeeded"


def test_progress_holds_the_lease(cloud: Cloud) -> None:
    operation = operations.launch(cloud.project, cloud.user, wish(cloud))
    sent()
    Operation.objects.update(lease_until=timezone.now() - timedelta(seconds=1))
    operation.refresh_from_db()
    assert reports.apply(report(operation, Phase.RUNNING, progress=40, message="copying"))
    assert sent() == []
    operation.refresh_from_db()
    assert (operation.progress, operation.message) == (40, "copying")


def test_one_key_is_one_operation(cloud: Cloud) -> None:
    one = operations.launch(cloud.project, cloud.user, wish(cloud), "k1")
    again = operations.launch(cloud.project, cloud.user, wish(cloud), "k1")
    assert one.pk == again.pk and Instance.objects.count() == 1
    with pytest.raises(KeyReused):
        operations.launch(cloud.project, cloud.user, wish(cloud, name="other"), "k1")


def test_a_busy_instance_names_what_is_being_done_to_it(cloud: Cloud) -> None:
    instance = launched(cloud)
    first = operations.request(instance, cloud.user, Kind.STOP, {})
    with pytest.raises(OperationActive, match="web is busy: stop has been queued") as caught:
        operations.request(instance, cloud.user, Kind.REBOOT, {})
    assert caught.value.extra == {"operation": str(first.uuid)}


@pytest.mark.parametrize("kind", [Kind.START, Kind.RESUME])
def test_what_makes_no_sense_now_is_refused(cloud: Cloud, kind: Kind) -> None:
    with pytest.raises(WrongState, match=f"{kind} is not for an instance that is on"):
        operations.request(launched(cloud), cloud.user, kind, {})


def test_stopping_and_deleting(cloud: Cloud) -> None:
    instance = launched(cloud)
    finish(operations.request(instance, cloud.user, Kind.STOP, {}), Power.STOPPED)
    instance.refresh_from_db()
    assert instance.state == "off"
    finish(operations.request(instance, cloud.user, Kind.DELETE, {}))
    instance.refresh_from_db()
    assert (instance.state, instance.power) == ("deleted", "absent")
    # Its name is free again.
    launched(cloud)


def test_a_name_is_taken_once_a_project(cloud: Cloud) -> None:
    launched(cloud)
    with pytest.raises(Refused, match="there is an instance called web"):
        operations.launch(cloud.project, cloud.user, wish(cloud))


def test_quotas_count_what_was_promised(cloud: Cloud) -> None:
    cloud.project.vcpus_max = 6
    cloud.project.save()
    launched(cloud)
    with pytest.raises(QuotaExceeded, match="the quota of vcpus is 6: 4 are used, 4 more are wanted"):
        operations.launch(cloud.project, cloud.user, wish(cloud, name="two"))
    launched(cloud, name="two", vcpus_max=2)


def test_a_worker_is_never_promised_more_memory_than_it_has(cloud: Cloud) -> None:
    big = {"memory_bytes": 8 * GIB, "memory_max_bytes": 8 * GIB}
    launched(cloud, **big)
    with pytest.raises(NoCapacity, match=r"w1: .* bytes of memory too few"):
        operations.launch(cloud.project, cloud.user, wish(cloud, name="two", **big))
    make_worker("w2")
    assert launched(cloud, name="two", **big).worker == Worker.objects.get(name="w2")


@pytest.mark.parametrize("change", [{"draining": True}, {"revoked": True}, {"last_seen": None}])
def test_a_worker_that_is_not_to_be_used_gets_nothing(cloud: Cloud, change: dict[str, Any]) -> None:
    Worker.objects.update(**change)
    with pytest.raises(NoCapacity):
        operations.launch(cloud.project, cloud.user, wish(cloud))


def test_rescaling_takes_effect_when_it_is_done_and_is_promised_before(cloud: Cloud) -> None:
    instance = launched(cloud)
    operation = operations.request(instance, cloud.user, Kind.RESCALE, {"changes": {"vcpus_max": 8}, "restart": True})
    instance.refresh_from_db()
    assert (instance.vcpus_max, instance.promised_vcpus) == (4, 8)
    finish(operation)
    instance.refresh_from_db()
    assert (instance.vcpus_max, instance.promised_vcpus) == (8, 8)


def test_a_rescaling_that_failed_promises_nothing_any_more(cloud: Cloud) -> None:
    instance = launched(cloud)
    operation = operations.request(instance, cloud.user, Kind.RESCALE, {"changes": {"vcpus_max": 8}})
    sent()
    operation.refresh_from_db()
    reports.apply(report(operation, Phase.FAILED, fault=Fault.RESTART_NEEDED, message="only by a restart"))
    instance.refresh_from_db()
    assert (instance.vcpus_max, instance.promised_vcpus, instance.state) == (4, 4, "on")


@pytest.mark.parametrize("changes", [{"vcpus": 5}, {"disk_bytes": MIB}, {"memory_bytes": 2 * GIB}])
def test_a_size_that_can_t_be_is_refused(cloud: Cloud, changes: dict[str, int]) -> None:
    with pytest.raises(Refused):
        operations.request(launched(cloud), cloud.user, Kind.RESCALE, {"changes": changes})


def test_snapshots_are_known_by_name(cloud: Cloud) -> None:
    instance = launched(cloud)
    finish(operations.request(instance, cloud.user, Kind.SNAPSHOT, {"snapshot": "a"}), snapshots=["a"])
    with pytest.raises(Refused, match="there is a snapshot called a"):
        operations.request(instance, cloud.user, Kind.SNAPSHOT, {"snapshot": "a"})
    with pytest.raises(Refused, match="there is no snapshot called b"):
        operations.request(instance, cloud.user, Kind.REVERT, {"snapshot": "b"})


def test_a_guest_that_powered_off_by_itself_is_off(cloud: Cloud) -> None:
    instance = launched(cloud)
    reports.heard(beat(cloud, facts(str(instance.uuid))))
    settle(instance)
    reports.heard(beat(cloud, facts(str(instance.uuid), Power.STOPPED)))
    instance.refresh_from_db()
    assert (instance.state, instance.power) == ("off", "stopped")
    assert Event.objects.filter(kind="instance.power", subject=instance.uuid).count() == 1
    assert sent() == []


def test_what_ran_when_its_host_went_down_is_started_again(cloud: Cloud) -> None:
    on, off = launched(cloud), launched(cloud, name="off")
    finish(operations.request(off, cloud.user, Kind.STOP, {}), Power.STOPPED)
    reports.heard(beat(cloud, facts(str(on.uuid)), facts(str(off.uuid), Power.STOPPED)))
    for instance in (on, off):
        settle(instance)
    down = [facts(str(instance.uuid), Power.STOPPED) for instance in (on, off)]
    reports.heard(beat(cloud, *down, boot_id="boot-2"))
    ((_, command),) = sent()
    assert command.kind is Kind.START and command.instance is not None and command.instance.uuid == str(on.uuid)
    # Heard again: nothing more.
    reports.heard(beat(cloud, *down, boot_id="boot-2"))
    assert sent() == []


def test_a_heartbeat_does_not_overrule_an_operation_at_work(cloud: Cloud) -> None:
    instance = launched(cloud)
    settle(instance)
    operations.request(instance, cloud.user, Kind.STOP, {})
    reports.heard(beat(cloud, facts(str(instance.uuid), Power.STOPPED)))
    instance.refresh_from_db()
    assert instance.state == "on"


def test_an_older_heartbeat_does_not_overrule_an_operation_that_just_ended(cloud: Cloud) -> None:
    instance = launched(cloud)
    reports.heard(beat(cloud))
    instance.refresh_from_db()
    assert instance.state == "on"


def test_a_domain_that_nobody_knows_is_told_and_not_touched(cloud: Cloud) -> None:
    stranger = "00000000-0000-4000-8000-00000000abcd"
    assert reports.heard(beat(cloud, facts(stranger))) == [stranger]
    assert sent() == []


def test_a_revoked_worker_is_not_heard(cloud: Cloud) -> None:
    Worker.objects.update(revoked=True, last_seen=None)
    assert reports.heard(beat(cloud, facts("00000000-0000-4000-8000-00000000abcd"))) == []
    cloud.worker.refresh_from_db()
    assert cloud.worker.last_seen is None
