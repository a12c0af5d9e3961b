"""Binds the address, starts the worker and runs the application until SIGINT or SIGTERM."""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Callable

import uvicorn

from imagen_jax.inference.cascade import Cascade
from imagen_jax.serving.app import make_app
from imagen_jax.serving.gallery import Gallery
from imagen_jax.serving.http_request import LOOPBACK, MAX_HEADER_BYTES, Guard, Limits
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
    checkpoint: str = "",
    log: Callable[[str], None] = print,
) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
      cascade: samples the images; all of it is in memory.
      out: folder for the images.
      host: address to listen on; on loopback, only names of loopback are answered.
      port: 0: any free port.
      limits: of a request and of the server.
      checkpoint: the stage folders, recorded with every image.
      log: receives lines.

    Raises:
      OSError: the address cannot be bound, or the folder cannot be made.
    """
    gallery = Gallery(out, limits.kept_images)
    worker = Worker(cascade, gallery, limits, checkpoint=checkpoint, log=log)
    app = make_app(worker, gallery, cascade.configs, limits, LOOPBACK if _local(host) else ())
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
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        # Clients cause its warnings, and could fill a disk with them.
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )
    config.load()
    config.http_protocol_class = lingering(config.http_protocol_class)
    return uvicorn.Server(config)


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
