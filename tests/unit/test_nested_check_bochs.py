"""The Intel side on Bochs: what is believed of its console, and the disk and configuration it gets."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from recvirt.accept.bochs import (
    VmxResult,
    answer_for,
    bochs_config,
    disk_sectors,
    grub_config,
    master_boot_record,
    read_console,
    report_problems,
)

RELEASE = "6.12.0-recvirt"
GUEST = {
    "state": "proved", "error": None, "rounds": 1000, "nonce": "00000000c585fe4c", "answer": "00000000cc718488",
    "expected": "00000000cc718488", "port_accesses": 64, "kvm_counted": {"exits": 1066, "io_exits": 64},
}  # fmt: skip
REPORT: dict[str, Any] = {
    "version": 1,
    "verdict": "works",
    "status": 0,
    "text": "nested virtualization works",
    "cpu": {"vendor": "GenuineIntel", "extension": "vmx"},
    "modules": {"kvm_intel": {"loaded": True, "parameters": {"nested": "Y", "ept": "Y"}}},
    "l2": [{"mode": "real", **GUEST}, {"mode": "long", **GUEST}],
}


def console(report: Mapping[str, Any] = REPORT, changes: Mapping[str, str] | None = None) -> str:
    words = {
        "kernel": f"kernel {RELEASE}",
        "cpu": "cpu vmx=yes svm=no hypervisor=none",
        "nonce": f"nonce n1 answer {answer_for('n1')}",
        "module": "module kvm-intel.ko loaded nested=1 ept=1 ",
        "check": f"check {json.dumps(report)}",
        "status": "status 0",
        "end": "end",
        **(changes or {}),
    }
    lines = [f"RECVIRT-L2 {text}" for text in words.values() if text]
    return "[    0.000000] Linux version 6\r\n" + "\r\n".join(lines) + "\r\n[    8.0] reboot: Power down\r\n"


def judged(text: str) -> VmxResult:
    return read_console(text, "n1", seconds=1.0, release=RELEASE)


def test_whole_console_is_believed() -> None:
    result = judged(console())
    assert result.problems == ()
    assert result.ok
    assert result.report["verdict"] == "works"
    assert "end" in result.lines


def test_answer_is_fnv_1a() -> None:
    # The reference vectors of the hash: of nothing, and of "a".
    assert answer_for("") == "cbf29ce484222325"
    assert answer_for("a") == "af63dc4c8601ec8c"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kernel": "kernel 6.1"}, "the kernel that ran"),
        ({"kernel": ""}, "the kernel that ran"),
        ({"nonce": "nonce n1 answer n1"}, "did not answer its nonce"),
        ({"nonce": f"nonce n2 answer {answer_for('n2')}"}, "did not answer its nonce"),
        ({"module": "module kvm-intel.ko failed: Operation not supported"}, "failed: Operation not supported"),
        ({"check": 'check {"version":1,'}, "is not whole"),
        ({"check": ""}, "not both L2s were run"),
        ({"status": "status 13"}, "status 13"),
        ({"status": ""}, "no status"),
    ],
)
def test_a_missing_or_wrong_word_is_a_problem(changes: dict[str, str], problem: str) -> None:
    result = judged(console(changes=changes))
    assert not result.ok
    assert any(problem in text for text in result.problems), result.problems


def _set(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(report: dict[str, Any]) -> None:
        at: Any = report
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
        for part in parents:
            at = at[part]
        at[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("cpu.extension", "svm", "svm, not vmx"),
        ("cpu.extension", None, "no virtualization extension"),
        ("modules.kvm_intel.parameters.nested", "N", "kvm_intel.nested is N"),
        ("modules.kvm_intel.parameters.ept", None, "kvm_intel.ept is None"),
        ("l2.1.state", "timeout", "L2 (long): timeout"),
        ("l2.0.state", "emulated", "L2 (real): emulated"),
        ("l2.0.answer", "0000000000000000", "L2 (real): its proof does not hold"),
        ("l2.1.kvm_counted.exits", 999, "its proof does not hold (999"),
        ("l2.1.kvm_counted.exits", None, "its proof does not hold (0"),
        ("l2", [{"mode": "real", **GUEST}], "not both L2s"),
    ],
)
def test_a_report_that_lacks_something_is_a_problem(path: str, value: object, problem: str) -> None:
    report = copy.deepcopy(REPORT)
    assert report_problems(report) == []
    _set(path, value)(report)
    assert any(problem in text for text in report_problems(report)), report_problems(report)
    assert not judged(console(report)).ok


def test_grub_loads_our_kernel_with_nested_and_ept() -> None:
    script = grub_config("abc")
    assert "recvirt.nonce=abc" in script
    assert "kvm_intel.nested=1 kvm_intel.ept=1" in script
    assert script.index("terminal_output serial") < script.index("linux ") < script.index("initrd ")


def test_bochs_needs_no_terminal_and_ends_with_the_machine() -> None:
    text = bochs_config(32 * 1024**2 // 516096 * 516096)
    assert 'display_library: rfb, options="timeout=0"' in text
    assert "panic: action=fatal" in text
    assert "com1: enabled=1, mode=file, dev=console.txt" in text
    assert "path=disk.img" in text
    assert f"cylinders={32 * 1024**2 // 516096}, heads=16, spt=63" in text


def test_disk_is_whole_cylinders_and_large_enough() -> None:
    for size in (0, 1, 10 * 1024**2, 60 * 1024**2):
        sectors = disk_sectors(size)
        assert sectors % (16 * 63) == 0
        assert (sectors - 2048) * 512 > size + 8 * 1024**2


def test_boot_record_has_one_active_partition() -> None:
    record = master_boot_record(bytes(range(256)) * 2, 100_800)
    assert len(record) == 512
    assert record[510:] == b"\x55\xaa"
    active, _, kind, _, first, count = struct.unpack_from("<B3sB3sII", record, 446)
    assert (active, kind, first, count) == (0x80, 0x0E, 2048, 100_800 - 2048)
    assert struct.unpack_from("<Q", record, 0x5C) == (1,)
    assert not any(record[462:510])
