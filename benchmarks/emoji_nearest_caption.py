"""How far the text encoder alone gets with other names of emoji: the nearest training caption.

    python benchmarks/emoji_nearest_caption.py --data=runs/emoji/data --split=names_dev \
        --encoder=bert --text=minilm

Captions and names are compared by the cosine of the mean of their token vectors. A name is right if
the nearest caption is that of its emoji, in any skin tone. An image model that is conditioned on
these vectors cannot be expected to understand more names than this.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np
from jaxtyping import Float

from imagen_jax.config.text import TextConfig
from imagen_jax.evaluation import intervals
from imagen_jax.text.encoders import TextEncoder, embed_prompts, load_text_encoder

MAX_LEN = 32
BATCH = 64


def main() -> None:
    """Prints top-1 and top-5 by kind, with 95% Wilson intervals."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, required=True, help="of `imagen prepare`")
    parser.add_argument("--split", default="names_dev", help="prompts_SPLIT.jsonl")
    parser.add_argument("--encoder", default="bert", help="config.text.encoder")
    parser.add_argument("--text", default="minilm", help="config.text.path")
    parser.add_argument("--layer", type=int, default=-1, help="config.text.layer")
    flags = parser.parse_args()
    captions, names = (
        [json.loads(line) for line in (flags.data / f"prompts_{name}.jsonl").open()]
        for name in ("train", flags.split)
    )
    text = TextConfig(encoder=flags.encoder, path=flags.text, layer=flags.layer, max_len=MAX_LEN)
    encoder = load_text_encoder(text)
    ranks = rank(
        directions(encoder, [row["prompt"] for row in names]),
        directions(encoder, [row["prompt"] for row in captions]),
        [row["untoned"] for row in names],
        [row["untoned"] for row in captions],
    )
    kinds = np.array([row["kind"] for row in names])
    for kind in [*sorted(set(kinds)), "all"]:
        own = ranks[(kinds == kind) | (kind == "all")]
        for top in (1, 5):
            right = int((own <= top).sum())
            low, high = intervals.wilson(right, len(own))
            share = right / len(own)
            print(f"{kind} top-{top} {share:.2f} [{low:.2f}, {high:.2f}] of {len(own)}")


def directions(encoder: TextEncoder, prompts: list[str]) -> Float[np.ndarray, "n d"]:
    """Unit vectors of the prompts' mean token vectors."""
    vectors, mask = embed_prompts(encoder, prompts, batch_size=BATCH, max_len=MAX_LEN)
    mean = vectors.sum(1) / mask.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def rank(
    names: Float[np.ndarray, "n d"],
    captions: Float[np.ndarray, "m d"],
    right: list[str],
    of_captions: list[str],
) -> np.ndarray:
    """Rank of each name's emoji by its nearest caption, from 1; an emoji's tones count once."""
    keys = sorted(set(of_captions))
    index = {key: number for number, key in enumerate(keys)}
    best = np.full((len(names), len(keys)), -np.inf)
    for column, key in zip((names @ captions.T).T, of_captions, strict=True):
        np.maximum(best[:, index[key]], column, out=best[:, index[key]])
    own = best[np.arange(len(names)), [index[key] for key in right]]
    return (best >= own[:, None]).sum(1)


if __name__ == "__main__":
    main()
