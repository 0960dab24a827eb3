"""Why a request is refused, as RFC 9457 problem details: ``type`` for programs, ``title`` and ``detail`` for people."""

from __future__ import annotations

from typing import Any

from rest_framework import status
from rest_framework.exceptions import APIException
from rest_framework.response import Response
from rest_framework.views import exception_handler

MEDIA_TYPE = "application/problem+json"


class Refused(APIException):
    """A request that is understood and not carried out. ``extra`` goes into the answer."""

    status_code: int = status.HTTP_409_CONFLICT
    default_code = "conflict"

    def __init__(self, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.extra = extra


class OperationActive(Refused):
    """Something is being done to the instance already."""

    default_code = "operation-active"


class WrongState(Refused):
    """The instance is not in a state for it."""

    default_code = "wrong-state"


class KeyReused(Refused):
    """The idempotency key stands for another request."""

    status_code = status.HTTP_422_UNPROCESSABLE_ENTITY
    default_code = "idempotency-key-reused"


class WorkerRevoked(Refused):
    """The worker was shut out for good: nobody will do it."""

    default_code = "worker-revoked"


class QuotaExceeded(Refused):
    """The project may not have so much."""

    status_code = status.HTTP_403_FORBIDDEN
    default_code = "quota-exceeded"


class NoCapacity(Refused):
    """No worker has room for it."""

    status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    default_code = "no-capacity"


class NetworkFull(Refused):
    """A network has no address left."""

    default_code = "network-full"


def handle(error: Exception, context: dict[str, Any]) -> Response | None:
    """Django REST framework's exception handler, with our shape of answer."""
    response = exception_handler(error, context)
    if response is None:
        return None
    data: dict[str, Any] = {"status": response.status_code}
    if isinstance(error, APIException):
        codes = error.get_codes()
        data["type"] = codes if isinstance(codes, str) else "invalid"
        if isinstance(error.detail, (dict, list)):
            data |= {"title": "The request is not valid.", "errors": response.data}
        else:
            data["title"] = str(error.detail)
    else:
        data |= {"type": "not-found" if response.status_code == 404 else "forbidden", "title": str(error)}
    if isinstance(error, Refused):
        data |= error.extra
    response.data = data
    response.content_type = MEDIA_TYPE
    return response
