"""``recvirt kernel config``: which words are its commands, and which name a profile."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from recvirt.cli import cli
from recvirt.cli import kernel as module


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ((), "default"),
        (("minimal",), "minimal"),
        (("minimal", "--where"), "minimal"),
        (("--where",), "default"),
        (("--set", "a=b", "--where"), "default"),
        (("print", "diff", "--where"), "diff"),
        (("explain", "KVM"), "default"),
        (("explain", "KVM", "debug"), "debug"),
        (("audit", "kernel-7"), "kernel-7"),
    ],
)
def test_the_profile_is_told_from_a_command(
    words: tuple[str, ...], wanted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class AskedError(Exception):
        """What the command would look at."""

    def configure(app: Any, name: str, overrides: Any, offline: Any) -> SimpleNamespace:
        raise AskedError(name)

    monkeypatch.setattr(module, "_configure", configure)
    found = CliRunner().invoke(cli, ["kernel", "config", *words])
    assert isinstance(found.exception, AskedError), found.output
    assert found.exception.args == (wanted,)


def test_help_names_the_commands_and_completion_the_profiles_too(monkeypatch: pytest.MonkeyPatch) -> None:
    said = CliRunner().invoke(cli, ["kernel", "config", "--help"]).output
    assert all(f"\n  {name} " in said for name in ("print", "explain", "diff", "audit"))
    monkeypatch.setenv("_RECVIRT_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "recvirt kernel config d")
    monkeypatch.setenv("COMP_CWORD", "3")
    told = CliRunner().invoke(cli, [], prog_name="recvirt").output.split()
    assert {"plain,diff", "plain,default", "plain,debian-kernel"} <= set(told)
