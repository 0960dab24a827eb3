"""Plays the scenes: boots, checks in order, results. Scenes run side by side where cores and memory allow."""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from recvirt.accept import boots, deep
from recvirt.accept.checks.system import remember_identity
from recvirt.accept.context import Acceptance
from recvirt.accept.guest import Guest
from recvirt.accept.registry import Check, scenes_of
from recvirt.accept.results import CheckResult, Failed, Outcome, Skipped
from recvirt.errors import GuestError, RecvirtError
from recvirt.qemu.stuck import EmulatorError
from recvirt.run import allow_start, stop, stop_all
from recvirt.ui import reporter

_BOOTS = {**boots.SCENE_BOOTS, "deep": deep.deep}
#: What QEMU needs besides the guest's own memory.
_QEMU_BYTES = 600 * 1024**2
_PANIC = re.compile(r"Kernel panic - [^\r\n]+")


def run_check(acceptance: Acceptance, check: Check, guest: Guest | None) -> Outcome:
    """Run one check and record its result. Whatever goes wrong inside counts as a failure, a fault of the check too."""
    started = time.monotonic()
    outcome: Outcome = "failed"
    try:
        detail = check.call(acceptance, guest)
        outcome = "passed"
    except Skipped as reason:
        outcome, detail = "skipped", reason.message
    except (Failed, RecvirtError) as error:
        detail = error.message
    except Exception:
        detail = f"the check itself broke:\n{traceback.format_exc(limit=-4)}"
    if outcome == "failed" and guest is not None and (words := panic_of(guest)):
        detail = f"{detail}\nthe guest's kernel had panicked before: {words}"
    seconds = time.monotonic() - started
    acceptance.record(CheckResult(check.name, check.scene, check.title, outcome, round(seconds, 2), detail))
    return outcome


def panic_of(guest: Guest) -> str:
    """The first panic on the guest's console, where it has one: the reboot after it looks like anything else."""
    found = _PANIC.search(guest.vm.console_text()) if guest.vm is not None else None
    return found[0].strip() if found else ""


def not_run(acceptance: Acceptance, checks: Sequence[Check], why: str) -> None:
    """Record checks that could not be run at all."""
    for check in checks:
        acceptance.record(CheckResult(check.name, check.scene, check.title, "not-run", 0.0, why))


def run_guest_checks(acceptance: Acceptance, checks: Sequence[Check], guest: Guest) -> None:
    """The checks of one boot, in order. When the machine dies, the rest is not run."""
    for number, check in enumerate(checks):
        if guest.vm is not None and guest.vm.process.poll() is not None:
            not_run(acceptance, checks[number:], "the virtual machine had ended")
            return
        run_check(acceptance, check, guest)


def play_scene(acceptance: Acceptance, scene: str, checks: Sequence[Check]) -> None:
    """Boot a scene's guest and run its checks; for the first scene also the reboot's."""
    own = [check for check in checks if check.scene == scene]
    after = [check for check in checks if check.scene == "reboot"] if scene == "first" else []
    started = time.monotonic()
    try:
        # mypy can't know that each value is a context manager of guests.
        manager: Any = _BOOTS[scene](acceptance)
        with manager as guest, _TimeLimit(acceptance, guest):
            if scene in ("first", "second"):
                remember_identity(guest, scene)
            run_guest_checks(acceptance, own, guest)
            if after:
                _reboot(acceptance, guest, after)
    except RecvirtError as error:
        _boot_failed(acceptance, [*own, *after], error.message, time.monotonic() - started)
    except Exception:
        text = f"the scene itself broke:\n{traceback.format_exc(limit=-4)}"
        _boot_failed(acceptance, [*own, *after], text, time.monotonic() - started)


def _boot_failed(acceptance: Acceptance, checks: Sequence[Check], message: str, seconds: float) -> None:
    done = {result.name for result in acceptance.results}
    left = [check for check in checks if check.name not in done]
    if not left:
        raise GuestError(message)
    head = left[0]
    acceptance.record(CheckResult(head.name, head.scene, head.title, "failed", round(seconds, 2), message))
    not_run(acceptance, left[1:], f"its guest did not come up (see {head.name})")


def _reboot(acceptance: Acceptance, guest: Guest, checks: Sequence[Check]) -> None:
    try:
        for tries_left in reversed(range(boots.EMULATOR_TRIES)):
            word = secrets.token_hex(16)
            guest.out(f"echo {word} > /var/lib/recvirt-reboot-marker")
            guest.facts["reboot-word"] = word
            try:
                guest.facts["reboot-seconds"] = guest.reboot()
                break
            except EmulatorError as error:
                if not tries_left:
                    raise
                reporter.warn(f"{guest.name}: {error.message.splitlines()[0]}; it is reset, and rebooted once more")
                acceptance.add("boots_begun_anew", 1)
                guest.begin_anew()
    except RecvirtError as error:
        _boot_failed(acceptance, checks, error.message, 0.0)
        return
    run_guest_checks(acceptance, checks, guest)


class _TimeLimit:
    """Ends a scene's QEMU when the scene has surely hung; its checks then fail with the console's last lines."""

    def __init__(self, acceptance: Acceptance, guest: Guest) -> None:
        self._timer: threading.Timer | None = None
        if guest.vm is not None:
            self._timer = threading.Timer(boots.scene_limit(acceptance), stop, (guest.vm.process,))
            self._timer.daemon = True

    def __enter__(self) -> None:
        if self._timer:
            self._timer.start()

    def __exit__(self, *_: object) -> None:
        if self._timer:
            self._timer.cancel()


def parallel_boots(acceptance: Acceptance) -> int:
    """How many guests at once: a core each at least, and room in memory. One, where others keep the cores busy: a guest
    that gets too little of them runs into its own systemd's limits of time."""
    if acceptance.options.parallel:
        return acceptance.options.parallel
    each = acceptance.memory_bytes + _QEMU_BYTES
    by_memory = int(_available_bytes() * 0.8 // each)
    cores = len(os.sched_getaffinity(0))
    busy = os.getloadavg()[0] > 1.5 * cores
    return 1 if busy else max(1, min(cores, by_memory))


def _available_bytes() -> int:
    with Path("/proc/meminfo").open(encoding="ascii") as stream:
        for line in stream:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def play(acceptance: Acceptance, checks: Sequence[Check]) -> None:
    """Run all ``checks``: the image's own, then the scenes, then what compares them."""
    scenes = scenes_of(checks)
    allow_start()
    for check in (item for item in checks if item.scene == "image"):
        run_check(acceptance, check, None)
    jobs = [scene for scene in _BOOTS if scene in scenes]
    alone = [check for check in checks if check.scene in ("matrix", "vmx")]
    workers = parallel_boots(acceptance)
    reporter.info(f"{len(checks)} checks; boots: {', '.join(jobs) or 'none'}; at most {workers} at once")
    with ThreadPoolExecutor(max_workers=workers) as pool:
        futures: list[Future[Any]] = [pool.submit(play_scene, acceptance, scene, checks) for scene in jobs]
        futures += [pool.submit(run_check, acceptance, check, None) for check in alone]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            # An interrupt reaches one thread only: without their programs the others end at once.
            stop_all()
            for future in futures:
                future.cancel()
            raise
    for check in (item for item in checks if item.scene == "pair"):
        run_check(acceptance, check, None)
