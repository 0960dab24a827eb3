"""Hundreds of random operations on a whole cloud while its processes are killed at random.

    python -m tests.cloud.soak --minutes 30 --seed 7

The cloud is that of ``recvirt-cloud dev`` (its processes, SQLite, a folder for messages), with libvirt's test driver in
a libvirtd of its own, so that instances outlive the worker. What is asked for is chosen by Hypothesis's state machine
from the seed; a model says what must have become of it. Each round ends with everything compared (model, rows,
promises, domains, files) and deleted, and then with nothing left. When a kill falls is a matter of the clock: the same
seed asks for the same things, and the kills land a little elsewhere.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from recvirt.nestedcloud import dev
from recvirt.nestedcloud.client import api as client
from recvirt.nestedcloud.client.api import Api, ApiError, load_access
from recvirt.nestedcloud.model import MIB
from tests.cloud.faults import world
from tests.cloud.faults.libvirtd import Libvirtd, scratch, why_not

#: What a round asks for, and how many rounds a seed makes (the first one is Hypothesis's smallest).
STEPS, ROUNDS = 60, 3
_PARTS = ("api", "dispatcher", "consumer", "worker")
#: How the API refuses a schedule that would never fire.
_PAST = "all of it lies in the past"
#: An operation may be interrupted several times, and then wait for its lease.
_WAIT_SECONDS = 300.0
_NAMES = ("a", "b", "c", "d")
_SIZE = {"vcpus": 1, "vcpus_max": 2, "memory_bytes": 64 * MIB, "memory_max_bytes": 128 * MIB, "disk_bytes": 2 * MIB}
_STATES = {"on": 1, "suspended": 3, "off": 5}


@dataclass
class Tally:
    """What was done in a run."""

    operations: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    violations: list[str] = field(default_factory=list)

    def text(self) -> str:
        """For people."""

        def line(counts: Counter[str]) -> str:
            return f"{counts.total()} ({', '.join(f'{name} {count}' for name, count in sorted(counts.items()))})"

        return (
            f"rounds: {self.rounds}\noperations: {line(self.operations)}\nkills: {line(self.kills)}\n"
            f"refusals as they should be: {line(self.refusals)}\nviolated: {len(self.violations)}"
        )


class LoudApi(Api):
    """Tells at once what it could not do: Hypothesis tries a rule that failed again, and tells of the second time."""

    def __init__(self, access: client.Access, tell: Callable[[str], None]) -> None:
        super().__init__(access)
        self._tell = tell

    def call(self, method: str, path: str, body: Any = None, **more: Any) -> Any:
        """See :class:`Api`."""
        try:
            return super().call(method, path, body, **more)
        except ApiError as error:
            if error.kind != "operation-active" and not _came_late(error):
                self._tell(f"{method} {path}: {error.kind}: {error.message}")
            raise


def _came_late(error: ApiError) -> bool:
    """Whether a moment that was soon was over when the request arrived: the API had been killed meanwhile."""
    return error.kind == "invalid" and _PAST in error.message


class Stage:
    """The running cloud, and what hits it."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.libvirtd = Libvirtd(folder / "libvirt")
        self.libvirtd.start()
        self.place = dev.Place(folder / "cloud", port)
        if (pid := os.fork()) == 0:
            # Django takes its settings when it is set up, and they are changed below.
            dev.prepare(self.place)
            os._exit(0)
        os.waitpid(pid, 0)
        for path, before, after in (
            (self.place.worker, "test:///default", self.libvirtd.test_uri),
            (self.place.central, "lease_seconds = 15.0", "lease_seconds = 4.0"),
            # A worker that is killed or frozen for some seconds is not taken for lost.
            (self.place.central, "heartbeat_seconds = 1.0", "heartbeat_seconds = 10.0"),
        ):
            path.write_text(path.read_text().replace(before, after))
        dev.prepare(self.place)
        for name in ("images", "blocks", "spool"):
            (self.place.folder / name).mkdir(exist_ok=True)
        os.environ["RECVIRT_CLOUD_CLIENT"] = str(self.place.access)
        # The API takes its time to come back on a machine that is busy.
        client._TRIES = 8
        self.api = LoudApi(load_access(), self.violation)
        self.cloud = dev.Cloud(self.place)
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        # Processes end with the thread that started them (PR_SET_PDEATHSIG), so one that stays does.
        self._starter = ThreadPoolExecutor(max_workers=1)
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch_always)
        self.cloud.start_all()
        self.tally = Tally()
        self._watcher.start()

    def close(self) -> None:
        """End everything."""
        if self._timer is not None:
            self._timer.join()
        self._closing.set()
        self._watcher.join()
        self.cloud.stop()
        self._starter.shutdown()
        self.libvirtd.kill()

    def hit(self, parts: tuple[str, ...]) -> None:
        """Kill processes; what ended is started again, as systemd would."""
        with self._lock:
            for part in parts:
                self.cloud.processes[part].kill()
                self.cloud.processes[part].wait()
            self.tally.kills["+".join(parts)] += 1
            self._start_again()

    def _start_again(self) -> None:
        self._starter.submit(self.cloud.watch).result()

    def _watch_always(self) -> None:
        """Also while a request is sent again and again to what has ended."""
        while not self._closing.wait(1.0):
            with self._lock:
                self._start_again()

    def hit_soon(self, part: str, seconds: float) -> None:
        """While something else is asked for."""
        if self._timer is not None:
            self._timer.join()
        self._timer = threading.Timer(seconds, self.hit, [(part,)])
        self._timer.start()

    def freeze(self, part: str, seconds: float) -> None:
        """A process that is not heard of for a while, and goes on then, unless ``hit_soon`` kills it meanwhile."""
        process = self.cloud.processes[part]
        process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        process.send_signal(signal.SIGCONT)
        self.tally.kills[f"{part} frozen"] += 1

    def until(self, what: str, done: Callable[[], bool]) -> bool:
        """Wait for something; it is a violation when it does not come."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while not done():
            if time.monotonic() > deadline:
                self.violation(f"{what}: not after {_WAIT_SECONDS:.0f} s")
                return False
            time.sleep(0.1)
        return True

    def violation(self, text: str) -> None:
        """Something is not as it must be."""
        self.tally.violations.append(text)
        print(f"violated: {text}", flush=True)


@dataclass
class Thing:
    """What the model says of an instance or a volume. ``pending`` is the operation that has not been waited for, and
    what it makes true.
    """

    values: dict[str, Any]
    pending: tuple[str, Callable[[], object]] | None = None


class Soak(RuleBasedStateMachine):
    """The model."""

    stage: ClassVar[Stage]

    def __init__(self) -> None:
        super().__init__()
        self.instances: dict[str, Thing] = {}
        self.volumes: dict[str, Thing] = {}
        self.number = 0
        self.wait_for_worker()
        self._upload()

    def wait_for_worker(self) -> None:
        workers = partial(_rows, self.stage, "workers", below=False)
        self.stage.until("the worker is up", lambda: any(row["up"] for row in workers()))

    def _upload(self) -> None:
        body = {"name": "base", "format": "raw", "upload_bytes": MIB}
        self.stage.api.call("POST", self.stage.api.below("images"), body)
        self.stage.api.call("PUT", self.stage.api.below("images/base/content"), data=bytes(MIB), offset=0)
        self._wait(self._asked("image-import", "POST", "images/base/complete", {})["uuid"])

    # Asking and waiting.

    def _asked(self, kind: str, method: str, path: str, body: Any = None) -> dict[str, Any]:
        operation: dict[str, Any] = self.stage.api.call(method, self.stage.api.below(path), body)
        self.stage.tally.operations[kind] += 1
        return operation

    def _ask(self, thing: Thing, kind: str, method: str, path: str, body: Any, then: Callable[[], object]) -> None:
        """An operation on something that is not busy. What it makes true is so once it was waited for."""
        try:
            operation = self._asked(kind, method, path, body)
        except ApiError as error:
            self.stage.violation(f"{kind} {path} was refused: {error.message}; the model says {thing.values}")
            return
        thing.pending = operation["uuid"], then

    def _wait(self, operation: str) -> bool:
        path = self.stage.api.below(f"operations/{operation}")
        found: dict[str, Any] = {}

        def ended() -> bool:
            found.update(self.stage.api.call("GET", path))
            return found["finished"] is not None

        if not self.stage.until(f"operation {operation} ends", ended):
            return False
        if found["phase"] != "succeeded":
            self.stage.violation(f"{found['kind']} {operation} {found['phase']}: {found['fault']} {found['message']}")
            return False
        return True

    def _rest(self, *things: Thing) -> None:
        for thing in things:
            if thing.pending is not None:
                operation, then = thing.pending
                thing.pending = None
                if self._wait(operation):
                    then()

    def _pick(self, things: dict[str, Thing], pick: int, *states: str) -> tuple[str, Thing] | None:
        """One at rest, in one of the states; what is at rest already goes first."""
        for waited in (False, True):
            if waited:
                self._rest(*self.instances.values(), *self.volumes.values())
            found = [
                name for name, thing in sorted(things.items())
                if thing.pending is None and (not states or thing.values["state"] in states)
            ]  # fmt: skip
            if found:
                name = found[pick % len(found)]
                self._rest(*self._related(things[name]))
                return (name, things[name]) if name in things else None
        return None

    def _related(self, thing: Thing) -> list[Thing]:
        """What is held when something is done to it: an instance and its volumes."""
        owner = thing.values.get("instance")
        if owner is not None:
            return [self.instances[owner]]
        return list(self.volumes.values())

    def _simple(self, pick: int, kind: str, states: tuple[str, ...], after: str | None, body: Any = None) -> None:
        found = self._pick(self.instances, pick, *states)
        if found is not None:
            name, thing = found
            then = partial(thing.values.update, {"state": after} if after else {})
            self._ask(thing, kind, "POST", f"instances/{name}/{kind}", body or {}, then)

    # What people ask for.

    @rule(reserved=st.booleans())
    def launch(self, reserved: bool) -> None:
        free = [name for name in _NAMES if name not in self.instances]
        if not free:
            return
        body: dict[str, Any] = {"name": free[0], "image": "base", **_SIZE}
        if reserved:
            room = {"begins": "2026-01-01T00:00:00Z", "vcpus": 2, "memory_bytes": 128 * MIB, "disk_bytes": 2 * MIB}
            body["reservation"] = self.stage.api.call("POST", self.stage.api.below("reservations"), room)["uuid"]
        thing = Thing({"state": "new", "vcpus": 1, "vcpus_max": 2, "disk_bytes": 2 * MIB, "snapshots": {}})
        self.instances[free[0]] = thing
        self._ask(thing, "launch", "POST", "instances", body, lambda: thing.values.update(state="on"))

    @rule(pick=st.integers(0, 5))
    def start(self, pick: int) -> None:
        self._simple(pick, "start", ("off",), "on")

    @rule(pick=st.integers(0, 5))
    def stop(self, pick: int) -> None:
        self._simple(pick, "stop", ("on", "suspended"), "off", {"graceful_seconds": 1})

    @rule(pick=st.integers(0, 5))
    def reboot(self, pick: int) -> None:
        self._simple(pick, "reboot", ("on",), None)

    @rule(pick=st.integers(0, 5))
    def suspend(self, pick: int) -> None:
        self._simple(pick, "suspend", ("on",), "suspended")

    @rule(pick=st.integers(0, 5))
    def resume(self, pick: int) -> None:
        self._simple(pick, "resume", ("suspended",), "on")

    @rule(pick=st.integers(0, 5))
    def delete(self, pick: int) -> None:
        if (found := self._pick(self.instances, pick)) is None:
            return
        name, thing = found

        def gone() -> None:
            del self.instances[name]
            for volume in self.volumes.values():
                if volume.values["instance"] == name:
                    volume.values["instance"] = None

        self._ask(thing, "delete", "DELETE", f"instances/{name}", None, gone)
        self._rest(thing)

    @rule(pick=st.integers(0, 5), vcpus_max=st.integers(2, 4), more=st.integers(0, 1))
    def rescale(self, pick: int, vcpus_max: int, more: int) -> None:
        if (found := self._pick(self.instances, pick, "on", "off")) is None:
            return
        name, thing = found
        changes = {"vcpus_max": max(vcpus_max, thing.values["vcpus"]), "vcpus": thing.values["vcpus"]}
        changes["vcpus"] = min(changes["vcpus"] + more, changes["vcpus_max"])
        if thing.values["state"] == "off":
            changes["disk_bytes"] = thing.values["disk_bytes"] + more * MIB
        body = {**changes, "restart": True}
        self._ask(thing, "rescale", "POST", f"instances/{name}/rescale", body, lambda: thing.values.update(changes))

    @rule(pick=st.integers(0, 5), which=st.integers(0, 2))
    def snapshot(self, pick: int, which: int) -> None:
        if (found := self._pick(self.instances, pick, "on", "off")) is None:
            return
        name, thing = found
        kept, label = thing.values["snapshots"], f"s{which}"
        if any(volume.values["instance"] == name for volume in self.volumes.values()):
            return
        body = {"snapshot": label}
        if label not in kept:
            state = thing.values["state"]
            then: Callable[[], object] = partial(kept.update, {label: state})
            self._ask(thing, "snapshot", "POST", f"instances/{name}/snapshot", body, then)
        else:
            then = partial(kept.pop, label)
            self._ask(thing, "snapshot-remove", "POST", f"instances/{name}/snapshot-remove", body, then)

    @rule(pick=st.integers(0, 5))
    def revert(self, pick: int) -> None:
        if (found := self._pick(self.instances, pick, "on", "off")) is None:
            return
        name, thing = found
        if not thing.values["snapshots"] or any(it.values["instance"] == name for it in self.volumes.values()):
            return
        label, state = sorted(thing.values["snapshots"].items())[0]
        then = partial(thing.values.update, state=state)
        self._ask(thing, "revert", "POST", f"instances/{name}/revert", {"snapshot": label}, then)

    @rule(pick=st.integers(0, 5))
    def clone(self, pick: int) -> None:
        free = [name for name in _NAMES if name not in self.instances]
        if not free or (found := self._pick(self.instances, pick, "off")) is None:
            return
        name, thing = found
        copy = Thing({**thing.values, "state": "new", "snapshots": {}})
        self.instances[free[0]] = copy
        then = partial(copy.values.update, state="off")
        self._ask(copy, "clone", "POST", f"instances/{name}/clone", {"name": free[0]}, then)
        # The original is held as well.
        self._rest(copy)

    @rule(pick=st.integers(0, 5))
    def export(self, pick: int) -> None:
        if (found := self._pick(self.instances, pick, "off", "suspended")) is None:
            return
        name, thing = found
        self.number += 1
        image = f"export-{self.number}"
        self._ask(thing, "export", "POST", f"instances/{name}/export", {"image": image}, lambda: None)
        self._rest(thing)
        self._wait(self._asked("image-remove", "DELETE", f"images/{image}")["uuid"])

    @rule(kind=st.sampled_from(("raw", "qcow2")))
    def allocate(self, kind: str) -> None:
        free = [name for name in _NAMES if name not in self.volumes]
        if not free:
            return
        thing = Thing({"state": "new", "size_bytes": 16 * MIB, "instance": None, "snapshots": {}})
        self.volumes[free[0]] = thing
        body = {"name": free[0], "size_bytes": 16 * MIB, "format": kind}
        self._ask(thing, "volume-allocate", "POST", "volumes", body, lambda: thing.values.update(state="ready"))

    @rule(pick=st.integers(0, 5), to=st.integers(0, 5))
    def attach(self, pick: int, to: int) -> None:
        volume = self._pick(self.volumes, pick, "ready")
        owner = self._pick(self.instances, to, "on", "off", "suspended")
        if volume is None or owner is None or volume[1].values["instance"] is not None:
            return
        (name, thing), (owner_name, owner_thing) = volume, owner
        self._rest(thing, owner_thing)
        body = {"instance": owner_name}
        # The volume is the instance's from the request on.
        thing.values["instance"] = owner_name
        self._ask(thing, "attach", "POST", f"volumes/{name}/attach", body, lambda: None)

    @rule(pick=st.integers(0, 5))
    def detach(self, pick: int) -> None:
        volume = self._pick(self.volumes, pick, "ready")
        if volume is None or volume[1].values["instance"] is None:
            return
        name, thing = volume
        then = partial(thing.values.update, instance=None)
        self._ask(thing, "detach", "POST", f"volumes/{name}/detach", {}, then)
        self._rest(thing)

    @rule(pick=st.integers(0, 5))
    def resize(self, pick: int) -> None:
        if (volume := self._pick(self.volumes, pick, "ready")) is None:
            return
        name, thing = volume
        body = {"size_bytes": thing.values["size_bytes"] + MIB}
        self._ask(thing, "volume-resize", "POST", f"volumes/{name}/resize", body, lambda: thing.values.update(body))

    @rule(pick=st.integers(0, 5), back=st.booleans())
    def volume_snapshot(self, pick: int, back: bool) -> None:
        volume = self._pick(self.volumes, pick, "ready")
        if volume is None or volume[1].values["instance"] is not None:
            return
        name, thing = volume
        kept, body = thing.values["snapshots"], {"snapshot": "kept"}
        if "kept" not in kept:
            size = thing.values["size_bytes"]
            then: Callable[[], object] = partial(kept.update, kept=size)
            self._ask(thing, "volume-snapshot", "POST", f"volumes/{name}/snapshot", body, then)
        elif back:
            then = partial(thing.values.update, size_bytes=kept["kept"])
            self._ask(thing, "volume-revert", "POST", f"volumes/{name}/revert", body, then)
        else:
            then = kept.clear
            self._ask(thing, "volume-snapshot-remove", "POST", f"volumes/{name}/snapshot-remove", body, then)

    @rule(pick=st.integers(0, 5))
    def volume_remove(self, pick: int) -> None:
        volume = self._pick(self.volumes, pick, "ready")
        if volume is None or volume[1].values["instance"] is not None:
            return
        name, thing = volume
        self._ask(thing, "volume-remove", "DELETE", f"volumes/{name}", None, lambda: self.volumes.pop(name))
        self._rest(thing)

    @rule(pick=st.integers(0, 5), part=st.sampled_from(_PARTS))
    def schedule(self, pick: int, part: str) -> None:
        """A stop in two seconds, and a kill around that time: it is done once."""
        if (found := self._pick(self.instances, pick, "on")) is None:
            return
        name, thing = found
        self.number += 1
        label = f"stop-{self.number}"
        body = {"name": label, "kind": "stop", "instance": name, "args": {"graceful_seconds": 0},
                "begins": (datetime.now(UTC) + timedelta(seconds=2)).isoformat(), "grace_seconds": 3600}  # fmt: skip
        try:
            self.stage.api.call("POST", self.stage.api.below("schedules"), body)
        except ApiError as error:
            if not _came_late(error):
                raise
            self.stage.tally.refusals[_PAST] += 1
            return
        time.sleep(1.5)
        self.stage.hit((part,))
        path = f"schedules/{label}/firings"
        if not self.stage.until(f"the schedule {label} fires", lambda: bool(_rows(self.stage, path))):
            return
        firings = _rows(self.stage, path)
        if [item["outcome"] for item in firings] != ["asked"]:
            self.stage.violation(f"the schedule {label} fired so: {firings}")
            return
        self.stage.tally.operations["scheduled stop"] += 1
        thing.pending = firings[0]["operation"], lambda: thing.values.update(state="off")
        self._rest(thing)

    @rule(pick=st.integers(0, 5))
    def ask_a_busy_one(self, pick: int) -> None:
        """A second operation is refused and told which one is at work, unless that has ended by now."""
        names = [name for name, thing in sorted(self.instances.items()) if thing.pending is not None]
        if not names:
            return
        name = names[pick % len(names)]
        thing = self.instances[name]
        assert thing.pending is not None
        try:
            operation = self._asked("reboot", "POST", f"instances/{name}/reboot", {})
        except ApiError as error:
            if error.kind == "operation-active" and error.data.get("operation") != thing.pending[0]:
                self.stage.violation(f"{name} is said to be busy with {error.data}, not with {thing.pending[0]}")
            self.stage.tally.refusals[error.kind] += 1
        else:
            self._rest(thing)
            self._wait(operation["uuid"])

    # What happens to the cloud.

    @rule(parts=st.sets(st.sampled_from(_PARTS), min_size=1), delay=st.floats(0, 1.5))
    def kill(self, parts: set[str], delay: float) -> None:
        time.sleep(delay)
        self.stage.hit(tuple(sorted(parts)))

    @rule(part=st.sampled_from(_PARTS), delay=st.floats(0, 0.5))
    def kill_soon(self, part: str, delay: float) -> None:
        """While the next request is being made: its answer may be lost."""
        self.stage.hit_soon(part, delay)

    @rule(part=st.sampled_from(_PARTS), delay=st.floats(0, 0.3), again=st.booleans())
    def kill_at_once(self, part: str, delay: float, again: bool) -> None:
        """While the last request is being carried out."""
        time.sleep(delay)
        for _ in range(1 + again):
            self.stage.hit((part,))

    @rule(seconds=st.floats(1, 9))
    def cut_off(self, seconds: float) -> None:
        """A worker that is not heard of for longer than a lease, and then goes on."""
        if all(thing.pending is None for thing in self.instances.values()):
            return
        self.stage.freeze("worker", seconds)

    # At the end of a round.

    def teardown(self) -> None:
        self._rest(*self.instances.values(), *self.volumes.values())
        self.stage.tally.rounds += 1
        for text in self._faults():
            self.stage.violation(text)
        self._clear()
        for text in _left(self.stage):
            self.stage.violation(f"after all was deleted: {text}")

    def _faults(self) -> list[str]:
        found = list(world.loose_ends())
        rows = world.rows()
        for name, thing in self.instances.items():
            found += _compare_instance(name, thing.values, rows["instances"].get(name))
        for name, thing in self.volumes.items():
            found += _compare_volume(name, thing.values, rows["volumes"].get(name))
        for kind, things in (("instances", self.instances), ("volumes", self.volumes)):
            if surplus := sorted(set(rows[kind]) - set(things)):
                found.append(f"{kind} that the model does not know: {surplus}")
        if rows["reservations"]:
            found.append(f"{rows['reservations']} reservations are left")
        return found + _surplus(self.stage)

    def _clear(self) -> None:
        for kind in ("instances", "volumes", "images"):
            for row in _rows(self.stage, kind):
                if not row.get("public"):
                    self._wait(self._asked("delete", "DELETE", f"{kind}/{row['name']}")["uuid"])
        for row in _rows(self.stage, "schedules"):
            self.stage.api.call("DELETE", self.stage.api.below(f"schedules/{row['name']}"))


def _rows(stage: Stage, path: str, *, below: bool = True) -> list[dict[str, Any]]:
    return list(stage.api.pages(stage.api.below(path) if below else path))


def _compare_instance(name: str, wanted: dict[str, Any], row: list[Any] | None) -> list[str]:
    if row is None:
        return [f"the instance {name} is not there, the model says {wanted}"]
    state, _, vcpus, vcpus_max, _, memory_max, disk, *promised, snapshots = row
    found = {"state": state, "vcpus": vcpus, "vcpus_max": vcpus_max, "disk_bytes": disk, "snapshots": snapshots}
    expected = {**wanted, "snapshots": sorted(wanted["snapshots"])}
    texts = [] if found == expected else [f"the instance {name} is {found}, the model says {expected}"]
    if promised != [vcpus_max, memory_max, disk]:
        texts.append(f"the instance {name} is promised {promised}")
    return texts


def _compare_volume(name: str, wanted: dict[str, Any], row: list[Any] | None) -> list[str]:
    if row is None:
        return [f"the volume {name} is not there, the model says {wanted}"]
    state, size, promised, instance, _, snapshots = row
    found = {"state": state, "size_bytes": size, "instance": instance, "snapshots": sorted(snapshots)}
    expected = {**wanted, "snapshots": sorted(wanted["snapshots"])}
    texts = [] if found == expected else [f"the volume {name} is {found}, the model says {expected}"]
    if promised != size + sum(snapshots.values()):
        texts.append(f"the volume {name} is promised {promised}")
    return texts


def _there(stage: Stage) -> tuple[dict[str, Any], dict[str, int]]:
    import libvirt

    known = {str(key): str(key) for key in world.names()}
    folders = [stage.place.folder / name for name in ("images", "blocks", "spool")]
    connection = libvirt.open(stage.libvirtd.test_uri)
    try:
        return world.domains(connection, known), world.files(folders, known)
    finally:
        connection.close()


def _surplus(stage: Stage) -> list[str]:
    """Domains and files against rows: what is missing, what nobody knows."""
    from recvirt.nestedcloud.central.models import Image, Instance, Volume

    domains, files = _there(stage)
    expected: Counter[str] = Counter()
    wanted: dict[str, list[Any]] = {}
    for row in Instance.objects.exclude(state="deleted"):
        expected.update([f"blocks/{row.pk}.qcow2", f"blocks/{row.pk}-seed.img"])
        wanted[str(row.pk)] = [_STATES.get(row.state), row.vcpus, sorted(row.snapshots)]
    for volume in Volume.objects.exclude(state="deleted"):
        expected.update([f"blocks/{volume.pk}.{volume.format}", f"blocks/{volume.pk}.json"])
        # Beside libvirt's test driver each one is a file of its own.
        expected.update(f"blocks/{volume.pk}-SNAPSHOT" for _ in volume.snapshots)
    for image in Image.objects.exclude(state="deleted").exclude(project=None):
        expected.update([f"images/{image.pk}.qcow2", f"images/{image.pk}.json"])
    found = [f"the file {name} is missing" for name in sorted(set(expected) - set(files))]
    found += [f"the file {name} is nobody's" for name in sorted(set(files) - set(expected))]
    seen = {key: [value[0], value[2], value[5]] for key, value in domains.items()}
    return found + ([] if seen == wanted else [f"the domains are {seen}, the rows say {wanted}"])


def _left(stage: Stage) -> list[str]:
    domains, files = _there(stage)
    rows = world.rows()
    ends = world.loose_ends()
    left = [rows["instances"], rows["volumes"], rows["images"], rows["reservations"], domains, files, ends]
    return [str(item) for item in left if item]


def soak(minutes: float, first_seed: int, folder: Path, port: int = 8791) -> Tally:
    """Round after round until the time is up."""
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"
    stage = Soak.stage = Stage(folder, port)
    deadline = time.monotonic() + minutes * 60
    bounds = settings(
        max_examples=ROUNDS, stateful_step_count=STEPS, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    try:
        number = first_seed
        while time.monotonic() < deadline and not stage.tally.violations:
            print(f"seed {number}", flush=True)
            try:
                run_state_machine_as_test(seed(number)(Soak), settings=bounds)
            except Exception as error:
                if not stage.tally.violations:
                    stage.violation(f"seed {number}: {type(error).__name__}: {error}")
            number += 1
        return stage.tally
    finally:
        stage.close()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.cloud.soak")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None, help="of the first round; by default the time")
    parser.add_argument("--keep", action="store_true", help="keep the folder with all logs")
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    folder = scratch("recvirt-soak-")
    number = options.seed if options.seed is not None else int(time.time())
    try:
        tally = soak(options.minutes, number, folder)
    finally:
        if options.keep:
            print(f"everything is in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"seed: {number}\n{tally.text()}")
    sys.exit(bool(tally.violations))


if __name__ == "__main__":
    main()
