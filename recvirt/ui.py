"""What a person (or a CI log) sees while recvirt works.

Owns: messages on stderr, nested steps with elapsed time, progress with a percentage where it is knowable.
Does not own: results, which commands print on stdout.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


@dataclass
class Reporter:
    """Writes events in one of three shapes: ``live`` (terminal), ``plain`` (lines), ``json`` (an object a line)."""

    mode: str = "auto"
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    verbose: bool = False
    quiet: bool = False
    _depth: threading.local = field(default_factory=threading.local)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _live_text: str = ""
    _last_plain: dict[str, float] = field(default_factory=dict)

    def resolved_mode(self) -> str:
        """``auto`` becomes ``live`` on a terminal and ``plain`` elsewhere."""
        if self.mode != "auto":
            return self.mode
        return "live" if _is_terminal(self.stream) else "plain"

    def _indent(self) -> str:
        return "  " * int(getattr(self._depth, "value", 0))

    def _emit(self, kind: str, text: str, **extra: object) -> None:
        mode = self.resolved_mode()
        with self._lock:
            if mode == "json":
                self.stream.write(json.dumps({"event": kind, "text": text, "time": time.time(), **extra}) + "\n")
            else:
                self._clear_live()
                self.stream.write(f"{self._indent()}{text}\n")
            self.stream.flush()

    def _clear_live(self) -> None:
        if self._live_text:
            self.stream.write("\r\x1b[K")
            self._live_text = ""

    def info(self, text: str) -> None:
        """A line of ordinary news."""
        if not self.quiet:
            self._emit("info", text)

    def warn(self, text: str) -> None:
        """Something that a person should know, though the work goes on."""
        self._emit("warning", f"warning: {text}")

    def error(self, text: str, hint: str = "") -> None:
        """The last word of a command that failed, and what to do next."""
        self._emit("error", f"error: {text}" + (f"\n  hint: {hint}" if hint else ""), hint=hint)

    def detail(self, text: str) -> None:
        """A line for --verbose only."""
        if self.verbose:
            self._emit("detail", text)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Announce a step, nest what happens inside, and tell the elapsed time at its end. Folds in CI logs."""
        fold = os.environ.get("GITHUB_ACTIONS") == "true" and not self._indent()
        if fold:
            self.stream.write(f"::group::{name}\n")
        elif not self.quiet:
            self._emit("step-start", f"{name} ...")
        started = time.monotonic()
        self._depth.value = int(getattr(self._depth, "value", 0)) + 1
        ok = False
        try:
            yield
            ok = True
        finally:
            self._depth.value -= 1
            seconds = time.monotonic() - started
            if fold:
                self.stream.write("::endgroup::\n")
            if ok and not self.quiet:
                self._emit("step-end", f"{name}: done in {format_seconds(seconds)}", seconds=seconds)
            elif not ok:
                self._emit("step-failed", f"{name}: FAILED after {format_seconds(seconds)}", seconds=seconds)

    def progress(self, name: str, done: float, total: float | None, unit: str = "") -> None:
        """Show how far ``name`` has come. Live on a terminal; at most a line each ten seconds elsewhere."""
        if self.quiet:
            return
        percent = f"{100.0 * done / total:3.0f}%" if total else ""
        count = f"{format_amount(done, unit)}" + (f" of {format_amount(total, unit)}" if total else "")
        text = f"{name}: {percent} {count}".replace("  ", " ")
        mode = self.resolved_mode()
        if mode == "live":
            with self._lock:
                self._live_text = text
                self.stream.write(f"\r\x1b[K{self._indent()}{text}"[:200])
                self.stream.flush()
            return
        now = time.monotonic()
        if now - self._last_plain.get(name, -60.0) >= 10.0:
            self._last_plain[name] = now
            self._emit("progress", text, done=done, total=total, unit=unit)


def format_seconds(seconds: float) -> str:
    """``83.2`` becomes ``1 min 23 s``; below a minute one decimal is kept."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s"


def format_amount(value: float, unit: str) -> str:
    """Bytes get a decimal prefix; anything else is a whole number with its unit."""
    if unit == "bytes":
        return format_bytes(value)
    return f"{int(value)}{' ' + unit if unit else ''}"


def format_bytes(value: float) -> str:
    """``1_500_000`` becomes ``1.5 MB`` (decimal prefixes, as disk makers and Debian count)."""
    amount = float(value)
    for prefix in ("B", "kB", "MB", "GB"):
        if abs(amount) < 1000:
            return f"{int(amount)} B" if prefix == "B" else f"{amount:.1f} {prefix}"
        amount /= 1000
    return f"{amount:.1f} TB"


reporter = Reporter()
"""The one reporter of this process; the command line sets its mode."""
