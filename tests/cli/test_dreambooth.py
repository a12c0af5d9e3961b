"""`dreambooth`: a subject's images and sampled images of its class tune every stage."""

import argparse
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import dreambooth, main
from imagen_jax.config.distill import DistillConfig
from imagen_jax.config.text import TextConfig
from imagen_jax.interop.weights import flatten
from imagen_jax.stages.folder import check_chain, load_stage, write_stage
from tests.reference.byte_encoder import write_byte_encoder


@pytest.fixture
def cascade(base_config, sr_config, random_params, tmp_path):
    """(base, SR) stage folders with a random byte encoder."""
    rng = np.random.default_rng(0)
    text = TextConfig(encoder="bytes", path=write_byte_encoder(tmp_path / "text"), max_len=16)
    folders = []
    for config in (base_config, sr_config):
        config = dataclasses.replace(config, text=text)
        write_stage(tmp_path / config.name, random_params(config), config, {})
        folders.append(str(tmp_path / config.name))
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
    return folders


def command(cascade, tmp_path, *flags) -> list[str]:
    return [
        "dreambooth",
        f"--stages={','.join(cascade)}",
        f"--images={tmp_path / 'images'}",
        "--prompt=a sks dog",
        "--class_prompt=a dog",
        f"--workdir={tmp_path / 'out'}",
        "--config.train.steps=2",
        *flags,
    ]


@pytest.mark.slow
def test_both_stages_are_tuned_on_subject_and_class(cascade, tmp_path):
    flags = ["--class_images=4", "--class_prompt=two dogs"]
    assert main.main(command(cascade, tmp_path, *flags)) == 0
    out = tmp_path / "out"
    for name, expected in (
        ("subject", ["a sks dog"] * 3),
        ("class", ["a dog"] * 2 + ["two dogs"] * 2),
    ):
        lines = (out / "data" / name / "metadata.jsonl").read_text().splitlines()
        assert [json.loads(line)["text"] for line in lines] == expected
    stages = [load_stage(str(out / "stages" / name)) for name in ("base", "sr")]
    check_chain([stage.config for stage in stages])
    for stage, before in zip(stages, cascade, strict=True):
        old, new = flatten(load_stage(before).params), flatten(stage.params)
        moved = {name for name in old if not np.array_equal(old[name], new[name])}
        assert moved and all("attention" in name for name in moved)
        assert (out / "loras" / stage.config.name / "lora.safetensors").is_file()
        assert stage.config.data.mixture.keys() == {"subject", "class"}
    # The same command again computes nothing and gives the same.
    before = (out / "stages" / "sr" / "params.safetensors").read_bytes()
    assert main.main(command(cascade, tmp_path, *flags)) == 0
    assert (out / "stages" / "sr" / "params.safetensors").read_bytes() == before


def test_a_distilled_stage_is_tuned_on_images(base_config, random_params, tmp_path):
    """With its teacher it would learn the teacher again, or not start without the teacher."""
    distill = DistillConfig("gone", steps=2)
    student = dataclasses.replace(base_config, distill=distill)
    write_stage(tmp_path / "student", random_params(student), student, {})
    flags = argparse.Namespace(class_images=0, seed=0, overrides=[])
    config = dreambooth.tuning_config(str(tmp_path / "student"), tmp_path, flags)
    assert config.distill == DistillConfig()
    assert config.sampling == student.sampling


@pytest.mark.slow
def test_without_prior_preservation_and_without_lora(cascade, tmp_path):
    flags = ["--class_images=0", "--config.lora.rank=0"]
    assert main.main(command(cascade[:1], tmp_path, *flags)) == 0
    out = tmp_path / "out"
    assert not (out / "class_samples").exists() and not (out / "loras").exists()
    old, new = (flatten(load_stage(p).params) for p in (cascade[0], str(out / "stages" / "base")))
    assert any(not np.array_equal(old[n], new[n]) for n in old if "attention" not in n)


def test_prompts_must_differ(cascade, tmp_path, capsys):
    words = command(cascade, tmp_path, "--class_prompt=two dogs")
    for prompt in ("a dog", "two dogs"):
        words[3] = f"--prompt={prompt}"
        assert main.main(words) == 1
        assert "--prompt must differ from --class_prompt" in capsys.readouterr().err


def test_each_class_prompt_has_an_image(cascade, tmp_path, capsys):
    flags = ["--class_prompt=two dogs", "--class_images=1"]
    assert main.main(command(cascade, tmp_path, *flags)) == 1
    error = capsys.readouterr().err
    assert "--class_images=1 are too few for 2 class prompts; give at least 2" in error
