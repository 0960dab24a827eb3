"""Images that packages bring to a host: where they lie, and how the central node names one to a worker.

Standard library only. Does not own: who registers them (``central.bundled``) or copies them (``worker.images``).
"""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path("/usr/share/recvirt-cloud/images")
#: Before a file's name: a URL that the API takes from nobody.
SCHEME = "bundled:"
FILE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,99}\.(?:qcow2|raw)")
