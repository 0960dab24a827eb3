"""Tickets for the serial console of an instance, and for what it has said."""

from __future__ import annotations

import functools
import logging
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.utils import timezone
from rest_framework import serializers, status
from rest_framework.request import Request
from rest_framework.response import Response

from recvirt.nestedcloud import console
from recvirt.nestedcloud.central import audit, consoles
from recvirt.nestedcloud.central.models import Instance, InstanceState
from recvirt.nestedcloud.central.problems import Refused, WrongState
from recvirt.nestedcloud.central.scoped import ProjectScoped
from recvirt.nestedcloud.queue import Sender

log = logging.getLogger(__name__)

_RUNNING = (InstanceState.ON, InstanceState.SUSPENDED)


class WorkerAway(Refused):
    """The instance's worker can't be reached now."""

    status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    default_code = "worker-away"


class NoConsole(Refused):
    """The instance's worker has no serial consoles."""

    default_code = "no-console"


class ConsoleSerializer(serializers.Serializer[Any]):
    """How to open a console."""

    force = serializers.BooleanField(default=False, help_text="Take it from whoever has it.")


class LogSerializer(serializers.Serializer[Any]):
    """How to read what a console has said."""

    follow = serializers.BooleanField(default=False, help_text="Go on, as it says more.")


class ConsoleSessionSerializer(serializers.Serializer[Any]):
    """Where a console is, and the ticket that opens it once before it expires."""

    session = serializers.UUIDField()
    path = serializers.CharField()
    ticket = serializers.CharField()
    expires = serializers.DateTimeField()


@functools.cache
def _sender() -> Sender:
    broker = settings.CONFIG.broker
    return Sender(broker)


class Consoles(ProjectScoped):
    """The serial consoles of the project's instances."""

    bodies = {"console": ConsoleSerializer, "log": LogSerializer}
    answers = {"console": 201, "log": 201}
    serializer_class = ConsoleSessionSerializer

    def console(self, request: Request, name: str, **kwargs: Any) -> Response:
        """Open an instance's serial console: a ticket for its WebSocket.

        One person has it at a time. Who asks while somebody else does is refused with 409, unless force takes it.
        """
        wish = self.checked(ConsoleSerializer, request)
        instance = self._instance(name)
        if instance.state not in _RUNNING:
            raise WrongState(f"{name} is {instance.state}: only what runs has a console", state=instance.state)
        answer = self._open(instance, **wish)
        audit.note(self.user, "console.asked", instance.pk, self.project, name=name, session=answer["session"], **wish)
        return Response(answer, status=status.HTTP_201_CREATED)

    def log(self, request: Request, name: str, **kwargs: Any) -> Response:
        """Read what an instance's serial console has said since it was last started: a ticket for its WebSocket."""
        wish = self.checked(LogSerializer, request)
        return Response(self._open(self._instance(name), log=True, **wish), status=status.HTTP_201_CREATED)

    def _instance(self, name: str) -> Instance:
        there = self.project.instances.exclude(state=InstanceState.DELETED).select_related("worker", "project")
        return there.filter(name=name).first() or self.not_found(f"there is no instance called {name}")

    def _open(self, instance: Instance, **wish: bool) -> dict[str, Any]:
        worker: Any = instance.worker
        if worker is None or not worker.is_up:
            where = f"the worker {worker.name}" if worker is not None else "its worker"
            raise WorkerAway(f"{where} was not heard of lately: recvirt-cloud workers")
        if not worker.features.get("console"):
            raise NoConsole(f"the worker {worker.name} has no serial consoles")
        token: Any = self.request.auth
        session, ticket, call = consoles.sessions.open(instance, token, **wish)
        try:
            _sender().console(str(worker.pk), call, consoles.TICKET_SECONDS)
        except Exception as error:
            # Each transport has errors of its own; their texts may hold the broker's password.
            consoles.sessions.close(session)
            log.error("a worker can't be called to a console: %s", type(error).__name__)
            raise WorkerAway("the workers can't be reached now; try again later") from None
        expires = timezone.now() + timedelta(seconds=consoles.TICKET_SECONDS)
        return {
            "session": session.uuid, "path": console.PATH + session.uuid, "ticket": ticket, "expires": expires,
        }  # fmt: skip
