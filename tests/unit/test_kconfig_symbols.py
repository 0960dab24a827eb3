"""The index of a tree's symbols and Kconfig's expressions, on small trees with the traps of the real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recvirt.errors import StageError
from recvirt.kconfig.expression import Expr, evaluate, names_in, parse_expression, unmet
from recvirt.kconfig.symbols import Index, kernel_version, read_index
from tests.support.kernels import DRIVERS, write_tree


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return read_index(write_tree(tmp_path / "tree"))


def test_dependencies_come_from_menus_ifs_and_the_entry(index: Index) -> None:
    (usb,) = index.definitions["USB_DISK"]
    assert str(usb.depends) == "HAVE_BUS && USB && (BLOCK || !MMU)"
    assert (usb.type, usb.prompt, usb.file) == ("tristate", "Disks on USB", "drivers/Kconfig")


def test_help_texts_are_not_read_as_entries(index: Index) -> None:
    assert "NOT_REAL" not in index
    assert "config NOT_REAL" in index.definitions["BLOCK"][0].help


def test_the_depends_of_a_comment_is_not_its_menus(index: Index) -> None:
    assert str(index.definitions["AFTER_COMMENT"][0].depends) == "HAVE_BUS"


def test_a_condition_behind_depends_is_an_implication(index: Index) -> None:
    assert str(index.definitions["CONDITIONAL"][0].depends) == "BLOCK || !MMU"


def test_selectors_are_found_when_their_condition_holds(index: Index) -> None:
    assert index.active_selectors("CRC", {"EXT": "y", "BLOCK": "y"}) == ["EXT"]
    assert index.active_selectors("CRC", {"EXT": "y"}) == []
    assert index.active_selectors("CRC", {"BLOCK": "y"}) == []


def test_members_of_a_choice_are_rivals(index: Index) -> None:
    assert index.rivals("HZ_100") == ["HZ_250"]
    assert index.rivals("BLOCK") == []


def test_continued_lines_and_macros_are_read(index: Index) -> None:
    assert str(index.definitions["LONG"][0].depends) == "BLOCK && $(cc-option,-mfoo(1)) && MMU"
    assert index.definitions["OLD"][0].type == "bool"


def test_what_is_no_kernel_tree_is_said(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="Kconfig is missing"):
        read_index(tmp_path)
    with pytest.raises(StageError, match="tells no version"):
        kernel_version(tmp_path)


@pytest.mark.parametrize(("extra", "text"), [("", "6.12.117"), ("-rc3", "6.12.117-rc3")])
def test_the_version_is_the_makefiles(tmp_path: Path, extra: str, text: str) -> None:
    tree = write_tree(tmp_path / "tree", extraversion=extra)
    assert kernel_version(tree) == (text, (6, 12, 117))


def test_a_broken_expression_is_an_error_of_the_tree(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", drivers=DRIVERS.replace("on HAVE_BUS", "on (HAVE_BUS", 1))
    with pytest.raises(StageError, match="can't be read"):
        read_index(tree)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A", 2), ("B", 1), ("C", 0), ("MISSING", 0), ("!A", 0), ("!B", 1), ("A && B", 1), ("C || B", 1),
        ("A && !C", 2), ("(C || A) && B", 1), ("S = \"x\"", 2), ("S != \"x\"", 0), ("N > 10", 2), ("N <= 10", 0),
        ("B = m", 2), ("B = y", 0), ("MISSING = n", 2), ("$(success,true)", 2), ("A && $(x,$(y)) && B", 1), ("y", 2),
    ],
)  # fmt: skip
def test_expressions_are_tristate(text: str, wanted: int) -> None:
    assert evaluate(parse_expression(text), {"A": "y", "B": "m", "S": '"x"', "N": "64"}) == wanted


@pytest.mark.parametrize("text", ["", "A &&", "(A", "A B", "&& A", "A = ", "!", "$(open", "A @ B"])
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_expression(text)


_atoms = st.sampled_from("ABCD").map(lambda name: Expr("atom", text=name))
_exprs = st.recursive(
    _atoms,
    lambda inner: st.one_of(
        inner.map(lambda e: Expr("not", (e,))),
        st.tuples(st.sampled_from(["and", "or"]), st.lists(inner, min_size=2, max_size=3)).map(
            lambda pair: Expr(pair[0], tuple(pair[1]))
        ),
    ),
    max_leaves=8,
)
_configs = st.dictionaries(st.sampled_from("ABCD"), st.sampled_from("nmy"))


@given(_exprs, _configs)
def test_printing_and_parsing_keeps_the_meaning(expr: Expr, config: dict[str, str]) -> None:
    assert evaluate(parse_expression(str(expr)), config) == evaluate(expr, config)


@given(_exprs, _configs, st.integers(1, 2))
def test_something_is_unmet_exactly_when_the_value_is_too_low(expr: Expr, config: dict[str, str], level: int) -> None:
    assert bool(list(unmet(expr, config, level))) == (evaluate(expr, config) < level)


def test_names_leave_out_constants_and_macros() -> None:
    expr = parse_expression('A && (B = y || C = "text") && $(macro,D) && !E && 64 < N')
    assert list(names_in(expr)) == ["A", "B", "C", "E", "N"]
