"""The API. Reading is direct; everything else makes an operation, and the answer is 202 with it."""

from __future__ import annotations

from typing import Any

from django.db.models import Prefetch, QuerySet
from rest_framework import mixins
from rest_framework.decorators import action
from rest_framework.exceptions import ValidationError
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.serializers import Serializer

from recvirt.nestedcloud.central import images, operations, serializers, storage_serializers
from recvirt.nestedcloud.central.models import (
    Event,
    Instance,
    InstanceState,
    Network,
    Operation,
)
from recvirt.nestedcloud.central.scoped import ProjectScoped
from recvirt.nestedcloud.model import NAME, Kind


class Networks(mixins.ListModelMixin, ProjectScoped):
    """The project's networks."""

    serializer_class = serializers.NetworkSerializer

    def get_queryset(self) -> QuerySet[Network]:
        """Its own."""
        return self.project.networks.order_by("name")


class Operations(mixins.ListModelMixin, mixins.RetrieveModelMixin, ProjectScoped):
    """What was asked for in the project, newest first."""

    serializer_class = serializers.OperationSerializer
    lookup_field = "uuid"
    lookup_value_regex = "[0-9a-f-]{36}"

    def get_queryset(self) -> QuerySet[Operation]:
        """Its own."""
        return self.project.operations.select_related("instance", "volume", "image").order_by("-created")


class Events(mixins.ListModelMixin, ProjectScoped):
    """What happened in the project; ``?after=ID`` goes on from there."""

    serializer_class = serializers.EventSerializer

    def get_queryset(self) -> QuerySet[Event]:
        """Its own, in order."""
        after = self.request.query_params.get("after", "0")
        if not after.isdecimal():
            raise ValidationError({"after": ["the id of an event"]})
        return self.project.events.filter(id__gt=min(int(after), 2**63 - 1)).select_related("user")


class Instances(mixins.ListModelMixin, mixins.RetrieveModelMixin, ProjectScoped):
    """The project's virtual machines."""

    bodies = {
        "create": serializers.LaunchSerializer, "destroy": serializers.NothingSerializer,
        "stop": serializers.StopSerializer, "rescale": serializers.RescaleSerializer,
        "snapshot": serializers.SnapshotSerializer, "revert": serializers.SnapshotSerializer,
        "snapshot_remove": serializers.SnapshotSerializer, "start": serializers.NothingSerializer,
        "reboot": serializers.NothingSerializer, "suspend": serializers.NothingSerializer,
        "resume": serializers.NothingSerializer, "export": storage_serializers.ExportSerializer,
        "clone": storage_serializers.CloneSerializer,
    }  # fmt: skip
    serializer_class = serializers.InstanceSerializer
    lookup_field = "name"
    lookup_value_regex = NAME.pattern

    def get_queryset(self) -> QuerySet[Instance]:
        """Those that are not deleted."""
        return (
            self.project.instances.exclude(state=InstanceState.DELETED)
            .select_related("image", "worker")
            .prefetch_related(
                "nics__network", "volumes", Prefetch("operations", Operation.objects.filter(finished=None))
            )
            .order_by("name")
        )

    def create(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Launch."""
        wish = self.checked(serializers.LaunchSerializer, request)
        wish.setdefault("networks", [operations.default_network(self.project)])
        return self.accepted(operations.launch(self.project, self.user, wish, self.key(request)))

    def destroy(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Delete."""
        return self._ask(request, Kind.DELETE, serializers.NothingSerializer)

    def _ask(self, request: Request, kind: Kind, body: type[Serializer[Any]]) -> Response:
        args = operations.args_of(kind, self.checked(body, request))
        return self.ask(
            request, kind, args, self.get_object, lambda it, key: operations.request(it, self.user, kind, args, key)
        )

    @action(detail=True, methods=["post"])
    def start(self, request: Request, **kwargs: Any) -> Response:
        """Power on."""
        return self._ask(request, Kind.START, serializers.NothingSerializer)

    @action(detail=True, methods=["post"])
    def stop(self, request: Request, **kwargs: Any) -> Response:
        """Power off: the guest first, then without asking."""
        return self._ask(request, Kind.STOP, serializers.StopSerializer)

    @action(detail=True, methods=["post"])
    def reboot(self, request: Request, **kwargs: Any) -> Response:
        """Restart the guest."""
        return self._ask(request, Kind.REBOOT, serializers.NothingSerializer)

    @action(detail=True, methods=["post"])
    def suspend(self, request: Request, **kwargs: Any) -> Response:
        """Stop its processors."""
        return self._ask(request, Kind.SUSPEND, serializers.NothingSerializer)

    @action(detail=True, methods=["post"])
    def resume(self, request: Request, **kwargs: Any) -> Response:
        """Let them go on."""
        return self._ask(request, Kind.RESUME, serializers.NothingSerializer)

    @action(detail=True, methods=["post"])
    def rescale(self, request: Request, **kwargs: Any) -> Response:
        """Make it larger or smaller."""
        return self._ask(request, Kind.RESCALE, serializers.RescaleSerializer)

    @action(detail=True, methods=["post"])
    def snapshot(self, request: Request, **kwargs: Any) -> Response:
        """Keep what it is now under a name."""
        return self._ask(request, Kind.SNAPSHOT, serializers.SnapshotSerializer)

    @action(detail=True, methods=["post"])
    def revert(self, request: Request, **kwargs: Any) -> Response:
        """Back to a snapshot."""
        return self._ask(request, Kind.REVERT, serializers.SnapshotSerializer)

    @action(detail=True, methods=["post"], url_path="snapshot-remove")
    def snapshot_remove(self, request: Request, **kwargs: Any) -> Response:
        """Forget a snapshot."""
        return self._ask(request, Kind.SNAPSHOT_REMOVE, serializers.SnapshotSerializer)

    @action(detail=True, methods=["post"])
    def export(self, request: Request, **kwargs: Any) -> Response:
        """Its root disk into the catalogue of images."""
        name = self.checked(storage_serializers.ExportSerializer, request)["image"]
        return self.accepted(images.export(self.get_object(), name, self.user, self.key(request)))

    @action(detail=True, methods=["post"])
    def clone(self, request: Request, **kwargs: Any) -> Response:
        """Another instance with a copy of its root disk."""
        name = self.checked(storage_serializers.CloneSerializer, request)["name"]
        return self.accepted(images.clone(self.get_object(), name, self.user, self.key(request)))
