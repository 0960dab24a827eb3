"""Counts what a process does that lasts, by name, and kills it at one of them.

Wrapped are the calls themselves, in the test's own processes: commits, messages, libvirt, files, programs. The product
has no hooks for it.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: libvirt's methods that change nothing; all others count.
_READING = (
    "lookup", "list", "get", "is", "num", "info", "state", "metadata", "XMLDesc", "UUID", "ID", "name", "vcpusFlags",
    "maxMemory", "snapshotLookup", "connect", "domain", "setKeepAlive", "close", "ref", "snapshotNum", "hasCurrent",
    "maxVcpus", "virConn", "networkLookup", "newStream", "c_pointer",
)  # fmt: skip


class Tripwire:
    """``at`` is the call after which the process dies: 0 is before the first one, None never."""

    def __init__(self, log: Path, at: int | None) -> None:
        self._log = log
        self._at = at
        self._count = 0

    def _hit(self) -> None:
        if self._count == self._at:
            os.kill(os.getpid(), signal.SIGKILL)

    def call(self, name: str, function: Callable[..., Any], *args: Any, **words: Any) -> Any:
        """One call that lasts."""
        self._hit()
        result = function(*args, **words)
        self._count += 1
        with self._log.open("a") as stream:
            stream.write(f"{name}\n")
        self._hit()
        return result

    def _wrap(self, owner: Any, attribute: str, name: Callable[..., str | None]) -> None:
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def wrapped(*args: Any, **words: Any) -> Any:
            label = name(*args, **words)
            return function(*args, **words) if label is None else self.call(label, function, *args, **words)

        setattr(owner, attribute, wrapped)

    def stretch(self) -> None:
        """Wrap everything, for the life of this process."""
        self._stretch_database()
        self._stretch_messages()
        self._stretch_libvirt()
        self._stretch_files()

    def _stretch_database(self) -> None:
        from django.db import connection
        from django.db.backends.base.base import BaseDatabaseWrapper
        from django.db.backends.utils import CursorWrapper

        def statement(_self: Any, sql: Any, *_: Any) -> str | None:
            words = str(sql).split()
            writes = words[0] in ("INSERT", "UPDATE", "DELETE")
            return f"autocommit {words[0]}" if writes and not connection.in_atomic_block else None

        self._wrap(BaseDatabaseWrapper, "_commit", lambda _self: "commit")
        self._wrap(CursorWrapper, "execute", statement)

    def _stretch_messages(self) -> None:
        from kombu.message import Message

        from recvirt.nestedcloud.queue import Sender

        self._wrap(Sender, "_send", lambda _self, task, *_args, **_words: f"publish {task.removeprefix('recvirt.')}")
        self._wrap(Message, "ack", lambda *_args, **_words: "acknowledge")

    def _stretch_libvirt(self) -> None:
        import libvirt

        for owner in (libvirt.virConnect, libvirt.virDomain, libvirt.virNetwork, libvirt.virDomainSnapshot):
            for attribute in list(vars(owner)):
                if not attribute.startswith(("_", *_READING)) and callable(getattr(owner, attribute)):
                    name = f"libvirt {owner.__name__}.{attribute}"
                    self._wrap(owner, attribute, lambda *_args, _name=name, **_words: _name)

    def _stretch_files(self) -> None:
        def there(label: str) -> Callable[..., str | None]:
            return lambda path, *_args, **_words: f"{label} {_kind(Path(path))}" if os.path.lexists(path) else None

        self._wrap(Path, "rename", lambda _path, target: f"rename {_kind(Path(target))}")
        self._wrap(Path, "unlink", there("unlink"))
        self._wrap(os, "truncate", there("truncate"))
        self._wrap(os, "fsync", lambda _descriptor: "fsync")


def _kind(path: Path) -> str:
    """A file's name without what is random in it."""
    return "".join(path.suffixes[-2:]).split("-")[0] or "file"
