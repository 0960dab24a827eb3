"""Carries out one command after another, each instance by one hand at a time, and tells what became of it.

Owns the guard against the same message twice, and the translation of every failure into a report. Does not own how
commands come and reports go (``tasks``).
"""

from __future__ import annotations

import fcntl
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recvirt.nestedcloud.model import Command, Fault, Heartbeat, ModelError, Phase, Report, check_uuid
from recvirt.nestedcloud.worker.actions import ACTIONS
from recvirt.nestedcloud.worker.errors import ActionError
from recvirt.nestedcloud.worker.hypervisor import Hypervisor
from recvirt.nestedcloud.worker.site import Site
from recvirt.nestedcloud.worker.storage import Storage, storage_error

log = logging.getLogger(__name__)


class BusyError(Exception):
    """Another process works on the same thing. The message is given back, to come again."""


def _targets(command: Command) -> list[str]:
    """What a command works on, in one order for all. ModelError when one is no UUID: they become file names."""
    things = (command.instance, command.network, command.volume, command.image)
    found = {thing.uuid for thing in things if thing is not None}
    if "source" in command.args:
        found.add(str(command.args["source"]))
    return sorted(check_uuid(target) for target in found or {command.operation})


@dataclass(frozen=True)
class Agent:
    """One worker."""

    uuid: str
    name: str
    hypervisor: Hypervisor
    storage: Storage
    run_dir: Path
    boot_id: str
    features: dict[str, Any]

    def execute(self, command: Command, send: Callable[[Report], None]) -> Report:
        """Do it and return the last report, which is sent as well. BusyError when somebody else is at it."""

        def report(phase: Phase, **more: Any) -> Report:
            made = Report(command.operation, command.attempt, self.uuid, phase, **more)
            send(made)
            return made

        def progress(percent: int, text: str) -> None:
            report(Phase.RUNNING, progress=percent, message=text)

        try:
            targets = _targets(command)
        except ModelError as error:
            return report(Phase.FAILED, fault=Fault.INVALID, message=str(error))
        with self._alone(targets):
            report(Phase.RUNNING)
            site = Site(
                self.hypervisor,
                self.storage,
                progress,
            )
            try:
                action = ACTIONS.get(command.kind)
                if action is None:
                    raise ActionError(Fault.NOT_SUPPORTED, f"this worker knows no {command.kind}")
                facts = action(site, command)
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

    @contextmanager
    def _alone(self, targets: list[str]) -> Iterator[None]:
        """Hold the locks of what the command works on. The kernel lets go of them when the process dies."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            for target in targets:
                stream = stack.enter_context((self.run_dir / f"{target}.lock").open("w"))
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise BusyError(target) from None
            yield

    def heartbeat(self) -> Heartbeat:
        """What there is on this host now."""
        vcpus, memory_bytes = self.hypervisor.capacity()
        return Heartbeat(
            self.uuid, self.name, self.boot_id, vcpus, memory_bytes,
            shutil.disk_usage(self.hypervisor.host.blocks_dir).total, self.features, self.hypervisor.all_facts(),
        )  # fmt: skip
