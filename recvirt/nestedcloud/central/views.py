"""The API. Reading is direct; everything else makes an operation, and the answer is 202 with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.db.models import Prefetch, QuerySet
from django.http import Http404
from rest_framework import mixins, status, viewsets
from rest_framework.decorators import action
from rest_framework.exceptions import ValidationError
from rest_framework.permissions import IsAuthenticated
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.serializers import Serializer

from recvirt.nestedcloud.central import operations, serializers
from recvirt.nestedcloud.central.auth import ProjectPermission, role_in
from recvirt.nestedcloud.central.models import (
    Event,
    Image,
    Instance,
    InstanceState,
    Network,
    Operation,
    Project,
    Role,
    Worker,
)
from recvirt.nestedcloud.model import NAME, Kind

KEY_HEADER = "Idempotency-Key"
_KEY_MAX = 64


class ProjectScoped(viewsets.GenericViewSet[Any]):
    """Everything below one project, found by its name. What a stranger asks for is not found."""

    permission_classes = [IsAuthenticated, ProjectPermission]
    #: The bodies of requests, by action; the schema is made from them.
    bodies: Mapping[str, type[Serializer[Any]]] = {}
    project: Project
    role: Role

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Look the project up before permissions are looked at."""
        self.perform_authentication(request)
        if request.user is not None and request.user.is_authenticated:
            project = Project.objects.filter(name=kwargs["project"]).first()
            role = role_in(request.user, project) if project is not None else None
            if project is None or role is None:
                raise Http404("there is no such project")
            self.project, self.role = project, role
        super().initial(request, *args, **kwargs)

    def checked(self, kind: type[Serializer[Any]], request: Request) -> dict[str, Any]:
        """The validated body."""
        serializer = kind(data=request.data, context={"project": self.project})
        serializer.is_valid(raise_exception=True)
        return dict(serializer.validated_data)

    def key(self, request: Request) -> str | None:
        """The client's idempotency key."""
        key = request.headers.get(KEY_HEADER)
        if key is not None and not 1 <= len(key) <= _KEY_MAX:
            raise ValidationError({KEY_HEADER: [f"1 to {_KEY_MAX} characters"]})
        return key

    @staticmethod
    def accepted(operation: Operation) -> Response:
        """202 with the operation."""
        return Response(serializers.OperationSerializer(operation).data, status=status.HTTP_202_ACCEPTED)


class Workers(mixins.ListModelMixin, mixins.RetrieveModelMixin, viewsets.GenericViewSet[Worker]):
    """The hypervisors."""

    open_to_scoped = True
    serializer_class = serializers.WorkerSerializer
    queryset = Worker.objects.order_by("name")
    lookup_field = "name"
    lookup_value_regex = NAME.pattern


class Images(mixins.ListModelMixin, ProjectScoped):
    """The project's images, and everybody's."""

    serializer_class = serializers.ImageSerializer

    def get_queryset(self) -> QuerySet[Image]:
        """Own and public ones."""
        return (Image.objects.filter(project=self.project) | Image.objects.filter(project=None)).order_by("name")


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
        return self.project.operations.select_related("instance").order_by("-created")


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
        "resume": serializers.NothingSerializer,
    }  # fmt: skip
    serializer_class = serializers.InstanceSerializer
    lookup_field = "name"
    lookup_value_regex = NAME.pattern

    def get_queryset(self) -> QuerySet[Instance]:
        """Those that are not deleted."""
        return (
            self.project.instances.exclude(state=InstanceState.DELETED)
            .select_related("image", "worker")
            .prefetch_related("nics__network", Prefetch("operations", Operation.objects.filter(finished=None)))
            .order_by("name")
        )

    def create(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Launch."""
        wish = self.checked(serializers.LaunchSerializer, request)
        wish.setdefault("networks", [operations.default_network(self.project)])
        return self.accepted(operations.launch(self.project, self._user, wish, self.key(request)))

    def destroy(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Delete."""
        return self._ask(request, Kind.DELETE, serializers.NothingSerializer)

    @property
    def _user(self) -> Any:
        return self.request.user

    def _ask(self, request: Request, kind: Kind, body: type[Serializer[Any]]) -> Response:
        args = operations.args_of(kind, self.checked(body, request))
        return self.accepted(operations.request(self.get_object(), self._user, kind, args, self.key(request)))

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
