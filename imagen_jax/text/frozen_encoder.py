"""A frozen text encoder: a network, its parameters over a mesh, and a vocabulary.

Parameters go from the files onto the devices one tensor at a time, laid out by
`partitioning.RULES`, in `config.text.dtype`: no host ever holds an XXL in its own memory. The
forward pass is compiled once per length, its batch split over (data, fsdp). `text` says which
networks there are and makes encoders of them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.config import overrides
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import T5Config, TextConfig
from imagen_jax.interop import weights
from imagen_jax.interop.t5x_network import T5xConfig
from imagen_jax.interop.t5x_network import make_encoder as make_t5x_encoder
from imagen_jax.models import clip, t5
from imagen_jax.models.clip import ClipTextConfig
from imagen_jax.parallel import partitioning
from imagen_jax.text.vocabulary import Vocabulary


class TokenBatch(NamedTuple):
    """Padded token ids.

    Attributes:
      ids: int32 [B, L], zero at padding.
      mask: bool [B, L], True at real tokens, the end mark included.
      truncated: indices of captions that were cut.
    """

    ids: np.ndarray
    mask: np.ndarray
    truncated: tuple[int, ...]


class Network(NamedTuple):
    """A kind of encoder network, told by the type of its shape.

    Attributes:
      module: shape -> what has `apply({"params": params}, ids, mask) -> f32[B, L, D]`.
      boxed_shapes: shape -> tree of parameter shapes, boxed with their axis names.
      flops: (shape, tokens) -> operations of one caption.
    """

    module: Callable[[Any], Any]
    boxed_shapes: Callable[[Any], Any]
    flops: Callable[[Any, int], float]


NETWORKS: dict[type, Network] = {
    T5Config: Network(t5.T5Encoder, t5.boxed_shapes, t5.flops),
    T5xConfig: Network(make_t5x_encoder, t5.boxed_shapes, t5.flops),
    ClipTextConfig: Network(clip.TextTower, clip.boxed_shapes, clip.flops),
}


@functools.partial(jax.jit, static_argnames=("config", "sharding"))
def encode_tokens(
    params: Any,
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    *,
    config: Any,
    sharding: Sharding | None = None,
) -> Float[Array, "b l d"]:
    """The forward pass of the network of that shape; compiled once per length.

    Args:
      params: plain parameters.
      ids: token ids.
      mask: True at real tokens.
      config: the network's shape, such as a `T5Config`.
      sharding: where the vectors are to lie; None: where they come out.
    """
    encoded = NETWORKS[type(config)].module(config).apply({"params": params}, ids, mask)
    return jax.lax.with_sharding_constraint(encoded, sharding) if sharding else encoded


class FrozenEncoder:
    """A frozen network with its vocabulary; parameters are read when they are first needed."""

    def __init__(
        self,
        name: str,
        shape: Any,
        tensors: Mapping[str, weights.Tensor],
        *,
        vocabulary: Vocabulary,
        config: TextConfig,
        mesh: Mesh | None = None,
    ):
        """Joins what was found.

        Args:
          name: row of `TEXT_ENCODERS`.
          shape: of the network; has `vocab_size`, `emb_dim` and `dtype`.
          tensors: its parameters by path, float32, unread.
          vocabulary: its vocabulary.
          config: `max_len` and `dtype`.
          mesh: devices to lay it over; None: the first one.
        """
        if vocabulary.size > shape.vocab_size:
            raise ConfigError(
                f"the vocabulary has {vocabulary.size} pieces, the encoder's table "
                f"{shape.vocab_size} rows; they do not belong together"
            )
        if config.max_len < 2:
            raise ConfigError(f"config.text.max_len={config.max_len} must be at least 2")
        self.dim = shape.emb_dim
        self.max_len = config.max_len
        self.name = name
        self.shape = dataclasses.replace(shape, dtype=config.dtype)
        self.mesh = mesh
        self._tensors = tensors
        self._vocabulary = vocabulary
        self._weights_sha256 = ""
        self._params: Any = None

    def fingerprint(self) -> dict[str, str | int]:
        """Encoder row, sha256 of weights and of vocabulary, max_len and dim.

        Reads all weights; on a mesh they stay there, else none is kept.
        """
        if not self._weights_sha256:
            self._read(keep=self.mesh is not None)
        return {
            "encoder": self.name,
            "weights_sha256": self._weights_sha256,
            "vocabulary_sha256": self._vocabulary.sha256(),
            "max_len": self.max_len,
            "dim": self.dim,
        }

    @property
    def params(self) -> Any:
        """The parameters on the devices."""
        if self._params is None:
            self._read(keep=True)
        return self._params

    def _read(self, *, keep: bool) -> None:
        """Reads the parameters one by one for their hash and, with `keep`, onto the devices.

        The hash is of values rather than files: a safetensors and a torch copy are one encoder.
        """
        digest = hashlib.sha256(overrides.fingerprint(self.shape).encode())
        shardings, placed = self._shardings(), {}
        for path in sorted(self._tensors):
            array = np.ascontiguousarray(self._tensors[path].read())
            digest.update(path.encode())
            digest.update(array.data)
            if keep:
                array = _place(array, self.shape.dtype, shardings[path])
                # Waited for, or the queue of transfers would be the whole model.
                placed[path] = jax.block_until_ready(array)
        self._weights_sha256 = digest.hexdigest()
        if keep:
            self._params = weights.unflatten(placed)

    def _shardings(self) -> dict[str, Sharding]:
        boxed = NETWORKS[type(self.shape)].boxed_shapes(self.shape)
        if self.mesh is not None:
            return weights.flatten(partitioning.param_shardings(boxed, self.mesh))
        first = SingleDeviceSharding(jax.local_devices()[0])
        return dict.fromkeys(weights.flatten(partitioning.unbox(boxed)), first)

    def flops(self, length: int) -> float:
        """Floating-point operations of one caption padded to `length` tokens."""
        return NETWORKS[type(self.shape)].flops(self.shape, length)

    def token_count(self, caption: str) -> int:
        """Tokens of a caption before any cut, the marks included."""
        return len(self._vocabulary.start) + len(self._vocabulary(caption)) + 1

    def tokenize(self, captions: Sequence[str]) -> TokenBatch:
        """Ids of B captions padded to max_len; a cut caption keeps its end mark.

        Args:
          captions: B strings; "" is legal and gives the marks alone.
        """
        ids = np.zeros((len(captions), self.max_len), np.int32)
        mask = np.zeros(ids.shape, bool)
        truncated = []
        for row, caption in enumerate(captions):
            pieces = [*self._vocabulary.start, *self._vocabulary(caption)]
            if len(pieces) >= self.max_len:
                truncated.append(row)
            pieces = [*pieces[: self.max_len - 1], self._vocabulary.end]
            ids[row, : len(pieces)] = pieces
            mask[row, : len(pieces)] = True
        return TokenBatch(ids, mask, tuple(truncated))

    def encode(
        self, ids: Int[Array | np.ndarray, "b l"], mask: Bool[Array | np.ndarray, "b l"]
    ) -> Float[Array, "b l d"]:
        """Vectors of tokens.

        Args:
          ids: int32 ids as `tokenize` gives them; any L up to max_len will do.
          mask: True at real tokens.

        Returns:
          float32, zero at padding; on a mesh split over (data, fsdp) where these divide B.
        """
        sharding = self._batch_sharding(len(ids))
        # Arrays of several processes that lie there already must not be touched.
        if sharding is None or getattr(ids, "sharding", None) != sharding:
            ids, mask = jax.device_put((jnp.asarray(ids), jnp.asarray(mask)), sharding)
        return encode_tokens(self.params, ids, mask, config=self.shape, sharding=sharding)

    def _batch_sharding(self, size: int) -> NamedSharding | None:
        if self.mesh is None:
            return None
        split = size % partitioning.batch_devices(self.mesh) == 0
        place = partitioning.batch_sharding if split else partitioning.everywhere
        return place(self.mesh)


def _place(array: np.ndarray, dtype: str, sharding: Sharding) -> Array:
    """The array over its devices; each host brings the parts that lie on its own."""
    part = lambda index: array[index].astype(jnp.dtype(dtype))  # noqa: E731
    return jax.make_array_from_callback(array.shape, sharding, part)
