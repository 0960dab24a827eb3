"""Which certificate authorities https is checked against: the host's, so that a company's own CA counts everywhere.

A tools root ships Mozilla's list, which knows no company CA. Whatever reaches the network therefore uses the bundle
that ``SSL_CERT_FILE`` names (the variable that OpenSSL reads), else the one that the host's administrator maintains
(``update-ca-certificates(8)``). The sandbox binds it over the tools root's own. Does not own: archives' OpenPGP keys.
"""

from __future__ import annotations

import os
from pathlib import Path

from recvirt.errors import ConfigError

#: Where a tools root, being Debian, has its bundle.
INSIDE = Path("/etc/ssl/certs/ca-certificates.crt")
#: Where hosts keep theirs: Debian and most others, Fedora, openSUSE.
_HOST_BUNDLES = (
    INSIDE,
    Path("/etc/pki/tls/certs/ca-bundle.crt"),
    Path("/etc/ssl/ca-bundle.pem"),
)


def ca_bundle() -> Path | None:
    """The PEM file to trust, or None where the host has none. ConfigError if ``SSL_CERT_FILE`` can't be read."""
    named = os.environ.get("SSL_CERT_FILE", "")
    if named:
        path = Path(named)
        if not os.access(path, os.R_OK) or not path.is_file():
            raise ConfigError(f"SSL_CERT_FILE names {named}, which can't be read", hint="correct it, or unset it")
        return path.resolve()
    return next((path.resolve() for path in _HOST_BUNDLES if path.is_file()), None)
