"""The programs of examples/, run with the commands of their docstrings on tiny data."""

import ast
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import main
from imagen_jax.config.text import TextConfig
from imagen_jax.evaluation import charts
from imagen_jax.interop import if_lora
from imagen_jax.stages import lora_file
from imagen_jax.stages.folder import check_chain, load_stage, write_stage
from tests.interop.test_if_unet import write as write_if
from tests.reference.byte_encoder import write_byte_encoder
from tests.reference.pages import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def example(name: str, *arguments: str) -> str:
    """Runs an example; returns its output."""
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def image_folder(tmp_path) -> pathlib.Path:
    """A folder of 8 captioned images."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for i in range(8):
        pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"image {i}")
    return folder


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_listed_and_tested(path):
    assert len(path.read_text().splitlines()) < 150
    assert f"[{path.name}]({path.name})" in (ROOT / "examples" / "README.md").read_text()
    names = [
        n.value
        for n in ast.walk(ast.parse(pathlib.Path(__file__).read_text()))
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]
    assert any(path.stem in name for name in names)


@pytest.mark.slow
def test_custom_data_learns_its_colours(tmp_path):
    output = example("custom_data", f"--workdir={tmp_path}")
    correct, total = map(
        int, output.splitlines()[-1].split(": ")[1].split(" have")[0].split(" of ")
    )
    assert total == 12 and correct >= 10, output
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.slow
def test_custom_sampler_samples_with_every_sampler(base_config, random_params, tmp_path):
    text = TextConfig(encoder="bytes", path=write_byte_encoder(tmp_path / "text", 8), max_len=16)
    config = dataclasses.replace(base_config, text=text)
    write_stage(tmp_path / "base", random_params(config), config, {})
    flags = [f"--stage={tmp_path / 'base'}", "--prompt=a", f"--out={tmp_path / 'sheet.png'}"]
    output = example("custom_sampler", *flags, "--count=2", "--steps=4")
    names = [line.split(":")[0] for line in output.splitlines()]
    assert names == ["ddpm", "ddim", "dpmpp_2m", "heun", "averaged_ddim"]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 2 * sheet.width


@pytest.mark.slow
def test_a_custom_stage_is_trained_and_exported(image_folder, tmp_path):
    text, workdir, out = (tmp_path / name for name in ("text", "run", "stage"))
    where = [f"--config.data.path={image_folder}", f"--config.data.embeddings={tmp_path / 'emb'}"]
    where += ["--config=examples/custom_stage.py:middle", f"--config.text.path={text}"]
    where += ["--config.pretrain_text.steps=2", "--config.train.steps=2"]
    where += ["--config.data.batch_size=4"]
    for verb in (
        ["pretrain_text", *where, f"--out={text}"],
        ["embed", *where],
        ["train", *where, f"--workdir={workdir}"],
    ):
        assert main.main(verb) == 0
    assert main.main(["export", f"--workdir={workdir}", f"--out={out}"]) == 0
    config = load_stage(str(out)).config
    assert (config.name, config.data.lowres_size, config.data.image_size) == ("middle", 16, 32)
    check_chain([config], lowres_size=16)


@pytest.mark.slow
def test_a_lora_of_ifs_architecture_is_trained_and_exported(image_folder, tmp_path):
    unet = write_if("base", tmp_path / "unet")
    text = write_byte_encoder(tmp_path / "text", 24)
    flags = [f"--unet={unet}", f"--text={text}", "--encoder=bytes", f"--images={image_folder}"]
    out = tmp_path / "out"
    example("finetune_if", *flags, f"--workdir={out}", "--steps=2", "--batch_size=2")
    stage = load_stage(str(out / "imported"))
    written = if_lora.read(out / "lora", stage.config.model)
    own = lora_file.read(str(out / "lora"), stage.config)
    assert written.keys() == own.keys() and all("attention" in kernel for kernel in own)
    for kernel, (a, b) in own.items():
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(np.tensordot(*written[kernel], 1), a @ b, atol=1e-6)


def test_read_metrics_summarises_the_rows(tmp_path):
    rows = [
        {"step": k, "loss": 2.0 / k, "x0_mse": 1.0 / k, "skipped": 1, "images_per_second": 50.0}
        | {"data_wait": 0.25, "loss/logsnr_-2_0": 0.5}
        for k in range(1, 21)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 21, "lo')
    chart = tmp_path / "loss.svg"
    output = example("read_metrics", f"--workdir={tmp_path}", f"--chart={chart}")
    assert "steps 1 to 20, 20 rows" in output and "50.0 images/s, 25.0% of the time" in output
    assert "1 updates skipped" in output and "loss at logsnr -2 .. 0: 0.5" in output
    for color in charts.COLORS[:2]:  # 20 markers and one in the legend.
        assert len(re.findall(f"<use [^>]*fill: {color}", chart.read_text())) == 21
