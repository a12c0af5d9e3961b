"""Vocabularies of text encoders: captions to padded token ids with start and end tokens."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from imagen_jax.config.fields import ConfigError

EOS_ID = 1  # T5's end token.


class TokenBatch(NamedTuple):
    """Padded token ids.

    Attributes:
      ids: int32 [B, L], zero at padding.
      mask: bool [B, L], True at real tokens, the end token included.
      truncated: indices of captions that were cut.
    """

    ids: np.ndarray
    mask: np.ndarray
    truncated: tuple[int, ...]


@runtime_checkable
class Vocabulary(Protocol):
    """Caption to ids.

    Attributes:
      size: number of ids.
      start: ids before every caption.
      end: id after every caption.
    """

    size: int
    start: tuple[int, ...]
    end: int

    def __call__(self, caption: str) -> list[int]:
        """Ids of a caption, without start and end."""
        ...

    def sha256(self) -> str:
        """Hash of everything the ids depend on."""
        ...


def tokenize(vocabulary: Vocabulary, captions: Sequence[str], *, max_len: int) -> TokenBatch:
    """Ids of B captions with start and end tokens, padded to `max_len`.

    Args:
      vocabulary: the vocabulary.
      captions: B strings; "" gives start and end tokens only.
      max_len: longer captions are cut; the end token is kept.
    """
    ids = np.zeros((len(captions), max_len), np.int32)
    mask = np.zeros(ids.shape, bool)
    truncated = []
    for row, caption in enumerate(captions):
        pieces = [*vocabulary.start, *vocabulary(caption)]
        if len(pieces) >= max_len:
            truncated.append(row)
        pieces = [*pieces[: max_len - 1], vocabulary.end]
        ids[row, : len(pieces)] = pieces
        mask[row, : len(pieces)] = True
    return TokenBatch(ids, mask, tuple(truncated))


class SentencePieceVocabulary:
    """A SentencePiece model file, such as T5's `spiece.model`."""

    start: tuple[int, ...] = ()
    end = EOS_ID

    def __init__(self, content: bytes, name: str):
        """Reads the file's content; `name` is for messages. Raises ConfigError."""
        # Imported here: training from stored embeddings does not need it.
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


class UnigramVocabulary:
    """T5's SentencePiece pieces as `tokenizer.json`, which newer versions of transformers save."""

    start: tuple[int, ...] = ()
    end = EOS_ID

    def __init__(self, content: bytes, name: str):
        """Reads the file's content; `name` is for messages. Raises ConfigError."""
        try:
            import tokenizers
        except ImportError:
            raise ConfigError(
                f"{name} needs the package tokenizers; install imagen_jax with the extra [clip]"
            ) from None
        try:
            kind = json.loads(content)["model"]["type"]
            if kind != "Unigram":
                raise ValueError(f"model.type={kind!r}, expected 'Unigram'")
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # The library raises plain Exception for damaged files.
            raise ConfigError(f"{name} has no T5 vocabulary: {error}") from error
        # Saved with the file; the caption is cut and padded by `tokenize`.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._content = content
        self.size = self._tokenizer.get_vocab_size()

    def __call__(self, caption: str) -> list[int]:
        # The library rejects lone surrogates, which file names may contain.
        caption = caption.encode("utf-8", errors="replace").decode("utf-8")
        return self._tokenizer.encode(caption, add_special_tokens=False).ids

    def sha256(self) -> str:
        return hashlib.sha256(self._content).hexdigest()


class ByteVocabulary:
    """UTF-8 bytes plus 3, the number of special ids (ByT5, Xue et al. 2022)."""

    size = 259
    start: tuple[int, ...] = ()
    end = EOS_ID

    def __call__(self, caption: str) -> list[int]:
        return [byte + 3 for byte in caption.encode("utf-8", errors="replace")]

    def sha256(self) -> str:
        return hashlib.sha256(b"utf-8 bytes + 3").hexdigest()


class ClipVocabulary:
    """CLIP's byte-pair encoding: `vocab.json` with `merges.txt`, or `tokenizer.json`.

    Text is normalised to NFC, white space is collapsed and case is folded. Text is split into words
    before encoding; the last piece of a word ends with `</w>`.
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
            raise ConfigError(f"{name} has no CLIP vocabulary: {error}") from error
        marks: list[Any] = [self._tokenizer.token_to_id(mark) for mark in (self._START, self._END)]
        if None in marks:
            raise ConfigError(f"{name} has no CLIP vocabulary: no {self._START}, {self._END}")
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
        # The library rejects lone surrogates, which file names may contain.
        caption = caption.encode("utf-8", errors="replace").decode("utf-8")
        return self._tokenizer.encode(caption, add_special_tokens=False).ids

    def sha256(self) -> str:
        return hashlib.sha256(self._content).hexdigest()


class WordPieceVocabulary:
    """BERT's WordPiece: `tokenizer.json`, or `vocab.txt` with `tokenizer_config.json`.

    The start and end tokens are those that the tokenizer adds itself, [CLS] and [SEP].
    """

    # Settings of tokenizer_config.json: names in tokenizer.json, and their defaults.
    _SETTINGS = {
        "do_lower_case": ("lowercase", True),
        "strip_accents": ("strip_accents", None),
        "tokenize_chinese_chars": ("handle_chinese_chars", True),
    }

    def __init__(self, files: dict[str, bytes], name: str):
        """Reads the files' contents, by file name; `name` is for messages. Raises ConfigError."""
        try:
            import tokenizers
        except ImportError:
            raise ConfigError(
                "config.text.encoder='bert' needs the package tokenizers; "
                "install imagen_jax with the extra [minilm]"
            ) from None
        try:
            settings = json.loads(files.get("tokenizer_config.json", b"{}"))
            if "tokenizer.json" in files:
                self._content = self._corrected(files["tokenizer.json"], settings)
                self._tokenizer: Any = tokenizers.Tokenizer.from_str(self._content.decode())
            else:
                self._tokenizer = self._from_pieces(tokenizers, files["vocab.txt"], settings)
        except Exception as error:  # The library raises plain Exception for damaged files.
            raise ConfigError(f"{name} has no WordPiece vocabulary: {error}") from error
        # Saved with the file; the caption is cut and padded by `tokenize`.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        marks = self._tokenizer.encode("").ids
        if len(marks) != 2:
            raise ConfigError(
                f"{name}: its tokenizer adds {len(marks)} tokens to a caption, expected [CLS] and "
                "[SEP]"
            )
        self.start, self.end = (marks[0],), marks[1]
        self.size = self._tokenizer.get_vocab_size()

    def _corrected(self, content: bytes, settings: dict[str, Any]) -> bytes:
        """tokenizer.json with the settings of tokenizer_config.json, as transformers reads it."""
        state = json.loads(content)
        kind = state["model"].get("type", "WordPiece")
        if kind != "WordPiece":
            raise ValueError(f"tokenizer.json has model.type={kind!r}, expected 'WordPiece'")
        normalizer = state["normalizer"] or {}
        if normalizer.get("type") != "BertNormalizer":
            return content
        given = {
            ours: settings[key] for key, (ours, _) in self._SETTINGS.items() if key in settings
        }
        changed = normalizer | given
        if changed == normalizer:
            return content
        return json.dumps(state | {"normalizer": changed}).encode()

    def _from_pieces(self, tokenizers: Any, content: bytes, settings: dict[str, Any]) -> Any:
        # One piece per line; str.splitlines would also split at pieces such as U+2028.
        lines = io.StringIO(content.decode("utf-8"), newline=None)
        pieces = {line.rstrip("\n"): number for number, line in enumerate(lines)}
        given = {ours: settings.get(key, value) for key, (ours, value) in self._SETTINGS.items()}
        self._content = content + json.dumps(given).encode()
        return tokenizers.BertWordPieceTokenizer(pieces, **given)

    def __call__(self, caption: str) -> list[int]:
        # The library rejects lone surrogates, which file names may contain.
        caption = caption.encode("utf-8", errors="replace").decode("utf-8")
        return self._tokenizer.encode(caption, add_special_tokens=False).ids

    def sha256(self) -> str:
        return hashlib.sha256(self._content).hexdigest()
