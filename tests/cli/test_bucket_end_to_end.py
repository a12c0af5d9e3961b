"""From images to scores with every path in a bucket of an emulator, behind a proxy that fails."""

import dataclasses
import os
import pathlib
import signal
import threading
import time

import jax
import numpy as np
import pytest

from imagen_jax.cli import main
from imagen_jax.export.export import read_average
from imagen_jax.interop import hf_t5
from imagen_jax.interop.hf_t5 import T5Config
from imagen_jax.io import buckets, mirrors
from imagen_jax.models import t5
from imagen_jax.parallel.preemption import RESTART
from tests import object_stores

STEPS = 50


@pytest.fixture
def world(tmp_path, base_config, write_world, monkeypatch):
    """Configuration file of a folder of 12 images and a tiny text encoder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("imagen_jax.cli.wiring.set_up_devices", lambda count: None)
    shape = T5Config(vocab_size=384, emb_dim=8, num_layers=1, num_heads=2, head_dim=4, mlp_dim=16)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), t5.parameter_shapes(shape)
    )
    hf_t5.save(tmp_path / "text", shape, params)
    config = dataclasses.replace(
        base_config, text=dataclasses.replace(base_config.text, encoder="bytes")
    )
    return write_world(tmp_path, config, steps=STEPS, every=10)


def flags(world: pathlib.Path, data: str, text: str) -> list[str]:
    return [
        f"--config={world}",
        f"--config.data.path={data}",
        f"--config.data.embeddings={text}",
        f"--config.text.path={world.parent}/text",
        "--config.train.sample_every=25",
    ]


def run(*command: str) -> None:
    status = main.main(list(command))
    assert status == 0, command


def stop_at(step: int) -> threading.Thread:
    """Sends SIGTERM to this process when metrics.jsonl of a run in a bucket has so many rows."""

    def watch() -> None:
        while True:
            for file in mirrors.home().glob("*/metrics.jsonl"):
                if file.read_text().count("\n") >= step:
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
            time.sleep(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def upload(folder: pathlib.Path, address: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file() and ".imagen_index" not in file.parts:
            name = file.relative_to(folder).as_posix()
            buckets.write(buckets.join(address, name), file.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_from_images_to_scores(scheme, world, tmp_path, monkeypatch, capsys):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    local = flags(world, str(tmp_path / "images"), str(tmp_path / "text_local"))
    run("prepare", *local)
    run("embed", *local)
    run("train", *local, f"--workdir={tmp_path}/run")

    with object_stores.running(scheme, latency=0.03, faults=0.02) as proxy:
        root = f"{scheme}://{object_stores.BUCKET}/all"
        upload(tmp_path / "images", f"{root}/images")
        remote = flags(world, f"{root}/images", f"{root}/text")
        counts = {}

        def step(name: str, *command: str, status: int = 0) -> None:
            before = sum(proxy.requests.values()), proxy.sent + proxy.received
            assert main.main([*command]) == status, (name, capsys.readouterr())
            after = sum(proxy.requests.values()), proxy.sent + proxy.received
            counts[name] = tuple(b - a for a, b in zip(before, after, strict=True))

        step("prepare", "prepare", *remote)
        step("embed", "embed", *remote)
        # Another machine trains; its cache is empty.
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
        watcher = stop_at(STEPS // 2)
        step("train", "train", *remote, f"--workdir={root}/run", status=RESTART)
        watcher.join()
        step("resume", "train", *remote, f"--workdir={root}/run")
        step("export", "export", f"--workdir={root}/run", f"--out={root}/stage")
        buckets.write(f"{root}/prompts.txt", b"image 1\nimage 2\n")
        sample = ("sample", f"--stages={root}/stage", f"--prompts={root}/prompts.txt")
        step("sample", *sample, f"--out={root}/samples", "--seed=1")
        step("again", *sample, f"--out={root}/samples2", "--seed=2")
        pages = (f"--samples_a={root}/samples", f"--samples_b={root}/samples2")
        step(
            "evaluate", "evaluate", "rate_build", "--study=alignment", *pages, f"--out={root}/study"
        )

        names = buckets.names(root)
        assert proxy.failed > 3
        with capsys.disabled():
            print(f"\n{scheme}: requests and bytes: {counts}; {proxy.failed} requests failed")
        run("export", f"--workdir={tmp_path}/run", f"--out={tmp_path}/stage")
        expected = (tmp_path / "stage" / "params.safetensors").read_bytes()
        assert buckets.read(f"{root}/stage/params.safetensors").data == expected
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third"))
        rows = buckets.read(f"{root}/run/metrics.jsonl").data.decode().splitlines()
        assert len(rows) == STEPS
    for name in ("run/checkpoints/50/commit.json", "run/samples/step_00000025.png"):
        assert name in names
    assert any(name.startswith("study/") for name in names)
    assert read_average(str(tmp_path / "run"))[2] == STEPS
    assert list(here.iterdir()) == []
    assert not [path for path in tmp_path.rglob("*") if path.name in ("gs:", "s3:")]
    # A step reads 4 images and 4 texts; a checkpoint of this size is 5 objects and 4 lists.
    assert counts["resume"][0] < 60 * 8 + 40 * 20
