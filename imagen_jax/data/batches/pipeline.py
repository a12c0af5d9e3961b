"""The stream of batches as a pure function of the step: `batch_at(step)`.

Example g of the whole run is g = step * batch + host * (batch / hosts) + k; it is picture
permutation_{seed, epoch}(g mod n) of epoch g div n (order.py; mixture.py for several sources), and
its caption, crop and mirror are drawn from g. Nothing is remembered between steps, so any step can
be asked for first, a restart goes on exactly, and the hosts' batches laid side by side are the
batch of a single host. The seqio stream (tasks.py) reads through the same `examples_at`.
"""

from __future__ import annotations

import collections
import copy
import functools
import importlib
import itertools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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

CACHE_BYTES = 256 << 20  # A data set whose resized pictures fit in this is decoded only once.


def _check_hosts(data: DataConfig, hosts: int) -> None:
    if data.batch_size % hosts:
        near = max(data.batch_size // hosts, 1) * hosts
        raise ConfigError(
            f"config.data.batch_size={data.batch_size} must be a multiple of {hosts} (hosts); "
            f"try {near}"
        )


class Pipeline:
    """Batches of pictures and text embeddings for one host of a run.

    Every picture becomes a square of `data.image_size` as uint8 (view.py); `lowres` is made from
    that square with the same filter. Hence, where the source's pictures are squares of the SR
    stage's `image_size`, its `lowres` is bit for bit what the base stage trains on, and a crop and
    its `lowres` show exactly the same.

    Attributes:
      decode_jpeg_box: decodes a rectangle of a JPEG faster than the whole, to the same pixels; the
        seqio stream sets it to TensorFlow's.
    """

    def __init__(
        self,
        source: AnySource,
        store: EmbeddingStore | TokenSource,
        data: DataConfig,
        seed: int,
        host: int = 0,
        hosts: int = 1,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Checks that every caption has its embedding.

        Args:
          source: pictures and captions.
          store: embeddings of all captions of `source`, or an encoder that makes them.
          data: sizes, filter, batch, loader.
          seed: of the order and of the choice among several captions.
          host: index of this host, 0..hosts-1.
          hosts: number of hosts that share the batch.
          cache_bytes: limit below which resized pictures are kept, bytes.

        Raises:
          ConfigError: the batch does not divide among the hosts.
          EmbeddingError: captions without embeddings.
        """
        _check_hosts(data, hosts)
        absent = int((~store.holds(source.hashes())).sum())
        if absent:
            texts = (text for i in range(len(source)) for text in source.captions(i))
            first = next(text for text in texts if store.missing([text]))
            raise EmbeddingError(
                f"config.data.embeddings={data.embeddings!r} lacks {absent} captions of "
                f"{data.path!r}, the first: {first!r}; run `imagen embed` for this data"
            )
        self.source, self.store, self.data, self.seed = source, store, data, seed
        self.host, self.hosts = host, hosts
        self.decode_jpeg_box: images.DecodeJpegBox | None = None
        stored = len(source) * (data.crop_from or data.image_size) ** 2 * 3
        self._keep = view.is_deterministic(data) and stored <= cache_bytes
        self._kept: dict[int, tuple[np.ndarray, tuple[str, ...]]] = {}

    @property
    def per_host(self) -> int:
        """Pictures per step on this host."""
        return self.data.batch_size // self.hosts

    def for_host(self, host: int, hosts: int) -> Pipeline:
        """The same stream as another host sees it; decoded pictures are shared."""
        _check_hosts(self.data, hosts)
        other = copy.copy(self)
        other.host, other.hosts = host, hosts
        return other

    def fingerprint(self) -> dict[str, Any]:
        """All that decides which examples a step gets; it is saved with a checkpoint."""
        return {
            "seed": self.seed,
            "batch_size": self.data.batch_size,
            **self.source.about(),
            "embeddings": self.store.fingerprint,
        }

    def examples_at(self, step: int) -> Batch:
        """The examples of this host at a step in their stored form, before the model's.

        Returns:
          image uint8[B, H, W, 3], lowres uint8[B, h, w, 3] if the stage has one,
          text_emb bfloat16[B, L, D] padded with zeros, text_mask bool[B, L]. Encoding on the fly:
          text_ids int32[B, M] in the place of text_emb, and the mask of these M tokens.
        """
        g, records = self._records(step)
        bits = random_bits(g, self.seed)
        drawn = view.draws(bits)
        pictures, captions = zip(*map(self._picture, records.tolist(), drawn), strict=True)
        chosen = [texts[b % len(texts)] for texts, b in zip(captions, bits.tolist(), strict=True)]
        text, text_mask = self.store.lookup(chosen, self.data.max_text_len)
        image = np.stack(pictures)
        if self.data.flip:
            wanted = [
                d.flip and not view.mentions_side(c) for d, c in zip(drawn, chosen, strict=True)
            ]
            image = view.mirrored(image, np.flatnonzero(wanted))
        examples = {"image": image, self.store.feature: text, "text_mask": text_mask}
        if self.data.lowres_size:
            size, resize_filter = self.data.lowres_size, self.data.resize_filter
            examples["lowres"] = np.stack(
                [images.resize_host(p, size, resize_filter) for p in image]
            )
        return examples

    def about(self, step: int) -> dict[str, list[int]]:
        """Which records of the source this host reads at a step."""
        return {"records": self._records(step)[1].tolist()}

    def batch_at(self, step: int) -> Batch:
        """The part of a step's batch that falls to this host.

        Args:
          step: at least 0.

        Returns:
          image f32[B, H, W, 3] and, for an SR stage, lowres f32[B, h, w, 3], both in [-1, 1];
          text_emb f32[B, L, D], zeros beyond the text; text_mask bool[B, L], True at real tokens.
          Encoding on the fly: text_ids, see `encode`.
        """
        batch = self.examples_at(step)
        for name in ("image", "lowres"):
            if name in batch:
                batch[name] = images.to_float(batch[name])
        if "text_emb" in batch:
            batch["text_emb"] = batch["text_emb"].astype(np.float32)
        return batch

    def encode(self, batch: Mapping[str, Array]) -> Mapping[str, Array]:
        """A batch on its devices as the model reads it: text that is still ids is encoded."""
        if isinstance(self.store, TokenSource):
            return self.store.encode(batch, self.data.max_text_len)
        return batch

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from a step on, without end, prepared ahead of their use.

        `data.loader` says by whom: seqio (tf.data) or a thread. Both give the bits of `batch_at`.
        """
        if self.data.loader == "numpy":
            return self._prefetched(start_step)
        try:
            tasks = importlib.import_module("imagen_jax.data.batches.tasks")
        except ImportError as error:
            raise ConfigError(
                f"config.data.loader='seqio' needs the module {error.name!r}; install it or set "
                "--config.data.loader=numpy, which gives the same batches"
            ) from None
        return tasks.imagen_batches(self, start_step)

    def _records(self, step: int) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
        """The examples' numbers in the whole run, and their records."""
        first = step * self.data.batch_size + self.host * self.per_host
        g = first + np.arange(self.per_host, dtype=np.int64)
        return g, self.source.order(g, self.seed)

    def _picture(self, i: int, draw: view.Draw) -> tuple[np.ndarray, tuple[str, ...]]:
        """What an example shows of record i, and the record's captions."""
        if i in self._kept:
            return self._kept[i]
        show = functools.partial(
            view.show, data=self.data, draw=draw, decode_jpeg_box=self.decode_jpeg_box
        )
        record = self.source.record(i, show)
        if self._keep:
            self._kept[i] = (record.image, record.captions)
        return record.image, record.captions

    def _prefetched(self, step: int) -> Iterator[Batch]:
        """Batches from a step on, `data.prefetch` of them made at a time by threads."""
        ahead = max(self.data.prefetch, 1)
        pool = ThreadPoolExecutor(ahead, thread_name_prefix="batches")
        steps = itertools.count(step)
        try:
            ready = collections.deque(pool.submit(self.batch_at, next(steps)) for _ in range(ahead))
            while True:
                batch = ready.popleft().result()
                ready.append(pool.submit(self.batch_at, next(steps)))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)
