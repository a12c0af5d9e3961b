"""Text encoders: captions to token ids to one frozen vector per token (Imagen, Sec. 2.1).

`embed` runs an encoder over the captions of a data set, `cascade` over prompts; the U-Nets receive
(text_emb, text_mask). Encoders are found by `config.plugins`: a row of `TEXT_ENCODERS`, an entry
point, or `package.module:name`. The fingerprint of the encoder is stored with every embedding store
and stage, so training and sampling with different encoders is an error.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.config import overrides, plugins
from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.config.text import T5Config, TextConfig
from imagen_jax.interop import hf_bert, hf_clip, hf_t5, t5x, t5x_network, weights
from imagen_jax.io import buckets, copies
from imagen_jax.models import t5
from imagen_jax.text.frozen_encoder import FrozenEncoder
from imagen_jax.text.vocabulary import (
    ByteVocabulary,
    ClipVocabulary,
    SentencePieceVocabulary,
    TokenBatch,
    UnigramVocabulary,
    WordPieceVocabulary,
)

# Tokens of the shortest bucket: shorter forward passes save little, and each is compiled.
MIN_BUCKET = 32


@runtime_checkable
class TextEncoder(Protocol):
    """Interface of a text encoder.

    Attributes:
      dim: D, width of a vector.
      max_len: largest number of tokens.
    """

    dim: int
    max_len: int

    def fingerprint(self) -> dict[str, str | int]:
        """Fields that are equal for two encoders exactly if their vectors are equal."""
        ...

    def token_count(self, caption: str) -> int:
        """Tokens of a caption before any cut, the end token included."""
        ...

    def tokenize(self, captions: Sequence[str]) -> TokenBatch:
        """Ids of B captions padded to max_len; a cut caption keeps its end token."""
        ...

    def encode(
        self, ids: Int[Array | np.ndarray, "b l"], mask: Bool[Array | np.ndarray, "b l"]
    ) -> Float[Array, "b l d"]:
        """float32 vectors, one per token, zero at padding; L is at most max_len."""
        ...

    def flops(self, length: int) -> float:
        """Floating-point operations of one caption padded to `length` tokens."""
        ...


def load_t5(config: TextConfig, mesh: Mesh | None = None) -> TextEncoder:
    """A T5 encoder from `config.path`, with SentencePiece.

    The folder has the Hugging Face layout with spiece.model, or is a t5x `checkpoint_N` folder (at
    any address that tensorstore reads) with `t5_config.json` (fields of `config.text.T5Config`) and
    spiece.model in it or beside it. `config.preset` and `config.vocabulary` replace these files.

    Raises:
      ConfigError: the path is empty or a file is missing. WeightsError: the weights do not load.
    """
    shape, tensors = _open_t5(config)
    return FrozenEncoder(
        "t5", shape, tensors, vocabulary=_sentencepiece(config), config=config, mesh=mesh
    )


def load_bytes(config: TextConfig, mesh: Mesh | None = None) -> TextEncoder:
    """A ByT5 encoder from `config.path` (no vocabulary file). Raises as `load_t5`."""
    shape, tensors = _open_t5(config)
    return FrozenEncoder(
        "bytes", shape, tensors, vocabulary=ByteVocabulary(), config=config, mesh=mesh
    )


def load_t5x(config: TextConfig, mesh: Mesh | None = None) -> TextEncoder:
    """As `load_t5`, run by t5x's own network. Raises ConfigError also where t5x is missing."""
    shape, tensors = _open_t5(config)
    shape = t5x_network.T5xConfig(**dataclasses.asdict(shape))
    t5x_network.make_encoder(shape)
    return FrozenEncoder(
        "t5x", shape, tensors, vocabulary=_sentencepiece(config), config=config, mesh=mesh
    )


def load_clip(config: TextConfig, mesh: Mesh | None = None) -> TextEncoder:
    """CLIP's text tower, penultimate layer, from a Hugging Face folder with its vocabulary.

    Raises:
      ConfigError: the path is empty, `max_len` exceeds the positions of the tower, or a file is
        missing. WeightsError: the weights do not load.
    """
    folder = _folder(config)
    shape, tensors = hf_clip.open_tensors(folder)
    _check_positions(config, shape.positions, folder)
    for names in (("vocab.json", "merges.txt"), ("tokenizer.json",)):
        if all((folder / name).is_file() for name in names):
            files = {name: (folder / name).read_bytes() for name in names}
            break
    else:
        raise ConfigError(
            f"config.text.path={str(folder)!r} has neither vocab.json with merges.txt nor "
            "tokenizer.json; give a complete Hugging Face CLIP folder"
        )
    vocabulary = ClipVocabulary(files, str(folder))
    return FrozenEncoder("clip", shape, tensors, vocabulary=vocabulary, config=config, mesh=mesh)


def load_bert(config: TextConfig, mesh: Mesh | None = None) -> TextEncoder:
    """A BERT, layer `config.layer`, from a Hugging Face folder or a row of `hf_bert.PACKAGES`.

    Raises:
      ConfigError: the path is empty, its package is not installed, there is no such layer,
        `max_len` exceeds the positions, or a file is missing. WeightsError: the weights do not
        load.
    """
    folder = _folder(dataclasses.replace(config, path=hf_bert.find_folder(config.path)))
    shape, tensors = hf_bert.open_tensors(folder, config.layer)
    _check_positions(config, shape.positions, folder)
    names = ("tokenizer.json", "vocab.txt")
    found = [name for name in names if (folder / name).is_file()]
    if not found:
        raise ConfigError(
            f"config.text.path={str(folder)!r} has neither tokenizer.json nor vocab.txt; give a "
            "complete Hugging Face BERT folder"
        )
    names = (found[0], "tokenizer_config.json")
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    vocabulary = WordPieceVocabulary(files, str(folder))
    return FrozenEncoder("bert", shape, tensors, vocabulary=vocabulary, config=config, mesh=mesh)


TEXT_ENCODERS: dict[str, Callable[[TextConfig, Mesh | None], TextEncoder]] = {
    "t5": load_t5,
    "bytes": load_bytes,
    "t5x": load_t5x,
    "clip": load_clip,
    "bert": load_bert,
}


def load_text_encoder(config: TextConfig, mesh: Mesh | None = None) -> TextEncoder:
    """The encoder `config.encoder`, with its parameters on `mesh`.

    Args:
      config: the section `text`; `encoder` is a row of `TEXT_ENCODERS`, the name of an entry point
        of the group `imagen_jax.text_encoders`, or `package.module:name`.
      mesh: devices of the parameters; None: the first device.

    Raises:
      ConfigError: there is no such encoder, or a file is missing. WeightsError: the weights do not
        load.
    """
    load = plugins.find("config.text.encoder", config.encoder, plugins.TEXT_ENCODERS, TEXT_ENCODERS)
    if config.layer != -1 and load in TEXT_ENCODERS.values() and load is not load_bert:
        raise ConfigError(
            f"config.text.layer={config.layer} must be -1 with config.text.encoder="
            f"{config.encoder!r}; only 'bert' has a choice of layer"
        )
    return load(_with_local_files(config), mesh)


def _with_local_files(config: TextConfig) -> TextConfig:
    """`config` with a copy of a folder in a bucket; a t5x checkpoint is read where it is."""
    if not buckets.is_address(config.path) or buckets.tag(buckets.join(config.path, "checkpoint")):
        return config
    return dataclasses.replace(config, path=copies.local(config.path))


def embed_prompts(
    encoder: TextEncoder, prompts: Sequence[str], *, batch_size: int, max_len: int
) -> tuple[Float[np.ndarray, "n l d"], Bool[np.ndarray, "n l"]]:
    """Embeds prompts for sampling; warns about every prompt that does not fit.

    A prompt is padded to its bucket of `bucket_length`, whatever other prompts there are.

    Args:
      encoder: the text encoder.
      prompts: N strings.
      batch_size: prompts per forward pass; the last batch of a bucket is padded, so one shape is
        compiled for each.
      max_len: L, the number of tokens the U-Nets were trained with; longer prompts are cut.

    Returns:
      text_emb float32, zero at padding, and text_mask, True at real tokens.
    """
    text_emb = np.zeros((len(prompts), max_len, encoder.dim), np.float32)
    text_mask = np.zeros((len(prompts), max_len), bool)
    length = min(max_len, encoder.max_len)
    tokens, filler = encoder.tokenize(list(prompts)), encoder.tokenize([""])
    _warn_cut(encoder, prompts, tokens, length)
    text_mask[:, :length] = tokens.mask[:, :length]
    used = tokens.mask.sum(axis=1)
    padded = np.array([bucket_length(int(n), encoder.max_len) for n in used])
    for bucket in np.unique(padded).tolist():
        rows = np.flatnonzero(padded == bucket)
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            ids, mask = (
                np.concatenate([of[part], of_filler.repeat(batch_size - len(part), axis=0)])
                for of, of_filler in ((tokens.ids, filler.ids), (tokens.mask, filler.mask))
            )
            encoded = jax.device_get(encoder.encode(ids[:, :bucket], mask[:, :bucket]))
            kept = min(bucket, length)
            text_emb[part, :kept] = np.asarray(encoded)[: len(part), :kept]
    return text_emb, text_mask


def bucket_length(tokens: int, max_len: int) -> int:
    """Tokens that a prompt is padded to: a power of two, at least MIN_BUCKET, at most max_len."""
    return min(max(1 << max(tokens - 1, 0).bit_length(), MIN_BUCKET), max_len)


def _warn_cut(encoder: TextEncoder, prompts: Sequence[str], batch: TokenBatch, length: int) -> None:
    for row, prompt in enumerate(prompts):
        if row in batch.truncated or batch.mask[row].sum() > length:
            shown = prompt if len(prompt) <= 80 else f"{prompt[:77]}..."
            warnings.warn(
                f"prompt {shown!r} has {encoder.token_count(prompt)} tokens, "
                f"max_len={length}; the rest is cut",
                stacklevel=3,
            )


def _check_positions(config: TextConfig, positions: int, folder: pathlib.Path) -> None:
    if config.max_len > positions:
        raise ConfigError(
            f"config.text.max_len={config.max_len} must be at most {positions}, the "
            f"positions of {folder}"
        )


def _open_t5(config: TextConfig) -> tuple[T5Config, Mapping[str, weights.Tensor]]:
    """Shape and parameters of the T5 at `config.path`."""
    if config.preset and config.preset not in t5.T5_PRESETS:
        raise ConfigError(unknown_name("config.text.preset", config.preset, list(t5.T5_PRESETS)))
    preset = t5.T5_PRESETS.get(config.preset)
    if "://" not in config.path and not (_folder(config) / "checkpoint").is_file():
        shape, tensors = hf_t5.open_tensors(config.path)
        if preset not in (None, shape):
            ours, theirs = dataclasses.asdict(preset), dataclasses.asdict(shape)
            differing = [f"{k}={v}, not {theirs[k]}" for k, v in ours.items() if v != theirs[k]]
            raise ConfigError(
                f"config.text.preset={config.preset!r} does not fit {config.path}: "
                f"{', '.join(differing)}; leave it empty, the folder has its shape"
            )
        return shape, tensors
    shape = preset or _recorded_shape(config)
    return shape, t5x.open_tensors(config.path, shape)


def _recorded_shape(config: TextConfig) -> T5Config:
    content = _beside(config, "t5_config.json")
    if content is None:
        raise ConfigError(
            f"config.text.path={config.path!r} has no t5_config.json, and a t5x checkpoint has "
            "no shape; set config.text.preset, for example to t5_v1_1_xxl"
        )
    where = f"t5_config.json of {config.path}"
    try:
        return overrides.from_dict(T5Config, dict(json.loads(content)), where)
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where} is not a JSON object: {error}") from error


def _sentencepiece(config: TextConfig) -> SentencePieceVocabulary | UnigramVocabulary:
    given = config.vocabulary
    if not given and _beside(config, "spiece.model") is None:
        tokenizer = _beside(config, "tokenizer.json")
        if tokenizer is not None:
            return UnigramVocabulary(tokenizer, f"{config.path}/tokenizer.json")
    content = t5x.read_file(given) if given else _beside(config, "spiece.model")
    if content is None and given:
        raise ConfigError(f"config.text.vocabulary={given!r} is not a file; give a spiece.model")
    if content is None:
        raise ConfigError(
            f"config.text.path={config.path!r} has no spiece.model; run pretrain_text, give a "
            "complete Hugging Face T5 folder, or set config.text.vocabulary"
        )
    if given.endswith(".json"):
        return UnigramVocabulary(content, given)
    return SentencePieceVocabulary(content, given or f"{config.path}/spiece.model")


def _beside(config: TextConfig, name: str) -> bytes | None:
    """The file `name` in the folder, or beside a t5x checkpoint folder."""
    folder = config.path.rstrip("/")
    content = t5x.read_file(f"{folder}/{name}")
    if content is None and t5x.read_file(f"{folder}/checkpoint") is not None:
        content = t5x.read_file(f"{folder.rpartition('/')[0] or '.'}/{name}")
    return content


def _folder(config: TextConfig) -> pathlib.Path:
    folder = pathlib.Path(config.path)
    if not config.path or not folder.is_dir():
        what = "is empty" if not config.path else "is not a folder"
        raise ConfigError(
            f"config.text.path={config.path!r} {what}; "
            "run pretrain_text or give a Hugging Face folder of the encoder"
        )
    return folder
