"""Where the API's documents are."""

from __future__ import annotations

from django.urls import include, path
from rest_framework.routers import DefaultRouter

from recvirt.nestedcloud.central import (
    console_views,
    forward_views,
    health,
    openapi,
    peer_views,
    people,
    relay,
    storage_views,
    stream,
    times,
    views,
)
from recvirt.nestedcloud.model import NAME

router = DefaultRouter(trailing_slash=False)
router.register("projects", people.Projects, basename="project")
router.register("users", people.Users, basename="user")
router.register("tokens", people.Tokens, basename="token")
router.register("audit", people.Audit, basename="audit")
# Before the workers: one of them can't be called so.
router.register("workers/invitations", peer_views.Invitations, basename="invitation")
router.register("workers", peer_views.Workers, basename="worker")
_below = rf"projects/(?P<project>{NAME.pattern})"
router.register(f"{_below}/instances", views.Instances, basename="instance")
router.register(f"{_below}/operations", views.Operations, basename="operation")
router.register(f"{_below}/images", storage_views.Images, basename="image")
router.register(f"{_below}/volumes", storage_views.Volumes, basename="volume")
router.register(f"{_below}/networks", views.Networks, basename="network")
router.register(f"{_below}/forwards", forward_views.Forwards, basename="forward")
router.register(f"{_below}/events", views.Events, basename="event")
router.register(f"{_below}/members", people.Members, basename="member")
router.register(f"{_below}/schedules", times.Schedules, basename="schedule")
router.register(f"{_below}/reservations", times.Reservations, basename="reservation")

_instance = "api/v1/projects/<slug:project>/instances/<slug:name>"

urlpatterns = [
    path(f"{_instance}/console", console_views.Consoles.as_view({"post": "console"})),
    path(f"{_instance}/log", console_views.Consoles.as_view({"post": "log"})),
    path("api/v1/console/<uuid:session>", relay.console_socket),
    path("api/v1/projects/<slug:project>/events/stream", stream.stream),
    path("api/v1/join", peer_views.Join.as_view({"post": "join"})),
    path("api/v1/peer", peer_views.PeerDoor.as_view({"post": "peer"})),
    path("api/v1/whoami", people.Who.as_view({"get": "whoami"})),
    path("api/v1/status", health.Status.as_view()),
    path("api/v1/openapi.json", openapi.Schema.as_view()),
    path("metrics", health.Metrics.as_view()),
    path("api/v1/", include(router.urls)),
]
