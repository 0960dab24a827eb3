"""Where a run of the benchmarks works, and recvirt's command line as it uses it.

Builds go through the command line, as a person's do. They use the ordinary cache, because a kernel in it is half an
hour's work; only stages that are about to be timed are taken out of it, and building puts them back.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recvirt.cli import App
from recvirt.model import Profile
from recvirt.pipeline import Planned, plan
from recvirt.run import Completed, run
from recvirt.sandbox import ToolsRoot
from recvirt.store import Output, remove_tree

CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Site:
    """The cache, and a folder for everything that the benchmarks make themselves."""

    cache_dir: Path
    work_dir: Path
    runs: int
    patience_seconds: float

    @property
    def build_dir(self) -> Path:
        """Where the images land."""
        return self.work_dir / "build"

    @property
    def app(self) -> App:
        """recvirt, in this process."""
        return App(cache_dir=self.cache_dir, build_dir=self.build_dir)

    def tools(self, extra: str | None = None) -> ToolsRoot:
        """A tools root, made first if it is not there."""
        return self.app.tools(extra)

    def log(self, name: str) -> Path:
        """A fresh log file."""
        path = self.work_dir / "logs" / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        return path

    def profile(self, name: str) -> Profile:
        """A profile, loaded."""
        return self.app.load(name).model

    def argv(self, *words: str) -> list[str]:
        """recvirt's command line."""
        own = ["--cache-dir", str(self.cache_dir), "--build-dir", str(self.build_dir), "--progress", "plain"]
        return [sys.executable, "-m", "recvirt", *own, *words]

    def recvirt(self, *words: str, log_name: str) -> Completed:
        """Run a command of recvirt's; CommandError when it fails."""
        return run(self.argv(*words), cwd=CHECKOUT, log_path=self.log(log_name))

    def recvirt_json(self, *words: str) -> Any:
        """What a command prints as JSON."""
        return json.loads(run(self.argv(*words), cwd=CHECKOUT).stdout)

    def planned(self, name: str) -> dict[str, Planned]:
        """The plan of a profile, by stage, as things are in the cache now."""
        app = self.app
        items = plan(self.profile(name), app.store, app.context(offline=True))
        return {item.stage.name: item for item in items}

    def output(self, profile: str, stage: str) -> Output:
        """A built stage; build the profile first."""
        output = self.planned(profile)[stage].output
        if output is None:
            raise LookupError(f"{stage} of {profile} is not in the cache")
        return output

    def forget(self, profile: str, *stages: str) -> None:
        """Take outputs out of the cache, so that the next build makes them again."""
        planned = self.planned(profile)
        for stage in stages:
            item = planned[stage]
            with self.app.store.lock(stage, item.key):
                folder = self.app.store.object_dir(stage, item.key)
                if folder.exists():
                    remove_tree(folder)
