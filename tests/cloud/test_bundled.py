"""Images that packages bring: registered once, replaced by newer ones, brought in as all are, started by default."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from django.conf import settings
from django.utils import timezone

from recvirt.nestedcloud import spool
from recvirt.nestedcloud.central import bundled, reports
from recvirt.nestedcloud.central.first import PROJECT, ensure_first_rows
from recvirt.nestedcloud.central.models import (
    Image,
    ImageState,
    Instance,
    InstanceState,
    Operation,
    Peer,
    Project,
    Worker,
)
from recvirt.nestedcloud.central.specs import command_of
from recvirt.nestedcloud.client.commands import own_keys
from recvirt.nestedcloud.model import GIB, MIB, Fault, ImageSpec, Phase, Report
from recvirt.nestedcloud.worker.errors import ActionError
from recvirt.nestedcloud.worker.host import Host
from recvirt.nestedcloud.worker.images import Images, QemuImages, SparseImages
from tests.cloud.conftest import Cloud, make_worker

WORKER = "0f0f0f0f-0000-4000-8000-000000000001"
SIZE = 4 * MIB


def qcow2(extra: bytes = b"") -> bytes:
    """A header of version 2 (qcow2.rst) that names no other file, and something to tell images apart."""
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 0, 0, 16, SIZE, 0, 1, 0x30000, 0x10000, 1, 0, 0)
    return (header + bytes(8)).ljust(512, b"\0") + extra


def put(folder: Path, data: bytes, **changes: Any) -> dict[str, Any]:
    """An image in a package's folder, with its document."""
    folder.mkdir(exist_ok=True)
    told = {
        "format": 1, "name": "recvirt-guest", "file": "recvirt-guest.qcow2", "disk_format": "qcow2",
        "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "virtual_bytes": SIZE, **changes,
    }  # fmt: skip
    (folder / "recvirt-guest.qcow2").write_bytes(data)
    (folder / "recvirt-guest.json").write_text(json.dumps(told))
    return told


def ensure(folder: Path) -> list[str]:
    return bundled.ensure_bundled(WORKER, PROJECT, folder)


def end(phase: Phase, **facts: Any) -> None:
    """The worker's last word on the newest operation."""
    operation = Operation.objects.order_by("-created")[0]
    fault = Fault.NO_SPACE if phase is Phase.FAILED else None
    assert reports.apply(Report(str(operation.uuid), 0, WORKER, phase, fault=fault, facts=facts))


@pytest.fixture
def rows(db: None) -> None:
    ensure_first_rows(WORKER, "here")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(str(uuid.uuid4()), "test", tmp_path / "images", tmp_path / "blocks", bundled_dir=tmp_path / "brought")
    for folder in (made.images_dir, made.blocks_dir, made.bundled_dir):
        folder.mkdir()
    return made


# -- registered once ---------------------------------------------------------------------------------------------------


def test_an_image_is_registered_once_and_asked_for_from_the_worker_here(rows: None, tmp_path: Path) -> None:
    told = put(tmp_path / "p", qcow2())
    assert ensure(tmp_path / "p") == ["the image recvirt-guest is being brought in"]
    assert ensure(tmp_path / "p") == []
    image, operation = Image.objects.get(), Operation.objects.get()
    assert (image.project, image.state, image.promised_bytes) == (None, ImageState.IMPORTING, SIZE)
    assert str(operation.worker_id) == WORKER
    spec = command_of(operation).image
    assert spec == ImageSpec(str(image.uuid), "qcow2", "bundled:recvirt-guest.qcow2", told["sha256"], SIZE)
    end(Phase.SUCCEEDED, sha256=told["sha256"], virtual_bytes=SIZE)
    assert ensure(tmp_path / "p") == [] and Image.objects.get().state == ImageState.READY


def test_without_a_package_there_is_nothing_to_do(rows: None, tmp_path: Path) -> None:
    assert ensure(tmp_path / "absent") == []
    assert not Image.objects.exists()


def test_who_deleted_it_does_not_get_it_back(rows: None, tmp_path: Path) -> None:
    put(tmp_path / "p", qcow2())
    ensure(tmp_path / "p")
    Image.objects.update(state=ImageState.DELETED)
    assert ensure(tmp_path / "p") == []
    assert Operation.objects.count() == 1


def test_a_failed_import_is_tried_again_and_a_failed_removal_is_not(rows: None, tmp_path: Path) -> None:
    put(tmp_path / "p", qcow2())
    ensure(tmp_path / "p")
    end(Phase.FAILED)
    assert Image.objects.get().state == ImageState.FAILED
    assert ensure(tmp_path / "p") and Image.objects.get().state == ImageState.IMPORTING
    assert ensure(tmp_path / "p") == [], "one at a time"
    end(Phase.SUCCEEDED, virtual_bytes=SIZE)
    Operation.objects.create(
        project=Project.objects.get(), image=Image.objects.get(), worker_id=WORKER, kind="image-remove"
    )
    end(Phase.FAILED)
    assert ensure(tmp_path / "p") == [] and Image.objects.get().state == ImageState.FAILED


def test_a_newer_one_takes_the_name_and_the_older_one_s_guests_go_on(rows: None, tmp_path: Path) -> None:
    told = put(tmp_path / "p", qcow2())
    ensure(tmp_path / "p")
    end(Phase.SUCCEEDED, virtual_bytes=SIZE)
    older = Image.objects.get()
    instance = Instance.objects.create(
        project=Project.objects.get(), image=older, name="web", state=InstanceState.ON, vcpus=1, vcpus_max=1,
        memory_bytes=GIB, memory_max_bytes=GIB, disk_bytes=GIB, promised_vcpus=1, promised_memory_bytes=GIB,
        promised_disk_bytes=GIB,
    )  # fmt: skip
    newer = put(tmp_path / "p", qcow2(b"newer"))
    assert ensure(tmp_path / "p") and ensure(tmp_path / "p") == []
    assert Image.objects.get(name="recvirt-guest").wanted_sha256 == newer["sha256"]
    instance.refresh_from_db()
    assert instance.image is not None and instance.image.name == f"recvirt-guest-{told['sha256'][:12]}"
    # Going back to the older package brings nothing twice.
    put(tmp_path / "p", qcow2())
    assert ensure(tmp_path / "p") == [] and Image.objects.count() == 2


def test_after_a_deletion_a_newer_one_comes(rows: None, tmp_path: Path) -> None:
    put(tmp_path / "p", qcow2())
    ensure(tmp_path / "p")
    Image.objects.update(state=ImageState.DELETED)
    put(tmp_path / "p", qcow2(b"newer"))
    assert ensure(tmp_path / "p")
    assert Image.objects.exclude(state=ImageState.DELETED).get().name == "recvirt-guest"


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2}, {"name": "../x"}, {"name": "Ä"}, {"file": "../../etc/shadow"}, {"file": "/etc/shadow.raw"},
        {"disk_format": "vmdk"}, {"sha256": ""}, {"sha256": "F" * 64}, {"virtual_bytes": -1}, {"bytes": "many"},
    ],
)  # fmt: skip
def test_a_document_that_is_not_understood_is_told_and_left(rows: None, tmp_path: Path, changes: Any) -> None:
    put(tmp_path / "p", qcow2(), **changes)
    (told,) = ensure(tmp_path / "p")
    assert told.startswith(f"{tmp_path}/p/recvirt-guest.json: ")
    assert not Image.objects.exists()


def test_a_damaged_document_does_not_keep_others_away(rows: None, tmp_path: Path) -> None:
    put(tmp_path / "p", qcow2())
    (tmp_path / "p/a.json").write_bytes(b"\xff\x00{")
    (tmp_path / "p/b.json").write_text("[]")
    assert len(ensure(tmp_path / "p")) == 3
    assert Image.objects.count() == 1


# -- brought in --------------------------------------------------------------------------------------------------------


def spec_of(told: dict[str, Any], **changes: Any) -> ImageSpec:
    fields = {"url": f"bundled:{told['file']}", "sha256": told["sha256"], "largest_bytes": SIZE, **changes}
    return ImageSpec(str(uuid.uuid4()), "qcow2", **fields)


def bring(images: Images, spec: ImageSpec) -> dict[str, Any]:
    return images.bring_in(spec, lambda _percent, _text: None)


def test_it_is_brought_in_by_the_way_that_all_images_take(host: Host) -> None:
    told = put(host.bundled_dir, qcow2())
    spec = spec_of(told)
    assert bring(SparseImages(host), spec) == {"sha256": told["sha256"], "virtual_bytes": SIZE}
    assert host.image_path(spec.uuid).stat().st_size == SIZE
    assert (host.bundled_dir / told["file"]).exists(), "the package's own stays"


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="wants qemu-img")
def test_qemu_img_writes_it_anew(host: Host, tmp_path: Path) -> None:
    from recvirt.nestedcloud.worker.storage import run_tool

    run_tool(["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "made"), str(SIZE)])
    told = put(host.bundled_dir, (tmp_path / "made").read_bytes())
    spec = spec_of(told)
    assert bring(QemuImages(host), spec)["virtual_bytes"] == SIZE
    run_tool(["qemu-img", "check", "-q", str(host.image_path(spec.uuid))])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sha256": "0" * 64}, "its SHA-256 is"),
        ({"sha256": ""}, "no image that a package brings"),
        ({"url": "bundled:../secret.raw"}, "no image that a package brings"),
        ({"url": "bundled:/etc/shadow"}, "no image that a package brings"),
        ({"url": "bundled:absent.qcow2"}, "no package of this host brings absent.qcow2"),
        ({"largest_bytes": 100}, "larger|more|100"),
    ],
)
def test_what_is_not_as_registered_is_refused(host: Host, changes: Any, said: str) -> None:
    told = put(host.bundled_dir, qcow2())
    (host.bundled_dir.parent / "secret.raw").write_text("secret")
    with pytest.raises(ActionError, match=said):
        bring(SparseImages(host), spec_of(told, **changes))
    assert list(host.images_dir.iterdir()) == []


def test_nobody_asks_for_such_a_file_through_the_api(cloud: Cloud) -> None:
    body = {"name": "x", "url": "bundled:recvirt-guest.qcow2", "sha256": "0" * 64}
    answer = cloud.client.post(cloud.url("images"), body, format="json")
    assert answer.status_code == 400 and "url" in answer.data["errors"]
    assert Operation.objects.count() == 0


# -- started when none is named ----------------------------------------------------------------------------------------


def launched(cloud: Cloud) -> Any:
    return cloud.client.post(cloud.url("instances"), {"name": "web"}, format="json")


def public(name: str, state: ImageState = ImageState.READY) -> Image:
    return Image.objects.create(name=name, state=state, virtual_bytes=SIZE)


def test_the_only_image_is_meant_when_none_is_named(cloud: Cloud) -> None:
    public("failed", ImageState.FAILED)
    assert launched(cloud).status_code == 202
    assert Instance.objects.get().image == cloud.image


def test_the_one_that_came_with_the_cloud_is_meant_among_others(cloud: Cloud) -> None:
    guest = public("recvirt-guest")
    assert launched(cloud).status_code == 202
    assert Instance.objects.get().image == guest


def test_a_choice_is_told_and_another_project_s_images_are_none_of_it(cloud: Cloud) -> None:
    public("debian")
    Image.objects.create(name="secret", project=Project.objects.create(name="other"), state=ImageState.READY)
    answer = launched(cloud)
    assert answer.status_code == 400
    assert "There are debian, tiny" in str(answer.data) and "secret" not in str(answer.data)


def test_without_an_image_it_is_told_and_so_is_one_that_comes(cloud: Cloud, tmp_path: Path) -> None:
    cloud.image.delete()
    assert "There is none" in str(launched(cloud).data)
    put(tmp_path / "p", qcow2())
    bundled.ensure_bundled(str(Worker.objects.get().uuid), "lab", tmp_path / "p")
    assert "being brought in" in str(launched(cloud).data)


# -- a central node without a worker ----------------------------------------------------------------------------------


@pytest.fixture
def far(db: None) -> Worker:
    """The first worker that has joined, on a central node that has none."""
    ensure_first_rows(None, "")
    worker = make_worker("far", uuid=WORKER, features={"spool": spool.identity(settings.CONFIG.spool)})
    Peer.objects.create(worker=worker, index=2, public_key="k", password_hash="h")
    return worker


def from_afar(folder: Path) -> list[str]:
    return bundled.ensure_from_afar(PROJECT, folder)


def test_the_first_worker_that_joins_brings_it_in_as_an_upload(far: Worker, tmp_path: Path) -> None:
    data = qcow2(b"x" * (spool.PIECE_BYTES_MAX + 7))
    told = put(tmp_path / "p", data)
    assert from_afar(tmp_path / "p") == ["the image recvirt-guest is being brought in by far"]
    assert from_afar(tmp_path / "p") == []
    image, operation = Image.objects.get(), Operation.objects.get()
    assert bundled.is_coming() and str(operation.worker_id) == str(image.worker_id) == WORKER
    spec = command_of(operation).image
    assert spec == ImageSpec(str(image.uuid), "qcow2", "", told["sha256"], len(data))
    # On the worker, which has mounted the folder.
    host = Host(str(uuid.uuid4()), "test", tmp_path / "images", tmp_path / "b", spool_dir=settings.CONFIG.spool)
    host.images_dir.mkdir()
    facts = SparseImages(host).bring_in(spec, lambda *_: None)
    assert facts == {"sha256": told["sha256"], "virtual_bytes": SIZE}
    assert spool.size(settings.CONFIG.spool, spec.uuid) == 0
    end(Phase.SUCCEEDED, **facts)
    assert Image.objects.get().state == ImageState.READY and from_afar(tmp_path / "p") == []


def test_nobody_who_can_read_it_nothing_is_done(far: Worker, tmp_path: Path) -> None:
    put(tmp_path / "p", qcow2())
    Worker.objects.update(features={"spool": str(uuid.uuid4())})
    assert from_afar(tmp_path / "p") == []
    Worker.objects.update(features={"spool": spool.identity(settings.CONFIG.spool)}, last_seen=None)
    assert from_afar(tmp_path / "p") == [] and not Image.objects.exists()
    assert from_afar(tmp_path / "absent") == []


def test_a_central_node_s_own_worker_does_it_by_itself(far: Worker, tmp_path: Path) -> None:
    put(tmp_path / "p", qcow2())
    make_worker("own")
    assert from_afar(tmp_path / "p") == []


def test_what_failed_is_tried_again_but_not_at_once(far: Worker, tmp_path: Path) -> None:
    put(tmp_path / "p", qcow2())
    from_afar(tmp_path / "p")
    end(Phase.FAILED)
    assert from_afar(tmp_path / "p") == []
    Operation.objects.update(finished=timezone.now() - timedelta(minutes=11))
    assert len(from_afar(tmp_path / "p")) == 1 and Operation.objects.count() == 2


def test_a_file_that_is_not_as_it_says_is_told_and_leaves_nothing(far: Worker, tmp_path: Path) -> None:
    put(tmp_path / "p", qcow2(), bytes=100)
    (said,) = from_afar(tmp_path / "p")
    assert "can't be handed to far" in said and not Image.objects.exists() and not Operation.objects.exists()
    (tmp_path / "p/recvirt-guest.qcow2").unlink()
    assert len(from_afar(tmp_path / "p")) == 1


# -- a person's keys ---------------------------------------------------------------------------------------------------


def test_a_person_s_own_keys(tmp_path: Path) -> None:
    assert own_keys(tmp_path) == []
    folder = tmp_path / ".ssh"
    folder.mkdir()
    (folder / "authorized_keys").write_text("# nobody\n\n")
    assert own_keys(tmp_path) == []
    (folder / "authorized_keys").write_text("ssh-ed25519 AAAA laptop\n")
    assert own_keys(tmp_path) == [folder / "authorized_keys"]
    (folder / "id_ed25519.pub").write_text("ssh-ed25519 AAAA me\n")
    (folder / "id_ed25519").write_text("private")
    assert own_keys(tmp_path) == [folder / "id_ed25519.pub"]


def test_a_launch_sends_them_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recvirt.nestedcloud.client import commands

    sent: list[dict[str, Any]] = []

    class Recorder:
        def below(self, path: str) -> str:
            return path

        def call(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
            sent.append(body)
            return {"uuid": "x"}

    monkeypatch.setattr(commands, "api", Recorder)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/id_rsa.pub").write_text("ssh-rsa AAAA me\n")
    (tmp_path / "other.pub").write_text("ssh-rsa BBBB other\n")
    runner = CliRunner()
    for words in ([], ["--no-ssh-keys"], ["--ssh-key", str(tmp_path / "other.pub"), "--image", "debian"]):
        assert runner.invoke(commands.launch, ["web", "--no-wait", *words]).exit_code == 0
    plain = {"name": "web", "nest": False}
    assert sent == [
        {**plain, "ssh_keys": ["ssh-rsa AAAA me"]}, plain,
        {**plain, "image": "debian", "ssh_keys": ["ssh-rsa BBBB other"]},
    ]  # fmt: skip
