"""The process that writes down what workers report."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from celery import Celery
from django.db import InterfaceError, OperationalError, close_old_connections

from recvirt.nestedcloud.central import reports
from recvirt.nestedcloud.central.config import Config
from recvirt.nestedcloud.model import Heartbeat, ModelError, Report, decode
from recvirt.nestedcloud.queue import CENTRAL_QUEUE, HEARTBEAT, REPORT, make_app

log = logging.getLogger(__name__)

_PAUSE_SECONDS = 2.0


def write_down(report: Report) -> None:
    """Apply it, however long the database is away: the broker keeps this report and those behind it."""
    trouble = False
    while True:
        close_old_connections()
        try:
            reports.apply(report)
            return
        except (OperationalError, InterfaceError) as error:
            if not trouble:
                log.error("nothing can be written down: %s", error)
            trouble = True
        time.sleep(_PAUSE_SECONDS)


def is_of(worker: str, properties: Mapping[str, Any] | None, broker: str) -> bool:
    """Whether a message comes from the worker that it names, or from the central node's own account: the broker has
    checked whose it is. In a folder that all parts share nobody can tell.
    """
    account = (properties or {}).get("user_id")
    if broker.startswith("filesystem:") or (account and account in (worker, urlsplit(broker).username)):
        return True
    log.warning("a message in the name of %s by the account %s", worker, account)
    return False


def make_consumer(config: Config) -> Celery:
    """A Celery application with the two tasks of the central node."""
    app = make_app(config.broker, (CENTRAL_QUEUE,))

    @app.task(name=REPORT, bind=True)  # type: ignore[untyped-decorator]
    def report(task: Any, data: Any) -> None:
        try:
            said = decode(Report, data)
            if is_of(said.worker, task.request.properties, config.broker):
                write_down(said)
        except ModelError as error:
            log.error("a report that is not understood: %s", error)

    @app.task(name=HEARTBEAT, bind=True)  # type: ignore[untyped-decorator]
    def heartbeat(task: Any, data: Any) -> None:
        close_old_connections()
        try:
            beat = decode(Heartbeat, data)
            if not is_of(beat.worker, task.request.properties, config.broker):
                return
            unknown = reports.heard(beat)
        except ModelError as error:
            log.error("a heartbeat that is not understood: %s", error)
            return
        for uuid in unknown:
            log.warning("worker %s has a domain %s that is not in the database", data.get("name"), uuid)

    return app


def run(config: Config) -> None:
    """Write down until told to stop. One at a time: reports on one operation come in their order."""
    words = ["worker", "--without-mingle", "--without-gossip", "--without-heartbeat", "--loglevel=INFO"]
    make_consumer(config).worker_main([*words, f"--queues={CENTRAL_QUEUE}", "--pool=solo", "--hostname=central@%h"])
