"""Where a worker's actions work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from recvirt.nestedcloud.model import Command
from recvirt.nestedcloud.worker.forwarding import Forwarding
from recvirt.nestedcloud.worker.hypervisor import Hypervisor
from recvirt.nestedcloud.worker.images import Images, make_images
from recvirt.nestedcloud.worker.storage import Storage
from recvirt.nestedcloud.worker.volumes import Volumes, make_volumes


@dataclass(frozen=True)
class Site:
    """The hypervisor, the files, and whom to tell of progress (per cent, sentence)."""

    hypervisor: Hypervisor
    storage: Storage
    progress: Callable[[int, str], None] = field(default=lambda _percent, _text: None)

    @property
    def volumes(self) -> Volumes:
        """The files of volumes."""
        return make_volumes(self.storage.host)

    @property
    def images(self) -> Images:
        """The files of the catalogue."""
        return make_images(self.storage.host)

    @property
    def forwarding(self) -> Forwarding:
        """The ports that lead to instances."""
        host = self.storage.host
        return Forwarding(host.forwards_dir, host.forwards_applied)


Facts = dict[str, Any]
Action = Callable[[Site, Command], Facts]
