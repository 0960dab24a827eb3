"""A static tree in S3 or a service like it: parts side by side, with checksums, gone on with after a kill."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recvirt.errors import PublishError
from recvirt.publish.amazon import Amazon, checksum, code_of
from recvirt.publish.provider import Job
from recvirt.publish.transfer import Progress, send_all
from recvirt.publish.trees import Tree

#: Parts are at least 5 MiB and at most 10,000 (S3's limits).
_PART = 8 << 20
_PARTS_MAX = 9_000
_CHUNK = 8 << 20
_TYPES = {".json": "application/json", ".sig": "text/plain", ".xz": "application/x-xz"}


class S3Tree(Tree):
    """A bucket, or a prefix in it."""

    def __init__(self, place: str, endpoint: str | None, region: str | None, timeout: float, job: Job) -> None:
        self._bucket, _, prefix = place.partition("/")
        self._prefix = prefix.strip("/")
        self._job = job
        self._amazon = Amazon(job.budget, endpoint=endpoint, timeout=timeout, workers=job.workers)
        self._s3 = self._amazon.client("s3", region)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _call(self, what: str, function: Any, **arguments: Any) -> Any:
        return self._amazon.call(what, function, Bucket=self._bucket, **arguments)

    def size(self, name: str) -> int | None:
        """See :class:`Tree`."""
        try:
            return int(self._call(f"look for {name}", self._s3.head_object, Key=self._key(name))["ContentLength"])
        except PublishError as error:
            if code_of(error) in ("404", "NoSuchKey", "NotFound"):
                return None
            raise

    def chunks(self, name: str) -> Iterator[bytes]:
        """See :class:`Tree`."""
        total = self.size(name) or 0
        for offset in range(0, total, _CHUNK):
            span = f"bytes={offset}-{min(offset + _CHUNK, total) - 1}"

            def read(span: str = span) -> bytes:
                return bytes(self._s3.get_object(Bucket=self._bucket, Key=self._key(name), Range=span)["Body"].read())

            yield self._amazon.call(f"read {name}", read)

    def write(self, name: str, data: bytes) -> None:
        """See :class:`Tree`."""
        kind = _TYPES.get(Path(name).suffix, "text/plain")
        self._call(
            f"write {name}", self._s3.put_object, Key=self._key(name), Body=data, ContentType=kind,
            ChecksumSHA256=checksum(data),
        )  # fmt: skip

    def put(self, name: str, source: Path, sha256: str, progress: Progress) -> int:
        """See :class:`Tree`. The object appears when its last part has been joined."""
        size = source.stat().st_size
        part = max(_PART, -(-size // _PARTS_MAX))
        numbers = range(1, max(1, -(-size // part)) + 1)
        with self._job.journal() as journal, source.open("rb") as stream:
            upload = self._upload(name, sha256, journal)

            def send(number: int) -> None:
                data = os.pread(stream.fileno(), part, (number - 1) * part)
                digest = checksum(data)
                answer = self._call(
                    f"send part {number}", self._s3.upload_part, Key=self._key(name), UploadId=upload,
                    PartNumber=number, Body=data, ChecksumSHA256=digest,
                )  # fmt: skip
                journal.done(number, f"{answer['ETag']} {digest}")
                progress.add(len(data))

            left = [number for number in numbers if number not in journal.parts]
            first = sum(min(part, size - (number - 1) * part) for number in numbers if number not in left)
            progress.restart(first)
            send_all(left, send, self._job.workers)
            parts = []
            for number in numbers:
                etag, _, digest = journal.parts[number].rpartition(" ")
                parts.append({"PartNumber": number, "ETag": etag, "ChecksumSHA256": digest})
            self._call(
                f"join {name}", self._s3.complete_multipart_upload, Key=self._key(name), UploadId=upload,
                MultipartUpload={"Parts": parts},
            )  # fmt: skip
            journal.forget()
        return size - first

    def _upload(self, name: str, sha256: str, journal: Any) -> str:
        """The upload that an earlier run began, if the service still knows it; else a new one."""
        known = journal.facts.get("upload")
        if known and journal.facts.get("key") == self._key(name):
            try:
                self._call("look at the upload", self._s3.list_parts, Key=self._key(name), UploadId=known, MaxParts=1)
                return str(known)
            except PublishError as error:
                if code_of(error) not in ("NoSuchUpload", "404"):
                    raise
        answer = self._call(
            f"begin {name}", self._s3.create_multipart_upload, Key=self._key(name), ChecksumAlgorithm="SHA256",
            Metadata={"recvirt-digest": sha256},
        )  # fmt: skip
        journal.begin({"upload": str(answer["UploadId"]), "key": self._key(name)})
        return str(answer["UploadId"])

    def names(self, folder: str) -> list[str]:
        """See :class:`Tree`."""
        found = set()
        for key in self._keys(self._key(folder) + "/"):
            found.add(key.removeprefix(self._key(folder) + "/").partition("/")[0])
        return sorted(found)

    def _keys(self, prefix: str) -> list[str]:
        keys: list[str] = []
        arguments: dict[str, Any] = {"Prefix": prefix}
        while True:
            answer = self._call("list", self._s3.list_objects_v2, **arguments)
            keys += [str(item["Key"]) for item in answer.get("Contents", [])]
            if not answer.get("IsTruncated"):
                return keys
            arguments["ContinuationToken"] = answer["NextContinuationToken"]

    def remove(self, name: str) -> None:
        """See :class:`Tree`."""
        for key in (self._key(name), *self._keys(self._key(name) + "/")):
            self._call(f"delete {name}", self._s3.delete_object, Key=key)
