"""What was deleted, remembered for a while: a message that comes late must not bring it back.

A broker may deliver a message twice, and the second one after the thing it made is gone again. Nothing of the thing is
left then that would say so.
"""

from __future__ import annotations

import time
from pathlib import Path

from recvirt.nestedcloud.model import Fault, check_uuid
from recvirt.nestedcloud.worker.errors import ActionError
from recvirt.nestedcloud.worker.storage import whole_file

#: Much longer than a message lives (``recvirt.nestedcloud.queue``).
KEPT_SECONDS = 7 * 86400.0


class Graves:
    """A folder with a file for each thing that was deleted; in it the generation that it was deleted as."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def dig(self, uuid: str, generation: int) -> None:
        """Remember one, and forget old ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / check_uuid(uuid)) as part:
            part.write_text(str(generation))
        now = time.time()
        for path in self.folder.iterdir():
            try:
                if now - path.stat().st_mtime > KEPT_SECONDS:
                    path.unlink()
            except FileNotFoundError:
                # Another process forgets as well.
                pass

    def check(self, uuid: str, generation: int) -> None:
        """ActionError when it was deleted by a request that is not older than ``generation``."""
        try:
            buried = int((self.folder / check_uuid(uuid)).read_text())
        except FileNotFoundError:
            return
        if buried >= generation:
            raise ActionError(Fault.CONFLICT, f"{uuid} has been deleted since this was asked for")
