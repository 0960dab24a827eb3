"""What a run has sent, so that the next one after ``kill -9`` goes on from there; and the lock between two runs.

A file a target and image: first a line of facts (an upload's identity, as the provider gave it), then a line for each
finished part. Lines are only appended, after the provider has said yes; a last line that a kill cut short is passed
over. So the journal never says more than is true.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from recvirt.run import is_stopping
from recvirt.store import take_lock
from recvirt.ui import reporter


@contextmanager
def target_lock(state_dir: Path, target: str, digest: str) -> Iterator[None]:
    """Let one run at a time of this user send this image to this target; a second one waits, and finds all there."""
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (state_dir / f"{target}-{digest[:32]}.lock").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reporter.info(f"waiting for another recvirt that publishes the same image to {target}")
            take_lock(stream.fileno(), is_stopping)
        yield


def machine_mark(state_dir: Path) -> str:
    """Eight letters that tell this user's half-sent files from another machine's; random, and made once."""
    path = state_dir / "machine"
    if not path.exists():
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = state_dir / f".machine.{os.getpid()}"
        fresh.write_text(secrets.token_hex(4))
        with suppress(FileExistsError):  # of two at once, the first one's counts
            os.link(fresh, path)
        fresh.unlink()
    return path.read_text().strip()


class Journal:
    """The parts that are sent and the facts that go with them. Threads may add parts at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._stream: IO[str] | None = None
        self.facts: dict[str, str] = {}
        self.parts: dict[int, str] = {}
        self._load()

    @classmethod
    @contextmanager
    def open(cls, state_dir: Path, target: str, digest: str) -> Iterator[Journal]:
        """The journal of one target and image; made when something is first written to it."""
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        journal = cls(state_dir / f"{target}-{digest[:32]}.journal")
        try:
            yield journal
        finally:
            journal.close()

    def begin(self, facts: Mapping[str, str]) -> None:
        """Forget what was and begin anew with these facts, in one step."""
        self.close()
        partial = self._path.with_suffix(".part")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(json.dumps({"facts": dict(facts)}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self._path)
        self.facts, self.parts = dict(facts), {}

    def done(self, part: int, value: str = "") -> None:
        """A part has arrived; ``value`` is what the provider wants to hear of it at the end."""
        with self._lock:
            if self._stream is None:
                self._stream = self._path.open("a")
            self._stream.write(json.dumps([part, value]) + "\n")
            self._stream.flush()
            self.parts[part] = value

    def forget(self) -> None:
        """All is published, or will never be: nothing is left to go on from."""
        self.close()
        self._path.unlink(missing_ok=True)
        self.facts, self.parts = {}, {}

    def close(self) -> None:
        """Let the file go."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _load(self) -> None:
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            return
        whole, _, torn = text.rpartition("\n")
        if torn:
            # What is appended next must begin a line of its own.
            os.truncate(self._path, len(whole.encode()) + bool(whole))
        for line in whole.split("\n"):
            try:
                entry = json.loads(line)
                if isinstance(entry, dict):
                    self.facts = {str(k): str(v) for k, v in entry["facts"].items()}
                else:
                    self.parts[int(entry[0])] = str(entry[1])
            except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                continue
