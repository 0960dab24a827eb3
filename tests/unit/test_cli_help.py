"""Every verb explains itself: a help text with an example; the manual page names each of them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from recvirt import __version__, errors
from recvirt.cli import INTERRUPTED, OUTPUT_CLOSED, VERBS, cli
from recvirt.errors import RecvirtError
from recvirt.profile.reference import as_markdown

ROOT = Path(__file__).resolve().parents[2]


def commands() -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words that call it, groups' own commands included."""
    todo: list[tuple[tuple[str, ...], click.Command]] = [((), cli)]
    context = click.Context(cli)
    while todo:
        words, command = todo.pop()
        if words:
            yield words, command
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                child = command.get_command(context, name)
                assert child is not None, (*words, name)
                todo.append(((*words, name), child))


COMMANDS = dict(commands())


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_can_be_imported(verb: str) -> None:
    module, name = VERBS[verb].split(":")
    command = getattr(importlib.import_module(f"recvirt.cli.{module}"), name)
    assert isinstance(command, click.Command)
    assert command.name == verb


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_verb_has_help_with_an_example(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli, [*words, "--help"])
    assert result.exit_code == 0, result.output
    assert "Example" in result.output
    assert f"recvirt {words[0]}" in result.output.partition("Example")[2] or "recvirt" in result.output


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_option_says_what_it_does(words: tuple[str, ...]) -> None:
    for parameter in COMMANDS[words].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{' '.join(words)} {parameter.name}"


def test_the_root_help_lists_every_verb() -> None:
    text = CliRunner().invoke(cli, ["--help"]).output
    for verb in VERBS:
        assert f"\n  {verb} " in text, verb


def test_wrong_usage_is_status_two() -> None:
    assert CliRunner().invoke(cli, ["no-such-verb"]).exit_code == 2
    assert CliRunner().invoke(cli, ["completion", "tcsh"]).exit_code == 2


# --- the manual page

PAGE = ROOT / "docs/man/recvirt.1"


def page_text() -> str:
    """The page's words, without roff's marks."""
    lines = [re.sub(r"^\.\w+ ?", "", line) for line in PAGE.read_text().splitlines() if not line.startswith('.\\"')]
    return re.sub(r"\s+", " ", "\n".join(lines).replace("\\-", "-").replace('"', ""))


@pytest.mark.parametrize(
    "words", [words for words, command in COMMANDS.items() if not isinstance(command, click.Group)], ids=" ".join
)
def test_the_manual_page_names_every_verb(words: tuple[str, ...]) -> None:
    heads = [line for line in PAGE.read_text().splitlines() if line.startswith(".B")]
    assert any(re.match(rf'\.BR? "?{" ".join(words)}\b', head) for head in heads)


def test_the_manual_page_names_every_global_option() -> None:
    text = page_text()
    for parameter in cli.params:
        for option in parameter.opts:
            assert option in text, option


def test_the_manual_page_names_no_option_that_is_not_there() -> None:
    known = {
        option for command in (cli, *COMMANDS.values()) for p in command.params for option in p.opts + p.secondary_opts
    }
    known |= {"-h", "--help"}
    assert set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", page_text())) <= known


def test_the_manual_page_tells_every_exit_status() -> None:
    statuses = {int(number) for number in re.findall(r"^(\d+)\|", PAGE.read_text(), re.MULTILINE)}
    classes = [thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, RecvirtError)]
    assert statuses == {0, 2, INTERRUPTED, OUTPUT_CLOSED} | {cls.exit_code for cls in classes}


def test_the_manual_page_has_the_version() -> None:
    assert f"recvirt {__version__}" in PAGE.read_text().splitlines()[1]


# --- the manual

MANUAL = PAGE.parents[1] / "manual.md"


def test_the_manual_holds_every_key_of_a_profile() -> None:
    """Between the marks stands what ``recvirt profile keys`` prints; copy it there when this fails."""
    text = MANUAL.read_text()
    inside = text.partition("<!-- recvirt profile keys -->\n")[2].partition("<!-- end -->")[0]
    assert inside.strip() == as_markdown().strip()


def test_the_manual_and_readme_call_only_verbs_and_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {word for names in re.findall(r"^([a-z][a-z0-9 -]*):", makefile, re.MULTILINE) for word in names.split()}
    for path in (MANUAL, ROOT / "README.md"):
        text = path.read_text()
        for verb in re.findall(r"(?:^|[`(] ?)recvirt ([a-z]+)", text, re.MULTILINE):
            assert verb in VERBS, f"{path.name}: recvirt {verb}"
        for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE):
            assert target in targets, f"{path.name}: make {target}"


def test_links_between_documents_lead_somewhere() -> None:
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"
