"""The first set-up of a machine that carries the cloud: secrets, database, broker, certificate, configuration.

Runs as root at each boot (``recvirt-cloud setup``) and does what is missing: killed anywhere, the next run goes on.
Nothing secret is in an image; all of it is made here. Owns the order of the steps and who may read which file.
"""

from __future__ import annotations

import base64
import grp
import hashlib
import json
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tomllib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recvirt.nestedcloud.model import NAME
from recvirt.nestedcloud.statuses import ExitStatus

CENTRAL_USER, WORKER_USER, BROKER_USER = "recvirt-central", "recvirt-worker", "rabbitmq"
#: Who may see uploads, and who (QEMU) may use disks and images.
SPOOL_GROUP, DISKS_GROUP = "recvirt-spool", "recvirt-disks"
#: The central node's account at the broker; each worker has its UUID for one.
BROKER_CENTRAL = "central"
#: Every host has the same node name: the broker's data carry it.
RABBITMQCTL = (
    # It is a node of its own while it runs, and would listen to everybody.
    "env", "RABBITMQ_CTL_ERL_ARGS=-kernel inet_dist_use_interface {127,0,0,1}",
    "rabbitmqctl", "-q", "-n", "rabbit@localhost",
)  # fmt: skip
_VHOST = "/"
#: RabbitMQ's tools alone take minutes under emulation.
_COMMAND_SECONDS = 1800
_CERTIFICATE_DAYS = 3650
_NESTED_CHECK = "recvirt-nested-check"
#: Its status when VMs run under KVM, but can't run VMs of their own.
_NOT_DEEPER = 14


class ProvisionError(Exception):
    """A step did not work; the text says which, and what the program said. ``status`` is the program's, if it ran."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class UpgradeFailedError(ProvisionError):
    """The database could not be brought to this version, and is as it was. Trying again gives the same."""


#: argv, what it gets on stdin, and the user it runs as (None: root) -> its stdout.
Run = Callable[[Sequence[str], str, str | None], str]


def run_program(argv: Sequence[str], text: str, user: str | None) -> str:
    """Run a program; ProvisionError with what it said. Secrets come on stdin: everybody can read a command line."""
    words = ["runuser", "-u", user, "--", *argv] if user else list(argv)
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False, cwd="/"
        )
    except FileNotFoundError as error:
        raise ProvisionError(f"{error.filename} is not installed") from None
    except subprocess.TimeoutExpired:
        raise ProvisionError(f"{argv[0]} did not end in {_COMMAND_SECONDS} s") from None
    if done.returncode != 0:
        said = done.stderr.strip()[-800:] or f"status {done.returncode}"
        raise ProvisionError(f"{' '.join(argv[:3])}: {said}", done.returncode)
    return done.stdout


def can_log_in(url: str) -> bool:
    """Whether the broker takes a URL's account and password."""
    from kombu.connection import Connection

    try:
        with Connection(url, connect_timeout=20) as connection:  # type: ignore[no-untyped-call]
            connection.connect()
            return True
    except Exception:
        # Away, refused, of another protocol: all the same here, the set-up finds out which.
        return False


@dataclass(frozen=True)
class Machine:
    """Where everything lies; tests have another root folder, and programs of their own."""

    root: Path = Path("/")
    run: Run = run_program
    owner_of: Callable[[str], tuple[int, int]] = field(default=lambda user: pwd.getpwnam(user)[2:4])
    tell: Callable[[str], None] = print
    can_log_in: Callable[[str], bool] = can_log_in
    group_of: Callable[[str], int] = field(default=lambda group: grp.getgrnam(group).gr_gid)

    @property
    def etc(self) -> Path:
        """The configuration."""
        return self.root / "etc/recvirt-cloud"

    @property
    def state(self) -> Path:
        """What the central node keeps beside its database."""
        return self.root / "var/lib/recvirt-cloud"

    @property
    def spool(self) -> Path:
        """Uploads on their way from the API to the worker here."""
        return self.root / "var/lib/recvirt-cloud-spool"

    @property
    def logs(self) -> Path:
        """What serial consoles have said."""
        return self.root / "var/log/recvirt-cloud"

    @property
    def central(self) -> Path:
        """The central node's configuration."""
        return self.etc / "central.toml"

    @property
    def worker(self) -> Path:
        """The worker's configuration."""
        return self.etc / "worker.toml"


def write(machine: Machine, path: Path, text: str, *, reader: str | None, mode: int = 0o640) -> None:
    """A file of root's that one service may read (its group): whole or not there, and never open to others before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        if reader is not None:
            os.fchown(stream.fileno(), 0 if os.geteuid() == 0 else -1, machine.owner_of(reader)[1])
        os.fchmod(stream.fileno(), mode)
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.rename(path)


def toml(values: Mapping[str, Any]) -> str:
    """A flat TOML document; JSON's strings, numbers and lists are TOML's."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def read(path: Path) -> dict[str, Any]:
    """What a TOML file holds; nothing when it is not there."""
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}


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
    """The two mounts' folders, for the worker; the state, for the central node; the spool, for both; logs."""
    # Whoever runs a service may look here; the files themselves say who reads which.
    machine.etc.mkdir(parents=True, exist_ok=True)
    machine.etc.chmod(0o755)
    for path, user, group, mode in (
        (machine.state, CENTRAL_USER, CENTRAL_USER, 0o750),
        (machine.spool, CENTRAL_USER, SPOOL_GROUP, 0o2770),
        # virtlogd writes there as root; what an instance left is the worker's to remove.
        (machine.logs, WORKER_USER, WORKER_USER, 0o750),
        (machine.root / "var/lib/recvirt/images", WORKER_USER, DISKS_GROUP, 0o2771),
        (machine.root / "var/lib/recvirt/blocks", WORKER_USER, DISKS_GROUP, 0o2771),
    ):
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


def permissions(user: str) -> tuple[str, str, str]:
    """What an account may configure, write to and read from (RabbitMQ's access control): its own queues, and the
    central node's inbox. Messages reach a queue through the default exchange, which checks the queue's name.
    """
    if user == BROKER_CENTRAL:
        return ".*", ".*", ".*"
    own = rf"worker\.{user}(\.console)?"
    return f"^{own}$", rf"^({own}|central|amq\.default|celery)$", f"^{own}$"


def password_hash(password: str) -> str:
    """What RabbitMQ keeps of a password ("Computing password hashes" in its documentation): salted SHA-256."""
    salt = secrets.token_bytes(4)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def definitions(passwords: Mapping[str, str]) -> str:
    """Accounts and permissions as a document that RabbitMQ imports at once; again, it changes what is different."""
    names = ("configure", "write", "read")
    return json.dumps({
        "users": [
            {"name": user, "password_hash": password_hash(password), "tags": [],
             "hashing_algorithm": "rabbit_password_hashing_sha256"}
            for user, password in passwords.items()
        ],
        "permissions": [
            {"user": user, "vhost": _VHOST, **dict(zip(names, permissions(user), strict=True))} for user in passwords
        ],
    })  # fmt: skip


def ensure_broker(machine: Machine, passwords: Mapping[str, str]) -> None:
    """RabbitMQ with our accounts and without its well-known one. Its own tools are slow, so a login is tried first."""
    machine.run(["systemctl", "start", "rabbitmq-server.service"], "", None)
    urls = [_broker_url(user, password) for user, password in passwords.items()]
    # What an older version allowed is brought to this one's.
    stamp = machine.etc / "broker-permissions.json"
    allowed = json.dumps({user: permissions(user) for user in passwords})
    is_known = stamp.exists() and stamp.read_text() == allowed
    if not is_known or not all(machine.can_log_in(url) for url in urls):
        machine.tell("making the accounts at the broker")
        path = machine.root / "run/recvirt-cloud-accounts.json"
        write(machine, path, definitions(passwords), reader=BROKER_USER)
        try:
            machine.run([*RABBITMQCTL, "import_definitions", str(path)], "", None)
        finally:
            path.unlink()
        write(machine, stamp, allowed, reader=None)
    if machine.can_log_in(_broker_url("guest", "guest")):
        machine.run([*RABBITMQCTL, "delete_user", "guest"], "", None)


def _password_of(url: str) -> str:
    """The password in a broker's URL that was written here before."""
    from urllib.parse import urlsplit

    return urlsplit(url).password or ""


def _broker_url(user: str, password: str) -> str:
    return f"amqp://{user}:{password}@127.0.0.1:5672//"


def _complete(machine: Machine, path: Path, before: Mapping[str, Any], wanted: Mapping[str, Any], reader: str) -> None:
    if not set(wanted) <= set(before):
        write(machine, path, toml({**wanted, **before}), reader=reader)


def configure(machine: Machine) -> dict[str, str]:
    """Both configurations, with secrets of their own; the broker's passwords by account."""
    before_central, before_worker = read(machine.central), read(machine.worker)
    cloud = before_central.get("cloud") or str(uuid.uuid4())
    worker = before_worker.get("uuid") or str(uuid.uuid4())
    passwords = {
        BROKER_CENTRAL: _password_of(before_central.get("broker", "")) or secrets.token_urlsafe(32),
        worker: _password_of(before_worker.get("broker", "")) or secrets.token_urlsafe(32),
    }
    key_path = machine.etc / "secret-key"
    if not key_path.exists():
        write(machine, key_path, secrets.token_urlsafe(48), reader=CENTRAL_USER)
    # What an older version wrote keeps its values, and gets those that it did not know.
    _complete(machine, machine.worker, before_worker, {
        "uuid": worker, "name": own_name(), "cloud": cloud, "broker": _broker_url(worker, passwords[worker]),
        "libvirt": "qemu:///system", "domain_type": before_worker.get("domain_type") or domain_type(machine),
        "images_dir": "/var/lib/recvirt/images", "blocks_dir": "/var/lib/recvirt/blocks",
        "run_dir": "/run/recvirt-worker", "spool_dir": str(machine.spool),
        "log_dir": str(machine.logs),
    }, WORKER_USER)  # fmt: skip
    _complete(machine, machine.central, before_central, {
        "cloud": cloud, "database": f"postgresql:{CENTRAL_USER}",
        "broker": _broker_url(BROKER_CENTRAL, passwords[BROKER_CENTRAL]), "secret_key_path": str(key_path),
        "state_dir": str(machine.state), "spool_dir": str(machine.spool), "allowed_hosts": ["*"],
    }, CENTRAL_USER)  # fmt: skip
    return passwords


def login_here(machine: Machine) -> Path:
    """Write an access file with an administrator's token for the user behind sudo; its path."""
    from recvirt.nestedcloud.client.api import Access

    name = os.environ.get("SUDO_USER") or "root"
    program = shutil.which("recvirt-cloud") or "recvirt-cloud"
    token = machine.run([program, "central", "token", "--name", f"{name} on {own_name()}"], "", CENTRAL_USER).strip()
    person = pwd.getpwnam(name)
    path = Path(person.pw_dir) / ".config/recvirt-cloud/client.toml"
    # As the user: a home may hold links to anywhere.
    code = (
        "import sys, tomllib; from pathlib import Path; from recvirt.nestedcloud.client.api import Access, save_access;"
        " save_access(Access(**tomllib.loads(sys.stdin.read())), Path(sys.argv[1]))"
    )
    text = toml(vars(Access("https://127.0.0.1", token, ca=str(machine.etc / "tls/cert.pem"))))
    machine.run(["python3", "-c", code, str(path)], text, name)
    return path


def setup(machine: Machine) -> None:
    """Everything, in order. ProvisionError when a step does not work; the next run starts where this one stopped."""
    ensure_folders(machine)
    ensure_certificate(machine)
    passwords = configure(machine)
    ensure_database(machine)
    ensure_broker(machine, passwords)
    program = shutil.which("recvirt-cloud") or "recvirt-cloud"
    try:
        machine.run([program, "central", "migrate"], "", CENTRAL_USER)
    except ProvisionError as error:
        if error.status == ExitStatus.UPGRADE:
            raise UpgradeFailedError(str(error), error.status) from None
        raise
    worker = read(machine.worker)
    machine.run([program, "central", "init", "--worker", worker["uuid"], "--name", worker["name"]], "", CENTRAL_USER)
    machine.tell("the cloud is set up")
