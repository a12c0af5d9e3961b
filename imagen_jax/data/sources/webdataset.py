"""Uncompressed tar files of images with captions beside them (webdataset shards).

`NAME.jpg` belongs to `NAME.txt` (captions, one per line) or `NAME.json` (an object with the caption
in `config.data.caption_key`, `text` or `caption`). One pass over the headers stores the offset of
every image; each later read of an image is one `pread`.
"""

from __future__ import annotations

import json
import pathlib
import tarfile
from collections.abc import Iterator

from imagen_jax.config.data import SourceConfig
from imagen_jax.data.index.table import Location
from imagen_jax.data.sources import files
from imagen_jax.data.sources.folder import IMAGE_SUFFIXES, SIDECAR_SUFFIXES
from imagen_jax.data.sources.records import CAPTION_LINES, Item, lines_of, texts_of

# Suffixes of files in such shards that are not records.
NON_IMAGE_SUFFIXES = SIDECAR_SUFFIXES | {".cls", ".npy", ".pyd", ".id"}


class WebDatasetReader:
    """Reader of tar files; see `records.Reader`."""

    def __init__(self, source: SourceConfig) -> None:
        """Finds the files. Raises ConfigError: no files."""
        paths = files.find(source.path, [".tar"])
        self._caption_key = source.caption_key
        self._files = files.Files(paths)
        self.cache = files.cache_folder(source.path, paths)
        self.identity = [files.stats(paths), source.caption_key, CAPTION_LINES]

    def scan(self) -> Iterator[Item]:
        """Lists the images in the order of the files."""
        for number, name in enumerate(files.names(self._files.paths)):
            members, fault = self._members(number)
            if fault:
                yield Item(name, fault=fault)
            captions = self._captions(number, members)
            for member in members:
                path = pathlib.PurePosixPath(member.name)
                suffix = path.suffix.lower()
                if suffix in IMAGE_SUFFIXES and member.isfile():
                    texts = captions.get(str(path.with_suffix("")), captions.get(_key(path), ()))
                    location = (number, member.offset_data, member.size)
                    yield Item(f"{name}/{member.name}", texts, location)
                elif suffix in IMAGE_SUFFIXES:
                    yield Item(f"{name}/{member.name}", fault="no regular file (a link)")
                elif suffix not in NON_IMAGE_SUFFIXES:
                    yield Item(f"{name}/{member.name}", fault=f"wrong type ({suffix})")

    def read(self, key: str, location: Location) -> bytes:
        """The image at `location`: file number, offset, bytes."""
        del key
        return self._files.read(*location)

    def _members(self, number: int) -> tuple[list[tarfile.TarInfo], str]:
        """All files in a shard before the first damage, and a description of the damage."""
        path, found = self._files.paths[number], []
        end = path.stat().st_size
        try:
            with tarfile.open(path, "r:") as shard:
                for member in shard:
                    if member.offset_data + member.size > end:
                        raise tarfile.ReadError("unexpected end of data")
                    if not member.isdir():
                        found.append(member)
        except (tarfile.TarError, OSError) as error:
            return found, f"truncated (the first {len(found)} files are used: {error})"
        return found, ""

    def _captions(self, number: int, members: list[tarfile.TarInfo]) -> dict[str, tuple[str, ...]]:
        """Captions by name without suffix and, as in webdataset, by name up to the first dot.

        .txt has priority over .json: img2dataset writes both with the same caption.
        """
        found: dict[str, tuple[str, ...]] = {}
        for suffix in (".txt", ".json"):
            for member in members:
                path = pathlib.PurePosixPath(member.name)
                if path.suffix.lower() != suffix or not member.isfile():
                    continue
                data = self._files.read(number, member.offset_data, member.size)
                text = data.decode("utf-8-sig", "replace")
                texts = lines_of(text) if suffix == ".txt" else self._json_captions(text)
                if texts:
                    found.setdefault(str(path.with_suffix("")), texts)
                    found.setdefault(_key(path), texts)
        return found

    def _json_captions(self, text: str) -> tuple[str, ...]:
        try:
            row = json.loads(text)
        except json.JSONDecodeError:
            return ()
        if not isinstance(row, dict):
            return ()
        keys = (self._caption_key, "text", "caption")
        return next((texts_of(row[key]) for key in keys if key in row), ())


def _key(path: pathlib.PurePosixPath) -> str:
    return str(path.with_name(path.name.split(".")[0])) if path.name[0] != "." else str(path)
