"""Which folders a worker has, so that the central node knows who shares them: an identifier in a file in each.

Looked at with every heartbeat: what is mounted may change while the worker runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from recvirt.nestedcloud import spool
from recvirt.nestedcloud.codec import ModelError
from recvirt.nestedcloud.worker.host import Host

log = logging.getLogger(__name__)
#: Between two looks for a folder of uploads that is not there: each may have the system try to mount it.
_AGAIN_SECONDS = 60.0


@dataclass
class Places:
    """What was found so far."""

    now: Callable[[], float] = time.monotonic
    _next_look: float = field(default=float("-inf"))

    def identities(self, host: Host) -> dict[str, str]:
        """``pool`` is the folder of root disks and volumes, ``spool`` that of uploads, if there is one.

        OSError when the pool can't be used: without disks a worker is none. Without uploads it is.
        """
        found = {"pool": spool.identity(host.blocks_dir)}
        if host.spool_dir is None or self.now() < self._next_look:
            return found
        try:
            found["spool"] = spool.identity(host.spool_dir)
        except (OSError, ModelError) as error:
            log.warning("uploads can't be read here: %s", error)
            self._next_look = self.now() + _AGAIN_SECONDS
        return found
