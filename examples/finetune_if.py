"""Trains a LoRA of a stage of DeepFloyd IF on a folder of images; writes it for diffusers and peft.

    python examples/finetune_if.py --unet=IF/unet --text=T5_FOLDER --images=IMAGES \
      --workdir=runs/if --steps=1000

`--unet` is the diffusers unet folder of a base stage, `--text` the T5 it was trained with. The
result is for `sample --stages=WORKDIR/imported --loras=WORKDIR/lora`. Not yet run on the public
weights; the tests run it on random weights of IF's architecture.
"""

import argparse
import dataclasses
import functools

from imagen_jax.config.lora import LoraConfig
from imagen_jax.config.schema import EmaConfig, OptimizerConfig, TrainConfig
from imagen_jax.data.batches import loaders
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.data.embeddings.on_the_fly import TokenSource
from imagen_jax.data.sources.registry import open_source
from imagen_jax.export import convert
from imagen_jax.export.adapters import export_lora
from imagen_jax.text.encoders import load_text_encoder
from imagen_jax.training.train import train, with_data


def main() -> None:
    """Imports, trains, exports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag in ("--unet", "--text", "--images", "--workdir"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--encoder", default="t5", help="row of text.encoders.TEXT_ENCODERS")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=8)
    flags = parser.parse_args()

    stage, run = f"{flags.workdir}/imported", f"{flags.workdir}/run"
    config = convert.import_if(flags.unet, stage)
    data = {"kind": "folder", "path": flags.images, "fit": "random_crop", "loader": "numpy"}
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **data, batch_size=flags.batch_size),
        text=dataclasses.replace(config.text, encoder=flags.encoder, path=flags.text),
        lora=LoraConfig(rank=8),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=0),
        ema=EmaConfig(decay=0.99),
        train=TrainConfig(steps=flags.steps, init_from=stage, log_every=10),
    )
    encoder = TokenSource(load_text_encoder(config.text))
    pipeline = Pipeline(open_source(config.data), encoder, config.data, config.seed)
    config = with_data(config, encoder.dim, encoder.fingerprint, pipeline.fingerprint())
    batches = functools.partial(loaders.batches, pipeline)
    train(config, run, batches, encode=pipeline.encode)
    export_lora(run, f"{flags.workdir}/lora")


if __name__ == "__main__":
    main()
