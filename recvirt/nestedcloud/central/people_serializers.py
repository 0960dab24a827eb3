"""The documents of projects, members, users and tokens."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.models import User
from django.core.validators import RegexValidator
from rest_framework import serializers
from rest_framework.exceptions import ValidationError

from recvirt.nestedcloud.central.models import ApiToken, Membership, Role, name_validator
from recvirt.nestedcloud.central.serializers import Strict

USERNAME = r"[a-z0-9](?:[a-z0-9._-]{0,62})"
username_validator = RegexValidator(rf"\A{USERNAME}\Z", "letters a to z, digits, . _ and -, 63 at most")
_DAYS_MAX = 3660


class _Quotas(Strict):
    instances_max = serializers.IntegerField(min_value=0, max_value=100000, required=False)
    vcpus_max = serializers.IntegerField(min_value=0, max_value=1000000, required=False)
    memory_bytes_max = serializers.IntegerField(min_value=0, max_value=2**50, required=False)
    disk_bytes_max = serializers.IntegerField(min_value=0, max_value=2**60, required=False)
    forwards_max = serializers.IntegerField(min_value=0, max_value=60000, required=False)


class NewProjectSerializer(_Quotas):
    """A project to be made; quotas that are not named have their defaults."""

    name = serializers.CharField(max_length=63, validators=[name_validator], trim_whitespace=False)


class QuotaSerializer(_Quotas):
    """Quotas to be changed. One below what is used now only keeps more from being taken."""

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        """At least one change."""
        if not attrs:
            raise ValidationError("nothing is to be changed")
        return attrs


class MemberSerializer(serializers.ModelSerializer[Membership]):
    """A member of a project."""

    user = serializers.CharField(source="user.username", read_only=True)

    class Meta:
        model = Membership
        fields = ["user", "role", "created"]


class NewMemberSerializer(Strict):
    """A user to be taken into a project, by name."""

    user = serializers.CharField(max_length=63)
    role = serializers.ChoiceField(choices=Role.choices, default=Role.OPERATOR)


class RoleSerializer(Strict):
    """Another role."""

    role = serializers.ChoiceField(choices=Role.choices)


class UserSerializer(serializers.ModelSerializer[User]):
    """A user. Nobody has a password: tokens open the API."""

    name = serializers.CharField(source="username", read_only=True)
    administrator = serializers.BooleanField(source="is_superuser", read_only=True)
    active = serializers.BooleanField(source="is_active", read_only=True)

    class Meta:
        model = User
        fields = ["name", "administrator", "active", "date_joined"]


class NewUserSerializer(Strict):
    """A user to be made."""

    name = serializers.CharField(validators=[username_validator], trim_whitespace=False)
    administrator = serializers.BooleanField(default=False)


class UserChangeSerializer(Strict):
    """A user who is locked out, or let in again."""

    active = serializers.BooleanField()


class TokenSerializer(serializers.ModelSerializer[ApiToken]):
    """A token without its secret."""

    user = serializers.CharField(source="user.username", read_only=True)
    project = serializers.CharField(source="project.name", read_only=True, default=None)

    class Meta:
        model = ApiToken
        fields = ["uuid", "name", "user", "project", "read_only", "created", "expires", "last_used"]


class IssuedTokenSerializer(TokenSerializer):
    """A new token; ``secret`` is shown this once."""

    secret = serializers.CharField(read_only=True)

    class Meta(TokenSerializer.Meta):
        fields = [*TokenSerializer.Meta.fields, "secret"]


class NewTokenSerializer(Strict):
    """A token to be issued: for oneself, or by an administrator for somebody else."""

    name = serializers.CharField(max_length=63)
    user = serializers.CharField(max_length=63, required=False)
    project = serializers.CharField(max_length=63, required=False, allow_null=True)
    read_only = serializers.BooleanField(default=False)  # type: ignore[assignment]
    days = serializers.IntegerField(min_value=1, max_value=_DAYS_MAX, required=False, allow_null=True)


class WhoSerializer(Strict):
    """Who one is to the cloud."""

    name = serializers.CharField()
    administrator = serializers.BooleanField()
    token = TokenSerializer()
    projects = serializers.DictField(child=serializers.ChoiceField(choices=Role.choices))
