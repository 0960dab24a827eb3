"""The accelerator probe: what counts as an answer, and what is concluded from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from recvirt.errors import GuestError
from recvirt.qemu import probe
from recvirt.sandbox import ToolsRoot


def tools(tmp_path: Path) -> ToolsRoot:
    return ToolsRoot(tmp_path)


def test_the_boot_sector_is_bootable_and_holds_the_word_once() -> None:
    disk = probe.boot_sector("0123456789abcdef")
    assert disk[510:512] == b"\x55\xaa"
    assert disk.count(b"0123456789abcdef\0") == 1
    # SeaBIOS reads nothing from a disk of less than a cylinder.
    assert len(disk) >= 16 * 63 * 512
    assert len(probe._CODE) <= probe._TEXT_OFFSET


def test_jumps_of_the_boot_sector_land_on_instructions() -> None:
    code = probe._CODE
    # jnz vmx (at 17) and jz print (at 30), jmp print (at 37): relative to the byte behind them.
    assert code[17] == 0x75 and code[19 + code[18]] == 0xC6 and code[19 + code[18] + 4] == ord("V")
    assert code[30] == 0x74 and code[32 + code[31]] == 0xBE
    assert code[37] == 0xEB and code[39 + code[38]] == 0xBE


@pytest.mark.parametrize(("text", "expected"), [("Sword", "SVM"), ("xxVword", "VMX"), ("-word\n", "")])
def test_an_answer_tells_the_nesting_extension(text: str, expected: str) -> None:
    assert probe.read_answer(text, "word") == expected


@pytest.mark.parametrize("text", ["", "word", "other"])
def test_silence_is_no_answer(text: str) -> None:
    with pytest.raises(ValueError, match="said nothing"):
        probe.read_answer(text, "word")


def test_a_word_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        probe.boot_sector("x" * 300)


def choose(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kvm: str | GuestError, **options: bool
) -> probe.Accelerator:
    def tiny(_tools: ToolsRoot, accelerator: str, _seconds: float) -> str:
        if accelerator == "tcg":
            return "SVM"
        if isinstance(kvm, GuestError):
            raise kvm
        return kvm

    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(probe, "KVM_DEVICE", device)
    monkeypatch.setattr(probe, "run_tiny_guest", tiny)
    monkeypatch.setattr(probe, "_found", {})
    return probe.find_accelerator(tools(tmp_path), **options)


def test_kvm_is_taken_when_a_guest_speaks_and_could_nest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = choose(monkeypatch, tmp_path, "VMX")
    assert (found.name, found.nesting, found.time_factor) == ("kvm", "VMX", 1.0)


def test_a_kvm_that_aborts_or_is_silent_gives_tcg_and_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = choose(monkeypatch, tmp_path, GuestError("a tiny guest under kvm said nothing in 10 s"))
    assert found.name == "tcg" and "said nothing in 10 s" in found.reason and found.time_factor > 1


def test_a_kvm_without_nesting_is_no_use_for_an_l2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert choose(monkeypatch, tmp_path, "").name == "tcg"
    assert choose(monkeypatch, tmp_path, "", nested=False).name == "kvm"


def test_no_device_means_no_trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probe, "KVM_DEVICE", tmp_path / "absent")
    monkeypatch.setattr(probe, "_found", {})
    tried: list[str] = []

    def tiny(_tools: ToolsRoot, accelerator: str, _seconds: float) -> str:
        tried.append(accelerator)
        return "SVM"

    monkeypatch.setattr(probe, "run_tiny_guest", tiny)
    first = probe.find_accelerator(tools(tmp_path))
    assert "does not exist" in first.reason
    assert probe.find_accelerator(tools(tmp_path)) is first
    assert tried == ["tcg"]
