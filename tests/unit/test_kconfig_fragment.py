"""Fragments: the syntax, and every fault of a file at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from recvirt.errors import ConfigError
from recvirt.kconfig.fragment import Gate, load_fragments, parse_fragment, parse_version

GOOD = """\
# The topic,
# on two lines.

# Why these two.
CONFIG_KVM=m
CONFIG_NR_CPUS=512

# Why this one.
CONFIG_HYPERV_VMBUS=y  # since 6.18
CONFIG_LSM="a,b # not a comment"
CONFIG_OLD=y # until 7.0 arch x86_64
CONFIG_ADDR=0xFF00
"""


def problems_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_fragment(text, "t")
    return [str(problem) for problem in caught.value.problems]


def test_a_fragment_keeps_reasons_lines_and_gates() -> None:
    fragment = parse_fragment(GOOD, "10-t")
    assert fragment.summary == "The topic, on two lines."
    first, second, third, lsm, old, address = fragment.requests
    assert (first.symbol, first.value, first.line, first.reason) == ("KVM", "m", 5, "Why these two.")
    assert second.reason == "Why these two." and second.value == "512"
    assert third.gate == Gate(since=(6, 18)) and third.reason == "Why this one."
    assert lsm.value == '"a,b # not a comment"' and lsm.gate == Gate()
    assert old.gate == Gate(until=(7, 0), arch="x86_64") and str(old.gate) == "until 7.0 arch x86_64"
    assert address.value == "0xFF00"


def test_a_gate_admits_from_since_on_and_up_to_but_not_until() -> None:
    gate = Gate(since=(6, 13), until=(7, 0), arch="x86_64")
    admitted = [v for v in ("6.12.117", "6.13", "6.19.4", "7.0", "7.3.4") if gate.admits(parse_version(v), "x86_64")]
    assert admitted == ["6.13", "6.19.4"]
    assert not gate.admits((6, 14), "arm64")
    assert Gate().admits((2, 6), "arm64")


def test_all_faults_of_a_file_come_at_once_with_their_lines() -> None:
    text = """\
# Topic.

CONFIG_NO_REASON=y

# Reason.
CONFIG_BAD=yes
CONFIG_WORD=y since 6.1
CONFIG_UNKNOWN=y # from 6.1
CONFIG_VERSION=y # since 6
CONFIG_NEVER=y # since 7.0 until 6.12
CONFIG_ARCH=y # arch vax
# CONFIG_COMMENT is not set
CONFIG_TWICE=y
CONFIG_TWICE=y
something else
#CONFIG_OUT=y
"""
    found = problems_of(text)
    wanted = {
        3: "has no reason", 6: "'yes' is no value", 7: "is not understood", 8: "'from' is not one of", 9: "'6' is not",
        10: "holds for no version", 11: "'vax' is not a known architecture", 12: "write CONFIG_COMMENT=n",
        14: "stands already in line 13", 15: "is neither CONFIG_NAME=value nor a comment", 16: "commented out",
    }  # fmt: skip
    assert len(found) == len(wanted)
    for line, words in wanted.items():
        assert [text for text in found if text.startswith(f"t.config:{line}:") and words in text], (line, words, found)


def test_a_reason_in_the_middle_of_a_group_needs_a_blank_line() -> None:
    assert "blank line" in problems_of("# T.\n\n# R.\nCONFIG_A=y\n# Other reason.\nCONFIG_B=y\n")[0]


@pytest.mark.parametrize(("text", "words"), [("", "topic"), ("# Topic.\n\n", "asks for nothing")])
def test_an_empty_fragment_is_a_fault(text: str, words: str) -> None:
    assert any(words in problem for problem in problems_of(text))


def test_loading_names_every_file_that_fails(tmp_path: Path) -> None:
    (tmp_path / "good.config").write_text(GOOD)
    (tmp_path / "bad.config").write_text("# T.\n\nCONFIG_X=maybe\n")
    (tmp_path / "bytes.config").write_bytes(b"# T\xff\n")
    files = [(name, tmp_path / f"{name}.config") for name in ("good", "bad", "bytes", "absent", "good")]
    with pytest.raises(ConfigError) as caught:
        load_fragments(files)
    text = str(caught.value)
    for words in (
        "bad.config:3",
        "bytes.config: is not UTF-8",
        "absent.config: can't be read",
        "good.config: is named twice",
    ):
        assert words in text


@pytest.mark.parametrize("text", ["", "6", "6.12-rc1", "six", "6.12.1.1"])
def test_what_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="kernel version"):
        parse_version(text)
