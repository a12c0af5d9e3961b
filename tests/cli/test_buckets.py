"""Addresses of buckets in every flag that holds a path: they work, or are refused in one line."""

import argparse
import concurrent.futures
import http.server
import itertools
import json
import os
import pathlib
import threading

import pytest

from imagen_jax.cli import main, path_flags, staging
from imagen_jax.data.embeddings.store import EmbeddingStore
from imagen_jax.interop import t5x
from imagen_jax.interop.weights import WeightsError
from imagen_jax.io import buckets, paths
from tests import object_stores
from tests.cli.test_paths import actions

ROOT = pathlib.Path(__file__).parents[2]
REFUSING = (path_flags.flag, path_flags.required_flag, path_flags.flag_list)
READING = (path_flags.input_flag, path_flags.required_input, path_flags.input_list)
WRITING = (path_flags.output_flag, path_flags.required_output)
RUNS = (path_flags.workdir_flag,)
# What they name is copied where it is read.
LATER = (path_flags.address, path_flags.adapter_list)
FLAGS = [
    (verb, action)
    for verb in main.VERBS
    for action in actions(verb)
    if action.type in (*REFUSING, *READING, *WRITING, *RUNS, *LATER)
]


def kind_of(action: argparse.Action, text: str) -> type:
    assert action.type and not isinstance(action.type, str)
    value = action.type(text)
    return type(value[0] if isinstance(value, list) else value)


def test_there_are_flags():
    assert len(FLAGS) > 60
    assert {action.type for _, action in FLAGS} == {*REFUSING, *READING, *WRITING, *RUNS, *LATER}


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize(
    ("verb", "action"), FLAGS, ids=[f"{v}{a.option_strings[0]}" for v, a in FLAGS]
)
def test_an_address_in_a_flag(verb, action, scheme):
    address = f"{scheme}://bucket/a/b"
    if action.type in REFUSING:
        with pytest.raises(argparse.ArgumentTypeError) as refused:
            kind_of(action, address)
        assert str(refused.value).startswith(f"{address}: {scheme}:// paths (object stores)")
        assert "\n" not in str(refused.value)
    else:
        kinds = {READING: path_flags.Input, WRITING: path_flags.Output, RUNS: path_flags.Workdir}
        kinds[LATER] = str
        (expected,) = (kind for types, kind in kinds.items() if action.type in types)
        assert kind_of(action, address) is expected
    if action.type is path_flags.address:  # tensorstore knows further ones.
        return
    for other in ("hdfs://host/a", "https://host/a", f"{scheme}x://bucket/a"):
        with pytest.raises(argparse.ArgumentTypeError, match="paths .object stores. are not"):
            kind_of(action, other)


def test_a_list_of_local_folders_and_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    found = path_flags.input_list("a,b,gs://bucket/x,c,s3://bucket/y")
    assert found == ["a,b", "gs://bucket/x", "c", "s3://bucket/y"]
    kinds = [str, path_flags.Input, str, path_flags.Input]
    assert [type(value) for value in found] == kinds


@pytest.mark.parametrize(
    ("scheme", "variable"), [("gs", "TENSORSTORE_GCS_HTTP_URL"), ("s3", "AWS_ENDPOINT_URL")]
)
@pytest.mark.parametrize("flag", ["--prompts", "--out"])
def test_a_store_that_does_not_answer(scheme, variable, flag, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setattr(buckets, "RETRIES", 1)
    monkeypatch.chdir(tmp_path)
    flags = {"--prompts": "p.txt", "--out": "out", "--stages": "s", flag: f"{scheme}://bucket/a"}
    assert main.main(["sample", *(f"{name}={value}" for name, value in flags.items())]) == 1
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("imagen sample:")]
    assert f"{scheme}://bucket/a" in line
    assert os.listdir(tmp_path) == []


def test_embeddings_at_an_address_of_another_kind():
    with pytest.raises(paths.PathError, match="^config.data.embeddings=hdfs://b/a: hdfs:// paths"):
        EmbeddingStore.open("hdfs://b/a")


def test_a_t5x_checkpoint_that_does_not_answer(monkeypatch, capfd):
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(buckets, "RETRIES", 1)
    with pytest.raises(WeightsError, match="gs://bucket/t5") as error:
        t5x.read_file("gs://bucket/t5/spiece.model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["base=hdfs://h/a@0.5", "hdfs://h/a", "a,base=https://h/a"])
def test_a_lora_at_an_address_of_another_kind(text):
    assert path_flags.adapter_list("sr=gs://b/x@0.5,a@2") == ["sr=gs://b/x@0.5", "a@2"]
    with pytest.raises(argparse.ArgumentTypeError, match="paths .object stores. are not"):
        path_flags.adapter_list(text)


class Occupied(http.server.BaseHTTPRequestHandler):
    """A server of Google's whose objects all appear between a request and the next."""

    def do_GET(self):
        self.send_error(404)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        assert "ifGenerationMatch=0" in self.path
        self.send_error(412)

    def log_message(self, format, *args):
        """Says nothing."""


class OccupiedS3(Occupied):
    """The same of Amazon's."""

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["If-None-Match"] == "*"
        self.send_error(412)

    do_HEAD = Occupied.do_GET  # noqa: N815


class Busy(http.server.BaseHTTPRequestHandler):
    """A server of one object, gs://bucket/a, that answers every second request, else with 503."""

    asked = itertools.count()

    def do_GET(self):
        if next(self.asked) % 2 == 0:
            self.send_error(503)
            return
        content = b"x" if "alt=media" in self.path else b'{"items": [{"name": "a"}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format, *args):
        """Says nothing."""


def test_a_busy_store_is_asked_again(tmp_path, monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
        assert buckets.download("gs://bucket/a", tmp_path).read_bytes() == b"x"
        server.shutdown()
    assert next(Busy.asked) == 4


@pytest.mark.parametrize(
    ("scheme", "variable", "store"),
    [("gs", "TENSORSTORE_GCS_HTTP_URL", Occupied), ("s3", "AWS_ENDPOINT_URL", OccupiedS3)],
)
def test_of_two_writers_of_an_object_one_fails(scheme, variable, store, tmp_path, monkeypatch):
    """The condition is the server's: the object appears after the client has looked for it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv(variable, f"http://127.0.0.1:{server.server_port}")
        (tmp_path / "a").write_text("x")
        expected = f"{scheme}://bucket/a exists; another process"
        with pytest.raises(buckets.BucketError, match=expected):
            buckets.upload(tmp_path / "a", f"{scheme}://bucket/a")
        server.shutdown()


def test_several_processes_do_not_write_to_a_bucket(monkeypatch, tmp_path, capsys):
    for name, value in {
        "COORDINATOR_ADDRESS": "h:1",
        "NUM_PROCESSES": "2",
        "PROCESS_ID": "0",
    }.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    flags = ["--stages=s", "--prompt=a", "--out=gs://bucket/a"]
    assert main.main(["sample", *flags]) == 1
    assert "gs://bucket/a: several processes" in capsys.readouterr().err


@pytest.fixture(params=["gs", "s3"])
def bucket(request, monkeypatch):
    """The address of an empty bucket on loopback."""
    if request.param == "gs":
        emulator = pytest.importorskip("gcp_storage_emulator.server")
        server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
        server.start()
        port = server._api._httpd.socket.getsockname()[1]
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{port}")
        request.addfinalizer(server.stop)
    else:
        server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0)
        server.start()
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        request.addfinalizer(server.stop)
        boto3 = pytest.importorskip("boto3")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bucket")
    return f"{request.param}://bucket"


@pytest.mark.slow
def test_files_and_folders_go_to_a_bucket_and_back(bucket, tmp_path):
    source = tmp_path / "stage"
    files = {"config.json": b"{}", "text/a b é.txt": b"x" * 3_000_000, "text/c": b"c"}
    for name, data in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    assert buckets.upload(source, f"{bucket}/runs/stage", last=staging.MARKS) == 3
    (tmp_path / "back").mkdir()
    back = buckets.download(f"{bucket}/runs/stage/", tmp_path / "back")
    assert {
        str(p.relative_to(back)): p.read_bytes() for p in back.rglob("*") if p.is_file()
    } == files
    one = buckets.download(f"{bucket}/runs/stage/config.json", tmp_path / "back")
    assert one.read_bytes() == b"{}"
    with pytest.raises(buckets.BucketError, match="/runs/stage exists; name a new one"):
        buckets.check_free(f"{bucket}/runs/stage")
    buckets.check_free(f"{bucket}/runs/sta")
    with pytest.raises(buckets.BucketError, match="/config.json exists; name a new one"):
        buckets.upload(source / "config.json", f"{bucket}/runs/stage/config.json")
    with pytest.raises(buckets.BucketError, match="/runs/sta holds nothing"):
        buckets.download(f"{bucket}/runs/sta", tmp_path / "back")


@pytest.mark.slow
def test_a_verb_whose_paths_are_all_on_a_bucket(bucket, tmp_path, monkeypatch, capsys):
    """`evaluate report`: reads cards, writes a folder."""
    monkeypatch.chdir(tmp_path)
    card = tmp_path / "cards" / "fid.json"
    card.parent.mkdir()
    card.write_text(json.dumps({"card": "fid30k", "fid": 9.0, "zero_shot": True}))
    buckets.upload(card.parent, f"{bucket}/cards")
    command = ["evaluate", "report", f"--cards={bucket}/cards/fid.json", "--name=x"]
    before = sorted(os.listdir(tmp_path))
    status = main.main([*command, f"--out={bucket}/report"])
    assert status == 0, capsys.readouterr()
    assert sorted(os.listdir(tmp_path)) == before
    (tmp_path / "back").mkdir()
    back = buckets.download(f"{bucket}/report", tmp_path / "back")
    assert {"report.md", "report.html"} <= {path.name for path in pathlib.Path(back).iterdir()}
    assert main.main([*command, f"--out={bucket}/report"]) == 1
    assert "/report exists" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_of_many_writers_at_once_one_succeeds(scheme):
    def write(number: int) -> bool:
        barrier.wait()
        try:
            buckets.write(address, f"{number}".encode(), new=True)
        except buckets.ExistsError:
            return False
        return True

    with (
        object_stores.running(scheme, latency=0.02, faults=0.1),
        concurrent.futures.ThreadPoolExecutor(12) as pool,
    ):
        for attempt in range(10):
            barrier = threading.Barrier(12)
            address = f"{scheme}://{object_stores.BUCKET}/{attempt}"
            (winner,) = [n for n, won in enumerate(pool.map(write, range(12))) if won]
            assert buckets.read(address).data == f"{winner}".encode()
