"""The exit statuses of ``recvirt-cloud``, one a class of error; recvirt-cloud(1) lists them."""

from __future__ import annotations

import enum


class ExitStatus(enum.IntEnum):
    """What a script can tell apart."""

    DONE = 0
    #: An error without a status of its own; ``status`` has found something wrong.
    ERROR = 1
    USAGE = 2
    #: The cloud said no, or an operation failed.
    REFUSED = 3
    UNREACHABLE = 4
    #: A configuration or this machine's set-up.
    CONFIG = 5
    #: Longer than ``--timeout``; the operation goes on.
    TIMED_OUT = 6
    #: The database could not be brought to this version, and is as it was.
    UPGRADE = 7
    INTERRUPTED = 130
    #: Whoever read the output went away.
    OUTPUT_CLOSED = 141
