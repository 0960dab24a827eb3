"""Volumes and images with the real programs: qemu-img, mkfs, e2fsck, resize2fs; and one guest under a real libvirtd."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest

from recvirt.nestedcloud import spool
from recvirt.nestedcloud.model import GIB, MIB, DiskSpec, Fault, ImageSpec, VolumeSpec
from recvirt.nestedcloud.worker.errors import ActionError
from recvirt.nestedcloud.worker.host import Host
from recvirt.nestedcloud.worker.images import QemuImages
from recvirt.nestedcloud.worker.storage import Limits, QemuStorage, run_tool
from recvirt.nestedcloud.worker.volumes import QemuVolumes
from tests.cloud.support import instance

os.environ["PATH"] += ":/usr/sbin:/sbin"
_TOOLS = ("qemu-img", "mkfs.ext4", "mkfs.xfs", "e2fsck", "resize2fs", "prlimit")
pytestmark = pytest.mark.skipif(any(shutil.which(tool) is None for tool in _TOOLS), reason=f"wants {', '.join(_TOOLS)}")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(
        str(uuid.uuid4()), "qemu", tmp_path / "images", tmp_path / "blocks", log_dir=tmp_path,
        spool_dir=tmp_path / "spool",
    )  # fmt: skip
    for folder in (made.images_dir, made.blocks_dir, tmp_path / "spool"):
        folder.mkdir()
    return made


def volume(size_bytes: int = 64 * MIB, **values: Any) -> VolumeSpec:
    given = {"uuid": str(uuid.uuid4()), "name": "data", "generation": 1, "filesystem": "ext4", **values}
    return VolumeSpec(size_bytes=size_bytes, **given)


def later(spec: VolumeSpec, **changes: Any) -> VolumeSpec:
    return VolumeSpec(**{**vars(spec), "generation": spec.generation + 1, **changes})


def operation() -> str:
    return str(uuid.uuid4())


def info(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_tool(["qemu-img", "info", "--output=json", str(path)]))
    return found


def raw_copy(path: Path, target: Path) -> Path:
    run_tool(["qemu-img", "convert", "-O", "raw", str(path), str(target)])
    return target


def ext4_fields(path: Path) -> dict[str, str]:
    text = run_tool(["dumpe2fs", "-h", str(path)])
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def ext4_bytes(path: Path) -> int:
    fields = ext4_fields(path)
    return int(fields["Block count"]) * int(fields["Block size"])


def put_into(path: Path, name: str, text: str) -> None:
    """A file into an ext4, as a guest would."""
    source = path.with_name("content")
    source.write_text(text)
    run_tool(["debugfs", "-w", "-R", f"write {source} {name}", str(path)])
    source.unlink()


def read_out(path: Path, name: str) -> str:
    return run_tool(["debugfs", "-R", f"cat {name}", str(path)])


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_an_ext4_is_made_with_its_label_and_grows_with_what_is_in_it(host: Host, tmp_path: Path, kind: str) -> None:
    volumes = QemuVolumes(host)
    spec = volume(format=kind, name="a-rather-long-name-for-a-label")
    for _ in range(2):
        volumes.make(spec, operation())
    path = host.disk_path(spec.uuid, kind)
    assert info(path)["format"] == ("raw" if kind == "raw" else "qcow2") and volumes.size(spec) == 64 * MIB
    plain = path if kind == "raw" else raw_copy(path, tmp_path / "plain")
    fields = ext4_fields(plain)
    assert (fields["Filesystem volume name"], fields["Filesystem UUID"]) == ("a-rather-long-na", spec.uuid)
    if kind == "raw":
        put_into(path, "kept", "still here")
    for _ in range(2):
        assert volumes.grow(later(spec, size_bytes=128 * MIB), operation()) == "with its file system"
    plain = path if kind == "raw" else raw_copy(path, tmp_path / "larger")
    assert volumes.size(spec) == 128 * MIB == ext4_bytes(plain)
    run_tool(["e2fsck", "-f", "-n", str(plain)])
    if kind == "raw":
        assert read_out(path, "kept") == "still here"
    assert sorted(item.name for item in host.blocks_dir.iterdir()) == [f"{spec.uuid}.json", path.name]


def test_an_xfs_is_made_and_its_guest_grows_it(host: Host) -> None:
    volumes = QemuVolumes(host)
    spec = volume(320 * MIB, filesystem="xfs", name="a-rather-long-name")
    volumes.make(spec, operation())
    with host.disk_path(spec.uuid, "raw").open("rb") as stream:
        superblock = stream.read(120)
    # XFS Algorithms & Data Structures: magic, UUID at 32, label at 108.
    assert superblock[:4] == b"XFSB" and superblock[32:48] == uuid.UUID(spec.uuid).bytes
    assert superblock[108:120] == b"a-rather-lon"
    assert "xfs_growfs" in volumes.grow(later(spec, size_bytes=400 * MIB), operation())
    assert volumes.size(spec) == 400 * MIB


def test_a_volume_that_is_smaller_than_asked_stays(host: Host) -> None:
    volumes = QemuVolumes(host)
    spec = volume()
    volumes.make(spec, operation())
    with pytest.raises(ActionError, match="smaller"):
        volumes.grow(later(spec, size_bytes=32 * MIB), operation())


def test_what_a_guest_wrote_over_its_file_system_is_left(host: Host) -> None:
    volumes = QemuVolumes(host)
    spec = volume()
    volumes.make(spec, operation())
    with host.disk_path(spec.uuid, "raw").open("r+b") as stream:
        stream.write(b"\xff" * MIB)
    how = volumes.grow(later(spec, size_bytes=128 * MIB), operation())
    assert how.startswith("its file system was left as it is (e2fsck") and volumes.size(spec) == 128 * MIB


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_snapshot_brings_back_what_was_in_it(host: Host, tmp_path: Path, kind: str) -> None:
    volumes = QemuVolumes(host)
    spec = volume(format=kind)
    volumes.make(spec, operation())
    path = host.disk_path(spec.uuid, kind)

    def digest() -> str:
        return hashlib.sha256(raw_copy(path, tmp_path / "look").read_bytes()).hexdigest()

    def scribble(byte: int) -> None:
        run_tool(["qemu-io", "-f", kind, "-c", f"write -P {byte} 32M 64k", str(path)])

    scribble(1)
    before = digest()
    for _ in range(2):
        volumes.snapshot(later(spec), "before", operation())
    scribble(2)
    assert digest() != before
    back, again = operation(), later(later(spec))
    volumes.revert(again, "before", back)
    assert digest() == before
    # The same message again, after the guest went on: done once.
    scribble(3)
    after = digest()
    volumes.revert(again, "before", back)
    assert digest() == after
    with pytest.raises(ActionError, match="no snapshot called absent"):
        volumes.revert(again, "absent", operation())
    # A message that is older than what was done since.
    with pytest.raises(ActionError, match="changed since"):
        volumes.revert(spec, "before", operation())
    for _ in range(2):
        volumes.remove_snapshot(again, "before", operation())
    with pytest.raises(ActionError, match="no snapshot called before"):
        volumes.revert(again, "before", operation())
    for _ in range(2):
        volumes.remove(again)
    assert list(host.blocks_dir.iterdir()) == []


def uploaded(host: Host, data: bytes, **values: Any) -> ImageSpec:
    assert host.spool_dir is not None
    spec = ImageSpec(str(uuid.uuid4()), **{"largest_bytes": GIB, **values})
    (host.spool_dir / f"{spec.uuid}.upload").write_bytes(data)
    return spec


def bring_in(host: Host, spec: ImageSpec) -> dict[str, Any]:
    return QemuImages(host).bring_in(spec, lambda _percent, _text: None)


def qcow2(tmp_path: Path, *options: str, size: str = "64M") -> Path:
    path = tmp_path / f"{uuid.uuid4()}.qcow2"
    run_tool(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), size])
    return path


def test_an_image_is_written_anew(host: Host, tmp_path: Path) -> None:
    path = qcow2(tmp_path)
    run_tool(["qemu-io", "-c", "write -P 7 1M 64k", str(path)])
    run_tool(["qemu-img", "snapshot", "-c", "the-uploader-s", str(path)])
    spec = uploaded(host, path.read_bytes())
    facts = bring_in(host, spec)
    assert facts == {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "virtual_bytes": 64 * MIB}
    made = host.image_path(spec.uuid)
    assert "snapshots" not in info(made) and "backing-filename" not in info(made)
    run_tool(["qemu-img", "compare", str(path), str(made)])
    # The upload is gone, and the same message again finds the work done.
    assert host.spool_dir is not None and list(host.spool_dir.iterdir()) == []
    assert bring_in(host, spec) == facts
    assert sorted(item.name for item in host.images_dir.iterdir()) == [f"{spec.uuid}.json", f"{spec.uuid}.qcow2"]
    QemuImages(host).remove(spec.uuid)
    assert list(host.images_dir.iterdir()) == []


def test_a_raw_image_that_begins_like_a_qcow2_stays_raw(host: Host, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s" * MIB)
    evil = qcow2(tmp_path, "-F", "raw", "-b", str(tmp_path / "secret"), size="1M")
    spec = uploaded(host, evil.read_bytes(), format="raw")
    bring_in(host, spec)
    inside = raw_copy(host.image_path(spec.uuid), tmp_path / "inside").read_bytes()
    assert inside[:4] == b"QFI\xfb" and b"ssss" not in inside


def backing(tmp_path: Path, name: str) -> bytes:
    """A qcow2 of qemu-img's own whose header names another file, whatever it is."""
    data = bytearray(qcow2(tmp_path).read_bytes())
    at = 4096
    data[at : at + len(name)] = name.encode()
    struct.pack_into(">QI", data, 8, at, len(name))
    return bytes(data)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd", 'json:{"driver":"file","filename":"/etc/shadow"}', "nbd://127.0.0.1:10809/x", "../../x",
        "http://169.254.169.254/latest/meta-data/", "fat:rw:/etc",
    ],
)  # fmt: skip
def test_an_image_that_names_another_file_never_gets_to_qemu_img(host: Host, tmp_path: Path, name: str) -> None:
    ran: list[Any] = []

    def run(*argv: Any, **_: Any) -> str:
        ran.append(argv)
        return ""

    spec = uploaded(host, backing(tmp_path, name))
    with pytest.raises(ActionError, match="backing file") as caught:
        QemuImages(host, run).bring_in(spec, lambda _percent, _text: None)
    assert caught.value.fault is Fault.INVALID and ran == []
    assert list(host.images_dir.iterdir()) == []


def test_an_image_with_an_external_data_file_is_refused(host: Host, tmp_path: Path) -> None:
    path = qcow2(tmp_path, "-o", f"data_file={tmp_path}/outside.raw")
    with pytest.raises(ActionError, match="external data file"):
        bring_in(host, uploaded(host, path.read_bytes()))


@pytest.mark.parametrize(("claimed", "words"), [(2**63 - 512, "it claims"), (2 * GIB, "it claims"), (0, "it claims")])
def test_an_image_that_claims_too_much_is_refused(host: Host, tmp_path: Path, claimed: int, words: str) -> None:
    data = bytearray(qcow2(tmp_path).read_bytes())
    struct.pack_into(">Q", data, 24, claimed)
    with pytest.raises(ActionError, match=words):
        bring_in(host, uploaded(host, bytes(data)))


def test_a_sparse_raw_of_terabytes_is_not_copied_to_its_end(host: Host) -> None:
    spec = uploaded(host, b"", format="raw")
    assert host.spool_dir is not None
    with (host.spool_dir / f"{spec.uuid}.upload").open("wb") as stream:
        stream.truncate(4 * 1024 * GIB)
    with pytest.raises(ActionError, match="more than 67108864 bytes"):
        bring_in(host, ImageSpec(spec.uuid, "raw", largest_bytes=64 * MIB))
    assert list(host.images_dir.iterdir()) == []


@pytest.mark.parametrize("damage", ["table", "cut"])
def test_a_cut_off_or_damaged_image_is_refused(host: Host, tmp_path: Path, damage: str) -> None:
    path = qcow2(tmp_path)
    run_tool(["qemu-io", "-c", "write -P 7 1M 512k", str(path)])
    data = bytearray(path.read_bytes())
    if damage == "table":
        # The table of the first level lies far behind the file's end.
        struct.pack_into(">Q", data, 40, 1 << 50)
    else:
        del data[-256 * 1024 :]
    with pytest.raises(ActionError, match="the image is refused: qemu-img") as caught:
        bring_in(host, uploaded(host, bytes(data)))
    assert caught.value.fault is Fault.INVALID and list(host.images_dir.iterdir()) == []


def test_a_wrong_digest_is_refused_with_the_right_one(host: Host, tmp_path: Path) -> None:
    data = qcow2(tmp_path).read_bytes()
    with pytest.raises(ActionError, match=hashlib.sha256(data).hexdigest()):
        bring_in(host, uploaded(host, data, sha256="0" * 64))


def test_a_link_in_the_spool_is_not_followed(host: Host, tmp_path: Path) -> None:
    spec = uploaded(host, b"")
    assert host.spool_dir is not None
    link = host.spool_dir / f"{spec.uuid}.upload"
    link.unlink()
    link.symlink_to(qcow2(tmp_path))
    with pytest.raises(spool.SpoolError, match="can't be opened"):
        bring_in(host, spec)
    assert list(host.images_dir.iterdir()) == []


def test_a_program_that_reads_a_stranger_s_file_is_bounded(tmp_path: Path) -> None:
    target = tmp_path / "large"
    with pytest.raises(ActionError):
        run_tool(["dd", "if=/dev/zero", f"of={target}", "bs=1M", "count=16"], limits=Limits(file_bytes=MIB))
    assert target.stat().st_size == MIB
    with pytest.raises(ActionError):
        run_tool(["python3", "-c", "x = bytearray(1 << 30)"], limits=Limits(MIB, memory_bytes=256 * MIB))


def test_a_clone_copies_only_what_differs_and_an_export_stands_alone(host: Host, tmp_path: Path) -> None:
    images, spec = QemuImages(host), uploaded(host, qcow2(tmp_path).read_bytes())
    bring_in(host, spec)
    one = instance(root=DiskSpec(str(uuid.uuid4()), 64 * MIB, image=spec.uuid))
    one = instance(uuid=one.root.uuid, root=one.root)
    QemuStorage(host).ensure_root(one)
    run_tool(["qemu-io", "-c", "write -P 9 2M 64k", str(host.disk_path(one.uuid, "qcow2"))])
    key = str(uuid.uuid4())
    two = instance(uuid=key, root=DiskSpec(key, 64 * MIB, image=spec.uuid))
    for _ in range(2):
        images.clone(one.uuid, two)
    copy = host.disk_path(two.uuid, "qcow2")
    assert info(copy)["backing-filename"] == str(host.image_path(spec.uuid)) and copy.stat().st_size < 2 * MIB
    run_tool(["qemu-img", "compare", str(host.disk_path(one.uuid, "qcow2")), str(copy)])
    exported = ImageSpec(str(uuid.uuid4()))
    for _ in range(2):
        assert images.export(one, exported) == {"virtual_bytes": 64 * MIB}
    made = host.image_path(exported.uuid)
    assert "backing-filename" not in info(made)
    run_tool(["qemu-img", "compare", str(host.disk_path(one.uuid, "qcow2")), str(made)])


def test_a_disk_in_use_by_qemu_is_not_written_to(host: Host) -> None:
    volumes = QemuVolumes(host)
    spec = volume(format="qcow2", filesystem="none")
    volumes.make(spec, operation())
    path = host.disk_path(spec.uuid, "qcow2")
    holder = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdin.write("length\n")
        holder.stdin.flush()
        holder.stdout.readline()
        with pytest.raises(ActionError, match="lock"):
            volumes.grow(later(spec, size_bytes=128 * MIB), operation())
        with pytest.raises(ActionError, match="lock"):
            volumes.snapshot(later(spec), "a", operation())
    finally:
        holder.communicate("quit\n")
