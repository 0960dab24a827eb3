"""``recvirt-cloud dev``: a whole cloud in one folder, as one user, on libvirt's test driver and SQLite.

The same central node, dispatcher, consumer and worker as in an image; only the database, the carrier of messages and
the hypervisor are others. Owns the folder's set-up and the four processes.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from recvirt.nestedcloud.central import config as central_config
from recvirt.nestedcloud.client.api import Access, save_access

_STOP_SECONDS = 15.0
_START_SECONDS = 60.0


class DevError(Exception):
    """The development cloud can't run."""


@dataclass(frozen=True)
class Place:
    """The folder of a development cloud."""

    folder: Path
    port: int

    @property
    def central(self) -> Path:
        """The central node's configuration."""
        return self.folder / "central.toml"

    @property
    def worker(self) -> Path:
        """The worker's configuration."""
        return self.folder / "worker.toml"

    @property
    def access(self) -> Path:
        """What the command line needs."""
        return self.folder / "client.toml"


def default_folder() -> Path:
    """Below the user's state folder (XDG Base Directory Specification)."""
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return home / "recvirt-cloud-dev"


def _toml(values: Mapping[str, str | int | float]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)


def prepare(place: Place) -> None:
    """Configuration, database, a user with a token, a project, an image and a worker: whatever is not there yet."""
    place.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = place.folder
    if not place.central.exists():
        cloud, worker = str(uuid.uuid4()), str(uuid.uuid4())
        _write(folder / "secret-key", secrets.token_urlsafe(48))
        broker = f"filesystem:{folder / 'queue'}"
        _write(place.worker, _toml({
            "uuid": worker, "name": "dev", "cloud": cloud, "broker": broker, "libvirt": "test:///default",
            "domain_type": "test", "images_dir": str(folder / "images"), "blocks_dir": str(folder / "blocks"),
            "run_dir": str(folder / "run"), "pool": "threads", "heartbeat_seconds": 1.0,
            "spool_dir": str(folder / "spool"),
        }))  # fmt: skip
        # Last: without it everything above is made anew.
        _write(place.central, _toml({
            "cloud": cloud, "database": f"sqlite:{folder / 'cloud.sqlite'}", "broker": broker,
            "secret_key_path": str(folder / "secret-key"), "state_dir": str(folder), "heartbeat_seconds": 1.0,
            "lease_seconds": 15.0,
        }))  # fmt: skip
    os.environ[central_config.VARIABLE] = str(place.central)
    _fill(place)


def _fill(place: Place) -> None:
    import tomllib

    import django

    os.environ["DJANGO_SETTINGS_MODULE"] = "recvirt.nestedcloud.central.settings"
    django.setup()
    from django.contrib.auth import get_user_model
    from django.core.management import call_command

    from recvirt.nestedcloud.central.bundled import ensure_bundled
    from recvirt.nestedcloud.central.first import PROJECT
    from recvirt.nestedcloud.central.models import ApiToken, Image, ImageState, Project, Worker
    from recvirt.nestedcloud.model import GIB

    call_command("migrate", verbosity=0)
    user, _ = get_user_model().objects.get_or_create(username="dev", defaults={"is_superuser": True})
    Project.objects.get_or_create(name=PROJECT)
    Image.objects.get_or_create(name="tiny", project=None, defaults={"state": ImageState.READY, "virtual_bytes": GIB})
    worker = tomllib.loads(place.worker.read_text())
    Worker.objects.get_or_create(uuid=worker["uuid"], defaults={"name": worker["name"]})
    ensure_bundled(worker["uuid"], PROJECT)
    url = f"http://127.0.0.1:{place.port}"
    if place.access.exists():
        token = tomllib.loads(place.access.read_text())["token"]
    else:
        _, token = ApiToken.issue(user, "dev")
    save_access(Access(url, token), place.access)


def commands(place: Place) -> dict[str, list[str]]:
    """The processes, by name."""
    me = [sys.executable, "-m", "recvirt.nestedcloud"]
    return {
        "api": [*me, "central", "serve", "--port", str(place.port)],
        "dispatcher": [*me, "central", "dispatch"],
        "consumer": [*me, "central", "consume"],
        "worker": [*me, "worker", "run", "--config", str(place.worker)],
    }


class Cloud:
    """The running processes of a development cloud. One that ends is started again, as systemd would."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._env = {**os.environ, central_config.VARIABLE: str(place.central)}

    def start(self, name: str) -> None:
        """Start one of them; it writes to ``NAME.log`` and dies with us."""
        with (self.place.folder / f"{name}.log").open("ab") as log:
            words = ["setpriv", "--pdeathsig", "TERM", *commands(self.place)[name]]
            self.processes[name] = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._env, start_new_session=True
            )

    def start_all(self) -> None:
        """Start them, and wait until the API answers. DevError with the log's last lines when it does not."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.place.port))
            except OSError as error:
                raise DevError(f"port {self.place.port}: {error.strerror}; --port takes another one") from None
        for name in commands(self.place):
            self.start(name)
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.place.port), 1).close()
                return
            except OSError:
                if time.monotonic() > deadline or self.processes["api"].poll() is not None:
                    self.stop()
                    lines = (self.place.folder / "api.log").read_text(errors="replace").splitlines()[-8:]
                    raise DevError("the API did not come up:\n  " + "\n  ".join(lines)) from None
                time.sleep(0.1)

    def watch(self) -> list[str]:
        """Start again whatever has ended; the names."""
        ended = [name for name, process in self.processes.items() if process.poll() is not None]
        for name in ended:
            self.start(name)
        return ended

    def stop(self) -> None:
        """End all of them, with their children."""
        for process in self.processes.values():
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        for process in self.processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass
