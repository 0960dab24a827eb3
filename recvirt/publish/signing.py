"""Signatures by ssh-keygen(1): what is in every Debian, with keys that people have already.

``ssh-keygen -Y sign`` writes an armoured signature over a file, bound to a namespace so that it can't pass for one of
another kind; ``-Y verify`` checks it against a list of allowed signers. The only user of that program here.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pydantic import Field

from recvirt.errors import RecvirtError, VerificationError
from recvirt.model import Model
from recvirt.run import run

#: What the signatures are for: receipts, and checksums of a mirror.
RECEIPT, CHECKSUMS = "recvirt-receipt", "recvirt-checksums"
_SECONDS = 60.0
_WHO = "recvirt"


class Signing(Model):
    """Who signs receipts."""

    key: str | None = Field(default=None, description="an SSH private key; unset: one that recvirt makes for itself")
    allowed_signers: str | None = Field(default=None, description="whom `recvirt published --verify` believes")


class Signer:
    """Signs and verifies with one key; makes one for itself where none is configured."""

    def __init__(self, signing: Signing, state_dir: Path) -> None:
        self._own = signing.key is None
        self.key = Path(signing.key) if signing.key else state_dir / "receipt-key"
        self._allowed = Path(signing.allowed_signers) if signing.allowed_signers else None

    def ready(self) -> None:
        """RecvirtError unless there is a key to sign with; our own is made when it is not there."""
        if self.key.is_file():
            return
        if not self._own:
            raise RecvirtError(f"there is no key {self.key} to sign with", hint="signing.key in publish.yaml names it")
        self.key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=self.key.parent) as folder:
            made = Path(folder, "key")
            argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "recvirt receipts", "-f", str(made)]
            run(argv, timeout_seconds=_SECONDS)
            # The public half first: a key that is there has one. Of two runs at once one key wins.
            try:
                os.link(made, self.key)
            except FileExistsError:
                return
            made.with_name("key.pub").replace(self.public_key)

    @property
    def public_key(self) -> Path:
        """The public half."""
        return self.key.with_name(self.key.name + ".pub")

    def sign(self, text: bytes, namespace: str) -> bytes:
        """An armoured signature over ``text``. CommandError when the key can't sign (a passphrase without an agent)."""
        self.ready()
        with tempfile.TemporaryDirectory(prefix="recvirt-sign-") as folder:
            message = Path(folder, "message")
            message.write_bytes(text)
            run(
                ["ssh-keygen", "-Y", "sign", "-q", "-n", namespace, "-f", str(self.key), str(message)],
                timeout_seconds=_SECONDS, hint="a key with a passphrase wants an agent: name its .pub as signing.key",
                env={name: os.environ[name] for name in ("SSH_AUTH_SOCK",) if name in os.environ},
            )  # fmt: skip
            return message.with_name("message.sig").read_bytes()

    def verify(self, text: bytes, signature: bytes, namespace: str) -> None:
        """VerificationError unless an allowed signer (without a list: our own key) signed exactly this text."""
        with tempfile.TemporaryDirectory(prefix="recvirt-verify-") as folder:
            allowed = self._allowed or Path(folder, "allowed")
            if self._allowed is None:
                allowed.write_text(f"{_WHO} {self._public_line()}\n")
            sealed = Path(folder, "signature")
            sealed.write_bytes(signature)
            who = self._principal(allowed, sealed)
            argv = ["ssh-keygen", "-Y", "verify", "-q", "-f", str(allowed), "-I", who, "-n", namespace]
            done = run([*argv, "-s", str(sealed)], input_text=text.decode(), check=False, timeout_seconds=_SECONDS)
            if done.status != 0:
                said = (done.stderr or done.stdout).strip().splitlines()
                raise VerificationError(f"the signature does not hold: {said[-1] if said else 'no reason given'}")

    def _principal(self, allowed: Path, sealed: Path) -> str:
        argv = ["ssh-keygen", "-Y", "find-principals", "-f", str(allowed), "-s", str(sealed)]
        done = run(argv, check=False, timeout_seconds=_SECONDS)
        names = done.stdout.split()
        if done.status != 0 or not names:
            raise VerificationError(
                "the signature is damaged, or by nobody who may sign", hint="signing.allowed_signers lists who may"
            )
        return names[0].split(",")[0]

    def _public_line(self) -> str:
        path = self.key if self.key.suffix == ".pub" else self.public_key
        try:
            return path.read_text().strip()
        except OSError:
            raise VerificationError(
                f"there is no public key {path} to check with", hint="name one: signing.allowed_signers in publish.yaml"
            ) from None
