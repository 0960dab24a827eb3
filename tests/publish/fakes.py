"""What has no server to stand in for it: small answers of our own, whose requests are checked against schemas."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

#: Status, body, and headers if there are any.
Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]


@contextmanager
def serving(respond: Callable[[str, str, dict[str, list[str]], Any], Answer]) -> Iterator[str]:
    """A JSON server: ``respond(method, path, query, body)``; the query also has the header ``authorization``, and a
    form's body stays bytes.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __getattr__(self, name: str) -> Any:
            if name.startswith("do_"):
                return self._answer
            raise AttributeError(name)

        def log_message(self, *_arguments: Any) -> None:
            pass

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = urlsplit(self.path)
            query = {**parse_qs(parts.query), "authorization": [self.headers.get("Authorization", "")]}
            is_json = "form" not in (self.headers.get("Content-Type") or "")
            answer = respond(self.command, parts.path, query, json.loads(body) if body and is_json else body or None)
            status, said = answer[:2]
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            if status == 204:
                content = b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for name, value in (answer[2] if len(answer) == 3 else {}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class Compute:
    """Compute Engine's images."""

    def __init__(self) -> None:
        self.images: dict[str, dict[str, Any]] = {}
        self.inserted: list[dict[str, Any]] = []
        self.requests: set[str] = set()
        self.error: dict[str, Any] | None = None

    def respond(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        name = path.rpartition("/")[2]
        if "/operations/" in path:
            failed = {"error": {"errors": [self.error]}} if self.error else {}
            return 200, {"name": name, "status": "DONE", **failed}
        if method == "POST":
            self.inserted.append(body)
            if body["name"] in self.images:
                return 409, {"error": {"code": 409, "message": "already exists"}}
            if self.error is None:
                made = {"status": "READY", "creationTimestamp": f"2026-11-{10 + len(self.images)}T00:00:00.000-08:00"}
                self.images[body["name"]] = {**body, **made}
            return 200, {"name": "operation-1", "status": "RUNNING"}
        if method == "DELETE":
            return (200, {"name": "o", "status": "DONE"}) if self.images.pop(name, None) else (404, {})
        if name == "images":
            return 200, {"items": list(self.images.values())}
        return (200, self.images[name]) if name in self.images else (404, {"error": {"message": "not found"}})


class Gallery:
    """Azure's Resource Manager: what hangs below one gallery."""

    def __init__(self) -> None:
        self.things: dict[str, dict[str, Any]] = {}
        self.bodies: list[tuple[str, Any]] = []

    def respond(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        assert query["api-version"]
        if method == "PUT":
            self.bodies.append((path, body))
            properties = {**body["properties"], "provisioningState": "Succeeded"}
            self.things[path] = {**body, "id": path, "name": path.rpartition("/")[2], "properties": properties}
            return 201, self.things[path]
        if method == "DELETE":
            return (202 if self.things.pop(path, None) else 204), {}
        if path.endswith("/versions"):
            return 200, {"value": [thing for key, thing in self.things.items() if key.startswith(path + "/")]}
        found = self.things.get(path)
        return (200, found) if found else (404, {"error": {"code": "NotFound", "message": path}})


class DigitalOcean:
    """Custom images; a fetch takes one look."""

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.bodies: list[dict[str, Any]] = []

    def respond(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        if method == "POST":
            self.bodies.append(body)
            number = 100 + len(self.bodies)
            made = f"2026-11-{10 + len(self.images)}T00:00:00Z"
            self.images.append({"id": number, "status": "NEW", "created_at": made, **body})
            return 202, {"image": self.images[-1]}
        if path.endswith("/images"):
            return 200, {"images": self.images, "links": {}, "meta": {"total": len(self.images)}}
        number = int(path.rpartition("/")[2])
        found = next((image for image in self.images if image["id"] == number), None)
        if found is None:
            return 404, {"id": "not_found", "message": "no such image"}
        if method == "DELETE":
            self.images.remove(found)
            return 204, {}
        found["status"] = "available"
        return 200, {"image": found}


class Keystone:
    """Tokens and a catalogue. ``tokens`` are given out one after the other, the last one for ever."""

    def __init__(self, image_url: str, tokens: list[str], password: str = "right") -> None:
        self.image_url = image_url
        self.tokens = tokens
        self.password = password
        self.url = ""

    def respond(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        if method == "GET":
            links = [{"rel": "self", "href": f"{self.url}/v3/"}]
            version = {"id": "v3.14", "status": "stable", "links": links, "media-types": []}
            return (200, {"version": version}) if "v3" in path else (300, {"versions": {"values": [version]}})
        if body["auth"]["identity"]["password"]["user"]["password"] != self.password:
            return 401, {"error": {"code": 401, "message": "The request you have made requires authentication."}}
        endpoint = {"interface": "public", "region": "one", "region_id": "one", "url": self.image_url, "id": "e"}
        token = {
            "methods": ["password"], "expires_at": "2099-01-01T00:00:00.000000Z", "issued_at": "2026-01-01T00:00:00.0Z",
            "user": {"id": "u", "name": "u", "domain": {"id": "default", "name": "Default"}},
            "project": {"id": "p", "name": "p", "domain": {"id": "default", "name": "Default"}},
            "catalog": [{"type": "image", "name": "glance", "id": "s", "endpoints": [endpoint]}],
        }  # fmt: skip
        word = self.tokens.pop(0) if len(self.tokens) > 1 else self.tokens[0]
        return 201, {"token": token}, {"X-Subject-Token": word}
