"""The API's documents on volumes and images."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from rest_framework import serializers

from recvirt.nestedcloud import spool
from recvirt.nestedcloud.central.models import (
    DiskFormat,
    Filesystem,
    Image,
    ImageState,
    Instance,
    InstanceState,
    Project,
    Volume,
    Worker,
    name_validator,
)
from recvirt.nestedcloud.central.serializers import OperationSerializer, Strict
from recvirt.nestedcloud.model import GIB, MIB

#: What an import may bring unless it asks for another bound.
LARGEST_BYTES_DEFAULT = 16 * GIB
#: What it may ask for. Beyond, a disk is a volume.
LARGEST_BYTES_MAX = 1024 * GIB


class VolumeSerializer(serializers.ModelSerializer[Volume]):
    """A volume, and the operation that is being done to it."""

    worker = serializers.SlugRelatedField[Worker](slug_field="name", read_only=True)
    # To Django REST framework a field, not the attribute of that name.
    instance = serializers.CharField(source="instance.name", read_only=True, default=None)  # type: ignore[assignment]
    snapshots = serializers.SerializerMethodField()
    operation = serializers.SerializerMethodField()

    def get_snapshots(self, volume: Volume) -> list[str]:
        """Their names."""
        return sorted(volume.snapshots)

    def get_operation(self, volume: Volume) -> dict[str, Any] | None:
        """The active one."""
        active = next((item for item in volume.operations.all() if not item.is_final), None)
        return dict(OperationSerializer(active).data) if active is not None else None

    class Meta:
        model = Volume
        # Only read; a validator of a constraint hides the declared field of that name (Django REST framework 3.16).
        validators: tuple[Any, ...] = ()
        fields = [
            "uuid", "name", "state", "operation", "size_bytes", "format", "filesystem", "instance", "slot", "worker",
            "pool", "snapshots", "created",
        ]  # fmt: skip


class ImageSerializer(serializers.ModelSerializer[Image]):
    """What instances start as a copy of. ``uploaded_bytes`` is how far an upload has come."""

    public = serializers.SerializerMethodField()
    uploaded_bytes = serializers.SerializerMethodField()

    def get_public(self, image: Image) -> bool:
        """Whether it is everybody's."""
        return image.project_id is None

    def get_uploaded_bytes(self, image: Image) -> int | None:
        """Null when it is not being uploaded."""
        return spool.size(settings.CONFIG.spool, str(image.uuid)) if image.state == ImageState.UPLOADING else None

    class Meta:
        model = Image
        fields = [
            "uuid", "name", "public", "state", "sha256", "virtual_bytes", "upload_bytes", "uploaded_bytes", "created",
        ]  # fmt: skip


def _instance_called(project: Project, name: str) -> Instance:
    found = project.instances.filter(name=name).exclude(state=InstanceState.DELETED).first()
    if found is None:
        raise serializers.ValidationError(f"there is no instance called {name}")
    return found


class AllocateSerializer(Strict):
    """A new volume. ``near`` names the instance that it is for, or ``on`` the worker that makes it."""

    name = serializers.CharField(max_length=63, validators=[name_validator], trim_whitespace=False)
    size_bytes = serializers.IntegerField(min_value=MIB, max_value=2**62)
    format = serializers.ChoiceField(choices=DiskFormat.choices, default=DiskFormat.RAW.value)
    filesystem = serializers.ChoiceField(choices=Filesystem.choices, default=Filesystem.EXT4.value)
    near = serializers.CharField(required=False)
    on = serializers.CharField(required=False)

    def validate_on(self, name: str) -> Worker:
        """A worker of that name that was not revoked."""
        found = Worker.objects.filter(name=name, revoked=False).first()
        if found is None:
            raise serializers.ValidationError(f"there is no worker called {name}")
        return found

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        """One place."""
        if "near" in attrs and "on" in attrs:
            raise serializers.ValidationError("want either near or on")
        return attrs

    def validate_near(self, name: str) -> Instance:
        """The project's instance of that name."""
        return _instance_called(self.context["project"], name)


class AttachSerializer(Strict):
    """The instance that gets a volume."""

    instance = serializers.CharField()

    def validate_instance(self, name: str) -> Instance:
        """The project's instance of that name."""
        return _instance_called(self.context["project"], name)


class ResizeSerializer(Strict):
    """The size that a volume shall have."""

    size_bytes = serializers.IntegerField(min_value=MIB, max_value=2**62)


class ImportSerializer(Strict):
    """A new image: from ``url``, or in pieces of an upload of ``upload_bytes``."""

    name = serializers.CharField(max_length=63, validators=[name_validator], trim_whitespace=False)
    format = serializers.ChoiceField(choices=DiskFormat.choices, default=DiskFormat.QCOW2.value)
    url = serializers.CharField(required=False, max_length=2048)
    upload_bytes = serializers.IntegerField(required=False, min_value=1, max_value=LARGEST_BYTES_MAX)
    sha256 = serializers.RegexField(r"\A[0-9a-f]{64}\Z", required=False, default="")
    largest_bytes = serializers.IntegerField(min_value=MIB, max_value=LARGEST_BYTES_MAX, default=LARGEST_BYTES_DEFAULT)

    def validate_url(self, url: str) -> str:
        """By its look; the worker looks at where it leads."""
        if not url.lower().startswith(("http://", "https://")):
            raise serializers.ValidationError("want http:// or https://")
        return url

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        """One source."""
        if ("url" in attrs) == ("upload_bytes" in attrs):
            raise serializers.ValidationError("want either url or upload_bytes")
        return attrs


class ExportSerializer(Strict):
    """The name of the image to be made."""

    image = serializers.CharField(max_length=63, validators=[name_validator], trim_whitespace=False)


class CloneSerializer(Strict):
    """The name of the instance to be made."""

    name = serializers.CharField(max_length=63, validators=[name_validator], trim_whitespace=False)
