"""Who may send requests: names, sites, the token and a proxy's prefix, as ASGI middleware.

A page of another site can send requests to a server on loopback. With DNS rebinding it can also
read the responses; the header Host then has that site's name. Origin, if sent, is that site.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
import re
import secrets
from collections.abc import Collection, Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

import h11

from imagen_jax.config.fields import ConfigError
from imagen_jax.serving.connections import Connections
from imagen_jax.serving.http_request import ClientRequestError, error_body, short
from imagen_jax.serving.metrics import Metrics

LOOPBACK = ("localhost", "127.0.0.1", "::1")  # values of the header Host, without the port
COOKIE = "imagen_token"  # the page's, because an <img> cannot send the header Authorization
OPEN = ("/", "/api/health")  # paths that need no token: the page has no content of its own
RESPONSE_SECONDS = 300.0  # time within which a client must have read a response
_TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,256}")
_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)*")


@dataclasses.dataclass(frozen=True)
class Access:
    """Which requests are answered.

    Attributes:
      hosts: accepted names in the header Host; empty: any.
      origins: sites besides the server's own whose pages may send requests, "https://name[:port]":
        the public address of a proxy that sends another Host.
      token: needed as `Authorization: Bearer TOKEN` or in the cookie COOKIE; "": none.
      prefix: path before all others, for a proxy that does not remove it; "": none.
    """

    hosts: Collection[str] = ()
    origins: Collection[str] = ()
    token: str = ""
    prefix: str = ""

    def __post_init__(self) -> None:
        """Checks the values."""
        for origin in self.origins:
            parts = urlsplit(origin)
            if (
                parts.scheme not in ("http", "https")
                or f"{parts.scheme}://{parts.netloc}" != origin
            ):
                raise ConfigError(f"--origins={origin} must be https://name or https://name:port")
        if not _PREFIX.fullmatch(self.prefix):
            raise ConfigError(f"--prefix={self.prefix} must start with / and not end with it")


def read_token(file: str) -> str:
    """The token of a file. Raises ConfigError where it is missing, short or not URL-safe."""
    try:
        token = pathlib.Path(file).read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--token_file={file} cannot be read: {error}") from None
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"--token_file={file} must hold 16 to 256 letters, digits or ._~-; write one with "
            "`openssl rand -hex 32`"
        )
    return token


class Guard:
    """ASGI middleware: refuses requests that `Access` does not allow, adds security headers."""

    HEADERS = (
        (b"x-content-type-options", b"nosniff"),
        (b"x-frame-options", b"DENY"),
        (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-resource-policy", b"same-origin"),
    )

    def __init__(self, app: Any, access: Access, metrics: Metrics):
        """Wraps an ASGI application.

        Args:
          app: answers the requests that pass.
          access: which requests pass.
          metrics: count the refusals.
        """
        self._app, self._access, self._metrics = app, access, metrics
        self.connections = Connections()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request."""

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                if message["status"] >= 400:
                    self._metrics.refused.labels(message["status"]).inc()
                names = {name for name, _ in message["headers"]}
                added = [*self.HEADERS]
                if b"cache-control" not in names:
                    added.append((b"cache-control", b"no-store"))
                if b"content-security-policy" not in names:
                    added.append((b"content-security-policy", b"default-src 'none'"))
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        if scope["type"] != "http":
            return
        # A client that does not read its response loses the connection.
        with self.connections.answering(scope["client"]), contextlib.suppress(TimeoutError):
            try:
                async with asyncio.timeout(RESPONSE_SECONDS):
                    await self._answer(scope, receive, send_guarded)
            except h11.LocalProtocolError:
                # The body is malformed, and uvicorn has said so; it closes the connection next.
                await asyncio.sleep(0)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        path, prefix = scope["path"], self._access.prefix
        if prefix and path == prefix:
            location = (b"location", f"{prefix}/".encode())
            await send({"type": "http.response.start", "status": 308, "headers": [location]})
            await send({"type": "http.response.body", "body": b""})
            return
        if prefix and path.startswith(f"{prefix}/"):
            path = path.removeprefix(prefix)
        try:
            headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
            check_site(headers, self._access)
            if path not in OPEN:
                check_token(headers, self._access.token)
        except ClientRequestError as error:
            more = [(name.encode(), value.encode()) for name, value in error.headers.items()]
            head = [(b"content-type", b"application/json"), *more]
            await send({"type": "http.response.start", "status": error.status, "headers": head})
            await send({"type": "http.response.body", "body": error_body(str(error))})
        else:
            await self._app({**scope, "path": path}, receive, send)


def check_site(headers: Mapping[bytes, str], access: Access) -> None:
    """Checks the headers Host and Origin.

    Args:
      headers: of the request, names in lower case.
      access: accepted names and sites.

    Raises:
      ClientRequestError: the request is for another name, or comes from another site's page.
    """
    host, origin = headers.get(b"host", ""), headers.get(b"origin")
    if access.hosts and _host_name(host) not in access.hosts:
        raise ClientRequestError(
            f"header Host={short(host)} is not a name of this server, expected one of "
            f"{', '.join(access.hosts)}"
        )
    if origin is not None and origin not in access.origins and _network_location(origin) != host:
        raise ClientRequestError(
            f"header Origin={short(origin)} is another site, expected http://{short(host)}", 403
        )


def check_token(headers: Mapping[bytes, str], token: str) -> None:
    """Raises ClientRequestError (401) unless the headers have the token; "": any passes."""
    if not token:
        return
    scheme, _, given = headers.get(b"authorization", "").partition(" ")
    cookie = SimpleCookie()
    with contextlib.suppress(CookieError):
        cookie.load(headers.get(b"cookie", ""))
    sent = [given.strip()] if scheme.lower() == "bearer" else []
    sent += [cookie[COOKIE].value] if COOKIE in cookie else []
    if not any(secrets.compare_digest(each.encode(), token.encode()) for each in sent):
        raise ClientRequestError(
            "this server needs its token: Authorization: Bearer TOKEN",
            401,
            {"www-authenticate": "Bearer"},
        )


def _host_name(host: str) -> str:
    """The name in a Host header, without the port; "" if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _network_location(origin: str) -> str:
    """Host and port in an Origin header; "" if it is malformed."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""
