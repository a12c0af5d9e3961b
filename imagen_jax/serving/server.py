"""Binds the address, starts the worker and runs the application until it is told to stop."""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Callable

import uvicorn

from imagen_jax.inference.cascade import Cascade
from imagen_jax.serving.app import Guard, make_app
from imagen_jax.serving.gallery import Gallery
from imagen_jax.serving.http_request import Limits
from imagen_jax.serving.protocol import LingeringProtocol
from imagen_jax.serving.worker import Worker

LOOPBACK = ("localhost", "127.0.0.1", "::1")
CONNECTIONS = 256  # more are answered 503
HEADER_BYTES = 16 * 1024


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
      cascade: what draws, all of it in memory.
      out: folder for the pictures.
      host: address to listen on; on loopback, only names of loopback are answered.
      port: 0: any that is free.
      limits: of a request and of the server.
      checkpoint: where the stages came from, for the record.
      log: receives lines.

    Raises:
      OSError: the address cannot be bound, or the folder not be made.
    """
    gallery = Gallery(out, limits.pictures)
    worker = Worker(cascade, gallery, limits, checkpoint=checkpoint, log=log)
    app = make_app(worker, gallery, cascade.configs, limits, LOOPBACK if _local(host) else ())
    with _listen(host, port) as listening:
        name = f"[{host}]" if ":" in host else host
        log(f"http://{name}:{listening.getsockname()[1]}")
        # uvicorn, once closed, sends itself the signal again: the worker is to end first.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        worker.start()
        try:
            http_server(app).run(sockets=[listening])
        finally:
            worker.stop()


def http_server(app: Guard) -> uvicorn.Server:
    """What speaks HTTP for the application, without anything it does not need."""
    config = uvicorn.Config(
        app,
        http=LingeringProtocol,
        ws="none",
        lifespan="off",
        # Its warnings are about clients, who could fill a disk with them.
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    return uvicorn.Server(config)


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address; that of a name that cannot be resolved is an OSError too."""
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
