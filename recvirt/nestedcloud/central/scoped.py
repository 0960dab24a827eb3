"""What all views below a project share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from django.http import Http404
from rest_framework import status, viewsets
from rest_framework.exceptions import ValidationError
from rest_framework.permissions import IsAuthenticated
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.serializers import Serializer

from recvirt.nestedcloud.central import serializers
from recvirt.nestedcloud.central.auth import ProjectPermission, role_in
from recvirt.nestedcloud.central.models import Operation, Project, Role
from recvirt.nestedcloud.central.operations import digest_of
from recvirt.nestedcloud.model import Kind

KEY_HEADER = "Idempotency-Key"
_KEY_MAX = 64


class ProjectScoped(viewsets.GenericViewSet[Any]):
    """Everything below one project, found by its name. What a stranger asks for is not found."""

    permission_classes = [IsAuthenticated, ProjectPermission]
    #: The bodies of requests, by action; the schema is made from them.
    bodies: Mapping[str, type[Serializer[Any]]] = {}
    #: Actions whose bodies are plain bytes.
    raw: tuple[str, ...] = ()
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

    def ask(
        self, request: Request, kind: Kind, args: Mapping[str, Any], find: Callable[[], Any],
        ask: Callable[..., Operation],
    ) -> Response:  # fmt: skip
        """202 with the operation that ``ask`` makes of what ``find`` finds. When it is asked for again in the same
        words after its end, the thing may be gone: the answer is the same.
        """
        key = self.key(request)
        try:
            target = find()
        except Http404:
            if key is None or (before := self._before(kind, args, key)) is None:
                raise
            return self.accepted(before)
        return self.accepted(ask(target, key))

    def _before(self, kind: Kind, args: Mapping[str, Any], key: str) -> Operation | None:
        found = self.project.operations.filter(idempotency_key=key, kind=kind.value, user=self.user).first()
        target = found and (found.volume or found.image or found.instance)
        if found is None or target is None or target.name != self.kwargs.get("name"):
            return None
        return found if found.request_digest == digest_of(kind, str(target.pk), args) else None

    @staticmethod
    def accepted(operation: Operation) -> Response:
        """202 with the operation."""
        return Response(serializers.OperationSerializer(operation).data, status=status.HTTP_202_ACCEPTED)

    @property
    def user(self) -> Any:
        """Who asks."""
        return self.request.user

    @staticmethod
    def not_found(text: str) -> NoReturn:
        """404."""
        raise Http404(text)
