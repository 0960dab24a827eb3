"""Merging: agreement is fine, contradiction is a fault unless the profile decides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recvirt.errors import ConfigError
from recvirt.kconfig.dotconfig import compare, count_values, parse_dotconfig, same_value
from recvirt.kconfig.fragment import Fragment, parse_fragment
from recvirt.kconfig.merge import allconfig_text, merge, spelled

VERSION = (6, 12, 117)


def fragment(name: str, *lines: str) -> Fragment:
    return parse_fragment(f"# {name}.\n\n# Because {name}.\n" + "\n".join(lines) + "\n", name)


def test_the_same_value_twice_is_fine_and_both_askers_are_kept() -> None:
    merged = merge([fragment("a", "CONFIG_X=m"), fragment("b", "CONFIG_X=m", "CONFIG_Y=n")], {}, VERSION)
    assert [r.fragment for r in merged.wanted["X"].requests] == ["a", "b"]
    assert (merged.wanted["X"].source, merged.wanted["X"].reason) == ("a", "Because a.")
    assert allconfig_text(merged) == "CONFIG_X=m\n# CONFIG_Y is not set\n"


def test_a_conflict_names_both_places_and_an_override_settles_it() -> None:
    fragments = [fragment("a", "CONFIG_X=m", "CONFIG_Z=y"), fragment("b", "CONFIG_X=y", "CONFIG_Z=n")]
    with pytest.raises(ConfigError) as caught:
        merge(fragments, {}, VERSION)
    assert "b.config:4: CONFIG_X: =y contradicts =m in a.config:4" in str(caught.value)
    assert len(caught.value.problems) == 2
    assert "kernel.overrides" in caught.value.hint
    merged = merge(fragments, {"X": "n", "Z": "y"}, VERSION)
    assert merged.wanted["X"].value == "n" and merged.wanted["X"].overridden and merged.wanted["X"].source == "profile"


def test_lines_for_other_kernels_are_skipped_and_do_not_conflict() -> None:
    fragments = [fragment("a", "CONFIG_X=y  # until 7.0", "CONFIG_X=m  # since 7.0", "CONFIG_A=y  # arch arm64")]
    assert merge(fragments, {}, VERSION).wanted["X"].value == "y"
    newer = merge(fragments, {}, (7, 3, 4))
    assert newer.wanted["X"].value == "m" and "A" not in newer.wanted
    assert [(r.symbol, r.value) for r in newer.skipped] == [("X", "y"), ("A", "y")]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("y", "y"),
        ("512", "512"),
        ("-1", "-1"),
        ("0x40", "0x40"),
        ("a,b", '"a,b"'),
        ('"s"', '"s"'),
        ('a"b\\', '"a\\"b\\\\"'),
    ],
)
def test_overrides_are_spelled_as_kconfig_wants(value: str, wanted: str) -> None:
    assert spelled(value) == wanted


@given(st.permutations(["CONFIG_A=y", "CONFIG_B=m", "CONFIG_C=n", "CONFIG_D=7"]), st.integers(0, 4))
def test_the_order_of_fragments_does_not_matter(lines: list[str], cut: int) -> None:
    parts = [fragment(str(n), *part) for n, part in enumerate((lines[:cut], lines[cut:])) if part]
    wanted = ["# CONFIG_C is not set" if line == "CONFIG_C=n" else line for line in sorted(lines)]
    assert sorted(allconfig_text(merge(parts, {}, VERSION)).splitlines()) == sorted(wanted)


def test_dotconfigs_are_read_and_compared() -> None:
    left = parse_dotconfig('# comment\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_S="x=y"\nCONFIG_H=0x10\n')
    assert left == {"A": "y", "B": "n", "S": '"x=y"', "H": "0x10"}
    right = parse_dotconfig('CONFIG_A=m\nCONFIG_S="x=y"\nCONFIG_H=16\nCONFIG_N=y\n')
    assert [(d.symbol, d.left, d.right) for d in compare(left, right)] == [("A", "y", "m"), ("N", "n", "y")]
    assert count_values(left) == {"y": 1, "m": 0}
    assert same_value("0x40", "64") and not same_value("y", "m")
