"""Places that a static tree of files can be published to: a folder here, or a WebDAV server.

A file is whole or absent under its name: it is written under another one and moved. That one bears the mark of this
machine: another that sends the same file at the same time has its own. S3 has a module of its own.
"""

from __future__ import annotations

import os
import shutil
import urllib.parse
import xml.etree.ElementTree as ET
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from recvirt.disk.sparse import copy_sparse
from recvirt.errors import PublishError
from recvirt.publish.errors import DeniedError
from recvirt.publish.http import Http
from recvirt.publish.transfer import FileBody, Progress
from recvirt.store import check_room, remove_tree

#: Small files (indexes, manifests) are read whole, up to here.
SMALL_BYTES = 16 << 20
_CHUNK = 1 << 20
_PART = ".part"
#: What is sent at once where an upload can be gone on with.
_PIECE_BYTES = 16 << 20
#: In the header DAV of Apache's mod_dav_fs.
_APACHE = "<http://apache.org/dav/propset/fs/1>"


class Tree(ABC):
    """A tree of files. Names are relative, with slashes."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """A file's size, or None when it is not there."""

    @abstractmethod
    def chunks(self, name: str) -> Iterator[bytes]:
        """A file's content, piece by piece. PublishError when it is not there."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Make a small file hold ``data``, in one step."""

    @abstractmethod
    def put(self, name: str, source: Path, sha256: str, progress: Progress) -> int:
        """Make a file the copy of ``source``, in one step. How many bytes were sent now: an earlier run's may count."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """The names in a folder; none when it is not there."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file or a folder with all in it; what is not there is no fault."""

    def read(self, name: str) -> bytes | None:
        """A small file, or None when it is not there."""
        size = self.size(name)
        if size is None:
            return None
        if size > SMALL_BYTES:
            raise PublishError(f"{name} in the mirror is too large for what it should be ({size} bytes)")
        return b"".join(self.chunks(name))


class FolderTree(Tree):
    """A folder of this machine (or one that is mounted)."""

    def __init__(self, folder: Path, mark: str) -> None:
        self._folder = folder
        self._part = f".{mark}{_PART}"

    def size(self, name: str) -> int | None:
        """See :class:`Tree`."""
        path = self._folder / name
        return path.stat().st_size if path.is_file() else None

    def chunks(self, name: str) -> Iterator[bytes]:
        """See :class:`Tree`."""
        with (self._folder / name).open("rb") as stream:
            while data := stream.read(_CHUNK):
                yield data

    def write(self, name: str, data: bytes) -> None:
        """See :class:`Tree`."""
        path = self._made(name)
        partial = path.with_name(f".{path.name}{self._part}")
        partial.write_bytes(data)
        self._settle(partial, path)

    def put(self, name: str, source: Path, sha256: str, progress: Progress) -> int:
        """See :class:`Tree`. Holes stay holes."""
        del sha256
        path = self._made(name)
        partial = path.with_name(f".{path.name}{self._part}")
        check_room(path.parent, source.stat().st_blocks * 512)
        copy_sparse(source, partial)
        size = source.stat().st_size
        progress.add(size)
        self._settle(partial, path)
        return size

    def _made(self, name: str) -> Path:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @staticmethod
    def _settle(partial: Path, path: Path) -> None:
        partial.chmod(0o644)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(path)

    def names(self, folder: str) -> list[str]:
        """See :class:`Tree`."""
        path = self._folder / folder
        return sorted(child.name for child in path.iterdir()) if path.is_dir() else []

    def remove(self, name: str) -> None:
        """See :class:`Tree`."""
        path = self._folder / name
        if path.is_dir():
            remove_tree(path)
        else:
            path.unlink(missing_ok=True)

    def free_bytes(self) -> int:
        """Room on its disk."""
        folder = next(path for path in (self._folder, *self._folder.parents) if path.exists())
        return shutil.disk_usage(folder).free


class WebDavTree(Tree):
    """A collection of a WebDAV server (RFC 4918).

    A PUT with Content-Range is no part of HTTP that all take: RFC 9110 (14.5) lets servers refuse it, and some (as
    golang's webdav) take the piece for the whole. So an upload is gone on with only where the server is known to do
    it: Apache, which tells by a property set of its own. Whatever arrives, the reading back decides.
    """

    def __init__(self, url: str, http: Http, mark: str) -> None:
        self._url = url.rstrip("/")
        self._part = f".{mark}{_PART}"
        self._http = http
        self._known: set[str] = set()

    def _at(self, name: str) -> str:
        return f"{self._url}/{urllib.parse.quote(name)}"

    def size(self, name: str) -> int | None:
        """See :class:`Tree`."""
        answer = self._http.call(f"look for {name}", "HEAD", self._at(name), ok=(200, 404), redirects=False)
        return int(answer.headers.get("Content-Length", 0)) if answer.status_code == 200 else None

    def chunks(self, name: str) -> Iterator[bytes]:
        """See :class:`Tree`. A connection that is cut is gone on with from the last byte."""
        offset, total = 0, self.size(name) or 0
        while offset < total or not total:
            headers = {"Range": f"bytes={offset}-"} if offset else {}
            answer = self._http.call(f"read {name}", "GET", self._at(name), ok=(200, 206), headers=headers, stream=True)
            skip = offset if answer.status_code == 200 else 0
            before = offset
            try:
                for data in answer.iter_content(_CHUNK):
                    part, skip = data[skip:], max(0, skip - len(data))
                    offset += len(part)
                    yield part
            except OSError:  # requests' errors are its children
                if offset == before:
                    raise PublishError(f"{name} can't be read back: the connection is cut each time") from None
                continue
            if offset < total and offset == before:
                raise PublishError(f"{name} can't be read back: it ends after {offset} of {total} bytes")
            if not total:
                return

    def write(self, name: str, data: bytes) -> None:
        """See :class:`Tree`."""
        self._folders(name)
        part = self._at(name) + self._part
        self._http.call(f"write {name}", "PUT", part, ok=(200, 201, 204), body=data)
        self._settle(name)

    def put(self, name: str, source: Path, sha256: str, progress: Progress) -> int:
        """See :class:`Tree`."""
        del sha256
        self._folders(name)
        total, first = source.stat().st_size, 0
        if self._takes_pieces and total:
            first = self._sent_before(name, total)
            for start in range(first, total, _PIECE_BYTES):
                self._put_piece(name, source, progress, start, min(start + _PIECE_BYTES, total))
        else:
            part = self._at(name) + self._part
            self._http.call(f"send {name}", "PUT", part, ok=(200, 201, 204), body=lambda: FileBody(source, progress))
        self._settle(name)
        return total - first

    @cached_property
    def _takes_pieces(self) -> bool:
        answer = self._http.call("ask what the server can do", "OPTIONS", f"{self._url}/", ok=(200, 204))
        return _APACHE in answer.headers.get("DAV", "")

    def _sent_before(self, name: str, total: int) -> int:
        """How much of it a killed run has left. A longer one is somebody else's doing, and goes."""
        there = self.size(name + self._part) or 0
        if there <= total:
            return there
        self.remove(name + self._part)
        return 0

    def _put_piece(self, name: str, source: Path, progress: Progress, start: int, end: int) -> None:
        self._http.call(
            f"send {name}", "PUT", self._at(name) + self._part, ok=(200, 201, 204),
            headers={"Content-Range": f"bytes {start}-{end - 1}/{source.stat().st_size}"},
            body=lambda: FileBody(source, progress, start, end - start),
        )  # fmt: skip

    def _settle(self, name: str) -> None:
        headers = {"Destination": self._at(name), "Overwrite": "T"}
        what = f"move {name} into place"

        def move() -> None:
            # Never twice: a MOVE whose answer was lost has been done, and servers delete the target before they find
            # that there is nothing to move (golang's webdav does).
            if self.size(name + self._part) is not None:
                self._http.call(what, "MOVE", self._at(name) + self._part, ok=(201, 204), headers=headers, once=True)
            elif self.size(name) is None:
                raise PublishError(f"{name} was sent, and is not there", hint="publish it again")

        self._http.budget.call(what, move)

    def _folders(self, name: str) -> None:
        parts = name.split("/")[:-1]
        for count in range(len(parts) + 1):
            folder = "/".join(parts[:count])
            if folder in self._known:
                continue
            # 405: it is there already (RFC 4918, 9.3.1); some servers say 301.
            url = self._at(folder) if folder else self._url + "/"
            what = f"make the folder {folder}"
            try:
                self._http.call(what, "MKCOL", url, ok=(201, 301, 405), redirects=False)
            except DeniedError:
                # Apache says so of a folder that another machine makes at this moment.
                if self._http.call(what, "PROPFIND", url, ok=(207, 404), headers={"Depth": "0"}).status_code != 207:
                    raise
            self._known.add(folder)

    def names(self, folder: str) -> list[str]:
        """See :class:`Tree`."""
        url = self._at(folder) + "/"
        answer = self._http.call(f"list {folder}", "PROPFIND", url, ok=(207, 404), headers={"Depth": "1"})
        if answer.status_code == 404:
            return []
        own = urllib.parse.urlsplit(url).path.rstrip("/")
        found = set()
        try:
            hrefs = ET.fromstring(answer.content).iterfind(".//{DAV:}href")  # noqa: S314 (expat bounds entities)
        except ET.ParseError as error:
            raise PublishError(f"the server's list of {folder} is no XML: {error}") from None
        for href in hrefs:
            path = urllib.parse.unquote(urllib.parse.urlsplit(href.text or "").path).rstrip("/")
            if path and path != urllib.parse.unquote(own):
                found.add(path.rpartition("/")[2])
        return sorted(found)

    def remove(self, name: str) -> None:
        """See :class:`Tree`."""
        self._http.call(f"delete {name}", "DELETE", self._at(name), ok=(200, 204, 404))
