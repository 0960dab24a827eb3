"""The API of volumes and images."""

from __future__ import annotations

from typing import Any

from django.db.models import Prefetch, QuerySet
from rest_framework import mixins, status
from rest_framework.decorators import action
from rest_framework.exceptions import ParseError, PermissionDenied
from rest_framework.parsers import BaseParser
from rest_framework.request import Request
from rest_framework.response import Response

from recvirt.nestedcloud import spool
from recvirt.nestedcloud.central import images, serializers, storage_serializers, volumes
from recvirt.nestedcloud.central.models import Image, ImageState, Operation, Volume, VolumeState
from recvirt.nestedcloud.central.scoped import ProjectScoped
from recvirt.nestedcloud.model import NAME, Kind


class Volumes(mixins.ListModelMixin, mixins.RetrieveModelMixin, ProjectScoped):
    """The project's volumes."""

    bodies = {
        "create": storage_serializers.AllocateSerializer, "destroy": serializers.NothingSerializer,
        "attach": storage_serializers.AttachSerializer, "detach": serializers.NothingSerializer,
        "resize": storage_serializers.ResizeSerializer, "snapshot": serializers.SnapshotSerializer,
        "revert": serializers.SnapshotSerializer, "snapshot_remove": serializers.SnapshotSerializer,
    }  # fmt: skip
    serializer_class = storage_serializers.VolumeSerializer
    lookup_field = "name"
    lookup_value_regex = NAME.pattern

    def get_queryset(self) -> QuerySet[Volume]:
        """Those that are not removed."""
        return (
            self.project.volumes.exclude(state=VolumeState.DELETED)
            .select_related("instance", "worker")
            .prefetch_related(Prefetch("operations", Operation.objects.filter(finished=None)))
            .order_by("name")
        )

    def create(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Allocate and format."""
        wish = self.checked(storage_serializers.AllocateSerializer, request)
        return self.accepted(volumes.allocate(self.project, self.user, wish, self.key(request)))

    def destroy(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Remove."""
        return self._ask(request, Kind.VOLUME_REMOVE, serializers.NothingSerializer)

    def _ask(self, request: Request, kind: Kind, body: type[Any]) -> Response:
        args = self.checked(body, request)
        return self.ask(
            request, kind, args, self.get_object, lambda it, key: volumes.request(it, self.user, kind, args, key)
        )

    @action(detail=True, methods=["post"])
    def attach(self, request: Request, **kwargs: Any) -> Response:
        """Give it to an instance."""
        instance = self.checked(storage_serializers.AttachSerializer, request)["instance"]
        return self.accepted(volumes.attach(self.get_object(), instance, self.user, self.key(request)))

    @action(detail=True, methods=["post"])
    def detach(self, request: Request, **kwargs: Any) -> Response:
        """Take it from its instance."""
        return self._ask(request, Kind.DETACH, serializers.NothingSerializer)

    @action(detail=True, methods=["post"])
    def resize(self, request: Request, **kwargs: Any) -> Response:
        """Make it larger."""
        return self._ask(request, Kind.VOLUME_RESIZE, storage_serializers.ResizeSerializer)

    @action(detail=True, methods=["post"])
    def snapshot(self, request: Request, **kwargs: Any) -> Response:
        """Keep what is in it under a name."""
        return self._ask(request, Kind.VOLUME_SNAPSHOT, serializers.SnapshotSerializer)

    @action(detail=True, methods=["post"])
    def revert(self, request: Request, **kwargs: Any) -> Response:
        """Back to a snapshot."""
        return self._ask(request, Kind.VOLUME_REVERT, serializers.SnapshotSerializer)

    @action(detail=True, methods=["post"], url_path="snapshot-remove")
    def snapshot_remove(self, request: Request, **kwargs: Any) -> Response:
        """Forget a snapshot."""
        return self._ask(request, Kind.VOLUME_SNAPSHOT_REMOVE, serializers.SnapshotSerializer)


class PieceParser(BaseParser):
    """A piece of an upload, as bytes, and not more of them than a piece has."""

    media_type = "application/octet-stream"

    def parse(self, stream: Any, media_type: Any = None, parser_context: Any = None) -> Any:
        """The body."""
        data: bytes = stream.read(spool.PIECE_BYTES_MAX + 1)
        if len(data) > spool.PIECE_BYTES_MAX:
            raise ParseError(f"a piece of an upload has {spool.PIECE_BYTES_MAX} bytes at most")
        return data


class Images(mixins.ListModelMixin, mixins.RetrieveModelMixin, ProjectScoped):
    """The project's images, and everybody's. One of the project's own hides everybody's of the same name."""

    bodies = {
        "create": storage_serializers.ImportSerializer, "destroy": serializers.NothingSerializer,
        "complete": serializers.NothingSerializer,
    }  # fmt: skip
    raw = ("content",)
    serializer_class = storage_serializers.ImageSerializer
    lookup_field = "name"
    lookup_value_regex = NAME.pattern

    def get_queryset(self) -> QuerySet[Image]:
        """Own and public ones."""
        everything = Image.objects.filter(project=self.project) | Image.objects.filter(project=None)
        return everything.exclude(state=ImageState.DELETED).order_by("name")

    def get_object(self) -> Image:
        """By name, the project's own first."""
        found = self.get_queryset().filter(name=self.kwargs["name"])
        image = found.filter(project=self.project).first() or found.first()
        if image is None:
            self.not_found("there is no such image")
        return image

    def _own(self) -> Image:
        """The image, to be changed: everybody's only by the cloud's own administrators."""
        image = self.get_object()
        if image.project_id is None and not self.user.is_superuser:
            raise PermissionDenied(f"{image.name} is everybody's; only the cloud's administrators may change it")
        return image

    def create(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Import from a URL (an operation), or begin an upload (201 with the image)."""
        wish = self.checked(storage_serializers.ImportSerializer, request)
        if "url" in wish:
            return self.accepted(images.import_url(self.project, self.user, wish, self.key(request)))
        image = images.begin_upload(self.project, wish)
        return Response(self.get_serializer(image).data, status=status.HTTP_201_CREATED)

    def destroy(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Delete."""
        self.checked(serializers.NothingSerializer, request)
        return self.ask(
            request, Kind.IMAGE_REMOVE, {}, self._own, lambda it, key: images.remove(it, self.project, self.user, key)
        )

    @action(detail=True, methods=["put"], parser_classes=[PieceParser])
    def content(self, request: Request, **kwargs: Any) -> Response:
        """A piece of an upload, at ``?offset=``; the answer says how many bytes are there."""
        offset = request.query_params.get("offset", "0")
        if not (offset.isascii() and offset.isdecimal()) or len(offset) > 15:
            raise ParseError("offset: want a number of bytes")
        data: Any = request.data
        return Response({"there": images.put_piece(self._own(), int(offset), bytes(data or b""))})

    @action(detail=True, methods=["post"])
    def complete(self, request: Request, **kwargs: Any) -> Response:
        """The upload is whole."""
        self.checked(serializers.NothingSerializer, request)
        return self.accepted(images.finish_upload(self._own(), self.user, self.key(request)))
