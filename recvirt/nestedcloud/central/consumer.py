"""The process that writes down what workers report."""

from __future__ import annotations

import logging
import time
from typing import Any

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


def make_consumer(config: Config) -> Celery:
    """A Celery application with the two tasks of the central node."""
    app = make_app(config.broker, (CENTRAL_QUEUE,))

    @app.task(name=REPORT)  # type: ignore[untyped-decorator]
    def report(data: Any) -> None:
        try:
            write_down(decode(Report, data))
        except ModelError as error:
            log.error("a report that is not understood: %s", error)

    @app.task(name=HEARTBEAT)  # type: ignore[untyped-decorator]
    def heartbeat(data: Any) -> None:
        close_old_connections()
        try:
            unknown = reports.heard(decode(Heartbeat, data))
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
