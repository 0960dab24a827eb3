"""The Makefile's targets: each is a thin call of the command line, with verbs and options that exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from recvirt.cli import cli
from recvirt.data import shipped_names

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Makefile").read_text()
TARGETS = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)", TEXT, re.MULTILINE)[1].replace("\\\n", " ").split()  # type: ignore[index]


def recipe(target: str, *variables: str) -> list[str]:
    """What make would run, whatever the make or shell around the tests has set."""
    ours = {"YES", "DEV", "VENV", "PROFILE", "BUILD_FLAGS", "TEST_FLAGS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS"}
    ours |= {"PROVIDERS", "PUBLISH_FLAGS"}
    said = subprocess.run(
        ["make", "-n", "--no-print-directory", target, *variables],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={name: value for name, value in os.environ.items() if name not in ours},
    )  # fmt: skip
    return said.stdout.splitlines()


def test_every_target_is_phony_and_listed() -> None:
    defined = {name for line in re.findall(r"^([a-z][\w -]*):", TEXT, re.MULTILINE) for name in line.split()}
    assert defined == set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_every_call_of_recvirt_has_a_verb_and_options_that_exist(target: str) -> None:
    lines = recipe(target)
    assert lines
    for line in lines:
        words = shlex.split(line.rpartition(".venv/bin/recvirt ")[2]) if ".venv/bin/recvirt " in line else []
        if not words:
            continue
        command = cli.get_command(click.Context(cli), words[0])
        assert command is not None, line
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize("target", [name for name in TARGETS if name.startswith(("image-", "acceptance-"))])
def test_named_targets_name_profiles_or_options(target: str) -> None:
    name = target.partition("-")[2]
    if target.startswith("image-") or name in shipped_names("profiles"):
        assert name in shipped_names("profiles")
        assert any(line.split()[-1] == name for line in recipe(target) if "recvirt" in line)


def test_the_profile_and_flags_are_passed_on() -> None:
    lines = recipe("image", "PROFILE=minimal", "BUILD_FLAGS=--offline")
    assert lines[-1].split() == [".venv/bin/recvirt", "build", "--offline", "minimal"]
    assert recipe("acceptance", "PROFILE=minimal")[-1].split() == [".venv/bin/recvirt", "test", "minimal"]


def test_yes_reaches_the_script_that_asks() -> None:
    assert any('YES="1"' in line and "bootstrap.sh" in line for line in recipe("image", "YES=1"))
    assert any('YES=""' in line and "bootstrap.sh" in line for line in recipe("image"))


def test_test_is_check_and_acceptance() -> None:
    both = [*recipe("check"), *recipe("acceptance")]
    assert set(both) == set(recipe("test"))


def test_paths_that_recipes_name_are_there() -> None:
    for target in TARGETS:
        for path in re.findall(r"(?<![\w./])((?:tests|scripts|benchmarks)/[\w/.-]+)", "\n".join(recipe(target))):
            assert (ROOT / path).exists(), f"{target}: {path}"


def test_clean_leaves_what_git_knows() -> None:
    swept = [line for line in recipe("clean") if line.startswith("rm ")]
    assert swept == ["rm -rf build/* .cache .venv"]
    tracked = subprocess.check_output(["git", "ls-files", "build", ".cache", ".venv"], cwd=ROOT, text=True)
    assert tracked.split() in ([], ["build/.gitkeep"])


def test_slow_tests_run_with_the_stages_only() -> None:
    assert any('-m "not slow" tests/unit tests/cloud' in line for line in recipe("unit"))
    assert any("tests/unit tests/cloud -m slow" in line for line in recipe("stage-tests"))
