"""What Amazon keeps to and moto does not: client tokens, names taken once, completed snapshots that stay so."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from urllib.parse import parse_qs

from tests.publish.proxy import Answer

_TAKEN = (
    b"<Response><Errors><Error><Code>InvalidAMIName.Duplicate</Code><Message>AMI name is in use</Message></Error>"
    b"</Errors></Response>"
)
_COMPLETED = b'{"Message": "the snapshot is not pending", "Reason": "INVALID_SNAPSHOT_STATE"}'


class AmazonRules:
    """Stands before moto, as :data:`tests.publish.proxy.Rules`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_token: dict[str, Answer] = {}
        self._names: dict[str, str] = {}
        self._completed: set[str] = set()

    def __call__(self, method: str, path: str, body: bytes, ask: Callable[[], Answer]) -> Answer:
        """See :data:`tests.publish.proxy.Rules`."""
        snapshot = path.partition("?")[0].split("/")[2:3]
        if path.startswith("/snapshots/completion/"):
            snapshot = path.partition("?")[0].split("/")[3:4]
        if method == "POST" and path == "/snapshots":
            return self._start(str(json.loads(body).get("ClientToken", "")), ask)
        if method == "POST" and path.startswith("/snapshots/completion/"):
            with self._lock:
                self._completed.update(snapshot)
                return ask()
        if method == "PUT" and path.startswith("/snapshots/") and snapshot[0] in self._completed:
            return 400, [("x-amzn-ErrorType", "ValidationException"), ("Content-Type", "application/json")], _COMPLETED
        if method == "POST" and b"Action=RegisterImage" in body:
            return self._register(parse_qs(body.decode())["Name"][0], ask)
        if method == "POST" and b"Action=DeregisterImage" in body:
            gone = parse_qs(body.decode())["ImageId"][0]
            with self._lock:
                self._names = {name: ami for name, ami in self._names.items() if ami != gone}
        return ask()

    def _start(self, token: str, ask: Callable[[], Answer]) -> Answer:
        with self._lock:
            status, headers, content = self._by_token.get(token) or ask()
            if token and status < 300:
                self._by_token[token] = (status, headers, content)
                said = json.loads(content)
                if said["SnapshotId"] in self._completed:
                    content = json.dumps({**said, "Status": "completed"}).encode()
            return status, headers, content

    def _register(self, name: str, ask: Callable[[], Answer]) -> Answer:
        with self._lock:
            if name in self._names:
                return 400, [("Content-Type", "text/xml")], _TAKEN
            status, headers, content = ask()
            match = re.search(rb"<imageId>([^<]+)<", content)
            if match:
                self._names[name] = match[1].decode()
            return status, headers, content
