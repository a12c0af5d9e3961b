"""A folder of images in a bucket: one object per image.

Texts and tables are copied for the index pass; images are read as whole objects. The bucket's list
has neither sizes nor times, so the names identify the data: an image that is replaced under its
name has another size and is reported when it is read. Tar files need far fewer requests.
"""

from __future__ import annotations

from collections.abc import Iterator

from imagen_jax.config.data import SourceConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.index.table import Location
from imagen_jax.data.sources import names
from imagen_jax.data.sources.folder import Folder, list_files
from imagen_jax.data.sources.records import Item
from imagen_jax.io import buckets, mirrors
from imagen_jax.io.images import ImageError


class RemoteFolder(Folder):
    """Reader of a mirror of a folder; see `records.Reader`."""

    def __init__(self, source: SourceConfig) -> None:
        """Takes the names of the mirror `source.path`. Raises ConfigError: it is no folder."""
        super().__init__(source)
        self._mirror = self.root
        address = mirrors.origin(self.root)
        if address is None:
            raise ConfigError(f"config.data.path={source.path!r} is no mirror of a bucket")
        self._address = address
        # Empty files have the same size, and the time at which this mirror was made.
        self._files = [file._replace(mtime_ns=0) for file in self._files]
        self.identity[0] = self._files

    def scan(self) -> Iterator[Item]:
        """Lists the records, from copies of all objects that are not images by their suffix."""
        others = [f.name for f in list_files(self._mirror) if not names.is_image(f.name)]
        paths = [self._mirror / name for name in others]
        with mirrors.copies(paths, self._mirror) as self.root:
            yield from super().scan()
        self.root = self._mirror

    def read(self, key: str, location: Location) -> bytes:
        """The bytes of an image."""
        del location
        try:
            return buckets.read(buckets.join(self._address, key)).data
        except buckets.MissingError:
            raise ImageError("missing file") from None

    def read_start(self, key: str, location: Location, count: int) -> tuple[bytes, int]:
        """The first bytes of an image, and its size: the whole, as its size is not known."""
        data = self.read(key, location)
        return data, len(data)
