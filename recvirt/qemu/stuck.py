"""Tells an emulator that lost an interrupt from a guest that hangs: works on the text of QEMU's monitor.

QEMU's TCG with a thread a processor now and then (about one boot in fifty on a busy machine) leaves a processor asleep
with an interrupt that its local APIC has handed over and that was never finished: nothing of the same or a lower
priority reaches it any more, the timer among it, and the whole guest comes to a stand. An operating system finishes
(EOI) an interrupt before it goes to sleep, so halted with interrupts on and one in service is a state that no sound
guest is in. Rarer still, QEMU finds itself in a state that its authors ruled out, and aborts.
"""

from __future__ import annotations

import re
import signal

from recvirt.errors import GuestError

#: RFLAGS.IF: interrupts are let in (AMD64 Architecture Programmer's Manual, volume 2, 3.1.6).
_INTERRUPTS_ON = 0x200
_REGISTERS = re.compile(r"CPU#(\d+)\r?\n.*?RFL=([0-9a-f]+).*?HLT=([01])", re.DOTALL)
_IN_SERVICE = re.compile(r"^ISR\s+((?:\d+ )+)", re.MULTILINE)


#: What a failed assert(3) prints, glibc's and GLib's.
_ASSERTION = re.compile(r"Assertion .* failed|ERROR:.*: (assertion failed|code should not be reached)")
#: Of QEMU itself, and as the sandbox around it reports the same.
_ABORTED = (-signal.SIGABRT, 128 + signal.SIGABRT)


class EmulatorError(GuestError):
    """The emulator, not the guest, is at fault: the same once more may well go on."""


def sleeping(registers: str) -> list[int]:
    """Processors that are halted with interrupts on, out of ``info registers -a``."""
    return [
        int(number)
        for number, flags, halted in _REGISTERS.findall(registers)
        if halted == "1" and int(flags, 16) & _INTERRUPTS_ON
    ]


def in_service(lapic: str) -> list[int]:
    """Vectors that were handed over and are not finished, out of ``info lapic N``."""
    match = _IN_SERVICE.search(lapic)
    return [int(word) for word in match[1].split()] if match else []


def gave_itself_up(status: int, words: str) -> bool:
    """Whether QEMU, by its exit status and its last words, ended over an assertion of its own."""
    return status in _ABORTED and _ASSERTION.search(words) is not None
