"""HTTP/1.1 as uvicorn speaks it, but for how a malformed request is let go."""

from __future__ import annotations

import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

LINGER_SECONDS = 2.0


class LingeringProtocol(H11Protocol):
    """Refuses what is no HTTP in a way that the client can read.

    A socket closed with bytes unread resets the connection, and the client loses the answer that
    was on its way. So only the sending side is closed, and what still comes is thrown away, until
    the client closes or `LINGER_SECONDS` have passed (RFC 9112, section 9.6).
    """

    _refused = False

    def data_received(self, data: bytes) -> None:
        """Reads on, unless the client has been refused."""
        if not self._refused:
            super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Answers 400, closes the sending side, and lingers."""
        if self.cycle is not None:  # The body of a request that is being answered was malformed.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        headers = [("content-type", "application/json"), ("connection", "close")]
        events = (
            h11.Response(status_code=400, headers=headers, reason="Bad Request"),
            h11.Data(data=json.dumps({"error": msg}).encode()),
            h11.EndOfMessage(),
        )
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.write_eof()
        self._refused = True
        self.loop.call_later(LINGER_SECONDS, self.transport.close)
