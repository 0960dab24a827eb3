"""Who asks, and what they may do: bearer tokens, and a member's role in a project."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.core.cache import cache
from django.db.models import Q
from django.http import Http404
from django.utils import timezone
from rest_framework.authentication import BaseAuthentication, get_authorization_header
from rest_framework.exceptions import AuthenticationFailed, PermissionDenied, Throttled
from rest_framework.permissions import BasePermission
from rest_framework.request import Request

from recvirt.nestedcloud.central.models import ApiToken, Membership, Project, Role

#: Wrong tokens from one address; then it has to wait.
FAILURES_MAX = 20
FAILURES_SECONDS = 60
#: Writing down each use would make every request a write.
_LAST_USED_EVERY = timedelta(minutes=5)
_RANKS = {Role.READER: 0, Role.OPERATOR: 1, Role.ADMIN: 2}
_SAFE = ("GET", "HEAD", "OPTIONS")


def check_failures(address: str) -> None:
    """Throttled when an address has shown too many wrong secrets lately."""
    if cache.get(f"failures:{address}", 0) >= FAILURES_MAX:
        raise Throttled(wait=FAILURES_SECONDS)


def count_failure(address: str) -> None:
    """A wrong secret of an address."""
    key = f"failures:{address}"
    if not cache.add(key, 1, FAILURES_SECONDS):
        cache.incr(key)


def token_of(header: bytes, address: str) -> ApiToken:
    """The token in an ``Authorization`` header, valid now. AuthenticationFailed does not say what was wrong with it.

    The digest is what is looked up, so the time that takes tells nothing of a secret.
    """
    check_failures(address)
    words, now, token = header.split(), timezone.now(), None
    if len(words) == 2 and words[0].lower() == b"bearer":
        digest = ApiToken.digest_of(words[1].decode("latin-1"))
        valid = Q(expires__isnull=True) | Q(expires__gt=now)
        rows = ApiToken.objects.select_related("user", "project")
        token = rows.filter(valid, digest=digest, user__is_active=True).first()
    if token is None:
        count_failure(address)
        raise AuthenticationFailed("the token is not valid")
    if token.last_used is None or now - token.last_used > _LAST_USED_EVERY:
        ApiToken.objects.filter(pk=token.pk).update(last_used=now)
    return token


class TokenAuthentication(BaseAuthentication):
    """``Authorization: Bearer rvc_...``"""

    def authenticate(self, request: Request) -> tuple[Any, ApiToken] | None:
        """The user and the token. AuthenticationFailed does not say what was wrong with it."""
        words = get_authorization_header(request).split()
        if not words or words[0].lower() != b"bearer":
            return None
        token = token_of(b" ".join(words), request.META.get("REMOTE_ADDR", ""))
        _check_scope(token, request)
        return token.user, token

    def authenticate_header(self, request: Request) -> str:
        """Makes refusals a 401 with the name of the scheme."""
        return "Bearer"


def _check_scope(token: ApiToken, request: Request) -> None:
    """PermissionDenied outside of what the token is for. Here, so that no view can forget it.

    A token of one project opens that project's documents alone, and those views that say ``open_to_scoped``.
    """
    if token.read_only and request.method not in _SAFE:
        raise PermissionDenied("this token only reads")
    if token.project is None:
        return
    context: Any = request.parser_context or {}
    below = (context.get("kwargs") or {}).get("project")
    if below == token.project.name or (below is None and getattr(context.get("view"), "open_to_scoped", False)):
        return
    if below is not None:
        raise Http404("there is no such project")
    raise PermissionDenied("this token is for one project alone")


def is_administrator(request: Request) -> bool:
    """Whether one may do everything everywhere: a token for one project never may."""
    token: Any = request.auth
    return bool(getattr(request.user, "is_superuser", False)) and (token is None or token.project_id is None)


def is_operator(role: Role | None) -> bool:
    """Whether a role may change things."""
    return role is not None and _RANKS[role] >= _RANKS[Role.OPERATOR]


class AdministratorPermission(BasePermission):
    """The cloud's own administrators."""

    message = "this is for the cloud's administrators"

    def has_permission(self, request: Request, view: Any) -> bool:
        """Whether the request may go on."""
        return is_administrator(request)


def role_in(user: Any, project: Project) -> Role | None:
    """What a user is in a project; None for a stranger. The cloud's own administrators are everything everywhere."""
    if user.is_superuser:
        return Role.ADMIN
    found = Membership.objects.filter(user=user, project=project).first()
    return Role(found.role) if found is not None else None


class ProjectPermission(BasePermission):
    """Readers read, operators act. A stranger is not told that the project exists."""

    message = "your role in this project does not allow it"

    def has_permission(self, request: Request, view: Any) -> bool:
        """Whether the request may go on; the view has looked the project up."""
        wanted = Role.READER if request.method in _SAFE else getattr(view, "role_wanted", Role.OPERATOR)

        return _RANKS[view.role] >= _RANKS[wanted]
