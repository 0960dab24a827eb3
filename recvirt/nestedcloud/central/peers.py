"""Workers on other machines: invited, let in, changed, revoked; and the list of them that root applies.

The API has no root. What tunnel and broker should know is a document (:func:`publish`), which the dispatcher writes and
``recvirt-cloud central peers`` carries out. Owns who is let in.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import IntegrityError, transaction
from django.db.models import Max
from django.utils import timezone
from rest_framework import status
from rest_framework.exceptions import APIException

from recvirt.nestedcloud import credentials, tunnel
from recvirt.nestedcloud.central import audit
from recvirt.nestedcloud.central.models import ACTIVE_PHASES, Invitation, Operation, Peer, Worker
from recvirt.nestedcloud.central.problems import Refused
from recvirt.nestedcloud.model import Phase

#: Of one cloud at a time; each opens the way in.
INVITATIONS_MAX = 100
_INDEX_TRIES = 10
#: Taken by a route: ``workers/invitations``.
RESERVED_NAMES = ("invitations",)
FILE = "peers.json"


class Denied(Refused):
    """Somebody who may not come in, or not any more. ``code`` tells a worker what to say."""

    status_code = status.HTTP_403_FORBIDDEN
    default_code = "join-denied"

    def __init__(self, detail: str, code: str) -> None:
        APIException.__init__(self, detail, code)
        self.extra = {}


class NoTunnel(Refused):
    """This cloud takes no workers from other machines."""

    status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    default_code = "no-tunnel"


def certificate_fingerprint() -> str:
    """Of the certificate that the TLS front has; empty where the file is not there."""
    try:
        return credentials.fingerprint_of(Path(settings.CONFIG.certificate_path).read_text())
    except (OSError, ValueError):
        return ""


def central_tunnel() -> dict[str, Any]:
    """The central node's end of the tunnel, as root has told it. NoTunnel when there is none."""
    try:
        found: dict[str, Any] = json.loads(Path(settings.CONFIG.tunnel_path).read_text())
    except (OSError, ValueError):
        raise NoTunnel("this cloud has no tunnel for workers on other machines: recvirt-cloud setup makes it") from None
    return found


def cloud_uuid() -> uuid.UUID:
    """This cloud's."""
    return uuid.UUID(settings.CONFIG.cloud)


def address_of(peer: Peer) -> str:
    """Where a worker is in the tunnel."""
    return str(tunnel.peer_address(cloud_uuid(), peer.index))


def answer_to(peer: Peer) -> dict[str, Any]:
    """What a worker needs to know, and nothing secret."""
    found = central_tunnel()
    return {
        "cloud": settings.CONFIG.cloud, "uuid": str(peer.worker_id), "name": peer.worker.name,
        "address": address_of(peer), "central_address": found["address"], "central_public_key": found["public_key"],
        "port": found["port"], "certificate_sha256": certificate_fingerprint(),
    }  # fmt: skip


def invite(user: Any, name: str, lifetime: timedelta) -> tuple[Invitation, str]:
    """A new invitation, and the token that is shown this once."""
    central_tunnel()
    now = timezone.now()
    with transaction.atomic():
        # Whoever was not there in time, and whoever has come in, needs no row for ever; the audit log has both.
        Invitation.objects.filter(expires__lt=now - timedelta(days=30)).delete()
        if Invitation.objects.filter(used=None, expires__gt=now).count() >= INVITATIONS_MAX:
            raise Refused(f"{INVITATIONS_MAX} invitations are open already: remove some")
        if name:
            check_name_free(name)
        token = credentials.new_token(certificate_fingerprint())
        row = Invitation.objects.create(
            digest=credentials.digest_of(token.secret), name=name, made_by=user, expires=now + lifetime
        )
        audit.note(user, "worker.invited", row.uuid, None, name=name, expires=row.expires.isoformat())
    return row, str(token)


def check_name_free(name: str) -> None:
    """Refused when a worker that was not revoked has it."""
    if name in RESERVED_NAMES or Worker.objects.filter(name=name, revoked=False).exists():
        raise Refused(f"there is a worker called {name}")


def join(token: credentials.Token, worker_uuid: uuid.UUID, name: str, public_key: str, password_hash: str) -> Peer:
    """Let a worker in: once for an invitation. Asked again by the same one, the same. Denied says why not."""
    central = central_tunnel()
    now = timezone.now()
    with transaction.atomic():
        digest = credentials.digest_of(token.secret)
        invitation = Invitation.objects.select_for_update().filter(digest=digest).first()
        if invitation is None:
            raise Denied("the invitation is not valid", "invitation-unknown")
        if invitation.used_by is not None:
            return _again(invitation, worker_uuid, public_key, password_hash)
        if invitation.expires <= now:
            raise Denied("the invitation has expired", "invitation-expired")
        name = invitation.name or name
        if invitation.name == "" and name in RESERVED_NAMES:
            raise Refused(f"a worker can't be called {name}")
        peer = Peer.objects.select_related("worker").filter(worker_id=worker_uuid, worker__revoked=False).first()
        if peer is not None and (peer.public_key, peer.password_hash) == (public_key, password_hash):
            # It came in before, did not get the answer, and was invited once more.
            invitation.used, invitation.used_by = now, worker_uuid
            invitation.save()
            return peer
        if Worker.objects.filter(pk=worker_uuid).exists():
            raise Denied("this UUID is that of another worker", "worker-taken")
        if public_key == central["public_key"]:
            raise Denied("this key is another one's", "key-taken")
        peer = _let_in(worker_uuid, name, public_key, password_hash)
        invitation.used, invitation.used_by = now, worker_uuid
        invitation.save()
        audit.note(None, "worker.joined", worker_uuid, None, name=name, address=address_of(peer),
                   invitation=str(invitation.pk))  # fmt: skip
    return peer


def _again(invitation: Invitation, worker_uuid: uuid.UUID, public_key: str, password_hash: str) -> Peer:
    peer = Peer.objects.select_related("worker").filter(worker_id=worker_uuid).first()
    if peer is None or invitation.used_by != worker_uuid:
        raise Denied("the invitation was used already", "invitation-used")
    if peer.worker.revoked:
        raise Denied("this worker was revoked", "worker-revoked")
    if (peer.public_key, peer.password_hash) != (public_key, password_hash):
        raise Denied("the invitation was used already", "invitation-used")
    return peer


def _let_in(worker_uuid: uuid.UUID, name: str, public_key: str, password_hash: str) -> Peer:
    _free_name(name)
    if Peer.objects.filter(public_key=public_key).exists():
        raise Denied("this key is another one's", "key-taken")
    try:
        with transaction.atomic():
            worker = Worker.objects.create(uuid=worker_uuid, name=name)
    except IntegrityError:
        raise Refused(f"there is a worker called {name}") from None
    for _ in range(_INDEX_TRIES):
        last = Peer.objects.aggregate(last=Max("index"))["last"]
        try:
            with transaction.atomic():
                return Peer.objects.create(
                    worker=worker, index=(last or tunnel.CENTRAL_INDEX) + 1, public_key=public_key,
                    password_hash=password_hash,
                )  # fmt: skip
        except IntegrityError:
            # Another one has come in at the same moment.
            continue
    raise Refused("too many workers come in at once: try again")


def _free_name(name: str) -> None:
    """A revoked worker keeps its row, for its instances, and gives its name away."""
    taken = Worker.objects.select_for_update().filter(name=name).first()
    if taken is None:
        return
    if not taken.revoked:
        raise Refused(f"there is a worker called {name}")
    taken.name = f"{name[:54]}-{str(taken.pk)[:8]}"
    taken.save(update_fields=["name"])


def authenticate(worker_uuid: uuid.UUID, password: str) -> tuple[Peer, bool]:
    """The peer, locked, and whether the password is the one before. Denied without a word on what was wrong."""
    rows = Peer.objects.select_for_update(of=("self",)).select_related("worker")
    peer = rows.filter(worker_id=worker_uuid).first()
    current = credentials.opens(password, peer.password_hash if peer is not None else "")
    previous = credentials.opens(password, peer.previous_hash if peer is not None else "")
    if peer is None or not (current or previous):
        raise Denied("the worker's UUID or password is not valid", "worker-unknown")
    if peer.worker.revoked:
        raise Denied("this worker was revoked", "worker-revoked")
    return peer, not current


def rotate(peer: Peer, previous: bool, public_key: str, password_hash: str) -> None:
    """Another key and another password. The one before only asks for the same once more."""
    same = (peer.public_key, peer.password_hash) == (public_key, password_hash)
    if same:
        return
    if previous:
        raise Denied("this password was changed", "worker-unknown")
    others = Peer.objects.exclude(pk=peer.pk).filter(public_key=public_key)
    if others.exists() or public_key == central_tunnel()["public_key"]:
        raise Denied("this key is another one's", "key-taken")
    peer.previous_hash = peer.password_hash
    peer.public_key, peer.password_hash, peer.rotated = public_key, password_hash, timezone.now()
    peer.save()
    audit.note(None, "worker.rotated", peer.worker_id, None, name=peer.worker.name)


def revoke(worker: Worker, user: Any, why: str = "") -> None:
    """Called with the worker's row locked. Nothing is sent to it or heard of it any more; again changes nothing."""
    if worker.revoked:
        return
    if not Peer.objects.filter(worker=worker).exists():
        raise Refused(f"{worker.name} is the central node's own worker: drain it instead")
    worker.revoked = True
    worker.save(update_fields=["revoked"])
    Peer.objects.filter(worker=worker).update(previous_hash="")
    # The dispatcher ends them, as everything that nobody will answer.
    Operation.objects.filter(worker=worker, phase__in=ACTIVE_PHASES).update(phase=Phase.QUEUED.value, lease_until=None)
    audit.note(user, "worker.revoked", worker.pk, None, name=worker.name, **({"why": why} if why else {}))


def desired() -> dict[str, Any] | None:
    """What tunnel and broker should know; None while no worker ever came from another machine."""
    rows = list(Peer.objects.select_related("worker").order_by("index"))
    if not rows:
        return None
    return {
        "version": 1, "cloud": settings.CONFIG.cloud,
        "peers": [
            {"uuid": str(peer.worker_id), "public_key": peer.public_key, "address": address_of(peer),
             "password_hash": peer.password_hash}
            for peer in rows if not peer.worker.revoked
        ],
        "revoked": sorted(str(peer.worker_id) for peer in rows if peer.worker.revoked),
    }  # fmt: skip


def publish() -> bool:
    """Write the list for root, whole or not at all, if it is another one than is there; whether it was."""
    wanted = desired()
    path = Path(settings.CONFIG.state_dir) / FILE
    if wanted is None and not path.exists():
        return False
    text = json.dumps(wanted or _nobody(), indent=1) + "\n"
    try:
        if path.read_text() == text:
            return False
    except FileNotFoundError:
        pass
    part = path.with_name(f".{path.name}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o640)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.rename(path)
    return True


def _nobody() -> Mapping[str, Any]:
    """After a restore of a database that is older than the first worker."""
    return {"version": 1, "cloud": settings.CONFIG.cloud, "peers": [], "revoked": []}
