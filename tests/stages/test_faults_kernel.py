"""The kernel's stages, killed while they unpack, configure and compile. Nothing is compiled to its end here."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from recvirt.sandbox import ToolsRoot
from tests.support.site import Site, adopt_downloads, adopt_tools

pytestmark = pytest.mark.slow

CONFIG = ("minimal", "--until", "kernel_config")
BUILD = ("minimal", "--until", "kernel_build", "--jobs", "1")


@pytest.fixture(scope="module")
def site(tools: ToolsRoot, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One cache for all tests here, in their order: unpacking a kernel is what takes the time."""
    made = Site(tmp_path_factory.mktemp("kernel"), uuid4().hex[:12])
    adopt_tools(made.cache, tools)
    adopt_downloads(made.cache, shared_cache)
    try:
        yield made
    finally:
        made.end()


def unpacked(site: Site) -> list[Path]:
    return list((site.cache / "sources").glob("*/source.json"))


def test_killed_while_the_source_is_unpacked(site: Site) -> None:
    process = site.start("build", *CONFIG)
    site.wait_until(process, lambda: any(site.cache.glob("sources/*.part/tree/drivers/*")))
    process.kill()
    process.wait()
    site.assert_quiet()
    assert unpacked(site) == []
    status, out, said = site.run("build", *CONFIG, "--json")
    assert status == 0, said
    (stage,) = json.loads(out)["stages"]
    assert (Path(stage["directory"]) / "config").stat().st_size > 10_000
    (whole,) = unpacked(site)
    assert (whole.parent / "tree/virt/kvm/Makefile.kvm").exists(), "the end of the tar came too"
    assert not list(site.cache.glob("sources/*.part"))
    site.assert_clean()


def test_killed_while_it_compiles(site: Site) -> None:
    process = site.start("build", *BUILD)
    site.wait_until(process, lambda: bool(site.children("cc1")))
    process.kill()
    process.wait()
    site.assert_quiet()
    assert len(site.work_folders()) == 1
    assert not list(site.cache.glob("objects/kernel_build/*"))
    # Another stage's build clears it away too.
    assert site.run("build", *CONFIG)[0] == 0
    site.assert_clean()
    assert len(unpacked(site)) == 1


def test_make_is_killed(site: Site) -> None:
    process = site.start("build", *BUILD)
    site.wait_until(process, lambda: bool(site.children("cc1")))
    for pid in site.children("make"):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=120)
    said = site.said.read_text()
    assert process.returncode in (5, 6), said
    assert "the whole log: " in said
    assert "kernel_build.log" in said
    assert "Traceback" not in said
    site.assert_clean()


def test_interrupted_while_it_compiles(site: Site) -> None:
    process = site.start("build", *BUILD)
    site.wait_until(process, lambda: bool(site.children("cc1")))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130, site.said.read_text()
    site.assert_clean()
