"""An image, killed at random instants while it is packed and published: the products are whole or as they were."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from recvirt.sandbox import ToolsRoot
from recvirt.store import remove_tree, sha256_of
from tests.support.site import Site, adopt_downloads, adopt_tools, kill_after

pytestmark = pytest.mark.slow

#: Debian's kernel: nothing has to be compiled.
WORDS = (
    "minimal", "--set", "kernel=debian", "--set", "image.initramfs=small", "--set", "root.package_lists=[base]",
    "--set", "root.packages=[]", "--set", "root.cloud_init.enabled=false",
)  # fmt: skip
KILLS = 6


@pytest.fixture(scope="module")
def site(tools: ToolsRoot, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("image"), uuid4().hex[:12])
    adopt_tools(made.cache, tools)
    adopt_downloads(made.cache, shared_cache)
    try:
        yield made
    finally:
        made.end()


def products(site: Site) -> dict[str, str]:
    folder = site.build_dir / "minimal"
    return {path.name: sha256_of(path) for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def forget_image(site: Site) -> None:
    for folder in (site.cache / "objects" / "image").glob("*"):
        remove_tree(folder)


def test_killed_while_the_image_is_made(site: Site) -> None:
    status, _, said = site.run("build", *WORDS)
    assert status == 0, said
    whole = products(site)
    assert "disk.qcow2" in whole
    assert (
        json.loads((site.build_dir / "minimal/image.json").read_text())["files"]["disk.qcow2"]["sha256"]
        == (whole["disk.qcow2"])
    )
    forget_image(site)
    before = time.monotonic()
    assert site.run("build", *WORDS)[0] == 0
    seconds = time.monotonic() - before
    assert products(site) == whole, "the same bytes again"

    seed = int(os.environ.get("RECVIRT_TEST_SEED", "0")) or random.randrange(1, 10**6)
    print(f"RECVIRT_TEST_SEED={seed}")
    chosen = random.Random(seed)
    for number in range(KILLS):
        forget_image(site)
        if number % 2:
            # Half of the time there is nothing of an earlier build to fall back on.
            for name in whole:
                (site.build_dir / "minimal" / name).unlink(missing_ok=True)
        process = site.start("build", *WORDS)
        site.wait_until(process, lambda: "image ..." in site.said.read_text())
        patience = chosen.uniform(0, seconds)
        kill_after(process, patience)
        site.assert_quiet()
        for name, digest in products(site).items():
            assert whole[name] == digest, f"{name} is neither whole nor absent"
    assert site.run("build", *WORDS)[0] == 0
    site.assert_clean()
    assert products(site) == whole
    assert not list((site.build_dir / "minimal").glob(".*.part*"))
