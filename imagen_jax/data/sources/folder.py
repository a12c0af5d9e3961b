"""A folder of pictures.

Captions come from `metadata.jsonl` files (Hugging Face's imagefolder: `file_name` relative to the
file, `text` or `caption`, a string or a list) or from `NAME.txt` beside a picture, one per line.
"""

from __future__ import annotations

import errno
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from imagen_jax.config.data import SourceConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.index.table import Location
from imagen_jax.data.sources.files import CACHE
from imagen_jax.data.sources.records import Item, lines_of, texts_of
from imagen_jax.io import jsonl

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
# Files that commonly lie beside pictures and are no records: captions, tables, notes.
SIDECAR_SUFFIXES = frozenset(
    {"", ".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".html", ".parquet"}
)
METADATA = "metadata.jsonl"


class File(NamedTuple):
    """A file below the root; `fault` says why it cannot be read, if so."""

    name: str
    size: int
    mtime_ns: int
    fault: str = ""


def walk(root: pathlib.Path) -> list[File]:
    """All files below `root` sorted by POSIX path, links followed, hidden ones left out.

    A link to one of its own parent folders is listed once, with its fault, and not entered.
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
    """A folder as a kind of source; see `records.Reader`."""

    def __init__(self, source: SourceConfig) -> None:
        """Raises ConfigError when there is no such folder."""
        self.root = pathlib.Path(source.path)
        if not self.root.is_dir():
            raise ConfigError(f"config.data.path={source.path!r} is not a folder")
        self._files = walk(self.root)
        self.cache = self.root / CACHE
        self.identity = [self._files]

    def scan(self) -> Iterator[Item]:
        """Rows of metadata without a picture, then every picture and all that looks like one."""
        captions, lost = self._captions()
        yield from lost
        for file in self._files:
            suffix = pathlib.PurePosixPath(file.name).suffix.lower()
            if file.fault:
                yield Item(file.name, fault=file.fault)
            elif suffix in PICTURES:
                yield Item(file.name, captions.get(file.name, ()))
            elif suffix not in SIDECAR_SUFFIXES:
                yield Item(file.name, fault=f"wrong type ({suffix})")

    def read(self, key: str, place: Location) -> bytes:
        """The bytes of a picture's file."""
        del place  # The name says it all.
        return (self.root / key).read_bytes()

    def _captions(self) -> tuple[dict[str, tuple[str, ...]], list[Item]]:
        """Captions by picture name, and the rows of metadata without a picture."""
        found: dict[str, tuple[str, ...]] = {}
        lost = []
        names = {file.name for file in self._files}
        by_stem: dict[str, list[str]] = {}
        for name in names:
            path = pathlib.PurePosixPath(name)
            if path.suffix.lower() in PICTURES:
                by_stem.setdefault(str(path.with_suffix("")), []).append(name)
        for file in self._files:
            path = pathlib.PurePosixPath(file.name)
            if path.suffix == ".txt" and not file.fault:
                text = (self.root / path).read_text("utf-8-sig", errors="replace")
                for picture in by_stem.get(str(path.with_suffix("")), ()):
                    found[picture] = found.get(picture, ()) + lines_of(text)
            elif path.name == METADATA and not file.fault:
                for row, picture, texts in _metadata(self.root, path):
                    if picture not in names:
                        why = f"missing file ({picture or 'no file_name'})"
                        lost.append(Item(row, fault=why))
                    else:
                        found[picture] = found.get(picture, ()) + texts
        return found, lost


def _metadata(
    root: pathlib.Path, path: pathlib.PurePosixPath
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(row name, picture name or "", captions) for each row of a metadata file."""
    for number, row in jsonl.read(root / path, errors="replace", default=None):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            yield f"{path}:{number}", "", ()
            continue
        value = row["text"] if "text" in row else row.get("caption", ())
        picture = os.path.normpath(path.parent / row["file_name"]).replace(os.sep, "/")
        yield f"{path}:{number}", picture, texts_of(value)
