"""What root does at the broker for workers on other machines, with a real RabbitMQ: what an account may, and that a
revoked one is thrown out.
"""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

import pytest
from amqp import Message  # type: ignore[import-untyped]
from amqp.exceptions import (  # type: ignore[import-untyped]
    AccessRefused,
    ConnectionForced,
    PreconditionFailed,
)
from celery.contrib.testing.worker import start_worker
from kombu.connection import Connection

from recvirt.nestedcloud import join, peers, provision, tunnel
from recvirt.nestedcloud.central.consumer import is_of
from recvirt.nestedcloud.model import Command, Kind, NetworkSpec, Phase, Report, decode
from recvirt.nestedcloud.provision import RABBITMQCTL, Machine, ProvisionError, can_log_in, password_hash, toml
from recvirt.nestedcloud.queue import CENTRAL_QUEUE, EXECUTE, REPORT, Sender, make_app, worker_queue
from tests.cloud.faults.rabbitmq import RabbitMq, free_port, program
from tests.cloud.netns import until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(program() is None, reason="RabbitMQ is not installed"),
    pytest.mark.skipif("RECVIRT_TEST_DATABASE" in os.environ, reason="another database changes nothing here"),
]
CLOUD = uuid.UUID("00000000-0000-4000-8000-000000000001")
ONE, TWO = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"


class Central:
    """A central node: a real broker, and no other program."""

    def __init__(self, root: Path) -> None:
        self.broker = RabbitMq(root / "broker")
        self.port6 = free_port()
        conf = root / "broker/rabbitmq.conf"
        conf.write_text(conf.read_text() + f"listeners.tcp.six = ::1:{self.port6}\n")
        owner = (os.geteuid(), os.getegid())
        self.machine = Machine(root, self.run, lambda _user: owner, lambda _text: None)
        (root / "run").mkdir()
        self.machine.etc.mkdir(parents=True)
        self.machine.state.mkdir(parents=True)
        self.machine.central.write_text(toml({"cloud": str(CLOUD)}))
        (root / "etc/recvirt-cloud/tunnel").mkdir()
        (root / "etc/recvirt-cloud/tunnel/key").write_text("k\n")
        self.asked: list[str] = []

    def run(self, argv: Sequence[str], text: str, user: str | None) -> str:
        if tuple(argv[: len(RABBITMQCTL)]) != RABBITMQCTL:
            return ""
        words = list(argv[len(RABBITMQCTL) :])
        self.asked.append(words[0])
        script = program()
        assert script is not None
        environment = self.broker._environment
        node = environment["RABBITMQ_NODENAME"]
        done = subprocess.run(
            [str(script.with_name("rabbitmqctl")), "-q", "-n", node, *words], env=environment, capture_output=True,
            text=True, timeout=600, check=False,
        )  # fmt: skip
        if done.returncode:
            raise ProvisionError(done.stderr, done.returncode)
        return done.stdout

    def want(self, accounts: dict[str, str], revoked: Sequence[str] = ()) -> None:
        """What the dispatcher writes: account to hash."""
        listed = [
            {"uuid": key, "public_key": password_hash(key)[:43].replace("=", "A"), "address": "", "password_hash": text}
            for key, text in accounts.items()
        ]  # fmt: skip
        for number, item in enumerate(listed):
            item["public_key"] = "A" * number + "B" * (42 - number) + "A="
            item["address"] = str(tunnel.peer_address(CLOUD, number + 2))
        path = self.machine.state / "peers.json"
        document = {"version": 1, "cloud": str(CLOUD), "peers": listed, "revoked": list(revoked)}
        path.write_text(json.dumps(document))
        path.chmod(0o640)

    def url(self, worker: str, password: str) -> str:
        return f"amqp://{worker}:{password}@127.0.0.1:{self.broker.port}//"


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    made = Central(tmp_path)
    try:
        made.broker.start()
        yield made
    finally:
        made.broker.stop()


def connection_of(url: str) -> Any:
    return Connection(url)  # type: ignore[no-untyped-call]


def refused(connection: Any, work: Any) -> None:
    with pytest.raises(AccessRefused):
        work(connection.channel())


def publish(channel: Any, exchange: str, key: str) -> None:
    channel.confirm_select()
    channel.basic_publish_confirm(Message("x"), exchange=exchange, routing_key=key)


def test_an_account_is_made_confined_changed_and_thrown_out(central: Central) -> None:
    hashes = {ONE: password_hash("first"), TWO: password_hash("second")}
    central.want(hashes)
    assert peers.apply(central.machine)
    assert not peers.apply(central.machine)
    with connection_of(central.url(ONE, "first")) as one, connection_of(central.url(TWO, "second")) as two:
        one.connect()
        two.connect()
        for connection, key in ((one, ONE), (two, TWO)):
            connection.channel().queue_declare(worker_queue(key), durable=True, auto_delete=False)
        refused(one, lambda channel: channel.queue_purge(worker_queue(TWO)))
        refused(one, lambda channel: channel.basic_consume(worker_queue(TWO)))
        refused(one, lambda channel: channel.queue_declare("other"))
        refused(one, lambda channel: channel.basic_get("central"))
        refused(one, lambda channel: channel.exchange_declare("mine", "direct"))
        # Commands are the central node's to give: no worker puts one into another's queue.
        refused(one, lambda channel: publish(channel, "", worker_queue(TWO)))
        # Another password, and the connection that is there goes on.
        central.want({**hashes, ONE: password_hash("third")})
        assert peers.apply(central.machine)
        assert can_log_in(central.url(ONE, "third")) and not can_log_in(central.url(ONE, "first"))
        one.channel().basic_get(worker_queue(ONE))

        central.want({TWO: hashes[TWO]}, revoked=[ONE])
        assert peers.apply(central.machine)
        with pytest.raises((ConnectionForced, OSError)) as caught:
            one.drain_events(timeout=60)
        assert not isinstance(caught.value, TimeoutError), "it is still open"
        assert not can_log_in(central.url(ONE, "third"))
        assert two.channel().basic_get(worker_queue(TWO)) is None
    # As after a kill before anything was remembered: it is done again, and who is not there is no fault.
    (central.machine.root / tunnel.APPLIED).unlink()
    assert peers.apply(central.machine)
    assert "delete_user" in central.asked and can_log_in(central.url(TWO, "second"))
    # Out is out, whatever a restored database says.
    central.want({TWO: hashes[TWO], ONE: password_hash("third")})
    assert not peers.apply(central.machine)
    assert not can_log_in(central.url(ONE, "third"))


def test_a_broker_that_has_lost_its_accounts_gets_them_again(central: Central) -> None:
    central.want({ONE: password_hash("first")})
    provision.write(central.machine, central.machine.etc / "broker-permissions.json", "1", reader=None)
    assert peers.apply(central.machine)
    central.run([*RABBITMQCTL, "delete_user", ONE], "", None)
    # The set-up, too, has found its accounts missing.
    os.utime(central.machine.etc / "broker-permissions.json", ns=(1, 1))
    assert peers.apply(central.machine)
    assert can_log_in(central.url(ONE, "first"))


def test_a_worker_finds_the_broker_by_an_ipv6_address(central: Central) -> None:
    central.want({ONE: password_hash("first")})
    peers.apply(central.machine)
    url = join.broker_url(ONE, "first", IPv6Address("::1")).replace("5672", str(central.port6))
    assert can_log_in(url)


class Inbox:
    """The central node's consumer, and a worker that sends to it."""

    def __init__(self, central: Central) -> None:
        url = central.broker.url
        self.app = make_app(url, (CENTRAL_QUEUE,))
        self.heard: list[tuple[str, str]] = []

        @self.app.task(name=REPORT, bind=True)  # type: ignore[untyped-decorator]
        def report(task: Any, data: Any) -> None:
            said = decode(Report, data)
            self.heard.append((said.worker, "taken" if is_of(said.worker, task.request.properties, url) else "not"))


def test_a_worker_tells_the_central_node_in_its_own_name_alone(central: Central) -> None:
    central.want({ONE: password_hash("first")})
    peers.apply(central.machine)
    inbox = Inbox(central)
    with start_worker(inbox.app, pool="solo", perform_ping_check=False, shutdown_timeout=60):
        sender = Sender(central.url(ONE, "first"))
        for worker in (ONE, TWO):
            sender.report(Report(TWO, 1, worker, Phase.RUNNING))
        assert until(lambda: len(inbox.heard) == 2)
        # Whose account it is, the broker itself says.
        sender._to_central["user_id"] = TWO
        with pytest.raises(PreconditionFailed):
            sender.report(Report(TWO, 1, TWO, Phase.RUNNING))
    assert sorted(inbox.heard) == [(ONE, "taken"), (TWO, "not")]


def test_a_worker_with_these_rights_listens_to_its_own_queue(central: Central) -> None:
    """With Celery as the worker's service uses it, which declares exchanges of its own."""
    central.want({ONE: password_hash("first")})
    peers.apply(central.machine)
    app = make_app(central.url(ONE, "first"), (worker_queue(ONE),))
    done: list[str] = []

    @app.task(name=EXECUTE)  # type: ignore[untyped-decorator]
    def execute(data: Any) -> None:
        done.append(data["operation"])

    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=60):
        command = Command(TWO, 1, Kind.NETWORK_ENSURE, 1, network=NetworkSpec(ONE, "net"))
        Sender(central.broker.url).command(ONE, command)
        assert until(lambda: done == [TWO])
