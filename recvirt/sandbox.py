"""Runs programs of a *tools root* (a Debian tree of our own) in their own namespaces.

Owns: the command line of ``bwrap`` and the user-namespace mapping. The host's compiler, QEMU, GRUB and mkfs never
matter: a tools root brings them. The same call works as root and as an ordinary user; mounts vanish with the namespace
and every process dies with recvirt (``--die-with-parent``, a PID namespace), so nothing is left behind.
Paths are the same inside and outside. Does not own: how a tools root is made (``toolsroot.py``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from recvirt.run import Completed, find_tool, minimal_env, run
from recvirt.trust import INSIDE, ca_bundle

#: Trees of the root that no bind may shadow; everything else is a fresh tmpfs where mount points can be made.
_MERGED = ("bin", "sbin", "lib", "lib64", "lib32")
_VAR_LIB = ("dpkg", "ucf", "systemd", "pam")
#: Host files that name resolution needs; a missing one is passed over. (TLS: see trust.py.)
_HOST_FILES = ("/etc/resolv.conf", "/etc/hosts")


@dataclass(frozen=True)
class ToolsRoot:
    """A tools root on disk: ``directory/rootfs`` is the tree, ``directory/packages.json`` maps package to version."""

    directory: Path

    @property
    def rootfs(self) -> Path:
        """The Debian tree."""
        return self.directory / "rootfs"

    @cached_property
    def versions(self) -> dict[str, str]:
        """Installed packages and their versions."""
        data: dict[str, str] = json.loads((self.directory / "packages.json").read_text())
        return data

    def version_of(self, *packages: str) -> tuple[str, ...]:
        """``name=version`` for each package, for cache keys (``name=`` when it is not installed)."""
        return tuple(f"{name}={self.versions.get(name, '')}" for name in packages)

    def argv(
        self,
        command: Sequence[str],
        *,
        writable: Sequence[Path] = (),
        readable: Sequence[Path] = (),
        network: bool = False,
        all_ids: bool = False,
        devices: Sequence[Path] = (),
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        cover: Mapping[Path, Path] | None = None,
        writable_at: Mapping[Path, Path] | None = None,
    ) -> list[str]:
        """The host command that runs ``command`` inside.

        ``writable`` and ``readable`` are host paths bound at the same place. ``network`` shares the host's network
        (else there is only a loopback). ``all_ids`` maps the whole sub-id range of an ordinary user, which work on
        trees with several owners needs (newuidmap(1), package uidmap); without it only uid 0 exists inside.
        ``devices`` are bound with access, as ``/dev/kvm``. ``cover`` binds host files and folders
        (read-only) over paths of the tree; ``writable_at`` does it writably: some bytes depend on where they are built.
        """
        words: list[str] = []
        if all_ids:
            # As root there is nothing to map; a mount and PID namespace is still wanted.
            mapping = [] if os.geteuid() == 0 else ["--user", "--map-auto", "--map-root-user"]
            if mapping:
                find_tool("newuidmap")
            words += [find_tool("unshare"), *mapping, "--mount", "--pid", "--fork", "--kill-child"]
            # bwrap looks its child up in /proc, which must be that of the new PID namespace.
            words += ["--mount-proc", "--"]
        words += [find_tool("bwrap"), "--die-with-parent", "--unshare-pid", "--unshare-ipc", "--unshare-uts"]
        if not all_ids and os.geteuid() != 0:
            words += ["--unshare-user", "--uid", "0", "--gid", "0"]
        if not network:
            words += ["--unshare-net"]
        words += self._tree_words()
        for name in _HOST_FILES:
            if network and Path(name).exists():
                words += ["--ro-bind", os.path.realpath(name), name]
        if network and (bundle := ca_bundle()) and (self.rootfs / INSIDE.relative_to("/")).exists():
            words += ["--ro-bind", str(bundle), str(INSIDE), "--setenv", "SSL_CERT_FILE", str(INSIDE)]
        for device in devices:
            words += ["--dev-bind-try", str(device), str(device)]
        for path in readable:
            words += ["--ro-bind", str(path), str(path)]
        for path in writable:
            words += ["--bind", str(path), str(path)]
        for inside, outside in (writable_at or {}).items():
            words += ["--bind", str(outside), str(inside)]
        for inside, outside in (cover or {}).items():
            words += ["--ro-bind", str(outside), str(inside)]
        words += ["--chdir", str(cwd or "/")]
        for name, value in self._environment(env).items():
            words += ["--setenv", name, value]
        return [*words, "--", *command]

    def _environment(self, env: Mapping[str, str] | None) -> dict[str, str]:
        kept = {k: v for k, v in minimal_env().items() if k.lower().endswith("_proxy")}
        base = {
            "HOME": "/root", "TMPDIR": "/tmp", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive",
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        }  # fmt: skip
        return {**kept, **base, **(env or {})}

    def _tree_words(self) -> list[str]:
        words = ["--ro-bind", f"{self.rootfs}/usr", "/usr", "--ro-bind", f"{self.rootfs}/etc", "/etc"]
        for name in _MERGED:
            if (self.rootfs / name).is_symlink():
                words += ["--symlink", f"usr/{name}", f"/{name}"]
        words += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--tmpfs", "/tmp"]
        words += ["--dir", "/run", "--dir", "/root", "--dir", "/var/tmp", "--dir", "/var/cache", "--dir", "/var/lib"]
        for name in _VAR_LIB:
            if (self.rootfs / "var/lib" / name).is_dir():
                words += ["--ro-bind", f"{self.rootfs}/var/lib/{name}", f"/var/lib/{name}"]
        return words

    def run(
        self,
        command: Sequence[str],
        *,
        writable: Sequence[Path] = (),
        readable: Sequence[Path] = (),
        network: bool = False,
        all_ids: bool = False,
        devices: Sequence[Path] = (),
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        cover: Mapping[Path, Path] | None = None,
        writable_at: Mapping[Path, Path] | None = None,
        input_text: str | None = None,
        log_path: Path | None = None,
        check: bool = True,
        ok_statuses: Sequence[int] = (0,),
        timeout_seconds: float | None = None,
        on_line: Callable[[str], None] | None = None,
        feed: Callable[[BinaryIO], None] | None = None,
        hint: str = "",
    ) -> Completed:
        """Run ``command`` inside to its end; see :meth:`argv` and, for the rest, :func:`recvirt.run.run`."""
        words = self.argv(
            command, writable=writable, readable=readable, network=network, all_ids=all_ids, devices=devices,
            cwd=cwd, env=env, cover=cover, writable_at=writable_at,
        )  # fmt: skip
        return run(
            words, input_text=input_text, log_path=log_path, check=check, ok_statuses=ok_statuses,
            timeout_seconds=timeout_seconds, on_line=on_line, feed=feed, hint=hint,
        )  # fmt: skip
