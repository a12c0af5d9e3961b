"""The region of a bucket beside that of the machine, from servers that answer as the clouds do."""

import dataclasses
import http.server
import json
import threading
import time

import pytest

from imagen_jax.checks import regions
from imagen_jax.config.data import ComponentConfig
from imagen_jax.config.schema import Config


class Cloud(http.server.BaseHTTPRequestHandler):
    """Storage and metadata servers of both clouds; the class holds the answers."""

    bucket, machine, asked = "US-CENTRAL2", "us-central2", 0

    def _answer(self, text: str, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        google = self.headers["Metadata-Flavor"] == "Google"
        if self.path == "/storage/v1/b/mine" and self.headers["Authorization"] == "Bearer t":
            type(self).asked += 1
            self._answer(json.dumps({"name": "mine", "location": self.bucket}))
        elif self.path.endswith("instance/zone") and google:
            self._answer(f"projects/123/zones/{self.machine}-b")
        elif self.path.endswith("service-accounts/default/token") and google:
            self._answer(json.dumps({"access_token": "t"}))
        elif self.path.endswith("placement/region") and (
            self.headers["X-aws-ec2-metadata-token"] == "t"
        ):
            self._answer(self.machine)
        else:
            self._answer("", 403)

    def do_PUT(self) -> None:
        self._answer("t" if self.path == "/latest/api/token" else "")

    def do_HEAD(self) -> None:  # Amazon names the region even where it refuses the request.
        self._answer("", 403, x_amz_bucket_region=self.bucket.lower())

    def log_message(self, format, *args):
        """Says nothing."""


@pytest.fixture
def cloud(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Cloud) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        monkeypatch.setenv("GCE_METADATA_HOST", address)
        for name in ("TENSORSTORE_GCS_HTTP_URL", "AWS_ENDPOINT_URL"):
            monkeypatch.setenv(name, f"http://{address}")
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{address}")
        yield
        server.shutdown()


def findings(*paths: str) -> list[tuple[str, str]]:
    mixture = {f"m{i}": ComponentConfig(path=path) for i, path in enumerate(paths)}
    data = dataclasses.replace(Config().data, mixture=mixture)
    return list(regions.check_regions(dataclasses.replace(Config(), data=data), None))


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize(
    ("bucket", "machine", "status"),
    [
        ("US-CENTRAL2", "us-central2", "ok"),
        ("US", "us-central2", "ok"),
        ("EUROPE-WEST4", "us-central2", "warning"),
        ("EU", "us-central2", "warning"),
        ("US-EAST1", "us-east10", "warning"),
        ("NAM4", "us-east1", "ok"),
        ("NAM4", "us-west1", "warning"),
    ],
)
def test_regions(scheme, bucket, machine, status, cloud, monkeypatch):
    monkeypatch.setattr(Cloud, "bucket", bucket)
    monkeypatch.setattr(Cloud, "machine", machine)
    ((found, text),) = findings(f"{scheme}://mine/a", f"{scheme}://mine/b", "runs/local")
    assert found == status
    assert text.startswith(f"{scheme}://mine is in {bucket.lower()}, this machine in {machine}")
    assert (f"use a bucket in {machine}" in text) == (status == "warning")


def test_what_is_not_known_is_said_to_be_unknown(cloud, monkeypatch):
    ((status, text),) = findings("gs://another/a")  # It may not be read.
    assert status == "ok" and text.startswith("gs://another is in an unknown region, this")
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    ((status, text),) = findings("gs://mine/a")
    assert text == "gs://mine is in an unknown region, this machine in an unknown region"
    assert status == "ok"


def test_a_server_that_does_not_answer_is_left_after_some_seconds(cloud, monkeypatch):
    monkeypatch.setattr(regions, "TIMEOUT", 0.1)
    monkeypatch.setattr(regions, "_google_machine", lambda: time.sleep(60))
    begin = time.monotonic()
    ((status, text),) = findings("gs://mine/a")
    assert time.monotonic() - begin < 20
    assert status == "ok" and text.endswith("this machine in an unknown region")
