"""Vocabularies of text encoders: captions to token ids, and the marks around them."""

from __future__ import annotations

import hashlib
from typing import Protocol, runtime_checkable

from imagen_jax.config import ConfigError

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
