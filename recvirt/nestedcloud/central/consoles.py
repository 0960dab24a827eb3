"""Console sessions: who may bring which instance's console together, once each and within a minute.

They live in the memory of the API's process, of which there is one (``serve``): both sides of a session come to it, and
when it ends, so do they. Owns tickets, bounds and whose turn it is. Does not own the connections (``relay``).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import UUID, uuid4

from recvirt.nestedcloud import console
from recvirt.nestedcloud.central.models import ApiToken, Instance
from recvirt.nestedcloud.central.problems import Refused
from recvirt.nestedcloud.console import Close, ConsoleCall

#: A ticket that nobody used by then is worth nothing.
TICKET_SECONDS = 60.0
#: Each one is two connections of the API, and four of the front.
SESSIONS_MAX = 50

Side = Literal["person", "worker"]


class ConsoleTaken(Refused):
    """Somebody has the console."""

    default_code = "console-taken"


class TooManyConsoles(Refused):
    """There is no room for another session."""

    status_code = 503
    default_code = "too-many-consoles"


@dataclass(frozen=True)
class Ending:
    """Why a session is over, as its sides are told."""

    code: int
    reason: str


@dataclass(eq=False)
class Session:
    """One console from one person to one worker. ``digests`` are of the tickets that were not used yet."""

    uuid: str
    instance: UUID
    instance_name: str
    project: UUID
    user: int
    user_name: str
    token: UUID
    log: bool
    expires: float
    digests: dict[Side, str]
    heard: float = field(default_factory=time.monotonic)
    #: The connections that have come, and what tells that both have.
    ends: dict[Side, Any] = field(default_factory=dict)
    both: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    #: How many messages may still go to the guest.
    window: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(console.WINDOW))
    ending: Ending | None = None
    loop: asyncio.AbstractEventLoop | None = None

    def end(self, code: int, reason: str) -> None:
        """It is over; the first reason counts. In the loop's own thread."""
        if self.ending is None:
            self.ending = Ending(code, reason)
        self.over.set()

    def end_from_outside(self, code: int, reason: str) -> None:
        """The same, from any thread."""
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self.end, code, reason)


class Sessions:
    """Those of one process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def open(
        self, instance: Instance, token: ApiToken, *, log: bool = False, follow: bool = False, force: bool = False
    ) -> tuple[Session, str, ConsoleCall]:
        """A new session, the person's ticket, and what its worker is sent.

        ConsoleTaken while somebody else has the console, unless ``force`` takes it from them.
        """
        tickets: dict[Side, str] = {"person": console.new_ticket(), "worker": console.new_ticket()}
        session = Session(
            str(uuid4()), instance.pk, instance.name, instance.project_id, token.user_id,
            token.user.get_username(), token.pk, log, self._clock() + TICKET_SECONDS,
            {side: console.digest_of(ticket) for side, ticket in tickets.items()},
        )  # fmt: skip
        call = ConsoleCall(
            session.uuid, str(instance.pk), tickets["worker"], log=log, follow=follow, force=force
        )  # fmt: skip
        with self._lock:
            self._forget_expired()
            before = None if log else self._holder(instance.pk)
            # One's own that was never used is a request that was sent twice.
            if before is not None and not force and ("person" in before.ends or before.user != session.user):
                raise ConsoleTaken(
                    f"{before.user_name} has the console of {instance.name}; force takes it from them",
                    user=before.user_name,
                )
            if len(self._sessions) - (before is not None) >= SESSIONS_MAX:
                raise TooManyConsoles("too many consoles are open already; try again later")
            if before is not None:
                del self._sessions[before.uuid]
            self._sessions[session.uuid] = session
        if before is not None:
            before.end_from_outside(Close.TAKEN, f"{session.user_name} has taken the console")
        return session, tickets["person"], call

    def enter(self, key: str, side: Side, ticket: str) -> Session | None:
        """The session that a ticket opens on one side, and it never does again; None when it opens nothing."""
        with self._lock:
            self._forget_expired()
            session = self._sessions.get(key)
            digest = session.digests.get(side) if session is not None else None
            if session is None or digest is None or not console.opens(ticket, digest):
                return None
            if self._clock() > session.expires:
                return None
            del session.digests[side]
            return session

    def close(self, session: Session) -> None:
        """Nobody comes to it any more."""
        with self._lock:
            self._sessions.pop(session.uuid, None)

    def _holder(self, instance: UUID) -> Session | None:
        held = (one for one in self._sessions.values() if one.instance == instance and not one.log)
        return next(held, None)

    def _forget_expired(self) -> None:
        now = self._clock()
        for session in [one for one in self._sessions.values() if not one.ends and now > one.expires]:
            del self._sessions[session.uuid]


sessions = Sessions()
