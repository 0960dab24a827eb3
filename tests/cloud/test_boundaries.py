"""Kills at each boundary: a few of them here, all of them by ``python -m tests.cloud.faults.boundaries``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cloud.faults.libvirtd import why_not

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]
#: A settings module of the test run is not the cloud's.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}


def run(module: str, *words: str, seconds: float = 3000) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *words], env=_ENVIRONMENT, cwd=ROOT, capture_output=True, text=True,
        timeout=seconds, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("only", ["launch", "rescale-restart", "clone", "volume-remove", "image-import"])
def test_the_cloud_is_the_same_after_a_kill(only: str) -> None:
    """Each fifth boundary; which one a run begins with does not change."""
    done = run("tests.cloud.faults.boundaries", "--only", only, "--part", "2/5")
    assert done.returncode == 0 and "0 with something wrong" in done.stdout, done.stdout + done.stderr[-4000:]
    count = int(done.stdout.splitlines()[-1].split()[0])
    assert count >= 5, done.stdout


def test_boundaries_are_listed_by_name() -> None:
    done = run("tests.cloud.faults.boundaries", "--list", "--only", "launch")
    names = done.stdout.splitlines()
    for text in (
        "launch: api 0.1 after commit",
        "launch: dispatcher 1.1 after commit",
        "after publish execute",
        "after libvirt virConnect.defineXML, message lost",
        "after libvirt virDomain.create, delivered again",
        "after rename .qcow2",
        "after publish report",
        "launch: consumer 3.1 after commit, message lost",
    ):
        assert any(text in name for name in names), (text, done.stdout, done.stderr[-4000:])


def test_a_soak_of_a_minute() -> None:
    done = run("tests.cloud.soak", "--minutes", "1", "--seed", "7")
    assert done.returncode == 0 and "violated: 0" in done.stdout, done.stdout + done.stderr[-4000:]
    counts = {line.partition(":")[0]: line.partition(": ")[2].split()[0] for line in done.stdout.splitlines()}
    assert int(counts["operations"]) >= 10 and int(counts["kills"]) >= 1 and counts["seed"] == "7", done.stdout
