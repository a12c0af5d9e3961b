"""Vocabularies of text encoders: captions to token ids, and the marks around them."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Protocol, runtime_checkable

from imagen_jax.config.fields import ConfigError

EOS_ID = 1  # T5's end mark.


@runtime_checkable
class Vocabulary(Protocol):
    """Caption to ids.

    Attributes:
      size: ids are below it.
      start: ids put before every caption.
      end: the mark put behind it.
    """

    size: int
    start: tuple[int, ...]
    end: int

    def __call__(self, caption: str) -> list[int]:
        """Ids of a caption, without the marks."""
        ...

    def sha256(self) -> str:
        """Hash of all that the ids depend on."""
        ...


class SentencePieceVocabulary:
    """A SentencePiece model file, such as T5's `spiece.model`."""

    start: tuple[int, ...] = ()
    end = EOS_ID

    def __init__(self, content: bytes, name: str):
        """Reads the file's content; `name` is for messages. Raises ConfigError."""
        # Imported here: a machine that only trains from stored embeddings need not have it.
        import sentencepiece

        self._content = content
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise ConfigError(f"{name} is not a SentencePiece model; copy it again") from error
        self.size = self._processor.get_piece_size()

    def __call__(self, caption: str) -> list[int]:
        return self._processor.encode(caption)

    def sha256(self) -> str:
        return hashlib.sha256(self._content).hexdigest()


class ByteVocabulary:
    """UTF-8 bytes, moved up by the three special ids (ByT5, Xue et al. 2022)."""

    size = 259
    start: tuple[int, ...] = ()
    end = EOS_ID

    def __call__(self, caption: str) -> list[int]:
        return [byte + 3 for byte in caption.encode("utf-8", errors="replace")]

    def sha256(self) -> str:
        return hashlib.sha256(b"utf-8 bytes + 3").hexdigest()


class ClipVocabulary:
    """CLIP's byte-pair encoding: `vocab.json` with `merges.txt`, or `tokenizer.json`.

    Text is composed (NFC), its white space collapsed and its case folded; words are split before
    they are encoded, and their last piece carries a mark.
    """

    _WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    _START, _END = "<|startoftext|>", "<|endoftext|>"

    def __init__(self, files: dict[str, bytes], name: str):
        """Reads the files' contents, by file name; `name` is for messages. Raises ConfigError."""
        try:
            import tokenizers
        except ImportError:
            raise ConfigError(
                "config.text.encoder='clip' needs the package tokenizers; "
                "install imagen_jax with the extra [clip]"
            ) from None
        try:
            if "vocab.json" in files:
                self._tokenizer = self._from_merges(tokenizers, files)
            else:
                self._tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        except Exception as error:  # The library raises plain Exception for damaged files.
            raise ConfigError(f"{name} holds no CLIP vocabulary: {error}") from error
        marks: list[Any] = [self._tokenizer.token_to_id(mark) for mark in (self._START, self._END)]
        if None in marks:
            raise ConfigError(f"{name} holds no CLIP vocabulary: no {self._START}, {self._END}")
        self.start, self.end = (marks[0],), marks[1]
        self.size = self._tokenizer.get_vocab_size()
        self._content = b"".join(files[name] for name in sorted(files))

    def _from_merges(self, tokenizers: Any, files: dict[str, bytes]) -> Any:
        lines = files["merges.txt"].decode("utf-8").splitlines()
        pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        model = tokenizers.models.BPE(
            vocab=json.loads(files["vocab.json"]),
            merges=pairs,
            end_of_word_suffix="</w>",
            unk_token=self._END,
        )
        tokenizer = tokenizers.Tokenizer(model)
        normalizers, splitters = tokenizers.normalizers, tokenizers.pre_tokenizers
        tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.NFC(),
                normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
                normalizers.Lowercase(),
            ]
        )
        words = splitters.Split(tokenizers.Regex(self._WORDS), behavior="removed", invert=True)
        tokenizer.pre_tokenizer = splitters.Sequence(
            [words, splitters.ByteLevel(add_prefix_space=False)]
        )
        return tokenizer

    def __call__(self, caption: str) -> list[int]:
        # A lone surrogate, as file names may bring, is no text to the library.
        caption = caption.encode("utf-8", errors="replace").decode("utf-8")
        return self._tokenizer.encode(caption, add_special_tokens=False).ids

    def sha256(self) -> str:
        return hashlib.sha256(self._content).hexdigest()
