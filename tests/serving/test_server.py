"""The server with valid and invalid requests: images for the former, a 4xx for the latter."""

import concurrent.futures
import contextlib
import io
import json
import pathlib
import random
import re
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import main
from imagen_jax.inference.cascade import Cascade, Progress
from imagen_jax.io import images
from imagen_jax.serving.access import LOOPBACK, Access
from imagen_jax.serving.app import make_app
from imagen_jax.serving.gallery import Gallery
from imagen_jax.serving.http_request import Limits
from imagen_jax.serving.server import http_server
from imagen_jax.serving.worker import Worker

EVIL = "</script><img src=x onerror=\"document.title='evil'\">"
GOOD = [
    {"prompt": "a cat"},
    {"prompt": EVIL, "samples": 2, "seed": 5},
    {"prompt": "../../../etc/passwd", "samples": 3},
    {"prompt": "%2e%2e%2f{}$(id)`id`;--", "seed": 2**32 - 1},
    {"prompt": "a cat", "negative_prompt": "<b>dogs</b>", "samples": 2},
    {"prompt": "ein Hund 🐕", "stages": {"base": {"steps": 7}, "sr": {"steps": 2}}},
    {"prompt": "a " * 500, "stages": {"base": {"guidance_weight": 9.25}}},
]
# (method, path, body, headers) of requests; the response to each must be a 4xx.
JSON = {"content-type": "application/json"}
BAD = [
    ("POST", "/api/jobs", b"", JSON),
    ("POST", "/api/jobs", b"{not json", JSON),
    ("POST", "/api/jobs", b"\xff\xfe\x00", JSON),
    ("POST", "/api/jobs", b"[" * 10_000, JSON),
    ("POST", "/api/jobs", b'{"prompt": "' + b"a" * 1_000_000 + b'"}', JSON),
    ("POST", "/api/jobs", b'{"prompt": "a"}', {"content-type": "text/plain"}),
    ("POST", "/api/jobs", b'{"prompt": "a"}', {}),
    ("POST", "/api/jobs", b'{"prompt": "a"}', JSON | {"origin": "http://evil.example"}),
    ("POST", "/api/jobs", b'{"prompt": "a"}', JSON | {"origin": "null"}),
    ("POST", "/api/jobs", b'{"prompt": "a"}', JSON | {"origin": "http://[::1"}),
    ("POST", "/api/jobs", b'{"prompt": "a"}', JSON | {"host": "evil.example"}),
    ("GET", "/api/images", None, {"host": "rebound.example:8000"}),
    ("GET", "/", None, {"host": "[::1"}),
    ("PUT", "/api/jobs", b"{}", JSON),
    ("DELETE", "/api/images", None, {}),
    ("GET", "/images/../../etc/passwd.png", None, {}),
    ("GET", "/images/%2e%2e%2f%2e%2e%2fetc%2fpasswd.png", None, {}),
    ("GET", "/images/" + "a" * 32 + ".png", None, {}),
    ("GET", "/images/..%00.png", None, {}),
    ("GET", "/api/jobs/../../x", None, {}),
    ("GET", "/api/jobs/%3Cscript%3E", None, {}),
    ("GET", "/nothing", None, {}),
    ("GET", "/" + "a" * 60_000, None, {}),
] + [
    ("POST", "/api/jobs", json.dumps({"prompt": "a"} | wrong).encode(), JSON)
    for wrong in (
        {"stages": {"base": {"steps": 10**9}}},
        {"stages": {"base": {"steps": -1}}},
        {"stages": {"../../etc/passwd": {}}},
        {"stages": {"sr": {"guidance_weight": float("nan")}}},
        {"stages": {"sr": {"guidance_weight": 10**400}}},
        {"samples": 10**6},
        {"seed": 10**300},
        {"prompt": "a\ud800"},
        {"prompt": EVIL * 100},
        {"out": "/tmp/x"},
        {"__proto__": {}},
    )
]
GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\nnot a length\r\n",
]


class Quick(Cascade):
    """Returns constant images at once; the server around it is under test."""

    def __init__(self, configs):
        self.configs = configs

    def sample(self, request, *, on_progress, **_):
        time.sleep(0.002)
        count = len(request.prompts)
        estimates = np.zeros((count, 8, 8, 3), np.float32)
        on_progress(Progress("base", 0, 2, 1, 4, np.arange(count), estimates))
        if "break" in request.prompts:
            raise RuntimeError("the device is on fire")
        seeds = np.broadcast_to(request.seed, count)
        indices = request.sample_indices or [0] * count
        levels = [(s + 7 * k) % 256 for s, k in zip(seeds, indices, strict=True)]
        return np.array([np.full((8, 8, 3), level, np.uint8) for level in levels])


@pytest.fixture
def quick(base_config, sr_config, tmp_path, make_client):
    """(client, folder, worker, lines) of a server that samples at once."""
    limits, configs = Limits(kept_images=50, queue=8), [base_config, sr_config]
    gallery, lines = Gallery(tmp_path / "out", limits.kept_images), []
    worker = Worker(Quick(configs), gallery, limits, checkpoint="here", log=lines.append)
    app = make_app(worker, gallery, configs, limits, Access(hosts=LOOPBACK))
    server = http_server(app)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield make_client(listening.getsockname()[1]), tmp_path / "out", worker, lines
        server.should_exit = True
        thread.join()
    worker.stop()


def generate(client, request) -> dict:
    """Requests images and waits for them; tries again while the queue is full."""
    while True:
        status, headers, body = client.post(request)
        if status != 429:
            break
        assert len(body.splitlines()) == 1 and int(headers["retry-after"]) >= 1
        time.sleep(0.05)
    assert status == 202, body
    job = json.loads(body)
    while job["state"] in ("waiting", "sampling"):
        time.sleep(0.02)
        job = client.get(f"/api/jobs/{job['id']}")
    assert job["state"] == "done" and len(job["images"]) == request.get("samples", 1), job
    return job


def misbehave(client, what) -> None:
    if isinstance(what, bytes):
        response = b""
        with contextlib.suppress(ConnectionError):
            response = client.raw(what)
        assert re.match(rb"HTTP/1\.1 4\d\d ", response), (what[:60], response[:200])
        return
    method, path, body, headers = what
    status, returned, text = client.call(method, path, body, **headers)
    assert 400 <= status < 500, (method, path[:60], body and body[:60], status)
    assert len(text.splitlines()) == 1 and len(text) < 500, text
    assert b"<" not in text or returned["content-type"] == "application/json"


def crowd(client, requests: int, clients: int, seed: int, *, to=None) -> list[dict]:
    """Sends requests of which a third are invalid, those `to` another client's address if given.

    Returns the jobs of the others.
    """
    rng = random.Random(seed)
    turns = [
        rng.choice([*BAD, *GARBAGE]) if n % 3 == 2 else rng.choice(GOOD) for n in range(requests)
    ]

    def one(what):
        return generate(client, what) if isinstance(what, dict) else misbehave(to or client, what)

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        return [job for job in pool.map(one, turns) if job]


def files(folder: pathlib.Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_valid_and_invalid_requests_together(quick, tmp_path):
    client, out, worker, _ = quick
    worker.start()
    jobs = crowd(client, 60, 8, seed=0)
    for what in [*BAD, *GARBAGE]:
        misbehave(client, what)
    assert len(jobs) == 40
    assert {path.split("/")[0] for path in files(tmp_path)} == {"out"}
    assert all(re.fullmatch(r"[0-9a-f]{32}\.(png|json)", name) for name in files(out))
    assert len(files(out)) <= 2 * 50
    newest = client.get("/api/images")["images"]
    assert len(newest) == 50
    for about in newest[:5]:
        status, headers, body = client.call("GET", f"/images/{about['id']}.png")
        assert status == 200 and headers["content-type"] == "image/png"
        with Image.open(io.BytesIO(body)) as image:
            level = (about["seed"] + 7 * about["sample_index"]) % 256
            assert np.asarray(image).ravel()[0] == level
            assert image.text["prompt"] == about["prompt"]
            assert image.text["checkpoint"] == "here"


def test_a_refused_client_can_read_the_response(quick):
    """Also while it is still sending: a reset of the connection would discard the response."""
    client, _, _, _ = quick
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
        connection.sendall(b"GET /" + b"a" * 20_000)
        head = connection.recv(12)
        assert head == b"HTTP/1.1 400"
        for _ in range(20):
            connection.sendall(b"a" * 20_000)
            time.sleep(0.005)
        rest = b"".join(iter(lambda: connection.recv(65536), b""))
    assert json.loads(rest.split(b"\r\n\r\n")[1]) == {"error": "Invalid HTTP request received."}


def test_malformed_bytes_after_the_response_close_the_connection(quick, caplog):
    client, _, _, _ = quick
    head = (
        b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"
    )
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
        connection.sendall(head)
        assert connection.recv(12) == b"HTTP/1.1 415"
        connection.sendall(b"not a length\r\n")
        rest = b"".join(iter(lambda: connection.recv(65536), b""))
    assert rest.count(b"HTTP/1.1") == 0
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_the_queue_is_bounded_and_batches_are_shared(quick):
    client, _, worker, _ = quick
    jobs = []
    for _ in range(8):  # The worker has not started, so they wait.
        status, _, body = client.post({"prompt": "a", "samples": 2})
        assert status == 202
        jobs.append(json.loads(body))
    assert [job["ahead"] for job in jobs] == list(range(8))
    status, headers, body = client.post({"prompt": "a"})
    assert status == 429 and headers["retry-after"] == "2"
    assert json.loads(body) == {"error": "8 requests wait; try again in a few seconds"}
    assert client.get("/api/health") == {"status": "warming up", "waiting": 8}
    worker.start()
    for job in jobs:
        while (state := client.get(f"/api/jobs/{job['id']}")["state"]) != "done":
            assert state in ("waiting", "sampling")
    assert client.get("/api/health") == {"status": "ready", "waiting": 0}


def test_a_failed_job_is_reported_and_the_next_one_is_sampled(quick):
    client, _, worker, lines = quick
    worker.start()
    _, _, body = client.post({"prompt": "break"})
    job = json.loads(body)
    while job["state"] in ("waiting", "sampling"):
        job = client.get(f"/api/jobs/{job['id']}")
    assert job["state"] == "failed" and job["images"] == []
    assert any("the device is on fire" in line for line in lines)
    generate(client, {"prompt": "a cat"})


def test_the_page_and_its_headers(quick):
    client, _, _, _ = quick
    status, headers, body = client.call("GET", "/")
    assert status == 200 and b"/*script*/" not in body and b"http" not in body.split(b"<body>")[0]
    assert "script-src 'sha256-" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    for host in ("localhost", "127.0.0.1:99", "[::1]:8000", "LOCALHOST:1"):
        assert client.call("GET", "/api/about", host=host)[0] == 200
    own = f"http://127.0.0.1:{client.port}"
    assert client.post({"prompt": "a"}, origin=own)[0] == 202
    about = client.get("/api/about")
    assert about["stages"][0] == {
        "name": "base",
        "image_size": 8,
        "steps": 4,
        "guidance_weight": 2.0,
        "loras": [],
    }
    assert about["limits"]["samples"] == 8


@pytest.mark.slow
def test_two_hundred_requests_from_twenty_clients(start_server, stage_folders, tmp_path):
    server = start_server(tmp_path / "out", "--keep=60", "--max_queue=16", "--batch_size=4")
    client, resident = server.client, []
    for turn in range(4):
        started = time.monotonic()
        jobs = crowd(client, 200, 20, seed=turn)
        resident.append(server.resident())
        print(
            f"{len(jobs)} of 200 sampled in {time.monotonic() - started:.1f} s, "
            f"{resident[-1] / 2**20:.1f} MiB resident"
        )
        assert len(jobs) == 134
    # All programs are compiled and all caches are full after two turns.
    assert resident[-1] - resident[1] < 8 * 2**20, resident
    assert {path.split("/")[0] for path in files(tmp_path)} == {"out"}
    assert len(files(tmp_path / "out")) == 2 * 60

    # An image is what `sample` generates with the same seed.
    job = generate(client, {"prompt": "a cat", "samples": 3, "seed": 11})
    flags = [f"--stages={stage_folders}", "--prompt=a cat", "--seed=11", "--samples_per_prompt=3"]
    assert main.main(["sample", *flags, f"--out={tmp_path / 'sampled'}"]) == 0
    for k, identifier in enumerate(job["images"]):
        both = [
            images.decode(file.read_bytes()).astype(int)
            for file in (
                tmp_path / "out" / f"{identifier}.png",
                tmp_path / "sampled" / f"00000_{k:02d}.png",
            )
        ]
        assert both[0].std() > 1 and np.abs(both[0] - both[1]).max() <= 1
    assert server.stop() == "" and server.process.returncode == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--batch_size=0"], "--batch_size=0 must be at least 1"),
        (["--port=70000"], "--port=70000 must be from 0 to 65535"),
        (["--stages=/nowhere"], "has no config.json"),
    ],
)
def test_invalid_flags_are_rejected(flags, says, tmp_path, capsys):
    arguments = [f"--stages={tmp_path}", f"--out={tmp_path / 'out'}", *flags]
    assert main.main(["serve", *arguments]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and says in error and not (tmp_path / "out").exists()
