"""The stream of batches as a pure function of the step: `batch_at(step)`.

Example g of the whole run is g = step * batch + host * (batch / hosts) + k; it is picture
permutation_{seed, epoch}(g mod n) of epoch g div n. Nothing is remembered between steps, so any
step can be asked for first, a restart goes on exactly, and the hosts' batches laid side by side are
the batch of a single host. The seqio stream (tasks.py) reads through the same `examples_at`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Int, UInt64

from imagen_jax import images
from imagen_jax.config import ConfigError, DataConfig
from imagen_jax.data.embeddings import EmbeddingError, EmbeddingStore
from imagen_jax.data.index import Source
from imagen_jax.data.on_the_fly import TokenSource

Batch = dict[str, np.ndarray]

CACHE_BYTES = 256 << 20  # A data set whose resized pictures fit in this is decoded only once.
ROUNDS = 6  # Of the Feistel network; four already pass for random.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: UInt64[np.ndarray, " k"]) -> UInt64[np.ndarray, " k"]:
    """A bijective hash of uint64 values (SplitMix64's finaliser, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(
    position: Int[np.ndarray, " k"], epoch: Int[np.ndarray, " k"], *, n: int, seed: int
) -> Int[np.ndarray, " k"]:
    """The place of each position in its epoch's shuffled order, without storing that order.

    A Feistel network permutes the smallest even-bit range that holds n; results beyond n are put
    through it again (cycle walking) until they fall below.

    Args:
      position: 0..n-1.
      epoch: epoch of each position, at least 0.
      n: size of the data set.
      seed: picks the family of permutations.

    Returns:
      0..n-1; for any one epoch and seed a bijection of `position`.
    """
    half = np.uint64(max((n - 1).bit_length() + 1, 2) // 2)
    low = np.uint64((1 << int(half)) - 1)
    start = mix(np.full(len(epoch), seed % 2**64, np.uint64)) + epoch.astype(np.uint64)
    keys = [mix(start * GOLDEN + np.uint64(round_)) for round_ in range(ROUNDS)]

    value = position.astype(np.uint64)
    pending = np.arange(len(value))
    while len(pending):
        left, right = value[pending] >> half, value[pending] & low
        for key in keys:
            left, right = right, left ^ (mix(right + key[pending]) & low)
        value[pending] = (left << half) | right
        pending = pending[value[pending] >= n]
    return value.astype(np.int64)


def _check_hosts(data: DataConfig, hosts: int) -> None:
    if data.batch_size % hosts:
        near = max(data.batch_size // hosts, 1) * hosts
        raise ConfigError(
            f"config.data.batch_size={data.batch_size} must be a multiple of {hosts} (hosts); "
            f"try {near}"
        )


class Pipeline:
    """Batches of pictures and text embeddings for one host of a run.

    Every picture is cut to its largest centred square and resized to `data.image_size` as uint8;
    `lowres` is made from that picture with the same filter. Hence, where the source's pictures are
    squares of the SR stage's `image_size`, its `lowres` is bit for bit what the base stage trains
    on.
    """

    def __init__(
        self,
        source: Source,
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
        absent = store.missing(text for i in range(len(source)) for text in source.captions(i))
        if absent:
            raise EmbeddingError(
                f"config.data.embeddings={data.embeddings!r} lacks {len(absent)} captions of "
                f"{data.path!r}, the first: {absent[0]!r}; run `imagen embed` for this data"
            )
        self.source, self.store, self.data, self.seed = source, store, data, seed
        self.host, self.hosts = host, hosts
        self._keep = len(source) * data.image_size**2 * 3 <= cache_bytes
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
            "examples": len(self.source),
            "source": self.source.fingerprint,
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
        pictures, captions = zip(*(self._picture(int(i)) for i in records), strict=True)
        # Not the permutation's hash: the choice of a caption must not follow from the position.
        draws = mix(mix(g.astype(np.uint64) + GOLDEN) ^ np.uint64(self.seed % 2**64))
        chosen = [texts[int(d) % len(texts)] for texts, d in zip(captions, draws, strict=True)]
        text, text_mask = self.store.lookup(chosen, self.data.max_text_len)
        examples = {"image": np.stack(pictures), self.store.feature: text, "text_mask": text_mask}
        if self.data.lowres_size:
            size, resize_filter = self.data.lowres_size, self.data.resize_filter
            examples["lowres"] = np.stack(
                [images.resize_host(p, size, resize_filter) for p in pictures]
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
        if "text_ids" in batch:
            return self.store.encode(batch, self.data.max_text_len)
        return batch

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from a step on, without end, prepared ahead of their use.

        `data.loader` says by whom: seqio (tf.data) or a thread. Both give the bits of `batch_at`.
        """
        if self.data.loader == "numpy":
            return self._prefetched(start_step)
        try:
            tasks = importlib.import_module("imagen_jax.data.tasks")
        except ImportError as error:
            raise ConfigError(
                f"config.data.loader='seqio' needs the module {error.name!r}; install it or set "
                "--config.data.loader=numpy, which gives the same batches"
            ) from None
        return tasks.imagen_batches(self, start_step)

    def _records(self, step: int) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
        """The examples' numbers in the whole run, and their records."""
        n = len(self.source)
        first = step * self.data.batch_size + self.host * self.per_host
        g = first + np.arange(self.per_host, dtype=np.int64)
        return g, permute(g % n, g // n, n=n, seed=self.seed)

    def _picture(self, i: int) -> tuple[np.ndarray, tuple[str, ...]]:
        """Resized picture and captions of record i."""
        if i in self._kept:
            return self._kept[i]
        record = self.source.record(i)
        image = images.center_crop_resize(
            record.image, self.data.image_size, self.data.resize_filter
        )
        if self._keep:
            self._kept[i] = (image, record.captions)
        return image, record.captions

    def _prefetched(self, step: int) -> Iterator[Batch]:
        ready: queue.Queue[Batch | Exception] = queue.Queue(max(self.data.prefetch, 1))
        stop = threading.Event()

        def put(item: Batch | Exception) -> None:
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.1)
                    break

        def work() -> None:
            at = step
            try:
                while not stop.is_set():
                    put(self.batch_at(at))
                    at += 1
            except Exception as error:
                put(error)

        thread = threading.Thread(target=work, name="batches", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()
