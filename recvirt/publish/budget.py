"""One budget of retries for a whole run: a flaky line is survived, a dead provider is given up.

Each retry takes a token, each success gives a part of one back: so a long upload over a line that drops one request in
a hundred goes on, and one to a provider that is down ends after a bounded number of tries. Only what raises
:class:`TransientError` is tried again: denied and invalid requests never are.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from recvirt.errors import PublishError
from recvirt.publish.errors import TransientError
from recvirt.ui import reporter

Result = TypeVar("Result")
_GIVEN_BACK = 0.2
_HINT = "run the same command again: it goes on where it was"


@dataclass
class Budget:
    """``tokens`` retries at most in a row, ``tries`` of one call; waits grow from ``first`` to ``longest`` seconds."""

    tokens: float = 20.0
    tries: int = 8
    first: float = 0.5
    longest: float = 30.0
    sleep: Callable[[float], None] = time.sleep
    retries: int = 0
    _capacity: float = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._capacity = self.tokens

    def call(self, what: str, function: Callable[[], Result]) -> Result:
        """The function's result. PublishError with the provider's last words when tries or tokens are used up."""
        for attempt in range(1, self.tries + 1):
            try:
                result = function()
            except TransientError as error:
                if attempt == self.tries or not self._take():
                    raise PublishError(
                        f"{what}: {error.message} (given up after {attempt} tries)", hint=error.hint or _HINT
                    ) from error
                pause = self.pause(attempt, error.after)
                reporter.detail(f"{what}: {error.message}; again in {pause:.1f} s")
                self.sleep(pause)
            else:
                self._give_back()
                return result
        raise AssertionError("the last try returns or raises")

    def pause(self, attempt: int, asked: float | None) -> float:
        """Seconds before the next try: the provider's own wish, else doubled each time, spread by chance."""
        if asked is not None:
            return min(max(asked, 0.0), 2 * self.longest)
        return float(min(self.longest, self.first * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0))  # noqa: S311

    def _take(self) -> bool:
        with self._lock:
            if self.tokens < 1:
                return False
            self.tokens -= 1
            self.retries += 1
            return True

    def _give_back(self) -> None:
        with self._lock:
            self.tokens = min(self._capacity, self.tokens + _GIVEN_BACK)
