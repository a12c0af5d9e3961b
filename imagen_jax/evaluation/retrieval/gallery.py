"""The real images of `evaluate retrieval`: a captioned folder with the fields of its metadata."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from imagen_jax.config.data import DataConfig
from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.data.batches.view import Augmentation, decode_view
from imagen_jax.data.index.indexed_source import IndexedSource
from imagen_jax.data.sources import registry
from imagen_jax.data.sources.folder import METADATA, list_files, metadata_rows
from imagen_jax.evaluation.samples import EvaluationError

CENTRED = Augmentation(square=0.5, left=0.5, top=0.5, flip=False)


class Gallery(NamedTuple):
    """N real images.

    Attributes:
      names: of the files, relative to the folder.
      pixels: squares of one size.
      captions: of each image.
      fields: row of each image in metadata.jsonl; {} if it has none.
    """

    names: tuple[str, ...]
    pixels: UInt8[np.ndarray, "n size size 3"]
    captions: tuple[tuple[str, ...], ...]
    fields: tuple[Mapping[str, Any], ...]


@functools.lru_cache(maxsize=2)  # A scorer reads it for every row.
def read(folder: str, *, size: int, at_most: int | None, fit: str) -> Gallery:
    """Reads a captioned folder (docs/data.md), with the rules of training for unusable images.

    Args:
      folder: images with `metadata.jsonl` files or a `NAME.txt` beside each.
      size: side of the squares, pixels; 0: the longer side of the first image, or `at_most` if that
        is smaller.
      at_most: side, pixels; None: no limit.
      fit: how an image becomes square, as `config.data.fit`; resized by area.

    Raises:
      EvaluationError: no such folder, or fewer than two usable images.
      ConfigError: too many unusable images.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise EvaluationError(f"--gallery={folder} is not a folder; give one of captioned images")
    try:
        source = registry.open_source(DataConfig(kind="folder", path=folder))
    except ConfigError as error:
        raise EvaluationError(
            str(error).replace("config.data.path", f"--gallery={folder}")
        ) from error
    assert isinstance(source, IndexedSource)  # A mixture has no path.
    if len(source) < 2:
        raise EvaluationError(
            f"--gallery={folder} holds {len(source)} images with captions; at least 2 are needed"
        )
    if not size:
        longer = max(source.record(0).image.shape[:2])
        size = min(at_most or longer, longer)
    data = DataConfig(image_size=size, fit=fit)
    records = [
        source.record(i, lambda encoded: decode_view(encoded, data, CENTRED))
        for i in range(len(source))
    ]
    fields = _fields(root)
    return Gallery(
        names=tuple(record.key for record in records),
        pixels=np.stack([record.image for record in records]),
        captions=tuple(record.captions for record in records),
        fields=tuple(fields.get(record.key, {}) for record in records),
    )


def _fields(root: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Image name -> its row in a metadata file."""
    found: dict[str, dict[str, Any]] = {}
    for file in list_files(root):
        path = pathlib.PurePosixPath(file.name)
        if path.name == METADATA and not file.fault:
            for _, image, row in metadata_rows(root, path):
                found.setdefault(image, {}).update(row)
    return found


def values(row: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """The values of a field of a row as text: those of a list, one, or none."""
    value = row.get(field)
    if isinstance(value, (list, tuple)):
        return tuple(str(part) for part in value)
    return () if value is None else (str(value),)


def check_field(gallery: Gallery, field: str, flag: str) -> None:
    """Raises EvaluationError if no image has the field that a flag names."""
    names = list(dict.fromkeys(name for row in gallery.fields for name in row))
    if field not in names:
        raise EvaluationError(
            f"{unknown_name(flag, field, names)}; it must be a field of the gallery's {METADATA}"
        )


def answers(
    rows: Sequence[Mapping[str, Any]], gallery: Gallery, match: str
) -> list[tuple[int, ...]]:
    """The right images of each row, as indices into the gallery.

    Args:
      rows: prompt rows.
      gallery: the real images.
      match: field that has the same value in the row and in the right image's metadata (for a
        list: one of the values); "": the prompt is one of the captions.

    Raises:
      EvaluationError: the gallery has no such field, or a row has no right image.
    """
    if match:
        check_field(gallery, match, "--match")
        of_images = [values(row, match) for row in gallery.fields]
        of_rows = [values(row, match) for row in rows]
    else:
        of_images, of_rows = gallery.captions, [(str(row["prompt"]).strip(),) for row in rows]
    by_value: dict[str, list[int]] = {}
    for index, own in enumerate(of_images):
        for value in own:
            by_value.setdefault(value, []).append(index)
    right = []
    for number, (row, own) in enumerate(zip(rows, of_rows, strict=True), 1):
        found = tuple(sorted({index for value in own for index in by_value.get(value, ())}))
        if not found:
            problem = f"{match}={row.get(match)!r}" if match else "its prompt as caption"
            raise EvaluationError(
                f"row {number} ({row['prompt']!r}): no image of the gallery has {problem}; give a "
                "--match that both have, or prompts of this gallery"
            )
        right.append(found)
    return right
