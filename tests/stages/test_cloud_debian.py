"""The cloud's tests on the packages that it has in an image, Debian 13's, and on the newest that PyPI has.

Needs a tools root with the ``cloud`` set: ``$RECVIRT_CLOUD_ROOT``, or made in the ordinary cache.
"""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from recvirt.run import Completed
from recvirt.sandbox import ToolsRoot
from recvirt.store import Store
from recvirt.toolsroot import ensure_tools

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
_CLOUD_DIR = os.environ.get("RECVIRT_CLOUD_ROOT", "")
#: Compiled against the host's libvirt, so it stays Debian's.
_NOT_FROM_PYPI = "libvirt-python"


@pytest.fixture(scope="module")
def debian(shared_cache: Path) -> ToolsRoot:
    return ToolsRoot(Path(_CLOUD_DIR)) if _CLOUD_DIR else ensure_tools(Store(shared_cache), extra="cloud")


def run(
    debian: ToolsRoot, *words: str, env: Mapping[str, str] | None = None, readable: tuple[Path, ...] = ()
) -> Completed:
    """A program of the root's, in this checkout; every user of the root can be taken on."""
    return debian.run(
        words, readable=[ROOT, *readable], cwd=ROOT, all_ids=True, check=False, timeout_seconds=1800,
        env={"PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
    )  # fmt: skip


def passes(done: Completed) -> None:
    """Everything passed, and nothing was left out."""
    assert done.status == 0, done.stdout[-8000:]
    assert re.search(r"\d\d\d passed", done.stdout), done.stdout[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]


def pytest_words(*words: str) -> tuple[str, ...]:
    return ("python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", *words)


def test_the_versions_are_those_of_the_image(debian: ToolsRoot) -> None:
    said = run(debian, "python3", "-c", "import django, rest_framework as r; print(django.__version__, r.__version__)")
    assert said.stdout.startswith("4.2.") and " 3.16." in said.stdout


def test_everything_fast_passes_on_debians_packages(debian: ToolsRoot) -> None:
    passes(run(debian, *pytest_words("-m", "not slow", "tests/cloud")))


def test_everything_passes_on_debians_postgresql(debian: ToolsRoot) -> None:
    done = run(debian, *pytest_words("-m", "slow", "tests/cloud/test_postgresql.py"))
    assert done.status == 0 and "skipped" not in done.stdout, done.stdout[-8000:]


def requirements() -> list[str]:
    """What setup.cfg wants for the cloud and for the command line."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = parser["options.extras_require"]["cloud"] + parser["options"]["install_requires"]
    return [line for line in lines.split("\n") if line and not line.startswith(_NOT_FROM_PYPI)]


def test_everything_fast_passes_on_the_newest(debian: ToolsRoot, tmp_path: Path) -> None:
    version = run(debian, "python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").stdout.strip()
    more = ["pytest-django", "pytest-xdist", "hypothesis", "openapi-spec-validator", "psycopg[binary]"]
    got = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path / "newest"), "--python-version",
         version, "--only-binary=:all:", "--upgrade", *requirements(), *more],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert got.returncode == 0, got.stderr[-4000:]
    env = {"PYTHONPATH": str(tmp_path / "newest")}
    said = run(debian, "python3", "-c", "import django; print(django.__version__)", env=env, readable=(tmp_path,))
    assert int(said.stdout.split(".")[0]) > 4, said.stdout
    passes(run(debian, *pytest_words("-m", "not slow", "tests/cloud"), env=env, readable=(tmp_path,)))
