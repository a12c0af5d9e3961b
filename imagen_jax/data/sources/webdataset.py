"""Tar files of pictures with their captions beside them (webdataset shards).

`NAME.jpg` belongs to `NAME.txt` (captions, one per line) or `NAME.json` (an object with the caption
in `config.data.caption_key`, `text` or `caption`). One pass over the headers notes where every
picture lies; afterwards a picture is a `pread`, since tar files are not compressed.
"""

from __future__ import annotations

import json
import pathlib
import tarfile
from collections.abc import Iterator

from imagen_jax.config.data import SourceConfig
from imagen_jax.data.index.table import Location
from imagen_jax.data.sources import files
from imagen_jax.data.sources.folder import PICTURES, SIDECAR_SUFFIXES
from imagen_jax.data.sources.records import Item, lines_of, texts_of

OTHERS = SIDECAR_SUFFIXES | {".cls", ".npy", ".pyd", ".id"}  # What else lies in such shards.


class WebDatasetReader:
    """Tar files as a kind of source; see `records.Reader`."""

    def __init__(self, source: SourceConfig) -> None:
        """Finds the files. Raises ConfigError when there are none."""
        paths = files.find(source.path, [".tar"])
        self._caption_key = source.caption_key
        self._files = files.Files(paths)
        self.cache = files.cache_folder(source.path, paths)
        self.identity = [files.stats(paths), source.caption_key]

    def scan(self) -> Iterator[Item]:
        """The pictures in the order of the files."""
        for number, name in enumerate(files.names(self._files.paths)):
            members, fault = self._members(number)
            if fault:
                yield Item(name, fault=fault)
            captions = self._captions(number, members)
            for member in members:
                path = pathlib.PurePosixPath(member.name)
                suffix = path.suffix.lower()
                if suffix in PICTURES and member.isfile():
                    texts = captions.get(str(path.with_suffix("")), captions.get(_key(path), ()))
                    place = (number, member.offset_data, member.size)
                    yield Item(f"{name}/{member.name}", texts, place)
                elif suffix in PICTURES:
                    yield Item(f"{name}/{member.name}", fault="no regular file (a link)")
                elif suffix not in OTHERS:
                    yield Item(f"{name}/{member.name}", fault=f"wrong type ({suffix})")

    def read(self, key: str, place: Location) -> bytes:
        """The picture at `place`: file, offset, bytes."""
        del key
        return self._files.read(*place)

    def _members(self, number: int) -> tuple[list[tarfile.TarInfo], str]:
        """All files in a shard up to where it is damaged, and that damage."""
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
        """Captions by name without suffix and, as webdataset has it, by name up to the first dot.

        Texts come before JSON, which img2dataset writes beside them with the same caption.
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
