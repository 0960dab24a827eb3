"""The documents of workers on other machines."""

from __future__ import annotations

from typing import Any

from rest_framework import serializers
from rest_framework.exceptions import ValidationError

from recvirt.nestedcloud import credentials, tunnel
from recvirt.nestedcloud.central.models import Invitation, name_validator
from recvirt.nestedcloud.central.serializers import Strict

_LIFETIME_MIN, _LIFETIME_MAX, _LIFETIME = 60, 7 * 24 * 3600, 3600
_SECRET_MAX = 256


def _check_key(text: str) -> None:
    if not tunnel.is_key(text):
        raise ValidationError("a WireGuard public key has 32 bytes, in 44 characters of base64")


def _check_hash(text: str) -> None:
    if not credentials.is_password_hash(text):
        raise ValidationError("a salt of 4 bytes and a SHA-256 digest, in 48 characters of base64")


def _key(**words: Any) -> serializers.CharField:
    return serializers.CharField(max_length=44, validators=[_check_key], trim_whitespace=False, **words)


def _hash(**words: Any) -> serializers.CharField:
    return serializers.CharField(max_length=48, validators=[_check_hash], trim_whitespace=False, **words)


class NewInvitationSerializer(Strict):
    """A worker to be invited; without a name it says its own."""

    name = serializers.CharField(max_length=63, validators=[name_validator], required=False, trim_whitespace=False)
    seconds = serializers.IntegerField(min_value=_LIFETIME_MIN, max_value=_LIFETIME_MAX, default=_LIFETIME)


class InvitationSerializer(serializers.ModelSerializer[Invitation]):
    """An invitation without its secret."""

    made_by = serializers.CharField(source="made_by.username", read_only=True, default=None)

    class Meta:
        model = Invitation
        fields = ["uuid", "name", "made_by", "created", "expires", "used", "used_by"]


class IssuedInvitationSerializer(InvitationSerializer):
    """A new invitation; ``token`` is shown this once."""

    token = serializers.CharField(read_only=True)

    class Meta(InvitationSerializer.Meta):
        fields = [*InvitationSerializer.Meta.fields, "token"]


class JoinSerializer(Strict):
    """A worker that was invited. Of its password only the hash is told (RabbitMQ's salted SHA-256)."""

    token = serializers.CharField(max_length=_SECRET_MAX, trim_whitespace=False)
    uuid = serializers.UUIDField()
    name = serializers.CharField(max_length=63, validators=[name_validator], trim_whitespace=False)
    public_key = _key()
    password_hash = _hash()

    def validate_token(self, text: str) -> credentials.Token:
        """As it was shown."""
        try:
            return credentials.parse_token(text)
        except ValueError as error:
            raise ValidationError(str(error)) from None


class PeerSerializer(Strict):
    """A worker that is in: asks for what it needs to know, or changes key and password, or leaves."""

    uuid = serializers.UUIDField()
    password = serializers.CharField(max_length=_SECRET_MAX, trim_whitespace=False)
    public_key = _key(required=False)
    password_hash = _hash(required=False)
    leave = serializers.BooleanField(default=False)

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        """Key and password are changed together, or not."""
        if ("public_key" in attrs) != ("password_hash" in attrs):
            raise ValidationError("want public_key and password_hash together")
        if attrs["leave"] and "public_key" in attrs:
            raise ValidationError("want a change, or to leave")
        return attrs


class WelcomeSerializer(Strict):
    """What a worker needs to know of the cloud."""

    cloud = serializers.UUIDField()
    uuid = serializers.UUIDField()
    name = serializers.CharField()
    address = serializers.CharField()
    central_address = serializers.CharField()
    central_public_key = serializers.CharField()
    port = serializers.IntegerField()
    certificate_sha256 = serializers.CharField(allow_blank=True)
