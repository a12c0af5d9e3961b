"""Object stores on loopback for tests: emulators from PyPI behind a proxy that counts and fails."""

from __future__ import annotations

import collections
import contextlib
import http.client
import http.server
import json
import random
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping

import pytest

from imagen_jax.io import buckets

BUCKET = "bucket"


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to an emulator; counts requests and bytes.

    Attributes:
      requests: by method.
      failed: number of requests that got 503 or a broken connection.
      received, sent: bytes of the bodies of requests and of answers.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, *, latency: float = 0.0, faults: float = 0.0) -> None:
        """Args: port: of the emulator. latency: seconds. faults: share of the requests, 0..1."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port, self.latency, self.faults = port, latency, faults
        self.lock, self.random = threading.Lock(), random.Random(0)
        self.writes = threading.Lock()  # Conditions are checked here: the emulator has none.
        self.requests: collections.Counter[str] = collections.Counter()
        self.failed = self.received = self.sent = 0

    def handle_error(self, request, client_address):
        """Says nothing of connections that clients close."""

    def ask(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Answer and body of the emulator."""
        upstream = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            upstream.request(method, path, body, dict(headers))
            answer = upstream.getresponse()
            return answer, answer.read()
        finally:
            upstream.close()

    def fault(self) -> str:
        """What happens to the next request: "", "busy", "broken" or "cut"."""
        with self.lock:
            if self.random.random() >= self.faults:
                return ""
            self.failed += 1
            return self.random.choice(["busy", "broken", "cut"])


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format, *args):
        """Says nothing."""

    def _pass_on(self) -> None:
        proxy = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(proxy.latency)
        fault = proxy.fault()
        with proxy.lock:
            proxy.requests[self.command] += 1
            proxy.received += len(body)
        if fault == "busy":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "broken":
            self.close_connection = True
            return
        headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
        with proxy.writes if self.command != "GET" else contextlib.nullcontext():
            generation = self._generation()
            if generation and "ifGenerationMatch=0" in self.path:
                self.send_error(412)
                return
            answer, data = proxy.ask(self.command, self.path, body, headers)
        self.send_response(answer.status)
        if generation:
            self.send_header("x-goog-generation", generation)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        if fault == "cut":
            self.close_connection = True
            data = data[: len(data) // 2]
        self.wfile.write(data)
        with proxy.lock:
            proxy.sent += len(data)

    def _generation(self) -> str:
        """The generation of an object of Google's, which the emulator leaves out; "": none."""
        path, _, query = self.path.partition("?")
        if "uploadType=media" in query:
            name = urllib.parse.parse_qs(query)["name"][0]
            path = f"/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(name, safe='')}"
        elif "alt=media" not in query:
            return ""
        answer, data = self.server.ask("GET", path, b"", {})
        return json.loads(data)["generation"] if answer.status == 200 else ""

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = _pass_on  # noqa: N815


@contextlib.contextmanager
def running(scheme: str, *, latency: float = 0.0, faults: float = 0.0) -> Iterator[Proxy]:
    """An emulator with an empty bucket, `BUCKET`, behind a proxy; sets the environment to it."""
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(_gcs() if scheme == "gs" else _s3())
        proxy = stack.enter_context(Proxy(port, latency=latency, faults=faults))
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        stack.callback(proxy.shutdown)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        server = f"http://127.0.0.1:{proxy.server_port}"
        patch.setenv("TENSORSTORE_GCS_HTTP_URL" if scheme == "gs" else "AWS_ENDPOINT_URL", server)
        patch.setenv("AWS_ACCESS_KEY_ID", "a")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        yield proxy


@contextlib.contextmanager
def _gcs() -> Iterator[int]:
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    try:
        yield server._api._httpd.socket.getsockname()[1]
    finally:
        server.stop()


@contextlib.contextmanager
def _s3() -> Iterator[int]:
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", f"/{urllib.parse.quote(BUCKET)}", headers={"Authorization": _KEY})
    assert connection.getresponse().status == 200
    try:
        yield port
    finally:
        server.stop()


_KEY = (
    "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, SignedHeaders=, Signature="
)


@contextlib.contextmanager
def in_memory() -> Iterator[dict[str, int]]:
    """Every bucket is one of this process's memory; yields the number of requests by kind."""
    import tensorstore as ts

    stores: dict[str, ts.KvStore] = {}
    counts: dict[str, int] = collections.defaultdict(int)
    lock = threading.Lock()

    def open_bucket(scheme, bucket, *_, **__):
        with lock:
            if bucket not in stores:
                stores[bucket] = ts.KvStore.open({"driver": "memory"}).result()
        return _Counted(stores[bucket], counts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "_bucket", open_bucket)
        yield counts


class _Counted:
    """A store that counts its requests."""

    def __init__(self, store, counts):
        self._store, self._counts = store, counts

    def __truediv__(self, path):
        return _Counted(self._store / path, self._counts)

    def __getattr__(self, name):
        self._counts[name] += 1
        return getattr(self._store, name)
