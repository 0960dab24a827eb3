"""Queues between the central node and the workers: one Celery application, whatever carries its messages.

RabbitMQ (``amqp://...``) with quorum queues in an image; a folder (``filesystem:PATH``) where everything runs on one
machine and nothing is to be installed. JSON only: nothing that could be code is read from a queue.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery import Celery
from kombu.entity import Queue

from recvirt.nestedcloud.model import Command, Heartbeat, Report, check_uuid, encode

EXECUTE = "recvirt.execute"
REPORT = "recvirt.report"
HEARTBEAT = "recvirt.heartbeat"
CENTRAL_QUEUE = "central"
#: A message that nobody could keep is put aside after so many deliveries (RabbitMQ's x-delivery-limit).
_DELIVERIES_MAX = 20
#: A command that nobody took is dropped after so long: its lease is over by then, and another one is under way. A
#: worker that was cut off for hours finds the last one, not all.
COMMAND_SECONDS = 900
#: A broker that does not confirm a message in this time is taken for gone.
_CONFIRM_SECONDS = 30


def worker_queue(worker: str) -> str:
    """The queue of one worker."""
    return f"worker.{check_uuid(worker)}"


def make_app(broker: str, queues: tuple[str, ...] = ()) -> Celery:
    """A Celery application that listens to ``queues``."""
    app = Celery("recvirt-cloud", set_as_current=False)
    options: dict[str, Any]
    arguments: dict[str, Any] = {}
    if broker.startswith("filesystem:"):
        folder = Path(broker.removeprefix("filesystem:"))
        for name in ("messages", "control"):
            (folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        url = "filesystem://"
        messages = str(folder / "messages")
        options = {"data_folder_in": messages, "data_folder_out": messages, "control_folder": str(folder / "control")}
    else:
        url, options = broker, {"confirm_publish": True}
        arguments = {"x-queue-type": "quorum", "x-delivery-limit": _DELIVERIES_MAX}
    app.conf.update(
        broker_url=url, broker_transport_options=options, broker_connection_retry_on_startup=True,
        task_serializer="json", accept_content=["json"], result_backend=None, task_ignore_result=True,
        task_acks_late=True, task_reject_on_worker_lost=True, worker_prefetch_multiplier=1,
        task_queues=[_queue(name, arguments) for name in queues],
        task_create_missing_queues=True, worker_hijack_root_logger=False, worker_enable_remote_control=False,
        worker_send_task_events=False, task_publish_retry_policy={"max_retries": 3, "interval_step": 0.5},
    )  # fmt: skip
    app.conf.task_default_queue = queues[0] if queues else CENTRAL_QUEUE
    return app


def _queue(name: str, arguments: dict[str, Any]) -> Queue:
    return Queue(name, queue_arguments=arguments)  # type: ignore[no-untyped-call]


class Sender:
    """Puts messages into queues."""

    def __init__(self, app: Celery, broker: str) -> None:
        self._app = app
        self._is_folder = broker.startswith("filesystem:")
        self._arguments = {} if self._is_folder else {
            "x-queue-type": "quorum", "x-delivery-limit": _DELIVERIES_MAX,
        }  # fmt: skip

    def _send(self, task: str, queue: str, message: Any, **options: Any) -> None:
        self._app.send_task(
            task, args=[encode(message)], queue=_queue(queue, self._arguments), confirm_timeout=_CONFIRM_SECONDS,
            **options,
        )  # fmt: skip

    def command(self, worker: str, command: Command) -> None:
        """To a worker."""
        # RabbitMQ measures the time itself; a folder has only the one clock of its host.
        word = "expires" if self._is_folder else "expiration"
        self._send(EXECUTE, worker_queue(worker), command, **{word: COMMAND_SECONDS})

    def report(self, report: Report) -> None:
        """To the central node."""
        self._send(REPORT, CENTRAL_QUEUE, report)

    def heartbeat(self, beat: Heartbeat, expires_seconds: float) -> None:
        """To the central node, unless it is too busy to listen in time."""
        self._send(HEARTBEAT, CENTRAL_QUEUE, beat, expires=expires_seconds)


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
