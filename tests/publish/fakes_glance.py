"""Glance's states, as its sources have them, and machines that take turns at it in an order that a test chooses."""

from __future__ import annotations

import io
import json
import random
import re
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import requests
from requests.adapters import BaseAdapter

URL = "http://glance.test"
Answer = tuple[int, Any]


class Killed(BaseException):
    """The machine's process is gone; nothing of it may catch this."""


class Turns:
    """Machines as threads, of which one runs at a time: each waits for its turn at every request and every sleep."""

    def __init__(self, seed: int, *, time_passes: bool = False) -> None:
        self.now = 1_800_000_000.0
        self._time_passes = time_passes
        self._chance = random.Random(seed)
        self._turn = {name: threading.Semaphore(0) for name in "ab"}
        self._parked: dict[str, threading.Event] = {name: threading.Event() for name in "ab"}
        self._alive: set[str] = set()
        self._name = threading.local()
        self.steps = dict.fromkeys("ab", 0)
        #: After how many steps a machine is killed.
        self.kill: dict[str, int] = {}
        self.results: dict[str, Any] = {}

    def step(self) -> None:
        """Let others go first, if it so happens."""
        name = getattr(self._name, "value", None)
        if name is None:
            return
        self._parked[name].set()
        self._turn[name].acquire()
        self.now += 0.05
        self.steps[name] += 1
        if self.steps[name] == self.kill.get(name):
            raise Killed

    def sleep(self, seconds: float) -> None:
        """Sleep; the clock only moves so far where the test is about waiting."""
        if self._time_passes:
            self.now += seconds
        self.step()

    def monotonic(self) -> float:
        """The clock."""
        return self.now

    def run(self, **machines: Callable[[], Any]) -> None:
        """Run machines ``a`` and ``b`` to their ends; ``results`` has what each gave back or raised."""

        def body(name: str) -> None:
            self._name.value = name
            try:
                self.step()
                self.results[name] = machines[name]()
            except BaseException as error:
                self.results[name] = error
            self._alive.discard(name)
            self._parked[name].set()

        self._alive = set(machines)
        threads = [threading.Thread(target=body, args=(name,), daemon=True) for name in machines]
        for thread in threads:
            thread.start()
        for _ in range(5000):
            for name in machines:
                assert self._parked[name].wait(60)
            if not self._alive:
                return
            chosen = self._chance.choice(sorted(self._alive))
            self._parked[chosen].clear()
            self._turn[chosen].release()
        raise AssertionError("they don't come to an end")


class Glance(BaseAdapter):
    """Images in memory, mounted into a session of requests. What is deleted keeps its identity for ever."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self.turns = turns
        self.images: dict[str, dict[str, Any]] = {}
        self.staged: set[str] = set()
        self.protected = False
        self._chance = random.Random(7)
        #: One in so many requests is done by half and answered by 500, as by Glance on a database that is locked.
        self.fails = 0
        self._count = 0

    @property
    def there(self) -> list[dict[str, Any]]:
        """What is not deleted."""
        return [image for image in self.images.values() if image["status"] != "deleted"]

    def send(self, request: requests.PreparedRequest, *_arguments: Any, **_more: Any) -> requests.Response:
        """See :class:`BaseAdapter`."""
        self.turns.step()
        parts = urlsplit(str(request.url))
        status, said = self._respond(str(request.method), parts.path, parse_qs(parts.query), request.body)
        answer = requests.Response()
        answer.status_code, answer.url, answer.request = status, str(request.url), request
        answer.raw = io.BytesIO(b"" if status == 204 else json.dumps(said).encode())
        return answer

    def close(self) -> None:
        """See :class:`BaseAdapter`."""

    def _stamp(self, image: dict[str, Any], **values: Any) -> None:
        # Whole seconds, as Glance shows them.
        image.update(values, updated_at=f"{int(self.turns.now)}")

    def _respond(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        words = re.match(r"/v2/images(?:/([^/]+))?(?:/(file|stage|import|tags/recvirt))?$", path)
        assert words, path
        identity, what = words.groups()
        self._count += 1
        fails = bool(self.fails) and self._count % self.fails == 0
        if method == "POST" and identity is None:
            return self._create(json.loads(body), fails)
        if identity is None:
            (digest,) = query["recvirt_digest"]
            return 200, {"images": [dict(i) for i in self.there if i["recvirt_digest"] == digest]}
        image = self.images.get(identity)
        if image is None or image["status"] == "deleted":
            return 404, {}
        if what in ("file", "stage"):
            return self._take(image, what, body, fails)
        if what == "import":
            return self._import(image)
        if method == "DELETE":
            if self.protected:
                return 403, {"message": "protected"}
            self._stamp(image, status="deleted")
            return 204, None
        if what:
            image["tags"] = ["recvirt"]
            return 204, None
        if image["status"] == "importing":
            self._stamp(image, status="active")
        return 200, dict(image)

    def _create(self, body: dict[str, Any], fails: bool) -> Answer:
        identity = body.get("id") or f"{self._chance.getrandbits(64):x}"
        if identity in self.images:
            return 409, {"message": f"Image ID {identity} already exists!"}
        image = {**body, "id": identity, "status": "queued", "size": None, "created_at": f"{int(self.turns.now)}"}
        self._stamp(image, tags=[] if fails else body["tags"])
        self.images[identity] = image
        return (500, {}) if fails else (201, dict(image))

    def _take(self, image: dict[str, Any], what: str, body: Any, fails: bool) -> Answer:
        busy = "saving" if what == "file" else "uploading"
        if image["status"] != "queued":
            if what == "stage":
                # Glance does so to what another request is staging, and gives that one's data up.
                self._stamp(image, status="queued")
            return 409 if image["status"] == "active" else 410, {}
        self._stamp(image, status=busy)
        try:
            self.turns.step()
        except Killed:
            if image["status"] == busy:
                self._stamp(image, status="queued")
            raise
        data = body.read()
        if image["status"] == "deleted":
            return 410, {}
        if what == "stage":
            if image["status"] != busy or image["id"] in self.staged:
                self._stamp(image, status="queued")
                self.staged.add(image["id"])
                return 409, {"message": "has data on staging"}
            self.staged.add(image["id"])
        assert image["status"] == busy
        self._stamp(image, status="active" if what == "file" else "uploading", size=len(data))
        return (500, {}) if fails else (204, None)

    def _import(self, image: dict[str, Any]) -> Answer:
        if image["status"] != "uploading":
            return 409, {"message": "needs to be staged"}
        assert image["size"] is not None, "an import of what is still being staged"
        self._stamp(image, status="importing")
        return 202, {}
