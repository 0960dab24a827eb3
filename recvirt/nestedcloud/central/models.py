"""All tables, under the name where Django looks for them: things (``things``), what happens (``records``), and workers
on other machines (``peer_tables``).
"""

from __future__ import annotations

from recvirt.nestedcloud.central.peer_tables import Invitation, Peer
from recvirt.nestedcloud.central.records import Event, Firing, Operation, Outcome, Pulse, Reservation, Schedule
from recvirt.nestedcloud.central.things import (
    ACTIVE_PHASES,
    ApiToken,
    DiskFormat,
    Filesystem,
    Forward,
    ForwardProtocol,
    ForwardState,
    Image,
    ImageState,
    Instance,
    InstanceState,
    Membership,
    Network,
    NetworkKind,
    Nic,
    Project,
    Role,
    Row,
    Volume,
    VolumeState,
    Worker,
    name_validator,
)

__all__ = [
    "ACTIVE_PHASES",
    "ApiToken",
    "DiskFormat",
    "Event",
    "Filesystem",
    "Firing",
    "Forward",
    "ForwardProtocol",
    "ForwardState",
    "Image",
    "ImageState",
    "Instance",
    "InstanceState",
    "Invitation",
    "Membership",
    "Network",
    "NetworkKind",
    "Nic",
    "Operation",
    "Outcome",
    "Peer",
    "Project",
    "Pulse",
    "Reservation",
    "Role",
    "Row",
    "Schedule",
    "Volume",
    "VolumeState",
    "Worker",
    "name_validator",
]
