"""Kills with the real parts: RabbitMQ, PostgreSQL, libvirtd, QEMU without KVM, Celery's pool of processes.

A launch is stopped in the middle of its work (qemu-img waits); something is killed, and comes back a little later.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import libvirt
import pytest

from recvirt.nestedcloud import dev
from recvirt.nestedcloud.client.api import Access, Api, ApiError
from recvirt.nestedcloud.model import MIB
from recvirt.nestedcloud.provision import toml
from tests.cloud import postgresql
from tests.cloud.faults import deadfs, rabbitmq
from tests.cloud.faults.libvirtd import Libvirtd, why_not
from tests.cloud.faults.rabbitmq import RabbitMq
from tests.cloud.faults.wire import Wire

_ABSENT = [
    name
    for name, there in (
        ("RabbitMQ", rabbitmq.program()), ("PostgreSQL", postgresql.programs()),
        ("QEMU", shutil.which("qemu-system-x86_64")), ("qemu-img", shutil.which("qemu-img")),
    )
    if not there
]  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
    pytest.mark.skipif(bool(_ABSENT), reason=f"wants {', '.join(_ABSENT)}"),
]

#: For everything that has to happen in the end.
_WAIT_SECONDS = 600.0
_LEASE_SECONDS = 6.0
_SIZE = {"vcpus": 1, "memory_bytes": 64 * MIB, "memory_max_bytes": 64 * MIB, "disk_bytes": 2 * MIB, "networks": []}
#: Waits for as long as there is a file that says so, and says whose child it is.
_QEMU_IMG = """#!/bin/sh
if [ -e "{folder}/hold" ]; then
    echo "$PPID" > "{folder}/held.part" && mv "{folder}/held.part" "{folder}/held"
    while [ -e "{folder}/hold" ]; do sleep 0.05; done
fi
exec {program} "$@"
"""


def until(what: str, done: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + _WAIT_SECONDS
    while not (found := done()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return found


class Cloud:
    """All parts, and what can be done to them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        environment = stack.enter_context(postgresql.cluster())
        self.database = Path(environment["PGHOST"])
        self._make_database(environment)
        self.libvirtd = Libvirtd(folder / "libvirt", logs=True)
        (folder / "libvirt/etc/libvirt").mkdir(parents=True)
        (folder / "libvirt/etc/libvirt/qemu.conf").write_text(
            'user = "root"\ngroup = "root"\nsecurity_driver = "none"\nnamespaces = []\ncgroup_controllers = []\n'
            "remember_owner = 0\n"
        )
        self.libvirtd.start(hold=False)
        stack.callback(self.libvirtd.kill)
        self.broker = RabbitMq(folder / "broker")
        stack.callback(self.broker.stop)
        self.broker.start()
        self.wire = Wire(self.broker.port)
        stack.callback(self.wire.close)
        self.place = dev.Place(folder / "cloud", rabbitmq.free_port())
        self.worker = str(uuid.uuid4())
        self._configure()
        (folder / "bin").mkdir()
        program = folder / "bin/qemu-img"
        program.write_text(_QEMU_IMG.format(folder=folder, program=shutil.which("qemu-img")))
        program.chmod(0o755)
        self.cloud = dev.Cloud(self.place)
        self.cloud._env.update(
            environment, DJANGO_SETTINGS_MODULE="recvirt.nestedcloud.central.settings",
            PATH=f"{folder}/bin:{os.environ['PATH']}",
        )  # fmt: skip
        self._manage("migrate")
        self._manage("init", "--worker", self.worker, "--name", "w1")
        self.api = Api(Access(f"http://127.0.0.1:{self.place.port}", self._manage("token").strip()))
        stack.callback(self.cloud.stop)
        self.cloud.start_all()
        self.image()

    @staticmethod
    def _make_database(environment: dict[str, str]) -> None:
        import psycopg

        words = f"host={environment['PGHOST']} user={environment['PGUSER']} dbname=postgres"
        with psycopg.connect(words, autocommit=True) as connection:
            connection.execute("CREATE DATABASE faults")

    def _configure(self) -> None:
        for name in ("images", "blocks", "spool", "run"):
            (self.place.folder / name).mkdir(parents=True)
        folder = self.place.folder
        (folder / "secret-key").write_text("k" * 50)
        cloud = str(uuid.uuid4())
        self.place.worker.write_text(toml({
            "uuid": self.worker, "name": "w1", "cloud": cloud, "broker": self.broker.url_at(self.wire.port),
            "libvirt": self.libvirtd.qemu_uri, "domain_type": "qemu", "images_dir": str(folder / "images"),
            "blocks_dir": str(folder / "blocks"), "run_dir": str(folder / "run"), "heartbeat_seconds": 2.0,
            "spool_dir": str(folder / "spool"), "concurrency": 2,
        }))  # fmt: skip
        self.place.central.write_text(toml({
            "cloud": cloud, "database": "postgresql:faults", "broker": self.broker.url, "state_dir": str(folder),
            "secret_key_path": str(folder / "secret-key"), "lease_seconds": _LEASE_SECONDS, "heartbeat_seconds": 20.0,
        }))  # fmt: skip

    def _manage(self, *words: str) -> str:
        argv = [sys.executable, "-m", "recvirt.nestedcloud", "central", *words]
        return subprocess.run(argv, env=self.cloud._env, check=True, stdout=subprocess.PIPE, text=True).stdout

    def image(self) -> None:
        until("a worker is up", lambda: any(row["up"] for row in self.api.pages("workers")))
        body = {"name": "base", "format": "raw", "upload_bytes": MIB}
        self.api.call("POST", self.api.below("images"), body)
        self.api.call("PUT", self.api.below("images/base/content"), data=bytes(MIB), offset=0)
        self.wait(self.ask("POST", "images/base/complete", {}))

    # Asking.

    def ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        answer: dict[str, Any] = self.api.call(method, self.api.below(path), body)
        return answer

    def launch(self, name: str = "web") -> dict[str, Any]:
        return self.ask("POST", "instances", {"name": name, "image": "base", **_SIZE})

    def now(self, operation: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.ask("GET", f"operations/{operation['uuid']}")
        except ApiError as error:
            # While the database is away the API says so by a 500 without JSON.
            assert error.kind in ("protocol", "unreachable"), error
            return {"finished": None}

    def wait(self, operation: dict[str, Any], phase: str = "succeeded") -> dict[str, Any]:
        found: dict[str, Any] = until(
            f"{operation['kind']} ends", lambda: (now := self.now(operation))["finished"] and now
        )
        assert found["phase"] == phase, found
        return found

    # Stopping a launch in its midst.

    def hold(self) -> None:
        (self.folder / "held").unlink(missing_ok=True)
        (self.folder / "hold").touch()

    def held(self) -> int:
        """The process that waits for qemu-img."""
        until("qemu-img runs", (self.folder / "held").exists)
        return int((self.folder / "held").read_text())

    def release(self) -> None:
        (self.folder / "hold").unlink(missing_ok=True)

    # Killing.

    def kill(self, what: str) -> Callable[[], None]:
        """Kill it; what brings it back."""
        if what == "broker":
            self.broker.kill()
            return self.broker.start
        if what == "database":
            postgresql.kill(self.database)
            return lambda: postgresql.start(self.database)
        if what == "libvirtd":
            self.libvirtd.kill()
            return lambda: self.libvirtd.start(hold=False)
        if what == "pool child":
            os.kill(self.held(), signal.SIGKILL)
            return lambda: None
        if what == "worker and its children":
            os.killpg(self.cloud.processes["worker"].pid, signal.SIGKILL)
            self.cloud.processes["worker"].wait()
            return lambda: self.cloud.start("worker")
        os.kill(self.cloud.processes[what].pid, signal.SIGKILL)
        self.cloud.processes[what].wait()
        return lambda: self.cloud.start(what)

    # Looking.

    def domains(self) -> dict[str, int]:
        connection = libvirt.open(self.libvirtd.qemu_uri)
        try:
            return {domain.UUIDString(): domain.state()[0] for domain in connection.listAllDomains()}
        finally:
            connection.close()

    def blocks(self) -> list[str]:
        return sorted(path.name for path in (self.place.folder / "blocks").iterdir() if path.name != ".gone")

    def check(self) -> None:
        """One domain with its files for each instance, and nothing else."""
        rows = list(self.api.pages(self.api.below("instances")))
        assert self.domains() == {row["uuid"]: libvirt.VIR_DOMAIN_RUNNING for row in rows}
        assert self.blocks() == sorted(f"{row['uuid']}{end}" for row in rows for end in (".qcow2", "-seed.img"))
        assert [(row["state"], row["operation"]) for row in rows] == [("on", None)] * len(rows)

    def clear(self) -> None:
        for row in list(self.api.pages(self.api.below("instances"))):
            self.wait(self.ask("DELETE", f"instances/{row['name']}"))
        assert self.domains() == {} and self.blocks() == []


@pytest.fixture(scope="module")
def cloud() -> Iterator[Cloud]:
    folder = Path(tempfile.mkdtemp(prefix="recvirt-faults-", dir="/var/tmp"))
    folder.chmod(0o755)
    patch = pytest.MonkeyPatch()
    patch.setattr(dev, "_START_SECONDS", _WAIT_SECONDS)
    try:
        with ExitStack() as stack:
            stack.callback(patch.undo)
            yield Cloud(folder, stack)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(
    "what",
    [
        "worker", "worker and its children", "pool child", "libvirtd", "broker", "database", "dispatcher", "consumer",
        "api",
    ],
)  # fmt: skip
def test_a_launch_is_finished_whatever_is_killed_in_its_midst(cloud: Cloud, what: str) -> None:
    cloud.hold()
    operation = cloud.launch()
    cloud.held()
    back = cloud.kill(what)
    cloud.release()
    # Away for a while, so that somebody misses it.
    time.sleep(3)
    back()
    cloud.wait(operation)
    cloud.check()
    launches = [row for row in cloud.api.pages(cloud.api.below("operations")) if row["kind"] == "launch"]
    assert launches[0]["uuid"] == operation["uuid"]
    cloud.clear()


def test_a_worker_that_is_cut_off_for_several_leases_goes_on(cloud: Cloud) -> None:
    cloud.hold()
    operation = cloud.launch()
    cloud.held()
    cloud.wire.cut()
    cloud.release()
    time.sleep(4 * _LEASE_SECONDS)
    assert cloud.now(operation)["finished"] is None
    cloud.wire.mend()
    cloud.wait(operation)
    cloud.check()
    cloud.clear()


def test_a_full_disk_fails_with_its_reason_and_leaves_nothing(cloud: Cloud) -> None:
    blocks = cloud.place.folder / "blocks"
    # Less than what a worker leaves free.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(blocks)], check=True)
    try:
        failed = cloud.wait(cloud.launch(), "failed")
        assert failed["fault"] == "no-space" and "bytes free" in failed["message"]
        assert cloud.domains() == {} and cloud.blocks() == []
    finally:
        subprocess.run(["umount", "--lazy", str(blocks)], check=True)
    # With room again, the instance that failed can be started.
    cloud.wait(cloud.ask("POST", "instances/web/start", {}))
    cloud.check()
    cloud.clear()


@pytest.mark.skipif(bool(deadfs.why_not()), reason=deadfs.why_not())
def test_storage_that_does_not_answer_is_waited_for(cloud: Cloud) -> None:
    with deadfs.dead(cloud.place.folder / "blocks"):
        operation = cloud.launch()
        time.sleep(2 * _LEASE_SECONDS)
        assert cloud.now(operation)["finished"] is None
    ended: dict[str, Any] = until("the launch ends", lambda: (now := cloud.now(operation))["finished"] and now)
    if ended["phase"] == "failed":
        # Whoever waited got an error, and that is told; then it is asked for again.
        assert ended["fault"] == "storage" and "not connected" in ended["message"]
        cloud.wait(cloud.ask("POST", "instances/web/start", {}))
    cloud.check()
    cloud.clear()
