"""Errors tell a person what went wrong and what to do; scripts tell them apart by the exit status."""

from __future__ import annotations

from pathlib import Path

from recvirt import errors
from recvirt.errors import CommandError, ConfigError, MissingToolError, Problem, RecvirtError


def classes() -> list[type[RecvirtError]]:
    """The error tree. Other modules may refine a class for their own use; the exit status stays the parent's."""
    found = [thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, RecvirtError)]
    assert RecvirtError in found
    return found


def test_every_class_has_an_exit_status_of_its_own() -> None:
    codes = {cls.__name__: cls.exit_code for cls in classes()}
    assert len(codes) > 10
    assert len(set(codes.values())) == len(codes), codes
    # 0 is success, 2 click's for wrong usage; from 125 on the shell's own.
    assert all(code not in (0, 2) and 0 < code < 125 for code in codes.values()), codes


def test_a_problem_names_file_line_and_path() -> None:
    assert str(Problem("p.yaml", 3, "root.suite", "bad")) == "p.yaml:3: root.suite: bad"
    assert str(Problem("p.yaml", 0, "", "bad")) == "p.yaml: bad"


def test_problems_sort_by_file_and_line() -> None:
    later, earlier, other = Problem("a", 12, "", ""), Problem("a", 3, "", ""), Problem("b", 1, "", "")
    assert sorted([other, later, earlier]) == [earlier, later, other]


def test_a_config_error_carries_every_problem() -> None:
    problems = [Problem("a", 1, "x", "one"), Problem("a", 2, "y", "two")]
    error = ConfigError(problems, hint="look there")
    assert error.problems == tuple(problems)
    assert error.message == "a:1: x: one\na:2: y: two"
    assert error.hint == "look there"
    assert ConfigError("plain words").problems == ()


def test_a_missing_tool_says_what_to_install() -> None:
    error = MissingToolError("bwrap", "bubblewrap")
    assert error.message == "bwrap is not installed"
    assert "apt install bubblewrap" in error.hint


def test_a_command_error_shows_the_last_lines_and_the_log() -> None:
    error = CommandError(["make", "all"], 2, log_path=Path("/l/make.log"), last_lines=["cc: oops"], hint="h")
    assert error.message == "make ended with status 2\n  | cc: oops\n  the whole log: /l/make.log"
    assert "make was killed by signal 9" in CommandError(["make"], -9).message
