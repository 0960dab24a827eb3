"""The API of forwards."""

from __future__ import annotations

import uuid
from typing import Any

from django.db.models import QuerySet
from django.http import Http404
from rest_framework import mixins
from rest_framework.request import Request
from rest_framework.response import Response

from recvirt.nestedcloud.central import forwards, serializers
from recvirt.nestedcloud.central.auth import is_administrator
from recvirt.nestedcloud.central.forward_serializers import ForwardSerializer, NewForwardSerializer
from recvirt.nestedcloud.central.models import Forward
from recvirt.nestedcloud.central.scoped import ProjectScoped


class Forwards(mixins.ListModelMixin, mixins.RetrieveModelMixin, ProjectScoped):
    """Ports of workers' hosts that lead to the project's instances."""

    bodies = {"create": NewForwardSerializer, "destroy": serializers.NothingSerializer}
    serializer_class = ForwardSerializer
    lookup_field = "uuid"
    lookup_value_regex = "[0-9a-f-]{36}"

    def get_queryset(self) -> QuerySet[Forward]:
        """Its own."""
        rows = self.project.forwards.select_related("nic__instance", "nic__network", "worker")
        return rows.order_by("worker__name", "protocol", "host_port")

    def get_object(self) -> Forward:
        """By its UUID."""
        try:
            found = self.get_queryset().filter(pk=uuid.UUID(self.kwargs["uuid"])).first()
        except ValueError:
            found = None
        if found is None:
            self.not_found("there is no such forward")
        return found

    def create(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Forward a port."""
        wish = self.checked(NewForwardSerializer, request)
        instance = wish.pop("instance")
        allowed = is_administrator(request)
        return self.accepted(forwards.add(instance, self.user, wish, self.key(request), privileged=allowed))

    def destroy(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Forward it no more."""
        self.checked(serializers.NothingSerializer, request)
        key = self.key(request)
        try:
            forward = self.get_object()
        except Http404:
            before = forwards.removed_before(self.project, self.user, self.kwargs["uuid"], key)
            if before is None:
                raise
            return self.accepted(before)
        return self.accepted(forwards.remove(forward, self.user, key))
