"""The central node's settings for tests: a configuration of its own, in a folder that goes away with the run.

``RECVIRT_TEST_DATABASE`` (as ``postgresql:NAME``) takes another database than SQLite.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

_folder = Path(tempfile.mkdtemp(prefix="recvirt-cloud-tests-"))
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
(_folder / "secret-key").write_text("k" * 50)
_database = os.environ.get("RECVIRT_TEST_DATABASE", f"sqlite:{_folder / 'db.sqlite'}")
(_folder / "central.toml").write_text(
    f'cloud = "00000000-0000-4000-8000-000000000001"\ndatabase = "{_database}"\nbroker = "filesystem:{_folder}/queue"\n'
    f'secret_key_path = "{_folder}/secret-key"\nstate_dir = "{_folder}"\nallowed_hosts = ["testserver"]\n'
)
os.environ["RECVIRT_CLOUD_CONFIG"] = str(_folder / "central.toml")

from recvirt.nestedcloud.central.settings import *  # noqa: E402,F403

if _database.startswith("sqlite:"):
    # A file, as it is in use: one in memory is no database of its own to a second connection.
    DATABASES["default"]["TEST"] = {"NAME": str(_folder / "test.sqlite")}  # noqa: F405
