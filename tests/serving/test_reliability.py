"""A failing worker, clients that leave, half-open connections, tokens and proxies."""

import dataclasses
import json
import logging
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.inference.cascade import Cascade, Progress
from imagen_jax.serving import worker as worker_module
from imagen_jax.serving.access import LOOPBACK, Access, read_token
from imagen_jax.serving.app import make_app
from imagen_jax.serving.connections import Connections
from imagen_jax.serving.gallery import Gallery
from imagen_jax.serving.http_request import Limits
from imagen_jax.serving.server import http_server
from imagen_jax.serving.worker import Worker
from tests.serving.test_server import GARBAGE, crowd

TOKEN = "0123456789abcdef"
# In a process of its own: the clients' threads share an interpreter lock.
ASK_FOR_HEALTH = """
import http.client, select, sys, time
taken = []
while not select.select([sys.stdin], [], [], 0.05)[0]:
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
    connection.request("GET", "/api/health")
    assert connection.getresponse().status == 200
    connection.close()
    taken.append(time.perf_counter() - started)
print(len(taken), max(taken))
"""
STEPS = 400


class Slow(Cascade):
    """Takes STEPS steps of 5 ms; a prompt of its own name fails, an empty one is the warm-up."""

    def __init__(self, configs, broken: bool = False):
        self.configs, self.broken, self.steps = configs, broken, 0

    def sample(self, request, *, on_progress, **_):
        if self.broken or "break" in request.prompts:
            raise RuntimeError("the device is on fire")
        count = len(request.prompts)
        for step in range(STEPS if "slow" in request.prompts else 1):
            self.steps += 1
            estimates = np.zeros((count, 8, 8, 3), np.float32)
            on_progress(Progress("base", 0, 1, step, STEPS, np.arange(count), estimates))
            time.sleep(0.005)
        return np.zeros((count, 8, 8, 3), np.uint8)


@dataclasses.dataclass
class Running:
    """A server in this process."""

    client: object
    worker: Worker
    cascade: Slow
    lines: list
    connections: Connections


@pytest.fixture
def run(base_config, tmp_path, make_client):
    """(access, limits, connections, broken) -> `Running`."""
    ends = []

    def start(access=None, limits=None, connections=None, broken=False):
        limits, lines = limits or Limits(batch=2), []
        cascade = Slow([base_config], broken)
        gallery = Gallery(tmp_path / "out", 50)
        worker = Worker(cascade, gallery, limits, log=lines.append)
        app = make_app(worker, gallery, [base_config], limits, access or Access(hosts=LOOPBACK))
        if connections is not None:
            app.connections = connections
        server = http_server(app)
        listening = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        worker.start()
        ends.append((server, thread, worker, listening))
        client = make_client(listening.getsockname()[1])
        return Running(client, worker, cascade, lines, app.connections)

    yield start
    for server, thread, worker, listening in ends:
        server.should_exit = True
        thread.join()
        worker.stop()
        listening.close()


def wait(condition, seconds: float = 20.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return found


def submit(client, prompt: str, **more) -> dict:
    status, _, body = client.post({"prompt": prompt} | more)
    assert status == 202, body
    return json.loads(body)


def state(client, job: dict) -> str:
    return client.get(f"/api/jobs/{job['id']}")["state"]


def test_a_worker_that_cannot_start_is_unhealthy(run):
    server = run(broken=True)
    wait(lambda: server.worker.state == "failed")
    status, _, body = server.client.call("GET", "/api/health")
    assert status == 503 and json.loads(body)["status"] == "failed"
    status, _, body = server.client.post({"prompt": "a cat"})
    assert status == 503 and "has failed" in json.loads(body)["error"]
    assert "the device is on fire" in server.lines[-1]


def test_failing_batches_are_unhealthy_until_one_succeeds_and_the_log_is_bounded(run):
    server = run()
    wait(lambda: server.worker.state == "ready")
    for _ in range(worker_module.FAILURES):
        assert server.client.call("GET", "/api/health")[0] == 200
        job = submit(server.client, "break")
        wait(lambda job=job: state(server.client, job) == "failed")
    assert server.client.call("GET", "/api/health")[0] == 503
    assert sum("on fire" in line for line in server.lines) == 1
    job = submit(server.client, "a cat")
    wait(lambda: state(server.client, job) == "done")
    assert server.client.call("GET", "/api/health")[0] == 200


def test_jobs_that_are_cancelled_are_not_sampled(run):
    server = run()
    wait(lambda: server.worker.state == "ready")
    first = submit(server.client, "slow")
    wait(lambda: state(server.client, first) == "sampling")
    second = submit(server.client, "slow", seed=1)
    for job in (second, first):
        status, _, body = server.client.call("DELETE", f"/api/jobs/{job['id']}")
        assert status == 200 and json.loads(body)["state"] == "cancelled"
    third = submit(server.client, "a cat")
    wait(lambda: state(server.client, third) == "done")
    assert server.cascade.steps < STEPS
    assert state(server.client, first) == state(server.client, second) == "cancelled"
    assert server.client.get("/api/images")["images"][0]["prompt"] == "a cat"
    assert server.client.call("DELETE", "/api/jobs/unknown")[0] == 404
    status, _, body = server.client.call("DELETE", f"/api/jobs/{third['id']}")
    assert status == 200 and json.loads(body)["state"] == "done"


def test_jobs_of_clients_that_left_are_dropped(run):
    server = run(limits=Limits(batch=1, patience=0.3))
    wait(lambda: server.worker.state == "ready")
    jobs = [submit(server.client, "slow", seed=seed) for seed in range(10)]
    kept = submit(server.client, "a cat")
    wait(lambda: state(server.client, kept) == "done")
    assert server.cascade.steps < STEPS
    assert {state(server.client, job) for job in jobs} == {"cancelled"}


def test_a_preview_is_encoded_once(run, monkeypatch):
    server = run()
    encoded, encode = [], worker_module.images.encode_png
    monkeypatch.setattr(
        worker_module.images, "encode_png", lambda x: encoded.append(1) or encode(x)
    )
    preview = worker_module.Preview(np.zeros((2, 8, 8, 3), np.float32))
    assert preview.png() == preview.png() and len(encoded) == 1
    job = submit(server.client, "slow")
    wait(lambda: server.client.get(f"/api/jobs/{job['id']}")["preview"])
    status, headers, _ = server.client.call("GET", f"/api/jobs/{job['id']}/preview.png")
    assert status == 200 and headers["content-type"] == "image/png"


def test_the_token_is_needed_for_all_but_page_and_health(run):
    client = run(Access(token=TOKEN)).client
    for path in ("/", "/api/health"):
        assert client.call("GET", path)[0] == 200
    for path in ("/api/about", "/api/images", "/metrics", "/images/x.png", "/nothing"):
        status, headers, body = client.call("GET", path)
        assert status == 401 and headers["www-authenticate"] == "Bearer"
        assert TOKEN not in body.decode()
    for headers in (
        {"authorization": f"Bearer {TOKEN}"},
        {"authorization": f"bearer {TOKEN}"},
        {"cookie": f"other=1; imagen_token={TOKEN}"},
    ):
        assert client.call("GET", "/api/about", **headers)[0] == 200
    for headers in (
        {"authorization": f"Bearer {TOKEN}0"},
        {"authorization": TOKEN},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": "Bearer"},
        {"cookie": "imagen_token="},
        {"cookie": f"imagen_token={TOKEN[:-1]}"},
        {"cookie": ";;;=\x01"},
    ):
        assert client.call("GET", "/api/about", **headers)[0] == 401


def test_a_malformed_body_without_the_token_is_refused_once(run, caplog):
    client = run(Access(hosts=LOOPBACK, token=TOKEN)).client
    logging.getLogger("uvicorn.error").addHandler(caplog.handler)
    for what in GARBAGE:
        answer = client.raw(what)
        assert answer.startswith(b"HTTP/1.1 4") and answer.count(b"HTTP/1.1") == 1
    logging.getLogger("uvicorn.error").removeHandler(caplog.handler)
    assert not caplog.records


def test_a_proxy_with_a_prefix_and_another_name(run):
    access = Access(hosts=LOOPBACK, origins=("https://images.example",), prefix="/draw")
    client = run(access).client
    status, headers, _ = client.call("GET", "/draw")
    assert status == 308 and headers["location"] == "/draw/"
    status, _, page = client.call("GET", "/draw/")
    assert status == 200 and not [q for q in (b'"', b"`", b"'") if q + b"/api" in page]
    assert client.get("/draw/api/health") and client.get("/api/health")
    public = {"origin": "https://images.example"}
    assert client.post({"prompt": "a"}, **public)[0] == 202
    assert client.post({"prompt": "a"}, origin="https://other.example")[0] == 403
    assert client.post({"prompt": "a"}, host="images.example", **public)[0] == 400
    named = run(dataclasses.replace(access, hosts=("images.example",))).client
    assert named.post({"prompt": "a"}, host="images.example", **public)[0] == 202


def test_half_open_connections_end(run):
    server = run(connections=Connections(of_client=40, head_seconds=4.0))
    half = [socket.create_connection(("127.0.0.1", server.client.port)) for _ in range(40)]
    for connection in half[:20]:
        connection.sendall(b"POST /api/jobs HTTP/1.1\r\nHost: local")
    wait(lambda: len(server.connections) == 40)
    refused = server.client.raw(b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert refused.startswith(b"HTTP/1.1 503 ") and b"too many connections" in refused
    for index, connection in enumerate(half):
        connection.settimeout(20)
        answer = b"".join(iter(lambda c=connection: c.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 408 ") if index < 20 else answer == b""
        connection.close()
    assert server.client.call("GET", "/api/health")[0] == 200
    job = submit(server.client, "a cat")
    wait(lambda: state(server.client, job) == "done")


def test_a_long_answer_is_not_a_slow_head(run):
    """A connection that is reused has the time from its last response on."""
    server = run(connections=Connections(head_seconds=2.0))
    with socket.create_connection(("127.0.0.1", server.client.port)) as connection:
        for _ in range(10):
            connection.sendall(b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            response = b""
            while not response.endswith(b"}"):
                part = connection.recv(65536)
                assert part, "the connection was closed"
                response += part
            assert response.startswith(b"HTTP/1.1 200 ")
            time.sleep(0.3)


def test_metrics_are_in_the_format_of_prometheus(run):
    server = run()
    job = submit(server.client, "a cat", samples=2)
    wait(lambda: state(server.client, job) == "done")
    server.client.call("GET", "/nothing")
    status, headers, body = server.client.call("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    lines = body.decode().splitlines()
    assert 'imagen_jobs_total{state="done"} 1.0' in lines
    assert "imagen_images_total 2.0" in lines and "imagen_ready 1.0" in lines
    assert 'imagen_refused_total{status="404"} 1.0' in lines and "imagen_waiting 0.0" in lines
    assert "imagen_connections 1.0" in lines


def test_tokens_and_addresses_are_checked(tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert read_token(str(file)) == TOKEN
    for text in ("short", "spaces are not allowed", "é" * 20):
        file.write_text(text)
        with pytest.raises(ConfigError, match="must hold 16 to 256"):
            read_token(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(str(tmp_path / "none"))
    for wrong in ({"prefix": "draw"}, {"prefix": "/draw/"}, {"origins": ("images.example",)}):
        with pytest.raises(ConfigError, match="must"):
            Access(**wrong)


@pytest.mark.slow
def test_a_crowd_behind_a_proxy(start_server, prefix_proxy, make_client, tmp_path):
    """200 requests of 20 clients, hostile ones among them; clients that leave; half-open ones."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    flags = [f"--token_file={token}", "--patience=3", "--max_queue=16", "--batch_size=4"]
    server = start_server(tmp_path / "out", *flags, "--keep=60")
    port, prefix_proxy.target = prefix_proxy.server_port, server.client.port
    client, direct = make_client(port, "/draw", TOKEN), make_client(server.client.port, "", TOKEN)
    assert make_client(port, "/draw").call("GET", "/api/about")[0] == 401
    crowd(client, 50, 20, seed=100, to=direct)
    resident, left = server.resident(), 0
    health = subprocess.Popen(
        [sys.executable, "-c", ASK_FOR_HEALTH, str(server.client.port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    half = [socket.create_connection(("127.0.0.1", server.client.port)) for _ in range(64)]
    for connection in half[:32]:
        connection.sendall(b"POST /api/jobs HTTP/1.1\r\nHost: local")
    for turn in range(4):
        while left < 8 * (turn + 1) - 2:
            left += client.post({"prompt": "left", "samples": 8})[0] == 202
        assert len(crowd(client, 50, 20, seed=turn, to=direct)) == 34
    answers, slowest = health.communicate()[0].split()
    print(
        f"health: {answers} answers, slowest {1e3 * float(slowest):.0f} ms; resident "
        f"{resident / 2**20:.1f} MiB, then {server.resident() / 2**20:.1f} MiB; {left} clients left"
    )
    assert int(answers) > 20 and float(slowest) < 0.1
    assert server.resident() < 1.05 * resident
    for connection in half:
        connection.settimeout(20)
        assert connection.recv(65536)[:13] in (b"HTTP/1.1 408 ", b"")
        connection.close()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "token"}
    assert server.stop() == ""
