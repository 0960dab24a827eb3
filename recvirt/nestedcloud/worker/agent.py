"""Carries out one command after another, each instance by one hand at a time, and tells what became of it.

Owns the guard against the same message twice, and the translation of every failure into a report. Does not own how
commands come and reports go (``service``).
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recvirt.nestedcloud.model import Command, Fault, Heartbeat, Kind, ModelError, Phase, Report, check_uuid
from recvirt.nestedcloud.worker.actions import ACTIONS
from recvirt.nestedcloud.worker.errors import ActionError, UnreachableError
from recvirt.nestedcloud.worker.graves import Graves
from recvirt.nestedcloud.worker.hypervisor import Hypervisor, in_our_words
from recvirt.nestedcloud.worker.locks import BusyError, alone
from recvirt.nestedcloud.worker.places import Places
from recvirt.nestedcloud.worker.site import Facts, Site
from recvirt.nestedcloud.worker.storage import Storage, storage_error, sweep

__all__ = ["Agent", "BusyError"]

log = logging.getLogger(__name__)

#: Between two looks whether who is away is back.
_PAUSE_SECONDS = 1.0
#: An image has no generation: once it is deleted, nothing brings it back.
_FOR_EVER = 2**62


def _targets(command: Command) -> list[str]:
    """What a command works on, in one order for all. ModelError when one is no UUID: they become file names."""
    things = (command.instance, command.network, command.volume, command.image)
    found = {thing.uuid for thing in things if thing is not None}
    if "source" in command.args:
        found.add(str(command.args["source"]))
    return sorted(check_uuid(target) for target in found or {command.operation})


def _generations(command: Command) -> dict[Kind, tuple[str, int]]:
    """What can be deleted, by the kind that deletes it: which one, and as of which generation it is asked for."""
    found = {}
    if command.instance is not None:
        found[Kind.DELETE] = command.instance.uuid, command.instance.generation
    if command.volume is not None:
        found[Kind.VOLUME_REMOVE] = command.volume.uuid, command.volume.generation
    if command.image is not None:
        found[Kind.IMAGE_REMOVE] = command.image.uuid, _FOR_EVER
    return found


@dataclass(frozen=True)
class Agent:
    """One worker. ``patience_seconds`` is how long it waits for libvirtd, or for the broker to take a result."""

    uuid: str
    name: str
    hypervisor: Hypervisor
    storage: Storage
    run_dir: Path
    boot_id: str
    features: dict[str, Any]
    patience_seconds: float = 0.0
    places: Places = field(default_factory=Places)

    def execute(self, command: Command, send: Callable[[Report], None]) -> Report:
        """Do it and return the last report, which is sent as well. BusyError when somebody else is at it."""

        def report(phase: Phase, **more: Any) -> Report:
            made = Report(command.operation, command.attempt, self.uuid, phase, **more)
            self._send(made, send)
            return made

        def progress(percent: int, text: str) -> None:
            report(Phase.RUNNING, progress=percent, message=text)

        try:
            targets = _targets(command)
        except ModelError as error:
            return report(Phase.FAILED, fault=Fault.INVALID, message=str(error))
        with alone(self.run_dir, targets):
            report(Phase.RUNNING)
            try:
                for target in targets:
                    sweep(self.storage.host, target)
                facts = self._act(Site(self.hypervisor, self.storage, progress), command)
            except ActionError as error:
                return report(Phase.FAILED, fault=error.fault, message=error.message, facts=error.facts)
            except ModelError as error:
                return report(Phase.FAILED, fault=Fault.INVALID, message=str(error))
            except OSError as error:
                known = storage_error(error)
                return report(Phase.FAILED, fault=known.fault, message=known.message)
            except Exception as error:
                # Whatever it was, the operation must not be left hanging; the log has the traceback.
                log.exception("operation %s failed", command.operation)
                return report(Phase.FAILED, fault=Fault.INTERNAL, message=f"{type(error).__name__}: {error}")
            return report(Phase.SUCCEEDED, progress=100, facts=facts)

    def _act(self, site: Site, command: Command) -> Facts:
        """Carry it out, from its start again while libvirtd is away: actions do only what is missing."""
        action = ACTIONS.get(command.kind)
        if action is None:
            raise ActionError(Fault.NOT_SUPPORTED, f"this worker knows no {command.kind}")
        graves, things = Graves(self.storage.host.graves_dir), _generations(command)
        for kind, (uuid, generation) in things.items():
            if kind is not command.kind:
                graves.check(uuid, generation)
        deadline = time.monotonic() + self.patience_seconds
        while True:
            try:
                with in_our_words():
                    facts = action(site, command)
                break
            except UnreachableError as error:
                if time.monotonic() >= deadline:
                    raise
                site.progress(0, f"waiting: {error.message}")
                time.sleep(_PAUSE_SECONDS)
        if command.kind in things:
            graves.dig(*things[command.kind])
        return facts

    def _send(self, report: Report, send: Callable[[Report], None]) -> None:
        """Progress is told if it can be; a result is tried for a while. Should it be lost, the lease runs out, and the
        next attempt finds the work done.
        """
        deadline = time.monotonic() + self.patience_seconds
        while True:
            try:
                return send(report)
            except Exception as error:
                # Each transport has errors of its own.
                if not report.phase.is_final:
                    log.warning("operation %s: progress is not told: %s", report.operation, type(error).__name__)
                    return None
                if time.monotonic() >= deadline:
                    raise
            time.sleep(_PAUSE_SECONDS)

    def heartbeat(self) -> Heartbeat:
        """What there is on this host now."""
        vcpus, memory_bytes = self.hypervisor.capacity()
        return Heartbeat(
            self.uuid, self.name, self.boot_id, vcpus, memory_bytes,
            shutil.disk_usage(self.hypervisor.host.blocks_dir).total,
            {**self.features, **self.places.identities(self.hypervisor.host)}, self.hypervisor.all_facts(),
            self.hypervisor.seen_addresses(),
        )  # fmt: skip
