"""What a worker wants forwarded, as a file an instance for the root service that makes the rules (``portmap``).

The worker is not root. It writes whole files, waits for what the service says of them, and takes nothing for done that
was not said to be.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from recvirt.nestedcloud.addresses import AppliedForwards, AppliedState, WantedForwards
from recvirt.nestedcloud.model import Fault, InstanceSpec, ModelError, check_uuid, decode, encode
from recvirt.nestedcloud.worker.errors import ActionError
from recvirt.nestedcloud.worker.storage import whole_file

#: How long the service may take (Python starts slowly under emulation), and after how long it is woken up again.
WAIT_SECONDS = 60.0
_AGAIN_SECONDS = 5.0
_POLL_SECONDS = 0.1
_SILENT = "the service that forwards ports did not answer: systemctl status recvirt-cloud-forwards.service"


class Forwarding:
    """``folder`` is where wishes are written, or None where nothing can be forwarded; ``applied`` is the answer."""

    def __init__(self, folder: Path | None, applied: Path, wait_seconds: float = WAIT_SECONDS) -> None:
        self._folder = folder
        self._applied = applied
        self._wait_seconds = wait_seconds

    def ensure(self, spec: InstanceSpec, operation: str) -> str | None:
        """Have an instance's forwards; why not, or nothing when they are in effect. None: none are or were wanted.

        ActionError when a newer state of the instance was asked for before.
        """
        if self._folder is None:
            return "this worker forwards no ports" if spec.forwards else None
        path = self._path(self._folder, spec.uuid)
        before = self._read(path)
        if before is None and not spec.forwards:
            return None
        if before is not None and before.generation > spec.generation:
            raise ActionError(Fault.CONFLICT, f"{spec.name} has been changed since this was asked for")
        text = json.dumps(encode(WantedForwards(spec.uuid, spec.generation, operation, spec.forwards)))
        digest = hashlib.sha256(text.encode()).hexdigest()
        deadline = time.monotonic() + self._wait_seconds
        while True:
            self._write(path, text)
            again = min(deadline, time.monotonic() + _AGAIN_SECONDS)
            while (answer := self._answer(spec.uuid)) is None or answer.sha256 != digest:
                if time.monotonic() >= again:
                    break
                time.sleep(_POLL_SECONDS)
            else:
                return answer.refused
            if time.monotonic() >= deadline:
                return _SILENT

    def drop(self, instance: str) -> None:
        """Have none for an instance that goes. ActionError unless they are surely gone: its address may soon be
        another one's.
        """
        if self._folder is None:
            return
        path = self._path(self._folder, instance)
        if not path.exists() and self._answer(instance) is None:
            return
        deadline = time.monotonic() + self._wait_seconds
        path.unlink(missing_ok=True)
        woken = time.monotonic()
        while self._answer(instance) is not None:
            if time.monotonic() >= deadline:
                raise ActionError(Fault.TIMED_OUT, _SILENT)
            if time.monotonic() >= woken + _AGAIN_SECONDS:
                # Whatever changes in the folder wakes it up.
                woken = time.monotonic()
                self._write(path.with_suffix(".wake"), "")
            time.sleep(_POLL_SECONDS)
        path.with_suffix(".wake").unlink(missing_ok=True)

    @staticmethod
    def _path(folder: Path, instance: str) -> Path:
        return folder / f"{check_uuid(instance)}.json"

    @staticmethod
    def _read(path: Path) -> WantedForwards | None:
        try:
            return decode(WantedForwards, json.loads(path.read_text()))
        except (FileNotFoundError, ValueError):
            # One that can't be read is written anew.
            return None

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            part.write_text(text)

    def _answer(self, instance: str) -> AppliedForwards | None:
        try:
            return decode(AppliedState, json.loads(self._applied.read_text())).of(instance)
        except FileNotFoundError:
            return None
        except (ModelError, ValueError) as error:
            raise ActionError(Fault.INTERNAL, f"{self._applied}: {error}") from None
