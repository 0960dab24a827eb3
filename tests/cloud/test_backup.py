"""The operator's guide's backup and restore, line by line, with real PostgreSQL: what was there is there again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cloud import postgresql

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs/operating.md"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(postgresql.programs() is None, reason="PostgreSQL is not installed"),
]

_SUDO = """\
#!/bin/sh
PGUSER=cloud
if [ "$1" = -u ]; then PGUSER=$2; shift 2; fi
export PGUSER
exec "$@"
"""
# Its users are not this machine's.
_INSTALL = '#!/bin/sh\n[ "$4" = -o ] || exit 9\nexec /usr/bin/install "$1" "$2" "$3" "$6"\n'
_FILL = """
from django.contrib.auth import get_user_model
from recvirt.nestedcloud.central.models import *
from recvirt.nestedcloud.model import GIB
project, worker = Project.objects.get(name="default"), Worker.objects.get()
user = get_user_model().objects.get()
sizes = {"vcpus": 1, "vcpus_max": 2, "memory_bytes": GIB, "memory_max_bytes": GIB, "disk_bytes": GIB,
         "promised_vcpus": 2, "promised_memory_bytes": GIB, "promised_disk_bytes": GIB}
web = Instance.objects.create(project=project, worker=worker, name="web", state="on", power="running", generation=3,
                              user_data="é \\\\ '\\n", **sizes)
Volume.objects.create(project=project, worker=worker, instance=web, slot=1, name="data", state="ready", size_bytes=GIB,
                      promised_bytes=GIB, snapshots={"before": GIB})
done = Operation.objects.create(project=project, user=user, instance=web, worker=worker, kind="launch",
                                phase="succeeded", facts={"how": "é"})
Operation.objects.create(project=project, user=user, instance=web, worker=worker, kind="revert", phase="running",
                         args={"snapshot": "before"}, attempt=1)
ApiToken.issue(user, "laptop")
Event.objects.create(project=project, kind="one", subject=done.uuid)
"""
_LATER = """
from recvirt.nestedcloud.central.models import *
Instance.objects.update(name="changed", generation=9)
Operation.objects.update(phase="succeeded")
ApiToken.objects.all().delete()
"""
_DUMP = """
from django.core.management import call_command
call_command("dumpdata", "cloud", "auth.user", format="json")
"""


class Machine:
    """A machine's folders below one of ours, a PostgreSQL of its own, and stand-ins for sudo and systemd."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self.root = root
        self.etc, self.disks, self.log = root / "etc/recvirt-cloud", root / "var/lib/recvirt", root / "systemctl.log"
        for folder in (self.etc, self.disks / "blocks", root / "var/backups", root / "bin"):
            folder.mkdir(parents=True)
        (self.etc / "secret-key").write_text("k" * 50)
        (self.etc / "central.toml").write_text(
            'cloud = "00000000-0000-4000-8000-000000000001"\ndatabase = "postgresql:recvirt-central"\n'
            f'broker = "filesystem:{root}/queue"\nsecret_key_path = "{self.etc}/secret-key"\nstate_dir = "{root}"\n'
        )
        programs = {
            "sudo": _SUDO, "install": _INSTALL, "systemctl": f'#!/bin/sh\necho "$*" >>{self.log}\n',
            "recvirt-cloud": f'#!/bin/sh\nexec {sys.executable} -m recvirt.nestedcloud "$@"\n',
        }  # fmt: skip
        for name, text in programs.items():
            (root / "bin" / name).write_text(text)
            (root / "bin" / name).chmod(0o755)
        self.env = {
            **os.environ, **environment, "PYTHONPATH": str(ROOT),
            "PATH": f"{root}/bin:{postgresql.programs()}:{os.environ['PATH']}",
            "RECVIRT_CLOUD_CONFIG": str(self.etc / "central.toml"),
            "DJANGO_SETTINGS_MODULE": "recvirt.nestedcloud.central.settings",
        }  # fmt: skip

    def run(self, line: str) -> str:
        done = subprocess.run(
            ["sh", "-c", line], env=self.env, cwd=self.root, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    def django(self, code: str) -> str:
        before = "import django; django.setup()\n"
        done = subprocess.run(
            [sys.executable, "-c", before + code], cwd=self.root, capture_output=True, text=True, timeout=300,
            check=False,
            env={**self.env, "PGUSER": "recvirt-central"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """What is in the database, by table."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in json.loads(self.django(_DUMP)):
            found.setdefault(row["model"], []).append({"pk": row["pk"], **row["fields"]})
        return found

    def follow(self, part: str) -> None:
        """Every line between the guide's marks, in order."""
        text = GUIDE.read_text().partition(f"<!-- {part} -->")[2].partition("<!-- end -->")[0]
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        assert len(lines) > 5
        for line in lines:
            here = re.sub(r"(?<= )/(?=var/|etc/| )|(?<==)/(?=var/)", f"{self.root}/", line)
            assert here.count(str(self.root)) == len(re.findall(r"[ =]/", line))
            self.run(here)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    if os.geteuid() == 0:
        # The server's user looks into nothing of ours, but its socket's folder is named.
        tmp_path.chmod(0o755)
    with postgresql.cluster() as environment:
        found = Machine(tmp_path, environment)
        found.run("createuser --superuser postgres && createuser recvirt-central")
        found.run("createdb --owner recvirt-central --template template0 --encoding UTF8 recvirt-central")
        found.run("sudo -u recvirt-central recvirt-cloud central migrate")
        found.run(f"sudo -u recvirt-central recvirt-cloud central init --name here --worker {uuid.uuid4()}")
        yield found


def test_what_was_backed_up_is_there_again(machine: Machine) -> None:
    machine.django(_FILL)
    disk = machine.disks / "blocks/disk.raw"
    with disk.open("wb") as stream:
        stream.seek(64 * 1024**2)
        stream.write(b"data")
    before, key = machine.rows(), (machine.etc / "secret-key").read_text()
    machine.follow("backup")
    assert (machine.root / "var/backups/recvirt-cloud").stat().st_mode & 0o777 == 0o700
    assert (machine.root / "var/backups/recvirt-cloud/disks.tar").stat().st_size < 1024**2

    machine.django(_LATER)
    (machine.etc / "secret-key").write_text("x" * 50)
    disk.write_bytes(b"gone")
    machine.log.write_text("")
    machine.follow("restore")

    after = machine.rows()
    assert (machine.etc / "secret-key").read_text() == key
    assert disk.stat().st_size == 64 * 1024**2 + 4 and disk.stat().st_blocks * 512 < 1024**2
    for table in ("cloud.operation", "cloud.instance", "cloud.volume", "cloud.event"):
        assert before[table] and after[table], table
    # What was under way is ended, and that is told; generations are ahead. All else is the same.
    (ended,) = [row for row in after["cloud.operation"] if row["kind"] == "revert"]
    assert (ended["phase"], ended["fault"]) == ("failed", "conflict")
    assert [row["kind"] for row in after["cloud.event"]] == ["one", "operation.failed"]
    assert after["cloud.event"][0] == before["cloud.event"][0]
    for table in ("cloud.instance", "cloud.volume"):
        for row, was in zip(after[table], before[table], strict=True):
            assert row.pop("generation") > was.pop("generation") + 1000
            assert {name for name in row if row[name] != was[name]} <= {"power_seen"}
    for table in sorted(set(before) - {"cloud.operation", "cloud.event", "cloud.instance", "cloud.volume"}):
        assert after[table] == before[table], table
    assert [row for row in after["cloud.operation"] if row["kind"] == "launch"] == [
        row for row in before["cloud.operation"] if row["kind"] == "launch"
    ]
    said = machine.log.read_text().splitlines()
    assert said == ["stop recvirt-cloud.target recvirt-cloud-setup.service", "start recvirt-cloud.target"]
