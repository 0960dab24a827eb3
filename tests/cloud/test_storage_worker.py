"""Operations on volumes and images on libvirt's test driver: each one twice, late, and where something is missing."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

import pytest

from recvirt.nestedcloud.central.bodies import BODY_BYTES_MAX, bounded
from recvirt.nestedcloud.model import (
    GIB,
    MIB,
    Command,
    DiskSpec,
    Fault,
    ImageSpec,
    InstanceSpec,
    Kind,
    ModelError,
    Phase,
    Report,
    VolumeSpec,
    decode,
    encode,
)
from tests.cloud.support import instance
from tests.cloud.test_worker import Bench, bench, later  # noqa: F401 - a fixture


def volume(**values: Any) -> VolumeSpec:
    given = {"uuid": str(uuid.uuid4()), "name": "data", "generation": 1, "size_bytes": 64 * MIB, "filesystem": "ext4"}
    return VolumeSpec(**{**given, **values})


def ask(bench: Bench, kind: Kind, spec: InstanceSpec | None = None, **values: Any) -> Report:  # noqa: F811
    parts = {name: values.pop(name, None) for name in ("volume", "image")}
    operation = values.pop("operation", "") or str(uuid.uuid4())
    command = Command(operation, 1, kind, spec.generation if spec else 1, spec, args=values, **parts)
    return bench.agent.execute(decode(Command, encode(command)), bench.reports.append)


def with_volume(spec: InstanceSpec, made: VolumeSpec) -> InstanceSpec:
    return later(spec, volumes=(DiskSpec(made.uuid, made.size_bytes, made.format, slot=1),))


def test_a_volume_from_its_first_to_its_last_day(bench: Bench) -> None:  # noqa: F811
    made = volume()
    for _ in range(2):
        assert ask(bench, Kind.VOLUME_ALLOCATE, volume=made).facts == {"size_bytes": 64 * MIB}
    spec = bench.launched()
    has = with_volume(spec, made)
    for _ in range(2):
        last = ask(bench, Kind.ATTACH, has, volume=made, slot=1)
        assert last.phase is Phase.SUCCEEDED and last.facts["attached"] is True, last
    assert f"{made.uuid}.raw" in bench.connection.lookupByUUIDString(spec.uuid).XMLDesc(2)
    larger = volume(uuid=made.uuid, generation=2, size_bytes=128 * MIB)
    assert ask(bench, Kind.VOLUME_RESIZE, has, volume=larger, slot=1).facts["size_bytes"] == 128 * MIB
    assert ask(bench, Kind.VOLUME_RESIZE, has, volume=made, slot=1).fault is Fault.CONFLICT
    assert ask(bench, Kind.VOLUME_SNAPSHOT, has, volume=larger, snapshot="a").fault is Fault.CONFLICT
    without = later(has, volumes=())
    for _ in range(2):
        assert ask(bench, Kind.DETACH, without, volume=larger, slot=1).facts["attached"] is False
    assert f"{made.uuid}.raw" not in bench.connection.lookupByUUIDString(spec.uuid).XMLDesc(2)
    # A message from before: nothing comes back.
    assert ask(bench, Kind.ATTACH, has, volume=larger, slot=1).fault is Fault.CONFLICT
    for _ in range(2):
        assert ask(bench, Kind.VOLUME_REMOVE, volume=larger).phase is Phase.SUCCEEDED
    assert not [name for name in bench.files() if name.startswith(made.uuid)]


def test_a_volume_that_is_not_there_leaves_the_instance_as_it_was(bench: Bench) -> None:  # noqa: F811
    spec, absent = bench.launched(), volume()
    last = ask(bench, Kind.ATTACH, with_volume(spec, absent), volume=absent, slot=1)
    assert (last.fault, last.facts) == (Fault.NOT_FOUND, {"attached": False})
    assert absent.uuid not in bench.connection.lookupByUUIDString(spec.uuid).XMLDesc(2)


def test_two_workers_with_one_folder_hand_a_volume_on(bench: Bench, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "two").mkdir()
    other = Bench(tmp_path / "two")
    other.host.blocks_dir.rmdir()
    other.host.blocks_dir.symlink_to(bench.host.blocks_dir)
    assert bench.agent.heartbeat().features["pool"] == other.agent.heartbeat().features["pool"]
    made = volume()
    ask(bench, Kind.VOLUME_ALLOCATE, volume=made)
    spec = other.launched(name="far")
    assert ask(other, Kind.ATTACH, with_volume(spec, made), volume=made, slot=1).facts["attached"] is True
    ask(other, Kind.DETACH, later(with_volume(spec, made), volumes=()), volume=made, slot=1)
    larger = volume(uuid=made.uuid, generation=2, size_bytes=128 * MIB)
    assert ask(other, Kind.VOLUME_RESIZE, volume=larger).facts["size_bytes"] == 128 * MIB
    # What one has done, the other knows: a message that was late changes nothing and brings nothing back.
    assert ask(bench, Kind.VOLUME_RESIZE, volume=made).fault is Fault.CONFLICT
    assert ask(other, Kind.VOLUME_REMOVE, volume=larger).phase is Phase.SUCCEEDED
    assert ask(bench, Kind.VOLUME_ALLOCATE, volume=made).fault is Fault.CONFLICT
    assert not [name for name in bench.files() if name.startswith(made.uuid)]
    other.connection.close()


def test_clone_and_export_want_a_disk_that_keeps_still(bench: Bench) -> None:  # noqa: F811
    spec, copy, image = bench.launched(), instance(name="two"), ImageSpec(str(uuid.uuid4()))
    for kind, target, more in ((Kind.CLONE, copy, {"source": spec.uuid}), (Kind.EXPORT, spec, {"image": image})):
        assert ask(bench, kind, target, **more).fault is Fault.CONFLICT
    bench.do(Kind.STOP, spec, graceful_seconds=0)
    for _ in range(2):
        last = ask(bench, Kind.CLONE, copy, source=spec.uuid)
        assert last.facts["domain"]["power"] == "stopped" and last.facts["domain"]["uuid"] == copy.uuid, last
        assert ask(bench, Kind.EXPORT, spec, image=image).facts["virtual_bytes"] == GIB
    assert bench.host.image_path(image.uuid).is_file()
    for _ in range(2):
        assert ask(bench, Kind.IMAGE_REMOVE, image=image).phase is Phase.SUCCEEDED
    assert list(bench.host.images_dir.iterdir()) == []
    assert ask(bench, Kind.CLONE, copy, source="../../etc/passwd").fault is Fault.INVALID


def test_an_import_from_the_inside_is_refused_in_words(bench: Bench) -> None:  # noqa: F811
    image = ImageSpec(str(uuid.uuid4()), url="http://169.254.169.254/latest/", largest_bytes=GIB)
    last = ask(bench, Kind.IMAGE_IMPORT, image=image)
    assert last.fault is Fault.INVALID and "not on the public internet" in last.message
    assert list(bench.host.images_dir.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [{"filesystem": "ntfs"}, {"size_bytes": MIB}, {"name": "-L/etc"}, {"uuid": "../x"}, {"format": "vmdk"},
     {"filesystem": "xfs"}, {"size_bytes": 64 * MIB + 512}],
)  # fmt: skip
def test_a_volume_that_can_t_be_is_no_message(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        volume(**change)


def test_two_volumes_in_one_slot_are_no_instance() -> None:
    disks = tuple(DiskSpec(str(uuid.uuid4()), GIB, "raw", slot=1) for _ in range(2))
    with pytest.raises(ModelError, match="a slot of its own"):
        instance(volumes=disks)


def exchange(headers: list[tuple[bytes, bytes]], pieces: list[bytes]) -> tuple[list[int], int]:
    """Statuses that were answered, and the bytes that the application got, of one request."""
    statuses: list[int] = []
    got = 0

    async def application(_scope: Any, receive: Any, send: Any) -> None:
        nonlocal got
        while (message := await receive())["type"] == "http.request":
            got += len(message["body"])
            if not message["more_body"]:
                await send({"type": "http.response.start", "status": 200})
                return

    async def receive() -> Any:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    asyncio.run(bounded(application)({"type": "http", "headers": headers}, receive, send))
    return statuses, got


def test_a_body_is_bounded_before_anybody_is_asked_who_sends_it() -> None:
    assert exchange([(b"content-length", b"3")], [b"abc"]) == ([200], 3)
    for length in (b"%d" % (BODY_BYTES_MAX + 1), b"-1", b"x"):
        assert exchange([(b"content-length", length)], [b"abc"]) == ([413], 0)
    # Without a length, in chunks that never end.
    statuses, got = exchange([], [bytes(MIB)] * 100)
    assert statuses == [] and got <= BODY_BYTES_MAX


def test_the_worker_s_configuration_names_networks(tmp_path: Path) -> None:
    from recvirt.nestedcloud.worker.service import ConfigError, load

    path = tmp_path / "worker.toml"
    lines = [f'{name} = "{uuid.uuid4()}"' for name in ("uuid", "cloud")]
    lines += [f'{name} = "x"' for name in ("name", "broker", "libvirt", "images_dir", "blocks_dir", "run_dir")]
    path.write_text("\n".join([*lines, 'domain_type = "test"', 'fetch_allow = ["10.1.0.0/16"]']))
    assert [str(network) for network in load(path).fetch_networks] == ["10.1.0.0/16"]
    path.write_text(path.read_text().replace("10.1.0.0/16", "10.1.0.1/16"))
    with pytest.raises(ConfigError, match="host bits"):
        load(path)
