"""A folder of images.

Captions are read from text files beside an image (`NAME.txt`, `NAME.caption`, `NAME.EXT.txt`) and
from tables (metadata.py). Names are compared with either slash, in either Unicode normalisation and
with suffixes in any case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

from imagen_jax.config.data import SourceConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.index.table import Location
from imagen_jax.data.sources import captions, metadata, names
from imagen_jax.data.sources.files import CACHE
from imagen_jax.data.sources.records import Item
from imagen_jax.data.sources.sample_fields import SampleFields
from imagen_jax.io import image_files
from imagen_jax.io.images import ImageError

METADATA = metadata.JSON_LINES
# Suffixes of files that are no images; others are recognised by their first bytes.
_TEXT_SUFFIXES = frozenset(
    {*captions.SUFFIXES, ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".md", ".html"}
)
_EXPLICIT = 2  # Level of a caption that `data.caption_key` names.


class File(NamedTuple):
    """A file below the root; `fault`: why it cannot be read, "" if it can."""

    name: str
    size: int
    mtime_ns: int
    fault: str = ""


def list_files(root: pathlib.Path) -> list[File]:
    """All files below `root` sorted by POSIX path; skips junk and hidden files.

    Links are followed inside the root, and each folder is entered once. A link that leads out of
    the root or to one of its own parent folders is listed with a fault; so is a pipe or a device.
    """
    return sorted(_walk(root, []))


def _walk(root: pathlib.Path, junk: list[str]) -> Iterator[File]:
    """The files below `root`; adds the names of junk to `junk`."""
    top, entered = os.path.realpath(root), set[str]()
    folders, links = [root], []
    while folders or links:
        # A folder has the name of its own place, where that is listed, not of a link to it.
        folder = folders.pop() if folders else links.pop(links.index(min(links)))
        real, above = os.path.realpath(folder), os.path.realpath(folder.parent)
        if real in entered:
            if _is_inside(above, real):
                yield File(folder.relative_to(root).as_posix(), 0, 0, "symlink loop")
            continue
        entered.add(real)
        try:
            items = list(os.scandir(folder))
        except OSError as error:
            yield File(folder.relative_to(root).as_posix(), 0, 0, f"unreadable ({error.strerror})")
            continue
        for item in items:
            path = pathlib.Path(item.path)
            name = path.relative_to(root).as_posix()
            if names.is_junk(item.name):
                if item.name != CACHE:
                    junk.append(name)
                continue
            file = _file(item, name, top)
            if file is None:
                (links if item.is_symlink() else folders).append(path)
            else:
                yield file


def _file(item: os.DirEntry[str], name: str, top: str) -> File | None:
    """The entry of a folder; None: it is a folder inside `top`."""
    try:
        status = item.stat()
    except OSError as error:
        loop = error.errno == errno.ELOOP
        return File(name, 0, 0, "symlink loop" if loop else f"unreadable ({error.strerror})")
    if item.is_symlink() and not _is_inside(os.path.realpath(item.path), top):
        return File(name, 0, 0, "symlink out of the folder")
    if stat.S_ISDIR(status.st_mode):
        return None
    fault = "" if stat.S_ISREG(status.st_mode) else "no regular file"
    return File(name, status.st_size, status.st_mtime_ns, fault)


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


class Folder:
    """Reader of a folder; see `records.Reader`."""

    def __init__(self, source: SourceConfig) -> None:
        """Lists the files. Raises ConfigError: no such folder."""
        self.root = pathlib.Path(source.path)
        if not self.root.is_dir():
            raise ConfigError(f"config.data.path={source.path!r} is not a folder")
        self._junk: list[str] = []
        self._metadata = SampleFields(source)
        self._files = sorted(_walk(self.root, self._junk))
        self._by_line, self._key = source.caption_lines, captions.explicit_key(source.caption_key)
        self.cache = self.root / CACHE
        self.identity = [self._files, captions.VERSION, self._by_line, self._key]

    def scan(self) -> Iterator[Item]:
        """Lists metadata rows without an image, all images, and the number of other files."""
        images = [file for file in self._files if not file.fault and self._is_image(file)]
        found = _Found(images)
        lost, used = self._read_captions(found)
        yield from lost
        listed = {file.name for file in images}
        for file in self._files:
            if file.fault:
                yield Item(file.name, fault=file.fault)
            elif file.name in listed:
                texts, notes, fault = found.of(file.name)
                if not names.is_image(file.name):
                    notes = (*notes, "no suffix of an image")
                item = Item(file.name, texts, fault=fault, notes=notes)
                yield self._metadata.add(item, found.fields.get(file.name, {}))
            elif names.suffix(file.name) in names.OTHER_IMAGES:
                yield Item(file.name, fault=f"wrong type ({names.suffix(file.name)})")
            elif file.name not in used:
                yield Item(file.name, ignored=_other(file.name))
        for name in self._junk:
            yield Item(name, ignored="junk")

    def read(self, key: str, location: Location) -> bytes:
        """The bytes of an image file."""
        del location  # The key is the path.
        try:
            return image_files.read(self.root / key)
        except FileNotFoundError:
            # An unmounted folder is an error of the store, a deleted image is not.
            if self._is_mounted():
                raise ImageError("missing file") from None
            raise

    def _is_mounted(self) -> bool:
        with contextlib.suppress(OSError), os.scandir(self.root) as found:
            return next(found, None) is not None
        return False

    def read_start(self, key: str, location: Location, count: int) -> tuple[bytes, int]:
        """The first bytes of an image file, and its size."""
        del location
        with (self.root / key).open("rb", buffering=0) as file:
            return file.read(count), os.fstat(file.fileno()).st_size

    def _is_image(self, file: File) -> bool:
        """By the suffix, else by the first bytes."""
        if names.is_image(file.name):
            return True
        suffix = names.suffix(file.name)
        if suffix in _TEXT_SUFFIXES or suffix in names.OTHER_IMAGES:
            return False
        try:
            with (self.root / file.name).open("rb") as stream:
                return names.has_magic(stream.read(names.MAGIC_BYTES))
        except OSError:
            return False

    def _read_captions(self, found: _Found) -> tuple[list[Item], set[str]]:
        """Adds all captions to `found`; returns rows without an image, and the files read."""
        lost: list[Item] = []
        used = set()
        for file in self._files:
            path = pathlib.PurePosixPath(file.name)
            if file.fault:
                continue
            if path.name.lower() in metadata.NAMES:
                used.add(file.name)
                lost += self._read_table(path, found)
            elif names.suffix(file.name) in captions.SUFFIXES and found.beside(file.name):
                used.add(file.name)
                self._read_text(file, found)
        return lost, used

    def _read_text(self, file: File, found: _Found) -> None:
        """Adds the captions of a text file to `found`."""
        try:
            with (self.root / file.name).open("rb") as stream:
                data = stream.read(captions.MAX_BYTES + 1)
            texts = captions.of_file(data, by_line=self._by_line)
        except OSError as error:
            texts = captions.Captions((), fault=f"caption unreadable ({error.strerror})")
        for image, level in found.beside(file.name):
            found.add(image, texts, level)

    def _read_table(self, path: pathlib.PurePosixPath, found: _Found) -> Iterator[Item]:
        """Adds the captions of a table to `found`; returns rows without an image."""
        for number, row, image in _rows(self.root, path):
            match = found.named(image) if image else ""
            if match:
                # The header of a .csv is in lower case.
                present = (key for key in (self._key, self._key.lower()) if key in row.fields)
                key = next(present, "") if self._key else ""
                texts = () if row.fault else captions.of_fields(row.fields, key)
                level = _EXPLICIT if key else found.level(match)
                found.add(match, captions.Captions(texts, row.notes, row.fault), level)
                if self._metadata.names:
                    found.fields.setdefault(match, {}).update(row.fields)
            else:
                has = f"; the row has {', '.join(row.fields)}" if row.fields else ""
                if not image and row.fields.get("file_name"):
                    why = row.fault or "bad row (file_name is no text)"
                else:
                    why = row.fault or f"missing file ({image or f'no file_name{has}'})"
                yield Item(f"{path}:{number}", fault=why)


def metadata_rows(
    root: pathlib.Path, path: pathlib.PurePosixPath
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(row name, image name or "", fields) for each row of a metadata file.

    Args:
      root: the folder of the source.
      path: the metadata file, relative to it.
    """
    for number, row, image in _rows(root, path):
        yield f"{path}:{number}", image, row.fields if image else {}


def _rows(
    root: pathlib.Path, path: pathlib.PurePosixPath
) -> Iterator[tuple[int, metadata.MetadataRow, str]]:
    """Number, row and image name, relative to `root`, of each row of a table; "": it has none."""
    for row in metadata.read(root / path):
        name = row.fields.get("file_name")
        image = ""
        if isinstance(name, str) and name:
            at = os.path.normpath(root / path.parent / name)  # An absolute name stays as it is.
            image = os.path.relpath(at, os.path.normpath(root)).replace(os.sep, "/")
        yield row.number, row, image


class _Found:
    """The captions found so far, by image."""

    def __init__(self, images: list[File]) -> None:
        self._names = {file.name for file in images}
        self._by_key = names.Lookup((names.key(file.name), file.name) for file in images)
        self._by_stem = names.Lookup((names.stem(file.name), file.name) for file in images)
        self._found: dict[str, _Collected] = {}
        self.fields: dict[str, dict[str, Any]] = {}  # Rows of tables, where they are needed.

    def of(self, image: str) -> captions.Captions:
        """The captions of an image."""
        found = self._found.get(image)
        if found is None:
            return captions.Captions(())
        return captions.Captions(tuple(found.texts), tuple(found.notes), found.fault)

    def named(self, image: str) -> str:
        """The image that a table names; "": none, or several that differ only in spelling."""
        if image in self._names:
            return image
        same = self._by_key.find(names.key(image))
        return same[0] if len(same) == 1 else ""

    def beside(self, file: str) -> list[tuple[str, int]]:
        """The images that a text file belongs to, each with its level for `add`."""
        stem = names.stem(file)
        own = self._by_key.find(names.key(stem))
        return [(image, 1) for image in own] or [(image, 0) for image in self._by_stem.find(stem)]

    def level(self, image: str) -> int:
        """The level of the captions of an image so far."""
        return self._found[image].level if image in self._found else 0

    def add(self, image: str, found: captions.Captions, level: int) -> None:
        """Adds captions; those of a higher level replace those of a lower one."""
        whole = self._found.get(image)
        if whole is None or level > whole.level:
            whole = self._found[image] = _Collected(level)
        if level == whole.level and not whole.fault:
            whole.add(found)


@dataclasses.dataclass
class _Collected:
    """The captions of an image so far; none where they are too many or too long."""

    level: int
    texts: list[captions.Caption] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    fault: str = ""
    size: int = 0

    def add(self, found: captions.Captions) -> None:
        """Adds captions, until there is a fault."""
        self.texts += found.texts
        self.notes += found.notes
        self.size += sum(map(len, found.texts))
        self.fault = found.fault or captions.count_fault(len(self.texts), self.size)
        if self.fault:
            self.texts.clear()


def _other(name: str) -> str:
    """What a file is that is no image and holds no caption of one."""
    suffix = names.suffix(name)
    if suffix in captions.SUFFIXES:
        return "text files without an image"
    return f"{suffix} files" if suffix else "files without a suffix"
