"""A folder of images.

Captions are read from `metadata.jsonl` files (Hugging Face's imagefolder format: `file_name`
relative to the file, `text` or `caption`, a string or a list) or from `NAME.txt` beside an image,
one per line.
"""

from __future__ import annotations

import errno
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from imagen_jax.config.data import SourceConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.index.table import Location
from imagen_jax.data.sources.files import CACHE
from imagen_jax.data.sources.records import CAPTION_LINES, Item, lines_of, texts_of
from imagen_jax.io import jsonl

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
# Suffixes of files that are not records: captions, tables, notes.
SIDECAR_SUFFIXES = frozenset(
    {"", ".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".html", ".parquet"}
)
METADATA = "metadata.jsonl"


class File(NamedTuple):
    """A file below the root; `fault`: why it cannot be read, "" if it can."""

    name: str
    size: int
    mtime_ns: int
    fault: str = ""


def list_files(root: pathlib.Path) -> list[File]:
    """All files below `root` sorted by POSIX path; follows links, skips hidden files and folders.

    A link to one of its own parent folders is listed once, with a fault, and not entered.
    """
    return sorted(_walk(root, root, frozenset({os.path.realpath(root)})))


def _walk(root: pathlib.Path, folder: pathlib.Path, parents: frozenset[str]) -> Iterator[File]:
    try:
        items = list(os.scandir(folder))
    except OSError as error:
        yield File(folder.relative_to(root).as_posix(), 0, 0, f"unreadable ({error.strerror})")
        return
    for item in items:
        if item.name.startswith("."):
            continue
        path = pathlib.Path(item.path)
        name = path.relative_to(root).as_posix()
        try:
            status = item.stat()
        except OSError as error:
            loop = error.errno == errno.ELOOP
            yield File(name, 0, 0, "symlink loop" if loop else f"unreadable ({error.strerror})")
            continue
        if not item.is_dir():
            yield File(name, status.st_size, status.st_mtime_ns)
            continue
        real = os.path.realpath(path)
        if real in parents:
            yield File(name, 0, 0, "symlink loop")
        else:
            yield from _walk(root, path, parents | {real})


class Folder:
    """Reader of a folder; see `records.Reader`."""

    def __init__(self, source: SourceConfig) -> None:
        """Lists the files. Raises ConfigError: no such folder."""
        self.root = pathlib.Path(source.path)
        if not self.root.is_dir():
            raise ConfigError(f"config.data.path={source.path!r} is not a folder")
        self._files = list_files(self.root)
        self.cache = self.root / CACHE
        self.identity = [self._files, CAPTION_LINES]

    def scan(self) -> Iterator[Item]:
        """Lists metadata rows without an image, then all files that are not sidecars."""
        captions, lost = self._captions()
        yield from lost
        for file in self._files:
            suffix = pathlib.PurePosixPath(file.name).suffix.lower()
            if file.fault:
                yield Item(file.name, fault=file.fault)
            elif suffix in IMAGE_SUFFIXES:
                yield Item(file.name, captions.get(file.name, ()))
            elif suffix not in SIDECAR_SUFFIXES:
                yield Item(file.name, fault=f"wrong type ({suffix})")

    def read(self, key: str, location: Location) -> bytes:
        """The bytes of an image file."""
        del location  # The key is the path.
        return (self.root / key).read_bytes()

    def _captions(self) -> tuple[dict[str, tuple[str, ...]], list[Item]]:
        """Captions by image name, and the metadata rows without an image."""
        found: dict[str, tuple[str, ...]] = {}
        lost = []
        names = {file.name for file in self._files}
        by_stem: dict[str, list[str]] = {}
        for name in names:
            path = pathlib.PurePosixPath(name)
            if path.suffix.lower() in IMAGE_SUFFIXES:
                by_stem.setdefault(str(path.with_suffix("")), []).append(name)
        for file in self._files:
            path = pathlib.PurePosixPath(file.name)
            if path.suffix == ".txt" and not file.fault:
                text = (self.root / path).read_text("utf-8-sig", errors="replace")
                for image in by_stem.get(str(path.with_suffix("")), ()):
                    found[image] = found.get(image, ()) + lines_of(text)
            elif path.name == METADATA and not file.fault:
                for row, image, fields in metadata_rows(self.root, path):
                    texts = texts_of(
                        fields["text"] if "text" in fields else fields.get("caption", ())
                    )
                    if image not in names:
                        why = f"missing file ({image or 'no file_name'})"
                        lost.append(Item(row, fault=why))
                    else:
                        found[image] = found.get(image, ()) + texts
        return found, lost


def metadata_rows(
    root: pathlib.Path, path: pathlib.PurePosixPath
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(row name, image name or "", fields) for each row of a metadata file.

    Args:
      root: the folder of the source.
      path: the metadata file, relative to it.
    """
    for number, row in jsonl.read(root / path, errors="replace", default=None):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            yield f"{path}:{number}", "", {}
            continue
        image = os.path.normpath(path.parent / row["file_name"]).replace(os.sep, "/")
        yield f"{path}:{number}", image, row
