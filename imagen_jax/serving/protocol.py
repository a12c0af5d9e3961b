"""Closes connections so that the client can read the response that was sent last.

Closing a socket with unread bytes resets the connection, and the client loses the response, for
example the refusal of a malformed request that it is still sending. RFC 9112, section 9.6: close
the sending side only, then discard what arrives until the client closes or a time has passed.
uvicorn closes at once; `lingering` wraps its protocol and gives it a transport that closes this
way.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11

LINGER_SECONDS = 2.0
# Every response of the application has this header (`http_request.Guard`). A 400 without it is
# uvicorn's own, which is plain text.
APPLICATION_HEADER = b"x-content-type-options"
_BODY = json.dumps({"error": "Invalid HTTP request received."}).encode()
MALFORMED = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
)


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

    def __init__(self, protocol: asyncio.Protocol):
        """Wraps `protocol`."""
        self._protocol = protocol
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        """Passes on a `LingeringTransport`."""
        self._transport = LingeringTransport(transport, self._protocol)
        self._protocol.connection_made(self._transport)

    def data_received(self, data: bytes) -> None:
        """Passes bytes on, or discards them once the protocol has closed the connection."""
        if self._transport.closed:
            return
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
        if not self._transport.closed:
            self._protocol.connection_lost(exc)


def lingering(protocol: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
    """Returns a class as `protocol`, constructed with the same arguments, that lingers."""

    class Lingering(LingeringProtocol):
        def __init__(self, **arguments: Any):
            super().__init__(protocol(**arguments))

    return Lingering
