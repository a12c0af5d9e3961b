"""A frozen text encoder: a network, its sharded parameters, and a vocabulary.

Parameters are read from the files one tensor at a time, cast to `config.text.dtype` and placed on
the devices with the sharding of `partitioning.RULES`, so host memory holds one tensor of a T5-XXL.
The forward pass is compiled once per length; its batch is sharded over (data, fsdp).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.config import overrides
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.text import T5Config, TextConfig
from imagen_jax.interop import weights
from imagen_jax.interop.t5x_network import T5xConfig
from imagen_jax.interop.t5x_network import make_encoder as make_t5x_encoder
from imagen_jax.models import bert, clip, t5
from imagen_jax.models.bert import BertConfig
from imagen_jax.models.clip import ClipTextConfig
from imagen_jax.parallel import partitioning
from imagen_jax.text.vocabulary import TokenBatch, Vocabulary, tokenize


class Network(NamedTuple):
    """An encoder network.

    Attributes:
      module: shape -> an object with `apply({"params": params}, ids, mask) -> f32[B, L, D]`.
      boxed_shapes: shape -> tree of parameter shapes, boxed with their axis names.
      flops: (shape, tokens) -> floating-point operations of one caption.
    """

    module: Callable[[Any], Any]
    boxed_shapes: Callable[[Any], Any]
    flops: Callable[[Any, int], float]


# Type of the shape -> network.
NETWORKS: dict[type, Network] = {
    T5Config: Network(t5.T5Encoder, t5.boxed_shapes, t5.flops),
    T5xConfig: Network(make_t5x_encoder, t5.boxed_shapes, t5.flops),
    ClipTextConfig: Network(clip.TextTower, clip.boxed_shapes, clip.flops),
    BertConfig: Network(bert.BertEncoder, bert.boxed_shapes, bert.flops),
}


# Id at padding of the encoders whose vectors there can be kept.
PADDING_ID = 0


@functools.partial(jax.jit, static_argnames=("config", "sharding", "keep_padding"))
def encode_tokens(
    params: Any,
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    *,
    config: Any,
    sharding: Sharding | None = None,
    keep_padding: bool = False,
) -> Float[Array, "b l d"]:
    """The forward pass; compiled once per length.

    Args:
      params: plain parameters.
      ids: token ids.
      mask: True at real tokens.
      config: the network's shape, such as a `T5Config`.
      sharding: sharding of the result; None: the compiler's choice.
      keep_padding: T5: return the vectors at padding, found by `ids`; `mask` is not read.
    """
    options = {"keep_padding": True} if keep_padding else {}
    mask = ids != PADDING_ID if keep_padding else mask
    encoded = NETWORKS[type(config)].module(config).apply({"params": params}, ids, mask, **options)
    return jax.lax.with_sharding_constraint(encoded, sharding) if sharding else encoded


class FrozenEncoder:
    """A frozen network with its vocabulary; parameters are read at first use."""

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
        """Reads no parameters.

        Args:
          name: row of `TEXT_ENCODERS`.
          shape: shape of the network, with `vocab_size`, `emb_dim` and `dtype`.
          tensors: parameters by path, float32, not read yet.
          vocabulary: the vocabulary.
          config: `max_len`, `dtype`, `padding` and `lowercase`.
          mesh: devices of the parameters; None: the first device.

        Raises:
          ConfigError: the vocabulary is larger than the embedding table, or max_len is below 2.
        """
        if vocabulary.size > shape.vocab_size:
            raise ConfigError(
                f"the vocabulary has {vocabulary.size} pieces, the encoder's table "
                f"{shape.vocab_size} rows; they are of different encoders"
            )
        if config.max_len < 2:
            raise ConfigError(f"config.text.max_len={config.max_len} must be at least 2")
        if config.padding == "encoded" and type(shape) is not T5Config:
            raise ConfigError(
                f"config.text.padding='encoded' is for config.text.encoder='t5' and 'bytes', not "
                f"{name!r}; leave it at 'masked'"
            )
        self.dim = shape.emb_dim
        self.max_len = config.max_len
        self.name = name
        self.shape = dataclasses.replace(shape, dtype=config.dtype)
        self.mesh = mesh
        self._keep_padding = config.padding == "encoded"
        self._lowercase = config.lowercase
        self._tensors = tensors
        self._vocabulary = vocabulary
        self._weights_sha256 = ""
        self._params: Any = None

    def fingerprint(self) -> dict[str, str | int]:
        """Encoder row, sha256 of weights and of vocabulary, max_len and dim.

        Reads all weights. With a mesh they stay on the devices, without one they are discarded.
        """
        if not self._weights_sha256:
            self._read(keep=self.mesh is not None)
        further = {"padding": "encoded"} if self._keep_padding else {}
        further |= {"lowercase": "true"} if self._lowercase else {}
        return {
            **further,
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

    def bytes(self) -> int:
        """Bytes of all parameters."""
        size = jnp.dtype(self.shape.dtype).itemsize
        return size * sum(math.prod(tensor.shape) for tensor in self._tensors.values())

    @property
    def shards(self) -> int:
        """Devices that share one copy of the parameters."""
        return self.mesh.shape["fsdp"] if self.mesh else 1

    def shard_over(self, mesh: Mesh) -> None:
        """Sets the devices of the parameters, which are read again."""
        self.mesh, self._params = mesh, None

    def release(self) -> None:
        """Frees the devices' memory until the next use."""
        self._params = None

    def _read(self, *, keep: bool) -> None:
        """Hashes the parameters one by one; with `keep`, also places them on the devices.

        The hash is of values, not of files: it is equal for a safetensors and a torch copy.
        """
        digest = hashlib.sha256(overrides.fingerprint(self.shape).encode())
        shardings, placed = self._shardings(), {}
        for path in sorted(self._tensors):
            array = np.ascontiguousarray(self._tensors[path].read())
            digest.update(path.encode())
            digest.update(array.data)
            if keep:
                array = _place(array, self.shape.dtype, shardings[path])
                # Blocks, so that queued transfers do not hold the whole model in host memory.
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
        """Tokens of a caption before any cut, start and end tokens included."""
        return len(self._vocabulary.start) + len(self._vocabulary(self._cleaned(caption))) + 1

    def tokenize(self, captions: Sequence[str]) -> TokenBatch:
        """Ids of B captions padded to max_len; a cut caption keeps its end token.

        With `text.padding=encoded` the mask is True at every position: all vectors are used.
        """
        cleaned = [self._cleaned(caption) for caption in captions]
        batch = tokenize(self._vocabulary, cleaned, max_len=self.max_len)
        return batch._replace(mask=np.ones_like(batch.mask)) if self._keep_padding else batch

    def _cleaned(self, caption: str) -> str:
        return caption.lower().strip() if self._lowercase else caption

    def encode(
        self, ids: Int[Array | np.ndarray, "b l"], mask: Bool[Array | np.ndarray, "b l"]
    ) -> Float[Array, "b l d"]:
        """Vectors of tokens.

        Args:
          ids: int32 ids of `tokenize`; L is at most max_len.
          mask: True at real tokens.

        Returns:
          float32, zero at padding unless `text.padding=encoded`; with a mesh sharded over (data,
          fsdp) if these divide B.
        """
        sharding = self._batch_sharding(len(ids))
        # Arrays of several processes that have this sharding must not be transferred.
        if sharding is None or getattr(ids, "sharding", None) != sharding:
            ids, mask = jax.device_put((jnp.asarray(ids), jnp.asarray(mask)), sharding)
        return encode_tokens(
            self.params,
            ids,
            mask,
            config=self.shape,
            sharding=sharding,
            keep_padding=self._keep_padding,
        )

    def _batch_sharding(self, size: int) -> NamedSharding | None:
        if self.mesh is None:
            return None
        if size % partitioning.batch_devices(self.mesh):
            return partitioning.replicated(self.mesh)
        return partitioning.batch_sharding(self.mesh)


def _place(array: np.ndarray, dtype: str, sharding: Sharding) -> Array:
    """The array on its devices; each host transfers the shards of its own devices."""
    shard = lambda index: array[index].astype(jnp.dtype(dtype))  # noqa: E731
    return jax.make_array_from_callback(array.shape, sharding, shard)
