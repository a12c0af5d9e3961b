"""The plan of an embedding store as a Beam pipeline.

A task is a shard, whose captions are divided by the start of their hash. A group holds the captions
of one start; its distinct ones are sorted and tokenized as by `embed`. The command writes the plan
from the groups in their order.
"""

from __future__ import annotations

import functools
import pathlib
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from imagen_jax.config.data import DataConfig, SourceConfig
from imagen_jax.config.text import TextConfig
from imagen_jax.data.beam import pipeline
from imagen_jax.data.beam.index import Opener, opened, spread
from imagen_jax.data.embeddings import embed, plan_file, shared_plan
from imagen_jax.data.embeddings.plan_file import Part
from imagen_jax.data.embeddings.shared_plan import SourceCaptions
from imagen_jax.data.embeddings.unit_file import caption_hash
from imagen_jax.io import atomic, paths
from imagen_jax.text.encoders import TextEncoder, load_text_encoder

GROUP = 1 << 20  # Captions of one group.


def write_plan(
    data: DataConfig,
    text: TextConfig,
    captions: SourceCaptions,
    *,
    encoder: TextEncoder,
    unit_size: int,
    further: Sequence[str],
    options: str,
) -> None:
    """Writes the plan of `embed` into the folder of the store, where it is missing.

    Args:
      data: the sources, with their indexes, and the store.
      text: of the encoder; workers load its vocabulary alone.
      captions: of the sources.
      encoder: that of `text`.
      unit_size: captions per unit.
      further: captions beside those of the records.
      options: see `pipeline.run`.
    """
    folder = paths.local(data.embeddings, "config.data.embeddings")
    folder.mkdir(parents=True, exist_ok=True)
    path = shared_plan.path_of(folder, captions, embed.settings_of(encoder, unit_size))
    if path.exists():
        return
    out = folder / f".parts{path.name}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    bits = pipeline.partitions(len(captions), GROUP)
    sources: list[SourceConfig] = list(data.sources().values()) if data.mixture else [data]
    openers = [Opener(source, secrets.token_hex(8)) for source in sources]
    tasks = [
        (opener, number)
        for opener in openers
        for number, entry in enumerate(opened(opener).table.entries)
        if entry.records
    ]

    def build(beam: Any, start: Any) -> Any:
        read = functools.partial(_texts, bits=bits)
        tokenize = functools.partial(_tokenize, text=text, out=out)
        divided = spread(beam, start, tasks) | "captions" >> beam.FlatMap(read)
        others = start | "further" >> beam.Create(list(_divided(further, bits)))
        grouped = (divided, others) | beam.Flatten() | "by hash" >> beam.GroupByKey()
        return grouped | "tokenize" >> beam.Map(tokenize)

    parts = [out / name for name in pipeline.run(options, build, out)]
    with atomic.folder(path, replace=False) as temporary:
        plan_file.write(temporary, lambda: map(_read, parts), unit_size)
    shutil.rmtree(out)


def _texts(task: tuple[Opener, int], bits: int) -> Iterator[tuple[int, list[str]]]:
    """The distinct captions of a shard, divided by the start of their hash."""
    opener, number = task
    table = opened(opener).table
    shard = table.shard(number)
    texts = {text for row in table.rows_of(number).tolist() for text in shard.captions(row)}
    yield from _divided(sorted(texts), bits)


def _divided(texts: Sequence[str], bits: int) -> Iterator[tuple[int, list[str]]]:
    groups: dict[int, list[str]] = {}
    for text in texts:
        start = int.from_bytes(caption_hash(text)[:2], "big") >> (16 - bits)
        groups.setdefault(start, []).append(text)
    yield from groups.items()


def _tokenize(
    group: tuple[int, Iterable[Sequence[str]]], text: TextConfig, out: pathlib.Path
) -> str:
    """Writes a part of the plan; returns the name of the file."""
    start, lists = group
    unique = sorted({caption for captions in lists for caption in captions}, key=caption_hash)
    part = embed.tokenized(unique, _encoder(text))
    with atomic.file(out / f"{start:05d}.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **part._asdict())
    return f"{start:05d}.npz"


@functools.lru_cache(1)
def _encoder(text: TextConfig) -> TextEncoder:
    return load_text_encoder(text)


def _read(path: pathlib.Path) -> Part:
    with np.load(path) as columns:
        content = {name: columns[name] for name in Part._fields}
    return Part(**{**content, "truncated": int(content["truncated"])})
