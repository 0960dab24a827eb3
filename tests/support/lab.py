"""``python -m tests.support.lab ARGUMENTS``: the real command line over small fake stages, for tests that kill it.

``LAB_DIR`` is a folder: ``hang`` in it makes the stage ``left`` run two programs (with ``alone`` only one) for a
minute; their group's leader is written to ``pid``. ``full`` makes ``right`` meet a full disk; ``flood`` makes ``base``
say a lot.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from recvirt import cli, pipeline
from recvirt.run import run
from recvirt.sandbox import ToolsRoot
from recvirt.stages.base import Work
from recvirt.ui import reporter
from tests.support.fakes import as_stages, diamond


def main() -> None:
    """Patch the stages and run."""
    folder = Path(os.environ["LAB_DIR"])

    def hang(work: Work) -> None:
        if (folder / "hang").exists():
            last = "exec sleep 60" if (folder / "alone").exists() else "sleep 60 & wait"
            script = f"echo $$ > '{folder}/pid.part'; mv '{folder}/pid.part' '{folder}/pid'; {last}"
            run(["sh", "-c", script], log_path=work.log)

    def fill(work: Work) -> None:
        if (folder / "full").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flood(work: Work) -> None:
        if (folder / "flood").exists():
            for number in range(20_000):
                reporter.info(f"line {number}")

    stages = diamond()
    stages["left"].act, stages["right"].act, stages["base"].act = hang, fill, flood
    pipeline.STAGES = as_stages(stages)
    cli.App.tools = lambda self, extra=None: ToolsRoot(Path("/nonexistent"))  # type: ignore[method-assign]
    cli.main()


if __name__ == "__main__":
    main()
