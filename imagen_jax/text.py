"""Text encoders: captions to token ids to one frozen vector per token (section 2.1 of the paper).

`embed` runs an encoder over a data set's captions once, `cascade` over prompts; the picture model
only ever sees (text_emb, text_mask). An encoder is a row of `TEXT_ENCODERS`; its fingerprint goes
into every embedding store, so that training and sampling cannot silently use different ones.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from imagen_jax import config_io
from imagen_jax.config import ConfigError, T5Config, TextConfig, unknown_name
from imagen_jax.interop import hf_t5, t5x, weights
from imagen_jax.models import t5

EOS_ID = 1


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


@runtime_checkable
class TextEncoder(Protocol):
    """What the rest of the project knows of a text encoder."""

    dim: int
    max_len: int

    def fingerprint(self) -> dict[str, str | int]:
        """Everything two encoders must share to give the same vectors, field by field."""
        ...

    def token_count(self, caption: str) -> int:
        """Tokens of a caption before any cut, the end mark included."""
        ...

    def tokenize(self, captions: Sequence[str]) -> TokenBatch:
        """Ids of B captions padded to max_len; a cut caption keeps its end mark."""
        ...

    def encode(
        self, ids: Int[Array | np.ndarray, "b l"], mask: Bool[Array | np.ndarray, "b l"]
    ) -> Float[Array, "b l d"]:
        """float32 vectors, one per token, zero at padding. Any L up to max_len will do."""
        ...


@runtime_checkable
class Vocabulary(Protocol):
    """Caption to ids, without the end mark."""

    size: int

    def __call__(self, caption: str) -> list[int]: ...

    def sha256(self) -> str: ...


class SentencePieceVocabulary:
    """A SentencePiece model file, such as T5's `spiece.model`."""

    def __init__(self, path: pathlib.Path):
        # Imported here: a machine that only trains from stored embeddings need not have it.
        import sentencepiece

        self._content = path.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._content)
        except RuntimeError as error:
            raise ConfigError(f"{path} is not a SentencePiece model; copy it again") from error
        self.size = self._processor.get_piece_size()

    def __call__(self, caption: str) -> list[int]:
        return self._processor.encode(caption)

    def sha256(self) -> str:
        return hashlib.sha256(self._content).hexdigest()


class ByteVocabulary:
    """UTF-8 bytes, moved up by the three special ids (ByT5, Xue et al. 2022)."""

    size = 259

    def __call__(self, caption: str) -> list[int]:
        return [byte + 3 for byte in caption.encode("utf-8", errors="replace")]

    def sha256(self) -> str:
        return hashlib.sha256(b"utf-8 bytes + 3").hexdigest()


@functools.partial(jax.jit, static_argnames="config")
def encode_tokens(
    params: Any, ids: Int[Array, "b l"], mask: Bool[Array, "b l"], *, config: T5Config
) -> Float[Array, "b l d"]:
    """The encoder's forward pass; `t5.T5Encoder` compiled once per shape."""
    return t5.T5Encoder(config).apply({"params": params}, ids, mask)


class T5TextEncoder:
    """A frozen T5 encoder with its vocabulary."""

    def __init__(
        self, name: str, t5_config: T5Config, params: Any, *, vocabulary: Vocabulary, max_len: int
    ):
        if vocabulary.size > t5_config.vocab_size:
            raise ConfigError(
                f"the vocabulary has {vocabulary.size} pieces, the encoder's table "
                f"{t5_config.vocab_size} rows; they do not belong together"
            )
        if max_len < 2:
            raise ConfigError(f"config.text.max_len={max_len} must be at least 2")
        self.dim = t5_config.emb_dim
        self.max_len = max_len
        self.name = name
        self.t5_config = t5_config
        self.params = jax.device_put(params)
        self._vocabulary = vocabulary

    def fingerprint(self) -> dict[str, str | int]:
        """Encoder row, sha256 of weights and of vocabulary, max_len and dim."""
        return {
            "encoder": self.name,
            "weights_sha256": self._weights_sha256,
            "vocabulary_sha256": self._vocabulary.sha256(),
            "max_len": self.max_len,
            "dim": self.dim,
        }

    @functools.cached_property
    def _weights_sha256(self) -> str:
        """Of values rather than files: a safetensors and a torch copy are the same encoder."""
        digest = hashlib.sha256(config_io.fingerprint(self.t5_config).encode())
        for path, array in sorted(weights.flatten(self.params).items()):
            digest.update(path.encode())
            digest.update(np.ascontiguousarray(jax.device_get(array)).data)
        return digest.hexdigest()

    def token_count(self, caption: str) -> int:
        """Tokens of a caption before any cut, the end mark included."""
        return len(self._vocabulary(caption)) + 1

    def tokenize(self, captions: Sequence[str]) -> TokenBatch:
        """Ids of B captions padded to max_len; a cut caption keeps its end mark.

        Args:
          captions: B strings; "" is legal and gives the end mark alone.
        """
        ids = np.zeros((len(captions), self.max_len), np.int32)
        mask = np.zeros(ids.shape, bool)
        truncated = []
        for row, caption in enumerate(captions):
            pieces = self._vocabulary(caption)
            if len(pieces) >= self.max_len:
                truncated.append(row)
            pieces = [*pieces[: self.max_len - 1], EOS_ID]
            ids[row, : len(pieces)] = pieces
            mask[row, : len(pieces)] = True
        return TokenBatch(ids, mask, tuple(truncated))

    def encode(
        self, ids: Int[Array | np.ndarray, "b l"], mask: Bool[Array | np.ndarray, "b l"]
    ) -> Float[Array, "b l d"]:
        """Vectors of tokens.

        Args:
          ids: int32 ids as `tokenize` gives them; any L will do.
          mask: True at real tokens.

        Returns:
          float32, zero at padding.
        """
        ids, mask = jax.device_put((jnp.asarray(ids), jnp.asarray(mask)))
        return encode_tokens(self.params, ids, mask, config=self.t5_config)


def load_t5(config: TextConfig) -> TextEncoder:
    """A T5 encoder from `config.path`, with SentencePiece.

    The folder has the Hugging Face layout with spiece.model, or is a t5x `checkpoint_N` folder
    with `t5_config.json` (the fields of `config.T5Config`) and spiece.model in it or beside it.

    Raises:
      ConfigError: the path is empty or a file is missing. WeightsError: the weights do not load.
    """
    folder = _folder(config)
    vocabulary = SentencePieceVocabulary(_find(folder, "spiece.model"))
    return _t5_encoder(config, folder, vocabulary)


def load_bytes(config: TextConfig) -> TextEncoder:
    """A ByT5 encoder from `config.path` (no vocabulary file). Raises as `load_t5`."""
    return _t5_encoder(config, _folder(config), ByteVocabulary())


TEXT_ENCODERS: dict[str, Callable[[TextConfig], TextEncoder]] = {
    "t5": load_t5,
    "bytes": load_bytes,
}


def load_text_encoder(config: TextConfig) -> TextEncoder:
    """The encoder that `config` describes. Raises ConfigError, WeightsError."""
    if config.encoder not in TEXT_ENCODERS:
        raise ConfigError(unknown_name("config.text.encoder", config.encoder, list(TEXT_ENCODERS)))
    return TEXT_ENCODERS[config.encoder](config)


def embed_prompts(
    encoder: TextEncoder, prompts: Sequence[str], *, batch_size: int, max_len: int
) -> tuple[Float[np.ndarray, "n l d"], Bool[np.ndarray, "n l"]]:
    """Embeds prompts for sampling; warns about every prompt that does not fit.

    Args:
      encoder: the text encoder.
      prompts: N strings.
      batch_size: prompts per forward pass; the last batch is filled up, so one shape is compiled.
      max_len: L, the tokens the picture model was trained with; more are cut.

    Returns:
      text_emb float32, zero at padding, and text_mask, True at real tokens.
    """
    text_emb = np.zeros((len(prompts), max_len, encoder.dim), np.float32)
    text_mask = np.zeros((len(prompts), max_len), bool)
    length = min(max_len, encoder.max_len)
    for start in range(0, len(prompts), batch_size):
        chunk = list(prompts[start : start + batch_size])
        batch = encoder.tokenize(chunk + [""] * (batch_size - len(chunk)))
        _warn_cut(encoder, chunk, batch, length)
        encoded = np.asarray(jax.device_get(encoder.encode(batch.ids, batch.mask)))
        rows = slice(start, start + len(chunk))
        text_emb[rows, :length] = encoded[: len(chunk), :length]
        text_mask[rows, :length] = batch.mask[: len(chunk), :length]
    return text_emb, text_mask


def _warn_cut(encoder: TextEncoder, prompts: Sequence[str], batch: TokenBatch, length: int) -> None:
    for row, prompt in enumerate(prompts):
        if row in batch.truncated or batch.mask[row].sum() > length:
            warnings.warn(
                f"prompt {prompt!r} has {encoder.token_count(prompt)} tokens, "
                f"max_len={length}; the rest is cut",
                stacklevel=3,
            )


def _folder(config: TextConfig) -> pathlib.Path:
    folder = pathlib.Path(config.path)
    if not config.path or not folder.is_dir():
        what = "is empty" if not config.path else "is not a folder"
        raise ConfigError(
            f"config.text.path={config.path!r} {what}; "
            "run pretrain_text or point it to a Hugging Face T5 folder"
        )
    return folder


def _find(folder: pathlib.Path, name: str) -> pathlib.Path:
    """`name` in the folder, or beside a t5x checkpoint folder."""
    places = [folder / name]
    if (folder / "checkpoint").is_file():
        places.append(folder.parent / name)
    for path in places:
        if path.is_file():
            return path
    raise ConfigError(
        f"config.text.path={str(folder)!r} has no {name}; "
        "run pretrain_text or point it to a whole Hugging Face T5 folder"
    )


def _t5_encoder(config: TextConfig, folder: pathlib.Path, vocabulary: Vocabulary) -> T5TextEncoder:
    if (folder / "checkpoint").is_file():
        path = _find(folder, "t5_config.json")
        try:
            fields = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} is not a JSON object: {error}") from error
        t5_config = config_io.from_dict(T5Config, fields, str(path))
        t5_config, params = t5x.load(folder, t5_config)
    else:
        t5_config, params = hf_t5.load(folder)
    return T5TextEncoder(
        config.encoder, t5_config, params, vocabulary=vocabulary, max_len=config.max_len
    )
