"""Publish an image to servers of this machine, twice: the second run must send nothing (``make publish-local``).

    python -m tests.publish.local [--image FILE] [--unaccepted] PROVIDER...

The servers are started here and end with it; ``recvirt`` itself only gets their addresses.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.publish import servers
from tests.publish.services import ENVIRONMENT, SERVICES

NAMES = ("aws", "azure", "gcp", "openstack", "oci-registry", "mirror")


def publish(
    image: str, providers: list[str], settings: list[str], folder: Path, flags: list[str]
) -> list[dict[str, Any]]:
    """Run ``recvirt publish``; what it says in JSON."""
    words = [sys.executable, "-m", "recvirt", "publish", *providers, image, "--json", *flags]
    words += ["--state-dir", str(folder / "state"), "--receipts", str(folder / "receipts")]
    words += [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=False, env={**os.environ, **ENVIRONMENT})
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def main() -> None:
    """See the module's words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default="default", help="an image file, or a profile that was built")
    parser.add_argument("--unaccepted", action="store_true", help="publish what has no acceptance report")
    parser.add_argument("--receipts", type=Path, help="keep receipts and recipes here")
    parser.add_argument("providers", nargs="*", default=list(NAMES), metavar="PROVIDER")
    wish = parser.parse_args()
    providers = wish.providers or list(NAMES)
    for name in providers:
        if name not in NAMES:
            parser.error(f"nothing stands in for {name}; known: {', '.join(NAMES)}")
        if name != "mirror" and servers.why_not(SERVICES[name][1]):
            raise SystemExit(f"{name} {servers.why_not(SERVICES[name][1])}")
    flags = ["--unaccepted"] if wish.unaccepted else []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="recvirt-publish-")))
        settings = [f"mirror.path={folder / 'mirror'}"] if "mirror" in providers else []
        for name in providers:
            if name != "mirror":
                service = stack.enter_context(SERVICES[name][0](folder / name))
                settings += [f"{service.target}.{setting}" for setting in service.settings]
        for turn in ("first", "second"):
            started = time.monotonic()
            done = publish(wish.image, providers, settings, folder, flags)
            for item in done:
                print(f"{turn}: {item['target']:<14} {item['sent_bytes']:>14,} bytes sent")
            print(f"{turn}: {time.monotonic() - started:.1f} s", flush=True)
        if any(item["sent_bytes"] or item["new"] for item in done):
            raise SystemExit("the second run sent something, or wrote a new receipt")
        words = ["published", "--verify", "--state-dir", str(folder / "state"), "--receipts", str(folder / "receipts")]
        subprocess.run([sys.executable, "-m", "recvirt", *words], check=True)
        if wish.receipts:
            subprocess.run(["cp", "-r", "--", folder / "receipts", wish.receipts], check=True)


if __name__ == "__main__":
    main()
