"""Samples and scores of shapes prompts with a custom denoiser, for the benchmarks of guidance.

The base stage samples with a denoiser of the benchmark, whose numbers (a weight, a scale) are
arguments of one compiled program; the super-resolution stages use their own settings.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.diffusion import process, samplers
from imagen_jax.evaluation import intervals
from imagen_jax.inference import prompts, stage_sampler
from imagen_jax.inference.stage_sampler import image_keys, sample_stage
from imagen_jax.io import images
from imagen_jax.stages.conditioning import Text
from imagen_jax.stages.folder import check_chain, config_hash, load_stage
from imagen_jax.stages.stage import Stage
from imagen_jax.text.encoders import embed_prompts, load_text_encoder
from imagen_jax.worlds.shapes import alignment

BATCH = 32


class PromptBatch(NamedTuple):
    """Prompt rows and the embeddings of their prompts, one of each per image."""

    rows: list[dict[str, Any]]
    text_emb: np.ndarray
    text_mask: np.ndarray


def parser(doc: str, count: int) -> argparse.ArgumentParser:
    """A parser with the flags of both benchmarks.

    Args:
      doc: docstring of the script; its first line is the description.
      count: default number of prompts.
    """
    flags = argparse.ArgumentParser(description=doc.splitlines()[0])
    flags.add_argument("--stages", required=True, help="base and SR stage folders")
    flags.add_argument("--prompts", required=True, help="prompts.jsonl of the shapes world")
    flags.add_argument("--count", type=int, default=count, help="prompts")
    flags.add_argument("--out", required=True, help="folder of numbers and images")
    flags.add_argument("--docs", default="", help="folder of sampling.md and images/ to update")
    return flags


def load(stages: str) -> list[Stage]:
    """The stages of `DIR,DIR`, base first."""
    loaded = [load_stage(path) for path in stages.split(",")]
    check_chain([stage.config for stage in loaded])
    return loaded


def read_prompt_batch(
    stage: Stage, file: str, kinds: Sequence[str], count: int, each: int = 1
) -> PromptBatch:
    """The first `count` prompts of `kinds` in a prompts.jsonl, each repeated `each` times."""
    rows = [row for row in prompts.read(file) if row["kind"] in kinds][:count]
    text_emb, text_mask = embed_prompts(
        load_text_encoder(stage.config.text),
        [row["prompt"] for row in rows],
        batch_size=BATCH,
        max_len=stage.config.data.max_text_len,
    )
    order = np.repeat(np.arange(len(rows)), each)
    return PromptBatch([rows[i] for i in order], text_emb[order], text_mask[order])


def sample_images(
    stages: Sequence[Stage],
    batch: PromptBatch,
    denoise_of: Callable[..., Any],
    *numbers: Any,
    seed: int = 0,
) -> list[np.ndarray]:
    """Generates one image per row.

    Args:
      stages: base first.
      batch: prompts and embeddings.
      denoise_of: (base parameters, base config, text, *numbers) -> denoise; a module-level
        function, so that it is compiled once.
      numbers: arrays or trees of arrays; those with one entry per row are split into batches.
      seed: seed of the noise, which also depends on the index of the row.

    Returns:
      uint8 images of every stage.
    """
    generated: list[list[np.ndarray]] = [[] for _ in stages]
    base, *others = stages
    count = len(batch.rows)
    size = min(BATCH, count)
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        text = Text(batch.text_emb[rows], batch.text_mask[rows])
        keys = image_keys(seed, rows.tolist(), [0] * size)
        part = [v[rows] if np.ndim(v) and len(v) == count else v for v in numbers]
        samples = _sample_base(denoise_of, base.params, base.config, text, keys, part)
        generated[0].append(images.to_uint8(np.asarray(samples)))
        for index, stage in enumerate(others, 1):
            stage_keys = stage_sampler.stage_keys(keys, index)
            samples = sample_stage(stage.params, stage.config, text, stage_keys, samples)
            generated[index].append(images.to_uint8(np.asarray(samples)))
    return [np.concatenate(parts)[:count] for parts in generated]


@functools.partial(jax.jit, static_argnames=("denoise_of", "config"))
def _sample_base(denoise_of, params, config, text, keys, numbers):
    settings, size = config.sampling, config.data.image_size
    start_keys, step_keys = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 2))(keys), 1, 0)
    times = jnp.linspace(1.0, 0.0, settings.steps + 1)
    x0 = samplers.sample_loop(
        samplers.make_sampler(config.sampling),
        denoise_of(params, config, text, *numbers),
        samplers.normal(start_keys, (size, size, 3)),
        process.logsnr_at(times, config.diffusion),
        step_keys,
    )
    return jnp.clip(x0, -1.0, 1.0)


def exact(samples: np.ndarray, batch: PromptBatch) -> tuple[float, float, float]:
    """Share of the images with all attributes correct, and its 95% Wilson interval."""
    marks = [
        alignment.score(image, row)["exact"] for image, row in zip(samples, batch.rows, strict=True)
    ]
    return sum(marks) / len(marks), *intervals.wilson(sum(marks), len(marks))


def fingerprint(stages: Sequence[Stage]) -> str:
    """Names and configuration hashes of the stages, for the record."""
    return ",".join(f"{s.config.name}:{config_hash(s.config)}" for s in stages)
