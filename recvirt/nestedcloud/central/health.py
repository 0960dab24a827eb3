"""What one sees of the cloud as a whole: its status, and the same numbers for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.core.cache import cache
from django.db.models import Count, Min, Sum
from django.utils import timezone
from rest_framework import serializers
from rest_framework.permissions import IsAuthenticated
from rest_framework.renderers import BaseRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from recvirt import __version__
from recvirt.nestedcloud.central import admission
from recvirt.nestedcloud.central.auth import AdministratorPermission
from recvirt.nestedcloud.central.models import (
    ACTIVE_PHASES,
    Event,
    Instance,
    InstanceState,
    Operation,
    Pulse,
    Schedule,
    Worker,
)
from recvirt.nestedcloud.model import Phase
from recvirt.nestedcloud.queue import make_app, trouble_with

_BROKER_SECONDS = 5
_PULSE_EVERY = timedelta(seconds=5)
#: A service that has not been heard of for so long is down.
_PULSE_LOST = timedelta(seconds=30)
DISPATCHER = "dispatcher"
_FAILED_SINCE = timedelta(hours=24)


def beat(name: str) -> None:
    """Say that a service works; cheap to call often."""
    now = timezone.now()
    if not Pulse.objects.filter(name=name, at__gt=now - _PULSE_EVERY, at__lte=now).exists():
        Pulse.objects.update_or_create(name=name, defaults={"at": now})


def _broker() -> str:
    found: str | None = cache.get("broker-trouble")
    if found is None:
        broker = settings.CONFIG.broker
        found = trouble_with(make_app(broker), broker)
        cache.set("broker-trouble", found, _BROKER_SECONDS)
    return found


def status() -> dict[str, Any]:
    """The cloud as a whole. Sizes in bytes; ``free`` is what may still be promised from now on without an end."""
    now = timezone.now()
    workers = list(Worker.objects.filter(revoked=False).order_by("name"))
    usable = [worker for worker in workers if worker.is_up and not worker.draining]
    capacity, promised, free = Counter[str](), Counter[str](), Counter[str]()
    for worker in workers:
        held = worker.instances.exclude(state=InstanceState.DELETED).aggregate(
            vcpus=Sum("promised_vcpus"), memory=Sum("promised_memory_bytes")
        )
        promised.update({"vcpus": held["vcpus"] or 0, "memory_bytes": held["memory"] or 0})
        if worker in usable:
            whole, used = admission.capacity_of(worker), admission.promised(worker, admission.NOW_ON)
            capacity.update({"vcpus": whole.vcpus, "memory_bytes": whole.memory_bytes})
            free["vcpus"] += max(0, whole.vcpus - used.vcpus)
            free["memory_bytes"] += max(0, whole.memory_bytes - used.memory_bytes)
    pulse = Pulse.objects.filter(name=DISPATCHER).first()
    parts = {
        "database": "",
        "broker": _broker(),
        "dispatcher": "" if pulse is not None and now - pulse.at < _PULSE_LOST else "it has not been heard of lately",
        "workers": "" if usable else "none is up",
    }
    operations = dict.fromkeys(ACTIVE_PHASES, 0)
    operations |= dict(
        Operation.objects.filter(phase__in=ACTIVE_PHASES).order_by().values_list("phase").annotate(Count("pk"))
    )
    failed = Operation.objects.filter(phase=Phase.FAILED.value, finished__gt=now - _FAILED_SINCE).count()
    return {
        "version": __version__,
        "healthy": not any(parts.values()),
        "health": {name: text or "ok" for name, text in parts.items()},
        "workers": {
            "up": sum(worker.is_up for worker in workers), "total": len(workers),
            "draining": sum(worker.draining for worker in workers),
        },
        "capacity": {name: {"total": capacity[name], "promised": promised[name], "free": free[name]}
                     for name in ("vcpus", "memory_bytes")},
        "nesting": {worker.name: worker.features for worker in workers},
        "instances": _by(Instance.objects.exclude(state=InstanceState.DELETED), "state"),
        "operations": {**operations, "failed_24h": failed},
        "schedules": Schedule.objects.filter(paused=False).exclude(next_at=None).count(),
    }  # fmt: skip


def _by(rows: Any, field: str) -> dict[str, int]:
    return dict(rows.order_by().values_list(field).annotate(Count("pk")))


class StatusSerializer(serializers.Serializer[Any]):
    """The cloud as a whole."""

    version = serializers.CharField()
    healthy = serializers.BooleanField()
    health = serializers.DictField(child=serializers.CharField())
    workers = serializers.DictField(child=serializers.IntegerField())
    capacity = serializers.DictField(child=serializers.DictField(child=serializers.IntegerField()))
    nesting = serializers.DictField(child=serializers.DictField())
    instances = serializers.DictField(child=serializers.IntegerField())
    operations = serializers.DictField(child=serializers.IntegerField())
    schedules = serializers.IntegerField()


class Status(APIView):
    """The cloud as a whole: capacity, workers, health."""

    permission_classes = [IsAuthenticated]
    serializer_class = StatusSerializer
    open_to_scoped = True

    def get(self, request: Request, **kwargs: Any) -> Response:
        """Status of cluster, workers and services."""
        return Response(status())


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _family(name: str, kind: str, text: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> list[str]:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        words = ",".join(f'{key}="{_escape(item)}"' for key, item in labels.items())
        lines.append(f"{name}{{{words}}} {value}" if words else f"{name} {value}")
    return lines


def _labelled(label: str, values: Mapping[str, float]) -> list[tuple[Mapping[str, str], float]]:
    return [({label: name}, value) for name, value in values.items()]


def metrics() -> str:
    """Prometheus' text format, version 0.0.4."""
    now, found = timezone.now(), status()
    oldest = Operation.objects.filter(phase=Phase.QUEUED.value).aggregate(at=Min("created"))["at"]
    late = Schedule.objects.filter(paused=False, next_at__lt=now).aggregate(at=Min("next_at"))["at"]
    last = Event.objects.order_by("-id").values_list("id", flat=True).first()
    gauges: list[tuple[str, str, list[tuple[Mapping[str, str], float]]]] = [
        ("recvirt_up", "Whether a part of the cloud works.",
         [({"part": name}, float(text == "ok")) for name, text in found["health"].items()]),
        ("recvirt_worker_up", "Whether a worker is up.",
         [({"worker": worker.name}, float(worker.is_up))
          for worker in Worker.objects.filter(revoked=False).order_by("name")]),
        ("recvirt_instances", "Instances by state.",
         [({"state": state}, found["instances"].get(state, 0)) for state in InstanceState.values
          if state != InstanceState.DELETED]),
        ("recvirt_operations_active", "Operations that have not ended, by phase.",
         [({"phase": phase}, found["operations"][phase]) for phase in ACTIVE_PHASES]),
        ("recvirt_operation_queued_seconds", "Age of the oldest operation that no worker was told of.",
         [({}, (now - oldest).total_seconds() if oldest else 0.0)]),
        ("recvirt_schedule_late_seconds", "How late the latest schedule is.",
         [({}, (now - late).total_seconds() if late else 0.0)]),
        *((f"recvirt_{name}", f"Capacity of the workers that are up: {name}.",
           _labelled("part", values)) for name, values in found["capacity"].items()),
    ]  # fmt: skip
    lines = [line for name, text, samples in gauges for line in _family(name, "gauge", text, samples)]
    ended = _by(Operation.objects.exclude(phase__in=ACTIVE_PHASES), "phase")
    lines += _family(
        "recvirt_operations_total", "counter", "Operations that have ended.",
        [({"phase": phase.value}, ended.get(phase.value, 0)) for phase in Phase if phase.is_final],
    )  # fmt: skip
    lines += _family("recvirt_events_total", "counter", "Events written down.", [({}, last or 0)])
    return "\n".join(lines) + "\n"


class _TextRenderer(BaseRenderer):
    media_type = "text/plain"
    format = "txt"
    charset = "utf-8"

    def render(self, data: Any, accepted_media_type: str | None = None, renderer_context: Any = None) -> bytes:
        """The text itself, or a refusal's."""
        return (data if isinstance(data, str) else str(data.get("title", data))).encode()


class Metrics(APIView):
    """For Prometheus, with an administrator's token (a read-only one will do). Names of workers are in it."""

    permission_classes = [AdministratorPermission]
    renderer_classes = [_TextRenderer]

    def get(self, request: Request, **kwargs: Any) -> Response:
        """The numbers as text."""
        return Response(metrics(), content_type="text/plain; version=0.0.4; charset=utf-8")
