"""Queues between the central node and the workers: one Celery application, whatever carries its messages.

RabbitMQ (``amqp://...``) with quorum queues in an image; a folder (``filesystem:PATH``) where everything runs on one
machine and nothing is to be installed. JSON only: nothing that could be code is read from a queue.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from celery import Celery
from celery.worker.consumer import Consumer as CeleryConsumer
from kombu.entity import Queue

from recvirt.nestedcloud.console import ConsoleCall
from recvirt.nestedcloud.model import Command, Heartbeat, Report, check_uuid, encode

EXECUTE = "recvirt.execute"
REPORT = "recvirt.report"
HEARTBEAT = "recvirt.heartbeat"
CONSOLE = "recvirt.console"
CENTRAL_QUEUE = "central"
#: A message that nobody could keep is put aside after so many deliveries (RabbitMQ's x-delivery-limit).
_DELIVERIES_MAX = 20
#: A command that nobody took is dropped after so long: its lease is over by then, and another one is under way. A
#: worker that was cut off for hours finds the last one, not all.
COMMAND_SECONDS = 900
#: A broker that does not confirm a message in this time is taken for gone.
_CONFIRM_SECONDS = 30


class Consumer(CeleryConsumer):  # type: ignore[misc]
    """Celery's, without its delayed delivery: 28 exchanges for what is never asked for here, which no worker's account
    may make, and whose refusal Celery writes into the log together with the broker's URL and password.
    """

    class Blueprint(CeleryConsumer.Blueprint):  # type: ignore[misc]
        """The steps in which it starts."""

        default_steps = tuple(
            step for step in CeleryConsumer.Blueprint.default_steps if not str(step).endswith(":DelayedDelivery")
        )


def worker_queue(worker: str) -> str:
    """The queue of one worker."""
    return f"worker.{check_uuid(worker)}"


def _arguments(broker: str) -> dict[str, Any]:
    """How a queue is declared: replicated and on disk, where there is a broker."""
    if broker.startswith("filesystem:"):
        return {}
    return {"x-queue-type": "quorum", "x-delivery-limit": _DELIVERIES_MAX}


def console_queue(worker: str) -> str:
    """Where a worker is called to a console; beside its queue, so that no operation is waited for."""
    return f"{worker_queue(worker)}.console"


def make_app(broker: str, queues: tuple[str, ...] = ()) -> Celery:
    """A Celery application that listens to ``queues``."""
    app = Celery("recvirt-cloud", set_as_current=False)
    options: dict[str, Any]
    if broker.startswith("filesystem:"):
        folder = Path(broker.removeprefix("filesystem:"))
        for name in ("messages", "control"):
            (folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        url = "filesystem://"
        messages = str(folder / "messages")
        options = {"data_folder_in": messages, "data_folder_out": messages, "control_folder": str(folder / "control")}
    else:
        url, options = broker, {"confirm_publish": True}
    app.conf.update(
        broker_url=url, broker_transport_options=options, broker_connection_retry_on_startup=True,
        task_serializer="json", accept_content=["json"], result_backend=None, task_ignore_result=True,
        task_acks_late=True, task_reject_on_worker_lost=True, worker_prefetch_multiplier=1,
        task_queues=[_queue(name, _arguments(broker)) for name in queues],
        worker_consumer=f"{__name__}:Consumer", task_create_missing_queues=True,
        worker_hijack_root_logger=False, worker_enable_remote_control=False,
        worker_send_task_events=False, task_publish_retry_policy={"max_retries": 3, "interval_step": 0.5},
    )  # fmt: skip
    app.conf.task_default_queue = queues[0] if queues else CENTRAL_QUEUE
    return app


def _queue(name: str, arguments: dict[str, Any], *, make: bool = True) -> Queue:
    return Queue(name, queue_arguments=arguments, no_declare=not make)  # type: ignore[no-untyped-call]


class Sender:
    """Puts messages into queues."""

    def __init__(self, broker: str) -> None:
        # Without queues of its own: Celery takes a sender that has quorum queues for one that wants delayed delivery.
        self._app = make_app(broker)
        self._is_folder = broker.startswith("filesystem:")
        self._arguments = _arguments(broker)
        # The default exchange would let an account into every queue, so workers' may not use it: Celery has made one
        # that is called as the queue. And the broker vouches for whose account a message comes from.
        self._to_central: dict[str, str] = {}
        if not self._is_folder:
            names = dict.fromkeys(("exchange", "routing_key"), CENTRAL_QUEUE)
            self._to_central = {**names, "user_id": urlsplit(broker).username or ""}

    def _send(self, task: str, queue: Queue, message: Any, **options: Any) -> None:
        self._app.send_task(task, args=[encode(message)], queue=queue, confirm_timeout=_CONFIRM_SECONDS, **options)

    def _central(self) -> Queue:
        """The central node makes it: a worker's account may not."""
        return _queue(CENTRAL_QUEUE, self._arguments, make=False)

    def command(self, worker: str, command: Command) -> None:
        """To a worker, whether it is there already or not."""
        # RabbitMQ measures the time itself; a folder has only the one clock of its host.
        word = "expires" if self._is_folder else "expiration"
        self._send(EXECUTE, _queue(worker_queue(worker), self._arguments), command, **{word: COMMAND_SECONDS})

    def console(self, worker: str, call: ConsoleCall, expires_seconds: float) -> None:
        """To the part of a worker that has the consoles, unless it is too late by then."""
        queue = _queue(console_queue(worker), self._arguments)
        self._send(CONSOLE, queue, call, expires=expires_seconds, expiration=expires_seconds)

    def report(self, report: Report) -> None:
        """To the central node."""
        self._send(REPORT, self._central(), report, **self._to_central)

    def heartbeat(self, beat: Heartbeat, expires_seconds: float) -> None:
        """To the central node, unless it is too busy to listen in time."""
        self._send(HEARTBEAT, self._central(), beat, expires=expires_seconds, **self._to_central)


def trouble_with(app: Celery, broker: str, seconds: float = 2.0) -> str:
    """Why the broker can't be reached; nothing when it can."""
    if broker.startswith("filesystem:"):
        folder = Path(broker.removeprefix("filesystem:"))
        return "" if os.access(folder, os.W_OK) else f"{folder} can't be written to"
    try:
        with app.connection_for_write(connect_timeout=seconds) as connection:
            connection.connect()
    except Exception as error:
        # Each transport has errors of its own; their texts may hold its URL with the password.
        return type(error).__name__
    return ""
