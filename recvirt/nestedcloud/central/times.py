"""The API of schedules and reservations."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from django.db.models import QuerySet
from django.shortcuts import get_object_or_404
from rest_framework import mixins, serializers, status
from rest_framework.decorators import action
from rest_framework.exceptions import ValidationError
from rest_framework.request import Request
from rest_framework.response import Response

from recvirt.nestedcloud.central import operations, reservations, schedules
from recvirt.nestedcloud.central.admission import Need
from recvirt.nestedcloud.central.models import Firing, InstanceState, Reservation, Schedule, name_validator
from recvirt.nestedcloud.central.scoped import ProjectScoped
from recvirt.nestedcloud.central.serializers import Strict
from recvirt.nestedcloud.model import MIB, NAME, Kind


class Moment(serializers.DateTimeField):
    """A time with its offset, or a local one in the document's ``zone``. Whole seconds."""

    def enforce_timezone(self, value: datetime) -> datetime:
        """Local times stay without a zone until the zone is known."""
        return value.replace(microsecond=0)


def _placed(value: datetime | None, zone: ZoneInfo) -> datetime | None:
    return value.replace(tzinfo=zone) if value is not None and value.tzinfo is None else value


class _Timed(Strict):
    zone = serializers.CharField(default="UTC", max_length=64)

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        """Local times in their zone."""
        try:
            zone = ZoneInfo(attrs["zone"])
        except (KeyError, ValueError, OSError):
            raise ValidationError({"zone": ["there is no such time zone (want one as Europe/Budapest)"]}) from None
        for name in ("begins", "ends"):
            attrs[name] = _placed(attrs.get(name), zone)
        if attrs["ends"] is not None and attrs["begins"] is not None and attrs["ends"] <= attrs["begins"]:
            raise ValidationError({"ends": ["want a time after the beginning"]})
        return attrs


class NewScheduleSerializer(_Timed):
    """Something to be done at a time: ``kind`` to ``instance`` with ``args``, the body of that request.

    ``rule`` (RRULE) makes it come again. ``ends`` makes a window of it: what ``kind`` does is undone then.
    """

    name = serializers.CharField(max_length=63, validators=[name_validator], trim_whitespace=False)
    kind = serializers.ChoiceField(choices=sorted(kind.value for kind in schedules.BODIES))
    instance = serializers.CharField(max_length=63, required=False, allow_null=True)
    args = serializers.DictField(default=dict)
    begins = Moment()
    ends = Moment(required=False, allow_null=True)
    rule = serializers.CharField(max_length=200, allow_blank=True, default="")
    grace_seconds = serializers.IntegerField(min_value=1, max_value=reservations.GRACE_MAX_SECONDS, default=600)

    def validate_instance(self, name: str | None) -> Any:
        """One of the project's."""
        if name is None:
            return None
        found = self.context["project"].instances.exclude(state=InstanceState.DELETED).filter(name=name).first()
        if found is None:
            raise ValidationError(f"there is no instance called {name}")
        return found

    def validate_kind(self, kind: str) -> Kind:
        """As the enumeration."""
        return Kind(kind)


class ScheduleSerializer(serializers.ModelSerializer[Schedule]):
    """A schedule, and when it is due next."""

    instance = serializers.CharField(  # type: ignore[assignment]
        source="instance.name", read_only=True, default=None
    )
    user = serializers.CharField(source="user.username", read_only=True, default=None)

    class Meta:
        model = Schedule
        fields = [
            "uuid", "name", "kind", "instance", "args", "begins", "rule", "zone", "window_seconds", "grace_seconds",
            "paused", "pinned", "next_at", "next_is_end", "retry_at", "user", "created",
        ]  # fmt: skip


class FiringSerializer(serializers.ModelSerializer[Firing]):
    """What became of something that was due. ``left_out`` are earlier ones that were missed."""

    class Meta:
        model = Firing
        fields = ["at", "is_end", "outcome", "message", "left_out", "operation", "created"]


class ReservationSerializer(serializers.ModelSerializer[Reservation]):
    """Room kept for an instance."""

    worker = serializers.CharField(source="worker.name", read_only=True)
    schedule = serializers.CharField(source="schedule.name", read_only=True, default=None)

    class Meta:
        model = Reservation
        # Only read; a validator of a constraint hides the declared field of that name (Django REST framework 3.16).
        validators: tuple[Any, ...] = ()
        fields = ["uuid", "begins", "ends", "vcpus", "memory_bytes", "disk_bytes", "worker", "schedule", "created"]


class NewReservationSerializer(_Timed):
    """Room to be kept for one instance: its maxima. A launch that names it uses it up, and is deleted at its end."""

    begins = Moment()
    ends = Moment(required=False, allow_null=True)
    vcpus = serializers.IntegerField(min_value=1, max_value=512)
    memory_bytes = serializers.IntegerField(min_value=32 * MIB, max_value=2**50)
    disk_bytes = serializers.IntegerField(min_value=MIB, max_value=2**60)


class Schedules(mixins.ListModelMixin, mixins.RetrieveModelMixin, ProjectScoped):
    """What the project has asked for at future times."""

    bodies: Mapping[str, Any] = {"create": NewScheduleSerializer, "pause": Strict, "resume": Strict}
    answers: Mapping[str, int] = {"create": 201, "destroy": 204}
    results: Mapping[str, Any] = {"firings": FiringSerializer}
    serializer_class = ScheduleSerializer
    lookup_field = "name"
    lookup_value_regex = NAME.pattern

    def get_queryset(self) -> QuerySet[Schedule]:
        """By name."""
        return self.project.schedules.select_related("instance", "user").order_by("name")

    def create(self, request: Request, **kwargs: Any) -> Response:
        """Make a schedule."""
        user: Any = request.user
        wish = self.checked(NewScheduleSerializer, request)
        schedule = schedules.create(self.project, user, wish, self.key(request))
        return Response(ScheduleSerializer(schedule).data, status=status.HTTP_201_CREATED)

    def destroy(self, request: Request, **kwargs: Any) -> Response:
        """Forget it."""
        user: Any = request.user
        schedules.remove(self.get_object(), user)
        return Response(status=status.HTTP_204_NO_CONTENT)

    def _pause(self, request: Request, paused: bool) -> Response:
        user: Any = request.user
        self.checked(Strict, request)
        return Response(ScheduleSerializer(schedules.pause(self.get_object(), user, paused)).data)

    @action(detail=True, methods=["post"])
    def pause(self, request: Request, **kwargs: Any) -> Response:
        """Let nothing be due."""
        return self._pause(request, True)

    @action(detail=True, methods=["post"])
    def resume(self, request: Request, **kwargs: Any) -> Response:
        """Go on; what was due meanwhile is left out."""
        return self._pause(request, False)

    @action(detail=True, methods=["get"])
    def firings(self, request: Request, **kwargs: Any) -> Response:
        """What became of it, newest first."""
        page: Any = self.paginate_queryset(self.get_object().firings.all())
        return self.get_paginated_response(FiringSerializer(page, many=True).data)


class Reservations(mixins.ListModelMixin, ProjectScoped):
    """Room that is kept for the project."""

    bodies: Mapping[str, Any] = {"create": NewReservationSerializer}
    answers: Mapping[str, int] = {"create": 201, "destroy": 204}
    serializer_class = ReservationSerializer
    lookup_field = "uuid"
    lookup_value_regex = "[0-9a-f-]{36}"

    def get_queryset(self) -> QuerySet[Reservation]:
        """In order of time."""
        return self.project.reservations.select_related("worker", "schedule").order_by("begins")

    def create(self, request: Request, **kwargs: Any) -> Response:
        """Keep room, or say when there is some."""
        wish = self.checked(NewReservationSerializer, request)
        need = Need(1, wish["vcpus"], wish["memory_bytes"], wish["disk_bytes"])
        user: Any = request.user
        key = operations.row_of(self.project, user, self.key(request))
        row = reservations.reserve(self.project, user, wish["begins"], wish["ends"], need, row_uuid=key)
        return Response(ReservationSerializer(row).data, status=status.HTTP_201_CREATED)

    def destroy(self, request: Request, **kwargs: Any) -> Response:
        """Give it back."""
        user: Any = request.user
        try:
            key = uuid.UUID(kwargs["uuid"])
        except ValueError:
            key = uuid.UUID(int=0)
        reservations.release(get_object_or_404(self.get_queryset(), uuid=key), user)
        return Response(status=status.HTTP_204_NO_CONTENT)
