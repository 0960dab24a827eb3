"""What every provider does: look, plan, publish, list and delete. Each lives in a module of its own.

A provider gets a :class:`Job` and never prints, locks, signs or decides what is retired: the engine does.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeAlias, TypeVar

from pydantic import AfterValidator, Field, StringConstraints

from recvirt import __version__
from recvirt.model import Model
from recvirt.publish.budget import Budget
from recvirt.publish.http import Http
from recvirt.publish.journal import Journal
from recvirt.publish.plan import Plan, Step
from recvirt.publish.signing import Signer
from recvirt.publish.source import Source

#: What our things are known by at every provider.
TAG = "recvirt"
TAG_DIGEST = "recvirt-digest"
TAG_PROFILE = "recvirt-profile"
TAG_VERSION = "recvirt-version"
TAG_ACCEPTED = "recvirt-accepted"


def _web_address(text: str) -> str:
    if not re.match(r"^https?://[^\s\"'<>\\@]+$", text):
        raise ValueError("must be http:// or https:// without blanks, quotes or a user's name")
    return text.rstrip("/")


WebAddress = Annotated[str, AfterValidator(_web_address)]
#: A word that lands in names, tags and command lines.
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class TargetConfig(Model):
    """The keys that every target has."""

    provider: str | None = Field(default=None, description="the provider, where the target's name is another one")
    folder: str = Field(default=".", description="what relative paths are relative to: the configuration's folder")
    workers: int | None = Field(default=None, ge=1, le=64, description="parts sent at once; --workers wins")
    keep: int | None = Field(
        default=None, ge=1, description="once the image is there, retire all but so many of its profile; unset: none"
    )
    keep_days: float = Field(default=0.0, ge=0, description="with `keep`: what is younger than so many days stays")
    timeout: int = Field(default=60, ge=1, le=3600, description="seconds that one answer may take")

    def path_to(self, text: str) -> Path:
        """A path of the configuration, made absolute."""
        return Path(self.folder, Path(text).expanduser()).absolute()


@dataclass(frozen=True)
class Job:
    """What a provider gets for one run. ``source`` is None when only listing and deleting is wanted."""

    target: str
    source: Source | None
    state_dir: Path
    workers: int
    signer: Signer
    budget: Budget = field(default_factory=Budget)
    force: bool = False

    @property
    def image(self) -> Source:
        """The image that is published."""
        assert self.source is not None
        return self.source

    @contextmanager
    def journal(self) -> Iterator[Journal]:
        """What an earlier run of this target and image has sent already."""
        with Journal.open(self.state_dir, self.target, self.image.sha256) as journal:
            yield journal

    def tags(self) -> dict[str, str]:
        """What the image is tagged with everywhere."""
        image = self.image
        return {
            TAG: "image", TAG_DIGEST: image.sha256, TAG_PROFILE: image.profile, TAG_VERSION: __version__,
            TAG_ACCEPTED: "yes" if image.acceptance else "no",
        }  # fmt: skip


@dataclass(frozen=True)
class Published:
    """Where an image is now. ``ids`` are the provider's own names; ``checked`` says how the content was compared."""

    ids: Mapping[str, str]
    checked: str
    locations: tuple[str, ...] = ()
    sent_bytes: int = 0


@dataclass(frozen=True)
class Remote:
    """One of our images at a provider, for pruning. ``in_use`` is None where the provider can't tell."""

    identity: str
    name: str
    digest: str
    profile: str
    created: datetime
    in_use: bool | None = None
    extra: Mapping[str, str] = field(default_factory=dict)


Config = TypeVar("Config", bound=TargetConfig)


class Provider(ABC, Generic[Config]):
    """One target of a provider, whose configuration is a ``Config``."""

    #: Its name in configurations; how its launch recipe's templates are called.
    name: ClassVar[str]
    config_model: ClassVar[type[TargetConfig]]

    def __init__(self, config: Config, job: Job) -> None:
        self.config, self.job = config, job

    @cached_property
    def http(self) -> Http:
        """A session for those that speak HTTP themselves."""
        return Http(self.job.budget, timeout=self.config.timeout, workers=self.job.workers)

    def check(self) -> None:
        """ConfigError or PublishError for what the provider would refuse later; without the network."""

    @abstractmethod
    def plan(self) -> tuple[Step, ...]:
        """Look at what is there. Sends nothing."""

    @abstractmethod
    def publish(self) -> Published:
        """Do what is missing, and compare what is there with the image. A second call changes nothing."""

    @abstractmethod
    def remotes(self) -> list[Remote]:
        """Our images at this target."""

    @abstractmethod
    def delete(self, remote: Remote) -> None:
        """Delete one of them. One that somebody else has just deleted is no fault."""

    def recipe(self, published: Published) -> dict[str, Any]:
        """What the launch recipe's templates need besides the image's own facts."""
        return {"ids": dict(published.ids)}

    def whole_plan(self) -> Plan:
        """The plan with its head."""
        return Plan(self.job.target, self.name, self.job.image.name, self.plan())


#: A provider for those who don't look into its configuration.
AnyProvider: TypeAlias = Provider[Any]
