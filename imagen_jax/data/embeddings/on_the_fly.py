"""Encoding captions while training, for data sets whose embeddings are too many to store.

`TokenSource` takes the place of the embedding store: a batch then carries token ids, and the frozen
encoder, which lies on the training's own mesh, turns them into vectors before the train step, out
of reach of its gradient. What a step learns from is what it would have read: vectors rounded to
bfloat16, cut to the same length, a function of the step alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.text.encoders import TextEncoder


class TokenSource:
    """Token ids by caption, and the encoder that they are for.

    Attributes:
      feature: what a batch carries.
      dim: width D of the vectors.
      fingerprint: what the encoder says of itself.
    """

    feature = "text_ids"

    def __init__(self, encoder: TextEncoder) -> None:
        """Takes any encoder; one on the training's mesh is needed for `encode`."""
        self._encoder = encoder
        self.dim = encoder.dim
        self.fingerprint = encoder.fingerprint()

    def missing(self, captions: Iterable[str]) -> list[str]:
        """None: every caption can be encoded."""
        del captions
        return []

    def holds(self, hashes: np.ndarray) -> Bool[np.ndarray, " k"]:
        """Every caption, whatever its hash."""
        return np.ones(len(hashes), bool)

    def spec(self, max_text_len: int) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of one example's ids; the encoder sees its own `max_len` of them."""
        del max_text_len
        return (self._encoder.max_len,), "int32"

    def lookup(
        self, captions: Sequence[str], max_text_len: int
    ) -> tuple[Int[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
        """Ids and mask of B captions, as long as the encoder's `max_len`."""
        del max_text_len
        batch = self._encoder.tokenize(captions)
        return batch.ids, batch.mask

    def encode(self, batch: Mapping[str, Array], max_text_len: int) -> dict[str, Array]:
        """The batch, on its devices, with text_emb and text_mask in the place of text_ids."""
        text_emb = self._encoder.encode(batch["text_ids"], batch["text_mask"])
        rest = {name: value for name, value in batch.items() if name != "text_ids"}
        text_emb, text_mask = _as_stored(text_emb, batch["text_mask"], length=max_text_len)
        return {**rest, "text_emb": text_emb, "text_mask": text_mask}


@functools.partial(jax.jit, static_argnames="length")
def _as_stored(
    text_emb: Float[Array, "b l d"], text_mask: Bool[Array, "b l"], *, length: int
) -> tuple[Float[Array, "b m d"], Bool[Array, "b m"]]:
    """What comes back from a store: rounded to bfloat16, cut or padded to `length`."""
    more = max(length - text_mask.shape[1], 0)
    rounded = text_emb.astype(jnp.bfloat16).astype(jnp.float32)[:, :length]
    return (
        jnp.pad(rounded, [(0, 0), (0, more), (0, 0)]),
        jnp.pad(text_mask[:, :length], [(0, 0), (0, more)]),
    )
