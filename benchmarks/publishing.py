"""(g): bytes and time that publishing an image to AWS takes, against sending every block, and against a raw in S3.

All three go to the same server on this machine (moto), through a proxy that counts what is sent. What others send is
made up here: every block of the disk by EBS direct, as uploaders without zero-skipping do, and the raw disk as one
object in S3, as `aws ec2 import-snapshot` wants it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.results import Result, Row
from benchmarks.workplace import CHECKOUT, Site
from recvirt.errors import PublishError, RecvirtError
from recvirt.imagefile.container import identify
from recvirt.publish.amazon import checksum
from recvirt.publish.reader import DiskReader, open_disk
from recvirt.publish.snapshot import BLOCK
from recvirt.publish.transfer import send_all
from recvirt.ui import reporter
from tests.publish import proxy, servers

_WORKERS = 8
_PART = 8 << 20
_ONCE = "one run each"
_MEMORY_MB = 200.0
_SPARSE_BYTES = 20 << 30
#: The stand-in puts an object of many parts together in memory before it answers, and holds it twice meanwhile.
_ANSWER_SECONDS = 900.0
_COPIES = 2.5
_KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}


def recvirt(image: Path, url: str, folder: Path) -> float:
    """Publish by recvirt's command line; its peak memory in MB."""
    words = [sys.executable, "-m", "recvirt", "-q", "publish", "aws", str(image), "--unaccepted"]
    words += ["--set", f"aws.endpoint={url}", "--set", "aws.region=eu-central-1"]
    words += ["--state-dir", str(folder / "state"), "--receipts", str(folder / "receipts")]
    environment = {**os.environ, **_KEYS, "PYTHONPATH": str(CHECKOUT)}
    process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    # Not wait4's figure: that starts from what we have ourselves.
    peak = 0.0
    while process.poll() is None:
        with contextlib.suppress(OSError):
            match = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            peak = max(peak, int(match[1]) / 1024 if match else 0.0)
        time.sleep(0.05)
    if process.returncode:
        raise PublishError(f"recvirt publish ended with {process.returncode}", hint="try it by hand, without -q")
    return peak


def _client(name: str, url: str) -> Any:
    """A client that tries again as the AWS CLI does by itself."""
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": 3}, read_timeout=_ANSWER_SECONDS,
        max_pool_connections=_WORKERS + 2,
    )  # fmt: skip
    return boto3.client(
        name, region_name="eu-central-1", endpoint_url=url, aws_access_key_id="x", aws_secret_access_key="y",
        config=config,
    )  # fmt: skip


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """PublishError for what the stand-in for Amazon, or its start, ended with."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError, RuntimeError) as error:
        raise PublishError(
            f"the server that stands in for Amazon: {error}",
            hint="is the machine loaded, or its memory full? run it again: benchmarks/run.py --only publish",
        ) from error


def _want_memory(size: int, available: int | None = None) -> None:
    """PublishError where the stand-in could not hold the raw disk as one object."""
    if available is None:
        match = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        available = int(match[1]) * 1024 if match else 0
    wanted = _COPIES * size / 1e9
    if available / 1e9 < wanted:
        raise PublishError(
            f"{available / 1e9:.1f} GB of memory are free, and the stand-in for Amazon wants {wanted:.1f}",
            hint="end what else runs here, or take a smaller image: python -m benchmarks.publishing FILE",
        )


def every_block(disk: DiskReader, url: str) -> None:
    """All blocks by EBS direct, zeros too, as many at a time as recvirt sends."""
    ebs = _client("ebs", url)
    blocks = range(-(-disk.size // BLOCK))
    snapshot = ebs.start_snapshot(VolumeSize=-(-disk.size // (1 << 30)))["SnapshotId"]

    def send(number: int) -> None:
        data = disk.read(number * BLOCK, BLOCK).ljust(BLOCK, b"\0")
        ebs.put_snapshot_block(
            SnapshotId=snapshot, BlockIndex=number, BlockData=data, DataLength=BLOCK, Checksum=checksum(data),
            ChecksumAlgorithm="SHA256",
        )  # fmt: skip

    send_all(blocks, send, _WORKERS)
    ebs.complete_snapshot(SnapshotId=snapshot, ChangedBlocksCount=len(blocks))


def raw_in_s3(disk: DiskReader, url: str) -> None:
    """The raw disk as one object, in parts; the import that would follow is not counted."""
    s3 = _client("s3", url)
    place = {"Bucket": "bench", "Key": "disk.raw"}
    s3.create_bucket(Bucket="bench", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    upload = s3.create_multipart_upload(**place)["UploadId"]
    parts: dict[int, str] = {}

    def send(number: int) -> None:
        data = disk.read((number - 1) * _PART, _PART)
        answer = s3.upload_part(**place, UploadId=upload, PartNumber=number, Body=data)
        parts[number] = answer["ETag"]

    send_all(range(1, -(-disk.size // _PART) + 1), send, _WORKERS)
    listed = [{"PartNumber": number, "ETag": tag} for number, tag in sorted(parts.items())]
    s3.complete_multipart_upload(**place, UploadId=upload, MultipartUpload={"Parts": listed})


def _warm_up(url: str) -> None:
    """Let the server load its services: whoever came first would wait a second or two for each."""
    _client("ec2", url).describe_images(Owners=["self"])
    _client("s3", url).list_buckets()
    _client("ebs", url).start_snapshot(VolumeSize=1)


def measured(folder: Path, send: Callable[[str], object]) -> tuple[int, float, object]:
    """Bytes of requests' bodies, seconds, and what ``send`` gave back, at a fresh server."""
    with _told(), servers.moto(folder) as server, proxy.line(server) as line:
        line.timeout = _ANSWER_SECONDS
        _warm_up(server)
        started = time.monotonic()
        found = send(line.url)
        return line.body_bytes, time.monotonic() - started, found


def compare(image: Path, folder: Path) -> Result:
    """The three with one image, and recvirt's memory with a sparse disk of 20 GiB."""
    disk = open_disk(identify(image))
    _want_memory(disk.size)
    mine, mine_seconds, memory = measured(folder / "a", lambda url: recvirt(image, url, folder))
    full, full_seconds, _ = measured(folder / "b", lambda url: every_block(disk, url))
    bucket, bucket_seconds, _ = measured(folder / "c", lambda url: raw_in_s3(disk, url))
    sparse = folder / "sparse.raw"
    with sparse.open("wb") as stream:
        stream.truncate(_SPARSE_BYTES)
        for place in range(0, _SPARSE_BYTES, _SPARSE_BYTES // 64):
            stream.seek(place + 510)
            stream.write(b"\x55\xaaEFI PART" * 1000)
    _, _, sparse_memory = measured(folder / "d", lambda url: recvirt(sparse, url, folder))
    rows = [
        Row.ratio("publishing to AWS, bytes sent, against every block", mine, full, "B", None),
        Row.ratio("the same, seconds (with reading back)", mine_seconds, full_seconds, "s", None, _ONCE),
        Row.ratio("publishing to AWS, bytes sent, against a raw in S3", mine, bucket, "B", None),
        Row.ratio("the same, seconds (without the import)", mine_seconds, bucket_seconds, "s", None, _ONCE),
        Row.limit("publishing a sparse raw of 20 GiB, memory", float(str(sparse_memory)), "MB", _MEMORY_MB),
    ]
    facts = {"memory_mb": memory, "sparse_memory_mb": sparse_memory, "bytes": [mine, full, bucket],
             "seconds": [mine_seconds, full_seconds, bucket_seconds]}  # fmt: skip
    return Result("publish", rows, facts)


def benchmark(site: Site) -> Result:
    """The default image. PublishError without the server (make publish-servers)."""
    if servers.why_not("aws"):
        raise PublishError("the server of this benchmark is not installed", hint=servers.why_not("aws"))
    site.recvirt("build", "default", log_name="build-default")
    with tempfile.TemporaryDirectory(dir=site.work_dir) as folder:
        return compare(site.build_dir / "default/disk.qcow2", Path(folder))


if __name__ == "__main__":
    # One image, without the other benchmarks: python -m benchmarks.publishing [FILE]
    chosen = sys.argv[1] if len(sys.argv) > 1 else "build/default/disk.qcow2"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(compare(Path(chosen).absolute(), Path(scratch)).as_json(), indent=1))
    except RecvirtError as failure:
        reporter.error(failure.message, failure.hint)
        sys.exit(failure.exit_code)
