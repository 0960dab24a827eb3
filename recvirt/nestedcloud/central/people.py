"""The API of projects, members, users and tokens, and of the audit log."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from django.contrib.auth.models import User
from django.db import transaction
from django.db.models import QuerySet
from django.shortcuts import get_object_or_404
from django.utils import timezone
from rest_framework import mixins, serializers, status, viewsets
from rest_framework.exceptions import PermissionDenied, ValidationError
from rest_framework.permissions import IsAuthenticated
from rest_framework.request import Request
from rest_framework.response import Response

from recvirt.nestedcloud.central import audit
from recvirt.nestedcloud.central.auth import AdministratorPermission, is_administrator
from recvirt.nestedcloud.central.models import ApiToken, Event, Membership, Project, Role
from recvirt.nestedcloud.central.people_serializers import (
    USERNAME,
    IssuedTokenSerializer,
    MemberSerializer,
    NewMemberSerializer,
    NewProjectSerializer,
    NewTokenSerializer,
    NewUserSerializer,
    QuotaSerializer,
    RoleSerializer,
    TokenSerializer,
    UserChangeSerializer,
    UserSerializer,
    WhoSerializer,
    username_validator,
)
from recvirt.nestedcloud.central.problems import Refused
from recvirt.nestedcloud.central.scoped import ProjectScoped
from recvirt.nestedcloud.central.serializers import EventSerializer, ProjectSerializer
from recvirt.nestedcloud.model import NAME

_TOKENS_MAX = 100


def _body(kind: type[serializers.Serializer[Any]], request: Request) -> dict[str, Any]:
    serializer = kind(data=request.data)
    serializer.is_valid(raise_exception=True)
    return dict(serializer.validated_data)


def visible_projects(request: Request) -> QuerySet[Project]:
    """Those that a user, with this token, may see."""
    everything, token = Project.objects.order_by("name"), request.auth
    if isinstance(token, ApiToken) and token.project_id is not None:
        everything = everything.filter(pk=token.project_id)
    user: Any = request.user
    return everything if user.is_superuser else everything.filter(memberships__user=user)


class Projects(mixins.ListModelMixin, mixins.RetrieveModelMixin, viewsets.GenericViewSet[Project]):
    """The projects that one is a member of. Administrators make them and set their quotas."""

    open_to_scoped = True
    bodies: Mapping[str, Any] = {"create": NewProjectSerializer, "partial_update": QuotaSerializer}
    answers: Mapping[str, int] = {"create": 201}
    serializer_class = ProjectSerializer
    lookup_field = "name"
    lookup_value_regex = NAME.pattern

    def get_permissions(self) -> Any:
        """Changes are the administrators'."""
        return super().get_permissions() if self.action in ("list", "retrieve", None) else [AdministratorPermission()]

    def get_queryset(self) -> QuerySet[Project]:
        """One's own."""
        return visible_projects(self.request)

    def create(self, request: Request, **kwargs: Any) -> Response:
        """Make a project."""
        fields = _body(NewProjectSerializer, request)
        with transaction.atomic():
            project, made = Project.objects.get_or_create(name=fields.pop("name"), defaults=fields)
            if not made:
                raise Refused(f"there is a project called {project.name}")
            audit.note(request.user, "project.made", project.uuid, project, name=project.name, **fields)
        return Response(ProjectSerializer(project).data, status=status.HTTP_201_CREATED)

    def partial_update(self, request: Request, **kwargs: Any) -> Response:
        """Set quotas."""
        fields = _body(QuotaSerializer, request)
        with transaction.atomic():
            project = get_object_or_404(self.get_queryset().select_for_update(), name=kwargs["name"])
            for name, value in fields.items():
                setattr(project, name, value)
            project.save()
            audit.note(request.user, "project.changed", project.uuid, project, name=project.name, **fields)
        return Response(ProjectSerializer(project).data)


class Members(mixins.ListModelMixin, ProjectScoped):
    """Who is in the project. Its admins change that."""

    bodies = {"create": NewMemberSerializer, "partial_update": RoleSerializer}
    answers: Mapping[str, int] = {"create": 201, "destroy": 204}
    role_wanted = Role.ADMIN
    serializer_class = MemberSerializer
    lookup_field = "user"
    lookup_value_regex = USERNAME

    def get_queryset(self) -> QuerySet[Membership]:
        """By name."""
        return self.project.memberships.select_related("user").order_by("user__username")

    def create(self, request: Request, **kwargs: Any) -> Response:
        """Take a user into the project."""
        fields = self.checked(NewMemberSerializer, request)
        user = User.objects.filter(username=fields["user"]).first()
        if user is None:
            raise ValidationError({"user": ["there is no such user; an administrator makes them"]})
        with transaction.atomic():
            row, made = Membership.objects.get_or_create(
                project=self.project, user=user, defaults={"role": fields["role"]}
            )
            if not made:
                raise Refused(f"{user.username} is a member already, as {row.role}")
            audit.note(request.user, "member.added", row.uuid, self.project, member=user.username, role=row.role)
        return Response(MemberSerializer(row).data, status=status.HTTP_201_CREATED)

    def partial_update(self, request: Request, **kwargs: Any) -> Response:
        """Give a member another role."""
        role = self.checked(RoleSerializer, request)["role"]
        with transaction.atomic():
            row = self._one(kwargs["user"])
            row.role = role
            row.save()
            audit.note(request.user, "member.changed", row.uuid, self.project, member=kwargs["user"], role=role)
        return Response(MemberSerializer(row).data)

    def destroy(self, request: Request, **kwargs: Any) -> Response:
        """Let a member go."""
        with transaction.atomic():
            row = self._one(kwargs["user"])
            audit.note(request.user, "member.removed", row.uuid, self.project, member=kwargs["user"])
            row.delete()
        return Response(status=status.HTTP_204_NO_CONTENT)

    def _one(self, name: str) -> Membership:
        found: Membership = get_object_or_404(
            Membership.objects.select_for_update(of=("self",)), project=self.project, user__username=name
        )
        return found


class Users(mixins.ListModelMixin, viewsets.GenericViewSet[User]):
    """Everybody, for administrators."""

    permission_classes = [AdministratorPermission]
    bodies: Mapping[str, Any] = {"create": NewUserSerializer, "partial_update": UserChangeSerializer}
    answers: Mapping[str, int] = {"create": 201}
    serializer_class = UserSerializer
    queryset = User.objects.order_by("username")
    lookup_field = "username"
    lookup_value_regex = USERNAME

    def create(self, request: Request, **kwargs: Any) -> Response:
        """Make a user, who has no password and no token yet."""
        fields = _body(NewUserSerializer, request)
        with transaction.atomic():
            user, made = User.objects.get_or_create(
                username=fields["name"], defaults={"is_superuser": fields["administrator"]}
            )
            if not made:
                raise Refused(f"there is a user called {user.username}")
            user.set_unusable_password()
            user.save()
            audit.note(request.user, "user.made", None, None, name=user.username, administrator=user.is_superuser)
        return Response(UserSerializer(user).data, status=status.HTTP_201_CREATED)

    def partial_update(self, request: Request, **kwargs: Any) -> Response:
        """Lock a user out, or let one in again."""
        active = _body(UserChangeSerializer, request)["active"]
        with transaction.atomic():
            user = get_object_or_404(User.objects.select_for_update(), username=kwargs["username"])
            if user == request.user and not active:
                raise Refused("nobody locks out oneself")
            user.is_active = active
            user.save()
            audit.note(request.user, "user.unlocked" if active else "user.locked", None, None, name=user.username)
        return Response(UserSerializer(user).data)


class Tokens(mixins.ListModelMixin, viewsets.GenericViewSet[ApiToken]):
    """One's own tokens; for administrators everybody's."""

    bodies: Mapping[str, Any] = {"create": NewTokenSerializer}
    answers: Mapping[str, int] = {"create": 201, "destroy": 204}
    results: Mapping[str, Any] = {"create": IssuedTokenSerializer}
    serializer_class = TokenSerializer
    lookup_field = "uuid"
    lookup_value_regex = "[0-9a-f-]{36}"

    def get_queryset(self) -> QuerySet[ApiToken]:
        """Those that one may revoke."""
        rows = ApiToken.objects.select_related("user", "project").order_by("user__username", "created")
        user: Any = self.request.user
        return rows if is_administrator(self.request) else rows.filter(user=user)

    def create(self, request: Request, **kwargs: Any) -> Response:
        """Issue a token."""
        fields = _body(NewTokenSerializer, request)
        owner: Any = request.user
        if (name := fields.get("user")) not in (None, owner.username):
            if not is_administrator(request):
                raise PermissionDenied("only administrators issue tokens for others")
            owner = User.objects.filter(username=name, is_active=True).first()
            if owner is None:
                raise ValidationError({"user": ["there is no such user, or it is locked out"]})
        project = None
        if fields.get("project"):
            project = Project.objects.filter(name=fields["project"]).first()
            member = project is not None and (
                owner.is_superuser or Membership.objects.filter(project=project, user=owner).exists()
            )
            if not member:
                raise ValidationError({"project": [f"{owner.username} is in no such project"]})
        expires = timezone.now() + timedelta(days=fields["days"]) if fields.get("days") else None
        with transaction.atomic():
            User.objects.select_for_update().get(pk=owner.pk)
            if owner.api_tokens.count() >= _TOKENS_MAX:
                raise Refused(f"{owner.username} has {_TOKENS_MAX} tokens already: revoke some")
            row, secret = ApiToken.issue(owner, fields["name"], expires, project=project, read_only=fields["read_only"])
            audit.note(request.user, "token.issued", row.uuid, project, name=row.name, owner=owner.username,
                       read_only=row.read_only)  # fmt: skip
        answer = Response({**TokenSerializer(row).data, "secret": secret}, status=status.HTTP_201_CREATED)
        answer["Cache-Control"] = "no-store"
        return answer

    def destroy(self, request: Request, **kwargs: Any) -> Response:
        """Revoke a token."""
        try:
            key = uuid.UUID(kwargs["uuid"])
        except ValueError:
            key = uuid.UUID(int=0)
        with transaction.atomic():
            row = get_object_or_404(self.get_queryset(), uuid=key)
            audit.note(request.user, "token.revoked", row.uuid, row.project, name=row.name, owner=row.user.username)
            row.delete()
        return Response(status=status.HTTP_204_NO_CONTENT)


class Audit(mixins.ListModelMixin, viewsets.GenericViewSet[Event]):
    """Everything that happened, newest first, for administrators; ``?user=``, ``?kind=`` and ``?project=`` choose."""

    permission_classes = [AdministratorPermission]
    serializer_class = EventSerializer

    def get_queryset(self) -> QuerySet[Event]:
        """What was chosen."""
        words = self.request.query_params
        chosen = {
            field: words[name]
            for name, field in (("user", "user__username"), ("kind", "kind__startswith"), ("project", "project__name"))
            if name in words
        }
        return Event.objects.filter(**chosen).select_related("user").order_by("-id")


class Who(viewsets.GenericViewSet[User]):
    """Oneself."""

    permission_classes = [IsAuthenticated]
    open_to_scoped = True
    serializer_class = WhoSerializer
    pagination_class = None
    queryset = User.objects.none()

    def whoami(self, request: Request, **kwargs: Any) -> Response:
        """Who one is, with which token, and what in which project."""
        user: Any = request.user
        roles = {row.project_id: row.role for row in Membership.objects.filter(user=user)}
        projects = {
            project.name: Role.ADMIN.value if user.is_superuser else roles[project.pk]
            for project in visible_projects(request)
        }
        token: Any = request.auth
        return Response({
            "name": user.username, "administrator": is_administrator(request), "token": TokenSerializer(token).data,
            "projects": projects,
        })  # fmt: skip


def make_administrator(name: str) -> str:
    """The secret of a new token of the administrator ``name``, who is made if need be. For the machine's own root."""
    username_validator(name)
    with transaction.atomic():
        user, made = User.objects.get_or_create(username=name)
        if made:
            user.set_unusable_password()
        user.is_superuser = user.is_active = True
        user.save()
        row, secret = ApiToken.issue(user, "central")
        audit.note(None, "user.made-administrator", row.uuid, None, name=name)
    return secret
