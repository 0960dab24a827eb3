"""``aws``: a snapshot by EBS direct, an AMI of it, copies in other regions, shares, and a date of deprecation."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from recvirt.errors import ConfigError, PublishError
from recvirt.publish.amazon import Amazon, code_of, wait_for
from recvirt.publish.plan import Step
from recvirt.publish.provider import (
    TAG,
    TAG_DIGEST,
    TAG_PROFILE,
    Job,
    Provider,
    Published,
    Remote,
    TargetConfig,
    WebAddress,
)
from recvirt.publish.snapshot import BLOCK, Snapshots

Region = Annotated[str, StringConstraints(pattern=r"^[a-z]{2}(-[a-z]+)+-[0-9]{1,2}$")]
Account = Annotated[str, StringConstraints(pattern=r"^[0-9]{12}$")]
#: Tags that carry secrets or clash with Amazon's own.
_TAGS_MAX = 40
_LARGEST_GIB = 64 * 1024


class AwsConfig(TargetConfig):
    """Where the AMI is made, and who may use it."""

    region: Region | None = Field(default=None, description="where it is made; unset: AWS_REGION, or the profile's")
    copy_to: tuple[Region, ...] = Field(default=(), description="regions that get a copy")
    share: tuple[Account, ...] = Field(default=(), description="accounts that may launch it")
    public: bool = Field(default=False, description="everybody may launch it")
    tags: dict[str, str] = Field(default_factory=dict, description="more tags of AMI and snapshot")
    deprecate_days: int | None = Field(default=None, ge=1, le=3650, description="deprecated so long after it was made")
    boot_mode: Literal["uefi-preferred", "uefi", "legacy-bios"] = Field(
        default="uefi-preferred", description="the firmware"
    )
    verify: Literal["sample", "full"] = Field(default="sample", description="blocks that are read back")
    endpoint: WebAddress | None = Field(default=None, description="another service than Amazon's, for tests")


class Aws(Provider[AwsConfig]):
    """One account; a region and those that get copies."""

    name = "aws"
    config_model = AwsConfig

    def __init__(self, config: AwsConfig, job: Job) -> None:
        super().__init__(config, job)
        self._amazon = Amazon(job.budget, endpoint=config.endpoint, timeout=config.timeout, workers=job.workers)

    def check(self) -> None:
        """What EC2 would refuse, or a stand-in for it would not."""
        wrong = [key for key in self.config.tags if key.startswith(("aws:", TAG)) or len(key) > 127]
        wrong += [key for key, value in self.config.tags.items() if len(value) > 255]
        if wrong or len(self.config.tags) > _TAGS_MAX:
            raise ConfigError(f"{self.job.target}: tags that EC2 does not take: {', '.join(wrong) or 'too many'}")
        if self.config.region in self.config.copy_to:
            raise ConfigError(f"{self.job.target}: {self.config.region} is the region and in copy_to as well")
        if self.job.image.format not in ("qcow2", "raw", "vhd"):
            raise ConfigError(f"{self.job.target}: the disk of a {self.job.image.format} can't be read in place")
        if self._snapshots.gib > _LARGEST_GIB:
            raise ConfigError(f"{self.job.target}: a volume has at most {_LARGEST_GIB} GiB")

    @cached_property
    def _ec2(self) -> Any:
        return self._amazon.client("ec2", self.config.region)

    @cached_property
    def _snapshots(self) -> Snapshots:
        return Snapshots(self._amazon, self.config.region, self.job, self._all_tags)

    @property
    def _all_tags(self) -> dict[str, str]:
        return {"Name": self.job.image.name, **self.job.tags(), **self.config.tags}

    @property
    def _region(self) -> str:
        return str(self._ec2.meta.region_name)

    @cached_property
    def _blocks(self) -> list[int]:
        return self.job.image.blocks(BLOCK)

    def _image(self, ec2: Any) -> dict[str, Any] | None:
        """Our AMI in a client's region. PublishError when its name is another image's."""
        image = self.job.image
        found = self._amazon.pages(
            "look for the AMI", ec2.describe_images, "Images", Owners=["self"], IncludeDeprecated=True,
            Filters=[{"Name": "name", "Values": [image.name]}],
        )  # fmt: skip
        for ami in found:
            # The description, which can't be changed, tells too: a kill may have come before the tags.
            if _tags(ami).get(TAG_DIGEST) == image.sha256 or image.sha256 in ami.get("Description", ""):
                return dict(ami)
        if found:
            raise PublishError(
                f"the name {image.name} is taken by {found[0]['ImageId']} in {ec2.meta.region_name}",
                hint="deregister it, if it is not wanted",
            )
        return None

    # --- publishing

    def plan(self) -> tuple[Step, ...]:
        """See :class:`Provider`."""
        image, ami = self.job.image, self._image(self._ec2)
        steps: list[Step] = []
        if ami is not None:
            steps.append(Step("exists", f"AMI {ami['ImageId']} in {self._region}"))
        else:
            steps += self._plan_snapshot()
            steps.append(Step("create", f"AMI {image.name} in {self._region}", note=self.config.boot_mode))
        for region in self.config.copy_to:
            copy = self._image(self._amazon.client("ec2", region))
            known = Step("exists", f"AMI {copy['ImageId']} in {region}") if copy else None
            steps.append(known or Step("replicate", f"AMI {image.name} to {region}"))
        missing = self._missing_shares(self._ec2, ami["ImageId"]) if ami else self._wanted_shares()
        steps += [Step("share", f"with {who}") for who in missing]
        return tuple(steps)

    def _plan_snapshot(self) -> list[Step]:
        known = self._snapshots.find_whole()
        if known is not None:
            return [Step("exists", f"snapshot {known} in {self._region}")]
        with self.job.journal() as journal:
            there = len(journal.parts)
        left = max(0, len(self._blocks) - there)
        image = self.job.image
        steps = [] if image.format == "raw" else [Step("convert", f"{image.format} to blocks, on the way")]
        note = f"{left} blocks of 512 KiB" + (f", {there} are there" if there else "")
        return [*steps, Step("upload", f"snapshot of {self._snapshots.gib} GiB", left * BLOCK, note=note)]

    def publish(self) -> Published:
        """See :class:`Provider`."""
        sent, ami, snapshot = 0, self._image(self._ec2), self._snapshots.find_whole()
        is_new = ami is None and snapshot is None
        if ami is not None and snapshot is None:
            snapshot = str(ami["BlockDeviceMappings"][0]["Ebs"]["SnapshotId"])
        elif snapshot is None:
            snapshot, sent = self._snapshots.make(self._blocks)
        checked = self._snapshots.compare(snapshot, self._blocks, whole=self.config.verify == "full")
        if is_new:
            self._snapshots.mark_whole(snapshot)
        identity = str(ami["ImageId"]) if ami else self._register(snapshot)
        self._tag(self._ec2, identity, ami)
        self._wait(self._ec2, identity)
        ids = {"ami": identity, "snapshot": snapshot, f"ami:{self._region}": identity}
        self._let_use(self._ec2, identity)
        for region in self.config.copy_to:
            ids[f"ami:{region}"] = self._copy(identity, region)
        return Published(ids=ids, checked=checked, locations=(self._region, *self.config.copy_to), sent_bytes=sent)

    def register_request(self, snapshot: str) -> dict[str, Any]:
        """RegisterImage's arguments."""
        tags = [{"Key": key, "Value": value} for key, value in sorted(self._all_tags.items())]
        image = self.job.image
        disk = {"SnapshotId": snapshot, "VolumeSize": max(1, self._snapshots.gib), "VolumeType": "gp3",
                "DeleteOnTermination": True}  # fmt: skip
        return {
            "Name": image.name,
            "Description": f"recvirt {image.profile}, kernel {image.kernel}, sha256 {image.sha256}"[:255],
            "Architecture": "x86_64", "VirtualizationType": "hvm", "RootDeviceName": "/dev/xvda",
            "BlockDeviceMappings": [{"DeviceName": "/dev/xvda", "Ebs": disk}], "BootMode": self.config.boot_mode,
            "EnaSupport": True, "ImdsSupport": "v2.0", "TagSpecifications": [{"ResourceType": "image", "Tags": tags}],
        }  # fmt: skip

    def _register(self, snapshot: str) -> str:
        try:
            answer = self._amazon.call(
                "register the AMI", self._ec2.register_image, settling=True, **self.register_request(snapshot)
            )
            return str(answer["ImageId"])
        except PublishError as error:
            # Another publisher was quicker, or the answer to an earlier try was lost.
            ami = self._image(self._ec2) if code_of(error) == "InvalidAMIName.Duplicate" else None
            if ami is None:
                raise
            return str(ami["ImageId"])

    def _wait(self, ec2: Any, identity: str) -> None:
        def look() -> str:
            answer = self._amazon.call("look at the AMI", ec2.describe_images, settling=True, ImageIds=[identity])
            return str(answer["Images"][0]["State"]) if answer["Images"] else "pending"

        wait_for(f"AMI {identity}", look, "available", ("failed", "invalid", "error", "deregistered"))

    def _copy(self, identity: str, region: str) -> str:
        ec2 = self._amazon.client("ec2", region)
        found = self._image(ec2)
        copy = str(found["ImageId"]) if found else None
        if copy is None:
            token = f"{self.job.image.sha256[:40]}-{region}"[:64]
            answer = self._amazon.call(
                f"copy to {region}", ec2.copy_image, settling=True, Name=self.job.image.name, SourceImageId=identity,
                SourceRegion=self._region, ClientToken=token, CopyImageTags=True,
            )  # fmt: skip
            copy = str(answer["ImageId"])
        self._tag(ec2, copy, found)
        self._wait(ec2, copy)
        self._let_use(ec2, copy)
        return copy

    def _tag(self, ec2: Any, identity: str, seen: dict[str, Any] | None) -> None:
        """Without tags it would not be known for pruning; a copy gets none by itself everywhere."""
        if seen is None or self._all_tags.items() - _tags(seen).items():
            tags = [{"Key": key, "Value": value} for key, value in sorted(self._all_tags.items())]
            self._amazon.call(f"tag {identity}", ec2.create_tags, settling=True, Resources=[identity], Tags=tags)

    # --- who may use it, and until when

    def _wanted_shares(self) -> list[str]:
        return [*self.config.share, *(["everybody"] if self.config.public else [])]

    def _missing_shares(self, ec2: Any, identity: str) -> list[str]:
        if not self._wanted_shares():
            return []
        answer = self._amazon.call(
            "ask who may launch it", ec2.describe_image_attribute, ImageId=identity, Attribute="launchPermission"
        )
        given = answer["LaunchPermissions"]
        there = {p.get("UserId") or ("everybody" if p.get("Group") == "all" else "") for p in given}
        return [who for who in self._wanted_shares() if who not in there]

    def _let_use(self, ec2: Any, identity: str) -> None:
        missing = self._missing_shares(ec2, identity)
        if missing:
            permissions = [{"Group": "all"} if who == "everybody" else {"UserId": who} for who in missing]
            self._amazon.call(
                "share the AMI", ec2.modify_image_attribute, ImageId=identity, LaunchPermission={"Add": permissions}
            )
        if self.config.deprecate_days is not None:
            self._deprecate(ec2, identity, self.config.deprecate_days)

    def _deprecate(self, ec2: Any, identity: str, days: int) -> None:
        (ami,) = self._amazon.call("look at the AMI", ec2.describe_images, ImageIds=[identity])["Images"]
        # EC2 keeps whole minutes.
        wanted = (_time(ami["CreationDate"]) + timedelta(days=days)).replace(second=0, microsecond=0)
        there = ami.get("DeprecationTime")
        if not there or _time(there).replace(second=0, microsecond=0) != wanted:
            self._amazon.call("set its date", ec2.enable_image_deprecation, ImageId=identity, DeprecateAt=wanted)

    # --- pruning

    def remotes(self) -> list[Remote]:
        """See :class:`Provider`. Each region keeps its own newest."""
        found = []
        for region in (self._region, *self.config.copy_to):
            ec2 = self._amazon.client("ec2", region)
            images = self._amazon.pages(
                "list our AMIs", ec2.describe_images, "Images", Owners=["self"], IncludeDeprecated=True,
                Filters=[{"Name": f"tag:{TAG}", "Values": ["image"]}],
            )  # fmt: skip
            used = self._used(ec2, [ami["ImageId"] for ami in images])
            for ami in images:
                tags = _tags(ami)
                disks = [disk.get("Ebs", {}).get("SnapshotId", "") for disk in ami["BlockDeviceMappings"]]
                remote = Remote(
                    f"{region}/{ami['ImageId']}", f"{ami['Name']} in {region}", tags.get(TAG_DIGEST, ""),
                    f"{tags.get(TAG_PROFILE, '')}@{region}", _time(ami["CreationDate"]),
                    in_use=ami["ImageId"] in used, extra={"snapshots": ",".join(filter(None, disks))},
                )  # fmt: skip
                found.append(remote)
        return found

    def _used(self, ec2: Any, images: list[str]) -> set[str]:
        if not images:
            return set()
        alive = ["pending", "running", "shutting-down", "stopping", "stopped"]
        reservations = self._amazon.pages(
            "list instances", ec2.describe_instances, "Reservations",
            Filters=[{"Name": "image-id", "Values": images}, {"Name": "instance-state-name", "Values": alive}],
        )  # fmt: skip
        return {str(instance["ImageId"]) for group in reservations for instance in group["Instances"]}

    def delete(self, remote: Remote) -> None:
        """See :class:`Provider`. The AMI first: a snapshot that one hangs on can't be deleted."""
        region, _, identity = remote.identity.partition("/")
        ec2 = self._amazon.client("ec2", region)
        gone = ("InvalidAMIID.NotFound", "InvalidAMIID.Unavailable", "InvalidSnapshot.NotFound")
        calls: list[tuple[str, Any, dict[str, Any]]] = []
        calls.append(("deregister the AMI", ec2.deregister_image, {"ImageId": identity}))
        listed = self._amazon.pages(
            "look for its snapshots", ec2.describe_snapshots, "Snapshots", OwnerIds=["self"],
            Filters=[{"Name": f"tag:{TAG_DIGEST}", "Values": [remote.digest]}],
        )  # fmt: skip
        snapshots = {*remote.extra.get("snapshots", "").split(","), *(s["SnapshotId"] for s in listed)}
        for snapshot in sorted(filter(None, snapshots)):
            calls.append(("delete the snapshot", ec2.delete_snapshot, {"SnapshotId": snapshot}))
        for what, function, arguments in calls:
            try:
                self._amazon.call(what, function, **arguments)
            except PublishError as error:
                if code_of(error) not in gone:
                    raise

    def recipe(self, published: Published) -> dict[str, Any]:
        """See :class:`Provider`."""
        return {"ami": published.ids["ami"], "region": self._region}


def _tags(ami: Any) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in ami.get("Tags", [])}


def _time(text: Any) -> datetime:
    return datetime.fromisoformat(str(text).replace("Z", "+00:00")).astimezone(UTC)


PROVIDER = Aws
