"""The API of workers: what administrators do with them, and the two doors through which machines come in.

The doors take no user's token; a wrong secret counts against its address, as a wrong token does (``auth``).
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from django.db import transaction
from django.shortcuts import get_object_or_404
from rest_framework import mixins, status, viewsets
from rest_framework.decorators import action
from rest_framework.permissions import AllowAny
from rest_framework.request import Request
from rest_framework.response import Response

from recvirt.nestedcloud.central import audit, peers
from recvirt.nestedcloud.central.auth import AdministratorPermission, check_failures, count_failure
from recvirt.nestedcloud.central.models import Invitation, Worker
from recvirt.nestedcloud.central.peer_serializers import (
    InvitationSerializer,
    IssuedInvitationSerializer,
    JoinSerializer,
    NewInvitationSerializer,
    PeerSerializer,
    WelcomeSerializer,
)
from recvirt.nestedcloud.central.serializers import NothingSerializer, WorkerSerializer
from recvirt.nestedcloud.model import NAME

log = logging.getLogger(__name__)


class Workers(mixins.ListModelMixin, mixins.RetrieveModelMixin, viewsets.GenericViewSet[Worker]):
    """The hypervisors. Administrators empty and revoke them."""

    open_to_scoped = True
    bodies: Mapping[str, Any] = dict.fromkeys(("drain", "undrain", "revoke"), NothingSerializer)
    answers: Mapping[str, int] = dict.fromkeys(("drain", "undrain", "revoke"), 200)
    serializer_class = WorkerSerializer
    queryset = Worker.objects.select_related("peer").order_by("name")
    lookup_field = "name"
    lookup_value_regex = NAME.pattern

    def get_permissions(self) -> Any:
        """Changes are the administrators'."""
        return super().get_permissions() if self.action in ("list", "retrieve", None) else [AdministratorPermission()]

    def _locked(self, request: Request) -> Worker:
        NothingSerializer(data=request.data).is_valid(raise_exception=True)
        found: Worker = get_object_or_404(Worker.objects.select_for_update(), name=self.kwargs["name"])
        return found

    def _answer(self, worker: Worker) -> Response:
        return Response(WorkerSerializer(worker, context=self.get_serializer_context()).data)

    def _set_draining(self, request: Request, draining: bool) -> Response:
        with transaction.atomic():
            worker = self._locked(request)
            if worker.draining != draining:
                worker.draining = draining
                worker.save(update_fields=["draining"])
                word = "worker.drained" if draining else "worker.undrained"
                audit.note(request.user, word, worker.pk, None, name=worker.name)
        return self._answer(worker)

    @action(detail=True, methods=["post"])
    def drain(self, request: Request, **kwargs: Any) -> Response:
        """Place nothing new on it; what is there stays."""
        return self._set_draining(request, True)

    @action(detail=True, methods=["post"])
    def undrain(self, request: Request, **kwargs: Any) -> Response:
        """Place new things on it again."""
        return self._set_draining(request, False)

    @action(detail=True, methods=["post"])
    def revoke(self, request: Request, **kwargs: Any) -> Response:
        """Shut it out for good: tunnel, broker and reports. What ran there runs on, out of reach."""
        with transaction.atomic():
            worker = self._locked(request)
            peers.revoke(worker, request.user)
        return self._answer(worker)


class Invitations(mixins.ListModelMixin, viewsets.GenericViewSet[Invitation]):
    """What opens the way in for workers on other machines, once each (administrators)."""

    permission_classes = [AdministratorPermission]
    bodies: Mapping[str, Any] = {"create": NewInvitationSerializer}
    answers: Mapping[str, int] = {"create": 201, "destroy": 204}
    results: Mapping[str, Any] = {"create": IssuedInvitationSerializer}
    serializer_class = InvitationSerializer
    queryset = Invitation.objects.select_related("made_by").order_by("-created")
    lookup_field = "uuid"
    lookup_value_regex = "[0-9a-f-]{36}"

    def create(self, request: Request, **kwargs: Any) -> Response:
        """Invite a worker."""
        serializer = NewInvitationSerializer(data=request.data)
        serializer.is_valid(raise_exception=True)
        wish = serializer.validated_data
        row, token = peers.invite(request.user, wish.get("name", ""), timedelta(seconds=wish["seconds"]))
        answer = Response({**InvitationSerializer(row).data, "token": token}, status=status.HTTP_201_CREATED)
        answer["Cache-Control"] = "no-store"
        return answer

    def destroy(self, request: Request, **kwargs: Any) -> Response:
        """Take an invitation back. A worker that has come in stays."""
        try:
            key = uuid.UUID(kwargs["uuid"])
        except ValueError:
            key = uuid.UUID(int=0)
        with transaction.atomic():
            row = get_object_or_404(Invitation.objects.select_for_update(), pk=key)
            audit.note(request.user, "worker.uninvited", row.uuid, None, name=row.name)
            row.delete()
        return Response(status=status.HTTP_204_NO_CONTENT)


class _Door(viewsets.GenericViewSet[Worker]):
    """Open to machines without a user's token."""

    authentication_classes: Any = []
    permission_classes = [AllowAny]
    pagination_class = None
    serializer_class = WelcomeSerializer
    queryset = Worker.objects.none()

    def answered(self, request: Request, kind: type[Any], then: Any) -> Response:
        """What ``then`` says to the validated body. Wrong secrets of one address are counted."""
        address = request.META.get("REMOTE_ADDR", "")
        check_failures(address)
        serializer = kind(data=request.data)
        serializer.is_valid(raise_exception=True)
        try:
            with transaction.atomic():
                answer = Response(then(serializer.validated_data))
        except peers.Denied as error:
            count_failure(address)
            log.warning("%s is not let in: %s", address, error.detail)
            raise
        answer["Cache-Control"] = "no-store"
        return answer


class Join(_Door):
    """Where workers that were invited come in."""

    bodies: Mapping[str, Any] = {"join": JoinSerializer}
    answers: Mapping[str, int] = {"join": 200}

    def join(self, request: Request, **kwargs: Any) -> Response:
        """Come in with an invitation: once. The same request again gets the same answer."""

        def come_in(body: Mapping[str, Any]) -> Mapping[str, Any]:
            peer = peers.join(body["token"], body["uuid"], body["name"], body["public_key"], body["password_hash"])
            return peers.answer_to(peer)

        return self.answered(request, JoinSerializer, come_in)


class PeerDoor(_Door):
    """Where workers that are in ask and tell."""

    bodies: Mapping[str, Any] = {"peer": PeerSerializer}
    answers: Mapping[str, int] = {"peer": 200}

    def peer(self, request: Request, **kwargs: Any) -> Response:
        """What a worker needs to know now; or another key and password of it; or it leaves."""

        def tell(body: Mapping[str, Any]) -> Mapping[str, Any]:
            peer, previous = peers.authenticate(body["uuid"], body["password"])
            if "public_key" in body:
                peers.rotate(peer, previous, body["public_key"], body["password_hash"])
            elif previous:
                raise peers.Denied("this password was changed", "worker-unknown")
            if not previous and peer.previous_hash and "public_key" not in body:
                # It has the answer to its change: the password before has no use any more.
                peer.previous_hash = ""
                peer.save(update_fields=["previous_hash"])
            answer = peers.answer_to(peer)
            if body["leave"]:
                peers.revoke(Worker.objects.select_for_update().get(pk=peer.worker_id), None, "it has left")
            return answer

        return self.answered(request, PeerSerializer, tell)
