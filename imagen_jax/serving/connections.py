"""Open connections by client: how many there may be, and how long a request's head may take."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

HEAD_SECONDS = 10.0  # time within which the head of a request must arrive
CONNECTIONS_OF_CLIENT = 128


class Connections:
    """Connections by (address, port) of the client; used on the event loop's thread only."""

    def __init__(self, of_client: int = CONNECTIONS_OF_CLIENT, head_seconds: float = HEAD_SECONDS):
        """Starts empty.

        Args:
          of_client: connections that one address may hold; a proxy is one address.
          head_seconds: time from a connection's start, or its last response, to the next head.
        """
        self._of_client, self._head_seconds = of_client, head_seconds
        self._open: dict[tuple, Callable[[], None]] = {}
        self._timers: dict[tuple, asyncio.TimerHandle] = {}
        self._count: collections.Counter[str] = collections.Counter()

    def __len__(self) -> int:
        """Connections that are open."""
        return len(self._open)

    def opened(self, client: Any, close: Callable[[], None]) -> bool:
        """Adds a connection, which `close` closes; False: the client has too many."""
        if self._count[client[0]] >= self._of_client:
            return False
        self._open[client[:2]] = close
        self._count[client[0]] += 1
        self._await_head(client[:2])
        return True

    def closed(self, client: Any) -> None:
        """Removes a connection, if it was added."""
        self._stop_timer(client[:2])
        if self._open.pop(client[:2], None):
            self._count[client[0]] -= 1
            self._count += collections.Counter()  # Drops clients without connections.

    @contextlib.contextmanager
    def answering(self, client: Any) -> Iterator[None]:
        """While a request of the connection is answered, there is no limit on the next head."""
        client = tuple(client or ())[:2]
        self._stop_timer(client)
        try:
            yield
        finally:
            if client in self._open:
                self._await_head(client)

    def _await_head(self, client: tuple) -> None:
        self._stop_timer(client)
        loop = asyncio.get_running_loop()
        self._timers[client] = loop.call_later(self._head_seconds, self._open[client])

    def _stop_timer(self, client: tuple) -> None:
        timer = self._timers.pop(client, None)
        if timer:
            timer.cancel()
