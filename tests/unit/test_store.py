"""The cache: an output is whole or absent, keys follow their inputs, and two builders don't disturb each other."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from recvirt.errors import LockedError, VerificationError
from recvirt.store import MANIFEST, FileRef, Output, Store, Upstream, canonical, key_of, remove_tree
from recvirt.ui import reporter


@dataclass(frozen=True)
class Inner:
    names: tuple[str, ...] = ("a", "b")


@dataclass(frozen=True)
class Inputs:
    text: str = "t"
    number: int = 1
    flag: bool = False
    nothing: str | None = None
    inner: Inner = Inner()
    table: dict[str, str] = field(default_factory=lambda: {"k": "v"})
    file: FileRef = field(default_factory=lambda: FileRef("f", "0" * 64, Path("/somewhere")))
    upstream: Upstream = field(default_factory=lambda: Upstream("kernel_build", "k1"))
    ignored: str = field(default="x", metadata={"key": False})


def key(inputs: Any, stage: str = "s", revision: int = 1) -> str:
    return key_of(stage, revision, inputs)


@pytest.mark.parametrize(
    "change",
    [
        {"text": "u"}, {"number": 2}, {"flag": True}, {"nothing": ""}, {"inner": Inner(("b", "a"))},
        {"inner": Inner(("a", "b", "c"))}, {"table": {"k": "w"}}, {"table": {"k": "v", "l": ""}},
        {"file": FileRef("f", "1" * 64, Path("/somewhere"))}, {"file": FileRef("g", "0" * 64, Path("/somewhere"))},
        {"upstream": Upstream("kernel_build", "k2")}, {"upstream": Upstream("root", "k1")},
    ],
)  # fmt: skip
def test_every_input_changes_the_key(change: dict[str, Any]) -> None:
    assert key(dataclasses.replace(Inputs(), **change)) != key(Inputs())


def test_stage_and_revision_change_the_key() -> None:
    assert len({key(Inputs()), key(Inputs(), stage="t"), key(Inputs(), revision=2)}) == 3


def test_what_does_not_count_does_not_change_the_key() -> None:
    same = dataclasses.replace(
        Inputs(), file=FileRef("f", "0" * 64, Path("/elsewhere")), ignored="y", table=dict(reversed([("k", "v")]))
    )
    assert key(same) == key(Inputs())


def test_the_key_is_stable_across_processes() -> None:
    code = "from recvirt.store import key_of; print(key_of('s', 1, {'b': 1, 'a': [True, None, 'x']}))"
    said = {
        subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, text=True)
        for seed in ("1", "2")
    }
    assert len(said) == 1


def test_values_that_have_no_stable_picture_are_refused() -> None:
    for value in ({"x"}, object(), Path("/x"), b"x"):
        with pytest.raises(TypeError):
            canonical({"k": value})


def test_a_file_counts_by_its_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("same")
    two.write_text("same")
    assert FileRef.of(one, "n") == FileRef.of(two, "n")
    two.write_text("other")
    assert FileRef.of(one, "n") != FileRef.of(two, "n")


# --- outputs


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What recvirt tells the person."""
    stream = io.StringIO()
    monkeypatch.setattr(reporter, "stream", stream)
    return stream


def build(store: Store, content: str = "data", stage: str = "s", name: str = "k", label: str = "p") -> Output:
    with store.lock(stage, name):
        work = store.fresh_work_dir(stage, name)
        (work / "out").mkdir()
        (work / "out" / "file").write_text(content)
        return store.commit(stage, name, work, label=label, inputs={"content": content}, seconds=1.0)


def test_a_committed_output_is_found_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.get("s", "k") is None
    build(store)
    output = store.get("s", "k")
    assert output is not None
    assert output.path("file").read_text() == "data"
    assert output.manifest["inputs"] == {"content": "data"}
    assert output.manifest["outputs"]["file"]["bytes"] == 4
    assert not (tmp_path / "work" / "s-k").exists()
    store.verify(output)


@pytest.mark.parametrize("damage", ["cut", "gone", "grown"])
def test_a_damaged_output_is_not_used(tmp_path: Path, damage: str, said: io.StringIO) -> None:
    store = Store(tmp_path)
    path = build(store).path("file")
    if damage == "gone":
        path.unlink()
    else:
        path.write_text("d" if damage == "cut" else "data and more")
    assert store.get("s", "k") is None
    assert "damaged" in said.getvalue()
    build(store, "again")
    output = store.get("s", "k")
    assert output is not None
    assert output.path("file").read_text() == "again"


def test_a_changed_byte_is_found_by_verify(tmp_path: Path) -> None:
    store = Store(tmp_path)
    output = build(store)
    output.path("file").write_text("Data")
    with pytest.raises(VerificationError):
        store.verify(output)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"outputs": 5}', "{}"])
def test_a_manifest_that_makes_no_sense_is_no_output(tmp_path: Path, content: str) -> None:
    store = Store(tmp_path)
    build(store)
    (store.object_dir("s", "k") / MANIFEST).write_text(content)
    assert store.get("s", "k") is None


def test_latest_is_the_one_used_last(tmp_path: Path) -> None:
    store = Store(tmp_path)
    build(store, name="k1")
    build(store, name="k2")
    build(store, name="other", label="q")
    for name, seconds in (("k1", 100), ("k2", 50), ("other", 200)):
        os.utime(store.object_dir("s", name) / MANIFEST, (seconds, seconds))
    latest = store.latest("s", "p")
    assert latest is not None
    assert latest.key == "k1"
    assert store.latest("s", "nobody") is None
    assert store.latest("t", "p") is None


def test_a_fresh_work_folder_is_empty_whatever_was_left(tmp_path: Path) -> None:
    store = Store(tmp_path)
    left = store.fresh_work_dir("s", "k")
    (left / "deep").mkdir()
    (left / "deep" / "file").write_text("")
    (left / "deep").chmod(0o500)
    assert list(store.fresh_work_dir("s", "k").iterdir()) == []


def test_remove_tree_takes_read_only_folders(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "file").write_text("")
    for folder in (deep, deep.parent):
        folder.chmod(0o555)
    remove_tree(tmp_path / "a")
    assert not (tmp_path / "a").exists()


# --- killed builders, and two at once

_BUILDER = """
import os, sys, time
from pathlib import Path
from recvirt import store as module
from recvirt.store import Store
store = Store(Path(sys.argv[1]))
moment = sys.argv[2]
def hang(*_args, **_kw):
    print("there", flush=True)
    time.sleep(60)
if moment == "manifest":
    module.json.dump = hang
elif moment == "sync":
    os.fsync = hang
elif moment == "rename":
    Path.rename = hang
with store.lock("s", "k"):
    work = store.fresh_work_dir("s", "k")
    (work / "out").mkdir()
    (work / "out" / "file").write_text("half")
    if moment == "build":
        hang()
    store.commit("s", "k", work, label="p", inputs={}, seconds=1.0)
"""


def builder_at(store: Store, moment: str) -> subprocess.Popen[str]:
    """Another process that holds the lock and has come to ``moment`` of its build."""
    argv = [sys.executable, "-c", _BUILDER, str(store.directory), moment]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    return process


@pytest.mark.parametrize("moment", ["build", "manifest", "sync", "rename"])
def test_a_builder_killed_at_any_moment_leaves_nothing_half(tmp_path: Path, moment: str) -> None:
    store = Store(tmp_path)
    process = builder_at(store, moment)
    process.kill()
    process.wait()
    assert store.get("s", "k") is None
    # The lock died with it, and the next builder starts from nothing.
    build(store, "whole")
    output = store.get("s", "k")
    assert output is not None
    assert output.path("file").read_text() == "whole"
    assert list((tmp_path / "work").iterdir()) == []


def test_the_second_builder_waits_and_says_so(tmp_path: Path, said: io.StringIO) -> None:
    store = Store(tmp_path)
    process = builder_at(store, "build")
    entered = threading.Event()

    def second() -> None:
        with store.lock("s", "k"):
            entered.set()

    thread = threading.Thread(target=second)
    try:
        with pytest.raises(LockedError), store.lock("s", "k", wait=False):
            pass
        thread.start()
        assert not entered.wait(0.3)
        assert "waiting for another recvirt" in said.getvalue()
        with store.lock("s", "another"):
            pass  # another key is free
    finally:
        process.kill()
        process.wait()
    assert entered.wait(10)
    thread.join()


def test_a_lock_outlives_neither_its_holder_nor_an_error(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(RuntimeError), store.lock("s", "k"):
        raise RuntimeError
    with store.lock("s", "k", wait=False):
        pass


def test_use_keeps_an_output_young(tmp_path: Path) -> None:
    store = Store(tmp_path)
    manifest = build(store).directory / MANIFEST
    os.utime(manifest, (100, 100))
    store.get("s", "k")
    assert manifest.stat().st_mtime > time.time() - 100


def test_the_manifest_is_readable_by_people(tmp_path: Path) -> None:
    manifest = json.loads((build(Store(tmp_path)).directory / MANIFEST).read_text())
    assert {"stage", "key", "label", "inputs", "outputs", "seconds", "created"} <= set(manifest)
