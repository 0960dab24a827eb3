"""What a person, the central node and a worker say to each other on a serial console. Standard library only.

A WebSocket (RFC 6455) on each side of the central node: binary messages are the console's bytes. The worker has two
words, as text: ``READY``, from now on they are the guest's; and ``TAKEN``, the guest has taken one message more.
``WINDOW`` are on the way to it at most: behind more of them pings would wait, and the connection be taken for dead. Why
it ended is the code and the sentence of the closing.
"""

from __future__ import annotations

import dataclasses
import enum
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from urllib.parse import urlsplit

from recvirt.nestedcloud.model import check_uuid

#: Before a session's UUID in the path of its WebSocket; a worker's has ``/worker`` behind it.
PATH = "/api/v1/console/"
PROTOCOL = "recvirt.console.1"
#: Before the ticket, which is offered as a subprotocol of its own: a browser can set no header, and a URL is logged.
_TICKET = "ticket."
READY, TAKEN = "ready", "taken"
WINDOW = 4
#: What one message may hold.
MESSAGE_BYTES_MAX = 64 * 1024
PING_SECONDS = 20.0
#: RFC 6455, 5.5: a control frame has 125 bytes, of which two are the code.
_REASON_BYTES_MAX = 123


class Close(enum.IntEnum):
    """Why a WebSocket was closed: RFC 6455's codes, and some of its private range."""

    LEFT = 1000
    UNSUPPORTED = 1003
    TOO_LARGE = 1009
    RESTART = 1012
    STOPPED = 4000
    IDLE = 4001
    TOO_LONG = 4002
    TAKEN = 4003
    NO_WORKER = 4004
    REFUSED = 4005
    REVOKED = 4006
    LOST = 4007
    STUCK = 4008


#: What a worker may say; anything else of it is ``LOST``.
OF_A_WORKER = (Close.STOPPED, Close.REFUSED, Close.STUCK, Close.LEFT)


def new_ticket() -> str:
    """A secret that opens one side of one session, once; 256 bits."""
    return secrets.token_urlsafe(32)


def digest_of(ticket: str) -> str:
    """What is kept of a ticket."""
    return sha256(ticket.encode()).hexdigest()


def opens(ticket: str, digest: str) -> bool:
    """Whether it is the ticket with this digest, in a time that tells nothing."""
    return hmac.compare_digest(digest_of(ticket), digest)


def offers(ticket: str) -> list[str]:
    """The subprotocols that a client offers."""
    return [PROTOCOL, _TICKET + ticket]


def ticket_in(offered: Iterable[str]) -> str:
    """The ticket among the subprotocols that a client offers; nothing when they are not ours."""
    words = list(offered)
    tickets = [word.removeprefix(_TICKET) for word in words if word.startswith(_TICKET)]
    return tickets[0] if PROTOCOL in words and len(tickets) == 1 else ""


def reason(text: str) -> str:
    """A sentence as far as it fits into a closing, without what would move a terminal's cursor."""
    plain = "".join(char if char.isprintable() else "?" for char in text)
    return plain.encode()[:_REASON_BYTES_MAX].decode(errors="ignore")


def is_safe_url(url: str) -> bool:
    """Whether a secret may be sent there: encrypted, or no further than this machine."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    local = parts.hostname in ("127.0.0.1", "localhost", "::1")
    return bool(parts.hostname) and (parts.scheme == "https" or (parts.scheme == "http" and local))


@dataclass(frozen=True)
class ConsoleCall:
    """From the central node to a worker: bring an instance's serial console to a session. ``ticket`` opens that once.

    With ``log`` it is what the console has said so far, and with ``follow`` what it says from then on. ``force`` takes
    the console from whoever has it on the host itself.
    """

    session: str
    instance: str
    ticket: str = dataclasses.field(repr=False)
    log: bool = False
    follow: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        check_uuid(self.session)
        check_uuid(self.instance)
