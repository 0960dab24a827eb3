"""Every command explains itself; the manual page has all of them; documents call only what is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.shell_completion import get_completion_class
from click.testing import CliRunner

from recvirt import __version__
from recvirt.nestedcloud.cli import main_group
from recvirt.nestedcloud.statuses import ExitStatus

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "recvirt/resources/packages/recvirt-cloud/root/usr/share/man/man1/recvirt-cloud.1"
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command with the words that call it, groups too."""
    todo: list[tuple[str, click.Command]] = [("", main_group)]
    while todo:
        words, command = todo.pop()
        if words:
            yield words, command
        if isinstance(command, click.Group):
            todo += [(f"{words} {name}".strip(), child) for name, child in command.commands.items()]


COMMANDS = dict(commands())


def unparsed(line: str) -> str:
    """What is wrong with a command line, beginning with ``recvirt-cloud``; nothing when it would run."""
    words = shlex.split(line, comments=True)[1:]
    for number, word in enumerate(words):
        if word in ("|", ">", "<", "&&", ";"):
            words = words[:number]
            break
    command: click.Command = main_group
    context = click.Context(main_group, info_name="recvirt-cloud")
    try:
        while True:
            if "--help" in words:
                return ""
            if not isinstance(command, click.Group):
                command.make_context(command.name, list(words), parent=context.parent)
                return ""
            _, words, _ = command.make_parser(context).parse_args(list(words))
            child = command.commands.get(words[0] if words else "")
            if child is None:
                return f"no command {words[:1]}"
            command, words = child, words[1:]
            context = click.Context(command, info_name=command.name, parent=context)
    except click.UsageError as error:
        # A file of the reader's.
        return "" if "does not exist" in error.format_message() else error.format_message()


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_has_help_with_an_example_that_it_takes(words: str) -> None:
    text = CliRunner().invoke(main_group, [*words.split(), "--help"]).output
    examples = text.partition("Example")[2].partition("Options:")[0].replace("\\\n", " ").splitlines()
    lines = [line[line.index("recvirt-cloud") :] for line in examples if "recvirt-cloud" in line]
    # A group's example may be any of its commands.
    own = [line for line in lines if re.search(rf"recvirt-cloud (--\w+ \S+ )?{words}\b", line)]
    assert own, text
    assert [fault for line in lines if (fault := unparsed(line))] == [], text


@pytest.mark.parametrize("words", COMMANDS)
def test_every_option_says_what_it_does(words: str) -> None:
    for parameter in COMMANDS[words].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{words} {parameter.name}"


@pytest.mark.parametrize(("line", "fault"), [
    ("frob", "no command"), ("volume frob", "no command"), ("volume", "no command"), ("show", "Missing"),
    ("list --frob", "frob"), ("--frob list", "frob"), ("rescale web --vcpus", "vcpus"),
    ("rescale web --vcpus many", "many"), ("volume allocate data --size big", "big"),
    ("list", ""), ("volume --help", ""), ("--project shop show web --json | less", ""),
])  # fmt: skip
def test_a_wrong_line_is_found(line: str, fault: str) -> None:
    said = unparsed(f"recvirt-cloud {line}")
    assert (fault in said) if fault else said == ""


def lines_of(path: Path) -> Iterator[str]:
    """The calls of ``recvirt-cloud`` in a document: lines of code blocks, and code within a line."""
    text = path.read_text().replace("\\\n", " ")
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        if code.startswith("recvirt-cloud "):
            yield code
    for line in text.splitlines():
        if found := re.match(r"(?: {4,}|\t)?(?:sudo (?:-u \S+ )?)?(recvirt-cloud .*)", line):
            yield found[1]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_call_only_what_is_there(path: Path) -> None:
    # "..." stands for what a reader fills in.
    wrong = {line: fault for line in lines_of(path) if (fault := unparsed(line.replace("...", "x")))}
    assert wrong == {}


def test_the_guides_are_looked_at() -> None:
    assert len(list(lines_of(ROOT / "docs/cloud.md"))) > 5
    assert len(list(lines_of(ROOT / "docs/operating.md"))) > 20


@pytest.mark.parametrize(("shell", "word"), [("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "complete ")])
def test_completion_scripts(shell: str, word: str) -> None:
    text = CliRunner().invoke(main_group, ["completion", shell]).output
    assert word in text and "_RECVIRT_CLOUD_COMPLETE" in text


def test_completion_answers() -> None:
    kind = get_completion_class("bash")
    assert kind is not None
    words = kind(main_group, {}, "recvirt-cloud", "_RECVIRT_CLOUD_COMPLETE").get_completions(["volume"], "al")
    assert [item.value for item in words] == ["allocate"]


# --- the manual page


def page_sections() -> dict[str, str]:
    """Command to what the page says of it: its head, and the text up to the next one, without roff's marks."""
    found: dict[str, str] = {}
    for part in PAGE.read_text().split("\n.TP\n")[1:]:
        plain = re.sub(r'(?m)^\.\w+ ?|\\f.|"', "", part.replace("\\-", "-"))
        head = re.sub(r"\s+", " ", plain.split("\n", 1)[0])
        names = [words for words in COMMANDS if re.match(rf"{words}(?![\w-])", head)]
        if names:
            found[max(names, key=len)] = re.sub(r"\s+", " ", plain)
    return found


@pytest.mark.parametrize("words", [w for w, command in COMMANDS.items() if not isinstance(command, click.Group)])
def test_the_manual_page_has_every_command_with_its_options(words: str) -> None:
    text = page_sections().get(words, "")
    assert text, f"{words} is not in the manual page"
    # Told once, for all commands that have them.
    common = {"--json", "--wait", "--no-wait", "--timeout"}
    for parameter in COMMANDS[words].params:
        if isinstance(parameter, click.Option):
            for option in {*parameter.opts, *parameter.secondary_opts} - common:
                assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{words} {option}"


def test_the_manual_page_names_no_option_that_is_not_there() -> None:
    text = PAGE.read_text().replace("\\-", "-")
    known = {
        option for command in (main_group, *COMMANDS.values()) for p in command.params
        for option in p.opts + p.secondary_opts
    } | {"-h", "--help", "-u", "-Tutf8", "-man"}  # fmt: skip
    assert set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", text)) <= known
    for option in ("--json", "--wait", "--no-wait", "--timeout", "--project", "--version", "--help"):
        assert option in text


def test_the_manual_page_tells_every_exit_status() -> None:
    assert {int(number) for number in re.findall(r"^(\d+)\|", PAGE.read_text(), re.MULTILINE)} == set(ExitStatus)


def test_the_manual_page_has_the_version() -> None:
    assert f'"recvirt {__version__}"' in next(line for line in PAGE.read_text().splitlines() if line.startswith(".TH"))


def test_the_wheel_ships_the_same_page() -> None:
    assert PAGE.relative_to(ROOT).as_posix() in (ROOT / "setup.cfg").read_text()
