"""Workers on other machines at the API: who is let in, once, and who is not; what is kept, told and written down."""

from __future__ import annotations

import base64
import hashlib
import json
import stat
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.cache import cache
from django.utils import timezone
from rest_framework.test import APIClient

from recvirt.nestedcloud import credentials, tunnel
from recvirt.nestedcloud import peers as root_peers
from recvirt.nestedcloud.central import admission, dispatcher, operations, peers, reports
from recvirt.nestedcloud.central.auth import FAILURES_MAX
from recvirt.nestedcloud.central.models import Event, Image, Instance, Invitation, Operation, Peer, Volume, Worker
from recvirt.nestedcloud.central.problems import NoCapacity, WorkerRevoked
from recvirt.nestedcloud.model import Heartbeat, Kind, Phase, Report
from recvirt.nestedcloud.provision import password_hash
from tests.cloud.conftest import Cloud, client_of, make_user, make_worker
from tests.cloud.test_operations import launched, sent, wish

V1 = "/api/v1/"
CLOUD = uuid.UUID("00000000-0000-4000-8000-000000000001")
CERTIFICATE = "ab" * 32


def key_of(text: str) -> str:
    """Some public key."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@pytest.fixture(autouse=True)
def _tunnel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What root has told the API, a certificate, and a folder of the test's own."""
    cache.clear()
    told = tmp_path / "public.json"
    central = {"public_key": key_of("central"), "address": str(tunnel.central_address(CLOUD)), "port": tunnel.PORT}
    told.write_text(json.dumps(central))
    config = {**vars(settings.CONFIG), "tunnel_path": str(told), "state_dir": str(tmp_path)}
    monkeypatch.setattr(settings, "CONFIG", type(settings.CONFIG)(**config))
    monkeypatch.setattr(peers, "certificate_fingerprint", lambda: CERTIFICATE)
    yield


@pytest.fixture
def root(cloud: Cloud) -> APIClient:
    user = make_user("root")
    user.is_superuser = True
    user.save()
    return client_of(user)


def post(client: APIClient, path: str, **body: Any) -> Any:
    return client.post(f"{V1}{path}", body, format="json")


def invited(root: APIClient, **body: Any) -> str:
    answer = post(root, "workers/invitations", **body)
    assert answer.status_code == 201 and answer["Cache-Control"] == "no-store"
    return str(answer.data["token"])


class Machine:
    """One that wants to be a worker."""

    def __init__(self, name: str = "shelf") -> None:
        self.uuid, self.name, self.password = str(uuid.uuid4()), name, f"password of {name}"
        self.key, self.hash = key_of(name), password_hash(self.password)
        self.client = APIClient()

    def join(self, token: str, /, **changes: Any) -> Any:
        body = {
            "token": token,
            "uuid": self.uuid,
            "name": self.name,
            "public_key": self.key,
            "password_hash": self.hash,
        }
        return post(self.client, "join", **{**body, **changes})

    def peer(self, **more: Any) -> Any:
        return post(self.client, "peer", **{"uuid": self.uuid, "password": self.password, **more})


def joined(root: APIClient, name: str = "shelf") -> Machine:
    machine = Machine(name)
    assert machine.join(invited(root)).status_code == 200
    return machine


def kinds() -> list[str]:
    return list(Event.objects.filter(kind__startswith="worker").order_by("id").values_list("kind", flat=True))


def test_an_invited_machine_comes_in_once_and_hears_the_same_when_it_asks_again(root: APIClient) -> None:
    token = invited(root)
    parsed = credentials.parse_token(token)
    assert parsed.fingerprint == CERTIFICATE and parsed.secret not in str(Invitation.objects.values())
    machine = Machine()
    answer = machine.join(token)
    assert answer.status_code == 200, answer.data
    assert answer.data == {
        "cloud": str(CLOUD), "uuid": machine.uuid, "name": "shelf", "address": str(tunnel.peer_address(CLOUD, 2)),
        "central_address": str(tunnel.central_address(CLOUD)), "central_public_key": key_of("central"),
        "port": tunnel.PORT, "certificate_sha256": CERTIFICATE,
    }  # fmt: skip
    assert machine.join(token).data == answer.data
    # The answer was lost, and the invitation is over by now.
    Invitation.objects.update(expires=timezone.now() - timedelta(hours=1))
    assert machine.join(token).data == answer.data
    # Or thrown away, and it was invited once more.
    assert machine.join(invited(root)).data == answer.data
    assert Peer.objects.count() == 1 and kinds() == ["worker.invited", "worker.joined", "worker.invited"]
    second = Machine("other")
    assert second.join(invited(root)).data["address"] == str(tunnel.peer_address(CLOUD, 3))


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"uuid": str(uuid.uuid4())}, "invitation-used"), ({"public_key": key_of("thief")}, "invitation-used"),
     ({"password_hash": password_hash("thief")}, "invitation-used")],
)  # fmt: skip
def test_an_invitation_that_was_used_opens_nothing(root: APIClient, changes: dict[str, Any], code: str) -> None:
    token, machine = invited(root), Machine()
    machine.join(token)
    answer = machine.join(token, **changes)
    assert (answer.status_code, answer.data["type"]) == (403, code)
    peer = Peer.objects.get()
    assert (peer.public_key, peer.password_hash) == (machine.key, machine.hash)


def test_who_is_not_invited_stays_out(root: APIClient) -> None:
    token, machine = invited(root), Machine()
    stranger = str(credentials.new_token(CERTIFICATE))
    assert machine.join(stranger).data["type"] == "invitation-unknown"
    Invitation.objects.update(expires=timezone.now() - timedelta(seconds=1))
    assert machine.join(token).data["type"] == "invitation-expired"
    token = invited(root)
    key = Invitation.objects.order_by("-created").values_list("pk", flat=True)[0]
    assert root.delete(f"{V1}workers/invitations/{key}").status_code == 204
    assert machine.join(token).data["type"] == "invitation-unknown"
    assert not Peer.objects.exists()


@pytest.mark.parametrize("door", ["join", "peer"])
def test_guessing_is_slowed_down(root: APIClient, door: str) -> None:
    token, machine = invited(root), Machine()
    for _ in range(FAILURES_MAX):
        answer = machine.join("rvj_" + "x" * 43) if door == "join" else machine.peer()
        assert answer.status_code == 403
    assert machine.join(token).status_code == 429 and machine.peer().status_code == 429
    cache.clear()
    assert machine.join(token).status_code == 200


def test_nobody_takes_the_place_of_another_worker(cloud: Cloud, root: APIClient) -> None:
    one = joined(root)
    two = Machine("two")
    for changes, code in (
        ({"uuid": one.uuid}, "worker-taken"), ({"uuid": str(cloud.worker.pk)}, "worker-taken"),
        ({"public_key": one.key}, "key-taken"), ({"public_key": key_of("central")}, "key-taken"),
    ):  # fmt: skip
        answer = two.join(invited(root), **changes)
        assert (answer.status_code, answer.data["type"]) == (403, code), changes
    for name in ("shelf", cloud.worker.name, "invitations"):
        assert two.join(invited(root), name=name).status_code == 409
    # Refused is not used: the same invitation with another name.
    token = invited(root)
    assert two.join(token, name="shelf").status_code == 409
    assert two.join(token).status_code == 200


@pytest.mark.parametrize(
    "changes",
    [{"public_key": "x" * 44}, {"public_key": key_of("a")[:-1]}, {"public_key": base64.b64encode(bytes(32)).decode()},
     {"public_key": key_of("a") + "\n"}, {"public_key": base64.b64encode(b"x" * 31).decode()}, {"public_key": ["a"]},
     {"password_hash": "secret"}, {"password_hash": base64.b64encode(b"x" * 37).decode()},
     {"name": "../etc"}, {"name": "a\nb"}, {"name": "A"}, {"name": "x" * 64}, {"name": "$(id)"}, {"name": ""},
     {"uuid": "1"}, {"uuid": "x' OR 1=1"}, {"token": "rvc_" + "x" * 43}, {"token": ""}, {"token": "rvj_" + "x" * 9999},
     {"token": "rvj_\x00" + "x" * 43}, {"more": "x"}],
)  # fmt: skip
def test_what_is_malformed_is_refused(root: APIClient, changes: dict[str, Any]) -> None:
    token = invited(root)
    assert Machine().join(token, **changes).status_code == 400
    assert not Peer.objects.exists() and Invitation.objects.get().used is None


def test_the_name_of_the_invitation_counts(root: APIClient) -> None:
    assert Machine().join(invited(root, name="rack-7")).data["name"] == "rack-7"
    assert post(root, "workers/invitations", name="rack-7").status_code == 409
    assert post(root, "workers/invitations", name="Rack").status_code == 400
    assert post(root, "workers/invitations", seconds=10).status_code == 400


def test_invitations_are_the_administrators(cloud: Cloud, root: APIClient) -> None:
    assert post(cloud.client, "workers/invitations").status_code == 403
    invited(root, name="rack-7")
    listed = root.get(f"{V1}workers/invitations").data["results"]
    assert [(item["name"], item["made_by"], item["used"]) for item in listed] == [("rack-7", "root", None)]
    assert "token" not in listed[0] and "digest" not in listed[0]
    assert cloud.client.get(f"{V1}workers/invitations").status_code == 403
    for verb in ("drain", "undrain", "revoke"):
        assert post(cloud.client, f"workers/w1/{verb}").status_code == 403


def test_without_a_tunnel_nobody_is_invited(root: APIClient) -> None:
    Path(settings.CONFIG.tunnel_path).unlink()
    answer = post(root, "workers/invitations")
    assert (answer.status_code, answer.data["type"]) == (503, "no-tunnel")


def test_a_worker_changes_key_and_password_and_may_ask_twice(root: APIClient) -> None:
    machine = joined(root)
    change = {"public_key": key_of("new"), "password_hash": password_hash("new")}
    first = machine.peer(**change)
    assert first.status_code == 200
    # Its answer was lost: with the password before, the same once more, and nothing else.
    assert machine.peer(**change).data == first.data
    assert machine.peer().status_code == 403
    assert machine.peer(public_key=key_of("thief"), password_hash=password_hash("thief")).status_code == 403
    assert machine.peer(leave=True, **change).status_code == 400
    assert machine.peer(leave=True).status_code == 403
    assert Peer.objects.get().public_key == key_of("new")
    machine.password = "new"
    assert machine.peer().status_code == 200
    machine.password = "password of shelf"
    # It has used the new one: the one before opens nothing any more.
    assert machine.peer(**change).status_code == 403
    assert kinds().count("worker.rotated") == 1
    assert machine.peer(public_key=key_of("half")).status_code == 400


def test_a_worker_that_asks_must_be_itself(cloud: Cloud, root: APIClient) -> None:
    one, two = joined(root, "one"), joined(root, "two")
    assert one.peer(uuid=two.uuid).data["type"] == "worker-unknown"
    assert one.peer(password="").status_code == 400
    assert one.peer(password=one.hash).status_code == 403
    assert one.peer(uuid=str(cloud.worker.pk)).status_code == 403
    assert one.peer(public_key=two.key, password_hash=one.hash).data["type"] == "key-taken"
    assert one.peer().data["name"] == "one"


def test_a_revoked_worker_is_out_for_good(root: APIClient) -> None:
    token, machine = invited(root), Machine()
    machine.join(token)
    answer = post(root, "workers/shelf/revoke")
    assert (answer.status_code, answer.data["status"]) == (200, "revoked")
    assert post(root, "workers/shelf/revoke").status_code == 200
    assert machine.peer().data["type"] == "worker-revoked"
    assert machine.join(token).data["type"] == "worker-revoked"
    assert machine.join(invited(root)).data["type"] == "worker-taken"
    assert kinds().count("worker.revoked") == 1
    # Its name is free, and the next one that has it is somebody else.
    again = Machine()
    again.key = key_of("another")
    assert again.join(invited(root)).status_code == 200
    assert again.peer().data["name"] == "shelf"
    assert Worker.objects.get(pk=machine.uuid).name == f"shelf-{machine.uuid[:8]}"


def test_a_worker_leaves_by_itself(root: APIClient) -> None:
    machine = joined(root)
    assert machine.peer(leave=True).status_code == 200
    assert Worker.objects.get(name="shelf").revoked
    assert Event.objects.get(kind="worker.revoked").data == {"name": "shelf", "why": "it has left"}


def test_the_central_nodes_own_worker_is_not_revoked(root: APIClient) -> None:
    answer = post(root, "workers/w1/revoke")
    assert answer.status_code == 409 and "drain" in answer.data["title"]


def test_draining(cloud: Cloud, root: APIClient) -> None:
    assert post(root, "workers/w1/drain").data["status"] == "draining"
    with pytest.raises(NoCapacity, match="emptied"):
        operations.launch(cloud.project, cloud.user, wish(cloud))
    assert post(root, "workers/w1/drain").status_code == 200
    assert post(root, "workers/w1/undrain").data["status"] == "up"
    assert kinds() == ["worker.drained", "worker.undrained"]
    assert post(root, "workers/none/drain").status_code == 404


def moved_to_a_peer(cloud: Cloud, root: APIClient) -> tuple[Instance, Worker]:
    """An instance on a worker of another machine."""
    machine = joined(root)
    worker = Worker.objects.get(pk=machine.uuid)
    worker.vcpus, worker.memory_bytes, worker.disk_bytes = 8, 2**40, 2**40
    worker.last_seen = timezone.now()
    worker.save()
    instance = launched(cloud)
    assert instance.worker == worker, "the one with the most room"
    return instance, worker


def test_a_revoked_workers_instances_say_so_and_nothing_is_sent_there(cloud: Cloud, root: APIClient) -> None:
    instance, worker = moved_to_a_peer(cloud, root)
    assert cloud.client.get(cloud.url("instances/web")).data["away"] == ""
    pending = operations.request(instance, cloud.user, Kind.STOP, {})
    assert [key for key, _ in sent()] == [str(worker.pk)]
    post(root, "workers/shelf/revoke")
    assert sent() == []
    pending.refresh_from_db()
    assert (pending.phase, pending.message) == ("failed", "its worker shelf was revoked")
    shown = cloud.client.get(cloud.url("instances/web")).data
    assert (shown["worker"], shown["away"]) == ("shelf", "the worker shelf was revoked")
    answer = cloud.client.post(cloud.url("instances/web/reboot"), {}, format="json")
    assert (answer.status_code, answer.data["type"]) == (409, "worker-revoked")
    with pytest.raises(WorkerRevoked):
        operations.request(Instance.objects.get(), cloud.user, Kind.STOP, {})
    # What it says now counts for nothing.
    assert not reports.apply(Report(str(pending.pk), 1, str(worker.pk), Phase.SUCCEEDED))
    assert reports.heard(Heartbeat(str(worker.pk), "shelf", "x", 1, 1, 1, {}, ())) == []
    assert operations.launch(cloud.project, cloud.user, wish(cloud, name="next")).worker == cloud.worker


def test_what_was_on_a_revoked_worker_can_be_forgotten(cloud: Cloud, root: APIClient) -> None:
    instance, worker = moved_to_a_peer(cloud, root)
    volume = Volume.objects.create(
        project=cloud.project, worker=worker, name="data", state="ready", size_bytes=2**30, promised_bytes=2**30,
        instance=instance, slot=1,
    )  # fmt: skip
    post(root, "workers/shelf/revoke")
    answer = cloud.client.delete(cloud.url("instances/web"))
    assert (answer.status_code, answer.data["phase"]) == (202, "succeeded")
    assert "revoked" in answer.data["message"] and sent() == []
    assert cloud.client.get(cloud.url("instances/web")).status_code == 404
    # Volumes outlive their instance, and can be forgotten as well; nothing counts against the quota any more.
    volume.refresh_from_db()
    assert (volume.instance, volume.state) == (None, "ready")
    assert cloud.client.delete(cloud.url("volumes/data")).data["phase"] == "succeeded"
    assert admission.promised(cloud.project, admission.NOW_ON) == admission.Need()
    assert root.get(f"{V1}status").data["workers"]["total"] == 1


def test_an_image_of_a_revoked_worker_is_removed_by_another_one(cloud: Cloud, root: APIClient) -> None:
    _, worker = moved_to_a_peer(cloud, root)
    image = Image.objects.create(name="own", project=cloud.project, state="ready", worker=worker)
    post(root, "workers/shelf/revoke")
    cloud.client.delete(cloud.url("images/own"))
    assert [key for key, _ in sent()] == [str(cloud.worker.pk)]
    image.refresh_from_db()
    assert image.state == "removing"


def test_an_operation_that_was_asked_for_at_the_same_moment_fails_as_well(cloud: Cloud, root: APIClient) -> None:
    instance, worker = moved_to_a_peer(cloud, root)
    late = operations.request(instance, cloud.user, Kind.STOP, {})
    Worker.objects.filter(pk=worker.pk).update(revoked=True)
    assert sent() == []
    late.refresh_from_db()
    assert late.phase == "failed"
    assert not Operation.objects.filter(phase="queued").exists()


def test_a_lost_workers_instances_say_since_when(cloud: Cloud, root: APIClient) -> None:
    _, worker = moved_to_a_peer(cloud, root)
    worker.last_seen = timezone.now() - timedelta(hours=1)
    worker.save()
    shown = cloud.client.get(cloud.url("instances/web")).data["away"]
    assert shown.startswith("the worker shelf was not heard of since 20")
    found = cloud.client.get(f"{V1}workers/shelf").data
    assert (found["status"], found["peer"]) == ("away", None)
    peer = root.get(f"{V1}workers/shelf").data["peer"]
    assert peer["address"] == str(tunnel.peer_address(CLOUD, 2)) and peer["public_key"] == key_of("shelf")
    assert root.get(f"{V1}workers/w1").data["peer"] is None
    with pytest.raises(NoCapacity, match="away"):
        admission.check_worker(worker, admission.Need(1, 1, 2**20))


# --- the list for root


def listed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(settings.CONFIG.state_dir) / peers.FILE).read_text())
    return found


def test_the_list_for_root_is_written_when_it_changes(cloud: Cloud, root: APIClient) -> None:
    assert not peers.publish() and not (Path(settings.CONFIG.state_dir) / peers.FILE).exists()
    machine = joined(root)
    assert peers.publish() and not peers.publish()
    path = Path(settings.CONFIG.state_dir) / peers.FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert listed()["peers"] == [
        {"uuid": machine.uuid, "public_key": machine.key, "address": str(tunnel.peer_address(CLOUD, 2)),
         "password_hash": machine.hash}
    ]  # fmt: skip
    # It is what root takes.
    wanted = root_peers.parse(path.read_text(), CLOUD, [str(cloud.worker.pk)])
    assert [peer.uuid for peer in wanted.peers] == [machine.uuid] and wanted.revoked == ()
    machine.peer(public_key=key_of("new"), password_hash=password_hash("new"))
    assert peers.publish() and listed()["peers"][0]["public_key"] == key_of("new")
    post(root, "workers/shelf/revoke")
    assert peers.publish() and listed()["peers"] == [] and listed()["revoked"] == [machine.uuid]
    path.unlink()
    assert peers.publish()
    # A database from before the first worker.
    Peer.objects.all().delete()
    assert peers.publish() and listed()["revoked"] == []


def test_the_dispatcher_writes_it(cloud: Cloud, root: APIClient, monkeypatch: pytest.MonkeyPatch) -> None:
    joined(root)
    monkeypatch.setattr(dispatcher, "close_old_connections", lambda: None)
    rounds = iter([False, True])
    dispatcher.run(lambda *_: None, pause_seconds=0, stop=lambda: next(rounds))
    assert len(listed()["peers"]) == 1


def test_a_worker_of_the_same_machine_is_in_no_list(cloud: Cloud) -> None:
    make_worker("w2")
    assert peers.desired() is None
