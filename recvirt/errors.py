"""The error tree. Owns messages, hints and exit codes; only ``cli.main`` turns them into an exit."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class RecvirtError(Exception):
    """Base of every error meant for a person: what went wrong, and what to do next."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True, order=True)
class Problem:
    """One fault in a configuration file: where it stands and what is wrong.

    ``line`` counts from 1; 0 means that the line is not known. ``path`` is the field, as ``root.users[0].name``.
    """

    file: str
    line: int
    path: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.path}: {self.message}" if self.path else f"{where}: {self.message}"


class ConfigError(RecvirtError):
    """A profile, fragment or list is wrong. Carries every problem found, not only the first."""

    exit_code = 3

    def __init__(self, problems: Sequence[Problem] | str, *, hint: str = "") -> None:
        self.problems: tuple[Problem, ...] = () if isinstance(problems, str) else tuple(problems)
        text = problems if isinstance(problems, str) else "\n".join(str(p) for p in problems)
        super().__init__(text, hint=hint)


class MissingToolError(RecvirtError):
    """A program that the host must bring is not there."""

    exit_code = 4

    def __init__(self, tool: str, package: str, *, hint: str = "") -> None:
        super().__init__(
            f"{tool} is not installed", hint=hint or f"install it: apt install {package}   (recvirt doctor lists all)"
        )
        self.tool = tool
        self.package = package


class CommandError(RecvirtError):
    """A program ended with a status that was not expected. Shows its last lines and where the whole log is."""

    exit_code = 5

    def __init__(
        self,
        argv: Sequence[str],
        status: int,
        *,
        log_path: Path | None = None,
        last_lines: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        text = f"{argv[0] if argv else '?'} {how}"
        if last_lines:
            text += "\n" + "\n".join(f"  | {line}" for line in last_lines)
        if log_path is not None:
            text += f"\n  the whole log: {log_path}"
        super().__init__(text, hint=hint)
        self.argv = tuple(argv)
        self.status = status
        self.log_path = log_path
        self.last_lines = tuple(last_lines)


class StageError(RecvirtError):
    """A stage could not produce its output."""

    exit_code = 6


class AcceptanceError(RecvirtError):
    """The image was built, but did not prove what its profile promises."""

    exit_code = 7


class PublishError(RecvirtError):
    """A provider refused, or what it holds is not what was sent."""

    exit_code = 8


class SpaceError(RecvirtError):
    """Not enough room on a disk, found before or during the work."""

    exit_code = 9


class DownloadError(RecvirtError):
    """Something could not be fetched, or what came is not what was asked for."""

    exit_code = 10


class VerificationError(RecvirtError):
    """A signature, a digest or a size does not hold."""

    exit_code = 11


class GuestError(RecvirtError):
    """A virtual machine did not start, died or fell silent. Carries its last console lines."""

    exit_code = 12


class LockedError(RecvirtError):
    """Another recvirt works on the same thing and waiting was not wanted."""

    exit_code = 13


def from_os_error(error: OSError, doing: str = "") -> RecvirtError:
    """What the system refused, as an error for a person; ``doing`` says during what."""
    where = f": {error.filename}" if error.filename else ""
    text = f"{doing + ': ' if doing else ''}{os.strerror(error.errno) if error.errno else error}{where}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SpaceError(text, hint="free some room (recvirt clean --dry-run shows what the cache holds)")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return RecvirtError(text, hint="choose a place that you may write to: --cache-dir, --build-dir")
    return RecvirtError(text)
