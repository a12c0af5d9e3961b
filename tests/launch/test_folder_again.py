"""launch/folder.sh: sizes and steps, and a second start: text encoder and steps stay."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from imagen_jax.data.embeddings.store import EmbeddingStore

ROOT = pathlib.Path(__file__).parents[2]
STAGES = ["export", "export", "train", "train"]
TINY = [
    "--config.model.channels=(8, 8)",
    "--config.model.num_res_blocks=(1, 1)",
    "--config.model.self_attention=(False, False)",
    "--config.model.cross_attention=(False, True)",
    "--config.model.head_dim=8",
    "--config.model.num_groups=2",
    "--config.model.embed_dim=16",
    "--config.pretrain_text.emb_dim=16",
    "--config.pretrain_text.num_heads=2",
    "--config.pretrain_text.num_layers=1",
    "--config.pretrain_text.mlp_dim=32",
]


@pytest.mark.parametrize("flag", ["--allow_changes", "--allow-changes"])
def test_changes_are_allowed_in_training_alone(tools, tmp_path, flag):
    path = tools(python=f'[ "$1" = -c ] && echo cpu True || echo "$@" >>{tmp_path}/calls')
    run = tmp_path / "my run"
    (run / "text").mkdir(parents=True)
    (run / "text" / "pretrain.json").write_text("{}")
    (run / "prompts.jsonl").touch()
    words = [f"{flag}=data.fingerprint", "--config.train.steps=9"]
    done = subprocess.run(
        ["bash", "launch/folder.sh", "images", run, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHON": str(path / "python")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"text encoder in {run}/text is kept" in done.stdout
    calls = (tmp_path / "calls").read_text().splitlines()
    verbs = [line.split()[2] for line in calls]
    # The two trainings run at the same time.
    assert (verbs[:2], sorted(verbs[2:6]), verbs[6:]) == (["prepare", "embed"], STAGES, ["sample"])
    for verb, line in zip(verbs, calls, strict=True):
        assert (words[0] in line) == (verb == "train"), line
        assert (words[1] in line) == (verb not in ("export", "sample")), line
    assert "The base stage trains for 9 steps, super-resolution for 9" in done.stdout


@pytest.mark.parametrize(
    ("device", "minilm", "names", "encoder"),
    [
        ("cpu", "True", ("base", "sr"), "minilm"),
        ("cpu", "False", ("base", "sr"), "own"),
        ("gpu", "True", ("base_64", "sr_256"), "minilm"),
    ],
)
def test_sizes_follow_the_device_and_steps_the_captions(
    tools, tmp_path, device, minilm, names, encoder
):
    """A stand-in for `prepare` writes 100 captions."""
    answer = f"""[ "$1" != -c ] || {{ echo {device} {minilm}; exit; }}
echo "$@" >>{tmp_path}/calls
[ "$3" != prepare ] || seq 100 >{tmp_path}/run/prompts.jsonl"""
    path, run = tools(python=answer), tmp_path / "run"
    run.mkdir()
    for captions in (100, 7):  # The second start keeps the steps of the first.
        done = subprocess.run(
            ["bash", "launch/folder.sh", "images", run],
            cwd=ROOT,
            env={**os.environ, "PYTHON": str(path / "python")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
        (tmp_path / "calls").unlink()
        verbs = [call[2] for call in calls]
        assert ("pretrain_text" in verbs) == (encoder == "own")
        trained = {call[3].rpartition(":")[2]: call for call in calls if call[2] == "train"}
        assert set(trained) == set(names)
        base, sr = (trained[name] for name in names)
        assert "--config.train.steps=5400" in base and "--config.train.steps=2700" in sr
        path_of_text = "minilm" if encoder == "minilm" else f"{run}/text"
        assert f"--config.text.path={path_of_text}" in base
        assert ("minutes on two cores" in done.stdout) == (device == "cpu")
        (path / "python").write_text(f"#!/bin/bash\n{answer.replace('100', str(captions))}\n")


def test_samples_of_other_weights_get_another_name(tools, tmp_path):
    """`sample` refuses a folder with images of other weights, so earlier ones move."""
    run, weights = tmp_path / "run", tmp_path / "run" / "stages" / "base" / "params.safetensors"
    answer = f"""[ "$1" != -c ] || {{ echo cpu True; exit; }}
[ "$3" != sample ] || mkdir -p {run}/samples"""
    path = tools(python=answer)
    weights.parent.mkdir(parents=True)
    (run / "prompts.jsonl").write_text("a\n")
    earlier = []
    for content in ("one", "one", "two"):
        weights.write_text(content)
        done = subprocess.run(
            ["bash", "launch/folder.sh", "images", run],
            cwd=ROOT,
            env={**os.environ, "PYTHON": str(path / "python")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert (run / "samples").is_dir()
        earlier.append(len(list(run.glob("samples_*"))))
    assert earlier == [0, 0, 1]


def write_image(folder: pathlib.Path, number: int, caption: str) -> None:
    pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / f"{number}.txt").write_text(caption)


@pytest.mark.slow
def test_a_folder_that_changes_twice_goes_on_with_its_captions_embedded(tmp_path):
    """Images are added and captions corrected, then images are removed; four steps in all.

    The script runs as a user starts it, on one core, with an encoder of its own and networks of two
    small levels, because compiling those of configs/folder.py five times takes an hour.
    """
    photos, run = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for number in range(10):
        write_image(photos, number, f"photograph {number} of a red kite")
    environment = {**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "xla")
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    core = str(min(os.sched_getaffinity(0)))

    def start(*flags: str) -> tuple[int, str]:
        small = ["--config.pretrain_text.steps=2", f"--config.text.path={run}/text"]
        small += ["--config.data.batch_size=2", "--config.sampling.steps=2", *TINY, *flags]
        done = subprocess.run(
            ["taskset", "-c", core, "bash", "launch/folder.sh", photos, run, *small],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    def lacking(*captions: str) -> list[str]:
        return EmbeddingStore.open(str(run / "embeddings")).missing(captions)

    def trained(stage: str) -> int:
        lines = (run / stage / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"]

    code, said = start("--config.train.steps=2")
    assert code == 0, said[-3000:]
    encoder = (run / "text" / "pretrain.json").read_bytes()

    for number in (10, 11):
        write_image(photos, number, f"a new photograph, number {number}")
    (photos / "3.txt").write_text("a corrected caption")
    code, said = start("--config.train.steps=2")
    assert code == 1
    assert "2 images added, 0 removed, 0 replaced, 1 with other captions" in said
    assert "--allow_changes=data.fingerprint,train.steps --config.train.steps=4" in said
    code, said = start("--allow_changes=data.fingerprint,train.steps", "--config.train.steps=4")
    assert code == 0, said[-3000:]
    assert not lacking("a corrected caption", "a new photograph, number 11")
    assert (trained("base"), trained("sr")) == (4, 4)

    for number in (0, 10):
        (photos / f"{number}.png").unlink()
        (photos / f"{number}.txt").unlink()
    (photos / "4.txt").write_text("another corrected caption")
    code, said = start("--config.train.steps=6")
    assert code == 1
    assert "0 images added, 2 removed, 0 replaced, 1 with other captions" in said
    code, said = start("--allow_changes=data.fingerprint,train.steps", "--config.train.steps=6")
    assert code == 0, said[-3000:]
    assert not lacking("another corrected caption", "a corrected caption")
    assert (trained("base"), trained("sr")) == (6, 6)
    assert (run / "text" / "pretrain.json").read_bytes() == encoder
    prompts = (run / "prompts.jsonl").read_text()
    assert "another corrected caption" in prompts and "photograph 0 of" not in prompts
    rows = [json.loads(line) for line in (run / "samples" / "samples.jsonl").open()]
    assert {row["prompt"] for row in rows} == {
        json.loads(line)["prompt"] for line in prompts.splitlines()
    }
