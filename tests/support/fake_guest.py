"""A guest made of prepared answers, so that a check can be shown good and bad systems in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recvirt.accept.context import Acceptance, Promises
from recvirt.accept.guest import Guest, Said
from recvirt.accept.results import ImageFacts
from recvirt.model import Profile
from recvirt.qemu import Accelerator, CloudConfig, SshAccess
from recvirt.sandbox import ToolsRoot


class FakeGuest(Guest):
    """Answers a command with the entry whose key is part of it; a status other than 0 comes as (status, text)."""

    answers: Mapping[str, str | tuple[int, str]] = {}

    def run(self, command: str, *, root: bool = True, seconds: float = 60.0) -> Said:
        for part, answer in self.answers.items():
            if part in command:
                status, text = answer if isinstance(answer, tuple) else (0, answer)
                return Said(command, status, text, "" if status == 0 else text)
        raise AssertionError(f"an unexpected command: {command}")


def acceptance(tmp_path: Path, *, promises: Promises | None = None, **profile: Any) -> Acceptance:
    """A run on an image that does not exist."""
    key = tmp_path / "key"
    key.with_name("key.pub").write_text("ssh-ed25519 AAAAtestkey recvirt-test\n")
    facts = ImageFacts("/image.qcow2", "0" * 64, "qcow2", 1000, 4 * 1024**3)
    model = Profile.model_validate({"name": "default", **profile}, strict=False)
    return Acceptance(
        Path("/image.qcow2"), facts, model, promises or Promises(), ToolsRoot(tmp_path), Accelerator("kvm", "test"),
        tmp_path, key,
    )  # fmt: skip


def guest(
    tmp_path: Path, answers: Mapping[str, str | tuple[int, str]], *, promises: Promises | None = None, **profile: Any
) -> FakeGuest:
    """A guest of such a run."""
    run = acceptance(tmp_path, promises=promises, **profile)
    made = FakeGuest(run, "fake", SshAccess(tmp_path, 1, "u", run.key), None, CloudConfig("i", "h"))
    made.answers = answers
    return made
