"""Each kind of operation, and what has to be there before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from recvirt.nestedcloud.model import MIB
from tests.cloud.faults.bench import THE_FORWARD, Bench, Request

_WEB: dict[str, Any] = {
    "name": "web", "image": "base", "vcpus": 1, "vcpus_max": 2, "memory_bytes": 64 * MIB, "memory_max_bytes": 128 * MIB,
    "disk_bytes": 2 * MIB,
}  # fmt: skip


def _to(path: str, **body: Any) -> Request:
    return Request("POST", path, body)


LAUNCH = _to("instances", **_WEB)
STOP = _to("instances/web/stop", graceful_seconds=0)
SNAPSHOT = _to("instances/web/snapshot", snapshot="before")
ALLOCATE = _to("volumes", name="data", size_bytes=16 * MIB)
ATTACH = _to("volumes/data/attach", instance="web")
KEEP = _to("volumes/data/snapshot", snapshot="kept")
FORWARD = _to("forwards", instance="web", host_port=8080, guest_port=80)
EXPORT = _to("instances/web/export", image="golden")
#: Things that are there before an operation, each made from another one by a request.
STATES: Mapping[str, tuple[str | None, tuple[Request, ...]]] = {
    "empty": (None, ()),
    "on": ("empty", (LAUNCH,)),
    "off": ("on", (STOP,)),
    "suspended": ("on", (_to("instances/web/suspend"),)),
    "snapshot": ("on", (SNAPSHOT,)),
    "volume": ("on", (ALLOCATE,)),
    "attached": ("volume", (ATTACH,)),
    "volume-snapshot": ("volume", (KEEP,)),
    "forwarded": ("on", (FORWARD,)),
    "exported": ("off", (EXPORT,)),
    "reservation": (
        "empty",
        (_to("reservations", begins="2026-01-01T00:00:00Z", vcpus=2, memory_bytes=128 * MIB, disk_bytes=2 * MIB),),
    ),
}


@dataclass(frozen=True)
class Scenario:
    """An operation from a state. ``requests`` are what the client sends; the last one makes the operation."""

    name: str
    state: str
    requests: tuple[Request, ...]


SCENARIOS = tuple(
    Scenario(name, state, requests if isinstance(requests, tuple) else (requests,))
    for name, state, requests in (
        ("launch", "empty", LAUNCH),
        ("start", "off", _to("instances/web/start")),
        ("stop", "on", STOP),
        ("reboot", "on", _to("instances/web/reboot")),
        ("suspend", "on", _to("instances/web/suspend")),
        ("resume", "suspended", _to("instances/web/resume")),
        ("rescale-live", "on", _to("instances/web/rescale", vcpus=2, memory_bytes=96 * MIB)),
        ("rescale-restart", "on", _to("instances/web/rescale", vcpus_max=4, disk_bytes=3 * MIB, restart=True)),
        ("rescale-off", "off", _to("instances/web/rescale", vcpus_max=4, disk_bytes=3 * MIB)),
        ("snapshot", "on", SNAPSHOT),
        ("revert", "snapshot", _to("instances/web/revert", snapshot="before")),
        ("snapshot-remove", "snapshot", _to("instances/web/snapshot-remove", snapshot="before")),
        ("clone", "off", _to("instances/web/clone", name="twin")),
        ("export", "off", EXPORT),
        ("delete", "snapshot", Request("DELETE", "instances/web")),
        ("forward-add", "on", FORWARD),
        ("forward-remove", "forwarded", Request("DELETE", f"forwards/{THE_FORWARD}")),
        ("delete-forwarded", "forwarded", Request("DELETE", "instances/web")),
        ("delete-attached", "attached", Request("DELETE", "instances/web")),
        ("volume-allocate", "on", ALLOCATE),
        ("volume-resize", "volume", _to("volumes/data/resize", size_bytes=24 * MIB)),
        ("volume-snapshot", "volume", KEEP),
        ("volume-revert", "volume-snapshot", _to("volumes/data/revert", snapshot="kept")),
        ("volume-snapshot-remove", "volume-snapshot", _to("volumes/data/snapshot-remove", snapshot="kept")),
        ("volume-remove", "volume-snapshot", Request("DELETE", "volumes/data")),
        ("attach", "volume", ATTACH),
        ("detach", "attached", Request("POST", "volumes/data/detach", {})),
        ("image-remove", "exported", Request("DELETE", "images/golden")),
        (
            "image-import",
            "empty",
            (
                _to("images", name="up", format="raw", upload_bytes=MIB),
                Request("PUT", "images/up/content?offset=0", data=bytes(MIB)),
                _to("images/up/complete"),
            ),
        ),
    )
)


def scheduled(seconds: float) -> Request:
    """A stop that is due so many seconds from now."""
    begins = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
    return _to("schedules", name="nightly", kind="stop", instance="web", begins=begins)


def make_state(bench: Bench, name: str) -> None:
    """Make a state and those that it starts from, unless they were made, and remember them."""
    if bench.has(name):
        return
    origin, requests = STATES[name]
    if origin is None:
        requests = tuple(bench.upload("base"))
    else:
        make_state(bench, origin)
        bench.load(origin)
    bench.step(bench.beat)
    for number, request in enumerate(requests):
        status, answer = bench.step(bench.ask, request, f"made-{name}-{number}").result
        if status >= 300:
            raise RuntimeError(f"{request.method} {request.path}: {status} {answer}")
    bench.step(bench.settle)
    if ends := bench.step(bench.world).result["loose ends"]:
        raise RuntimeError(f"state {name}: {ends}")
    bench.save(name)
