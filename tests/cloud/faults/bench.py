"""A whole cloud whose parts are stepped by hand, each step in a process of its own that may be killed at a named call.

Transport, database, hypervisor and code are those of ``recvirt-cloud dev``; only who calls whom when is the test's. The
processes are forked from this one, which has imported everything and holds no connection to anything.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from recvirt.nestedcloud import dev
from recvirt.nestedcloud.model import MIB
from tests.cloud.faults.libvirtd import Libvirtd
from tests.cloud.faults.tripwire import Tripwire

#: A boot of the machine, as the worker reports it: the domains outlive its process.
_BOOT = "00000000-0000-4000-8000-0000000000b0"
_ROUNDS_MAX = 25
#: In a path: the UUID of the forward that is there, or was.
THE_FORWARD = "THE-FORWARD"


@dataclass(frozen=True)
class Request:
    """What a client asks for."""

    method: str
    path: str
    body: Any = None
    data: bytes | None = None


@dataclass(frozen=True)
class Done:
    """A step that ended, or was killed."""

    killed: bool
    result: Any
    calls: list[str]


class StepError(Exception):
    """A step failed by itself."""


class Bench:
    """One cloud in a folder, that can be put back to what it was."""

    def __init__(self, folder: Path, libvirtd: Libvirtd) -> None:
        self.folder = folder
        self.libvirtd = libvirtd
        self.place = dev.Place(folder / "cloud", 8780)
        self.log = folder / "calls"
        self._made: dict[tuple[int, str], Any] = {}
        # Once in a process that goes away: Django takes its settings when it is set up, and they are changed here.
        if (pid := os.fork()) == 0:
            dev.prepare(self.place)
            os._exit(0)
        os.waitpid(pid, 0)
        text = self.place.worker.read_text().replace("test:///default", libvirtd.test_uri)
        self.place.worker.write_text(text)
        # However slow a step is here, the worker is up.
        text = self.place.central.read_text().replace("heartbeat_seconds = 1.0", "heartbeat_seconds = 600.0")
        self.place.central.write_text(text)
        dev.prepare(self.place)
        self._close()
        self.token = self.place.access.read_text().split('token = "')[1].split('"')[0]
        for name in ("images", "blocks", "spool"):
            (self.place.folder / name).mkdir(exist_ok=True)

    @staticmethod
    def _close() -> None:
        from django.db import connections

        connections.close_all()

    def step(self, function: Callable[..., Any], *args: Any, at: int | None = None) -> Done:
        """Call it in a process of its own, which dies after its call number ``at``."""
        self._close()
        self.log.unlink(missing_ok=True)
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            status = 1
            try:
                os.close(reader)
                Tripwire(self.log, at).stretch()
                with os.fdopen(writer, "wb") as stream:
                    pickle.dump(function(*args), stream)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            data = stream.read()
        _, status = os.waitpid(pid, 0)
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        if os.WIFSIGNALED(status):
            return Done(True, None, calls)
        if status:
            raise StepError(f"{function.__name__} failed")
        return Done(False, pickle.loads(data), calls)

    # What follows is called in steps.

    def ask(self, request: Request, key: str) -> tuple[int, Any]:
        """Ask the API; status and document."""
        from rest_framework.test import APIClient

        client = APIClient(SERVER_NAME="localhost", raise_request_exception=False)
        client.credentials(HTTP_AUTHORIZATION=f"Bearer {self.token}", HTTP_IDEMPOTENCY_KEY=key)
        url = f"/api/v1/projects/default/{request.path}"
        if THE_FORWARD in url:
            known = self.folder / "forward"
            if there := client.get("/api/v1/projects/default/forwards").json()["results"]:
                known.write_text(there[0]["uuid"])
            url = url.replace(THE_FORWARD, known.read_text())
        words: dict[str, Any] = {"data": request.body, "format": "json"}
        if request.data is not None:
            words = {"data": request.data, "content_type": "application/octet-stream"}
        answer = getattr(client, request.method.lower())(url, **words)
        return answer.status_code, json.loads(answer.content or b"null")

    def dispatch(self) -> None:
        """What the dispatcher does in one round."""
        from recvirt.nestedcloud.central import config, dispatcher, schedules
        from recvirt.nestedcloud.queue import Sender

        schedules.fire()
        broker = config.load().broker
        dispatcher.tick(Sender(broker).command)

    def work(self) -> int:
        """Carry out what is in the worker's queue; how many messages that were."""
        from recvirt.nestedcloud.queue import worker_queue

        made = self._service()
        return _drain(made.app, worker_queue(made.config.uuid))

    def consume(self) -> int:
        """Write down what is in the central node's queue."""
        from recvirt.nestedcloud.central import config, consumer
        from recvirt.nestedcloud.queue import CENTRAL_QUEUE

        app = self._once("consumer", lambda: consumer.make_consumer(config.load()))
        return _drain(app, CENTRAL_QUEUE)

    def _service(self) -> Any:
        from recvirt.nestedcloud.worker import service

        service._PROCESS_ID = _BOOT
        return self._once("worker", self._make_service)

    def _make_service(self) -> Any:
        """A worker that forwards ports, with the root service's part done whenever it is asked for."""
        from recvirt.nestedcloud import portmap
        from recvirt.nestedcloud.worker import forwarding, service

        config = service.load(self.place.worker)
        run_dir, applied = Path(config.run_dir), self.place.folder / "applied.json"
        real_host, real_answer = service.make_host, forwarding.Forwarding._answer

        def host(wanted: service.Config) -> Any:
            folder = run_dir / portmap.FOLDER_NAME
            return dataclasses.replace(real_host(wanted), forwards_dir=folder, forwards_applied=applied)

        def answer(side: forwarding.Forwarding, instance: str) -> Any:
            portmap.apply(run_dir, applied, self._program)
            return real_answer(side, instance)

        for owner, name, stand_in in ((service, "make_host", host), (forwarding.Forwarding, "_answer", answer)):
            setattr(owner, name, stand_in)
        return service.Service(config)

    def _program(self, argv: Sequence[str], text: str) -> tuple[int, str, str]:
        """In place of ip and nft: libvirt's networks, and a file with the rules that were loaded."""
        import libvirt

        if argv[0] == "ip":
            networks = libvirt.open(self.libvirtd.test_uri).listAllNetworks()
            found = [ET.fromstring(network.XMLDesc()) for network in networks]
            links = [
                {"ifname": item.find("bridge").get("name"),  # type: ignore[union-attr]
                 "addr_info": [{"local": item.find("ip").get("address"), "prefixlen": 24}]}  # type: ignore[union-attr]
                for item in found
                if item.find("ip") is not None
            ]  # fmt: skip
            return 0, json.dumps(links), ""
        if list(argv) == ["nft", "-f", "-"]:
            (self.place.folder / "rules").write_text(text)
            return 0, "", ""
        return 1, "", "not there"

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """One of each in a process, as in the product's."""
        if (os.getpid(), name) not in self._made:
            self._made[os.getpid(), name] = make()
        return self._made[os.getpid(), name]

    def beat(self) -> None:
        """One heartbeat, written down."""
        from recvirt.nestedcloud.central import reports
        from recvirt.nestedcloud.model import Heartbeat, decode, encode

        reports.heard(decode(Heartbeat, encode(self._service().agent().heartbeat())))

    def settle(self) -> None:
        """Until nothing is to be done any more; what nobody has answered is due at once."""
        from django.utils import timezone

        from recvirt.nestedcloud.central.models import ACTIVE_PHASES, Operation

        for _ in range(_ROUNDS_MAX):
            self.dispatch()
            busy = self.work() + self.consume()
            active = Operation.objects.filter(phase__in=ACTIVE_PHASES)
            if not busy and not active.exists():
                return
            if not busy:
                active.update(lease_until=timezone.now())
        raise StepError("it does not come to rest")

    def world(self) -> dict[str, Any]:
        """All there is; see ``world``."""
        import libvirt

        from tests.cloud.faults import world

        connection = libvirt.open(self.libvirtd.test_uri)
        known = world.names()
        folders = [self.place.folder / name for name in ("images", "blocks", "spool")]
        return {
            **world.rows(), "forwards": world.forwards(self.place.folder / "rules"),
            "domains": world.domains(connection, known), "files": world.files(folders, known),
            "loose ends": world.loose_ends(),
        }  # fmt: skip

    def clear(self) -> None:
        """Delete everything, as a client would."""
        for kind in ("instances", "volumes", "images"):
            _, listed = self.ask(Request("GET", kind), "-")
            for item in listed["results"]:
                if item.get("public"):
                    continue
                status, answer = self.ask(Request("DELETE", f"{kind}/{item['name']}"), str(uuid.uuid4()))
                if status != 202:
                    raise StepError(f"{kind}/{item['name']} can't be deleted: {answer}")
            self.settle()

    # Messages.

    @property
    def _messages(self) -> Path:
        return self.place.folder / "queue" / "messages"

    def keep_messages(self) -> None:
        """Keep a copy of what is under way."""
        kept = self.place.folder / "kept"
        kept.mkdir(exist_ok=True)
        for path in self._messages.iterdir():
            if not (kept / path.name).exists():
                shutil.copy(path, kept)

    def deliver_again(self, names: Sequence[str] | None = None, *, backwards: bool = False) -> None:
        """Put kept messages back into their queues: some of them, or all that ever were."""
        kept = self.place.folder / "kept"
        found = sorted(path.name for path in kept.iterdir()) if names is None else list(names)
        for number, name in enumerate(reversed(found) if backwards else found):
            queue = name.partition(".")[2]
            target = self._messages / (name if names is not None else f"{number:09}_{uuid.uuid4()}.{queue}")
            if not target.exists():
                shutil.copy(kept / name, target)

    def under_way(self) -> list[str]:
        """The names of the messages that nobody has taken yet."""
        return sorted(path.name for path in self._messages.iterdir())

    # Putting everything back.

    def save(self, name: str) -> None:
        """Remember everything as it is."""
        self._copy(self.place.folder, self.folder / f"saved-{name}")
        (self.folder / f"saved-{name}.domains").write_bytes(pickle.dumps(self.step(self._domains).result))

    def has(self, name: str) -> bool:
        """Whether that was remembered."""
        return (self.folder / f"saved-{name}.domains").exists()

    def load(self, name: str) -> None:
        """Everything as it was."""
        shutil.rmtree(self.place.folder)
        self._copy(self.folder / f"saved-{name}", self.place.folder)
        self.step(self._define, *pickle.loads((self.folder / f"saved-{name}.domains").read_bytes()))

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run(["cp", "-a", "--sparse=always", str(source), str(target)], check=True)

    def _domains(self) -> tuple[list[tuple[str, int, list[str]]], list[str]]:
        """libvirt's domains with their snapshots, and our networks with the addresses that they keep."""
        import libvirt

        found = []
        connection = libvirt.open(self.libvirtd.test_uri)
        for domain in connection.listAllDomains():
            snapshots = [item.getName() for item in domain.listAllSnapshots()]
            found.append((domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE), domain.state()[0], snapshots))
        ours = [network for network in connection.listAllNetworks() if network.name().startswith("recvirt-")]
        return found, [network.XMLDesc() for network in ours]

    def _define(self, saved: list[tuple[str, int, list[str]]], networks: list[str]) -> None:
        import libvirt

        connection = libvirt.open(self.libvirtd.test_uri)
        for domain in connection.listAllDomains():
            if domain.isActive():
                domain.destroy()
            domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
        for network in connection.listAllNetworks():
            if network.name().startswith("recvirt-"):
                network.destroy()
                network.undefine()
        for text in networks:
            connection.networkDefineXML(text).create()
        for text, state, snapshots in saved:
            domain = connection.defineXML(text)
            if state in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_PAUSED):
                domain.create()
            for name in snapshots:
                domain.snapshotCreateXML(f"<domainsnapshot><name>{name}</name></domainsnapshot>")
            if state == libvirt.VIR_DOMAIN_PAUSED:
                domain.suspend()

    def upload(self, name: str, size_bytes: int = MIB) -> list[Request]:
        """The requests that bring an image in; the last one makes an operation."""
        return [
            Request("POST", "images", {"name": name, "format": "raw", "upload_bytes": size_bytes}),
            Request("PUT", f"images/{name}/content?offset=0", data=bytes(size_bytes)),
            Request("POST", f"images/{name}/complete", {}),
        ]


def _drain(app: Any, queue: str) -> int:
    """Handle every message of a queue as Celery's worker does with late acknowledgement: task first, then the ack."""
    from kombu.entity import Queue

    count = 0
    with app.connection_for_read() as connection:
        bound: Any = Queue(queue)(connection.default_channel)  # type: ignore[no-untyped-call]
        bound.declare()
        while (message := bound.get(no_ack=False, accept=["json"])) is not None:
            app.tasks[message.headers["task"]](*message.payload[0])
            message.ack()
            count += 1
    return count
