"""Fine-tunes a stage of DeepFloyd IF on a folder of images and exports it to diffusers.

    python examples/finetune_if.py --unet=IF/unet --text=T5_FOLDER --pictures=PICTURES \
      --workdir=runs/if --steps=1000

`--unet` is the diffusers unet folder of a base stage, `--text` the T5 it was trained with (IF: v1.1
XXL). The verbs `import`, `embed`, `train` with `train.init_from`, and `export` do the same; this is
one program that uses the library. Not yet run on the public weights; the tests run it on random
weights of IF's architecture.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib

from imagen_jax.config import overrides
from imagen_jax.config.schema import CheckpointConfig, Config, OptimizerConfig, TrainConfig
from imagen_jax.data.batches import loaders
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.data.embeddings.embed import embed
from imagen_jax.data.embeddings.store import EmbeddingStore
from imagen_jax.data.sources.registry import open_source
from imagen_jax.export import convert
from imagen_jax.export.export import export
from imagen_jax.text.encoders import load_text_encoder
from imagen_jax.training.train import train, with_data


def configuration(imported: Config, flags: argparse.Namespace) -> Config:
    """The imported stage with training data, a low learning rate and a short EMA."""
    embeddings = str(pathlib.Path(flags.workdir) / "embeddings")
    data = dataclasses.replace(
        imported.data,
        kind="folder",
        path=flags.pictures,
        embeddings=embeddings,
        fit="random_crop",
        batch_size=flags.batch_size,
        loader="numpy",
    )
    return dataclasses.replace(
        imported,
        data=data,
        text=dataclasses.replace(imported.text, encoder=flags.encoder, path=flags.text),
        optimizer=OptimizerConfig(learning_rate=flags.learning_rate, warmup_steps=100),
        ema=dataclasses.replace(imported.ema, decay=0.999),
        train=TrainConfig(steps=flags.steps, init_from=f"{flags.workdir}/imported", log_every=10),
        checkpoint=CheckpointConfig(every=500),
    )


def captions_of(config: Config) -> list[str]:
    """All captions of the data set."""
    source = open_source(config.data)
    return [caption for i in range(len(source)) for caption in source.captions(i)]


def main() -> None:
    """Imports, embeds, trains, exports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unet", required=True, help="diffusers' unet folder of a base stage")
    parser.add_argument("--text", required=True, help="folder of its text encoder")
    parser.add_argument("--encoder", default="t5", help="row of text.encoders.TEXT_ENCODERS")
    parser.add_argument("--pictures", required=True, help="folder of captioned images")
    parser.add_argument("--workdir", required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    flags = parser.parse_args()

    imported = convert.import_if(flags.unet, f"{flags.workdir}/imported")
    config = configuration(imported, flags)

    encoder = load_text_encoder(config.text)
    embed(captions_of(config), encoder, config.data.embeddings, config.embed.unit_size)
    store = EmbeddingStore.open(config.data.embeddings, encoder.fingerprint())

    pipeline = Pipeline(open_source(config.data), store, config.data, config.seed)
    config = with_data(config, store.dim, store.fingerprint, pipeline.fingerprint())
    run = f"{flags.workdir}/run"
    batches = functools.partial(loaders.batches, pipeline)
    train(config, run, batches, step_info=pipeline.step_info)

    trained = export(run, f"{flags.workdir}/stage")
    convert.export_diffusers(f"{flags.workdir}/stage", f"{flags.workdir}/unet")
    print(f"trained {overrides.fingerprint(trained)}: sample with --stages={flags.workdir}/stage")


if __name__ == "__main__":
    main()
