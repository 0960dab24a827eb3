"""Calls of Amazon's services by boto3, with our time-outs, our one budget of retries, and errors for people."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

from recvirt.errors import ConfigError, PublishError
from recvirt.publish.budget import Budget
from recvirt.publish.errors import DeniedError, MissingSdkError, TransientError

_DENIED = {
    "AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AuthFailure", "ExpiredToken",
    "ExpiredTokenException", "RequestExpired", "InvalidClientTokenId", "SignatureDoesNotMatch", "OptInRequired",
    "UnrecognizedClientException", "InvalidAccessKeyId",
}  # fmt: skip
_PASSING = {
    "Throttling", "ThrottlingException", "RequestLimitExceeded", "RequestThrottled", "RequestThrottledException",
    "SlowDown", "InternalServerException", "InternalError", "InternalFailure", "ServiceUnavailable", "Unavailable",
    "RequestTimeout", "ServerInternal", "EC2ThrottledException",
}  # fmt: skip
#: A snapshot that was just started may not be known everywhere for up to two minutes.
_NOT_YET = {"InvalidSnapshot.NotFound", "ResourceNotFoundException", "InvalidAMIID.NotFound"}
_QUOTA = ("LimitExceeded", "QuotaExceeded", "Limit.Exceeded")
_CONNECT_SECONDS = 10
_SAID_MAX = 400
_LATER = "aws sts get-caller-identity tells who you are; docs/policies/aws.json lists the rights that are needed"


class Amazon:
    """Clients of one account, made when they are first used."""

    def __init__(self, budget: Budget, *, endpoint: str | None, timeout: float, workers: int) -> None:
        self._budget = budget
        self._endpoint = endpoint
        self._timeout = timeout
        self._workers = workers
        self._clients: dict[tuple[str, str | None], Any] = {}

    @cached_property
    def _session(self) -> Any:
        """One for all clients: it reads its descriptions of the services once."""
        return _sdk().session.Session()

    def client(self, service: str, region: str | None) -> Any:
        """A client. ConfigError without a region, DeniedError without credentials (when it is used)."""
        key = (service, region)
        if key not in self._clients:
            _sdk()
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError

            config = Config(
                connect_timeout=_CONNECT_SECONDS, read_timeout=self._timeout, retries={"total_max_attempts": 1},
                max_pool_connections=self._workers + 2, user_agent_extra="recvirt",
            )  # fmt: skip
            try:
                self._clients[key] = self._session.client(
                    service, region_name=region, endpoint_url=self._endpoint, config=config
                )
            except BotoCoreError as error:
                raise ConfigError(f"{service}: {error}", hint="name one: --set aws.region=eu-central-1") from None
        return self._clients[key]

    def call(self, what: str, function: Callable[..., Any], *, settling: bool = False, **arguments: Any) -> Any:
        """One call with retries. ``settling``: the thing was just made, and may not be known everywhere yet."""
        from botocore import exceptions
        from botocore.parsers import ResponseParserError

        def attempt() -> Any:
            try:
                return function(**arguments)
            except exceptions.ClientError as error:
                raise refusal(what, error.response, settling=settling) from None
            except (exceptions.NoCredentialsError, exceptions.CredentialRetrievalError) as error:
                raise DeniedError(f"{what}: {error}", hint=_LATER) from None
            except exceptions.ParamValidationError as error:
                raise PublishError(f"{what}: {error}") from None
            except (exceptions.HTTPClientError, exceptions.ConnectionError, ResponseParserError) as error:
                raise TransientError(str(error), hint="is the region right, and the network up?") from None
            except exceptions.BotoCoreError as error:
                raise PublishError(f"{what}: {error}") from None

        return self._budget.call(what, attempt)

    def pages(self, what: str, function: Callable[..., Any], key: str, **arguments: Any) -> list[Any]:
        """All items of a paged answer."""
        found: list[Any] = []
        while True:
            answer = self.call(what, function, **arguments)
            found += answer.get(key) or []
            token = answer.get("NextToken")
            if not token:
                return found
            arguments["NextToken"] = token


def _sdk() -> Any:
    """Its library, imported when it is wanted. MissingSdkError without it."""
    try:
        import boto3
    except ImportError:
        raise MissingSdkError("boto3", "aws") from None
    return boto3


def refusal(what: str, response: dict[str, Any], *, settling: bool = False) -> PublishError:
    """What a client's error says, as an error: one to try again, a denial, or a refusal for good."""
    code = str(response.get("Error", {}).get("Code", ""))
    said = f"{what}: {code}: {response.get('Error', {}).get('Message', '')}"
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in _DENIED or status in (401, 403):
        return DeniedError(f"{said} (denied)", hint=_LATER)
    if code in _PASSING or status in (429, 500, 502, 503, 504):
        return TransientError(f"{status} {said.removeprefix(f'{what}: ')}"[:_SAID_MAX])
    if any(word in code for word in _QUOTA):
        return PublishError(said, hint="a quota is used up: recvirt prune aws, or ask for more (aws service-quotas)")
    if settling and code in _NOT_YET:
        return TransientError(said.removeprefix(f"{what}: "), after=2.0)
    error = PublishError(said)
    error.code = code  # type: ignore[attr-defined]
    return error


def code_of(error: PublishError) -> str:
    """Amazon's word for a refusal."""
    return str(getattr(error, "code", ""))


def wait_for(what: str, look: Callable[[], str], good: str, bad: tuple[str, ...], seconds: float = 3600.0) -> None:
    """Poll a state. PublishError when it is a bad one, or when it does not become good in time."""
    deadline, pause = time.monotonic() + seconds, 0.5
    while True:
        state = look()
        if state == good:
            return
        if state in bad:
            raise PublishError(f"{what} is {state}", hint="publish it again")
        if time.monotonic() > deadline:
            raise PublishError(f"{what} is still {state} after {seconds:.0f} s", hint="publish it again: it goes on")
        time.sleep(pause)
        pause = min(pause * 1.5, 15.0)


def checksum(data: bytes) -> str:
    """A SHA-256 as EBS wants it."""
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def linear_checksum(parts: list[str]) -> str:
    """CompleteSnapshot's aggregate: the SHA-256 over the blocks' own, in the order of their numbers."""
    return checksum(b"".join(base64.b64decode(part) for part in parts))
