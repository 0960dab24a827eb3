"""What lands in build/<profile>/: whole, current, and no way back into the cache."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from recvirt import products
from recvirt.errors import RecvirtError
from recvirt.products import built_image, disk_is_full, link_or_copy, publish
from recvirt.store import Output, Store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "build" / "p"
    made.mkdir(parents=True)
    return made


@pytest.fixture(params=["user", "root"])
def who(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of publishing, whoever runs the tests."""
    monkeypatch.setattr(os, "geteuid", lambda: 0 if request.param == "root" else 1000)
    return str(request.param)


def make(tmp_path: Path, key: str, files: Mapping[str, str], stage: str = "image") -> Output:
    store = Store(tmp_path / "cache")
    with store.lock(stage, key):
        work = store.fresh_work_dir(stage, key)
        (work / "out").mkdir()
        for name, text in files.items():
            (work / "out" / name).write_text(text)
        return store.commit(stage, key, work, label="p", inputs={}, seconds=0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_products_appear_under_their_names(tmp_path: Path, folder: Path, who: str) -> None:
    image = make(tmp_path, "k", {"disk.qcow2": "disk", "image.json": "{}", "sources.txt": "s", "scratch.bin": "no"})
    config = make(tmp_path, "k", {"config": "c", "report.json": "{}", "other": "no"}, "kernel_config")
    root = make(tmp_path, "k", {"root.tar": "tar", "packages.json": "[]"}, "root")
    paths = publish({"image": image, "kernel_config": config, "root": root}, folder)
    wanted = ["disk.qcow2", "image.json", "kernel_config-config", "kernel_config-report.json", "sources.txt"]
    assert names(folder) == wanted == [path.name for path in paths]
    assert (folder / "disk.qcow2").read_text() == "disk"


def test_writing_into_a_product_does_not_damage_the_cache(tmp_path: Path, folder: Path, who: str) -> None:
    store = Store(tmp_path / "cache")
    image = make(tmp_path, "k", {"disk.raw": "pristine"})
    publish({"image": image}, folder)
    product = folder / "disk.raw"
    if who == "user":
        assert product.stat().st_mode & 0o222 == 0, "a link to the cache can't be written to"
        product.chmod(0o644)  # unless somebody insists
    with product.open("r+") as stream:
        stream.write("damage!!")
    if who == "root":
        assert image.path("disk.raw").read_text() == "pristine"
        assert store.get("image", "k") is not None
    else:
        assert store.get("image", "k") is None, "it is noticed"
        image = make(tmp_path, "k", {"disk.raw": "pristine"})
    publish({"image": image}, folder)
    assert product.read_text() == "pristine"


def test_what_is_current_is_left_alone(tmp_path: Path, folder: Path, who: str) -> None:
    image = make(tmp_path, "k", {"disk.raw": "x"})
    publish({"image": image}, folder)
    before = (folder / "disk.raw").stat()
    publish({"image": image}, folder)
    after = (folder / "disk.raw").stat()
    assert (before.st_ino, before.st_ctime_ns) == (after.st_ino, after.st_ctime_ns)
    assert not [path for path in folder.iterdir() if "part" in path.name]


def test_a_format_that_is_no_longer_made_goes(tmp_path: Path, folder: Path, who: str) -> None:
    publish({"image": make(tmp_path, "k1", {"disk.qcow2": "q", "disk.vmdk": "v"})}, folder)
    (folder / "notes.txt").write_text("a person's own")
    publish({"image": make(tmp_path, "k2", {"disk.raw": "r"})}, folder)
    assert names(folder) == ["disk.raw", "notes.txt"]
    assert built_image("p", folder.parent) == folder / "disk.raw"


def test_a_build_that_stops_early_keeps_the_later_products(tmp_path: Path, folder: Path) -> None:
    publish({"image": make(tmp_path, "k", {"disk.raw": "r"})}, folder)
    publish({"kernel_config": make(tmp_path, "k", {"config": "c"}, "kernel_config")}, folder)
    assert names(folder) == ["disk.raw", "kernel_config-config"]
    publish({"image": make(tmp_path, "k2", {"disk.qcow2": "r"})}, folder)
    assert names(folder) == ["disk.qcow2", "kernel_config-config"]


def test_a_killed_publication_is_cleared_up_by_the_next(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish({"image": make(tmp_path, "k1", {"disk.qcow2": "old"})}, folder)
    second = make(tmp_path, "k2", {"disk.raw": "r", "disk.vmdk": "v"})

    class Killed(BaseException):
        pass

    def killed(source: Path, target: Path) -> None:
        if source.name == "disk.vmdk":
            raise Killed
        link_or_copy(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(products, "link_or_copy", killed)
        publish({"image": second}, folder)
    assert names(folder) == ["disk.qcow2", "disk.raw"]
    (folder / ".disk.vmdk.part-1-2").write_text("half")
    publish({"image": make(tmp_path, "k3", {"disk.vhd": "h"})}, folder)
    assert names(folder) == ["disk.vhd"], "also what the killed one had made"
    assert not list(folder.glob(".disk*"))


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"image": 5}', '{"image": ["../../precious", "/precious"]}'])
def test_a_list_that_makes_no_sense_takes_nothing_away(tmp_path: Path, folder: Path, text: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("p")
    (folder / "precious.txt").write_text("p")
    (folder / ".products.json").write_text(text)
    publish({"image": make(tmp_path, "k", {"disk.raw": "r"})}, folder)
    assert precious.exists()
    assert names(folder) == ["disk.raw", "precious.txt"]
    assert json.loads((folder / ".products.json").read_text()) == {"image": ["disk.raw"]}


def test_two_publications_at_once(tmp_path: Path, folder: Path, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = [make(tmp_path, f"k{i}", {"disk.raw": str(i) * 1000, "image.json": str(i)}) for i in range(2)]
    halfway = threading.Event()

    def slow(source: Path, target: Path) -> None:
        link_or_copy(source, target)
        if source == outputs[0].path("disk.raw"):
            # The second one has every chance to come in between.
            halfway.set()
            time.sleep(0.5)

    monkeypatch.setattr(products, "link_or_copy", slow)
    first = threading.Thread(target=publish, args=({"image": outputs[0]}, folder))
    first.start()
    assert halfway.wait(20)
    publish({"image": outputs[1]}, folder)
    first.join()
    assert (folder / "disk.raw").read_text() == "1" * 1000
    assert (folder / "image.json").read_text() == "1", "all files are of one build"
    assert outputs[0].path("disk.raw").read_text() == "0" * 1000


def test_many_publications_at_once_leave_the_cache_alone(tmp_path: Path, folder: Path, who: str) -> None:
    outputs = [make(tmp_path, f"k{i}", {"disk.raw": str(i) * 1000}) for i in range(4)]
    errors: list[BaseException] = []

    def work(output: Output) -> None:
        try:
            for _ in range(10):
                link_or_copy(output.path("disk.raw"), folder / "disk.raw")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(output,)) for output in outputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert names(folder) == ["disk.raw"]
    for i, output in enumerate(outputs):
        assert output.path("disk.raw").read_text() == str(i) * 1000


def test_another_file_system_gets_copies(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "link", refuse)
    image = make(tmp_path, "k", {"disk.raw": "content"})
    publish({"image": image}, folder)
    assert (folder / "disk.raw").read_text() == "content"
    assert (folder / "disk.raw").stat().st_ino != image.path("disk.raw").stat().st_ino
    before = (folder / "disk.raw").stat().st_ino
    publish({"image": image}, folder)
    assert (folder / "disk.raw").stat().st_ino == before


@pytest.mark.parametrize("clone", [True, False])
def test_a_sparse_file_stays_sparse_and_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clone: bool) -> None:
    if not clone:

        def refuse(*args: Any) -> None:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        monkeypatch.setattr("fcntl.ioctl", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as stream:
        stream.write(b"head")
        stream.seek(64 << 20)
        stream.write(b"middle" * 100_000)
        stream.truncate(200 << 20)
    link_or_copy(source, target)
    assert target.stat().st_size == 200 << 20
    assert target.stat().st_blocks <= source.stat().st_blocks + 64
    with source.open("rb") as one, target.open("rb") as two:
        while block := one.read(1 << 20):
            assert block == two.read(1 << 20)


@pytest.mark.parametrize("size", [0, 1, 4096])
def test_small_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (tmp_path / "source").write_bytes(b"x" * size)
    link_or_copy(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"x" * size


def test_a_failing_copy_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("fcntl.ioctl", full)
    monkeypatch.setattr(os, "sendfile", full)
    (tmp_path / "source").write_text("new")
    (tmp_path / "target").write_text("older")
    with pytest.raises(OSError, match="No space left"):
        link_or_copy(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_an_image_that_was_never_built(tmp_path: Path) -> None:
    with pytest.raises(RecvirtError, match="no image of p") as caught:
        built_image("p", tmp_path)
    assert caught.value.hint == "build it: recvirt build p"


def test_a_full_disk_is_recognised(tmp_path: Path) -> None:
    assert disk_is_full(tmp_path, below_bytes=0) is None
    assert disk_is_full(tmp_path / "gone", tmp_path, below_bytes=10**18) == tmp_path
