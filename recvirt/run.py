"""The only user of :mod:`subprocess`. Owns how programs are started, logged, ended and blamed.

Every child gets a minimal environment, a closed stdin, its own session, and dies with recvirt
(``setpriv --pdeathsig``: prctl(2), PR_SET_PDEATHSIG). What a child starts in turn ends with it where it runs in a PID
namespace, as the sandbox and the bootstrapper do: so a killed build leaves no process behind.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from recvirt.errors import CommandError, MissingToolError, RecvirtError, SpaceError
from recvirt.ui import reporter

#: Which Debian package brings a program, for the hint of MissingToolError.
PACKAGES = {
    "bwrap": "bubblewrap",
    "mmdebstrap": "mmdebstrap",
    "debootstrap": "debootstrap",
    "newuidmap": "uidmap",
    "setpriv": "util-linux",
    "unshare": "util-linux",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "tar": "tar",
    "gpgv": "gpgv",
    "git": "git",
    "virsh": "libvirt-clients",
}

_KEPT_VARIABLES = (
    "PATH", "HOME", "USER", "LOGNAME", "TERM", "TMPDIR", "SSL_CERT_FILE",
    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "all_proxy",
)  # fmt: skip
_TAIL_LINES = 20
#: Programs under way, for :func:`stop_all`. Weak: a finished and forgotten one drops out by itself.
_stopping = threading.Event()
_starting = threading.Lock()
_running: weakref.WeakSet[subprocess.Popen[bytes]] = weakref.WeakSet()


@dataclass(frozen=True)
class Completed:
    """What a finished program left: its status and what it wrote (text, undecodable bytes replaced)."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str


def minimal_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment every child gets: few variables of ours (proxies among them), C.UTF-8, and ``extra``."""
    env = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    env.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    # An ordinary user's PATH often lacks sbin, where mkfs and friends live.
    for folder in ("/usr/sbin", "/sbin"):
        if folder not in env["PATH"].split(":"):
            env["PATH"] += f":{folder}"
    # apt reads only the small letters.
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        if name.upper() in env:
            env.setdefault(name, env[name.upper()])
    env["LC_ALL"] = "C.UTF-8"
    env.update(extra or {})
    return env


def find_tool(name: str) -> str:
    """The path of a program on the host, or MissingToolError naming its package."""
    found = shutil.which(name, path=minimal_env()["PATH"])
    if found is None:
        raise MissingToolError(name, PACKAGES.get(name, name))
    return found


def quote(argv: Iterable[str]) -> str:
    """The command as one would paste it into a shell."""
    return " ".join(shlex.quote(word) for word in argv)


def bound_argv(argv: Sequence[str]) -> list[str]:
    """``argv``, made to die with the thread that started it.

    The shell starts it only if that is still there: we may have been killed before the signal was arranged.
    """
    guard = f'[ "$PPID" = {os.getpid()} ] && exec "$@"'
    return [find_tool("setpriv"), "--pdeathsig", "KILL", "--", "/bin/sh", "-c", guard, "sh", *argv]


def start(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
    stdout: int | None = subprocess.PIPE,
    stderr: int | None = subprocess.STDOUT,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a long-lived program (QEMU, a server) in its own session and hand back its handle."""
    reporter.detail(f"$ {quote(argv)}")
    if _stopping.is_set():
        raise RecvirtError("stopped: another part of the build failed or was interrupted")
    environment = minimal_env(env)
    # setpriv would say so too, but only in its child's status.
    if "/" not in argv[0] and shutil.which(argv[0], path=environment["PATH"]) is None:
        raise MissingToolError(argv[0], PACKAGES.get(argv[0], argv[0]))
    process = subprocess.Popen(
        bound_argv(argv), cwd=cwd, env=environment, stdin=stdin, stdout=stdout, stderr=stderr,
        start_new_session=True, pass_fds=pass_fds,
    )  # fmt: skip
    with _starting:
        _running.add(process)
    if _stopping.is_set():
        # stop_all() came between the two looks, and may have missed this one.
        _kill_session(process)
    return process


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def stop_all() -> None:
    """End every program that this process started and has not ended, and start no more: the way out of a failed build.

    :func:`allow_start` lifts the ban.
    """
    _stopping.set()
    with _starting:
        running = list(_running)
    for process in running:
        if process.poll() is None:
            _kill_session(process)


def is_stopping() -> bool:
    """Whether :func:`stop_all` was called: whoever waits should give up."""
    return _stopping.is_set()


def allow_start() -> None:
    """Programs may be started again after :func:`stop_all`."""
    _stopping.clear()


def stop(process: subprocess.Popen[bytes], *, grace_seconds: float = 5.0) -> int:
    """End a program and all of its session: politely first, then surely. Returns its status."""
    for number, patience in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 5.0)):
        if process.poll() is not None:
            break
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    # A child of the session may have outlived its leader.
    _kill_session(process)
    return process.wait()


def run(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input_text: str | None = None,
    log_path: Path | None = None,
    check: bool = True,
    ok_statuses: Sequence[int] = (0,),
    timeout_seconds: float | None = None,
    on_line: Callable[[str], None] | None = None,
    feed: Callable[[BinaryIO], None] | None = None,
    hint: str = "",
) -> Completed:
    """Run a program to its end, quietly; show what it said only if it failed.

    ``feed`` writes the program's standard input from a thread of its own (large streams); it needs ``log_path``.
    Without ``log_path`` stdout and stderr are captured apart and returned. With it both are appended to that file
    as they come (``stdout`` of the result then is empty), each line also given to ``on_line``.
    Raises CommandError (with the last lines) unless the status is in ``ok_statuses`` or ``check`` is off.
    """
    reporter.detail(f"$ {quote(argv)}")
    if log_path is None and on_line is None:
        return _run_captured(argv, cwd, env, input_text, check, ok_statuses, timeout_seconds, hint)
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    piped = input_text is not None or feed is not None
    process = start(argv, cwd=cwd, env=env, stdin=subprocess.PIPE if piped else subprocess.DEVNULL)
    feeder = _Feeder(process, feed) if feed is not None else None
    timer = threading.Timer(timeout_seconds, stop, (process,)) if timeout_seconds else None
    try:
        if timer:
            timer.start()
        if input_text is not None and process.stdin is not None:
            process.stdin.write(input_text.encode())
            process.stdin.close()
        _copy_lines(process, argv, log_path, tail, on_line)
        status = process.wait()
    finally:
        if timer:
            timer.cancel()
        stop(process)
    if feeder is not None:
        feeder.finish()
    if check and status not in ok_statuses:
        raise _blame(argv, status, log_path, list(tail), hint)
    return Completed(tuple(argv), status, "", "\n".join(tail))


class _Feeder:
    """Writes a program's standard input while its output is read elsewhere."""

    def __init__(self, process: subprocess.Popen[bytes], feed: Callable[[BinaryIO], None]) -> None:
        assert process.stdin is not None
        self._stream: IO[bytes] = process.stdin
        self._feed = feed
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        try:
            with self._stream as stream:
                self._feed(stream)  # type: ignore[arg-type]
        except BrokenPipeError:
            pass  # the program ended early: its status tells why
        except BaseException as error:  # handed to whoever waits
            self._error = error

    def finish(self) -> None:
        """Wait for the last byte; raise what went wrong while writing."""
        self._thread.join()
        if self._error is not None:
            raise self._error


def _copy_lines(
    process: subprocess.Popen[bytes],
    argv: Sequence[str],
    log_path: Path | None,
    tail: deque[str],
    on_line: Callable[[str], None] | None,
) -> None:
    assert process.stdout is not None
    log = log_path.open("a", encoding="utf-8") if log_path is not None else None
    try:
        if log is not None:
            log.write(f"$ {quote(argv)}\n")
        for raw in process.stdout:
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            if log is not None:
                log.write(line + "\n")
                log.flush()
            tail.append(line)
            if on_line is not None:
                on_line(line)
    finally:
        if log is not None:
            log.close()


def _run_captured(
    argv: Sequence[str],
    cwd: Path | None,
    env: Mapping[str, str] | None,
    input_text: str | None,
    check: bool,
    ok_statuses: Sequence[int],
    timeout_seconds: float | None,
    hint: str,
) -> Completed:
    stdin = subprocess.PIPE if input_text is not None else subprocess.DEVNULL
    process = start(argv, cwd=cwd, env=env, stdin=stdin, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(input_text.encode() if input_text is not None else None, timeout_seconds)
    except subprocess.TimeoutExpired:
        stop(process)
        raise CommandError(
            argv, -signal.SIGKILL, last_lines=[f"no end after {timeout_seconds:.0f} s"], hint=hint
        ) from None
    finally:
        stop(process)
    result = Completed(tuple(argv), process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))
    if check and result.status not in ok_statuses:
        lines = (result.stderr or result.stdout).splitlines()[-_TAIL_LINES:]
        raise _blame(argv, result.status, None, lines, hint)
    return result


def _blame(argv: Sequence[str], status: int, log_path: Path | None, tail: list[str], hint: str) -> Exception:
    full = [line.strip() for line in tail if "No space left on device" in line]
    if full:
        where = f" (log: {log_path})" if log_path else ""
        return SpaceError(
            f"the disk is full: {full[-1]}{where}",
            hint="free some room (recvirt clean --dry-run shows what the cache holds) or set --cache-dir",
        )
    return CommandError(argv, status, log_path=log_path, last_lines=tail, hint=hint)
