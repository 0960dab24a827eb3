"""A booted guest as the checks see it: commands over SSH, by testinfra, with a limit for each."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import testinfra  # type: ignore[import-untyped]

from recvirt.accept.context import Acceptance
from recvirt.accept.results import Failed
from recvirt.errors import CommandError, GuestError
from recvirt.qemu import CloudConfig, SshAccess, Vm
from recvirt.qemu.ssh import CONNECT_SECONDS, HOST

_COMMAND_SECONDS = 60.0
#: Status of timeout(1) when time is up, and of a shell for a killed child.
_TIMED_OUT = (124, 137)
#: What systemctl says to whoever asks again.
_REBOOTING = "reboot already in progress"


@dataclass(frozen=True)
class Said:
    """What a command in the guest left."""

    command: str
    status: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[str]:
        """Lines of stdout that are not empty."""
        return [line for line in self.stdout.splitlines() if line.strip()]


@dataclass
class Guest:
    """One guest. ``vm`` is the QEMU that runs it, or None for a guest inside a guest."""

    acceptance: Acceptance
    name: str
    access: SshAccess
    vm: Vm | None
    cloud: CloudConfig
    overlay: Path | None = None
    boot_seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    _host: Any = None

    @property
    def host(self) -> Any:
        """testinfra's view of the guest, for checks that want its nouns (``host.user("x").groups``)."""
        if self._host is None:
            self._host = testinfra.get_host(
                f"ssh://{HOST}", ssh_config=str(self.access.config_path), timeout=CONNECT_SECONDS, controlpersist=0
            )
        return self._host

    def run(self, command: str, *, root: bool = True, seconds: float = _COMMAND_SECONDS) -> Said:
        """Run a shell command, as root unless told otherwise. ``seconds`` are scaled to this machine.

        GuestError when the guest can't be reached or the time is up.
        """
        limit = self.acceptance.patience(seconds)
        words = f"timeout -k 5 {limit:.0f} sh -c {shlex.quote(command)}"
        done = self._over_ssh(("sudo -n " if root else "") + words)
        if done.rc in _TIMED_OUT:
            raise self._error(f"no end after {limit:.0f} s in the guest: {command}")
        return Said(command, int(done.rc), str(done.stdout), str(done.stderr))

    def _over_ssh(self, command: str) -> Any:
        """Run a command; a connection that broke is made anew once, as long as the machine runs."""
        for attempt in (1, 2):
            try:
                return self.host.run(command)
            except RuntimeError as error:
                self.access.close_shared()
                if attempt == 2 or (self.vm is not None and self.vm.process.poll() is not None):
                    raise self._error(f"SSH to the guest failed in: {command}\n  {_ssh_words(error)}") from None
        raise AssertionError("unreachable")

    def out(self, command: str, *, root: bool = True, seconds: float = _COMMAND_SECONDS) -> str:
        """The stdout of a command that must succeed, without the last newline. Failed when it does not."""
        said = self.run(command, root=root, seconds=seconds)
        if said.status != 0:
            words = (said.stderr or said.stdout).strip()[-600:]
            raise Failed(f"in the guest, {command!r} ended with status {said.status}: {words}")
        return said.stdout.rstrip("\n")

    def json(self, command: str, *, root: bool = True, seconds: float = _COMMAND_SECONDS) -> Any:
        """The stdout of a command as JSON."""
        text = self.out(command, root=root, seconds=seconds)
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise Failed(f"{command!r} did not print JSON: {text[:200]!r}") from None

    def has(self, program: str) -> bool:
        """Whether the guest has a program on root's PATH."""
        return self.run(f"command -v {shlex.quote(program)}").status == 0

    def copy_in(self, data: bytes, path: str) -> None:
        """Write a file of the test user."""
        import base64

        text = base64.b64encode(data).decode()
        command = f"base64 -d > {shlex.quote(path)}"
        self.access.run(command, input_text=text, seconds=self.acceptance.patience(120))

    def wait_settled(self) -> str:
        """Wait until systemd has finished booting; ``running``, ``degraded`` or another word of systemctl(1)."""
        seconds = float(self.acceptance.profile.accept.boot_seconds)
        return self.run("systemctl is-system-running --wait", seconds=seconds).stdout.strip()

    def failed_units(self, allowed: Sequence[str] = ()) -> list[str]:
        """Units that failed and may not."""
        listed = self.out("systemctl list-units --state=failed --no-legend --plain")
        return [line.split()[0] for line in listed.splitlines() if line.strip() and line.split()[0] not in allowed]

    def boot_id(self) -> str:
        """Changes with each boot (proc_sys_kernel(5))."""
        return self.out("cat /proc/sys/kernel/random/boot_id", root=False)

    def reboot(self) -> float:
        """Ask systemd for a reboot and wait until the new system has settled; the seconds until SSH is back."""
        return self._again(lambda _vm: self._ask_for_reboot())

    def _ask_for_reboot(self) -> None:
        # The guest may cut the connection before the answer has come, and is asked once more: whether it went down
        # shows when it is back.
        with suppress(GuestError):
            said = self.run("systemctl --no-block reboot")
            if said.status != 0 and _REBOOTING not in said.stderr:
                raise Failed(f"it would not reboot: {(said.stderr or said.stdout).strip()[-600:]}")

    def reset(self) -> float:
        """Begin anew from one instruction to the next, as after a power cut: the guest learns nothing of it.

        The seconds until SSH is back.
        """
        return self._again(Vm.reset)

    def begin_anew(self) -> float:
        """Begin anew where the emulator brought the machine to a stand, so that it answers nothing any more.

        The seconds until SSH is back.
        """
        return self._again(Vm.reset, answers=False)

    def _again(self, restart: Callable[[Vm], object], *, answers: bool = True) -> float:
        if self.vm is None:
            raise GuestError("a guest inside a guest is not rebooted from here")
        before = self.boot_id() if answers else ""
        restart(self.vm)
        self.access.close_shared()
        self.vm.mark()

        patience = self.acceptance.patience(_COMMAND_SECONDS)

        def is_back() -> bool:
            if not self.access.banner():
                return False
            try:
                done = self.access.run("cat /proc/sys/kernel/random/boot_id", check=False, seconds=patience)
            except CommandError:  # it answered too slowly: ask again
                return False
            return done.status == 0 and done.stdout.strip() not in ("", before)

        limit = self.acceptance.patience(self.acceptance.profile.accept.boot_seconds)
        seconds = self.vm.wait_until(is_back, limit, "the system after a reboot")
        self.wait_settled()
        return seconds

    def _error(self, message: str) -> GuestError:
        return self.vm.error(message) if self.vm is not None else GuestError(message)


def _ssh_words(error: RuntimeError) -> str:
    """The last line that ssh said, out of testinfra's exception."""
    result = error.args[0] if error.args else error
    return str(getattr(result, "stderr", result)).strip()[-300:]
