"""A RabbitMQ of a test's own, on the loopback: data, cookie and port mapper in its folder, gone afterwards."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

_DEBIAN = Path("/usr/lib/rabbitmq/bin")
#: Erlang takes its time on a busy machine.
_START_SECONDS = 300.0


def program() -> Path | None:
    """The server's own script: the one in PATH becomes another user first, who can't reach a test's folder."""
    found = next(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server"), None)
    return found or (_DEBIAN / "rabbitmq-server" if (_DEBIAN / "rabbitmq-server").exists() else None)


def free_port() -> int:
    """One that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RabbitMq:
    """Start, kill and start again with what it had."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._mapper = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.default = 127.0.0.1:{self.port}\ndisk_free_limit.absolute = 10MB\n"
        )
        self._environment = {
            **os.environ, "HOME": str(folder), "ERL_EPMD_PORT": str(self._mapper), "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"test{self.port}@localhost", "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"), "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"), "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"), "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }  # fmt: skip
        (folder / "plugins").write_text("[].")

    @property
    def url(self) -> str:
        """As its well-known user, who may come from the loopback alone."""
        return self.url_at(self.port)

    @staticmethod
    def url_at(port: int) -> str:
        """Through another port."""
        return f"amqp://guest:guest@127.0.0.1:{port}//"

    def start(self) -> None:
        """Start it and wait until it takes a login."""
        from kombu.connection import Connection

        script = program()
        assert script is not None
        with (self.folder / "out").open("ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", str(script)], env=self._environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                with Connection(self.url, connect_timeout=10) as connection:  # type: ignore[no-untyped-call]
                    connection.connect()
                return
            except Exception:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise RuntimeError((self.folder / "out").read_text()[-3000:]) from None
                time.sleep(0.5)

    def kill(self) -> None:
        """As kill -9 does."""
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it, and its port mapper."""
        self.kill()
        mapper = shutil.which("epmd")
        # It refuses as long as it has not noticed that the node is gone.
        for _ in range(20 if mapper is not None else 0):
            words = [str(mapper), "-port", str(self._mapper), "-kill"]
            if "Killed" in subprocess.run(words, capture_output=True, text=True, check=False).stdout:
                break
            time.sleep(0.5)
