"""CLIP score: similarity of images and captions (Hessel et al. 2021, arXiv:2104.08718).

The score is the mean cosine of image and caption embeddings, as on the axes of the paper's Figure
4: no factor of 2.5 or 100, and no clipping at zero. Paper is silent: which CLIP. The card records
the hash of the weights; scores of different CLIPs are not comparable.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image
from scipy import stats

from imagen_jax.config.text import TextConfig
from imagen_jax.evaluation import samples
from imagen_jax.evaluation.features import extract
from imagen_jax.evaluation.features.extract import LazyImages, Network
from imagen_jax.evaluation.intervals import CONFIDENCE
from imagen_jax.interop import hf_clip
from imagen_jax.interop.hf_clip import Towers
from imagen_jax.models import clip
from imagen_jax.text.encoders import load_text_encoder

# Training set of OpenAI's CLIPs, by channel, 0..1.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def preprocess(image: UInt8[np.ndarray, "h w 3"], size: int) -> Float[np.ndarray, "size size 3"]:
    """CLIP's preprocessing: shorter side to `size` (bicubic), centre crop, normalisation."""
    height, width, _ = image.shape
    short = min(height, width)
    height, width = size * height // short, size * width // short
    if (height, width) != image.shape[:2]:
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        image = np.asarray(resized)
    top, left = (height - size) // 2, (width - size) // 2
    square = image[top : top + size, left : left + size]
    return (square.astype(np.float32) / 255 - MEAN) / DEVIATION


@functools.partial(jax.jit, static_argnames=("config", "dim"))
def _embed_images(params: Any, inputs: Array, *, config: Any, dim: int) -> Array:
    embedded: Any = clip.ImageEmbedding(config, dim).apply({"params": params}, inputs)
    return embedded


@functools.partial(jax.jit, static_argnames=("config", "dim"))
def _embed_text(params: Any, ids: Array, mask: Array, *, config: Any, dim: int) -> Array:
    embedded: Any = clip.TextEmbedding(config, dim).apply({"params": params}, ids, mask)
    return embedded


def image_network(towers: Towers) -> Network:
    """CLIP's image tower as a feature network."""
    embed = functools.partial(_embed_images, config=towers.vision, dim=towers.projection_dim)
    size = towers.vision.image_size
    prepare = functools.partial(preprocess, size=size)
    return Network(f"clip {towers.sha256} {size}", prepare, embed, towers.vision_params)


def embed_captions(
    folder: str, towers: Towers, captions: Sequence[str], *, batch_size: int
) -> Float[np.ndarray, "n d"]:
    """Embeddings of captions; captions beyond the tower's length are truncated, as in CLIP.

    Args:
      folder: CLIP folder, for its vocabulary.
      towers: networks of that folder.
      captions: N strings.
      batch_size: captions per batch.
    """
    length = towers.text.positions
    tokenizer = load_text_encoder(TextConfig(encoder="clip", path=folder, max_len=length))
    parts = []
    for start in range(0, len(captions), batch_size):
        part = list(captions[start : start + batch_size])
        batch = tokenizer.tokenize(part + [""] * (batch_size - len(part)))
        with jax.default_matmul_precision("highest"):
            embedded = _embed_text(
                towers.text_params,
                batch.ids,
                batch.mask,
                config=towers.text,
                dim=towers.projection_dim,
            )
        parts.append(np.asarray(embedded)[: len(part)])
    return np.concatenate(parts)


def cosines(
    embeddings: Float[np.ndarray, "n d"], captions: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, " n"]:
    """Cosines of image embeddings with the embeddings of their captions, -1..1."""
    a, b = np.asarray(embeddings, np.float64), np.asarray(captions, np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def evaluate(
    samples_dir: str,
    clip_dir: str,
    store: str | pathlib.Path,
    *,
    batch_size: int = 32,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Scores a folder of samples.

    Args:
      samples_dir: folder written by `sample`.
      clip_dir: a Hugging Face CLIP folder with its vocabulary.
      store: folder of the feature cache; an interrupted run resumes.
      batch_size: images per batch.
      log: receives progress lines.

    Returns:
      The card: `clip_score`, its 95% interval over new prompts, hashes of images and weights.
    """
    rows = samples.read_rows(samples_dir)
    towers = hf_clip.read_towers(clip_dir)
    generated = LazyImages(len(rows), lambda i: samples.load(samples_dir, rows[i]["file"]))
    parts = extract.extract(generated, image_network(towers), store, batch_size=batch_size, log=log)
    captions = [row["prompt"] for row in rows]
    return {
        "card": "clip_score",
        **score(parts.features(), captions, clip_dir, towers, batch_size=batch_size),
        "images": len(rows),
        "prompts": len(set(captions)),
        "pictures_sha256": parts.sha256,
        "clip_sha256": towers.sha256,
        "clip_image_size": towers.vision.image_size,
        "clip_patch_size": towers.vision.patch_size,
        "rule": "mean cosine",
    }


def score(
    embeddings: Float[np.ndarray, "n d"],
    captions: Sequence[str],
    clip_dir: str,
    towers: Towers,
    *,
    batch_size: int,
) -> dict[str, float | None]:
    """`mean_over_prompts` of the cosines of image embeddings with their captions."""
    indices = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    embedded = embed_captions(clip_dir, towers, list(indices), batch_size=batch_size)
    prompts = np.array([indices[caption] for caption in captions])
    return mean_over_prompts(cosines(embeddings, embedded[prompts]), prompts)


def mean_over_prompts(
    scores: Float[np.ndarray, " n"], prompts: np.ndarray
) -> dict[str, float | None]:
    """Mean of all scores with Student's 95% interval, clustered by prompt.

    Args:
      scores: one per image.
      prompts: index of each image's prompt, 0, 1, ...
    """
    mean, count = float(scores.mean()), int(prompts.max()) + 1
    if count < 2:
        return {"clip_score": mean, "low": None, "high": None}
    sums = np.bincount(prompts, scores - mean)
    error = np.sqrt((sums**2).sum() * count / (count - 1)) / len(scores)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * error)
    return {"clip_score": mean, "low": mean - half, "high": mean + half}
