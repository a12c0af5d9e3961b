"""Draws a list of prompts with a cascade and writes the pictures with what they were made from."""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagen_jax import config_io, images
from imagen_jax.cascade import Cascade

GRID_PICTURES = 32


def sample(
    cascade: Cascade,
    rows: Sequence[Mapping[str, Any]],
    out: str,
    *,
    seed: int = 0,
    samples_per_prompt: int = 1,
    batch_size: int = 32,
    checkpoint: str = "",
    log: Callable[[str], None] = print,
) -> None:
    """Writes `OUT/PPPPP_KK.png`, `OUT/samples.jsonl` and `OUT/grid.png`.

    Args:
      cascade: draws them.
      rows: prompts; each further field of a row is carried into samples.jsonl.
      out: folder to write.
      seed: with prompt and sample index, all that a picture's noise depends on.
      samples_per_prompt: pictures per prompt.
      batch_size: pictures drawn at a time; the last batch is filled up so that shapes stay fixed.
      checkpoint: where the stages came from, for the record.
      log: receives the progress lines.
    """
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    work = [(p, k) for p in range(len(rows)) for k in range(samples_per_prompt)]
    about = {
        "seed": str(seed),
        "config": json.dumps(
            {c.name: config_io.fingerprint(c) for c in cascade.configs}, sort_keys=True
        ),
        "checkpoint": checkpoint,
    }
    lines, first_pictures = [], []
    started = time.monotonic()
    for start in range(0, len(work), batch_size):
        part = work[start : start + batch_size]
        filled = part + [part[-1]] * (min(batch_size, len(work)) - len(part))
        pictures = cascade.sample(
            [rows[p]["prompt"] for p, _ in filled],
            seed=seed,
            prompt_indices=[p for p, _ in filled],
            sample_indices=[k for _, k in filled],
            batch_size=batch_size,
        )
        for (p, k), picture in zip(part, pictures, strict=False):
            row = dict(rows[p])
            name = f"{p:05d}_{k:02d}.png"
            images.save_png(folder / name, picture, {"prompt": row["prompt"], **about})
            indices = {"prompt_index": p, "sample_index": k, "seed": seed}
            lines.append(json.dumps({**row, "file": name, **indices}, ensure_ascii=False))
            if len(first_pictures) < GRID_PICTURES:
                first_pictures.append((picture, row["prompt"]))
        done = start + len(part)
        rate = done / (time.monotonic() - started)
        left = (len(work) - done) / rate
        log(f"{done}/{len(work)} pictures  {rate:.1f} images/s  {left:.0f} s left")

    temporary = folder / "samples.jsonl.tmp"
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "samples.jsonl")
    images.save_png(folder / "grid.png", _grid(first_pictures), about)


def _grid(pictures: Sequence[tuple[np.ndarray, str]]) -> UInt8[np.ndarray, "h w 3"]:
    """Pictures with their prompts below them, about twice as wide as high."""
    columns = min(8, math.ceil(math.sqrt(2 * len(pictures))))
    return images.grid(
        np.stack([picture for picture, _ in pictures]),
        columns,
        [text for _, text in pictures],
        scale=2,
    )
