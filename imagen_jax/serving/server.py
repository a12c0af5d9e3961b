"""Binds the address, starts the worker and runs the application until SIGINT or SIGTERM."""

from __future__ import annotations

import dataclasses
import ipaddress
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from imagen_jax.inference.cascade import Cascade
from imagen_jax.serving.access import LOOPBACK, Access, Guard
from imagen_jax.serving.app import make_app
from imagen_jax.serving.gallery import Gallery
from imagen_jax.serving.http_request import MAX_HEADER_BYTES, Limits
from imagen_jax.serving.protocol import lingering
from imagen_jax.serving.worker import Worker

MAX_CONNECTIONS = 256  # further ones are answered 503


def serve(
    cascade: Cascade,
    out: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits,
    access: Access,
    checkpoint: str = "",
    log: Callable[[str], None] = print,
) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
      cascade: samples the images; all of it is in memory.
      out: folder for the images.
      host: address to listen on; on loopback, only names of loopback and of `access` are answered.
      port: 0: any free port.
      limits: of a request and of the server.
      access: which requests are answered.
      checkpoint: the stage folders, recorded with every image.
      log: receives lines.

    Raises:
      OSError: the address cannot be bound, or the folder cannot be made.
    """
    gallery = Gallery(out, limits.kept_images)
    worker = Worker(cascade, gallery, limits, checkpoint=checkpoint, log=log)
    if _local(host):
        access = dataclasses.replace(access, hosts=(*LOOPBACK, *access.hosts))
    app = make_app(worker, gallery, cascade.configs, limits, access)
    with _listen(host, port) as listening:
        name = f"[{host}]" if ":" in host else host
        log(f"http://{name}:{listening.getsockname()[1]}")
        # uvicorn raises the signal again once it has stopped; the worker must stop before that.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        worker.start()
        try:
            http_server(app).run(sockets=[listening])
        finally:
            worker.stop()


def http_server(app: Guard) -> uvicorn.Server:
    """Configures uvicorn for the application."""
    settings: dict[str, Any] = {
        "app": app,
        "ws": "none",
        "lifespan": "off",
        # Clients cause its warnings, and could fill a disk with them.
        "log_level": "error",
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "limit_concurrency": MAX_CONNECTIONS,
        "timeout_keep_alive": 5,
        "timeout_graceful_shutdown": 2,
        "h11_max_incomplete_event_size": MAX_HEADER_BYTES,
    }
    plain = uvicorn.Config(http="h11", **settings)
    plain.load()
    protocol = lingering(plain.http_protocol_class, app.connections)
    return uvicorn.Server(uvicorn.Config(http=protocol, **settings))


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises OSError, also for a name that cannot be resolved."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise OSError(f"--host={host} --port={port} cannot be used: {error.strerror}") from error
    return listening


def _local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
