"""What the cloud's tests start from."""

from __future__ import annotations

import uuid
from typing import Any

from recvirt.nestedcloud.model import GIB, MIB, DiskSpec, InstanceSpec


def instance(**changes: Any) -> InstanceSpec:
    """A small instance."""
    key = changes.pop("uuid", str(uuid.uuid4()))
    values: dict[str, Any] = {
        "uuid": key, "name": "web", "generation": 1, "vcpus": 1, "vcpus_max": 4, "memory_bytes": 512 * MIB,
        "memory_max_bytes": GIB, "root": DiskSpec(key, GIB, image=str(uuid.uuid4())),
    }  # fmt: skip
    return InstanceSpec(**{**values, **changes})
