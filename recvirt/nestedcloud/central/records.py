"""The tables of what happens: operations, events, schedules and their firings, reservations."""

from __future__ import annotations

from django.conf import settings
from django.db import models
from django.db.models import Q

from recvirt.nestedcloud.central.compat import check_constraint
from recvirt.nestedcloud.central.things import (
    ACTIVE_PHASES,
    Image,
    Instance,
    Network,
    Project,
    Row,
    Volume,
    Worker,
    choices,
    name_validator,
)
from recvirt.nestedcloud.model import Fault, Kind, Phase


class Operation(Row):
    """Something asked for, from the request to its end. The row is the truth; a message is a wake-up.

    ``lease_until`` is when it is published again if nobody has reported by then; ``attempt`` counts that.
    """

    project = models.ForeignKey(Project, on_delete=models.PROTECT, related_name="operations")
    user = models.ForeignKey(settings.AUTH_USER_MODEL, null=True, on_delete=models.SET_NULL, related_name="operations")
    instance = models.ForeignKey(Instance, null=True, blank=True, on_delete=models.PROTECT, related_name="operations")
    network = models.ForeignKey(Network, null=True, blank=True, on_delete=models.SET_NULL, related_name="operations")
    volume = models.ForeignKey(Volume, null=True, blank=True, on_delete=models.PROTECT, related_name="operations")
    image = models.ForeignKey(Image, null=True, blank=True, on_delete=models.PROTECT, related_name="operations")
    # What a clone is made of; it is held as well.
    source = models.ForeignKey(Instance, null=True, blank=True, on_delete=models.PROTECT, related_name="clonings")
    worker = models.ForeignKey(Worker, null=True, blank=True, on_delete=models.SET_NULL, related_name="operations")
    kind = models.CharField(max_length=30, choices=choices(Kind))
    phase = models.CharField(max_length=10, choices=choices(Phase), default=Phase.QUEUED.value)
    idempotency_key = models.CharField(max_length=64, null=True, blank=True)
    request_digest = models.CharField(max_length=64, blank=True)
    args = models.JSONField(default=dict)
    generation = models.PositiveIntegerField(default=0)
    attempt = models.PositiveIntegerField(default=0)
    lease_until = models.DateTimeField(null=True, blank=True)
    progress = models.PositiveSmallIntegerField(default=0)
    message = models.TextField(blank=True)
    fault = models.CharField(max_length=20, choices=choices(Fault), blank=True)
    facts = models.JSONField(default=dict)
    started = models.DateTimeField(null=True, blank=True)
    finished = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["created"]
        constraints = [
            models.UniqueConstraint(
                fields=["instance"], condition=Q(phase__in=ACTIVE_PHASES), name="one_active_operation_an_instance"
            ),
            models.UniqueConstraint(
                fields=["volume"], condition=Q(phase__in=ACTIVE_PHASES), name="one_active_operation_a_volume"
            ),
            models.UniqueConstraint(
                fields=["image"], condition=Q(phase__in=ACTIVE_PHASES), name="one_active_operation_an_image"
            ),
            models.UniqueConstraint(
                fields=["source"], condition=Q(phase__in=ACTIVE_PHASES), name="one_active_cloning_an_instance"
            ),
            models.UniqueConstraint(fields=["project", "idempotency_key"], name="one_operation_a_key"),
        ]
        indexes = [models.Index(fields=["phase", "lease_until"])]

    @property
    def is_final(self) -> bool:
        """Nothing comes after its phase."""
        return Phase(self.phase).is_final


class Event(models.Model):
    """What happened, in order: the event stream and the audit log read it."""

    project = models.ForeignKey(Project, null=True, on_delete=models.SET_NULL, related_name="events")
    user = models.ForeignKey(settings.AUTH_USER_MODEL, null=True, on_delete=models.SET_NULL, related_name="events")
    at = models.DateTimeField(auto_now_add=True)
    kind = models.CharField(max_length=40)
    subject = models.UUIDField(null=True)
    data = models.JSONField(default=dict)

    class Meta:
        ordering = ["id"]


class Schedule(Row):
    """Operations at future times. What is due next is ``next_at``: a window's end if ``next_is_end``.

    ``args`` is the request's body, looked at again when it is due. ``pinned`` ones end what was launched for a time.
    """

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="schedules")
    user = models.ForeignKey(settings.AUTH_USER_MODEL, null=True, on_delete=models.SET_NULL, related_name="schedules")
    instance = models.ForeignKey(Instance, null=True, blank=True, on_delete=models.CASCADE, related_name="schedules")
    name = models.CharField(max_length=63, validators=[name_validator])
    kind = models.CharField(max_length=30, choices=choices(Kind))
    args = models.JSONField(default=dict)
    begins = models.DateTimeField()
    rule = models.CharField(max_length=200, blank=True)
    zone = models.CharField(max_length=64, default="UTC")
    window_seconds = models.PositiveIntegerField(null=True, blank=True)
    grace_seconds = models.PositiveIntegerField(default=600)
    paused = models.BooleanField(default=False)
    pinned = models.BooleanField(default=False)
    next_at = models.DateTimeField(null=True, blank=True)
    next_is_end = models.BooleanField(default=False)
    retry_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["project", "name"], name="one_schedule_of_a_name")]
        indexes = [models.Index(fields=["paused", "next_at"])]

    def __str__(self) -> str:
        return self.name


class Outcome(models.TextChoices):
    """What became of something that was due."""

    ASKED = "asked"
    NOT_NEEDED = "not-needed"
    REFUSED = "refused"
    MISSED = "missed"


class Firing(Row):
    """Something that was due, once. Written in the transaction that makes its operation."""

    schedule = models.ForeignKey(Schedule, on_delete=models.CASCADE, related_name="firings")
    at = models.DateTimeField()
    is_end = models.BooleanField(default=False)
    outcome = models.CharField(max_length=10, choices=Outcome.choices)
    message = models.TextField(blank=True)
    left_out = models.PositiveIntegerField(default=0)
    operation = models.ForeignKey(Operation, null=True, blank=True, on_delete=models.SET_NULL, related_name="firings")

    class Meta:
        ordering = ["-at", "is_end"]
        constraints = [models.UniqueConstraint(fields=["schedule", "at", "is_end"], name="fired_once")]


class Reservation(Row):
    """Room on a worker for one instance, kept for a time. Without an end it is kept until it is used."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="reservations")
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, on_delete=models.SET_NULL, related_name="reservations"
    )
    worker = models.ForeignKey(Worker, on_delete=models.CASCADE, related_name="reservations")
    schedule = models.ForeignKey(Schedule, null=True, blank=True, on_delete=models.CASCADE, related_name="reservations")
    begins = models.DateTimeField()
    ends = models.DateTimeField(null=True, blank=True)
    instances = models.PositiveSmallIntegerField(default=1)
    vcpus = models.PositiveIntegerField()
    memory_bytes = models.PositiveBigIntegerField()
    disk_bytes = models.PositiveBigIntegerField()

    class Meta:
        ordering = ["begins"]
        constraints = [
            models.UniqueConstraint(fields=["schedule", "begins"], name="one_reservation_an_occurrence"),
            check_constraint(Q(ends=None) | Q(ends__gt=models.F("begins")), "reservation_ends_later"),
        ]
        indexes = [models.Index(fields=["worker", "ends"]), models.Index(fields=["project", "ends"])]


class Pulse(models.Model):
    """When a service of the central node last said that it works."""

    name = models.CharField(max_length=20, primary_key=True)
    at = models.DateTimeField()
