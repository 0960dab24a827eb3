"""The first set-up of a machine that carries the cloud: secrets, database, broker, certificate, configuration.

Runs as root at each boot (``recvirt-cloud setup``) and does what is missing: killed anywhere, the next run goes on.
Nothing secret is in an image; all of it is made here. Owns the order of the steps and who may read which file.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recvirt.nestedcloud import broker, exports
from recvirt.nestedcloud.broker import BROKER_CENTRAL, BROKER_USER, RABBITMQCTL, password_hash, permissions
from recvirt.nestedcloud.machine import (
    CENTRAL,
    WORKER,
    Machine,
    ProvisionError,
    UpgradeFailedError,
    can_log_in,
    read,
    run_program,
    toml,
    write,
)
from recvirt.nestedcloud.model import NAME
from recvirt.nestedcloud.statuses import ExitStatus

__all__ = [
    "BROKER_CENTRAL", "BROKER_USER", "RABBITMQCTL", "Machine", "ProvisionError", "UpgradeFailedError", "can_log_in",
    "password_hash", "permissions", "read", "run_program", "toml", "write",
]  # fmt: skip

CENTRAL_USER, WORKER_USER = "recvirt-central", "recvirt-worker"
#: Who may see uploads, and who (QEMU) may use disks and images.
SPOOL_GROUP, DISKS_GROUP = "recvirt-spool", "recvirt-disks"
_CERTIFICATE_DAYS = 3650
_NESTED_CHECK = "recvirt-nested-check"
#: Its status when VMs run under KVM, but can't run VMs of their own.
_NOT_DEEPER = 14


def own_name() -> str:
    """The machine's host name, as far as it makes a name."""
    name = socket.gethostname().split(".")[0].lower()
    return name if NAME.fullmatch(name) else "local"


def domain_type(machine: Machine) -> str:
    """kvm where a VM was seen to run under it on this very machine, else qemu: /dev/kvm may be there and useless."""
    try:
        machine.run([_NESTED_CHECK, "--json"], "", None)
        return "kvm"
    except ProvisionError as error:
        if error.status == _NOT_DEEPER:
            return "kvm"
        machine.tell(f"VMs will be emulated: {error}")
        return "qemu"


def ensure_folders(machine: Machine) -> None:
    """The folders of disks, for the worker; the state, for the central node; the spool, for both; logs."""
    # Whoever runs a service may look here; the files themselves say who reads which.
    machine.etc.mkdir(parents=True, exist_ok=True)
    machine.etc.chmod(0o755)
    _ensure_folder(machine, machine.state, CENTRAL_USER, CENTRAL_USER, 0o750)
    _ensure_folder(machine, machine.spool, CENTRAL_USER, SPOOL_GROUP, 0o2770)
    # virtlogd writes there as root; what an instance left is the worker's to remove.
    _ensure_folder(machine, machine.logs, WORKER_USER, WORKER_USER, 0o750)
    for path in exports.folders(machine):
        if path.name not in exports.sources(machine):
            _ensure_folder(machine, path, WORKER_USER, DISKS_GROUP, 0o2771)


def ensure_mounts(machine: Machine) -> None:
    """The same of those that come from a file server, which may not let this machine's root set it."""
    for name, source in exports.sources(machine).items():
        try:
            _ensure_folder(machine, machine.root / "var/lib/recvirt" / name, WORKER_USER, DISKS_GROUP, 0o2771)
        except OSError as error:
            machine.tell(f"{name} come from {source}, and their folder's owner can't be set: {error.strerror}")


def _ensure_folder(machine: Machine, path: Path, user: str, group: str, mode: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        os.chown(path, machine.owner_of(user)[0], machine.group_of(group))
    path.chmod(mode)


def ensure_certificate(machine: Machine) -> None:
    """A key and a certificate of its own for the TLS front, until the owner brings better ones."""
    folder = machine.etc / "tls"
    key, certificate = folder / "key.pem", folder / "cert.pem"
    if key.exists() and certificate.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    name = socket.gethostname()
    part_key, part = folder / ".key.part", folder / ".cert.part"
    # Made under a mask that leaves others nothing; the front reads it as root before it drops its rights.
    previous = os.umask(0o077)
    try:
        machine.run([
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc",
            "-keyout", str(part_key), "-out", str(part), "-days", str(_CERTIFICATE_DAYS), "-subj", "/CN=recvirt-cloud",
            "-addext", f"subjectAltName=DNS:{name},DNS:localhost,IP:127.0.0.1",
        ], "", None)  # fmt: skip
    finally:
        os.umask(previous)
    part_key.rename(key)
    part.chmod(0o644)
    part.rename(certificate)


def ensure_database(machine: Machine) -> None:
    """A PostgreSQL cluster, a role for the service's own user, and its database."""
    listed = machine.run(["pg_lsclusters", "--no-header"], "", None).split("\n")
    clusters = [line.split() for line in listed if line.strip()]
    if not clusters:
        version = sorted(path.name for path in (machine.root / "usr/lib/postgresql").iterdir())[-1]
        machine.tell(f"making the database cluster {version}/main")
        words = ["pg_createcluster", version, "main", "--", "--auth-local=peer"]
        machine.run(words, "", None)
        clusters = [[version, "main"]]
    version, name = clusters[0][:2]
    machine.run(["systemctl", "start", f"postgresql@{version}-{name}.service"], "", None)

    def is_there(table: str, column: str) -> bool:
        query = f"SELECT 1 FROM {table} WHERE {column} = '{CENTRAL_USER}'"  # noqa: S608 - our own words
        return machine.run(["psql", "-XtAc", query], "", "postgres").strip() == "1"

    if not is_there("pg_roles", "rolname"):
        machine.run(["createuser", "--no-createdb", "--no-createrole", "--no-superuser", CENTRAL_USER], "", "postgres")
    if not is_there("pg_database", "datname"):
        words = ["createdb", "--owner", CENTRAL_USER, "--encoding", "UTF8", "--template", "template0", CENTRAL_USER]
        machine.run(words, "", "postgres")


def _complete(machine: Machine, path: Path, before: Mapping[str, Any], wanted: Mapping[str, Any], reader: str) -> None:
    # What an older version wrote keeps its values, and gets those that it did not know.
    if not set(wanted) <= set(before):
        write(machine, path, toml({**wanted, **before}), reader=reader)


def configure_central(machine: Machine) -> None:
    """The central node's configuration, with secrets of its own."""
    before = read(machine.central)
    password = broker.password_of(before.get("broker", "")) or secrets.token_urlsafe(32)
    key_path = machine.etc / "secret-key"
    if not key_path.exists():
        write(machine, key_path, secrets.token_urlsafe(48), reader=CENTRAL_USER)
    _complete(machine, machine.central, before, {
        "cloud": str(uuid.uuid4()), "database": f"postgresql:{CENTRAL_USER}",
        "broker": broker.url(BROKER_CENTRAL, password), "secret_key_path": str(key_path),
        "state_dir": str(machine.state), "spool_dir": str(machine.spool), "allowed_hosts": ["*"],
    }, CENTRAL_USER)  # fmt: skip


def configure_worker(machine: Machine) -> None:
    """The configuration of the worker on the central node's own machine."""
    before, central = read(machine.worker), read(machine.central)
    worker = before.get("uuid") or str(uuid.uuid4())
    password = broker.password_of(before.get("broker", "")) or secrets.token_urlsafe(32)
    _complete(machine, machine.worker, before, {
        "uuid": worker, "name": own_name(), "cloud": central["cloud"], "broker": broker.url(worker, password),
        "libvirt": "qemu:///system", "domain_type": before.get("domain_type") or domain_type(machine),
        "images_dir": "/var/lib/recvirt/images", "blocks_dir": "/var/lib/recvirt/blocks",
        "run_dir": "/run/recvirt-worker", "spool_dir": str(machine.spool),
        "log_dir": str(machine.logs),
    }, WORKER_USER)  # fmt: skip


def has_joined_another(machine: Machine) -> bool:
    """Whether the worker here belongs to another machine's cloud."""
    return read(machine.worker).get("cloud", read(machine.central).get("cloud")) != read(machine.central).get("cloud")


def prepare(machine: Machine) -> None:
    """What has to be there before a broker or a file server starts: configuration, tunnel, and who listens in it."""
    ensure_folders(machine)
    if CENTRAL in machine.roles:
        configure_central(machine)
        exports.ensure(machine, uuid.UUID(read(machine.central)["cloud"]))


def setup(machine: Machine) -> None:
    """Everything, in order. ProvisionError when a step does not work; the next run starts where this one stopped."""
    if not machine.roles:
        raise ProvisionError("neither recvirt-cloud-central nor recvirt-cloud-worker is installed")
    prepare(machine)
    if CENTRAL in machine.roles:
        _setup_central(machine)
    elif machine.worker.exists():
        machine.tell("this machine is a worker of a cloud elsewhere")
    else:
        machine.tell("this machine has joined no cloud yet: recvirt-cloud worker join")


def _setup_central(machine: Machine) -> None:
    ensure_mounts(machine)
    ensure_certificate(machine)
    accounts, words = [machine.central], []
    if WORKER in machine.roles and has_joined_another(machine):
        machine.tell("the worker here has joined another cloud, and is none of this one's")
    elif WORKER in machine.roles:
        configure_worker(machine)
        worker = read(machine.worker)
        accounts, words = [*accounts, machine.worker], ["--worker", worker["uuid"], "--name", worker["name"]]
    ensure_database(machine)
    broker.ensure_broker(machine, dict(broker.account_of(read(path)["broker"]) for path in accounts))
    program = shutil.which("recvirt-cloud") or "recvirt-cloud"
    try:
        machine.run([program, "central", "migrate"], "", CENTRAL_USER)
    except ProvisionError as error:
        if error.status == ExitStatus.UPGRADE:
            raise UpgradeFailedError(str(error), error.status) from None
        raise
    machine.run([program, "central", "init", *words], "", CENTRAL_USER)
    machine.tell("the cloud is set up")
