"""`sample` and `edit` as commands: files, going on where a run stopped, refusals, two processes."""

import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import main
from imagen_jax.config.text import T5Config, TextConfig
from imagen_jax.diffusion.editing import Edit
from imagen_jax.inference.cascade import Cascade
from imagen_jax.inference.sample import SampleOptions, sample
from imagen_jax.inference.sample_folder import SampleError
from imagen_jax.interop import hf_t5
from imagen_jax.io import buckets, images
from imagen_jax.models import t5
from imagen_jax.stages.folder import write_stage
from imagen_jax.stages.stage import Stage
from tests.reference.fake_encoder import FakeEncoder

SOURCE = pathlib.Path(__file__).parents[2]
ROWS = [{"prompt": f"prompt {i}", "category": "odd" if i % 2 else "even"} for i in range(5)]


@pytest.fixture(scope="module")
def stages(base_config, sr_config, random_params):
    return [Stage(config, random_params(config)) for config in (base_config, sr_config)]


@pytest.fixture(scope="module")
def cascade(stages):
    return Cascade(stages, FakeEncoder())


JOB = SampleOptions(seed=3, samples_per_prompt=2, batch_size=4)


@pytest.fixture(scope="module")
def drawn(cascade, tmp_path_factory):
    """A finished folder of ten images."""
    folder = tmp_path_factory.mktemp("samples")
    sample(cascade, ROWS, str(folder), JOB, lambda line: None)
    return folder


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_files_and_what_they_say(drawn):
    names = [f"{p:05d}_{k:02d}.png" for p in range(5) for k in range(2)]
    assert sorted(p.name for p in drawn.iterdir()) == sorted([*names, "grid.png", "samples.jsonl"])
    rows = [json.loads(line) for line in (drawn / "samples.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == names
    assert rows[3] == {
        **ROWS[1],
        "file": "00001_01.png",
        "prompt_index": 1,
        "sample_index": 1,
        "seed": 3,
    }
    text = Image.open(drawn / names[3]).text
    assert text["prompt"] == "prompt 1" and text["seed"] == "3"
    assert json.loads(text["settings"])["base"]["steps"] == 4
    assert len({pixels(drawn / name).tobytes() for name in names}) == 10


def test_the_seed_of_a_row_is_that_of_its_images(cascade, drawn, tmp_path):
    rows = [{**row, "seed": 3} if row["category"] == "even" else row for row in ROWS]
    job = dataclasses.replace(JOB, seed=8)
    sample(cascade, rows, str(tmp_path), job, lambda line: None)
    said = [json.loads(line)["seed"] for line in (tmp_path / "samples.jsonl").open()]
    assert said == [3, 3, 8, 8, 3, 3, 8, 8, 3, 3]
    assert Image.open(tmp_path / "00001_01.png").text["seed"] == "8"
    for p in range(5):
        name = f"{p:05d}_01.png"
        assert (pixels(drawn / name) == pixels(tmp_path / name)).all() == (p % 2 == 0)


def test_a_stopped_run_goes_on(cascade, drawn, tmp_path):
    """What is whole stays as it is; what is missing or damaged is drawn, and is the same."""
    folder = shutil.copytree(drawn, tmp_path / "out")
    whole = (folder / "00000_00.png").read_bytes()
    (folder / "00000_01.png").unlink()
    for name, content in {
        "00001_00.png": whole[:-20],
        "00001_01.png": whole[: len(whole) // 2] + b"\0" + whole[len(whole) // 2 + 1 :],
        "00002_00.png": b"",
        ".00002_01.png.123.tmp": whole,
    }.items():
        (folder / name).write_bytes(content)
    before = (folder / "00004_01.png").stat()
    lines = []
    sample(cascade, ROWS, str(folder), JOB, lines.append)
    assert "6 of 10 images are there already" in lines[0]
    assert lines[-1].startswith("4/4 images") and "images/s" in lines[-1]
    assert (folder / "00004_01.png").stat().st_mtime_ns == before.st_mtime_ns
    for path in drawn.glob("0*.png"):
        assert np.abs(pixels(path) - pixels(folder / path.name)).max() <= 1
    # A further sample of each prompt is added to those that are there.
    more = dataclasses.replace(JOB, samples_per_prompt=3)
    sample(cascade, ROWS, str(folder), more, lines.append)
    assert any("10 of 15" in line for line in lines)
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 15


@pytest.mark.parametrize(
    ("rows", "changes", "says"),
    [
        (ROWS, {"seed": 4}, "sampled with seed='3', this run has '4'"),
        (ROWS[1:], {}, "00004_00.png, which this run has no prompt or sample for"),
        (ROWS, {"samples_per_prompt": 1}, "00000_01.png, which this run has no"),
        ([*ROWS[1:], ROWS[0]], {}, "prompt='prompt 0', this run has 'prompt 1'"),
        (ROWS, {"stage_settings": {"sr": {"steps": 5}}}, "settings.sr.steps=4, this run has 5"),
        (ROWS, {"edit": Edit(np.zeros((1, 16, 16, 3), np.uint8))}, "settings.edit.*None, this run"),
    ],
)
def test_a_folder_of_another_run_is_refused(cascade, drawn, rows, changes, says):
    with pytest.raises(SampleError, match=says) as error:
        sample(cascade, rows, str(drawn), dataclasses.replace(JOB, **changes))
    assert "\n" not in str(error.value)


def test_other_weights_are_another_run(stages, drawn, random_params, tmp_path):
    other = Cascade(stages, FakeEncoder())
    other.weight_hashes = ["0123", ""]
    with pytest.raises(SampleError, match=r"settings.base.weights='', this run has '0123'"):
        sample(other, ROWS, str(drawn), JOB)


def test_a_finished_folder_gets_the_floats_and_traces_it_lacks(cascade, tmp_path):
    job = dataclasses.replace(JOB, samples_per_prompt=1)
    sample(cascade, ROWS[:2], str(tmp_path), job)
    before = (tmp_path / "00001_00.png").read_bytes()
    for more in ({"floats": True}, {"floats": True, "trace": "gif"}):
        sample(cascade, ROWS[:2], str(tmp_path), dataclasses.replace(job, **more))
        assert len(list(tmp_path.glob("*.npy"))) == 2
    assert len(list((tmp_path / "trace").glob("*.gif"))) == 2
    assert (tmp_path / "00001_00.png").read_bytes() == before

    def again(*_):
        raise AssertionError("sampled again")

    cascade_sample, cascade.sample = cascade.sample, again
    try:
        sample(cascade, ROWS[:2], str(tmp_path), job)
    finally:
        cascade.sample = cascade_sample


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_traces(cascade, kind, tmp_path):
    job = SampleOptions(seed=3, batch_size=4, trace=kind)
    sample(cascade, ROWS, str(tmp_path), job, lambda line: None)
    traces = sorted(p.name for p in (tmp_path / "trace").iterdir())
    assert traces == [f"{p:05d}_00.{kind}" for p in range(5)]
    last = pixels(tmp_path / "00004_00.png").repeat(8, 0).repeat(8, 1)
    with Image.open(tmp_path / "trace" / traces[4]) as trace:
        if kind == "png":
            # Two rows, of four steps each; the last is the image.
            strip = np.asarray(trace).astype(int)
            np.testing.assert_array_equal(strip[-132:-4, 4 + 3 * 132 : 4 * 132], last)
        else:
            assert trace.n_frames == 8
            trace.seek(7)
            shown = np.asarray(trace.convert("RGB")).astype(int)
            # A GIF has 256 colours.
            assert np.abs(shown - last).mean() < 8


LONG = 12  # Bytes of a prompt that the commands' text encoder sees.


@pytest.fixture(scope="module")
def folders(stages, tmp_path_factory) -> str:
    """--stages of the cascade with a tiny text encoder, for commands."""
    root = tmp_path_factory.mktemp("stages")
    shape = T5Config(vocab_size=384, emb_dim=8, num_layers=1, num_heads=2, head_dim=4, mlp_dim=8)
    ids = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(t5.T5Encoder(shape).init, jax.random.key(0), ids, ids == 0)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes["params"]
    )
    hf_t5.save(root / "text", shape, params)
    text = TextConfig(encoder="bytes", path=str(root / "text"), max_len=LONG)
    for stage in stages:
        data = dataclasses.replace(stage.config.data, max_text_len=LONG)
        config = dataclasses.replace(stage.config, text=text, data=data)
        write_stage(root / config.name, stage.params, config, {})
    return f"{root}/base,{root}/sr"


@pytest.fixture(scope="module")
def own_image(tmp_path_factory) -> pathlib.Path:
    """An image of 16 x 24 pixels."""
    path = tmp_path_factory.mktemp("own") / "image.png"
    images.save_png(path, np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8), {})
    return path


@pytest.mark.slow
def test_images_record_the_addresses_of_their_stages(folders, tmp_path, monkeypatch):
    """Not the names of temporary copies."""
    here = {f"gs://b/{path.rpartition('/')[2]}": path for path in folders.split(",")}
    monkeypatch.setattr(
        buckets, "download", lambda address, to: shutil.copytree(here[address], to / "stage")
    )
    given = [f"--stages={','.join(here)}", "--prompt=a", f"--out={tmp_path}/out"]
    assert main.main(["sample", *given]) == 0
    text = Image.open(tmp_path / "out" / "00000_00.png").text
    assert text["checkpoint"] == "gs://b/base,gs://b/sr"


@pytest.mark.slow
def test_editing_from_the_command_line(folders, own_image, tmp_path):
    stages, masked = f"--stages={folders}", tmp_path / "mask.png"
    mask = np.zeros((16, 16, 3), np.uint8)
    mask[4:10, 2:9] = 255
    images.save_png(masked, mask, {})
    given = [f"--image={own_image}", "--prompt=a"]
    edits = {
        "inpaint": [stages, f"--mask={masked}", "--resamplings=2"],
        "image": [stages, "--strength=0.3"],
        "upscale": [f"--stages={folders.split(',')[1]}", "--aug_level=0.4"],
    }
    for what, flags in edits.items():
        assert main.main(["edit", what, *flags, *given, f"--out={tmp_path}/{what}"]) == 0
        rows = (tmp_path / what / "samples.jsonl").read_text().splitlines()
        assert json.loads(rows[0])["prompt"] == "a"
    square = pixels(own_image)[:, 4:20]
    inpainted = pixels(tmp_path / "inpaint" / "00000_00.png")
    outside = mask[..., 0] == 0
    np.testing.assert_array_equal(inpainted[outside], square[outside])
    assert (inpainted[~outside] != square[~outside]).mean() > 0.9
    text = Image.open(tmp_path / "upscale" / "00000_00.png").text
    assert json.loads(text["settings"])["sr"]["aug_level"] == 0.4


def test_edits_that_are_refused(folders, own_image, tmp_path, capsys):
    black = tmp_path / "black.png"
    images.save_png(black, np.zeros((16, 16, 3), np.uint8), {})
    (tmp_path / "text.png").write_text("not an image")
    sr, own = folders.split(",")[1], f"--image={own_image}"
    for what, stages, flags, says in [
        ("image", folders, [own, "--strength=0"], "strength=0.0 must be above 0"),
        ("image", folders, [f"--image={tmp_path}/no.png"], "no.png: no such file"),
        ("image", folders, [f"--image={tmp_path}/text.png"], "wrong type (not an image)"),
        ("inpaint", folders, [own, f"--mask={black}"], "has no white pixels"),
        ("inpaint", folders, [own, f"--mask={own_image}", "--jump=0"], "jump=0 must be at least 1"),
        ("upscale", folders, [own], "stage 'base' is a base stage; leave it out"),
        ("upscale", sr, [own, "--aug_level=1.5"], "aug_level=1.5 must be within 0..1"),
    ]:
        flags = [f"--stages={stages}", "--prompt=a", f"--out={tmp_path}/out", *flags]
        assert main.main(["edit", what, *flags]) == 1
        line = capsys.readouterr().err
        assert says in line and line.count("\n") == 1, line
    assert not (tmp_path / "out").exists()


def start(processes: int, folders: str, prompts: pathlib.Path, outs: list[pathlib.Path]):
    """`sample` as that many processes, each with one device."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    running = []
    for index in range(processes):
        environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        command = [sys.executable, "-m", "imagen_jax", "sample", f"--stages={folders}"]
        command += [f"--prompts={prompts}", f"--out={outs[index]}", "--batch_size=2"]
        running.append(
            subprocess.Popen(
                [*command, "--samples_per_prompt=2"],
                cwd=SOURCE,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes, "\n".join(said)
    return said


@pytest.mark.slow
def test_hosts_share_the_work(folders, tmp_path):
    prompts = tmp_path / "prompts.csv"
    lines = [f"{row['prompt']},{row['category']}" for row in ROWS]
    prompts.write_text("\n".join(["Prompt,Category", *lines]) + "\n")
    alone, shared, first, second = (tmp_path / n for n in ("alone", "shared", "first", "second"))
    start(1, folders, prompts, [alone])
    names = sorted(p.name for p in alone.glob("0*.png"))
    assert len(names) == 10

    # One folder that both see, with one image in it already.
    shared.mkdir()
    shutil.copy(alone / names[0], shared)
    said = start(2, folders, prompts, [shared, shared])
    assert "1 of 10 images are there already" in said[0]
    assert "images on host 1 of 2" in said[0] and "images/s" not in said[1]

    # A folder of each: the images are divided, lines and grid are the first one's.
    start(2, folders, prompts, [first, second])
    halves = [{p.name for p in folder.glob("0*.png")} for folder in (first, second)]
    assert halves[0] | halves[1] == set(names) and not halves[0] & halves[1]
    assert min(map(len, halves)) == 4
    assert not (second / "samples.jsonl").exists() and not (second / "grid.png").exists()

    for name in names:
        for folder in (shared, first if name in halves[0] else second):
            assert np.abs(pixels(folder / name) - pixels(alone / name)).max() <= 1
    for folder in (shared, first):
        assert (folder / "samples.jsonl").read_text() == (alone / "samples.jsonl").read_text()
        assert np.abs(pixels(folder / "grid.png") - pixels(alone / "grid.png")).max() <= 1
