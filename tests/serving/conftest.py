"""A server in its own process with a tiny random cascade, and a client that may misbehave."""

import dataclasses
import http.client
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import jax
import pytest

from imagen_jax.config.text import TextConfig
from imagen_jax.stages.folder import write_stage
from tests.reference.byte_encoder import write_byte_encoder


@pytest.fixture(scope="session")
def stage_folders(base_config, sr_config, random_params, tmp_path_factory) -> str:
    """--stages of a random cascade, 8 -> 16 px, with its text encoder."""
    root = tmp_path_factory.mktemp("stages")
    text = TextConfig(encoder="bytes", path=write_byte_encoder(root / "text"), max_len=16)
    for config in (base_config, sr_config):
        config = dataclasses.replace(config, text=text)
        write_stage(root / config.name, random_params(config), config, {})
    return f"{root / 'base'},{root / 'sr'}"


class Client:
    """Sends requests to one address; every response is (status, headers, body)."""

    def __init__(self, port: int, prefix: str = "", token: str = ""):
        self.port, self.prefix = port, prefix
        self.headers = {"authorization": f"Bearer {token}"} if token else {}

    def call(self, method: str, path: str, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, self.prefix + path, body, self.headers | headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def get(self, path: str):
        """The JSON at a path."""
        status, _, body = self.call("GET", path)
        assert status == 200, (path, status, body)
        return json.loads(body)

    def post(self, request, **headers):
        """Requests images; a body that is not bytes is sent as JSON."""
        body = request if isinstance(request, bytes) else json.dumps(request).encode()
        return self.call(
            "POST", "/api/jobs", body, **{"content-type": "application/json"} | headers
        )

    def raw(self, data: bytes) -> bytes:
        """The response to these bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as connection:
            connection.sendall(data)
            return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.fixture(scope="session")
def make_client():
    """(port, prefix, token) -> `Client`."""
    return Client


class Server:
    """A running `imagen serve`."""

    def __init__(self, stages: str, out, *flags: str):
        arguments = ["serve", f"--stages={stages}", f"--out={out}", "--port=0", *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "imagen_jax", *arguments],
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        first = self.process.stdout.readline()
        port = re.match(r"http://127\.0\.0\.1:(\d+)\n", first)
        assert port, first + self.process.stdout.read()
        self.client = Client(int(port[1]))
        while (line := self.process.stdout.readline()) != "ready\n":
            assert line, "the server has exited"

    def resident(self) -> int:
        """Memory, bytes."""
        with open(f"/proc/{self.process.pid}/status") as file:
            return int(re.search(r"VmRSS:\s+(\d+) kB", file.read())[1]) * 1024

    def stop(self) -> str:
        """Sends SIGTERM; returns the rest of the output."""
        self.process.send_signal(signal.SIGTERM)
        output, _ = self.process.communicate(timeout=60)
        return output


class PrefixProxy(http.server.BaseHTTPRequestHandler):
    """Passes PREFIX/X on to X of a server, under the server's own name."""

    PREFIX = "/draw"

    def log_message(self, *arguments):
        """Silence."""

    def pass_on(self):
        """Sends the request on and the response back."""
        if not self.path.startswith(f"{self.PREFIX}/"):
            self.send_error(404)
            return
        dropped = ("connection", "content-length", "transfer-encoding")
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {n: v for n, v in self.headers.items() if n.lower() not in dropped}
        server = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=120)
        try:
            path = self.path.removeprefix(self.PREFIX)
            if "host" not in {n.lower() for n in headers} or "127.0.0.1" in headers["Host"]:
                headers["Host"] = f"127.0.0.1:{self.server.target}"
            server.request(self.command, path, body or None, headers)
            response = server.getresponse()
            data = response.read()
        finally:
            server.close()
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in dropped:
                self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = pass_on


@pytest.fixture
def prefix_proxy():
    """A proxy that answers under PrefixProxy.PREFIX; `target` is the port that it passes on to."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), PrefixProxy)
    server.daemon_threads, server.target = True, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def start_server(stage_folders):
    """(out, flags...) -> a server that is ready."""
    running = []

    def start(out, *flags: str) -> Server:
        running.append(Server(stage_folders, out, *flags))
        return running[-1]

    yield start
    for server in running:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
