"""Encodes captions during training, for data sets whose embeddings are too large to store.

`TokenSource` replaces the embedding store: batches hold token ids, and the frozen encoder, on the
mesh of the training, encodes them before the train step, outside its gradient. The embeddings equal
those of a store: rounded to bfloat16, cut to the same length, a function of the step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.data.embeddings.store import CaptionSource
from imagen_jax.text.encoders import TextEncoder


class TokenSource:
    """Token ids by caption, and their encoder.

    Attributes:
      feature: name of the text in a batch.
      dim: width D of the embeddings.
      fingerprint: of the encoder.
    """

    feature = "text_ids"

    def __init__(self, encoder: TextEncoder) -> None:
        """Wraps an encoder; `encode` needs one on the mesh of the training."""
        self._encoder = encoder
        self.dim = encoder.dim
        self.fingerprint = encoder.fingerprint()

    def missing(self, captions: Iterable[str]) -> list[str]:
        """Captions without embeddings: none."""
        del captions
        return []

    def contains(self, hashes: np.ndarray) -> Bool[np.ndarray, " k"]:
        """True for every hash: any caption can be encoded."""
        return np.ones(len(hashes), bool)

    def covers(self, source: CaptionSource) -> bool:
        """True: any caption can be encoded."""
        del source
        return True

    def spec(self, max_text_len: int) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of the ids of one example: the encoder's `max_len` tokens."""
        del max_text_len
        return (self._encoder.max_len,), "int32"

    def lookup(
        self, captions: Sequence[str], max_text_len: int
    ) -> tuple[Int[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
        """Ids and mask of B captions, padded to the encoder's `max_len`."""
        del max_text_len
        batch = self._encoder.tokenize(captions)
        return batch.ids, batch.mask

    def encode(self, batch: Mapping[str, Array], max_text_len: int) -> dict[str, Array]:
        """Replaces text_ids by text_emb and text_mask in a batch on its devices."""
        text_emb = self._encoder.encode(batch["text_ids"], batch["text_mask"])
        rest = {name: value for name, value in batch.items() if name != "text_ids"}
        text_emb, text_mask = _as_stored(text_emb, batch["text_mask"], length=max_text_len)
        return {**rest, "text_emb": text_emb, "text_mask": text_mask}


@functools.partial(jax.jit, static_argnames="length")
def _as_stored(
    text_emb: Float[Array, "b l d"], text_mask: Bool[Array, "b l"], *, length: int
) -> tuple[Float[Array, "b m d"], Bool[Array, "b m"]]:
    """Embeddings as a store returns them: rounded to bfloat16, cut or padded to `length`."""
    more = max(length - text_mask.shape[1], 0)
    rounded = text_emb.astype(jnp.bfloat16).astype(jnp.float32)[:, :length]
    return (
        jnp.pad(rounded, [(0, 0), (0, more), (0, 0)]),
        jnp.pad(text_mask[:, :length], [(0, 0), (0, more)]),
    )
