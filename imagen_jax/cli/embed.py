"""Computes the text embeddings of the captions of a data set into `config.data.embeddings`.

After an interruption the same command resumes. Run it several times, on this host or on others with
the same folder, for several workers: each unit of captions is encoded by one of them.
"""

from __future__ import annotations

import argparse

from imagen_jax.cli import beam_flag, wiring
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.beam import captions as captions_pipeline
from imagen_jax.data.beam import index
from imagen_jax.data.embeddings import embed as embed_lib
from imagen_jax.data.embeddings.shared_plan import SourceCaptions
from imagen_jax.data.embeddings.store import EmbeddingStore
from imagen_jax.data.sources.registry import open_source
from imagen_jax.parallel import partitioning
from imagen_jax.text import fingerprints
from imagen_jax.text.encoders import load_text_encoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    wiring.add_config(parser)
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="print the number of captions, tokens, bytes and chip-hours; write nothing",
    )
    parser.add_argument(
        "--flop_rate",
        type=float,
        default=8e13,
        help="FLOP/s of a chip, for --estimate (default: 8e13, 40%% of a TPU v5e)",
    )
    beam_flag.add(parser, "index the data and plan the units")


def run(flags: argparse.Namespace) -> None:
    """Runs the verb."""
    config = wiring.load_config(flags)
    if flags.estimate and flags.beam_options:
        raise ConfigError("--estimate writes nothing, and --beam_options a plan; leave one out")
    if flags.beam_options:
        index.check_address(config.data.embeddings)
        beam_flag.build_index(config.data, flags.beam_options)
    source = open_source(config.data)
    captions = SourceCaptions(source)
    mesh = partitioning.make_mesh(config.mesh)
    encoder = load_text_encoder(config.text, mesh)
    settings = config.embed
    if flags.estimate:
        _print_estimate(
            embed_lib.estimate(captions, encoder, settings.unit_size, settings.dtype),
            flags.flop_rate,
        )
        return
    if not config.data.embeddings:
        raise ConfigError("config.data.embeddings='' must name the folder of the store to write")
    devices = partitioning.batch_devices(mesh)
    if settings.unit_size % devices:
        raise ConfigError(
            f"config.embed.unit_size={settings.unit_size} must be a multiple of {devices} "
            f"(data*fsdp devices); try {-(-settings.unit_size // devices) * devices}"
        )
    if flags.beam_options:
        captions_pipeline.write_plan(
            config.data,
            config.text,
            captions,
            encoder=encoder,
            unit_size=settings.unit_size,
            further=source.further_captions,
            options=flags.beam_options,
        )
    embed_lib.embed(
        captions,
        encoder,
        config.data.embeddings,
        settings.unit_size,
        dtype=settings.dtype,
        patience=settings.patience,
    )
    fingerprints.keep(config.text, config.data.embeddings, encoder.fingerprint())
    # Remembered in the store, so that training need not compare all captions when it starts.
    EmbeddingStore.open(config.data.embeddings).covers(source)


def _print_estimate(values: dict[str, int | float], flop_rate: float) -> None:
    if not flop_rate > 0:
        raise ConfigError(f"--flop_rate={flop_rate:g} must be above 0")
    for name in ("captions", "unique", "truncated", "tokens", "padded_tokens", "units", "bytes"):
        print(f"{name:>14}: {values[name]:,}")
    print(f"{'flops':>14}: {values['flops']:.3g}")
    hours = values["flops"] / flop_rate / 3600
    print(f"{'chip_hours':>14}: {hours:.3g} at {flop_rate:.3g} FLOP/s per chip")
