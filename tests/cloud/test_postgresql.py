"""All of the cloud's tests once more, on PostgreSQL."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cloud import postgresql

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif("RECVIRT_TEST_DATABASE" in os.environ, reason="another database was chosen")
@pytest.mark.skipif(postgresql.programs() is None, reason="PostgreSQL is not installed")
@pytest.mark.skipif(not any(map(find_spec, ("psycopg", "psycopg2"))), reason="wants psycopg or psycopg2")
def test_everything_passes_on_postgresql() -> None:
    with postgresql.cluster() as environment:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "tests/cloud", "--ds=tests.cloud.settings"],
            env={**os.environ, **environment, "RECVIRT_TEST_DATABASE": "postgresql:cloud"}, cwd=ROOT,
            capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
