"""What becomes of a wish: classification, allowances, and the report. The tree's own tool is not run here."""

from __future__ import annotations

from pathlib import Path

import pytest

from recvirt.errors import ConfigError
from recvirt.kconfig.dotconfig import parse_dotconfig
from recvirt.kconfig.explain import explain, explain_lines
from recvirt.kconfig.fragment import Fragment, parse_fragment
from recvirt.kconfig.merge import Merged, merge
from recvirt.kconfig.report import audit_losses, report
from recvirt.kconfig.resolve import (
    FORCED,
    RANGE,
    RIVAL,
    UNKNOWN,
    UNMET,
    Allowed,
    Loss,
    Resolved,
    apply_allowances,
    find_losses,
    make_argv,
)
from recvirt.kconfig.symbols import Index, read_index
from tests.support.kernels import write_tree

VERSION = (6, 12, 117)
FRAGMENT = """\
# Topic.

# The reason.
CONFIG_BLOCK=y
CONFIG_USB_DISK=m
CONFIG_CRC=n
CONFIG_HZ_100=y
CONFIG_GONE=n
CONFIG_MMU=n
CONFIG_NR=8
"""
#: What the tool might answer: everything but BLOCK turned out differently.
ANSWER = """\
CONFIG_BLOCK=y
CONFIG_EXT=y
CONFIG_CRC=y
CONFIG_HZ_250=y
# CONFIG_HZ_100 is not set
CONFIG_MMU=y
CONFIG_NR=4
"""


@pytest.fixture
def index(tmp_path: Path) -> Index:
    kconfig_extra = 'config NR\n\tint "count"\n\trange 2 4\n'
    tree = write_tree(tmp_path / "tree")
    with (tree / "Kconfig").open("a") as stream:
        stream.write("\n" + kconfig_extra)
    return read_index(tree)


@pytest.fixture
def fragment() -> Fragment:
    return parse_fragment(FRAGMENT, "50-t")


@pytest.fixture
def merged(fragment: Fragment) -> Merged:
    return merge([fragment], {}, VERSION)


@pytest.fixture
def losses(merged: Merged, index: Index) -> list[Loss]:
    resolved = Resolved(ANSWER, parse_dotconfig(ANSWER), frozenset({"GONE"}))
    return find_losses(merged, resolved, lambda: index)


def test_every_difference_is_classified(losses: list[Loss]) -> None:
    kinds = {loss.symbol: (loss.kind, loss.detail) for loss in losses}
    assert set(kinds) == {"USB_DISK", "CRC", "HZ_100", "GONE", "MMU", "NR"}
    assert kinds["USB_DISK"] == (UNMET, "needs m from: HAVE_BUS; USB")
    assert kinds["CRC"] == (FORCED, "selected by EXT")
    assert kinds["HZ_100"] == (RIVAL, "the choice fell on HZ_250")
    assert kinds["GONE"][0] == UNKNOWN
    assert kinds["MMU"][0] == RANGE and "no prompt" in kinds["MMU"][1]
    assert kinds["NR"][0] == RANGE and "out of its range" in kinds["NR"][1]


def test_without_a_difference_the_index_is_not_read(fragment: Fragment) -> None:
    wanted = merge([parse_fragment("# T.\n\n# R.\nCONFIG_BLOCK=y\nCONFIG_NO=n\n", "a")], {}, VERSION)

    def fail() -> Index:
        raise AssertionError("read for nothing")

    assert find_losses(wanted, Resolved(ANSWER, parse_dotconfig(ANSWER), frozenset()), fail) == []


def test_losses_are_fatal_with_their_lines_unless_each_is_allowed(losses: list[Loss]) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_allowances(losses, (), VERSION)
    assert len(caught.value.problems) == len(losses)
    assert "50-t.config:5: CONFIG_USB_DISK: wanted m, got n: unmet dependency" in str(caught.value)
    allowed = [Allowed(loss.symbol, "a good reason") for loss in losses]
    assert all(loss.allowed == "a good reason" for loss in apply_allowances(losses, allowed, VERSION))


def test_an_allowance_that_nothing_needs_is_a_fault(losses: list[Loss]) -> None:
    allowed = [Allowed(loss.symbol, "a good reason") for loss in losses]
    with pytest.raises(ConfigError, match="CONFIG_BLOCK: nothing needed this allowance"):
        apply_allowances(losses, [*allowed, Allowed("BLOCK", "never needed")], VERSION)
    # One for other versions is not unused, it is not meant.
    apply_allowances(losses, [*allowed, Allowed("BLOCK", "for later", since="7.0")], VERSION)
    expired = [Allowed(item.symbol, item.reason, until="6.12") for item in allowed]
    with pytest.raises(ConfigError, match="unmet dependency"):
        apply_allowances(losses, expired, VERSION)


def test_an_override_that_is_lost_blames_the_profile(index: Index) -> None:
    wanted = merge([], {"USB_DISK": "y"}, VERSION)
    losses = find_losses(wanted, Resolved(ANSWER, parse_dotconfig(ANSWER), frozenset()), lambda: index)
    with pytest.raises(ConfigError, match=r"profile: kernel\.overrides: CONFIG_USB_DISK"):
        apply_allowances(losses, (), VERSION)


def report_of(fragment: Fragment, merged: Merged, losses: list[Loss]) -> dict[str, object]:
    return report(
        mode="resolved", kernel_version="6.12.117", release="6.12.117-t", source="s", arch="x86_64",
        fragments=[fragment], merged=merged, values=parse_dotconfig(ANSWER), losses=losses,
    )  # fmt: skip


def test_the_report_tells_every_symbol(fragment: Fragment, merged: Merged, losses: list[Loss]) -> None:
    told = report_of(fragment, merged, losses)
    assert told["counts"] == {"y": 5, "m": 0, "requested": 7, "lost": 6}
    symbols = told["symbols"]
    assert isinstance(symbols, dict)
    assert (
        symbols["BLOCK"]["value"] == "y"
        and symbols["BLOCK"]["reason"] == "The reason."
        and "loss" not in symbols["BLOCK"]
    )
    assert symbols["CRC"]["loss"]["kind"] == FORCED and symbols["CRC"]["asked_by"][0]["line"] == 6


def test_explaining_says_who_asked_and_what_is_missing(
    fragment: Fragment, merged: Merged, losses: list[Loss], index: Index
) -> None:
    told = report_of(fragment, merged, losses)
    text = "\n".join(explain_lines(explain("CONFIG_USB_DISK", parse_dotconfig(ANSWER), told, index)))
    for words in (
        "CONFIG_USB_DISK=n", "asked by 50-t.config:5", "The reason.",
        "depends on HAVE_BUS && USB && (BLOCK || !MMU)  [n]",
        "not met: HAVE_BUS; USB", "unmet dependency", 'tristate "Disks on USB", drivers/Kconfig:12',
    ):  # fmt: skip
        assert words in text, (words, text)
    crc = explain("CRC", parse_dotconfig(ANSWER), told, index)
    assert crc["selected_by"] == ["EXT"] and crc["could_be_selected_by"] == ["EXT"]
    assert explain("LONG", parse_dotconfig(ANSWER), told, index)["asked_by"] == []


def test_explaining_an_unknown_symbol_offers_near_ones(
    fragment: Fragment, merged: Merged, losses: list[Loss], index: Index
) -> None:
    with pytest.raises(ConfigError) as caught:
        explain("USB_DISC", {}, report_of(fragment, merged, losses), index)
    assert "USB_DISK" in caught.value.hint


def test_a_stock_kernel_is_compared_without_being_refused(merged: Merged) -> None:
    found = {
        loss.symbol: loss.kind for loss in audit_losses(merged, parse_dotconfig("CONFIG_BLOCK=m\nCONFIG_USB_DISK=y\n"))
    }
    assert found == {
        "BLOCK": "module instead of built in", "USB_DISK": "built in instead of module",
        "HZ_100": "missing", "NR": "missing",
    }  # fmt: skip
    assert {loss.symbol: loss.kind for loss in audit_losses(merged, {"CRC": "m"})}["CRC"] == "on"


def test_make_runs_at_fixed_paths() -> None:
    assert make_argv("x86_64", "bzImage", jobs=2) == [
        "make", "-C", "/kernel/source", "O=/kernel/build", "ARCH=x86_64", "-j2", "bzImage",
    ]  # fmt: skip
