"""What an ASGI server runs."""

from __future__ import annotations

import os

from django.core.asgi import get_asgi_application

from recvirt.nestedcloud.central.bodies import bounded

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "recvirt.nestedcloud.central.settings")
application = bounded(get_asgi_application())
