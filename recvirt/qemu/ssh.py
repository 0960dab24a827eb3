"""Access to a guest by SSH: a throwaway key, and an ``ssh_config`` that both people and testinfra use.

The host's own ``ssh`` is used (package openssh-client): testinfra calls it by name.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from recvirt.run import Completed, find_tool, run

#: Name of the guest in the ssh_config.
HOST = "guest"
#: ssh appends a suffix of 17 characters to a control path while it makes the socket (sun_path holds 107).
_CONTROL_PATH_MAX = 107 - 17
#: A guest under TCG on a busy machine takes its time for the key exchange.
CONNECT_SECONDS = 60


def make_key(folder: Path, name: str = "id_ed25519") -> Path:
    """A new key pair without a passphrase; the public half is ``<name>.pub``."""
    key = folder / name
    for path in (key, key.with_name(f"{name}.pub")):
        path.unlink(missing_ok=True)
    run([find_tool("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", "recvirt-test", "-f", str(key)])
    return key


def sign(text: str, key: Path, namespace: str) -> str:
    """A signature of ``text`` in ssh-keygen(1)'s armour."""
    return run([find_tool("ssh-keygen"), "-Y", "sign", "-n", namespace, "-f", str(key)], input_text=text).stdout


@dataclass(frozen=True)
class SshAccess:
    """How to reach one running guest. ``folder`` holds the config and the control socket.

    ``proxy`` is the ssh_config of a guest through which this one is reached.
    """

    folder: Path
    port: int
    user: str
    key: Path
    host: str = "127.0.0.1"
    proxy: Path | None = None

    @property
    def config_path(self) -> Path:
        """The ssh_config of this guest."""
        return self.folder / "ssh_config"

    def config_text(self) -> str:
        """One ``Host``. Its host key is learned anew at each start, for a fresh image makes its own."""
        control = self.folder / "ssh.ctl"
        lines = [
            f"Host {HOST}",
            f"  HostName {self.host}",
            f"  Port {self.port}",
            f"  User {self.user}",
            f'  IdentityFile "{self.key}"',
            "  IdentitiesOnly yes",
            "  IdentityAgent none",
            "  BatchMode yes",
            "  StrictHostKeyChecking no",
            "  UserKnownHostsFile /dev/null",
            f"  ConnectTimeout {CONNECT_SECONDS}",
            "  ServerAliveInterval 15",
            "  ServerAliveCountMax 20",
            "  LogLevel ERROR",
        ]
        if self.proxy is not None:
            lines.append(f"  ProxyCommand ssh -F '{self.proxy}' -W %h:%p {HOST}")
        if len(str(control)) <= _CONTROL_PATH_MAX:
            # One connection for many commands; closed around reboots by close_shared().
            lines += [f'  ControlPath "{control}"', "  ControlMaster auto", "  ControlPersist 120"]
        return "\n".join(lines) + "\n"

    def write(self) -> SshAccess:
        """Write the ssh_config."""
        self.config_path.write_text(self.config_text())
        return self

    def argv(self, *command: str, shared: bool = True) -> list[str]:
        """``ssh`` into the guest; not over the shared connection unless ``shared``."""
        words = [find_tool("ssh"), "-F", str(self.config_path)]
        words += [] if shared else ["-o", "ControlMaster=no", "-o", "ControlPath=none"]
        return [*words, HOST, *command]

    def run(
        self, command: str, *, input_text: str | None = None, check: bool = True, seconds: float | None = None
    ) -> Completed:
        """Run a shell command in the guest over a connection of its own."""
        return run(self.argv(command, shared=False), input_text=input_text, check=check, timeout_seconds=seconds)

    def close_shared(self) -> None:
        """End the shared connection: before a reboot, and at the end."""
        if (self.folder / "ssh.ctl").exists():
            run([find_tool("ssh"), "-F", str(self.config_path), "-O", "exit", HOST], check=False, timeout_seconds=20)

    def banner(self, seconds: float = 5.0) -> bool:
        """Whether an SSH server greets at the port: cheap, and nothing of the guest's is needed but sshd."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
                connection.settimeout(seconds)
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False
