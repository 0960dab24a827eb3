"""The API's documents: what is read, and what may be asked for."""

from __future__ import annotations

from typing import Any

from django.db.models import Q
from rest_framework import serializers

from recvirt.nestedcloud.central import bundled, peers
from recvirt.nestedcloud.central.auth import is_administrator
from recvirt.nestedcloud.central.models import (
    Event,
    Image,
    ImageState,
    Instance,
    Network,
    Nic,
    Operation,
    Project,
    Volume,
    Worker,
    name_validator,
)
from recvirt.nestedcloud.model import GIB, MIB, PRIORITY_DEFAULT, PRIORITY_MAX, PRIORITY_MIN

_USER_DATA_MAX = 65536


class ProjectSerializer(serializers.ModelSerializer[Project]):
    """A project with its quotas."""

    class Meta:
        model = Project
        fields = [
            "uuid", "name", "instances_max", "vcpus_max", "memory_bytes_max", "disk_bytes_max", "forwards_max",
            "created",
        ]  # fmt: skip


class WorkerSerializer(serializers.ModelSerializer[Worker]):
    """A hypervisor. ``status`` is up, draining, away or revoked; ``peer`` is its end of the tunnel, for administrators,
    and empty for the central node's own.
    """

    up = serializers.BooleanField(source="is_up", read_only=True)
    status = serializers.CharField(read_only=True)
    peer = serializers.SerializerMethodField()

    def get_peer(self, worker: Worker) -> dict[str, Any] | None:
        """Address, public key and when it came."""
        request = self.context.get("request")
        peer = getattr(worker, "peer", None)
        if request is None or peer is None or not is_administrator(request):
            return None
        return {
            "address": peers.address_of(peer), "public_key": peer.public_key, "joined": peer.created.isoformat(),
            "rotated": peer.rotated.isoformat() if peer.rotated is not None else None,
        }  # fmt: skip

    class Meta:
        model = Worker
        fields = [
            "uuid", "name", "up", "status", "draining", "revoked", "last_seen", "vcpus", "memory_bytes", "disk_bytes",
            "pool", "features", "peer",
        ]  # fmt: skip


class NetworkSerializer(serializers.ModelSerializer[Network]):
    """A network."""

    class Meta:
        model = Network
        fields = ["uuid", "name", "kind", "cidr", "bridge", "created"]


class NicSerializer(serializers.ModelSerializer[Nic]):
    """A network card."""

    network = serializers.SlugRelatedField[Network](slug_field="name", read_only=True)
    address = serializers.SerializerMethodField()

    def get_address(self, nic: Nic) -> str | None:
        """Its IPv4 address: kept for it, or seen on it; null when nothing is known."""
        return nic.address or nic.seen_address or None

    class Meta:
        model = Nic
        fields = ["network", "mac", "address", "bandwidth_kib"]


class OperationSerializer(serializers.ModelSerializer[Operation]):
    """Something asked for, and how far it is."""

    instance_name = serializers.CharField(source="instance.name", read_only=True, default=None)
    volume_name = serializers.CharField(source="volume.name", read_only=True, default=None)
    image_name = serializers.CharField(source="image.name", read_only=True, default=None)

    class Meta:
        model = Operation
        fields = [
            "uuid", "kind", "phase", "progress", "message", "fault", "instance", "instance_name", "volume_name",
            "image_name", "attempt", "facts", "created", "started", "finished",
        ]  # fmt: skip


class InstanceSerializer(serializers.ModelSerializer[Instance]):
    """An instance, and the operation that is being done to it."""

    image = serializers.SlugRelatedField[Image](slug_field="name", read_only=True)
    worker = serializers.SlugRelatedField[Worker](slug_field="name", read_only=True)
    nics = NicSerializer(many=True, read_only=True)
    volumes = serializers.SlugRelatedField[Volume](slug_field="name", many=True, read_only=True)
    operation = serializers.SerializerMethodField()
    away = serializers.SerializerMethodField()
    address = serializers.SerializerMethodField()

    def get_away(self, instance: Instance) -> str:
        """Why nothing can be done to it now and ``power`` is what was last known; empty when its worker is there."""
        return instance.worker.why_away if instance.worker is not None else ""

    def get_address(self, instance: Instance) -> str | None:
        """That of its first card which has one."""
        return next((found for nic in instance.nics.all() if (found := nic.address or nic.seen_address)), None)

    def get_operation(self, instance: Instance) -> dict[str, Any] | None:
        """The active one."""
        active = next((item for item in instance.operations.all() if not item.is_final), None)
        return dict(OperationSerializer(active).data) if active is not None else None

    class Meta:
        model = Instance
        fields = [
            "uuid", "name", "state", "power", "address", "operation", "image", "worker", "away", "vcpus", "vcpus_max",
            "memory_bytes", "memory_max_bytes", "disk_bytes", "priority", "nest", "nics", "volumes", "ssh_keys",
            "snapshots", "created",
        ]  # fmt: skip


class EventSerializer(serializers.ModelSerializer[Event]):
    """What happened, and who did it."""

    user = serializers.CharField(source="user.username", read_only=True, default=None)

    class Meta:
        model = Event
        fields = ["id", "at", "kind", "subject", "user", "data"]


class Strict(serializers.Serializer[Any]):
    """Refuses fields that it does not know: a misspelt one must not be ignored."""

    def to_internal_value(self, data: Any) -> Any:
        """The validated fields."""
        if isinstance(data, dict) and (unknown := sorted(set(data) - set(self.fields))):
            raise serializers.ValidationError({name: ["there is no such field"] for name in unknown})
        return super().to_internal_value(data)


class _Size(Strict):
    vcpus = serializers.IntegerField(min_value=1, max_value=512, required=False)
    vcpus_max = serializers.IntegerField(min_value=1, max_value=512, required=False)
    memory_bytes = serializers.IntegerField(min_value=32 * MIB, required=False)
    memory_max_bytes = serializers.IntegerField(min_value=32 * MIB, required=False)
    disk_bytes = serializers.IntegerField(min_value=MIB, required=False)
    priority = serializers.IntegerField(min_value=PRIORITY_MIN, max_value=PRIORITY_MAX, required=False)


def _some(images: list[Image]) -> str:
    """Their names, not too many of them."""
    names = sorted({image.name for image in images})
    return ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")


class LaunchSerializer(_Size):
    """A new instance. ``context["project"]`` says whose images and networks may be named."""

    name = serializers.CharField(max_length=63, validators=[name_validator], trim_whitespace=False)
    image = serializers.CharField(required=False)
    networks = serializers.ListField(child=serializers.CharField(), required=False, max_length=8)
    nest = serializers.BooleanField(default=False)
    ssh_keys = serializers.ListField(child=serializers.CharField(max_length=16384), default=list, max_length=64)
    user_data = serializers.CharField(allow_blank=True, default="", max_length=_USER_DATA_MAX, trim_whitespace=False)
    reservation = serializers.UUIDField(required=False)

    def validate_ssh_keys(self, keys: list[str]) -> list[str]:
        """One line each."""
        if any("\n" in key or "\r" in key for key in keys):
            raise serializers.ValidationError("an SSH key is one line")
        return keys

    def validate_image(self, text: str) -> Image:
        """The project's own image of that name, or the public one."""
        project: Project = self.context["project"]
        ready = Image.objects.filter(name=text, state=ImageState.READY)
        found = ready.filter(project=project).first() or ready.filter(project=None).first()
        if found is None:
            raise serializers.ValidationError(f"there is no image called {text}")
        return found

    def validate_networks(self, names: list[str]) -> list[Network]:
        """The project's own networks."""
        project: Project = self.context["project"]
        found = {network.name: network for network in project.networks.filter(name__in=names)}
        if missing := sorted(set(names) - set(found)):
            raise serializers.ValidationError(f"there is no network called {', '.join(missing)}")
        return [found[name] for name in names]

    def _default_image(self) -> Image:
        """The only one there is, or the one that came with the cloud."""
        project: Project = self.context["project"]
        ready = Image.objects.filter(Q(project=project) | Q(project=None), state=ImageState.READY)
        found = list(ready.order_by("name"))
        named = [image for image in found if image.name == bundled.DEFAULT_NAME]
        if len(found) == 1 or named:
            return (named or found)[0]
        why = f"{bundled.DEFAULT_NAME} is being brought in: try again in a minute"
        if not bundled.is_coming():
            why = f"which one? There {f'are {_some(found)}' if found else 'is none'}"
        raise serializers.ValidationError({"image": [why]})

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        """With defaults: the image that is meant when none is named, one vCPU, 512 MiB, the image's own size, room to
        double what it starts with.
        """
        if "image" not in attrs:
            attrs["image"] = self._default_image()
        attrs.setdefault("vcpus", 1)
        attrs.setdefault("vcpus_max", max(attrs["vcpus"], min(2 * attrs["vcpus"], 512)))
        attrs.setdefault("memory_bytes", 512 * MIB)
        attrs.setdefault("memory_max_bytes", 2 * attrs["memory_bytes"])
        attrs.setdefault("disk_bytes", max(attrs["image"].virtual_bytes, GIB))
        attrs.setdefault("priority", PRIORITY_DEFAULT)
        return attrs


class RescaleSerializer(_Size):
    """What is to be changed. ``restart`` allows what can't be done to a running guest."""

    restart = serializers.BooleanField(default=False)

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        """At least one change."""
        if not set(attrs) - {"restart"}:
            raise serializers.ValidationError("nothing is to be changed")
        return attrs


class StopSerializer(Strict):
    """``graceful_seconds`` is what the guest gets to power off by itself; 0 takes the power away at once."""

    graceful_seconds = serializers.FloatField(min_value=0, max_value=3600, required=False)


class SnapshotSerializer(Strict):
    """The name of a snapshot."""

    snapshot = serializers.CharField(max_length=63, validators=[name_validator])


class NothingSerializer(Strict):
    """No fields."""
