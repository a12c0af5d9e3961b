"""`embed`: encodes every distinct caption once and stores the result (Imagen, Sec. 2.5).

Captions are grouped by token count rounded up to a multiple of 8 and then ordered by hash; a unit
of `unit_size` captions of one group is encoded in one call of fixed shape and written as one file.
A unit's bytes thus depend on nothing but its captions and the encoder, so that a killed run goes on
where it stopped and any number of workers may share a folder.
"""

from __future__ import annotations

import collections
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np

from imagen_jax.data import embeddings
from imagen_jax.text import TextEncoder

BUCKET = 8  # Tokens: the step between the lengths that are compiled.
CHUNK = 4096  # Captions tokenized at a time, to bound the memory.


class Plan(NamedTuple):
    """Units of work: (padded length in tokens, captions); and what is known before encoding."""

    units: list[tuple[int, list[str]]]
    unique: int
    tokens: int
    truncated: int


def plan_units(captions: Sequence[str], encoder: TextEncoder, unit_size: int) -> Plan:
    """Splits the distinct captions into units; the same ones whatever the order of `captions`."""
    unique = sorted(set(captions), key=embeddings.caption_hash)
    groups: dict[int, list[str]] = collections.defaultdict(list)
    tokens = truncated = 0
    for start in range(0, len(unique), CHUNK):
        chunk = unique[start : start + CHUNK]
        batch = encoder.tokenize(chunk)
        truncated += len(batch.truncated)
        for caption, count in zip(chunk, np.asarray(batch.mask).sum(axis=1), strict=True):
            tokens += int(count)
            groups[min(-(-int(count) // BUCKET) * BUCKET, encoder.max_len)].append(caption)
    units = [
        (length, groups[length][start : start + unit_size])
        for length in sorted(groups)
        for start in range(0, len(groups[length]), unit_size)
    ]
    return Plan(units, len(unique), tokens, truncated)


def estimate(captions: Sequence[str], encoder: TextEncoder) -> dict[str, int]:
    """Size of the store before it is made.

    Returns:
      captions, unique (distinct captions), tokens, truncated (captions) and bytes (of embeddings).
    """
    plan = plan_units(captions, encoder, max(len(captions), 1))
    return {
        "captions": len(captions),
        "unique": plan.unique,
        "tokens": plan.tokens,
        "truncated": plan.truncated,
        "bytes": 2 * plan.tokens * encoder.dim,
    }


def embed(
    captions: Sequence[str],
    encoder: TextEncoder,
    out: str,
    unit_size: int,
    log: Callable[[str], None] = print,
) -> dict[str, int]:
    """Writes the embedding store of `captions`; finished units are kept.

    Args:
      captions: texts; repeated ones are encoded once.
      encoder: a frozen text encoder.
      out: folder of the store.
      unit_size: captions per unit, the batch of one call of the encoder.
      log: receives progress lines.

    Returns:
      captions, unique, tokens, truncated, units, computed (units), bytes.

    Raises:
      EmbeddingError: no captions, or the encoder gives NaN or infinite values.
    """
    if not captions:
        raise embeddings.EmbeddingError("there are no captions to embed; check config.data")
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    plan = plan_units(captions, encoder, unit_size)
    if plan.truncated:
        log(f"{plan.truncated} captions are longer than {encoder.max_len} tokens and are cut")
    fingerprint = encoder.fingerprint()
    paths = [
        folder
        / embeddings.unit_name(texts, length=length, unit_size=unit_size, encoder=fingerprint)
        for length, texts in plan.units
    ]
    computed, started = 0, time.monotonic()
    # Workers that share a folder begin at different units; each skips what another has finished.
    first = os.getpid() % len(paths)
    for number in [*range(first, len(paths)), *range(first)]:
        if paths[number].exists():
            continue
        length, texts = plan.units[number]
        embeddings.write_unit(paths[number], texts, _encode_unit(encoder, texts, length, unit_size))
        computed += 1
        if computed % 20 == 0:
            rate = computed * unit_size / (time.monotonic() - started)
            log(f"{computed} of {len(paths)} units, {rate:.0f} captions/s")
    embeddings.write_manifest(folder, [embeddings.describe_unit(p) for p in paths], fingerprint)
    return {
        "captions": len(captions),
        "unique": plan.unique,
        "tokens": plan.tokens,
        "truncated": plan.truncated,
        "units": len(paths),
        "computed": computed,
        "bytes": 2 * plan.tokens * encoder.dim,
    }


def _encode_unit(
    encoder: TextEncoder, captions: list[str], length: int, unit_size: int
) -> list[np.ndarray]:
    """Embeddings of the real tokens of each caption, in bfloat16."""
    batch = encoder.tokenize(captions)
    ids = np.zeros((unit_size, length), np.int32)
    mask = np.zeros((unit_size, length), bool)
    ids[: len(captions)] = np.asarray(batch.ids)[:, :length]
    mask[: len(captions)] = np.asarray(batch.mask)[:, :length]
    encoded = np.asarray(jax.device_get(encoder.encode(ids, mask)))
    rows = [row[m] for row, m in zip(encoded[: len(captions)], mask, strict=False)]
    if not all(np.isfinite(row).all() for row in rows):
        raise embeddings.EmbeddingError("the text encoder gives NaN or infinite values")
    return [row.astype(ml_dtypes.bfloat16) for row in rows]
