"""Closes connections so that the client can read the response that was sent last.

Closing a socket with unread bytes resets the connection, and the client loses the response, for
example the refusal of a malformed request that it is still sending. RFC 9112, section 9.6: close
the sending side only, then discard what arrives until the client closes or a time has passed.
uvicorn closes at once; `lingering` wraps its protocol and gives it a transport that closes this
way. The wrapper also refuses a client with too many connections, and closes a connection on which
no request arrives in time (`connections`).
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11

from imagen_jax.serving.connections import Connections

LINGER_SECONDS = 2.0
# Every response of the application has this header (`http_request.Guard`). A 400 without it is
# uvicorn's own, which is plain text.
APPLICATION_HEADER = b"x-content-type-options"


def _refusal(status: bytes, error: str) -> bytes:
    body = json.dumps({"error": error}).encode()
    return (
        b"HTTP/1.1 %b\r\ncontent-type: application/json\r\nconnection: close\r\n"
        b"content-length: %d\r\n\r\n%b" % (status, len(body), body)
    )


MALFORMED = _refusal(b"400 Bad Request", "Invalid HTTP request received.")
TOO_SLOW = _refusal(b"408 Request Timeout", "the head of the request did not arrive in time")
TOO_MANY = _refusal(b"503 Service Unavailable", "this client has too many connections")


class LingeringTransport:
    """An asyncio transport whose `close` lingers.

    uvicorn's plain-text response to a malformed request becomes JSON, as all other refusals are.
    """

    def __init__(self, transport: Any, protocol: asyncio.Protocol):
        """Wraps the transport of `protocol`, of asyncio or uvloop."""
        self._transport, self._protocol = transport, protocol
        self._responded = False
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        """Everything else is the transport's own."""
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """True from the call of `close` on."""
        return self.closed or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Sends bytes, unless the response to a malformed request has been sent."""
        if self._responded or self.closed:
            return
        if data.startswith(b"HTTP/1.1 400 ") and APPLICATION_HEADER not in data:
            self._responded, data = True, MALFORMED
        self._transport.write(data)

    def close(self) -> None:
        """Closes the sending side; the client closes the rest, or LINGER_SECONDS do."""
        if self.is_closing():
            return
        self.closed = True
        self._transport.resume_reading()
        self._transport.write_eof()
        loop = asyncio.get_running_loop()
        loop.call_soon(self._protocol.connection_lost, None)
        loop.call_later(LINGER_SECONDS, self._transport.close)


class LingeringProtocol(asyncio.Protocol):
    """Passes the events of a connection to another protocol until that one closes it."""

    def __init__(self, protocol: asyncio.Protocol, connections: Connections):
        """Wraps `protocol`; `connections` knows how many there are."""
        self._protocol, self._connections = protocol, connections
        self._transport: Any = None
        self._client: Any = None
        self._started = (
            False  # Whether a byte has come. An idle connection is closed without a response.
        )

    def connection_made(self, transport: Any) -> None:
        """Passes on a `LingeringTransport`."""
        self._transport = LingeringTransport(transport, self._protocol)
        self._client = transport.get_extra_info("peername")
        self._protocol.connection_made(self._transport)
        if not self._connections.opened(self._client, self._close_slow):
            self._transport.write(TOO_MANY)
            self._transport.close()

    def _close_slow(self) -> None:
        if self._started:
            self._transport.write(TOO_SLOW)
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        """Passes bytes on, or discards them once the protocol has closed the connection."""
        if self._transport.closed:
            return
        self._started = True
        try:
            self._protocol.data_received(data)
        except h11.LocalProtocolError:
            # Malformed bytes after the response has started; there is no second response.
            self._transport.close()

    def eof_received(self) -> bool | None:
        """The client has closed its sending side."""
        return None if self._transport.closed else self._protocol.eof_received()

    def pause_writing(self) -> None:
        """The send buffer is full."""
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """The send buffer has room again."""
        self._protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Passes it on, unless the protocol has closed the connection itself."""
        self._connections.closed(self._client)
        if not self._transport.closed:
            self._protocol.connection_lost(exc)


def lingering(protocol: type[asyncio.Protocol], connections: Connections) -> type[asyncio.Protocol]:
    """Returns a class as `protocol`, constructed with the same arguments, that lingers.

    Args:
      protocol: of an HTTP connection.
      connections: of all instances of the class.
    """

    class Lingering(LingeringProtocol):
        def __init__(self, **arguments: Any):
            super().__init__(protocol(**arguments), connections)

    return Lingering
