"""The accounts at the broker: who may use which queue, and how they come there.

Does not own: the broker's configuration (its package's file, and ``exports.py`` for the tunnel), or accounts of
workers elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections.abc import Mapping
from urllib.parse import urlsplit

from recvirt.nestedcloud import exports
from recvirt.nestedcloud.machine import Machine, write

#: The central node's account at the broker; each worker has its UUID for one.
BROKER_CENTRAL = "central"
BROKER_USER = "rabbitmq"
SERVICE = "rabbitmq-server.service"
#: Every host has the same node name: the broker's data carry it.
RABBITMQCTL = (
    # It is a node of its own while it runs, and would listen to everybody.
    "env", "RABBITMQ_CTL_ERL_ARGS=-kernel inet_dist_use_interface {127,0,0,1}",
    "rabbitmqctl", "-q", "-n", "rabbit@localhost",
)  # fmt: skip
_VHOST = "/"


def permissions(user: str) -> tuple[str, str, str]:
    """What an account may configure, write to and read from (RabbitMQ's access control): its own queues, and the
    central node's inbox.

    Not the default exchange: it asks nobody before it puts a message into a queue, and commands to other workers are
    the central node's alone.
    """
    if user == BROKER_CENTRAL:
        return ".*", ".*", ".*"
    own = rf"worker\.{user}(\.console)?"
    return f"^{own}$", f"^({own}|central)$", f"^{own}$"


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
    machine.run(["systemctl", "start", SERVICE], "", None)
    urls = [url(user, password) for user, password in passwords.items()]
    # What an older version allowed is brought to this one's.
    stamp = machine.etc / "broker-permissions.json"
    allowed = json.dumps({user: permissions(user) for user in passwords})
    is_known = stamp.exists() and stamp.read_text() == allowed
    if not is_known or not all(machine.can_log_in(each) for each in urls):
        machine.tell("making the accounts at the broker")
        path = machine.root / "run/recvirt-cloud-accounts.json"
        write(machine, path, definitions(passwords), reader=BROKER_USER)
        try:
            machine.run([*RABBITMQCTL, "import_definitions", str(path)], "", None)
        finally:
            path.unlink()
        write(machine, stamp, allowed, reader=None)
    if machine.can_log_in(url("guest", "guest")):
        machine.run([*RABBITMQCTL, "delete_user", "guest"], "", None)
    _ensure_tunnel_listener(machine, passwords[BROKER_CENTRAL])


def account_of(address: str) -> tuple[str, str]:
    """Account and password in a broker's URL."""
    parts = urlsplit(address)
    return parts.username or "", parts.password or ""


def password_of(address: str) -> str:
    """The password in a broker's URL that was written here before; empty when there is none."""
    return account_of(address)[1]


def url(user: str, password: str, host: str = "127.0.0.1") -> str:
    """How an account reaches the broker."""
    return f"amqp://{user}:{password}@{host}:5672//"


def _ensure_tunnel_listener(machine: Machine, password: str) -> None:
    """A broker that started before the tunnel had its address does not listen there; it listens from its start on."""
    host = exports.broker_host(machine)
    if host is None or machine.can_log_in(url(BROKER_CENTRAL, password, host)):
        return
    machine.tell("starting the broker again: it does not listen in the tunnel")
    machine.run(["systemctl", "restart", SERVICE], "", None)
