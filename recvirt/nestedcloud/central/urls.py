"""Where the API's documents are."""

from __future__ import annotations

from django.urls import include, path
from rest_framework.routers import DefaultRouter

from recvirt.nestedcloud.central import storage_views, views
from recvirt.nestedcloud.model import NAME

router = DefaultRouter(trailing_slash=False)
router.register("projects", views.Projects, basename="project")
router.register("workers", views.Workers, basename="worker")
_below = rf"projects/(?P<project>{NAME.pattern})"
router.register(f"{_below}/instances", views.Instances, basename="instance")
router.register(f"{_below}/operations", views.Operations, basename="operation")
router.register(f"{_below}/images", storage_views.Images, basename="image")
router.register(f"{_below}/volumes", storage_views.Volumes, basename="volume")
router.register(f"{_below}/networks", views.Networks, basename="network")
router.register(f"{_below}/events", views.Events, basename="event")

urlpatterns = [path("api/v1/", include(router.urls))]
