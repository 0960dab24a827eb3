"""A machine joins over a real network: the API behind TLS, the dispatcher, root's service and WireGuard, each in the
namespace where it belongs. Only the broker is missing (``test_peers_broker``), and systemd.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from recvirt.nestedcloud import credentials, peers, tunnel
from recvirt.nestedcloud.provision import ProvisionError, read, toml
from tests.cloud.netns import Box, cable, until
from tests.cloud.test_tunnel_real import trouble

pytestmark = [pytest.mark.slow, pytest.mark.skipif(trouble() != "", reason=trouble() or "-")]
ROOT = Path(__file__).parents[2]
OWN = "33333333-3333-4333-8333-333333333333"
#: What runs on the worker, in its namespace: our code with systemd, the broker and the look at KVM left out.
WORKER = """
import os, sys
from pathlib import Path
from recvirt.nestedcloud import credentials, join, provision, pinned
def run(argv, text, user):
    if argv[0] in ("systemctl", "virsh", "recvirt-nested-check"):
        return ""
    return provision.run_program(argv, text, user)
owner = (os.geteuid(), os.getegid())
machine = provision.Machine(Path(sys.argv[1]), run, lambda _: owner, print, lambda _: True)
try:
    if sys.argv[2] == "join":
        join.join(machine, sys.argv[3], credentials.parse_token(sys.stdin.read()), name="shelf")
    elif sys.argv[2] == "refresh":
        print("refreshed", join.refresh(machine))
    else:
        getattr(join, sys.argv[2])(machine)
except pinned.LinkError as error:
    sys.exit(f"{error} / {error.hint}")
"""


class Central(Box):
    """The central node; its broker's tools say yes to everything."""

    def run(self, argv: Sequence[str], text: str, user: str | None) -> str:
        if argv[0] == "env":
            return ""
        return super().run(argv, text, user)


class World:
    """Both machines, and what runs on the central one."""

    def __init__(self, folder: Path) -> None:
        self.central, self.worker = Central(folder / "central"), Box(folder / "worker")
        self.address, _ = cable(self.central, self.worker)
        self.machine = self.central.machine
        self.stop = threading.Event()
        self.troubles: list[str] = []
        self._configure()
        self.administrator = self.on_central("administrator", "ada").strip()
        python = [sys.executable, "-m"]
        serve = ["uvicorn", "recvirt.nestedcloud.central.asgi:application", "--port", "443", "--log-level", "warning",
                 "--lifespan", "off", "--ssl-keyfile", str(folder / "key.pem"), "--ssl-certfile",
                 str(folder / "cert.pem")]  # fmt: skip
        self.central.start([*self.environment, *python, *serve, "--host", "0.0.0.0"])
        self.central.start([*self.environment, *python, *serve, "--host", "::"])
        self.central.start([*self.environment, *python, "recvirt.nestedcloud", "central", "dispatch"])
        threading.Thread(target=self._root_service, daemon=True).start()

    def _configure(self) -> None:
        folder = self.central.root.parent
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc",
                        "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem"), "-days", "1", "-subj",
                        "/CN=recvirt-cloud"], check=True, capture_output=True)  # fmt: skip
        (folder / "secret-key").write_text("k" * 50)
        self.cloud = uuid.uuid4()
        self.machine.etc.mkdir(parents=True)
        self.machine.state.mkdir(parents=True)
        tunnel.ensure_central(self.machine, self.cloud)
        tunnel.up(self.machine)
        self.machine.central.write_text(toml({
            "cloud": str(self.cloud), "database": f"sqlite:{folder / 'db'}", "broker": f"filesystem:{folder / 'queue'}",
            "secret_key_path": str(folder / "secret-key"), "state_dir": str(self.machine.state), "allowed_hosts": ["*"],
            "certificate_path": str(folder / "cert.pem"), "tunnel_path": str(tunnel.public_path(self.machine)),
        }))  # fmt: skip
        self.environment = ["env", f"RECVIRT_CLOUD_CONFIG={self.machine.central}", f"PYTHONPATH={ROOT}",
                            "DJANGO_SETTINGS_MODULE=recvirt.nestedcloud.central.settings"]  # fmt: skip
        self.on_central("migrate")
        self.on_central("init", "--worker", OWN, "--name", "local")

    def on_central(self, *words: str) -> str:
        argv = [*self.environment, sys.executable, "-m", "recvirt.nestedcloud", "central", *words]
        return Box.run(self.central, argv, "", None)

    def _root_service(self) -> None:
        while not self.stop.wait(0.3):
            try:
                peers.apply(self.machine)
            except (ProvisionError, OSError) as error:
                self.troubles.append(str(error))

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """As a client on the central node."""
        code = (
            "import json,ssl,sys,urllib.request as u; c=ssl._create_unverified_context();"
            "r=u.Request('https://127.0.0.1/api/v1/'+sys.argv[2],method=sys.argv[1],data=sys.argv[3].encode() or None,"
            "headers={'Authorization':'Bearer '+sys.stdin.read(),'Content-Type':'application/json'});"
            "print(u.urlopen(r,context=c,timeout=20).read().decode())"
        )
        words = ["python3", "-c", code, method, path, json.dumps(body) if body is not None else ""]
        return json.loads(Box.run(self.central, words, self.administrator, None))

    def on_worker(self, *words: str, text: str = "") -> subprocess.CompletedProcess[str]:
        argv = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-c", WORKER, str(self.worker.root), *words]
        return subprocess.run(self.worker.words(argv), input=text, capture_output=True, text=True, check=False,
                              timeout=240)  # fmt: skip

    def end(self) -> None:
        self.stop.set()
        self.worker.end()
        self.central.end()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        assert until(lambda: made.central.reaches_tls("127.0.0.1", 443), 60)
        yield made
    finally:
        made.end()


def test_a_machine_joins_changes_its_key_finds_a_new_one_and_is_shut_out(world: World) -> None:
    token = world.api("POST", "workers/invitations", {})["token"]
    url = f"https://{world.address}"
    wrong = str(credentials.Token(credentials.parse_token(token).secret, "ab" * 32))
    done = world.on_worker("join", url, text=wrong)
    assert done.returncode and "another certificate" in done.stderr
    done = world.on_worker("join", url, text=token)
    assert done.returncode == 0, done.stderr + done.stdout
    inside = str(tunnel.central_address(world.cloud))
    config = read(world.worker.machine.worker)
    assert config["name"] == "shelf" and f"@[{inside}]:5672" in config["broker"]
    # The API's certificate came through the tunnel.
    pem = (world.worker.machine.etc / "tunnel/central.pem").read_text()
    assert credentials.fingerprint_of(pem) == credentials.parse_token(token).fingerprint
    again = world.on_worker("join", url, text=token)
    assert again.returncode == 0, again.stderr

    key = (world.worker.machine.etc / "tunnel/key").read_text()
    done = world.on_worker("rotate")
    assert done.returncode == 0, done.stderr
    assert (world.worker.machine.etc / "tunnel/key").read_text() != key
    assert world.on_worker("refresh").stdout == "refreshed False\n"

    peers.rotate_tunnel(world.machine)
    done = world.on_worker("refresh")
    assert "refreshed True" in done.stdout, done.stderr
    assert until(lambda: world.worker.reaches_tls(inside, 443))

    assert world.api("POST", "workers/shelf/revoke", {})["status"] == "revoked"
    assert until(lambda: not world.worker.reaches_tls(inside, 443))
    done = world.on_worker("refresh")
    assert done.returncode and "revoked" in done.stderr
    assert world.troubles == []
    assert not list((world.machine.root / "run").iterdir())
