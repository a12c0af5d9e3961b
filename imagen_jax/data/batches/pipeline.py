"""Batches as a pure function of the step: `Pipeline.batch_at(step)`.

Row i of the batch of a step is example g = step * batch + i of the run. Its record is
permutation_{seed, epoch}(g mod n) of epoch g div n (order.py; mixture.py for several sources); its
caption, crop and mirroring are sampled from g. There is no state between steps: a run starts at any
step and a restart continues exactly. A process reads only the rows that its devices hold
(`partitioning.batch_rows`); a row is the same in every process that reads it. loaders.py prepares
batches ahead; the seqio task (tasks.py) reads through the same `examples_at`.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from imagen_jax.config.data import DataConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.batches import view
from imagen_jax.data.batches.order import random_bits
from imagen_jax.data.embeddings.on_the_fly import TokenSource
from imagen_jax.data.embeddings.store import EmbeddingStore
from imagen_jax.data.embeddings.unit_file import EmbeddingError
from imagen_jax.data.sources.records import AnySource
from imagen_jax.io import images

Batch = dict[str, np.ndarray]

CACHE_BYTES = 256 << 20  # A data set whose resized images fit is decoded only once.


class Pipeline:
    """Batches of images and text embeddings for one process of a run.

    Every image becomes a uint8 square of side `data.image_size` (view.py); `lowres` is that square
    resized with the same filter. If the images of the source are squares of the `image_size` of an
    SR stage, its `lowres` equals the images of the base stage bit for bit.

    Attributes:
      rows: row numbers of the global batch that this process reads, ascending.
      decode_jpeg_box: decodes a rectangle of a JPEG faster than the whole image, to the same
        pixels; None: not available. The seqio loader sets TensorFlow's.
    """

    def __init__(
        self,
        source: AnySource,
        store: EmbeddingStore | TokenSource,
        data: DataConfig,
        seed: int,
        rows: Int[np.ndarray, " k"] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Checks that every caption has an embedding.

        Args:
          source: images and captions.
          store: embeddings of all captions of `source`, or their tokenizer and encoder.
          data: sizes, filter, batch size.
          seed: determines the order, captions, crops and mirroring.
          rows: row numbers of the global batch to read; None: all.
          cache_bytes: largest size of all resized images that are cached, bytes.

        Raises:
          EmbeddingError: captions without embeddings.
          ConfigError: `data.held_out` leaves no record to train on.
        """
        if not store.covers(source):
            absent = sum(int((~store.contains(block)).sum()) for block in source.hash_blocks())
            texts = (text for i in range(len(source)) for text in source.captions(i))
            texts = itertools.chain(source.further_captions, texts)
            first = next(text for text in texts if store.missing([text]))
            raise EmbeddingError(
                f"config.data.embeddings={data.embeddings!r} lacks {absent} captions of "
                f"{data.path!r}, the first: {first!r}; run `imagen embed` for this data"
            )
        self._all_records = source
        self.source = source.part("train", data.held_out) if data.held_out else source
        self.store, self.data, self.seed = store, data, seed
        self.rows = np.arange(data.batch_size) if rows is None else np.asarray(rows)
        self.decode_jpeg_box: images.DecodeJpegBox | None = None
        stored = len(source) * (data.crop_from or data.image_size) ** 2 * 3
        self._use_cache = view.is_deterministic(data) and stored <= cache_bytes
        self._cache: dict[int, tuple[np.ndarray, view.Captions]] = {}

    def for_rows(self, rows: Int[np.ndarray, " k"]) -> Pipeline:
        """The same batches with other rows; the cache of images is shared."""
        other = copy.copy(self)
        other.rows = np.asarray(rows)
        return other

    def held_out(self) -> Pipeline:
        """Batches of the records that training does not read, in an order of their own.

        Raises:
          ConfigError: `data.held_out` holds out none.
        """
        other = copy.copy(self)
        other.source = self._all_records.part("held_out", self.data.held_out)
        other._cache = {}
        return other

    def part(self, index: int, parts: int) -> Pipeline:
        """One of `parts` equal consecutive parts of the rows. Raises ConfigError."""
        if len(self.rows) % parts:
            near = max(len(self.rows) // parts, 1) * parts
            raise ConfigError(
                f"config.data.batch_size={len(self.rows)} must be a multiple of {parts} parts; "
                f"try {near}"
            )
        return self.for_rows(np.split(self.rows, parts)[index])

    def fingerprint(self) -> dict[str, Any]:
        """JSON values that determine the examples of every step; saved with a checkpoint."""
        return {
            "seed": self.seed,
            "batch_size": self.data.batch_size,
            **self.source.order_spec(),
            "embeddings": self.store.fingerprint,
        }

    def examples_at(self, step: int, reads: Executor | None = None) -> Batch:
        """The examples of `rows` at a step, as stored: uint8 and bfloat16.

        Args:
          step: at least 0.
          reads: threads that read images; None: they are read one by one.

        Returns:
          image uint8[B, H, W, 3], lowres uint8[B, h, w, 3] if the stage has one,
          text_emb bfloat16[B, L, D] padded with zeros, text_mask bool[B, L]. With encoding on the
          fly: text_ids int32[B, M] instead of text_emb, and the mask of these M tokens.
        """
        g, records = self._records(step)
        bits = random_bits(g, self.seed)
        augmentations = view.sample_augmentations(bits)
        started = self._start_reads(records.tolist(), reads)
        squares, captions = zip(
            *map(self._load_example_image, records.tolist(), augmentations, started), strict=True
        )
        chosen = view.choose_captions(bits, captions)
        text, text_mask = self.store.lookup(chosen, self.data.max_text_len)
        image = np.stack(squares)
        if self.data.flip:
            flips = [
                augmentation.flip and not view.mentions_side(caption)
                for augmentation, caption in zip(augmentations, chosen, strict=True)
            ]
            image = view.mirror_in_place(image, np.flatnonzero(flips))
        examples = {"image": image, self.store.feature: text, "text_mask": text_mask}
        if self.data.lowres_size:
            size, resize_filter = self.data.lowres_size, self.data.resize_filter
            examples["lowres"] = np.stack(
                [images.resize_host(square, size, resize_filter) for square in image]
            )
        return examples

    def step_info(self, step: int) -> dict[str, list[int]]:
        """The rows of the global batch that this process reads at a step, and their records."""
        return {"rows": self.rows.tolist(), "records": self._records(step)[1].tolist()}

    def batch_at(self, step: int, reads: Executor | None = None) -> Batch:
        """The rows of the batch of a step, as the model reads them.

        Args:
          step: at least 0.

        Returns:
          image f32[B, H, W, 3] and, for an SR stage, lowres f32[B, h, w, 3], both in [-1, 1];
          text_emb bf16[B, L, D], zeros beyond the text; text_mask bool[B, L], True at real tokens.
          With encoding on the fly: text_ids. `encode` gives what the model reads.
        """
        batch = self.examples_at(step, reads)
        for name in ("image", "lowres"):
            if name in batch:
                batch[name] = images.to_float(batch[name])
        return batch

    def encode(self, batch: Mapping[str, Array]) -> Mapping[str, Array]:
        """Text of a batch on its devices as the model reads it: float32[B, L, D].

        Encodes token ids; embeddings of a store, bfloat16 until here, are widened without loss.
        """
        if isinstance(self.store, TokenSource):
            return self.store.encode(batch, self.data.max_text_len)
        return {**batch, "text_emb": _widened(batch["text_emb"])}

    def _records(self, step: int) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
        """The numbers of the examples in the run, and their record numbers."""
        g = np.int64(step) * self.data.batch_size + self.rows
        return g, self.source.order(g, self.seed)

    def _start_reads(
        self, records: list[int], pool: Executor | None
    ) -> list[Callable[[], bytes] | None]:
        """For each record a function that waits for its encoded image; None: it reads then.

        Each task reads several images one after the other, as one per image would cost more than
        reading it from a local disk.
        """
        wanted = [i for i in records if i not in self._cache]
        if pool is None or len(wanted) < 2:
            return [None] * len(records)
        tasks = min(len(wanted), self.data.reads)
        results: dict[int, Future[dict[int, bytes | Exception]]] = {}
        for k in range(tasks):
            part = wanted[k::tasks]
            results |= dict.fromkeys(part, pool.submit(self._read, part))
        started = {i: functools.partial(_result, task, i) for i, task in results.items()}
        return [started.get(i) for i in records]

    def _read(self, records: list[int]) -> dict[int, bytes | Exception]:
        """Encoded images, or the errors of reading them."""
        found: dict[int, bytes | Exception] = {}
        for i in records:
            try:
                found[i] = self.source.read(i)
            except images.ImageError as error:
                found[i] = error
        return found

    def _load_example_image(
        self,
        i: int,
        augmentation: view.Augmentation,
        read: Callable[[], bytes] | None = None,
    ) -> tuple[np.ndarray, view.Captions]:
        """The square of record i before mirroring, and the record's captions."""
        if i in self._cache:
            return self._cache[i]
        decode = functools.partial(
            view.decode_view,
            data=self.data,
            augmentation=augmentation,
            decode_jpeg_box=self.decode_jpeg_box,
        )
        record = self.source.record(i, decode, read)
        found = record.image, view.Captions(record.captions, record.weights)
        if self._use_cache:
            self._cache[i] = found
        return found


def _result(task: Future[dict[int, bytes | Exception]], i: int) -> bytes:
    """What a task read of record i; raises its error."""
    found = task.result()[i]
    if isinstance(found, Exception):
        raise found
    return found


@jax.jit
def _widened(text_emb: Array) -> Array:
    return text_emb.astype(jnp.float32)
