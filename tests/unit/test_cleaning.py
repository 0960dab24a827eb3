"""Cleaning the cache: by age, by size, on request; never what somebody uses."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recvirt.cleaning import Removal, clean_cache, size_on_disk, sweep
from recvirt.store import MANIFEST, Store

DAY = 86400
BLOCK = 256 * 1024


def make(cache: Path, stage: str, key: str, *, days: float = 0, size: int = BLOCK) -> Path:
    """An output that was used last so many days ago."""
    store = Store(cache)
    with store.lock(stage, key):
        work = store.fresh_work_dir(stage, key)
        (work / "out").mkdir()
        (work / "out" / "data").write_bytes(os.urandom(size))
        output = store.commit(stage, key, work, label="p", inputs={}, seconds=0)
    used = time.time() - days * DAY
    os.utime(output.directory / MANIFEST, (used, used))
    return output.directory


def clean(
    cache: Path,
    *,
    days: float | None = None,
    max_bytes: int | None = None,
    everything: bool = False,
    tools: bool = False,
    dry_run: bool = False,
) -> list[Removal]:
    return clean_cache(
        Store(cache), days=days, max_bytes=max_bytes, everything=everything, tools=tools, dry_run=dry_run
    )


def paths(removals: list[Removal], cache: Path) -> list[str]:
    return [str(item.path.relative_to(cache)) for item in removals]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    made = tmp_path / "cache"
    for key, days in (("new", 0.0), ("week", 7.0), ("old", 40.0)):
        make(made, "root", key, days=days)
    make(made, "tools", "t", days=400)
    return made


def test_nothing_asked_removes_nothing(cache: Path) -> None:
    assert clean(cache) == []


def test_by_age(cache: Path) -> None:
    removed = clean(cache, days=30)
    assert paths(removed, cache) == ["objects/root/old"]
    assert removed[0].why == "not used for 40 days"
    assert removed[0].size_bytes >= BLOCK
    assert sorted(path.name for path in (cache / "objects/root").iterdir()) == ["new", "week"]
    assert list((cache / "work").iterdir()) == []


def test_using_an_output_keeps_it(cache: Path) -> None:
    Store(cache).get("root", "old")
    assert clean(cache, days=30) == []


def test_by_size_the_least_recently_used_goes_first(cache: Path) -> None:
    one = size_on_disk(cache / "objects/root/new")
    assert paths(clean(cache, max_bytes=3 * one), cache) == []
    assert paths(clean(cache, max_bytes=3 * one - 1), cache) == ["objects/root/old"]
    assert paths(clean(cache, max_bytes=0), cache) == ["objects/root/week", "objects/root/new"]


def test_age_comes_before_size(cache: Path) -> None:
    one = size_on_disk(cache / "objects/root/new")
    removed = clean(cache, days=30, max_bytes=one)
    assert [(path, item.why) for path, item in zip(paths(removed, cache), removed, strict=True)] == [
        ("objects/root/old", "not used for 40 days"),
        ("objects/root/week", "least recently used"),
    ]


def test_a_dry_run_tells_the_same_and_removes_nothing(cache: Path) -> None:
    told = paths(clean(cache, days=5, dry_run=True), cache)
    assert told == ["objects/root/old", "objects/root/week"]
    assert paths(clean(cache, days=5), cache) == told


def test_tools_only_when_asked_for(cache: Path) -> None:
    assert paths(clean(cache, tools=True), cache) == ["objects/tools/t"]
    assert sorted(path.name for path in (cache / "objects/root").iterdir()) == ["new", "old", "week"]


def test_everything_means_everything(cache: Path) -> None:
    for name in ("apt/trixie-1/lists", "debs", "sources", "ccache/a", "downloads"):
        (cache / name).mkdir(parents=True)
        (cache / name / "file").write_text("x")
    clean(cache, everything=True)
    left = [path for path in cache.rglob("*") if path.is_file() and path.parent.name != "locks"]
    assert left == []


def test_downloads_age_too(cache: Path) -> None:
    for name, days in (("debs/a.deb", 3), ("debs/b.deb", 50), ("debs/partial/c.deb", 50), ("downloads/d.tar", 50)):
        path = cache / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x" * 10_000)
        os.utime(path, (time.time() - days * DAY,) * 2)
    for name, days in (("apt/trixie-1", 50), ("apt/sid-2", 1)):
        (cache / name).mkdir(parents=True)
        (cache / name / "updated.json").write_text("")
        os.utime(cache / name / "updated.json", (time.time() - days * DAY,) * 2)
    assert sorted(paths(clean(cache, days=30), cache)) == [
        "apt/trixie-1", "debs/b.deb", "debs/partial/c.deb", "downloads/d.tar", "objects/root/old",
    ]  # fmt: skip


def test_an_unpacked_source_goes_as_a_whole_or_not_at_all(cache: Path) -> None:
    for name, days in (("sources/used", 1), ("sources/unused", 50)):
        (cache / name / "tree").mkdir(parents=True)
        # Its files are as old as the release.
        for path in (cache / name / "tree/Makefile", cache / name / "tree/Kconfig"):
            path.write_text("x")
            os.utime(path, (1, 1))
        (cache / name / "source.json").write_text("{}")
        os.utime(cache / name / "source.json", (time.time() - days * DAY,) * 2)
    (cache / "sources/unused.lock").write_text("")
    assert sorted(paths(clean(cache, days=30), cache)) == ["objects/root/old", "sources/unused"]
    assert sorted(path.name for path in (cache / "sources").rglob("*")) == [
        "Kconfig", "Makefile", "source.json", "tree", "unused.lock", "used",
    ]  # fmt: skip


# -- what is in use ----------------------------------------------------------------------------------------------------

_USER = """
import sys, time
from pathlib import Path
from recvirt.store import Store
store = Store(Path(sys.argv[1]))
how, name = sys.argv[2:4]
if how == "use":
    assert store.get("root", name) is not None
    if name == "old":
        store.get("tools", "t")
    store.hold("shared")
    print("there", flush=True)
    time.sleep(60)
else:
    with store.lock("root", name):
        store.fresh_work_dir("root", name)
        print("there", flush=True)
        time.sleep(60)
"""


class Other:
    """Another recvirt that uses or builds something."""

    def __init__(self, cache: Path, how: str, name: str) -> None:
        argv = [sys.executable, "-c", _USER, str(cache), how, name]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "there\n"

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_another_build_uses_is_left_alone(cache: Path, dry_run: bool) -> None:
    (cache / "debs").mkdir()
    (cache / "debs" / "a.deb").write_text("x")
    with Other(cache, "use", "old"):
        # It was used just now, but the clock is not what protects it.
        os.utime(cache / "objects/root/old" / MANIFEST, (1, 1))
        assert paths(clean(cache, everything=True, dry_run=dry_run), cache) == ["objects/root/new", "objects/root/week"]
        assert (cache / "objects/root/old/data").exists()
        assert (cache / "objects/tools/t/data").exists()
        assert (cache / "debs" / "a.deb").exists()
    removed = paths(clean(cache, everything=True, dry_run=dry_run), cache)
    assert {"objects/root/old", "objects/tools/t", "debs"} <= set(removed)


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_work_folder_goes_only_when_its_builder_is_gone(cache: Path, dry_run: bool) -> None:
    folder = cache / "work" / "root-key"
    with Other(cache, "build", "key"):
        assert clean(cache, dry_run=dry_run) == []
        sweep(Store(cache))
        assert folder.exists()
    assert [(item.path, item.why) for item in clean(cache, dry_run=dry_run)] == [(folder, "left by a killed build")]
    assert folder.exists() == dry_run


def test_sweeping_takes_leftovers_only(cache: Path) -> None:
    for name in ("root-key", "root-new.aside-1-2"):
        (cache / "work" / name / "deep").mkdir(parents=True)
    user = Store(cache)
    assert user.get("root", "new") is not None  # in use, which says nothing about an old folder that was set aside
    sweep(user)
    assert list((cache / "work").iterdir()) == []
    assert len(list((cache / "objects/root").iterdir())) == 3


@pytest.mark.parametrize("what", ["tools", "shared"])
def test_half_removed_does_not_look_whole(cache: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A clean that is killed while it deletes must not leave something that still has its manifest."""
    (cache / "sources" / "key").mkdir(parents=True)
    (cache / "sources" / "key" / "source.json").write_text("{}")

    class Killed(BaseException):
        pass

    def killed(folder: Path) -> None:
        if what == "tools" or "sources" in folder.name:
            raise Killed

    monkeypatch.setattr("recvirt.cleaning.remove_tree", killed)
    with pytest.raises(Killed):
        clean(cache, tools=what == "tools", everything=what == "shared")
    gone = cache / ("objects/tools/t" if what == "tools" else "sources/key")
    assert not gone.exists()
    monkeypatch.undo()
    sweep(Store(cache))
    assert list((cache / "work").iterdir()) == []


def test_a_link_to_another_disk_is_unlinked_not_followed(cache: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.deb").write_text("x")
    (cache / "debs").symlink_to(elsewhere)
    clean(cache, everything=True)
    assert not (cache / "debs").is_symlink()
    assert (elsewhere / "a.deb").exists()


def test_sizes_count_what_is_allocated(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as stream:
        stream.truncate(1 << 30)
    assert size_on_disk(tmp_path) < 1 << 20
    assert size_on_disk(tmp_path / "sparse") < 1 << 20
    (tmp_path / "link").symlink_to("/nowhere")
    assert size_on_disk(tmp_path / "link") < 1 << 20
