"""Images that packages brought, in everybody's catalogue from the start.

Beside each image lies a document with its name, format, digest and sizes. A digest is registered once: an administrator
who deletes the image is not given it again, and a newer package's, which has another digest, takes over the name. The
worker of this host copies and checks the file like any other one (``worker.images``); where there is none, the first
worker that joins gets it as an upload.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction
from django.utils import timezone

from recvirt.nestedcloud import spool
from recvirt.nestedcloud.bundled import FILE_NAME, FOLDER, SCHEME
from recvirt.nestedcloud.central import images
from recvirt.nestedcloud.central.models import DiskFormat, Image, ImageState, Operation, Project, Worker
from recvirt.nestedcloud.central.operations import digest_of, record
from recvirt.nestedcloud.model import Kind, ModelError, check_name

#: What is started when nobody says which image.
DEFAULT_NAME = "recvirt-guest"
_FORMAT = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: After a failure; what was in the way then may still be.
_AGAIN = timedelta(minutes=10)
#: Of a document, in bytes.
_LARGEST = 65536


@dataclass(frozen=True)
class Bundled:
    """One image, as its document tells."""

    name: str
    file: str
    disk_format: str
    sha256: str
    size_bytes: int
    virtual_bytes: int


def _parse(data: Any) -> Bundled:
    """ModelError for what is not understood."""
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ModelError(f"want a document of format {_FORMAT}")
    names = ("name", "file", "disk_format", "sha256", "bytes", "virtual_bytes")
    name, file, disk_format, sha256, size_bytes, virtual_bytes = (data.get(field) for field in names)
    if not (isinstance(file, str) and FILE_NAME.fullmatch(file)):
        raise ModelError(f"file: {file!r}")
    if disk_format not in DiskFormat.values:
        raise ModelError(f"disk_format: {disk_format!r}")
    if not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
        raise ModelError(f"sha256: {sha256!r}")
    return Bundled(
        check_name(str(name)), file, str(disk_format), sha256, _size(size_bytes), _size(virtual_bytes)
    )  # fmt: skip


def _size(value: object) -> int:
    if not isinstance(value, int) or value <= 0:
        raise ModelError(f"a size of {value!r} bytes")
    return value


def find(folder: Path) -> Iterator[Bundled | str]:
    """Every image of a folder; a sentence for what is not understood."""
    for path in sorted(folder.glob("*.json")):
        try:
            with path.open("rb") as stream:
                yield _parse(json.loads(stream.read(_LARGEST)))
        except (OSError, ValueError) as error:
            yield f"{path}: {error}"


def ensure_bundled(worker_uuid: str, project_name: str, folder: Path = FOLDER) -> list[str]:
    """Have the images of a folder registered. The worker on this host brings them in; the operations are those of a
    project. Returns a sentence for each image that is new, and for each that is not understood.
    """
    said = []
    for found in find(folder):
        if isinstance(found, str):
            said.append(found)
        elif _ensure(found, worker_uuid, project_name):
            said.append(f"the image {found.name} is being brought in")
    return said


def ensure_from_afar(project_name: str, folder: Path = FOLDER) -> list[str]:
    """The same on a central node without a worker: one on another machine reads them as uploads. Cheap to call often;
    without such a worker nothing is done yet.
    """
    said: list[str] = []
    has_own = Worker.objects.filter(peer=None, revoked=False).exists()
    if has_own or not Project.objects.filter(name=project_name).exists():
        return said
    for found in find(folder):
        reader = images.reader_of_uploads()
        if reader is None or isinstance(found, str):
            continue
        try:
            if _ensure(found, str(reader.pk), project_name, folder / found.file):
                said.append(f"the image {found.name} is being brought in by {reader.name}")
        except (OSError, spool.SpoolError) as error:
            said.append(f"the image {found.name} can't be handed to {reader.name}: {error}")
    return said


def _hand_over(path: Path, image: Image, size_bytes: int) -> None:
    """As an upload; the worker looks whether it is what it should be."""
    with path.open("rb") as stream:
        offset = 0
        while piece := stream.read(spool.PIECE_BYTES_MAX):
            spool.write(settings.CONFIG.spool, str(image.uuid), offset, piece, size_bytes)
            offset += len(piece)


def _ensure(bundled: Bundled, worker_uuid: str, project_name: str, upload: Path | None = None) -> bool:
    """``upload`` is the file, where the worker does not have it."""
    with transaction.atomic():
        # The order of locks is project, image, as everywhere.
        project = Project.objects.select_for_update().get(name=project_name)
        worker = Worker.objects.get(uuid=worker_uuid)
        everybodys = Image.objects.select_for_update().filter(project=None)
        image = everybodys.filter(wanted_sha256=bundled.sha256).order_by("created").last()
        if image is None:
            _make_room(bundled.name)
            image = Image.objects.create(
                name=bundled.name, format=bundled.disk_format, wanted_sha256=bundled.sha256, worker=worker,
                promised_bytes=bundled.virtual_bytes,
            )  # fmt: skip
        elif _has_failed(image, timezone.now() - _AGAIN if upload is not None else timezone.now()):
            image.state, image.worker, image.promised_bytes = ImageState.IMPORTING, worker, bundled.virtual_bytes
            image.save()
        else:
            return False
        args: dict[str, Any] = {"largest_bytes": max(bundled.size_bytes, bundled.virtual_bytes)}
        if upload is None:
            args["url"] = f"{SCHEME}{bundled.file}"
        else:
            _hand_over(upload, image, bundled.size_bytes)
        digest = digest_of(Kind.IMAGE_IMPORT, str(image.uuid), args)
        record(project, None, Kind.IMAGE_IMPORT, args, None, digest, worker=worker, image=image)
        return True


def _has_failed(image: Image, before: datetime) -> bool:
    """It never came in: a full disk, say. One that could not be removed is in the same state, and stays there."""
    last = image.operations.order_by("created").last()
    if image.state != ImageState.FAILED or last is None or last.kind != Kind.IMAGE_IMPORT:
        return False
    return last.finished is None or last.finished <= before


def _make_room(name: str) -> None:
    """The older one of a name is called by its digest from now on; what was made from it goes on."""
    older = Image.objects.filter(project=None, name=name).exclude(state=ImageState.DELETED).first()
    if older is not None:
        older.name = f"{name[:50]}-{(older.wanted_sha256 or older.sha256 or older.uuid.hex)[:12]}"
        older.save(update_fields=["name"])


def is_coming() -> bool:
    """Whether the image that is started by default is being brought in."""
    active = Operation.objects.filter(image__project=None, image__name=DEFAULT_NAME, finished=None)
    return active.filter(kind=Kind.IMAGE_IMPORT.value).exists()
