"""The tables of things: projects, people's tokens, workers, images, networks, instances, volumes.

An instance's state is kept in three apart: what it is (``state``), what is being done to it (its one active operation),
and what the hypervisor last said (``power``). Does not own when it changes: ``operations`` and ``reports`` do that, in
transactions.
"""

from __future__ import annotations

import secrets
import uuid
from hashlib import sha256
from typing import Any

from django.conf import settings
from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models
from django.db.models import Q
from django.utils import timezone

from recvirt.nestedcloud.central.compat import check_constraint
from recvirt.nestedcloud.model import MIB, NAME, PRIORITY_DEFAULT, PRIORITY_MAX, PRIORITY_MIN, Fault, Kind, Phase, Power

name_validator = RegexValidator(
    rf"\A{NAME.pattern}\Z", "letters a to z, digits and hyphens, 63 at most, not a hyphen at an end"
)
ACTIVE_PHASES = [phase.value for phase in Phase if not phase.is_final]


def choices(enum: type[Phase] | type[Kind] | type[Power] | type[Fault]) -> list[tuple[str, str]]:
    """An enum's values, as Django wants them."""
    return [(item.value, item.value) for item in enum]


class Row(models.Model):
    """What all tables share."""

    uuid = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    created = models.DateTimeField(auto_now_add=True)

    class Meta:
        abstract = True


class Project(Row):
    """Whose things they are, and how much of everything they may be."""

    name = models.CharField(max_length=63, unique=True, validators=[name_validator])
    instances_max = models.PositiveIntegerField(default=20)
    vcpus_max = models.PositiveIntegerField(default=32)
    memory_bytes_max = models.PositiveBigIntegerField(default=64 * 1024 * MIB)
    disk_bytes_max = models.PositiveBigIntegerField(default=1024 * 1024 * MIB)
    forwards_max = models.PositiveIntegerField(default=20)

    def __str__(self) -> str:
        return self.name


class Role(models.TextChoices):
    """What a member of a project may do."""

    READER = "reader"
    OPERATOR = "operator"
    ADMIN = "admin"


class Membership(Row):
    """A user in a project."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="memberships")
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="memberships")
    role = models.CharField(max_length=10, choices=Role.choices, default=Role.OPERATOR)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["project", "user"], name="one_membership")]


class ApiToken(Row):
    """A key to the API. Only its digest is kept; 256 random bits need no salt and no slow hash."""

    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="api_tokens")
    name = models.CharField(max_length=63)
    digest = models.CharField(max_length=64, unique=True)
    # A key to this project alone; and one that changes nothing.
    project = models.ForeignKey(Project, null=True, blank=True, on_delete=models.CASCADE, related_name="api_tokens")
    read_only = models.BooleanField(default=False)
    expires = models.DateTimeField(null=True, blank=True)
    last_used = models.DateTimeField(null=True, blank=True)

    PREFIX = "rvc_"

    @classmethod
    def issue(cls, user: settings.AUTH_USER_MODEL, name: str, expires: object = None, **scope: Any) -> tuple[ApiToken, str]:  # type: ignore[name-defined]  # fmt: skip  # noqa: E501
        """A new token and its secret, which is shown this once. ``scope`` is ``project`` and ``read_only``."""
        secret = cls.PREFIX + secrets.token_urlsafe(32)
        row = cls.objects.create(user=user, name=name, digest=cls.digest_of(secret), expires=expires, **scope)
        return row, secret

    @staticmethod
    def digest_of(secret: str) -> str:
        """What is kept of a secret."""
        return sha256(secret.encode()).hexdigest()


class Worker(Row):
    """A hypervisor. ``uuid`` is its queue's name too."""

    name = models.CharField(max_length=63, unique=True, validators=[name_validator])
    last_seen = models.DateTimeField(null=True, blank=True)
    draining = models.BooleanField(default=False)
    revoked = models.BooleanField(default=False)
    vcpus = models.PositiveIntegerField(default=0)
    memory_bytes = models.PositiveBigIntegerField(default=0)
    disk_bytes = models.PositiveBigIntegerField(default=0)
    features = models.JSONField(default=dict)
    boot_id = models.CharField(max_length=36, blank=True)
    protocol = models.PositiveIntegerField(default=0)
    # Which folder its disks are in, as it says; another worker that says the same shares it.
    pool = models.CharField(max_length=36, blank=True)

    @property
    def is_up(self) -> bool:
        """It was heard of lately."""
        if self.last_seen is None or self.revoked:
            return False
        return (timezone.now() - self.last_seen).total_seconds() < settings.WORKER_LOST_SECONDS

    @property
    def status(self) -> str:
        """In one word: up, draining (up, and nothing new is placed there), away or revoked."""
        if self.revoked:
            return "revoked"
        return ("draining" if self.draining else "up") if self.is_up else "away"

    @property
    def why_away(self) -> str:
        """Why what is asked of it now is not done now; empty when it is there."""
        if self.revoked:
            return f"the worker {self.name} was revoked"
        if self.is_up:
            return ""
        since = f"since {self.last_seen:%Y-%m-%d %H:%M:%S} UTC" if self.last_seen is not None else "yet"
        return f"the worker {self.name} was not heard of {since}"

    def __str__(self) -> str:
        return self.name


class DiskFormat(models.TextChoices):
    """How a disk is written."""

    RAW = "raw"
    QCOW2 = "qcow2"


class ImageState(models.TextChoices):
    """Whether an image can be started."""

    UPLOADING = "uploading"
    IMPORTING = "importing"
    READY = "ready"
    FAILED = "failed"
    REMOVING = "removing"
    DELETED = "deleted"


class Image(Row):
    """What instances start as a copy of. Without a project it is everybody's. ``upload_bytes`` is how much its uploader
    announced; ``promised_bytes`` is what is counted against the project's quota.
    """

    name = models.CharField(max_length=63, validators=[name_validator])
    project = models.ForeignKey(Project, null=True, blank=True, on_delete=models.CASCADE, related_name="images")
    state = models.CharField(max_length=10, choices=ImageState.choices, default=ImageState.IMPORTING)
    sha256 = models.CharField(max_length=64, blank=True)
    virtual_bytes = models.PositiveBigIntegerField(default=0)
    worker = models.ForeignKey(Worker, null=True, blank=True, on_delete=models.PROTECT, related_name="images")
    format = models.CharField(max_length=10, choices=DiskFormat.choices, default=DiskFormat.QCOW2)
    wanted_sha256 = models.CharField(max_length=64, blank=True)
    upload_bytes = models.PositiveBigIntegerField(default=0)
    promised_bytes = models.PositiveBigIntegerField(default=0)

    class Meta:
        constraints = [
            # A deleted one's name is free again.
            models.UniqueConstraint(
                fields=["project", "name"], condition=~Q(state=ImageState.DELETED), name="one_image_of_a_name"
            ),
            models.UniqueConstraint(
                fields=["name"],
                condition=Q(project=None) & ~Q(state=ImageState.DELETED),
                name="one_public_image_of_a_name",
            ),
        ]

    def __str__(self) -> str:
        return self.name


class NetworkKind(models.TextChoices):
    """How a network reaches others."""

    NAT = "nat"
    ISOLATED = "isolated"
    BRIDGE = "bridge"


class Network(Row):
    """Where instances' cards are plugged in."""

    name = models.CharField(max_length=63, validators=[name_validator])
    project = models.ForeignKey(Project, null=True, blank=True, on_delete=models.CASCADE, related_name="networks")
    kind = models.CharField(max_length=10, choices=NetworkKind.choices, default=NetworkKind.NAT)
    cidr = models.CharField(max_length=18, blank=True)
    bridge = models.CharField(max_length=15, blank=True)
    # What was given to a card last: the next one gets a later one, so that one that became free is let cool down.
    last_address = models.CharField(max_length=15, blank=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["project", "name"], name="one_network_of_a_name"),
            models.UniqueConstraint(fields=["cidr"], condition=~Q(cidr=""), name="one_network_of_a_subnet"),
        ]

    def __str__(self) -> str:
        return self.name


class InstanceState(models.TextChoices):
    """What an instance is when nothing is being done to it."""

    NEW = "new"
    ON = "on"
    OFF = "off"
    SUSPENDED = "suspended"
    FAILED = "failed"
    DELETED = "deleted"


class Instance(Row):
    """A virtual machine. ``generation`` rises with each change of what it should be."""

    project = models.ForeignKey(Project, on_delete=models.PROTECT, related_name="instances")
    worker = models.ForeignKey(Worker, null=True, blank=True, on_delete=models.PROTECT, related_name="instances")
    image = models.ForeignKey(Image, null=True, blank=True, on_delete=models.PROTECT, related_name="instances")
    name = models.CharField(max_length=63, validators=[name_validator])
    state = models.CharField(max_length=10, choices=InstanceState.choices, default=InstanceState.NEW)
    power = models.CharField(max_length=10, choices=choices(Power), default=Power.ABSENT.value)
    power_seen = models.DateTimeField(null=True, blank=True)
    generation = models.PositiveIntegerField(default=1)
    vcpus = models.PositiveIntegerField(validators=[MinValueValidator(1), MaxValueValidator(512)])
    vcpus_max = models.PositiveIntegerField(validators=[MinValueValidator(1), MaxValueValidator(512)])
    memory_bytes = models.PositiveBigIntegerField()
    memory_max_bytes = models.PositiveBigIntegerField()
    disk_bytes = models.PositiveBigIntegerField()
    priority = models.PositiveSmallIntegerField(
        default=PRIORITY_DEFAULT, validators=[MinValueValidator(PRIORITY_MIN), MaxValueValidator(PRIORITY_MAX)]
    )
    nest = models.BooleanField(default=False)
    ssh_keys = models.JSONField(default=list)
    user_data = models.TextField(blank=True)
    snapshots = models.JSONField(default=list)
    # What is counted against quotas and workers: the larger one of what it is and what it is about to be.
    promised_vcpus = models.PositiveIntegerField()
    promised_memory_bytes = models.PositiveBigIntegerField()
    promised_disk_bytes = models.PositiveBigIntegerField()
    # When its room is somebody else's: it is deleted then.
    promised_until = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints = [
            # A deleted one's name is free again.
            models.UniqueConstraint(
                fields=["project", "name"], condition=~Q(state=InstanceState.DELETED), name="one_instance_of_a_name"
            ),
            check_constraint(Q(vcpus__lte=models.F("vcpus_max")), "vcpus_bound"),
            check_constraint(Q(memory_bytes__lte=models.F("memory_max_bytes")), "memory_bound"),
        ]

    def __str__(self) -> str:
        return self.name


class Filesystem(models.TextChoices):
    """What a volume is formatted with."""

    NONE = "none"
    EXT4 = "ext4"
    XFS = "xfs"


class VolumeState(models.TextChoices):
    """What a volume is when nothing is being done to it."""

    NEW = "new"
    READY = "ready"
    FAILED = "failed"
    DELETED = "deleted"


class Volume(Row):
    """A disk of its own, that outlives instances. It lies in ``pool``; ``worker`` had a hand on it last; ``instance``
    has it, or will, in ``slot``.

    ``promised_bytes`` is what is counted against the project's quota, with the copies that are its snapshots.
    """

    project = models.ForeignKey(Project, on_delete=models.PROTECT, related_name="volumes")
    worker = models.ForeignKey(Worker, on_delete=models.PROTECT, related_name="volumes")
    instance = models.ForeignKey(Instance, null=True, blank=True, on_delete=models.PROTECT, related_name="volumes")
    slot = models.PositiveSmallIntegerField(null=True, blank=True)
    name = models.CharField(max_length=63, validators=[name_validator])
    pool = models.CharField(max_length=36, blank=True)
    state = models.CharField(max_length=10, choices=VolumeState.choices, default=VolumeState.NEW)
    generation = models.PositiveIntegerField(default=1)
    size_bytes = models.PositiveBigIntegerField()
    promised_bytes = models.PositiveBigIntegerField()
    format = models.CharField(max_length=10, choices=DiskFormat.choices, default=DiskFormat.RAW)
    filesystem = models.CharField(max_length=10, choices=Filesystem.choices, default=Filesystem.EXT4)
    # Their names, and the bytes that each one takes beside the volume.
    snapshots = models.JSONField(default=dict)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["project", "name"], condition=~Q(state=VolumeState.DELETED), name="one_volume_of_a_name"
            ),
            models.UniqueConstraint(fields=["instance", "slot"], name="one_volume_a_slot"),
            check_constraint(Q(instance=None, slot=None) | Q(instance__isnull=False, slot__gte=1), "volume_slot"),
        ]

    def __str__(self) -> str:
        return self.name


class Nic(Row):
    """A network card of an instance. ``address`` is its own as long as it is there; ``seen_address`` is what its worker
    saw on it where others hand addresses out.
    """

    instance = models.ForeignKey(Instance, on_delete=models.CASCADE, related_name="nics")
    network = models.ForeignKey(Network, on_delete=models.PROTECT, related_name="nics")
    position = models.PositiveSmallIntegerField()
    mac = models.CharField(max_length=17, unique=True)
    bandwidth_kib = models.PositiveIntegerField(default=0)
    address = models.CharField(max_length=15, blank=True)
    seen_address = models.CharField(max_length=15, blank=True)

    class Meta:
        ordering = ["position"]
        constraints = [
            models.UniqueConstraint(fields=["instance", "position"], name="one_nic_a_position"),
            models.UniqueConstraint(
                fields=["network", "address"], condition=~Q(address=""), name="one_nic_an_address"
            ),
        ]


class ForwardProtocol(models.TextChoices):
    """What is forwarded."""

    TCP = "tcp"
    UDP = "udp"


class ForwardState(models.TextChoices):
    """Whether a forward is in effect."""

    PENDING = "pending"
    ACTIVE = "active"
    FAILED = "failed"
    REMOVING = "removing"


class Forward(Row):
    """A port of a worker's host that leads to an instance. ``message`` says why it is not in effect."""

    project = models.ForeignKey(Project, on_delete=models.PROTECT, related_name="forwards")
    worker = models.ForeignKey(Worker, on_delete=models.PROTECT, related_name="forwards")
    nic = models.ForeignKey(Nic, on_delete=models.CASCADE, related_name="forwards")
    state = models.CharField(max_length=10, choices=ForwardState.choices, default=ForwardState.PENDING)
    message = models.TextField(blank=True)
    protocol = models.CharField(max_length=3, choices=ForwardProtocol.choices, default=ForwardProtocol.TCP)
    host_port = models.PositiveIntegerField(validators=[MinValueValidator(1), MaxValueValidator(65535)])
    guest_port = models.PositiveIntegerField(validators=[MinValueValidator(1), MaxValueValidator(65535)])
    source = models.CharField(max_length=18, blank=True)

    class Meta:
        ordering = ["protocol", "host_port"]
        constraints = [
            models.UniqueConstraint(fields=["worker", "protocol", "host_port"], name="one_forward_a_port"),
        ]

    def __str__(self) -> str:
        return f"{self.host_port}/{self.protocol}"
