"""Teaches a cascade a subject from a few images (DreamBooth, Ruiz et al. 2022).

Samples images of the subject's class from the stages, then trains every stage on the images of the
subject and of its class in equal parts, so that the class stays as it was (prior preservation). A
LoRA is trained; `--config.lora.rank=0` trains all parameters. Writes WORKDIR/stages/NAME, and
WORKDIR/loras/NAME. The same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Sequence

from imagen_jax.cli import path_flags, wiring
from imagen_jax.config import overrides
from imagen_jax.config.data import ComponentConfig
from imagen_jax.config.distill import DistillConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.lora import LoraConfig
from imagen_jax.config.schema import Config, EmaConfig, MeshConfig, OptimizerConfig
from imagen_jax.config.train import CheckpointConfig, EvaluateConfig, TrainConfig
from imagen_jax.data.batches import loaders
from imagen_jax.data.embeddings.embed import embed
from imagen_jax.export.adapters import export_lora
from imagen_jax.export.export import export
from imagen_jax.inference import prompts
from imagen_jax.inference.cascade import Cascade
from imagen_jax.inference.sample import SampleOptions, sample
from imagen_jax.io import atomic
from imagen_jax.parallel import host_memory
from imagen_jax.stages.folder import load_stage
from imagen_jax.text.encoders import load_text_encoder
from imagen_jax.training.train import train, with_data

SUBJECT, CLASS = "subject", "class"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    # The configuration of the run names them, and a run that resumes reads them again.
    wiring.add_stages(parser, local=True)
    path_flags.required(parser, "--images", "folder of images of the subject")
    parser.add_argument(
        "--prompt", required=True, help="their caption: a rare word and the class, as 'a sks dog'"
    )
    parser.add_argument(
        "--class_prompt",
        required=True,
        action="append",
        metavar="PROMPT",
        help="caption of the class, as 'a dog'; several times: what shall stay, as 'two dogs'",
    )
    path_flags.required(parser, "--workdir", "folder to write")
    parser.add_argument(
        "--class_images",
        type=int,
        default=100,
        help="images of the class to sample, the same number for each class prompt; "
        "0: train without prior preservation",
    )
    parser.add_argument("--batch_size", type=int, default=32, help="images sampled at a time")
    parser.add_argument("--seed", type=int, default=0, help="seed of the class images and training")
    wiring.add_cpu_devices(parser)
    parser.set_defaults(config="")  # Overrides of the stages' configurations are accepted.


def run(flags: argparse.Namespace) -> None:
    """Runs the verb."""
    wiring.check_least(flags, 0, "class_images")
    wiring.check_least(flags, 1, "batch_size", "cpu_devices")
    classes = list(dict.fromkeys(flags.class_prompt))
    prompts.check(flags.prompt, "--prompt")
    for prompt in classes:
        prompts.check(prompt, "--class_prompt")
    if flags.prompt in classes:
        raise ConfigError("--prompt must differ from --class_prompt by the word of the subject")
    if 0 < flags.class_images < len(classes):
        raise ConfigError(
            f"--class_images={flags.class_images} are too few for {len(classes)} class prompts; "
            f"give at least {len(classes)}"
        )
    folder = pathlib.Path(flags.workdir)
    # Every setting is checked before anything is sampled.
    configs = [tuning_config(path, folder, flags) for path in flags.stages]
    wiring.set_up_devices(flags.cpu_devices)
    host_memory.keep_freed()
    files = [path for path in sorted(pathlib.Path(flags.images).iterdir()) if path.is_file()]
    _write_images(folder / "data" / SUBJECT, [(file, flags.prompt) for file in files])
    if flags.class_images:
        _sample_class(classes, flags, folder)
    for config in configs:
        _tune(config, folder, [flags.prompt, *classes])


def tuning_config(stage: str, folder: pathlib.Path, flags: argparse.Namespace) -> Config:
    """The configuration that tunes a stage: its own, with the data of `folder`, and overrides."""
    config = load_stage(stage).config
    names = (SUBJECT, CLASS) if flags.class_images else (SUBJECT,)
    mixture = {
        name: ComponentConfig(kind="folder", path=str(folder / "data" / name)) for name in names
    }
    data = dataclasses.replace(
        config.data,
        mixture=mixture,
        embeddings=str(folder / "embeddings" / config.name),
        held_out=0.0,
        flip=False,
        loader="numpy",
        batch_size=4,
    )
    diffusion = config.diffusion
    if config.text.null != "zeros":  # Training drops captions to zeros alone.
        diffusion = dataclasses.replace(diffusion, cond_drop_prob=0.0)
    config = dataclasses.replace(
        config,
        seed=flags.seed,
        data=data,
        diffusion=diffusion,
        lora=LoraConfig(rank=8),
        distill=DistillConfig(),  # The stage may be a student; here it learns from images.
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=0),
        ema=EmaConfig(decay=0.99),
        train=TrainConfig(steps=400, init_from=stage, log_every=50),
        evaluate=EvaluateConfig(),
        checkpoint=CheckpointConfig(every=200, keep=1),
        mesh=MeshConfig(),
    )
    values = overrides.to_config_dict(config)
    overrides.override(values, flags.overrides)
    return overrides.from_config_dict(values)


def _sample_class(classes: Sequence[str], flags: argparse.Namespace, folder: pathlib.Path) -> None:
    """Samples the images of the class with the stages as they are."""
    samples = folder / "class_samples"
    options = SampleOptions(
        seed=flags.seed,
        samples_per_prompt=flags.class_images // len(classes),
        batch_size=flags.batch_size,
        checkpoint=",".join(flags.stages),
    )
    cascade = Cascade.load(flags.stages)
    sample(cascade, [{"prompt": prompt} for prompt in classes], str(samples), options)
    rows = [json.loads(line) for line in (samples / "samples.jsonl").read_text().splitlines()]
    images = [(samples / row["file"], row["prompt"]) for row in rows]
    _write_images(folder / "data" / CLASS, images)


def _write_images(folder: pathlib.Path, images: Sequence[tuple[pathlib.Path, str]]) -> None:
    """Copies files with their captions into a folder."""
    if not images:
        raise ConfigError(f"--images: no files for {folder}; give a folder of images")
    folder.mkdir(parents=True, exist_ok=True)
    for file, _ in images:
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    rows = [json.dumps({"file_name": file.name, "text": text}) + "\n" for file, text in images]
    atomic.write_text(folder / "metadata.jsonl", "".join(rows))


def _tune(config: Config, folder: pathlib.Path, captions: Sequence[str]) -> None:
    """Embeds the captions, trains the stage and exports it."""
    encoder = load_text_encoder(config.text)
    embed(list(captions), encoder, config.data.embeddings, config.embed.unit_size)
    pipeline = wiring.open_pipeline(config)
    store = pipeline.store
    config = with_data(config, store.dim, store.fingerprint, pipeline.fingerprint())
    workdir = str(folder / "runs" / config.name)
    train(
        config,
        workdir,
        functools.partial(loaders.batches, pipeline),
        step_info=pipeline.step_info,
        encode=pipeline.encode,
    )
    export(workdir, str(folder / "stages" / config.name))
    if config.lora.rank:
        export_lora(workdir, str(folder / "loras" / config.name))
