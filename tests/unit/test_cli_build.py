"""The command line's frame: exits, signals, broken pipes, JSON; and build, plan and clean over small stages."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from recvirt import cli, errors
from recvirt.errors import CommandError, ConfigError, MissingToolError, RecvirtError
from recvirt.ui import reporter
from tests.support.site import HEEDING

ROOT = Path(__file__).resolve().parents[2]


# -- errors become exits -----------------------------------------------------------------------------------------------


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], object]], None]]:
    """``verb(action)`` adds a verb ``act`` that does it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    state = (reporter.mode, reporter.verbose, reporter.quiet)

    def add(action: Callable[[], object]) -> None:
        module = types.ModuleType("recvirt.cli.act")
        vars(module)["act"] = click.Command("act", callback=action)
        monkeypatch.setitem(sys.modules, "recvirt.cli.act", module)
        monkeypatch.setitem(cli.VERBS, "act", "act:act")

    yield add
    reporter.mode, reporter.verbose, reporter.quiet = state
    for number, handler in handlers.items():
        signal.signal(number, handler)


def raising(error: BaseException) -> Callable[[], object]:
    def action() -> None:
        raise error

    return action


def exit_of(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(argv))
    assert isinstance(caught.value.code, int)
    return caught.value.code


def sample(kind: type[RecvirtError]) -> RecvirtError:
    if kind is CommandError:
        return CommandError(["cc"], 1, hint="what to do next")
    if kind is MissingToolError:
        return MissingToolError("cc", "gcc", hint="what to do next")
    return kind("what went wrong", hint="what to do next")


KINDS: list[type[RecvirtError]] = [
    RecvirtError,
    *(c for c in RecvirtError.__subclasses__() if c.__module__ == RecvirtError.__module__),
]


@pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
def test_each_error_has_its_exit_and_its_hint(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str], kind: type[RecvirtError]
) -> None:
    error = sample(kind)
    verb(raising(error))
    reporter.stream = sys.stderr
    assert exit_of("act") == error.exit_code == kind.exit_code
    said = capsys.readouterr()
    assert said.out == ""
    assert f"error: {error.message}" in said.err
    assert "hint: what to do next" in said.err
    assert "Traceback" not in said.err


def test_all_exits_differ() -> None:
    codes = [kind.exit_code for kind in KINDS] + [0, 2, cli.INTERRUPTED, cli.OUTPUT_CLOSED]
    assert len(codes) == len(set(codes))


def test_debug_adds_the_traceback(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    verb(raising(ConfigError("wrong")))
    reporter.stream = sys.stderr
    assert exit_of("--debug", "act") == 3
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said
    assert said.rstrip().endswith("error: wrong")


@pytest.mark.parametrize(
    ("error", "status", "words", "hint"),
    [
        (OSError(28, "x", "/cache/f"), 9, "No space left on device: /cache/f", "recvirt clean"),
        (OSError(122, "x", "/cache/f"), 9, "Disk quota exceeded: /cache/f", "recvirt clean"),
        (OSError(30, "x", "/cache/f"), 1, "Read-only file system: /cache/f", "--cache-dir"),
        (PermissionError(13, "x", "/build/f"), 1, "Permission denied: /build/f", "--build-dir"),
        (FileNotFoundError(2, "x", "/gone"), 1, "No such file or directory: /gone", ""),
    ],
)
def test_what_the_system_refuses_is_told_without_a_traceback(
    verb: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    error: OSError,
    status: int,
    words: str,
    hint: str,
) -> None:
    verb(raising(error))
    reporter.stream = sys.stderr
    assert exit_of("act") == status
    said = capsys.readouterr().err
    assert f"error: {words}" in said
    assert hint in said
    assert "Traceback" not in said


def test_wrong_usage_is_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of("build", "--no-such-option") == 2
    assert exit_of("no-such-verb") == 2
    assert exit_of("clean", "--max-size", "many") == 2
    assert "Usage" in capsys.readouterr().err


def test_success_is_zero(verb: Callable[..., None]) -> None:
    verb(lambda: None)
    assert exit_of("act") == 0
    verb(lambda: click.get_current_context().exit(7))
    assert exit_of("act") == 7


def test_a_bug_is_not_dressed_up(verb: Callable[..., None]) -> None:
    verb(raising(KeyError("bug")))
    with pytest.raises(KeyError):
        cli.main(["act"])


def test_from_os_error_says_during_what() -> None:
    assert errors.from_os_error(OSError(5, "x"), "reading").message == "reading: Input/output error"


# -- the real thing in a process of its own ----------------------------------------------------------------------------


class Lab:
    """Runs the command line over fake stages (``tests.support.lab``)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "LAB_DIR": str(folder), "PYTHONPATH": str(ROOT)}

    @property
    def cache(self) -> Path:
        return self.folder / "cache dir ä"

    def argv(self, *words: str) -> list[str]:
        places = ["--cache-dir", str(self.cache), "--build-dir", str(self.folder / "build dir ä")]
        return [sys.executable, "-m", "tests.support.lab", *places, *words]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(*words), env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip

    def start(self, *words: str, **options: object) -> subprocess.Popen[str]:
        return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
            [*HEEDING, *self.argv(*words)], env=self.environment, cwd=self.folder, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, **options,
        )  # fmt: skip

    def work_folders(self) -> list[str]:
        work = self.cache / "work"
        return sorted(path.name for path in work.iterdir()) if work.exists() else []

    def hanging(self, *words: str, **options: object) -> tuple[subprocess.Popen[str], int]:
        """A build that has come to its long programs, and their process group."""
        (self.folder / "hang").touch()
        process = self.start(*words, "build", **options)
        for _ in range(600):
            if (self.folder / "pid").exists():
                return process, int((self.folder / "pid").read_text())
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        raise AssertionError("it did not come to its programs")


def gone(group: int) -> bool:
    """Whether a process group ends within seconds."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def test_build_plan_and_reuse_as_json(lab: Lab) -> None:
    planned = json.loads(lab.run("plan", "--json").stdout)
    assert [(item["stage"], item["action"]) for item in planned] == [
        ("base", "build"), ("left", "build"), ("right", "build"), ("top", "build"),
    ]  # fmt: skip
    assert planned[0]["reasons"] == ["never built for this profile"]
    built = lab.run("build", "--json")
    assert built.returncode == 0, built.stderr
    facts = json.loads(built.stdout)
    assert facts["profile"] == "default"
    for item in facts["stages"]:
        assert (Path(item["directory"]) / f"{item['stage']}.txt").exists()
    again = json.loads(lab.run("build", "--json").stdout)
    assert {item["action"] for item in again["stages"]} == {"reuse"}
    lines = lab.run("plan", "--until", "left").stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["base", "reuse"], ["left", "reuse"]]


def test_plain_words_for_people(lab: Lab) -> None:
    first = lab.run("build")
    assert "default: built base, " in first.stderr
    assert first.stdout == ""
    second = lab.run("build")
    assert re.search(r"default: nothing changed \([\d.]+ s\)", second.stderr)
    assert lab.run("--quiet", "build").stderr == ""


def test_progress_as_json_is_an_object_a_line(lab: Lab) -> None:
    (lab.folder / "full").touch()
    failed = lab.run("--progress", "json", "build")
    assert failed.returncode == 9
    events = [json.loads(line) for line in failed.stderr.splitlines()]
    assert {"step-start", "step-end", "step-failed", "error"} <= {event["event"] for event in events}
    assert all(isinstance(event["time"], float) and isinstance(event["text"], str) for event in events)
    assert "recvirt clean" in events[-1]["hint"]


def test_a_full_disk_leaves_what_was_whole(lab: Lab) -> None:
    (lab.folder / "full").touch()
    failed = lab.run("build")
    assert failed.returncode == 9
    assert "error: right: the disk is full" in failed.stderr
    assert lab.work_folders() == []
    (lab.folder / "full").unlink()
    carried_on = lab.run("build")
    assert carried_on.returncode == 0
    assert re.search(r"default: built (left, )?right, (left, )?top", carried_on.stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_cleanly(lab: Lab, number: signal.Signals) -> None:
    # Under nohup(1) the tests themselves ignore SIGHUP, and children inherit that.
    process, group = lab.hanging(preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "error: interrupted" in said
    assert "Traceback" not in said
    assert gone(group)
    assert lab.work_folders() == []
    (lab.folder / "hang").unlink()
    assert re.search(r"default: built (right, )?left, (right, )?top", lab.run("build").stderr)


def test_after_sigkill_nothing_lives_and_the_next_run_clears_up(lab: Lab) -> None:
    # What a program starts in turn is the sandbox's business: its PID namespace ends with it (tests/stages).
    (lab.folder / "alone").touch()
    process, group = lab.hanging()
    process.kill()
    process.communicate(timeout=30)
    assert gone(group)
    assert [name for name in lab.work_folders() if name.startswith("left-")]
    (lab.folder / "hang").unlink()
    assert re.search(r"default: built (right, )?left, (right, )?top", lab.run("build").stderr)
    assert lab.work_folders() == []


def test_a_killed_child_is_an_error(lab: Lab) -> None:
    process, group = lab.hanging()
    os.killpg(group, signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 5
    assert "was killed by signal 9" in said
    assert lab.work_folders() == []


def test_what_nohup_ignores_stays_ignored(lab: Lab) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process, _ = lab.hanging(preexec_fn=ignore)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_ctrl_c_reaches_recvirt_but_not_its_programs(lab: Lab) -> None:
    """A terminal signals the whole foreground group; the programs are in sessions of their own and ended by us."""
    process, group = lab.hanging(start_new_session=True)
    assert os.getpgid(process.pid) != group
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, gone(group)) == (130, True)
    assert "was killed" not in said


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_goes_away_ends_it_quietly(lab: Lab, stream: str) -> None:
    (lab.folder / "flood").touch()
    words = ["plan", "--json"] if stream == "stdout" else ["build"]
    process = lab.start(*words)
    pipe = process.stdout if stream == "stdout" else process.stderr
    assert pipe is not None
    pipe.close()
    other = process.stderr if stream == "stdout" else process.stdout
    assert other is not None
    said = other.read()
    assert process.wait(30) == cli.OUTPUT_CLOSED
    assert said == ""
    assert lab.work_folders() == []


def test_clean_speaks_json_and_frees_what_it_says(lab: Lab) -> None:
    lab.run("build")
    told = json.loads(lab.run("clean", "--older-than", "0", "--dry-run", "--json").stdout)
    assert sorted(Path(item["path"]).parent.name for item in told) == ["base", "left", "right", "top"]
    assert all(Path(item["path"]).exists() and item["bytes"] > 0 for item in told)
    assert "freed" in lab.run("clean", "--older-than", "0").stdout
    assert not any(Path(item["path"]).exists() for item in told)
    assert lab.run("clean").stdout == "0 B freed\n"


def test_a_cache_that_can_not_be_made_is_told(lab: Lab) -> None:
    (lab.folder / "file").write_text("")
    failed = lab.run("--cache-dir", str(lab.folder / "file" / "cache"), "build")
    assert failed.returncode == 1
    assert f"error: Not a directory: {lab.folder / 'file' / 'cache'}" in failed.stderr
    assert "Traceback" not in failed.stderr
