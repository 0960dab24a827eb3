"""Starting programs: what is captured and logged, who is blamed, and that nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from recvirt import run as run_module
from recvirt.errors import CommandError, MissingToolError, RecvirtError, SpaceError
from recvirt.run import Completed, allow_start, find_tool, minimal_env, quote, run, start, stop, stop_all


def sh(script: str, **options: object) -> Completed:
    return run(["sh", "-c", script], **options)  # type: ignore[arg-type]


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_output_is_captured_apart() -> None:
    done = sh("echo out; echo err >&2")
    assert (done.status, done.stdout, done.stderr) == (0, "out\n", "err\n")


@pytest.mark.parametrize("logged", [True, False])
def test_a_failure_is_blamed_with_what_the_program_said_last(tmp_path: Path, logged: bool) -> None:
    script = "for i in $(seq 50); do echo line $i >&2; done; exit 3"
    with pytest.raises(CommandError) as caught:
        sh(script, hint="try again", log_path=tmp_path / "log" if logged else None)
    error = caught.value
    assert error.status == 3
    assert error.last_lines[-1] == "line 50"
    assert error.last_lines[0] == "line 31"
    assert error.hint == "try again"


def test_statuses_that_are_right() -> None:
    assert sh("exit 3", ok_statuses=(0, 3)).status == 3
    assert sh("exit 4", check=False).status == 4


def test_a_log_holds_everything_and_the_error_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    seen: list[str] = []
    with pytest.raises(CommandError) as caught:
        sh("echo one; echo two >&2; exit 1", log_path=log, on_line=seen.append)
    assert seen == ["one", "two"]
    assert log.read_text().splitlines()[1:] == ["one", "two"]
    assert log.read_text().startswith("$ sh -c ")
    assert caught.value.log_path == log
    assert caught.value.last_lines == ("one", "two")


def test_bytes_that_are_no_text_do_not_hurt(tmp_path: Path) -> None:
    assert sh(r"printf '\377\n'").stdout == "\ufffd\n"
    assert sh(r"printf '\377\n'", log_path=tmp_path / "log").status == 0


@pytest.mark.parametrize("logged", [True, False])
def test_a_full_disk_is_an_error_of_its_own(tmp_path: Path, logged: bool) -> None:
    script = "echo 'tar: x: Cannot write: No space left on device' >&2; echo 'tar: Exiting' >&2; exit 2"
    with pytest.raises(SpaceError) as caught:
        sh(script, log_path=tmp_path / "log" if logged else None)
    assert "Cannot write: No space left on device" in caught.value.message
    assert "clean" in caught.value.hint


def test_a_full_disk_for_real(tmp_path: Path) -> None:
    with pytest.raises(SpaceError):
        sh("echo x | tee /dev/full >/dev/null || exit 1", log_path=tmp_path / "log")


def test_stdin_is_closed_unless_text_is_given(tmp_path: Path) -> None:
    assert run(["cat"]).stdout == ""
    assert run(["cat"], input_text="words").stdout == "words"
    seen: list[str] = []
    run(["cat"], input_text="words\n", log_path=tmp_path / "log", on_line=seen.append)
    assert seen == ["words"]


def test_a_stream_is_fed_while_output_is_read(tmp_path: Path) -> None:
    seen: list[str] = []
    big = b"x" * 100 + b"\n"
    run(["cat"], feed=lambda stream: stream.writelines([big] * 20_000), log_path=tmp_path / "log", on_line=seen.append)
    assert len(seen) == 20_000


def test_what_goes_wrong_while_feeding_is_raised(tmp_path: Path) -> None:
    def feed(_stream: object) -> None:
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        run(["cat"], feed=feed, log_path=tmp_path / "log")


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(MissingToolError) as caught:
        run(["recvirt-no-such-program"])
    assert "recvirt-no-such-program" in caught.value.message
    with pytest.raises(MissingToolError, match="bwrap"):
        _find_without_path("bwrap")


def _find_without_path(name: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "minimal_env", lambda: {"PATH": "/nonexistent"})
        return find_tool(name)


def test_the_environment_is_small_and_predictable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("MAKEFLAGS", "-n")
    monkeypatch.setenv("PYTHONPATH", "/x")
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    env = minimal_env({"EXTRA": "1"})
    assert env["LC_ALL"] == "C.UTF-8"
    assert env["https_proxy"] == "http://proxy:3128"
    assert env["EXTRA"] == "1"
    assert env["PATH"] == "/usr/bin:/bin:/usr/sbin:/sbin"
    assert not {"MAKEFLAGS", "PYTHONPATH"} & set(env)
    said = run(["env"]).stdout
    assert "MAKEFLAGS" not in said
    assert "LC_ALL=C.UTF-8" in said


def test_a_command_can_be_pasted() -> None:
    assert quote(["a b", "c'd", "e"]) == "'a b' 'c'\"'\"'d' e"


@pytest.mark.parametrize("logged", [True, False])
def test_a_timeout_ends_the_whole_session(tmp_path: Path, logged: bool) -> None:
    pid_file = tmp_path / "pid"
    started = time.monotonic()
    with pytest.raises(CommandError):
        sh(
            f"sleep 60 & echo $! > {pid_file}; wait",
            timeout_seconds=0.5, log_path=tmp_path / "log" if logged else None,
        )  # fmt: skip
    assert time.monotonic() - started < 20
    assert wait_until(lambda: not is_alive(int(pid_file.read_text())))


def test_stop_ends_a_program_that_does_not_listen() -> None:
    process = start(["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"])
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    assert stop(process, grace_seconds=0.2) == -signal.SIGKILL


def test_children_die_with_a_killed_parent(tmp_path: Path) -> None:
    """``kill -9`` of recvirt while it runs a program, captured, logged or started."""
    script = (
        "import sys; from pathlib import Path; from recvirt.run import run, start\n"
        "p = start(['sleep', '1001'])\n"
        "print(p.pid, flush=True)\n"
        "run(['sh', '-c', 'echo $$ > %s; exec sleep 1002'])\n" % (tmp_path / "pid")
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        started = int(parent.stdout.readline())
        assert wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip() != "")
        captured = int((tmp_path / "pid").read_text())
        assert is_alive(started)
        assert is_alive(captured)
    finally:
        parent.kill()
        parent.wait()
    assert wait_until(lambda: not is_alive(started) and not is_alive(captured))


def test_stop_all_ends_what_runs_and_allows_nothing_new() -> None:
    process = start(["sleep", "1003"])
    try:
        stop_all()
        assert process.wait(10) == -signal.SIGKILL
        with pytest.raises(RecvirtError, match="stopped"):
            start(["true"])
    finally:
        allow_start()
    assert run(["true"]).status == 0


def test_no_descriptor_leaks_into_children() -> None:
    with Path("/dev/null").open() as stream:
        os.set_inheritable(stream.fileno(), True)
        listed = sh("ls /proc/self/fd").stdout.split()
    assert set(listed) <= {"0", "1", "2", "3"}
