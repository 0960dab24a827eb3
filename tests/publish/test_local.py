"""What CI does: all providers with a stand-in at once, from an accepted image, twice; and an interruption."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.publish import servers
from tests.publish.local import NAMES
from tests.publish.proxy import line
from tests.publish.services import environment
from tests.publish.support import Place

pytestmark = pytest.mark.slow


def test_all_providers_twice_and_the_second_run_sends_nothing(image: Path, tmp_path: Path) -> None:
    able = [name for name in NAMES if not servers.why_not(name)]
    words = [sys.executable, "-m", "tests.publish.local", "--image", str(image), "--receipts", str(tmp_path / "kept")]
    done = subprocess.run(
        [*words, *able], cwd=servers.ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = done.stdout.split("second:", 1)
    assert first.count("bytes sent") == len(able)
    assert second.count(" 0 bytes sent") == len(able)
    assert len(list((tmp_path / "kept").glob("*.json"))) == len(able)
    for name in able:
        assert list((tmp_path / "kept").glob(f"{name}-*/launch.sh")), name


def test_an_interruption_ends_the_run_at_once_and_the_next_goes_on(
    place: Place, image: Path, tmp_path: Path
) -> None:
    if servers.why_not("oci-registry"):
        pytest.skip(servers.why_not("oci-registry"))
    with servers.registry(tmp_path / "registry") as host, line(host, lambda _m, _p, _n: "slow") as slow:
        settings = [f"repository={slow.url.removeprefix('http://').rstrip('/')}/a/b", "insecure=true"]
        # A job in the background ignores the signal, and hands that down.
        words = ["env", "--default-signal=INT", sys.executable, "-m", "recvirt", "publish", "oci-registry"]
        words += [str(image), *place.options]
        words += [word for setting in settings for word in ("--set", f"oci-registry.{setting}")]
        process = subprocess.Popen(words, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
        while slow.count("POST") == 0 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
        assert "interrupted" in said
        slow.policy = lambda _m, _p, _n: ""
        (done,) = place.publish("oci-registry", image, settings)
        assert done["ids"]
