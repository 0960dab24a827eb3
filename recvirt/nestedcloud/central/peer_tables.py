"""The tables of workers on other machines: what opens the way in for one, and what tunnel and broker know of it.

A worker of the central node's own machine has no row here. Nothing secret is kept: public keys, and digests.
"""

from __future__ import annotations

from django.conf import settings
from django.db import models

from recvirt.nestedcloud.central.compat import check_constraint
from recvirt.nestedcloud.central.things import Row, Worker, name_validator
from recvirt.nestedcloud.tunnel import INDEX_MIN


class Peer(Row):
    """A worker's end of the tunnel. ``index`` is its place in the cloud's prefix, and never given to another one.

    ``password_hash`` is what the broker keeps of its password. The one before, ``previous_hash``, opens nothing but the
    repetition of the change that made it so, whose answer may have been lost.
    """

    worker = models.OneToOneField(Worker, on_delete=models.CASCADE, related_name="peer")
    index = models.PositiveBigIntegerField(unique=True)
    public_key = models.CharField(max_length=44, unique=True)
    password_hash = models.CharField(max_length=48)
    previous_hash = models.CharField(max_length=48, blank=True)
    rotated = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints = [check_constraint(models.Q(index__gte=INDEX_MIN), "peer_index")]


class Invitation(Row):
    """One worker may join, once, until ``expires``. Only the secret's digest is kept."""

    digest = models.CharField(max_length=64, unique=True)
    name = models.CharField(max_length=63, blank=True, validators=[name_validator])
    made_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, on_delete=models.SET_NULL, related_name="invitations"
    )
    expires = models.DateTimeField()
    used = models.DateTimeField(null=True, blank=True)
    used_by = models.UUIDField(null=True, blank=True)
