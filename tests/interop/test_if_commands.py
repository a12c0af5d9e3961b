"""docs/models.md: from a downloaded folder of IF to images, to a LoRA and back to diffusers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import main
from imagen_jax.interop import if_lora, if_unet
from imagen_jax.interop.weights import flatten
from tests.interop.test_if_pipeline import NAMES, write_pipeline

QUICK = {name: {"steps": 2, "spacing": "leading"} for name in NAMES.values()}


def run(verb: str, *flags: str) -> None:
    assert main.main([verb, *flags]) == 0


@pytest.mark.slow
def test_images_then_a_lora_then_diffusers(tmp_path):
    stages = {name: tmp_path / "stages" / name for name in NAMES.values()}
    for case, name in NAMES.items():
        source = write_pipeline(case, tmp_path / f"IF-{case}")
        run("import", "if", f"--src={source}", f"--out={stages[name]}")
    chain = f"--stages={stages['if_base']},{stages['if_sr']}"
    settings = f"--stage_settings={json.dumps(QUICK)}"
    run("sample", chain, "--prompt=a red hat", f"--out={tmp_path / 'out'}", settings)
    assert Image.open(tmp_path / "out" / "00000_00.png").size == (32, 32)

    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)).save(images / f"{i}.png")
    tune = [chain, f"--images={images}", "--prompt=a sks hat", "--class_prompt=a hat"]
    tune += [f"--workdir={tmp_path / 'tuned'}", "--class_images=2", "--config.train.steps=2"]
    tune += ["--config.sampling.steps=2"]
    run("dreambooth", *tune)

    for case, name in NAMES.items():
        back, tuned = tmp_path / f"back-{case}", tmp_path / "tuned"
        run("export", "--format=diffusers", f"--workdir={tuned / 'stages' / name}", f"--out={back}")
        assert (back / "model_index.json").is_file()
        config, params = if_unet.load(back / "unet")
        _, before = if_unet.load(tmp_path / f"IF-{case}" / "unet")
        old, new = flatten(before), flatten(params)
        moved = {path for path in old if not np.array_equal(old[path], new[path])}
        assert moved and all("attention" in path for path in moved)
        # diffusers reads the LoRA alone, too.
        updates = if_lora.read(tuned / "loras" / name / if_lora.DIFFUSERS_FILE, config)
        assert {f"{path}/kernel" for path in updates} == moved
    loras = ",".join(f"{name}={tuned / 'loras' / name}" for name in NAMES.values())
    flags = [chain, "--prompt=a sks hat", f"--out={tmp_path / 'with'}", settings]
    run("sample", *flags, f"--loras={loras}")
