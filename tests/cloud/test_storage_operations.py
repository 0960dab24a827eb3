"""Volumes and images at the central node: what is promised, what is refused by name, and how operations end."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.utils import timezone

from recvirt.nestedcloud import spool
from recvirt.nestedcloud.central import images, operations, reports, volumes
from recvirt.nestedcloud.central.models import Image, Instance, Operation, Peer, Project, Volume, Worker
from recvirt.nestedcloud.central.problems import NoCapacity, OperationActive, QuotaExceeded, Refused, WrongState
from recvirt.nestedcloud.model import GIB, MIB, Command, Fault, Kind, Phase, Power, encode
from tests.cloud.conftest import Cloud, client_of, make_user, make_worker
from tests.cloud.test_operations import facts, finish, launched, report, sent


def wish(**changes: Any) -> dict[str, Any]:
    return {"name": "data", "size_bytes": GIB, "format": "raw", "filesystem": "ext4", **changes}


def allocated(cloud: Cloud, **changes: Any) -> Volume:
    operation = volumes.allocate(cloud.project, cloud.user, wish(**changes))
    end(operation, size_bytes=GIB)
    assert operation.volume is not None
    operation.volume.refresh_from_db()
    return operation.volume


def end(operation: Operation, phase: Phase = Phase.SUCCEEDED, **found: Any) -> Command:
    """What a worker reports in the end; what it had been told."""
    ((_, command),) = sent()
    operation.refresh_from_db()
    fault = None if phase is Phase.SUCCEEDED else Fault.STORAGE
    assert reports.apply(report(operation, phase, facts=found, fault=fault))
    return command


def attached(cloud: Cloud, volume: Volume, instance: Instance) -> Command:
    operation = volumes.attach(volume, instance, cloud.user)
    command = end(operation, domain=encode(facts(str(instance.uuid))), attached=True)
    volume.refresh_from_db()
    return command


def test_a_volume_is_ready_when_it_was_made(cloud: Cloud) -> None:
    operation = volumes.allocate(cloud.project, cloud.user, wish(filesystem="xfs"))
    command = end(operation, size_bytes=GIB)
    assert command.volume is not None and command.instance is None
    assert (command.volume.filesystem, command.volume.size_bytes, command.volume.name) == ("xfs", GIB, "data")
    assert Volume.objects.get().state == "ready"


def test_one_key_is_one_volume(cloud: Cloud) -> None:
    one, two = (volumes.allocate(cloud.project, cloud.user, wish(), "k") for _ in range(2))
    assert one.pk == two.pk and Volume.objects.count() == 1


@pytest.mark.parametrize(
    "changes", [{"filesystem": "xfs", "size_bytes": 64 * MIB}, {"size_bytes": MIB}, {"size_bytes": GIB + 512}]
)
def test_a_volume_that_can_t_be_is_refused(cloud: Cloud, changes: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        volumes.allocate(cloud.project, cloud.user, wish(**changes))
    assert not Volume.objects.exists() and not Operation.objects.exists()


def test_volumes_and_images_count_in_the_quota_of_disk(cloud: Cloud) -> None:
    Project.objects.update(disk_bytes_max=4 * GIB)
    launched(cloud)
    allocated(cloud)
    with pytest.raises(QuotaExceeded, match=f"the quota of disk_bytes is {4 * GIB}: {2 * GIB} are used"):
        volumes.allocate(cloud.project, cloud.user, wish(name="two", size_bytes=3 * GIB))
    with pytest.raises(QuotaExceeded):
        images.import_url(cloud.project, cloud.user, image_wish(largest_bytes=3 * GIB))
    operation = images.import_url(cloud.project, cloud.user, image_wish(largest_bytes=2 * GIB))
    with pytest.raises(QuotaExceeded):
        volumes.allocate(cloud.project, cloud.user, wish(name="two"))
    # What is there is counted, not what was allowed for.
    end(operation, sha256="a" * 64, virtual_bytes=GIB)
    volumes.allocate(cloud.project, cloud.user, wish(name="two"))


def test_a_volume_goes_where_there_is_room_or_where_its_instance_is(cloud: Cloud) -> None:
    instance = launched(cloud)
    roomy = make_worker("w2", disk_bytes=200 * GIB)
    assert allocated(cloud).worker == roomy
    assert allocated(cloud, name="two", near=instance).worker == cloud.worker
    Worker.objects.update(disk_bytes=GIB)
    with pytest.raises(NoCapacity, match=r"w1: .* bytes of disk too few"):
        volumes.allocate(cloud.project, cloud.user, wish(name="three"))


def test_an_attached_volume_is_part_of_the_instance_from_then_on(cloud: Cloud) -> None:
    instance, volume = launched(cloud), allocated(cloud)
    command = attached(cloud, volume, instance)
    assert command.instance is not None and command.volume is not None and command.args["slot"] == 1
    assert [(disk.uuid, disk.slot) for disk in command.instance.volumes] == [(str(volume.uuid), 1)]
    assert (volume.instance, volume.slot) == (instance, 1)
    finish(operations.request(instance, cloud.user, Kind.STOP, {}), Power.STOPPED)
    operations.request(instance, cloud.user, Kind.START, {})
    ((_, again),) = sent()
    assert again.instance is not None and again.instance.volumes == command.instance.volumes


def test_slots_stay_while_others_come_and_go(cloud: Cloud) -> None:
    instance = launched(cloud)
    one, two, three = (allocated(cloud, name=name) for name in ("one", "two", "three"))
    attached(cloud, one, instance), attached(cloud, two, instance)
    command = end(
        volumes.request(one, cloud.user, Kind.DETACH, {}), domain=encode(facts(str(instance.uuid))), attached=False
    )
    assert command.instance is not None and [disk.slot for disk in command.instance.volumes] == [2]
    attached(cloud, three, instance)
    assert (two.slot, three.slot) == (2, 1)


def test_an_attach_holds_volume_and_instance(cloud: Cloud) -> None:
    instance, volume = launched(cloud), allocated(cloud)
    operation = volumes.attach(volume, instance, cloud.user)
    with pytest.raises(OperationActive, match="web is busy: attach") as caught:
        operations.request(instance, cloud.user, Kind.STOP, {})
    assert caught.value.extra == {"operation": str(operation.uuid)}
    with pytest.raises(OperationActive, match="data is busy: attach"):
        volumes.request(volume, cloud.user, Kind.VOLUME_RESIZE, {"size_bytes": 2 * GIB})


def test_a_volume_has_one_instance(cloud: Cloud) -> None:
    instance, other, volume = launched(cloud), launched(cloud, name="other"), allocated(cloud)
    attached(cloud, volume, instance)
    with pytest.raises(Refused, match="data is attached to web: detach it first"):
        volumes.attach(volume, other, cloud.user)
    with pytest.raises(Refused, match="data is attached to web: detach it first"):
        volumes.request(volume, cloud.user, Kind.VOLUME_REMOVE, {})


@pytest.mark.parametrize(("found", "free"), [({"attached": False}, True), ({}, False)])
def test_after_a_failed_attach_it_is_free_only_if_the_worker_says_so(
    cloud: Cloud, found: dict[str, Any], free: bool
) -> None:
    instance, volume = launched(cloud), allocated(cloud)
    end(volumes.attach(volume, instance, cloud.user), Phase.FAILED, **found)
    volume.refresh_from_db()
    assert (volume.instance is None) is free
    instance.refresh_from_db()
    assert instance.state == "on"


def test_an_attach_that_nobody_answered_keeps_its_volume(cloud: Cloud) -> None:
    instance, volume = launched(cloud), allocated(cloud)
    volumes.attach(volume, instance, cloud.user)
    Operation.objects.filter(finished=None).update(attempt=reports.ATTEMPTS_MAX)
    assert sent() == []
    volume.refresh_from_db()
    assert volume.instance == instance
    operation = volumes.request(volume, cloud.user, Kind.DETACH, {})
    end(operation, domain=encode(facts(str(instance.uuid))), attached=False)
    volume.refresh_from_db()
    assert volume.instance is None


def test_a_volume_on_another_worker_is_not_reached(cloud: Cloud) -> None:
    instance = launched(cloud)
    make_worker("w2", disk_bytes=200 * GIB)
    with pytest.raises(Refused, match="web is on w1, which can't reach data; these can: w2"):
        volumes.attach(allocated(cloud), instance, cloud.user)


def test_a_deleted_instance_leaves_its_volumes(cloud: Cloud) -> None:
    instance, volume = launched(cloud), allocated(cloud)
    attached(cloud, volume, instance)
    end(operations.request(instance, cloud.user, Kind.DELETE, {}), domain=None)
    volume.refresh_from_db()
    assert (volume.state, volume.instance, volume.slot) == ("ready", None, None)


@pytest.mark.parametrize("kind", [Kind.SNAPSHOT, Kind.REVERT])
def test_an_instance_with_a_volume_has_no_snapshots_of_its_own(cloud: Cloud, kind: Kind) -> None:
    instance, volume = launched(cloud), allocated(cloud)
    attached(cloud, volume, instance)
    with pytest.raises(Refused, match="web has the volume data: detach it first"):
        operations.request(instance, cloud.user, kind, {"snapshot": "a"})


def test_a_resize_is_promised_before_and_counts_when_done(cloud: Cloud) -> None:
    volume = allocated(cloud)
    operation = volumes.request(volume, cloud.user, Kind.VOLUME_RESIZE, {"size_bytes": 2 * GIB})
    volume.refresh_from_db()
    assert (volume.size_bytes, volume.promised_bytes) == (GIB, 2 * GIB)
    command = end(operation, size_bytes=2 * GIB, how="with its file system")
    assert command.volume is not None and command.volume.size_bytes == 2 * GIB and command.volume.generation == 2
    volume.refresh_from_db()
    assert (volume.size_bytes, volume.promised_bytes) == (2 * GIB, 2 * GIB)
    with pytest.raises(Refused, match="can only become larger"):
        volumes.request(volume, cloud.user, Kind.VOLUME_RESIZE, {"size_bytes": GIB})
    failed = volumes.request(volume, cloud.user, Kind.VOLUME_RESIZE, {"size_bytes": 3 * GIB})
    end(failed, Phase.FAILED)
    volume.refresh_from_db()
    assert (volume.size_bytes, volume.promised_bytes) == (2 * GIB, 2 * GIB)


def test_snapshots_of_a_raw_volume_are_copies_and_count(cloud: Cloud) -> None:
    instance, volume = launched(cloud), allocated(cloud)
    end(volumes.request(volume, cloud.user, Kind.VOLUME_SNAPSHOT, {"snapshot": "a"}))
    volume.refresh_from_db()
    assert (volume.snapshots, volume.promised_bytes) == ({"a": GIB}, 2 * GIB)
    for kind, name in ((Kind.VOLUME_SNAPSHOT, "a"), (Kind.VOLUME_REVERT, "b"), (Kind.VOLUME_SNAPSHOT, "../a")):
        with pytest.raises(Refused):
            volumes.request(volume, cloud.user, kind, {"snapshot": name})
    attached(cloud, volume, instance)
    with pytest.raises(WrongState, match="web has data and is on: stop it or detach the volume first"):
        volumes.request(volume, cloud.user, Kind.VOLUME_REVERT, {"snapshot": "a"})
    finish(operations.request(instance, cloud.user, Kind.STOP, {}), Power.STOPPED)
    off = encode(facts(str(instance.uuid), Power.STOPPED))
    end(volumes.request(volume, cloud.user, Kind.VOLUME_REVERT, {"snapshot": "a"}), domain=off, size_bytes=GIB)
    end(volumes.request(volume, cloud.user, Kind.VOLUME_SNAPSHOT_REMOVE, {"snapshot": "a"}), domain=off)
    volume.refresh_from_db()
    assert (volume.snapshots, volume.promised_bytes) == ({}, GIB)


def test_a_removed_volume_s_name_and_promise_are_free(cloud: Cloud) -> None:
    end(volumes.request(allocated(cloud), cloud.user, Kind.VOLUME_REMOVE, {}))
    assert (Volume.objects.get().state, Volume.objects.get().promised_bytes) == ("deleted", 0)
    allocated(cloud)


def test_a_volume_that_could_not_be_made_can_only_be_removed(cloud: Cloud) -> None:
    operation = volumes.allocate(cloud.project, cloud.user, wish())
    end(operation, Phase.FAILED)
    volume = Volume.objects.get()
    assert volume.state == "failed"
    with pytest.raises(WrongState):
        volumes.attach(volume, launched(cloud), cloud.user)
    end(volumes.request(volume, cloud.user, Kind.VOLUME_REMOVE, {}))


def image_wish(**changes: Any) -> dict[str, Any]:
    given = {"name": "mine", "format": "qcow2", "url": "https://example.org/x", "sha256": "", "largest_bytes": GIB}
    return {**given, **changes}


def test_an_import_tells_the_worker_where_from_and_how_much(cloud: Cloud) -> None:
    operation = images.import_url(cloud.project, cloud.user, image_wish(sha256="b" * 64))
    command = end(operation, sha256="b" * 64, virtual_bytes=64 * MIB)
    assert command.image is not None and "url" not in command.args
    assert (command.image.url, command.image.sha256, command.image.largest_bytes) == (
        "https://example.org/x", "b" * 64, GIB,
    )  # fmt: skip
    image = Image.objects.get(name="mine")
    assert (image.state, image.virtual_bytes, image.sha256) == ("ready", 64 * MIB, "b" * 64)


def test_a_failed_import_is_counted_no_more_and_can_be_deleted(cloud: Cloud) -> None:
    end(images.import_url(cloud.project, cloud.user, image_wish()), Phase.FAILED)
    image = Image.objects.get(name="mine")
    assert (image.state, image.promised_bytes) == ("failed", 0)
    end(images.remove(image, cloud.project, cloud.user))
    images.import_url(cloud.project, cloud.user, image_wish())


def test_an_image_that_instances_hang_on_is_not_deleted(cloud: Cloud) -> None:
    instance = launched(cloud)
    with pytest.raises(Refused, match=r"1 instance \(web\) holds only what differs from tiny"):
        images.remove(cloud.image, cloud.project, cloud.user)
    end(operations.request(instance, cloud.user, Kind.DELETE, {}), domain=None)
    images.remove(cloud.image, cloud.project, cloud.user)
    # Being removed, it can't be started any more.
    with pytest.raises(WrongState, match="tiny is removing"):
        launched(cloud, name="late")


def test_an_instance_of_another_project_is_counted_and_not_named(cloud: Cloud) -> None:
    launched(cloud)
    other = Project.objects.create(name="other")
    with pytest.raises(Refused, match=r"^1 instance holds only"):
        images.remove(cloud.image, other, cloud.user)


def test_an_export_is_of_a_disk_that_keeps_still(cloud: Cloud) -> None:
    instance = launched(cloud)
    with pytest.raises(WrongState, match="web is on: stop or suspend it first"):
        images.export(instance, "golden", cloud.user)
    finish(operations.request(instance, cloud.user, Kind.SUSPEND, {}), Power.SUSPENDED)
    operation = images.export(instance, "golden", cloud.user)
    with pytest.raises(OperationActive):
        operations.request(instance, cloud.user, Kind.RESUME, {})
    end(operation, domain=encode(facts(str(instance.uuid), Power.SUSPENDED)), virtual_bytes=GIB)
    instance.refresh_from_db()
    assert instance.state == "suspended" and Image.objects.get(name="golden").state == "ready"


def test_a_clone_has_addresses_of_its_own_and_holds_what_it_is_made_of(cloud: Cloud) -> None:
    instance = launched(cloud)
    with pytest.raises(WrongState, match="web is on: stop it first"):
        images.clone(instance, "two", cloud.user)
    finish(operations.request(instance, cloud.user, Kind.STOP, {}), Power.STOPPED)
    operation = images.clone(instance, "two", cloud.user)
    made = Instance.objects.get(name="two")
    for busy in (instance, made):
        with pytest.raises(OperationActive):
            operations.request(busy, cloud.user, Kind.DELETE, {})
    command = end(operation, domain=encode(facts(str(made.uuid), Power.STOPPED)))
    assert command.instance is not None and command.args["source"] == str(instance.uuid)
    assert command.instance.uuid == str(made.uuid) and command.instance.root.uuid == str(made.uuid)
    assert made.nics.get().mac != instance.nics.get().mac
    made.refresh_from_db()
    assert made.state == "off"
    # The image holds both up.
    with pytest.raises(Refused, match="2 instances"):
        images.remove(cloud.image, cloud.project, cloud.user)


@pytest.fixture
def here(cloud: Cloud) -> Path:
    folder: Path = settings.CONFIG.spool
    Worker.objects.update(features={"spool": spool.identity(folder)})
    return folder


def put(cloud: Cloud, name: str, data: bytes, offset: Any = 0, client: Any = None) -> Any:
    url = cloud.url(f"images/{name}/content") + f"?offset={offset}"
    return (client or cloud.client).put(url, data, content_type="application/octet-stream")


def begun(cloud: Cloud, size: int, **more: Any) -> Any:
    return cloud.client.post(cloud.url("images"), {"name": "mine", "upload_bytes": size, **more}, format="json")


def test_an_upload_comes_in_pieces_and_goes_on_where_it_was(cloud: Cloud, here: Path) -> None:
    assert begun(cloud, 6).status_code == 201
    assert put(cloud, "mine", b"abc").data == {"there": 3}
    assert begun(cloud, 6).data["uploaded_bytes"] == 3
    early = cloud.client.post(cloud.url("images/mine/complete"), {}, format="json")
    assert early.status_code == 409 and early.data["there"] == 3
    hole = put(cloud, "mine", b"x", 5)
    assert hole.status_code == 409 and hole.data["there"] == 3
    assert put(cloud, "mine", b"defg", 3).status_code == 409
    assert put(cloud, "mine", b"def", 3).data == {"there": 6}
    done = cloud.client.post(cloud.url("images/mine/complete"), {}, format="json")
    assert done.status_code == 202 and done.data["image_name"] == "mine"
    image = Image.objects.get(name="mine")
    assert (here / f"{image.uuid}.upload").read_bytes() == b"abcdef"
    assert put(cloud, "mine", b"abc").status_code == 409
    command = end(Operation.objects.get(uuid=done.data["uuid"]), virtual_bytes=GIB, sha256=hashlib.sha256().hexdigest())
    assert command.image is not None and command.image.url == ""


def test_only_a_worker_that_sees_the_folder_reads_an_upload(cloud: Cloud, here: Path) -> None:
    Worker.objects.update(features={"spool": "00000000-0000-4000-8000-000000000000"})
    begun(cloud, 3), put(cloud, "mine", b"abc")
    answer = cloud.client.post(cloud.url("images/mine/complete"), {}, format="json")
    assert answer.status_code == 503 and answer.data["type"] == "no-capacity"


def test_an_upload_is_read_by_a_worker_elsewhere_where_there_is_none_here(cloud: Cloud, here: Path) -> None:
    Peer.objects.create(worker=cloud.worker, index=2, public_key="k", password_hash="h")
    begun(cloud, 3), put(cloud, "mine", b"abc")
    done = cloud.client.post(cloud.url("images/mine/complete"), {}, format="json")
    assert done.status_code == 202 and Image.objects.get(name="mine").worker == cloud.worker
    # One on this host is nearer.
    own = make_worker("z", features={"spool": spool.identity(here)})
    assert images.reader_of_uploads() == own


def test_a_piece_that_is_too_large_or_of_an_odd_place_is_refused(cloud: Cloud, here: Path) -> None:
    begun(cloud, 2**30)
    assert put(cloud, "mine", bytes(spool.PIECE_BYTES_MAX + 1)).status_code == 400
    for offset in ("-1", "x", "1e3", "9" * 20, ""):
        assert put(cloud, "mine", b"x", offset).status_code == 400


@pytest.mark.parametrize(
    "change",
    [{"url": "file:///etc/passwd"}, {"url": "ftp://x/"}, {"upload_bytes": 5}, {"sha256": "x"}, {"format": "vmdk"},
     {"name": "../x"}, {"name": "a\n"}, {"largest_bytes": 2**60}, {"backing": "x"}],
)  # fmt: skip
def test_an_import_that_is_not_valid_is_refused(cloud: Cloud, change: dict[str, Any]) -> None:
    body = {"name": "mine", "url": "http://example.org/x", **change}
    assert cloud.client.post(cloud.url("images"), body, format="json").status_code == 400
    assert Image.objects.count() == 1 and not Operation.objects.exists()


def test_everybody_s_image_is_the_administrators(cloud: Cloud) -> None:
    assert cloud.client.delete(cloud.url("images/tiny")).status_code == 403
    assert put(cloud, "tiny", b"x").status_code == 403
    admin = make_user("root")
    admin.is_superuser = True
    admin.save()
    assert client_of(admin).delete(cloud.url("images/tiny")).status_code == 202


def test_another_project_s_volumes_and_images_are_not_found(cloud: Cloud) -> None:
    allocated(cloud)
    Image.objects.create(name="secret", project=cloud.project, state="ready", virtual_bytes=GIB)
    eve = client_of(make_user("eve", Project.objects.create(name="other")))
    for path in ("volumes/data", "images/secret"):
        assert eve.get(f"/api/v1/projects/other/{path}").status_code == 404
        assert eve.get(cloud.url(path)).status_code == eve.delete(cloud.url(path)).status_code == 404
    answer = eve.post("/api/v1/projects/other/volumes", {"name": "x", "size_bytes": GIB, "near": "web"}, format="json")
    assert answer.status_code == 400


def test_the_verbs_of_the_api(cloud: Cloud) -> None:
    instance = launched(cloud)
    client, at = cloud.client, cloud.url("volumes/data")
    made = client.post(cloud.url("volumes"), {"name": "data", "size_bytes": GIB, "near": "web"}, format="json")
    assert (made.status_code, made.data["kind"], made.data["volume_name"]) == (202, "volume-allocate", "data")
    assert client.get(at).data["operation"]["uuid"] == made.data["uuid"]
    end(Operation.objects.get(uuid=made.data["uuid"]), size_bytes=GIB)
    asked = client.post(f"{at}/attach", {"instance": "web"}, format="json")
    assert asked.status_code == 202
    end(Operation.objects.get(uuid=asked.data["uuid"]), domain=encode(facts(str(instance.uuid))), attached=True)
    shown = client.get(at).data
    assert (shown["instance"], shown["state"], shown["snapshots"]) == ("web", "ready", [])
    assert client.get(cloud.url("instances/web")).data["volumes"] == ["data"]
    refused = client.delete(at)
    assert refused.status_code == 409 and "attached to web" in refused.data["title"]
    assert client.post(f"{at}/resize", {"size_bytes": MIB}, format="json").status_code == 409
    assert client.post(f"{at}/detach", {}, format="json").status_code == 202


def test_an_operation_s_lease_is_no_concern_of_a_late_message(cloud: Cloud) -> None:
    volume = allocated(cloud)
    operation = volumes.request(volume, cloud.user, Kind.VOLUME_RESIZE, {"size_bytes": 2 * GIB})
    sent()
    Operation.objects.filter(pk=operation.pk).update(lease_until=timezone.now() - timedelta(seconds=1))
    ((_, command),) = sent()
    assert command.attempt == 2 and command.volume is not None and command.volume.size_bytes == 2 * GIB
