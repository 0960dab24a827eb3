"""An EBS snapshot by the EBS direct APIs: blocks of 512 KiB, side by side, zeros left out, checksums everywhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from recvirt.errors import PublishError, VerificationError
from recvirt.publish.amazon import Amazon, checksum, code_of, linear_checksum, wait_for
from recvirt.publish.journal import Journal
from recvirt.publish.provider import TAG_DIGEST, Job
from recvirt.publish.transfer import Progress, send_all
from recvirt.ui import reporter

#: The one size that EBS direct takes.
BLOCK = 512 * 1024
_GIB = 1 << 30
_SAMPLE = 16
_WHOLE = "recvirt-whole"
#: A snapshot that was just started may not be seen everywhere for so long.
_SETTLING_SECONDS = 120.0
#: Deleted snapshots whose tokens are passed over. Amazon forgets a token some time after its snapshot is gone.
_TOKENS = 16


class Snapshots:
    """Snapshots of our image in one region."""

    def __init__(self, amazon: Amazon, region: str | None, job: Job, tags: Mapping[str, str]) -> None:
        self._amazon = amazon
        self._ebs = amazon.client("ebs", region)
        self._ec2 = amazon.client("ec2", region)
        self._job = job
        self._tags = [{"Key": key, "Value": value} for key, value in sorted(tags.items())]

    @property
    def gib(self) -> int:
        """The volume's size: whole GiB that hold the disk."""
        return -(-self._job.image.virtual_bytes // _GIB)

    def find_whole(self) -> str | None:
        """Our snapshot that was completed and compared, if there is one."""
        return self._find("completed", [{"Name": f"tag:{_WHOLE}", "Values": ["yes"]}])

    def mark_whole(self, snapshot: str) -> None:
        """Say that a snapshot was compared: the next run needs to send nothing."""
        tags = [{"Key": _WHOLE, "Value": "yes"}]
        self._amazon.call("tag the snapshot", self._ec2.create_tags, settling=True, Resources=[snapshot], Tags=tags)

    def _find(self, state: str, more: list[dict[str, Any]]) -> str | None:
        filters = [
            {"Name": f"tag:{TAG_DIGEST}", "Values": [self._job.image.sha256]},
            {"Name": "status", "Values": [state]}, *more,
        ]  # fmt: skip
        found = self._amazon.pages(
            "look for the snapshot", self._ec2.describe_snapshots, "Snapshots", OwnerIds=["self"], Filters=filters
        )
        oldest = min(found, key=lambda s: (str(s["StartTime"]), s["SnapshotId"]), default=None)
        return str(oldest["SnapshotId"]) if oldest else None

    def state(self, snapshot: str) -> str:
        """Its state; ``gone`` when there is none."""
        try:
            answer = self._amazon.call(
                "look at the snapshot", self._ec2.describe_snapshots, SnapshotIds=[snapshot], settling=False
            )
        except PublishError as error:
            if code_of(error) == "InvalidSnapshot.NotFound":
                return "gone"
            raise
        return str(answer["Snapshots"][0]["State"]) if answer["Snapshots"] else "gone"

    def make(self, blocks: list[int]) -> tuple[str, int]:
        """A completed snapshot with these blocks; its identity, and how many bytes were sent now."""
        with self._job.journal() as journal:
            (snapshot, is_completed), sent = self._begin(journal), 0
            if not is_completed:
                sent = self._send(snapshot, blocks, journal)
                self._complete(snapshot, blocks, journal)
            journal.forget()
        return snapshot, sent

    def _begin(self, journal: Journal) -> tuple[str, bool]:
        """A snapshot to put blocks into, or one that another publisher has just completed."""
        known = journal.facts.get("snapshot") or self._find("pending", [])
        # A completed one: a run was killed before it had compared it, or another publisher was quicker.
        if known is not None and self.state(known) in ("pending", "completed"):
            if journal.facts.get("snapshot") != known:
                journal.begin({"snapshot": known})
            return known, False
        # The same token makes publishers on several machines share one snapshot, also when one of them has completed it
        # already. If what a token stands for is deleted, all of them go on to the next one.
        for number in range(_TOKENS):
            answer = self._amazon.call(
                "start a snapshot", self._ebs.start_snapshot, VolumeSize=self.gib, Timeout=60, Tags=self._tags,
                ClientToken=f"recvirt-{self._job.image.sha256[:48]}" + (f"-{number}" if number else ""),
                Description=self._job.image.name,
            )  # fmt: skip
            snapshot = str(answer["SnapshotId"])
            if answer.get("Status") in ("pending", "completed") and self._appears(snapshot):
                journal.begin({"snapshot": snapshot})
                return snapshot, answer["Status"] == "completed"
        raise PublishError("EBS starts no snapshot that blocks can be put into", hint="publish it again")

    def _appears(self, snapshot: str) -> bool:
        deadline = time.monotonic() + _SETTLING_SECONDS
        while self.state(snapshot) == "gone":
            if time.monotonic() > deadline:
                return False
            time.sleep(2.0)
        return True

    def _send(self, snapshot: str, blocks: list[int], journal: Journal) -> int:
        left = [number for number in blocks if number not in journal.parts]
        if len(left) < len(blocks):
            reporter.info(f"{len(blocks) - len(left)} of {len(blocks)} blocks are there from an earlier run")
        progress = Progress(f"send {self._job.image.name}", len(left) * BLOCK)
        with self._job.image.disk() as disk:

            def send(number: int) -> None:
                data = disk.read(number * BLOCK, BLOCK).ljust(BLOCK, b"\0")
                digest = checksum(data)
                self._amazon.call(
                    f"send block {number}", self._ebs.put_snapshot_block, settling=True, SnapshotId=snapshot,
                    BlockIndex=number, BlockData=data, DataLength=BLOCK, Checksum=digest, ChecksumAlgorithm="SHA256",
                )  # fmt: skip
                journal.done(number, digest)
                progress.add(BLOCK)

            try:
                send_all(left, send, self._job.workers)
            except PublishError:
                # One that another publisher has just completed takes no more blocks; it is compared all the same.
                if self.state(snapshot) != "completed":
                    raise
        return len(left) * BLOCK

    def _complete(self, snapshot: str, blocks: list[int], journal: Journal) -> None:
        total = linear_checksum([journal.parts.get(number, "") for number in sorted(blocks)])
        try:
            self._amazon.call(
                "complete the snapshot", self._ebs.complete_snapshot, SnapshotId=snapshot,
                ChangedBlocksCount=len(blocks), Checksum=total, ChecksumAlgorithm="SHA256",
                ChecksumAggregationMethod="LINEAR",
            )  # fmt: skip
        except PublishError:
            # The answer to an earlier try was lost, or another publisher has just done it.
            if self.state(snapshot) != "completed":
                raise
        wait_for(f"snapshot {snapshot}", lambda: self.state(snapshot), "completed", ("error", "gone"))

    def compare(self, snapshot: str, blocks: list[int], *, whole: bool) -> str:
        """Read blocks back and compare them: all, or some of them. VerificationError for one that differs."""
        listed = self._amazon.pages(
            "list the blocks", self._ebs.list_snapshot_blocks, "Blocks", SnapshotId=snapshot, MaxResults=10000
        )
        tokens: dict[int, Any] = {block["BlockIndex"]: block["BlockToken"] for block in listed}
        if sorted(tokens) != sorted(blocks):
            raise self._differs(snapshot, f"it has {len(tokens)} blocks, the image {len(blocks)}")
        step = 1 if whole else max(1, len(blocks) // _SAMPLE)
        chosen = sorted({*blocks[::step], *blocks[-1:]})
        with self._job.image.disk() as disk:

            def look(number: int) -> None:
                def read() -> bytes:
                    words = {"SnapshotId": snapshot, "BlockIndex": number, "BlockToken": tokens[number]}
                    return bytes(self._ebs.get_snapshot_block(**words)["BlockData"].read())

                data = self._amazon.call(f"read block {number}", read)
                if data != disk.read(number * BLOCK, BLOCK).ljust(BLOCK, b"\0"):
                    raise self._differs(snapshot, f"block {number} holds something else")

            send_all(chosen, look, self._job.workers)
        return f"{len(chosen)} of {len(blocks)} blocks read back, and the list of all, are equal"

    @staticmethod
    def _differs(snapshot: str, why: str) -> VerificationError:
        return VerificationError(
            f"snapshot {snapshot} is not what was sent: {why}", hint="delete it and publish again"
        )
