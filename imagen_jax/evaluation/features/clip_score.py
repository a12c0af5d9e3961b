"""CLIP score: how well pictures go with their captions (Hessel et al. 2021, arXiv:2104.08718).

It is the mean cosine of picture and caption, as on the axes of the paper's figures (Figure 4): no
factor of 2.5 or 100, and a negative cosine stays negative. Paper is silent on which CLIP it took;
the card names the weights by their hash, and only scores of one CLIP can be compared.
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

from imagen_jax.config.schema import TextConfig
from imagen_jax.evaluation import samples
from imagen_jax.evaluation.features import extract
from imagen_jax.evaluation.features.extract import Network, Pictures
from imagen_jax.evaluation.intervals import CONFIDENCE
from imagen_jax.interop import hf_clip
from imagen_jax.interop.hf_clip import Towers
from imagen_jax.models import clip
from imagen_jax.text.encoders import load_text_encoder

# Of the pictures that OpenAI's CLIPs learned from, by channel, 0..1.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def preprocess(picture: UInt8[np.ndarray, "h w 3"], size: int) -> Float[np.ndarray, "size size 3"]:
    """CLIP's own: the shorter side to `size` (bicubic, antialiased), centred square, normalised."""
    height, width, _ = picture.shape
    short = min(height, width)
    height, width = size * height // short, size * width // short
    if (height, width) != picture.shape[:2]:
        resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
        picture = np.asarray(resized)
    top, left = (height - size) // 2, (width - size) // 2
    square = picture[top : top + size, left : left + size]
    return (square.astype(np.float32) / 255 - MEAN) / DEVIATION


@functools.partial(jax.jit, static_argnames=("config", "dim"))
def _embed_images(params: Any, pictures: Array, *, config: Any, dim: int) -> Array:
    embedded: Any = clip.ImageEmbedding(config, dim).apply({"params": params}, pictures)
    return embedded


@functools.partial(jax.jit, static_argnames=("config", "dim"))
def _embed_text(params: Any, ids: Array, mask: Array, *, config: Any, dim: int) -> Array:
    embedded: Any = clip.TextEmbedding(config, dim).apply({"params": params}, ids, mask)
    return embedded


def image_network(towers: Towers) -> Network:
    """The picture tower as `features.extract` wants it."""
    embed = functools.partial(_embed_images, config=towers.vision, dim=towers.projection_dim)
    size = towers.vision.image_size
    prepare = functools.partial(preprocess, size=size)
    return Network(f"clip {towers.sha256} {size}", prepare, embed, towers.vision_params)


def embed_captions(
    folder: str, towers: Towers, captions: Sequence[str], *, batch_size: int
) -> Float[np.ndarray, "n d"]:
    """Embeddings of captions; longer ones than the tower has places are cut, as is CLIP's custom.

    Args:
      folder: of the CLIP, for its vocabulary.
      towers: what was read from it.
      captions: N strings.
      batch_size: captions at a time.
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
    pictures: Float[np.ndarray, "n d"], captions: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, " n"]:
    """Of each picture with its caption, -1..1."""
    a, b = np.asarray(pictures, np.float64), np.asarray(captions, np.float64)
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
      samples_dir: folder that `sample` wrote.
      clip_dir: a Hugging Face CLIP folder with its vocabulary.
      store: folder for features, so that an interrupted run goes on.
      batch_size: pictures at a time.
      log: receives progress lines.

    Returns:
      The card: `clip_score`, its 95% interval over new prompts, and what it was measured with.
    """
    rows = samples.read_rows(samples_dir)
    towers = hf_clip.read_towers(clip_dir)
    pictures = Pictures(len(rows), lambda i: samples.load(samples_dir, rows[i]["file"]))
    parts = extract.extract(pictures, image_network(towers), store, batch_size=batch_size, log=log)
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
    pictures: Float[np.ndarray, "n d"],
    captions: Sequence[str],
    clip_dir: str,
    towers: Towers,
    *,
    batch_size: int,
) -> dict[str, float | None]:
    """`mean_over_prompts` of pictures that were embedded already, with their captions."""
    place = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    embedded = embed_captions(clip_dir, towers, list(place), batch_size=batch_size)
    numbers = np.array([place[caption] for caption in captions])
    return mean_over_prompts(cosines(pictures, embedded[numbers]), numbers)


def mean_over_prompts(
    scores: Float[np.ndarray, " n"], prompts: np.ndarray
) -> dict[str, float | None]:
    """Mean of all scores, and Student's 95% interval over prompts, whose pictures belong together.

    Args:
      scores: one per picture.
      prompts: number of each picture's prompt, 0, 1, ...
    """
    mean, count = float(scores.mean()), int(prompts.max()) + 1
    if count < 2:
        return {"clip_score": mean, "low": None, "high": None}
    sums = np.bincount(prompts, scores - mean)
    error = np.sqrt((sums**2).sum() * count / (count - 1)) / len(scores)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * error)
    return {"clip_score": mean, "low": mean - half, "high": mean + half}
