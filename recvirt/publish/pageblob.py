"""A fixed VHD in a page blob of Azure: pages side by side, zeros left out, compared when they are there."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from typing import Any

from recvirt.disk.formats import vhd_footer
from recvirt.errors import PublishError, VerificationError
from recvirt.publish.errors import DeniedError, MissingSdkError, TransientError
from recvirt.publish.http import place_of
from recvirt.publish.journal import Journal
from recvirt.publish.provider import Job
from recvirt.publish.transfer import Progress, send_all

_MIB = 1 << 20
#: Put Page takes at most 4 MiB (a stand-in takes more).
PAGES_MAX = 4 * _MIB
_FOOTER = 512
_SAMPLE = 16
_PASSING = (408, 429, 500, 502, 503, 504)
#: In a blob's metadata; no hyphens there.
DIGEST, STATE, UPLOAD = "recvirt_digest", "recvirt_state", "recvirt_upload"
_LATER = "az account show tells who you are; docs/policies/azure.json lists the rights that are needed"


def credential(timeout: float) -> Any:
    """A key or token of the environment (as the Azure CLI names them), else azure-identity's usual chain."""
    del timeout
    key, token = os.environ.get("AZURE_STORAGE_KEY"), os.environ.get("AZURE_STORAGE_SAS_TOKEN")
    if key and "AZURE_STORAGE_ACCOUNT" in os.environ:
        return {"account_name": os.environ["AZURE_STORAGE_ACCOUNT"], "account_key": key}
    return key or token or default_credential()


def default_credential() -> Any:
    """azure-identity's chain: environment, workload identity, managed identity, Azure CLI."""
    try:
        from azure.identity import DefaultAzureCredential
    except ImportError:
        raise MissingSdkError("azure-identity", "azure") from None
    return DefaultAzureCredential(exclude_interactive_browser_credential=True)


class PageBlob:
    """One blob: the image's VHD."""

    def __init__(self, account_url: str, container: str, job: Job, timeout: float) -> None:
        try:
            from azure.storage.blob import BlobClient
        except ImportError:
            raise MissingSdkError("azure-storage-blob", "azure") from None
        self._job = job
        self.name = f"{job.image.name}.vhd"
        self._client = BlobClient(
            account_url, container, self.name, credential=credential(timeout), retry_total=0, retry_connect=0,
            retry_read=0, retry_status=0, connection_timeout=10, read_timeout=timeout,
        )  # fmt: skip

    @property
    def url(self) -> str:
        """Its address, without anything that lets one in."""
        return place_of(self._client.url)

    @property
    def disk_bytes(self) -> int:
        """The VHD's data: whole MiB, and none more than is needed."""
        return -(-self._job.image.virtual_bytes // _MIB) * _MIB

    @cached_property
    def footer(self) -> bytes:
        """The VHD's last 512 bytes; they repeat for the same image."""
        image = self._job.image
        identifier = uuid.uuid5(uuid.NAMESPACE_OID, image.sha256)
        return vhd_footer(self.disk_bytes, identifier, int(datetime.fromisoformat(image.created).timestamp()))

    @cached_property
    def runs(self) -> dict[int, int]:
        """What is sent: offset -> length, runs of MiBs that hold something, at most 4 MiB each; the footer apart."""
        found: dict[int, int] = {}
        last = -1
        for block in self._job.image.blocks(_MIB):
            offset = block * _MIB
            if last >= 0 and last + found[last] == offset and found[last] < PAGES_MAX:
                found[last] += _MIB
            else:
                found[offset], last = _MIB, offset
        return found

    @property
    def bytes_to_send(self) -> int:
        """All of it."""
        return sum(self.runs.values()) + _FOOTER

    def call(self, what: str, function: Any, *arguments: Any, absent_is_none: bool = False, **named: Any) -> Any:
        """One call, with retries under our budget and errors for people."""
        from azure.core import exceptions

        def attempt() -> Any:
            try:
                return function(*arguments, **named)
            except exceptions.ResourceNotFoundError as error:
                if absent_is_none:
                    return None
                hint = "is the container there? az storage container create"
                raise PublishError(f"{what}: {_said(error)}", hint=hint) from None
            except exceptions.ClientAuthenticationError as error:
                raise DeniedError(f"{what}: denied: {_said(error)}", hint=_LATER) from None
            except exceptions.HttpResponseError as error:
                raise _refusal(what, error) from None
            except exceptions.AzureError as error:
                raise TransientError(_said(error)) from None

        return self._job.budget.call(what, attempt)

    def properties(self) -> Mapping[str, Any] | None:
        """Size and metadata, or None when there is no such blob."""
        found = self.call("look for the blob", self._client.get_blob_properties, absent_is_none=True)
        return found and {"size": found.size, "metadata": dict(found.metadata or {}), "etag": found.etag}

    def is_whole(self, properties: Mapping[str, Any] | None) -> bool:
        """Whether it is our image, sent and compared. PublishError when the name is another's."""
        if properties is None:
            return False
        if properties["metadata"].get(DIGEST) != self._job.image.sha256:
            raise PublishError(
                f"the blob {self.name} is there, and is not ours", hint="delete it, or use another container"
            )
        return bool(properties["metadata"].get(STATE) == "whole" and properties["size"] == self.disk_bytes + _FOOTER)

    def make(self, metadata: Mapping[str, str]) -> int:
        """Send what is missing; returns how many bytes. The blob is whole when :meth:`compare` has said so."""
        with self._job.journal() as journal:
            self._begin(journal, metadata)
            left = [offset for offset in self.runs if offset not in journal.parts]
            progress = Progress(f"send {self.name}", sum(self.runs[offset] for offset in left))
            with self._job.image.disk() as disk:

                def send(offset: int) -> None:
                    length = self.runs[offset]
                    data = disk.read(offset, length).ljust(length, b"\0")
                    self._put(data, offset)
                    journal.done(offset)
                    progress.add(length)

                send_all(left, send, self._job.workers)
            self._put(self.footer, self.disk_bytes)
            return sum(self.runs[offset] for offset in left) + _FOOTER

    def _put(self, data: bytes, offset: int) -> None:
        # The service compares an MD5 with what arrived.
        self.call("send pages", self._client.upload_page, data, offset, len(data), validate_content=True)

    def _begin(self, journal: Journal, metadata: Mapping[str, str]) -> None:
        there, size = self.properties(), self.disk_bytes + _FOOTER
        if there is None or there["size"] != size:
            said = {**metadata, DIGEST: self._job.image.sha256, STATE: "sending", UPLOAD: uuid.uuid4().hex}
            # Of two publishers at once one makes it, and both send the same pages to it.
            only_new: dict[str, Any] = {"headers": {"If-None-Match": "*"}} if there is None else {}
            try:
                self.call("make the blob", self._client.create_page_blob, size, metadata=said, **only_new)
            except PublishError:
                there = self.properties()
                if there is None or there["size"] != size:
                    raise
            else:
                there = {"metadata": said}
        known = str(there["metadata"].get(UPLOAD, ""))
        # The journal is of this blob alone; pages of one that was deleted are sent again.
        if journal.facts.get("upload") != known:
            journal.begin({"upload": known})

    def compare(self, *, whole: bool) -> str:
        """Compare the list of all pages, and read back all or some. VerificationError for a difference."""
        listed = self.call("list the pages", lambda: list(self._client.list_page_ranges()))
        there = _joined((page.start, page.end + 1) for page in listed if not page.cleared)
        wanted = _joined([*((o, o + n) for o, n in self.runs.items()), (self.disk_bytes, self.disk_bytes + _FOOTER)])
        if there != wanted:
            raise self._differs("it has other pages")
        offsets = sorted(self.runs)
        chosen = offsets if whole else sorted({*offsets[:: max(1, len(offsets) // _SAMPLE)], *offsets[-1:]})
        with self._job.image.disk() as disk:

            def look(offset: int) -> None:
                length = self.runs[offset]
                mine = disk.read(offset, length).ljust(length, b"\0")
                if hashlib.sha256(self._read(offset, length)).digest() != hashlib.sha256(mine).digest():
                    raise self._differs(f"the pages at {offset} hold something else")

            send_all(chosen, look, self._job.workers)
        if self._read(self.disk_bytes, _FOOTER) != self.footer:
            raise self._differs("its footer is another one")
        return f"{len(chosen)} of {len(offsets)} runs of pages read back, and the list of all, are equal"

    def _read(self, offset: int, length: int) -> bytes:
        return bytes(self.call("read pages", lambda: self._client.download_blob(offset, length).readall()))

    def mark_whole(self, properties: Mapping[str, Any]) -> None:
        """Say that it was compared: the next run needs to send nothing."""
        said = {**properties["metadata"], STATE: "whole"}
        self.call("mark the blob", self._client.set_blob_metadata, said)
        with self._job.journal() as journal:
            journal.forget()

    def _differs(self, why: str) -> VerificationError:
        return VerificationError(f"the blob {self.name} is not what was sent: {why}", hint="delete it, publish again")


def _joined(ranges: Any) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _said(error: Any) -> str:
    return str(getattr(error, "message", error)).splitlines()[0].partition("?")[0][:300]


def _refusal(what: str, error: Any) -> PublishError:
    code, text = error.status_code, f"{what}: {error.error_code or ''} {_said(error)}"
    if code in _PASSING:
        after = (error.response.headers or {}).get("Retry-After", "") if error.response is not None else ""
        return TransientError(text.removeprefix(f"{what}: "), after=float(after) if str(after).isdigit() else None)
    if code in (401, 403):
        return DeniedError(f"{text} (denied)", hint=_LATER)
    return PublishError(text)
