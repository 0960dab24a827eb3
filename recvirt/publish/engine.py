"""One run of ``recvirt publish`` or ``prune``: all checks and plans first, then each target in turn.

Owns the order: configurations, the image and its proof, static rules, plans; and only then the first byte. A target
that fails does not keep the next one from its turn; the run then ends with the first failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recvirt.errors import AcceptanceError, PublishError, RecvirtError
from recvirt.publish.accepted import Acceptance, check_report, find_report
from recvirt.publish.budget import Budget
from recvirt.publish.config import Targets
from recvirt.publish.journal import target_lock
from recvirt.publish.plan import Plan, Step, as_table
from recvirt.publish.provider import AnyProvider, Job, Remote
from recvirt.publish.receipt import Receipt, receipt_data, receipt_path, write_receipt
from recvirt.publish.recipe import write_recipe
from recvirt.publish.retire import choose
from recvirt.publish.signing import Signer
from recvirt.publish.source import SHORT, Source, load_source
from recvirt.ui import format_bytes, reporter

DEFAULT_WORKERS = 8


@dataclass(frozen=True)
class Options:
    """What the command line says about a run."""

    config: Path | None = None
    overrides: tuple[str, ...] = ()
    state_dir: Path = Path()
    receipts: Path = Path("build/receipts")
    report: Path | None = None
    unaccepted: bool = False
    workers: int | None = None
    force: bool = False


@dataclass(frozen=True)
class Done:
    """What became of one target."""

    target: str
    receipt: Receipt | None
    recipe: Path
    sent_bytes: int
    is_new: bool

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "target": self.target, "receipt": str(self.receipt.path) if self.receipt else None,
            "recipe": str(self.recipe), "sent_bytes": self.sent_bytes, "new": self.is_new,
            "ids": dict(self.receipt.data["ids"]) if self.receipt else {},
        }  # fmt: skip


def judge(image: Path, options: Options) -> Source:
    """The image, hashed, with what it proved. AcceptanceError unless it did, or unless that is not wanted."""

    def proof(sha256: str, profile: str) -> Acceptance | None:
        try:
            return check_report(options.report or find_report(image), image, sha256, profile)
        except AcceptanceError as error:
            if not options.unaccepted:
                raise
            reporter.warn(f"{error.message}; published all the same, and the receipt says so")
            return None

    with reporter.step("look at the image"):
        return load_source(image, proof)


def open_targets(names: Sequence[str], source: Source | None, options: Options) -> list[AnyProvider]:
    """The providers of all targets, each configuration checked. ConfigError with every fault of all of them."""
    targets = Targets(options.config, options.overrides)
    signer = Signer(targets.signing(), options.state_dir)
    loaded = [(name, targets.load(name)) for name in dict.fromkeys(names)]
    targets.done()
    providers = []
    for name, found in loaded:
        assert found is not None
        kind, config = found
        job = Job(
            target=name, source=source, state_dir=options.state_dir, signer=signer, budget=Budget(),
            workers=options.workers or config.workers or DEFAULT_WORKERS, force=options.force,
        )  # fmt: skip
        providers.append(kind(config, job))
    return providers


def make_plans(providers: Sequence[AnyProvider]) -> list[Plan]:
    """The plans of all targets: static rules first, for all of them, then a look at what is there."""
    for provider in providers:
        provider.check()
    return [_with_retired(provider, provider.whole_plan()) for provider in providers]


def _with_retired(provider: AnyProvider, plan: Plan) -> Plan:
    steps = [Step("retire", remote.name, note="once the new one is there") for remote in to_retire(provider)]
    return replace(plan, steps=(*plan.steps, *steps))


def to_retire(provider: AnyProvider) -> list[Remote]:
    """What ``keep`` lets go when the image is there: older ones of its profile, never the image itself."""
    if provider.config.keep is None:
        return []
    image, now = provider.job.image, datetime.now(UTC)
    remotes = [remote for remote in provider.remotes() if remote.profile.partition("@")[0] == image.profile]

    def is_it(remote: Remote) -> bool:
        return bool(remote.digest) and image.sha256.startswith(remote.digest[:SHORT])

    # Where it is not yet, it will be the newest.
    places = {remote.profile for remote in remotes} - {remote.profile for remote in remotes if is_it(remote)}
    coming = [Remote("", image.name, image.sha256, place, now) for place in places]
    chosen = choose([*remotes, *coming], keep=provider.config.keep, older_than_days=provider.config.keep_days, now=now)
    return [remote for remote in chosen if not is_it(remote)]


def publish(providers: Sequence[AnyProvider], options: Options) -> list[Done]:
    """Publish to each target in turn. Raises the first failure when all have had theirs."""
    done: list[Done] = []
    failures: list[tuple[str, RecvirtError]] = []
    for provider in providers:
        target = provider.job.target
        try:
            with reporter.step(f"publish to {target}"):
                done.append(_publish_one(provider, options))
        except RecvirtError as error:
            if len(providers) > 1:
                reporter.error(f"{target}: {error.message}", error.hint)
            failures.append((target, error))
    if failures and len(providers) > 1:
        names = ", ".join(target for target, _ in failures)
        failure = PublishError(f"{len(failures)} of {len(providers)} targets failed: {names}", hint="see above why")
        failure.exit_code = failures[0][1].exit_code
        raise failure
    if failures:
        raise failures[0][1]
    return done


def _publish_one(provider: AnyProvider, options: Options) -> Done:
    job, image = provider.job, provider.job.image
    with target_lock(job.state_dir, job.target, image.sha256):
        job.signer.ready()
        published = provider.publish()
        image.check_unchanged()
        path = receipt_path(options.receipts, job.target, image)
        recipe = write_recipe(path.with_suffix(""), provider, published)
        if not published.ids:
            # Nothing is anywhere: there is only a recipe.
            return Done(job.target, None, recipe, 0, False)
        data = receipt_data(job.target, provider.name, image, published, datetime.now(UTC))
        receipt, is_new = write_receipt(options.receipts, data, path, job.signer)
        for remote in to_retire(provider):
            provider.delete(remote)
            reporter.info(f"retired {remote.name}")
    what = f"{format_bytes(published.sent_bytes)} sent" if published.sent_bytes else "nothing was sent"
    reporter.info(f"{image.name}: {what}; {published.checked}; receipt: {receipt.path}")
    return Done(job.target, receipt, recipe, published.sent_bytes, is_new)


def prune(
    provider: AnyProvider, *, keep: int, older_than_days: float, dry_run: bool, now: datetime | None = None
) -> list[Remote]:
    """Delete what :func:`recvirt.publish.retire.choose` says, oldest first; returns it."""
    chosen = choose(provider.remotes(), keep=keep, older_than_days=older_than_days, now=now or datetime.now(UTC))
    for remote in chosen if not dry_run else ():
        provider.delete(remote)
        reporter.info(f"deleted {remote.name}")
    return chosen


__all__ = ["Done", "Options", "as_table", "judge", "make_plans", "open_targets", "prune", "publish"]
