"""What can go wrong between us and a provider, told apart by what may be done about it."""

from __future__ import annotations

from recvirt.errors import PublishError, RecvirtError


class MissingSdkError(RecvirtError):
    """A provider's library is not installed."""

    exit_code = 4

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(
            f"the library {module} is not installed", hint=f"install it: pip install 'recvirt[{extra}]'"
        )


class DeniedError(PublishError):
    """The provider does not let us: no, expired or wrong credentials, or a missing right. Never tried again."""


class TransientError(PublishError):
    """Something that may pass: a cut connection, a time-out, 429, 503. ``after``: seconds that were asked for."""

    def __init__(self, message: str, *, after: float | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.after = after
