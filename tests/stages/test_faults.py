"""A real build, killed at any instant, out of disk, beside another one: nothing half is reused, nothing is left."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest

from recvirt.sandbox import ToolsRoot
from tests.support.namespace import Namespace
from tests.support.site import SMALL, Site, adopt_downloads, adopt_tools, kill_after

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(
    tools: ToolsRoot, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Site, float]]:
    """A site with the small root built undisturbed, and the seconds that took."""
    site = Site(tmp_path_factory.mktemp("reference"), uuid4().hex[:12])
    adopt_tools(site.cache, tools)
    adopt_downloads(site.cache, shared_cache)
    before = time.monotonic()
    try:
        assert site.built() == ["guest_debs", "root"]
        yield site, time.monotonic() - before
    finally:
        site.end()


@pytest.fixture
def site(tools: ToolsRoot, reference: tuple[Site, float], tmp_path: Path) -> Iterator[Site]:
    """An empty cache but for the tools root and the packages."""
    made = Site(tmp_path, uuid4().hex[:12])
    adopt_tools(made.cache, tools)
    adopt_downloads(made.cache, reference[0].cache)
    try:
        yield made
    finally:
        made.end()


def in_log(text: str) -> Callable[[Site], bool]:
    return lambda site: text in site.log()


def in_said(text: str) -> Callable[[Site], bool]:
    return lambda site: text in site.said.read_text()


def half_a_tar(site: Site) -> bool:
    return any(path.stat().st_size > 50_000_000 for path in site.cache.glob("work/root-*/out/root.tar"))


#: Instants of a build that are worth dying at, in order.
INSTANTS: dict[str, Callable[[Site], bool]] = {
    "apt reads the archive": lambda site: any(site.cache.glob("apt/*/lists/partial/*")),
    "the first stage builds": in_said("guest_debs ..."),
    "the packages are looked at": in_said("packages ("),
    "mmdebstrap begins": in_said("mmdebstrap trixie ..."),
    "packages are unpacked": in_log("Unpacking "),
    "packages are configured": in_log("Setting up "),
    "the tar is half written": half_a_tar,
}


def test_the_reference_is_clean_and_reused_within_a_second(reference: tuple[Site, float]) -> None:
    site, _ = reference
    site.assert_clean()
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert site.built() == []
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    # The processor's time, its children's included: a wall clock would measure what else the machine does.
    assert min(spent) < 1.0, spent


def test_killed_at_named_instants(site: Site, reference: tuple[Site, float]) -> None:
    for name, reached in INSTANTS.items():
        process = site.start("build", *SMALL)
        site.wait_until(process, lambda reached=reached: reached(site))  # type: ignore[misc]
        print(f"killed when {name}")
        process.kill()
        process.wait()
        site.assert_quiet()
        assert not list((site.cache / "objects").glob("root/*")), "no half output looks whole"
        (site.build_dir / "minimal" / "logs" / "root.log").unlink(missing_ok=True)
    assert site.built() == ["root"], "what was whole is carried on from"
    site.assert_clean()
    assert site.root_digest() == reference[0].root_digest()


def test_killed_at_random_instants(site: Site, reference: tuple[Site, float]) -> None:
    seed = int(os.environ.get("RECVIRT_TEST_SEED", "0")) or random.randrange(1, 10**6)
    print(f"RECVIRT_TEST_SEED={seed}")
    chosen = random.Random(seed)
    for _ in range(3):
        process = site.start("build", *SMALL)
        patience = chosen.uniform(0, reference[1])
        kill_after(process, patience)
        site.assert_quiet()
    site.built()
    site.assert_clean()
    assert site.root_digest() == reference[0].root_digest()


def test_a_killed_child_fails_the_build(site: Site, reference: tuple[Site, float]) -> None:
    for victim in ("mmdebstrap", "dpkg"):
        process = site.start("build", *SMALL)
        killed = 0
        while not killed:
            site.wait_until(process, lambda: "Setting up " in site.log() and bool(site.children(victim)))  # noqa: B023
            for pid in site.children(victim):
                with suppress(ProcessLookupError):  # it was quicker
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
        process.communicate(timeout=300)
        said = site.said.read_text()
        assert process.returncode in (5, 6), said
        assert "error: " in said
        assert "the whole log: " in said
        assert "Traceback" not in said
        site.assert_clean()
        (site.build_dir / "minimal" / "logs" / "root.log").unlink()
    assert site.built() == ["root"]
    assert site.root_digest() == reference[0].root_digest()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(site: Site, number: signal.Signals) -> None:
    process = site.start("build", *SMALL)
    site.wait_until(process, lambda: "Unpacking " in site.log())
    process.send_signal(number)
    process.communicate(timeout=60)
    said = site.said.read_text()
    assert process.returncode == 130
    assert "error: interrupted" in said
    assert "Traceback" not in said
    site.assert_clean()


def test_two_builds_at_once(site: Site, reference: tuple[Site, float]) -> None:
    other = Site(site.base, site.token, name="-second")
    process = site.start("build", *SMALL, "--json")
    site.wait_until(process, lambda: "Setting up " in site.log())
    second = other.start("build", *SMALL, "--json")
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0
    second_out, _ = second.communicate(timeout=900)
    second_said = other.said.read_text()
    assert second.returncode == 0, second_said
    assert "waiting for another recvirt that builds the same root" in second_said
    assert "mmdebstrap trixie: done" not in second_said
    folders = [[stage["directory"] for stage in json.loads(text)["stages"]] for text in (out, second_out)]
    assert folders[0] == folders[1]
    assert all(folder.startswith(str(site.cache)) for folder in folders[0])
    site.assert_clean()
    assert site.root_digest() == reference[0].root_digest()


# -- disks -------------------------------------------------------------------------------------------------------------


def fill(folder: Path, leave_bytes: int) -> Path:
    """A file that leaves so much of a disk."""
    facts = os.statvfs(folder)
    path = folder / "filler"
    with path.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, max(4096, facts.f_bavail * facts.f_frsize - leave_bytes))
    return path


def test_the_disk_fills_up_while_building(tools: ToolsRoot, reference: tuple[Site, float], tmp_path: Path) -> None:
    site = Site(tmp_path, uuid4().hex[:12])
    site.cache.mkdir()
    with Namespace('mount -t tmpfs -o size=1500m tmpfs "$1"', str(site.cache)) as space:
        inside = space.path(site.cache)
        adopt_tools(inside, tools)
        adopt_downloads(inside, reference[0].cache)
        site.prefix = space.prefix
        process = site.start("build", *SMALL)
        site.wait_until(process, lambda: "Unpacking " in site.log())
        filler = fill(inside, 30_000_000)
        process.communicate(timeout=300)
        said = site.said.read_text()
        assert process.returncode == 9, said
        assert "the disk is full" in said
        assert "recvirt clean" in said
        assert "Traceback" not in said
        assert list((inside / "work").iterdir()) == []
        # With room again it carries on from what was whole.
        filler.unlink()
        assert site.built() == ["root"]
        (tar,) = (inside / "objects" / "root").glob("*/root.tar")
        assert tar.stat().st_size > 50_000_000
    site.assert_quiet()


def test_too_small_a_disk_is_told_before_the_start(tools: ToolsRoot, tmp_path: Path) -> None:
    site = Site(tmp_path, uuid4().hex[:12])
    site.cache.mkdir()
    with Namespace('mount -t tmpfs -o size=300m tmpfs "$1"', str(site.cache)) as space:
        adopt_tools(space.path(site.cache), tools)
        site.prefix = space.prefix
        status, _, said = site.run("build", *SMALL)
        assert status == 9, said
        assert "are needed below" in said
        assert "--cache-dir" in said
        assert "guest_debs ..." not in said


def test_a_full_build_folder(site: Site) -> None:
    site.build_dir.mkdir()
    with Namespace('mount -t tmpfs -o size=128k tmpfs "$1"', str(site.build_dir)) as space:
        fill(space.path(site.build_dir), 0)
        site.prefix = space.prefix
        status, _, said = site.run("build", *SMALL)
        assert status == 9, said
        assert "build ü" in said or "disk is full" in said
        assert "Traceback" not in said
    site.assert_quiet()
    assert site.work_folders() == []


@pytest.mark.parametrize("which", ["cache", "build"])
def test_folders_that_can_only_be_read(site: Site, which: str) -> None:
    folder = site.cache if which == "cache" else site.build_dir
    folder.mkdir(exist_ok=True)
    with Namespace('mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"', str(folder)) as space:
        site.prefix = space.prefix
        status, _, said = site.run("build", *SMALL)
    assert status == 1, said
    assert f"Read-only file system: {folder}" in said
    assert "--cache-dir, --build-dir" in said
    assert "Traceback" not in said
    site.assert_quiet()
