"""The metadata of a sample that a configuration asks for: fields of `data.where`, and captions by
the names in `data.captions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imagen_jax.config.data import SourceConfig
from imagen_jax.data.sources.records import Caption, Item, texts_of


class SampleFields:
    """Adds metadata to the items of a source.

    Attributes:
      names: of all fields that are needed; empty: none, and items stay as they are.
    """

    def __init__(self, source: SourceConfig) -> None:
        """Takes the names of `source.where` and `source.captions`."""
        self._fields = source.fields()
        self.captions = source.caption_names()
        self.names = tuple(sorted({*self._fields, *self.captions}))

    def add(self, item: Item, row: Mapping[str, Any]) -> Item:
        """The item with the metadata in `row`: values by name, texts or lists of them."""
        if not self.names:
            return item
        item = item._replace(fields={name: _scalar(row.get(name)) for name in self._fields})
        if not self.captions:
            return item
        texts: list[Caption] = []
        kinds: list[int] = []
        for number, name in enumerate(self.captions):
            found = texts_of(row.get(name))
            texts += found
            kinds += [number] * len(found)
        return item._replace(captions=tuple(texts), kinds=tuple(kinds))


def _scalar(value: Any) -> float | int | bool | str | None:
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value if isinstance(value, str | int | float) else None
