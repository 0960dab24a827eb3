"""Places that recvirt sends nothing to: the commands that do it, and the launch recipe with nesting on.

What is known of nesting there stands in each one's notes; where it is known not to work, ``--force`` is wanted.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from recvirt.errors import ConfigError
from recvirt.publish.plan import Step
from recvirt.publish.provider import Provider, Published, Remote, TargetConfig, Word


class RecipeConfig(TargetConfig):
    """What the commands need to be told; the rest are placeholders in capitals."""

    bucket: Word = Field(default="BUCKET", description="Oracle, Alibaba: the bucket of object storage")
    region: Word = Field(default="REGION", description="Oracle, Alibaba: the region")


class Recipe(Provider[RecipeConfig]):
    """A provider by hand."""

    config_model = RecipeConfig
    #: The image's formats that the commands start from.
    formats: ClassVar[tuple[str, ...]] = ("qcow2",)
    #: Why nesting does not work there, or is not known to.
    warning: ClassVar[str] = ""
    refused: ClassVar[bool] = False

    def check(self) -> None:
        """ConfigError for a format that the commands can't start from, or where nesting does not work."""
        if self.refused and not self.job.force:
            raise ConfigError(f"{self.job.target}: {self.warning}", hint="--force writes the recipe all the same")
        if self.job.image.format not in self.formats:
            wanted = " or ".join(self.formats)
            raise ConfigError(
                f"{self.job.target}: its commands want {wanted}, this is {self.job.image.format}",
                hint=f"recvirt build --set image.formats+={self.formats[0]}",
            )

    def plan(self) -> tuple[Step, ...]:
        """See :class:`Provider`."""
        return (Step("print", f"the commands for {self.name}", note=self.warning or "nothing is sent"),)

    def publish(self) -> Published:
        """See :class:`Provider`: the recipe is all there is, so there are no identities and no receipt."""
        return Published(ids={}, checked="nothing was sent")

    def remotes(self) -> list[Remote]:
        """See :class:`Provider`."""
        raise ConfigError(f"recvirt sends nothing to {self.name}, and can delete nothing there")

    def delete(self, remote: Remote) -> None:  # noqa: ARG002
        """See :class:`Provider`."""
        raise ConfigError(f"recvirt can delete nothing at {self.name}")

    def recipe(self, published: Published) -> dict[str, Any]:  # noqa: ARG002
        """See :class:`Provider`."""
        config = self.config
        return {
            "path": str(self.job.image.path), "bucket": config.bucket, "region": config.region,
            "warning": self.warning,
        }  # fmt: skip


class Oracle(Recipe):
    """Oracle Cloud Infrastructure, by ``oci``."""

    name = "oracle"
    warning = "Oracle says nothing about nesting on its VMs; it is unverified"


class Alibaba(Recipe):
    """Alibaba Cloud, by ``aliyun``."""

    name = "alibaba"
    formats = ("qcow2", "raw", "vhd")
    warning = "Alibaba has nesting on bare metal and SCC instances only"


class Hetzner(Recipe):
    """Hetzner Cloud."""

    name = "hetzner"
    formats = ("qcow2", "raw")
    warning = "Hetzner Cloud's servers have no nested virtualization (their dedicated machines have VMX and SVM)"
    refused = True


class VMware(Recipe):
    """VMware ESXi and vCenter, by ``govc``."""

    name = "vmware"
    formats = ("vmdk",)


class HyperV(Recipe):
    """Hyper-V, by PowerShell."""

    name = "hyperv"
    formats = ("vhd",)


class Xen(Recipe):
    """Xen, by ``xl``."""

    name = "xen"
    formats = ("qcow2", "raw")
