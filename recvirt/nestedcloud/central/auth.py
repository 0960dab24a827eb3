"""Who asks, and what they may do: bearer tokens, and a member's role in a project."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.core.cache import cache
from django.db.models import Q
from django.utils import timezone
from rest_framework.authentication import BaseAuthentication, get_authorization_header
from rest_framework.exceptions import AuthenticationFailed, Throttled
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


class TokenAuthentication(BaseAuthentication):
    """``Authorization: Bearer rvc_...``"""

    def authenticate(self, request: Request) -> tuple[Any, ApiToken] | None:
        """The user and the token. AuthenticationFailed does not say what was wrong with it."""
        words = get_authorization_header(request).split()
        if not words or words[0].lower() != b"bearer":
            return None
        address = request.META.get("REMOTE_ADDR", "")
        key = f"failures:{address}"
        if cache.get(key, 0) >= FAILURES_MAX:
            raise Throttled(wait=FAILURES_SECONDS)
        now = timezone.now()
        token = None
        if len(words) == 2:
            digest = ApiToken.digest_of(words[1].decode("latin-1"))
            valid = Q(expires__isnull=True) | Q(expires__gt=now)
            token = ApiToken.objects.select_related("user").filter(valid, digest=digest, user__is_active=True).first()
        if token is None:
            if not cache.add(key, 1, FAILURES_SECONDS):
                cache.incr(key)
            raise AuthenticationFailed("the token is not valid")
        if token.last_used is None or now - token.last_used > _LAST_USED_EVERY:
            ApiToken.objects.filter(pk=token.pk).update(last_used=now)
        return token.user, token

    def authenticate_header(self, request: Request) -> str:
        """Makes refusals a 401 with the name of the scheme."""
        return "Bearer"


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
