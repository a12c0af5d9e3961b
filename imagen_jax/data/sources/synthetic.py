"""Images of noise with numbered captions, for measurements without data.

`data.name` is their number and side, such as 10000x256. Image i is the JPEG i mod 64, so that
making the images costs nothing and reading them costs what reading and decoding photographs costs.
"""

from __future__ import annotations

import functools
import io
import pathlib
import re
import tempfile
from collections.abc import Iterator

import numpy as np
from PIL import Image

from imagen_jax.config.data import SourceConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.index.table import Location
from imagen_jax.data.sources.records import Item

_DISTINCT = 64  # Images.


class Synthetic:
    """Reader of synthetic images; see `records.Reader`."""

    def __init__(self, source: SourceConfig) -> None:
        """Reads number and side. Raises ConfigError: `data.name` has another form."""
        found = re.fullmatch(r"([1-9][0-9]{0,9})x([1-9][0-9]{0,4})", source.name)
        if found is None:
            raise ConfigError(
                f"config.data.name={source.name!r} must be NUMBERxSIDE for config.data.kind="
                "'synthetic', such as 10000x256"
            )
        self._count, self._side = int(found[1]), int(found[2])
        home = pathlib.Path(source.path) if source.path else pathlib.Path(tempfile.gettempdir())
        self.cache = home / f"imagen_synthetic_{source.name}"
        self.identity = [source.name]

    def scan(self) -> Iterator[Item]:
        """Lists the images."""
        for i in range(self._count):
            yield Item(f"{i:010d}.jpg", (f"synthetic image {i}",), (0, i % _DISTINCT, 0))

    def read(self, key: str, location: Location) -> bytes:
        """The JPEG of an image."""
        del key
        return _jpeg(self._side, location[1])

    def read_start(self, key: str, location: Location, count: int) -> tuple[bytes, int]:
        """The first bytes of an image, and its size."""
        data = self.read(key, location)
        return data[:count], len(data)


@functools.lru_cache(2 * _DISTINCT)
def _jpeg(side: int, number: int) -> bytes:
    """Noise at two scales, which compresses about as a photograph does."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    noise = rng.normal(scale=6, size=(side, side, 3))
    pixels = (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=90)
    return buffer.getvalue()
