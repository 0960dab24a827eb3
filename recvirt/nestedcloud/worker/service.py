"""The worker's process: its configuration, its Celery application, and its heartbeat."""

from __future__ import annotations

import logging
import os
import threading
import tomllib
import uuid
from dataclasses import dataclass, fields
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any

from celery import Celery
from celery.signals import worker_ready, worker_shutting_down

from recvirt.nestedcloud.console import is_safe_url
from recvirt.nestedcloud.model import Command, ModelError, check_name, check_uuid, decode
from recvirt.nestedcloud.portmap import FOLDER_NAME
from recvirt.nestedcloud.queue import EXECUTE, Sender, make_app, worker_queue
from recvirt.nestedcloud.worker.agent import Agent, BusyError
from recvirt.nestedcloud.worker.host import Host
from recvirt.nestedcloud.worker.hypervisor import Hypervisor
from recvirt.nestedcloud.worker.storage import QemuStorage, SparseStorage

log = logging.getLogger(__name__)
#: How long libvirtd or the broker may be away before an operation fails for it.
_PATIENCE_SECONDS = 60.0
DEFAULT_PATH = Path("/etc/recvirt-cloud/worker.toml")


class ConfigError(Exception):
    """The configuration can't be used."""


@dataclass(frozen=True)
class Config:
    """``pool`` and ``concurrency`` are Celery's; libvirt's test driver lives in one process, so it wants threads.

    ``api`` is where the central node is reached for consoles, and ``api_ca`` the file that its certificate is checked
    with (empty: the system's authorities); ``api_pinned``: that file is the certificate itself, whatever names are in
    it. They are what an image with everything in it has.
    """

    uuid: str
    name: str
    cloud: str
    broker: str
    libvirt: str
    domain_type: str
    images_dir: str
    blocks_dir: str
    run_dir: str
    pool: str = "prefork"
    concurrency: int = 4
    heartbeat_seconds: float = 5.0
    spool_dir: str = ""
    log_dir: str = "/var/log/libvirt/qemu"
    fetch_allow: tuple[str, ...] = ()
    api: str = "https://127.0.0.1"
    api_ca: str = "/etc/recvirt-cloud/tls/cert.pem"
    api_pinned: bool = False

    @property
    def fetch_networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """Where images may come from although it is not the public internet. ValueError when one is no network."""
        return tuple(ip_network(text) for text in self.fetch_allow)


def load(path: Path) -> Config:
    """The configuration. ConfigError names what is wrong in which file."""
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text())
        if unknown := sorted(set(data) - {field.name for field in fields(Config)}):
            raise ConfigError(f"{path}: unknown {', '.join(unknown)}")
        data["fetch_allow"] = tuple(data.get("fetch_allow", ()))
        config = Config(**data)
        check_uuid(config.uuid), check_uuid(config.cloud), check_name(config.name)
        _ = config.fetch_networks
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except TypeError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix('Config.__init__() ')}") from None
    if config.domain_type not in ("kvm", "qemu", "test"):
        raise ConfigError(f"{path}: domain_type {config.domain_type!r} is none of kvm, qemu, test")
    if not is_safe_url(config.api):
        raise ConfigError(f"{path}: api: want https://...: a ticket is not sent where others can read it")
    return config


def boot_id(config: Config) -> str:
    """Changes when what ran on the host runs no more. The test driver's domains end with this process."""
    if config.domain_type == "test":
        return _PROCESS_ID
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


_PROCESS_ID = str(uuid.uuid4())


def make_host(config: Config) -> Host:
    """The host that a configuration describes."""
    domain_type: Any = config.domain_type
    cgroup = 2 if Path("/sys/fs/cgroup/cgroup.controllers").exists() else 1
    return Host(
        config.cloud, domain_type, Path(config.images_dir), Path(config.blocks_dir), cgroup,
        spool_dir=Path(config.spool_dir) if config.spool_dir else None, fetch_allow=config.fetch_networks,
        keeps_files=os.geteuid() != 0, log_dir=Path(config.log_dir),
        # libvirt's test driver has networks in name only.
        forwards_dir=Path(config.run_dir) / FOLDER_NAME if domain_type != "test" else None,
    )  # fmt: skip


def make_agent(config: Config, *, connection: Any = None) -> Agent:
    """The agent that a configuration describes."""
    host = make_host(config)
    for folder in (host.images_dir, host.blocks_dir, Path(config.run_dir), host.forwards_dir or Path(config.run_dir)):
        folder.mkdir(parents=True, exist_ok=True)
    hypervisor = Hypervisor(config.libvirt, host, shared=connection)
    storage = SparseStorage(host) if host.domain_type == "test" else QemuStorage(host)
    features: dict[str, Any] = {
        "domain_type": host.domain_type, "libvirt": config.libvirt, "cgroup": host.cgroup,
        # libvirt's test driver has none.
        "console": host.domain_type != "test", "forwards": host.forwards_dir is not None,
    }  # fmt: skip
    return Agent(
        config.uuid, config.name, hypervisor, storage, Path(config.run_dir), boot_id(config), features,
        _PATIENCE_SECONDS,
    )  # fmt: skip


class Service:
    """One worker: a Celery application whose tasks the agent carries out."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.app: Celery = make_app(config.broker, (worker_queue(config.uuid),))
        self.sender = Sender(config.broker)
        self._stopping = threading.Event()
        self._agents: dict[int, Agent] = {}
        self._connection: Any = None
        if config.libvirt.startswith("test:///"):
            import libvirt

            # Held for the life of the process: the driver in it forgets everything with its last connection.
            self._connection = libvirt.open(config.libvirt)
        self._add_tasks()

    def agent(self) -> Agent:
        """This process's own: a libvirt connection does not survive a fork."""
        pid = os.getpid()
        if pid not in self._agents:
            self._agents[pid] = make_agent(self.config, connection=self._connection)
        return self._agents[pid]

    def _add_tasks(self) -> None:
        @self.app.task(name=EXECUTE)  # type: ignore[untyped-decorator]
        def execute(data: Any) -> None:
            try:
                command = decode(Command, data)
            except ModelError as error:
                # Of a newer central node, or damaged. Its lease runs out, and that is told there.
                log.error("a message that is not understood: %s", error)
                return
            try:
                self.agent().execute(command, self.sender.report)
            except BusyError:
                # The other one reports; should it die, the operation is published again.
                log.info("operation %s: another process is at it", command.operation)

    def beat(self) -> None:
        """Send a heartbeat every few seconds until the service stops; what is away is waited for."""
        seconds = self.config.heartbeat_seconds
        trouble = ""
        while not self._stopping.is_set():
            try:
                self.sender.heartbeat(self.agent().heartbeat(), expires_seconds=3 * seconds)
                trouble = ""
            except Exception as error:
                # Whatever it is (each transport has errors of its own), the next one may come through: a worker whose
                # thread has ended would pass for lost as long as it runs.
                if str(error) != trouble:
                    trouble = str(error)
                    log.error("no heartbeat: %s: %s", type(error).__name__, error)
            self._stopping.wait(seconds)

    def run(self) -> None:
        """Work until told to stop."""
        thread = threading.Thread(target=self.beat, daemon=True)
        worker_ready.connect(lambda **_: thread.start(), weak=False)
        worker_shutting_down.connect(lambda **_: self._stopping.set(), weak=False)
        words = ["worker", "--without-mingle", "--without-gossip", "--without-heartbeat", "--loglevel=INFO"]
        words += [f"--queues={worker_queue(self.config.uuid)}", f"--pool={self.config.pool}"]
        self.app.worker_main([*words, f"--concurrency={self.config.concurrency}", f"--hostname={self.config.name}@%h"])
