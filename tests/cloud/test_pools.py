"""Volumes in a folder that workers share: who may have one, who is asked, and that never two have it."""

from __future__ import annotations

import json
import uuid
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.utils import timezone

from recvirt.nestedcloud import spool
from recvirt.nestedcloud.central import operations, pools, reports, volumes
from recvirt.nestedcloud.central.models import Instance, Operation, Volume, Worker
from recvirt.nestedcloud.central.problems import NoCapacity, Refused, WorkerRevoked
from recvirt.nestedcloud.model import GIB, Kind, Phase, Power, encode
from recvirt.nestedcloud.worker.host import Host
from recvirt.nestedcloud.worker.places import Places
from tests.cloud.conftest import Cloud, make_worker
from tests.cloud.test_operations import beat, facts, finish, launched, report, sent
from tests.cloud.test_storage_operations import allocated, attached, end, wish

POOL, OTHER = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))


def lost(worker: Worker) -> None:
    Worker.objects.filter(pk=worker.pk).update(last_seen=timezone.now() - timedelta(hours=3))
    worker.refresh_from_db()


def revoked(worker: Worker) -> None:
    Worker.objects.filter(pk=worker.pk).update(revoked=True)
    worker.refresh_from_db()


def shut_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *workers: Worker) -> None:
    """As root tells when it has done it."""
    (tmp_path / "shut-out.json").write_text(json.dumps([str(worker.pk) for worker in workers]))
    config = SimpleNamespace(shut_out_path=tmp_path / "shut-out.json")
    monkeypatch.setattr(pools, "settings", SimpleNamespace(CONFIG=config))


def given_up() -> None:
    """As if nobody had answered the newest operation."""
    newest = Operation.objects.order_by("-created")[0]
    Operation.objects.filter(pk=newest.pk).update(attempt=reports.ATTEMPTS_MAX, phase=Phase.SENT.value,
                                                  lease_until=timezone.now() - timedelta(seconds=1))  # fmt: skip
    assert sent() == []
    newest.refresh_from_db()
    assert newest.fault == "timed-out"


def detached(cloud: Cloud, volume: Volume) -> Operation:
    volume.refresh_from_db()
    return volumes.request(volume, cloud.user, Kind.DETACH, {})


@pytest.fixture
def second(cloud: Cloud) -> Worker:
    """Another worker, which has its disks where the first one has them."""
    Worker.objects.update(pool=POOL)
    cloud.worker.refresh_from_db()
    return make_worker("w2", pool=POOL, memory_bytes=8 * GIB)


@pytest.fixture
def far(cloud: Cloud, second: Worker) -> Instance:
    """An instance on the second one."""
    instance = launched(cloud, name="far")
    Instance.objects.filter(pk=instance.pk).update(worker=second)
    instance.refresh_from_db()
    return instance


def used(cloud: Cloud, volume: Volume, instance: Instance) -> None:
    """The volume is attached to the instance, and the worker has said so."""
    operation = volumes.attach(volume, instance, cloud.user)
    told = sent()
    assert [worker for worker, _ in told] == [str(instance.worker_id)]
    operation.refresh_from_db()
    found = {"domain": encode(facts(str(instance.uuid), generation=99)), "attached": True}
    assert reports.apply(report(operation, facts=found))
    volume.refresh_from_db()
    instance.refresh_from_db()


def test_what_a_worker_says_of_its_folder_is_kept(cloud: Cloud) -> None:
    volume = allocated(cloud)
    assert volume.pool == ""
    reports.heard(beat(cloud, features={"pool": POOL}))
    cloud.worker.refresh_from_db()
    volume.refresh_from_db()
    assert cloud.worker.pool == volume.pool == POOL
    assert cloud.client.get("/api/v1/workers/w1").data["pool"] == POOL
    assert cloud.client.get(cloud.url("volumes/data")).data["pool"] == POOL
    # What it has now is another folder; the volume stays where it was made.
    reports.heard(beat(cloud, features={"pool": OTHER}))
    cloud.worker.refresh_from_db()
    volume.refresh_from_db()
    assert (cloud.worker.pool, volume.pool) == (OTHER, POOL)
    for odd in ("../x", 7, "A" * 99):
        reports.heard(beat(cloud, features={"pool": odd}))
        cloud.worker.refresh_from_db()
        assert cloud.worker.pool == ""


def test_a_volume_goes_to_an_instance_on_another_worker_of_the_pool(cloud: Cloud, far: Instance) -> None:
    volume = allocated(cloud, on=cloud.worker)
    assert volume.worker == cloud.worker
    used(cloud, volume, far)
    assert (volume.worker, volume.instance) == (far.worker, far)


def test_a_volume_of_another_pool_is_refused_with_who_has_it(cloud: Cloud, second: Worker) -> None:
    third, fourth = make_worker("w3", pool=OTHER), make_worker("w4", pool=OTHER)
    instance = launched(cloud)
    Instance.objects.filter(pk=instance.pk).update(worker=second)
    volume = allocated(cloud, on=third)
    with pytest.raises(Refused, match=r"web is on w2, which can't reach data; these can: w3, w4"):
        volumes.attach(volume, instance, cloud.user)
    revoked(fourth)
    with pytest.raises(Refused, match=r"these can: w3$"):
        volumes.attach(volume, instance, cloud.user)


def test_workers_that_do_not_say_share_nothing(cloud: Cloud) -> None:
    instance = launched(cloud)
    volume = allocated(cloud, on=make_worker("w2"))
    with pytest.raises(Refused, match="can't reach data"):
        volumes.attach(volume, instance, cloud.user)


def test_the_worker_that_had_it_last_is_asked_and_another_one_while_that_is_away(cloud: Cloud, second: Worker) -> None:
    volume = allocated(cloud, on=cloud.worker)
    operation = volumes.request(volume, cloud.user, Kind.VOLUME_SNAPSHOT, {"snapshot": "one"})
    assert operation.worker == cloud.worker
    end(operation)
    lost(cloud.worker)
    operation = volumes.request(volume, cloud.user, Kind.VOLUME_RESIZE, {"size_bytes": 2 * GIB})
    volume.refresh_from_db()
    assert operation.worker == volume.worker == second


def test_of_a_volume_with_an_open_question_only_the_one_who_was_asked_is_asked_again(
    cloud: Cloud, far: Instance
) -> None:
    volume = allocated(cloud, on=cloud.worker, format="qcow2")
    volumes.request(volume, cloud.user, Kind.VOLUME_SNAPSHOT, {"snapshot": "one"})
    given_up()
    lost(cloud.worker)
    # It may still be at it.
    assert volumes.request(volume, cloud.user, Kind.VOLUME_SNAPSHOT, {"snapshot": "one"}).worker == cloud.worker
    given_up()
    with pytest.raises(Refused, match="w1 has not answered what was asked of data last"):
        volumes.attach(volume, far, cloud.user)


def test_a_lost_worker_s_volume_is_free_when_its_instance_was_off(cloud: Cloud, far: Instance) -> None:
    instance = launched(cloud)
    volume = allocated(cloud, on=cloud.worker)
    attached(cloud, volume, instance)
    finish(operations.request(instance, cloud.user, Kind.STOP, {}), Power.STOPPED)
    lost(cloud.worker)
    operation = detached(cloud, volume)
    assert operation.phase == "succeeded" and "w1 is away and web was off" in operation.message and sent() == []
    instance.refresh_from_db()
    volume.refresh_from_db()
    assert (instance.state, instance.power, volume.instance) == ("off", "stopped", None)
    used(cloud, volume, far)
    # What is started there when it is back is described without the volume.
    Worker.objects.filter(pk=cloud.worker.pk).update(last_seen=timezone.now())
    operations.request(instance, cloud.user, Kind.START, {})
    ((_, command),) = sent()
    assert command.instance is not None and command.instance.volumes == ()


def test_a_lost_worker_s_volume_is_not_free_while_its_instance_may_run(cloud: Cloud, far: Instance) -> None:
    instance = launched(cloud)
    volume = allocated(cloud, on=cloud.worker)
    attached(cloud, volume, instance)
    lost(cloud.worker)
    # It ran when it was last heard of: its worker has to be asked.
    operation = detached(cloud, volume)
    assert (operation.phase, operation.worker) == ("queued", cloud.worker)
    given_up()
    with pytest.raises(Refused, match="attached to web"):
        volumes.attach(volume, far, cloud.user)


def test_a_start_that_nobody_answered_may_have_been_carried_out(cloud: Cloud, far: Instance) -> None:
    instance = launched(cloud)
    volume = allocated(cloud, on=cloud.worker)
    attached(cloud, volume, instance)
    finish(operations.request(instance, cloud.user, Kind.STOP, {}), Power.STOPPED)
    operations.request(instance, cloud.user, Kind.START, {})
    given_up()
    lost(cloud.worker)
    instance.refresh_from_db()
    assert instance.state == "off"
    assert detached(cloud, volume).phase == "queued"


def test_a_revoked_worker_s_volume_is_free_once_it_is_shut_out(
    cloud: Cloud, far: Instance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    instance = launched(cloud)
    volume = allocated(cloud, on=cloud.worker)
    attached(cloud, volume, instance)
    revoked(cloud.worker)
    assert detached(cloud, volume).phase == "succeeded"
    instance.refresh_from_db()
    volume.refresh_from_db()
    assert (instance.state, volume.instance) == ("on", None)
    # The guest there runs on, and reaches the volume until root has closed the tunnel.
    with pytest.raises(Refused, match="not shut out of the tunnel yet"):
        volumes.attach(volume, far, cloud.user)
    with pytest.raises(Refused, match="not shut out of the tunnel yet"):
        volumes.request(volume, cloud.user, Kind.VOLUME_RESIZE, {"size_bytes": 2 * GIB})
    shut_out(monkeypatch, tmp_path, cloud.worker)
    used(cloud, volume, far)


def test_deleting_an_instance_on_a_revoked_worker_frees_no_volume_before_that(cloud: Cloud, far: Instance) -> None:
    instance = launched(cloud)
    volume = allocated(cloud, on=cloud.worker)
    attached(cloud, volume, instance)
    revoked(cloud.worker)
    operations.request(instance, cloud.user, Kind.DELETE, {})
    volume.refresh_from_db()
    assert volume.instance is None
    with pytest.raises(Refused, match="not shut out"):
        volumes.attach(volume, far, cloud.user)


def test_who_is_named_as_shut_out_and_is_not_revoked_is_not(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shut_out(monkeypatch, tmp_path, cloud.worker)
    assert not pools.is_shut_out(cloud.worker)
    for text in ("{", "{}", '["x"]'):
        (tmp_path / "shut-out.json").write_text(text)
        revoked(cloud.worker)
        assert not pools.is_shut_out(cloud.worker)


def test_a_volume_on_a_revoked_worker_s_own_disk_stays_out_of_reach(cloud: Cloud) -> None:
    instance = launched(cloud)
    volume = allocated(cloud)
    attached(cloud, volume, instance)
    revoked(cloud.worker)
    with pytest.raises(WorkerRevoked):
        detached(cloud, volume)


def test_room_in_a_shared_folder_is_promised_once(cloud: Cloud, second: Worker) -> None:
    allocated(cloud, on=cloud.worker)
    Worker.objects.update(disk_bytes=3 * GIB)
    allocated(cloud, name="two", on=second)
    with pytest.raises(NoCapacity, match=f"w2 has no room: {GIB} bytes of disk too few"):
        volumes.allocate(cloud.project, cloud.user, wish(name="three", size_bytes=2 * GIB, on=second))
    Worker.objects.filter(pk=second.pk).update(pool=OTHER)
    allocated(cloud, name="three", on=second)


def test_a_worker_is_named_in_the_api(cloud: Cloud, second: Worker) -> None:
    body: dict[str, Any] = {"name": "data", "size_bytes": GIB, "on": "w2"}
    made = cloud.client.post(cloud.url("volumes"), body, format="json")
    assert made.status_code == 202 and Volume.objects.get().worker == second
    body = {"name": "more", "size_bytes": GIB}
    assert cloud.client.post(cloud.url("volumes"), {**body, "on": "w9"}, format="json").status_code == 400
    launched(cloud)
    both = cloud.client.post(cloud.url("volumes"), {**body, "on": "w2", "near": "web"}, format="json")
    assert both.status_code == 400
    revoked(second)
    assert cloud.client.post(cloud.url("volumes"), {**body, "on": "w2"}, format="json").status_code == 400


def test_a_worker_tells_which_folders_it_has(tmp_path: Path) -> None:
    one, two = (Host("o", "test", tmp_path, tmp_path / "blocks", spool_dir=tmp_path / name) for name in ("a", "b"))
    first, second = Places().identities(one), Places().identities(two)
    assert first["pool"] == second["pool"] and first["spool"] != second["spool"]
    assert second["spool"] == spool.identity(tmp_path / "b")
    # What is mounted in its place is noticed.
    (tmp_path / "blocks/identity").write_text(POOL)
    assert Places().identities(one)["pool"] == POOL


def test_a_worker_without_uploads_is_one_and_looks_again_after_a_while(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("no folder")
    clock = [0.0]
    host = Host("o", "test", tmp_path, tmp_path / "blocks", spool_dir=tmp_path / "spool")
    places = Places(lambda: clock[0])
    assert list(places.identities(host)) == ["pool"]
    (tmp_path / "spool").unlink()
    assert list(places.identities(host)) == ["pool"]
    clock[0] = 61.0
    assert list(places.identities(host)) == ["pool", "spool"]
