"""Uncompressed tar files of images with captions beside them (webdataset shards).

The files of a sample share a key, the file name up to its first dot; what follows the dot names the
part. A caption is that of the part with the image's own name (`a.left.txt` of `a.left.jpg`), else
that of the whole sample (`a.txt`). It is a text, or the field `text`, `caption` or `prompt` of a
.json. `data.caption_key` names another part or field, which then comes first, and
`data.image_key` the parts that are images. One pass over the headers stores the offset of every
image; each later read of an image is one `pread`.
"""

from __future__ import annotations

import json
import tarfile
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, cast

from imagen_jax.config.data import SourceConfig
from imagen_jax.data.index.table import Location
from imagen_jax.data.sources import captions, files, names
from imagen_jax.data.sources.records import Item, texts_of
from imagen_jax.io import text

_DEFAULT_IMAGE_KEY = SourceConfig.image_key  # Any part with the suffix of an image.
_JSON = ".json"
# Parts that webdataset's tools write beside images.
_PARTS = frozenset(
    {_JSON, ".cls", ".cls2", ".npy", ".npz", ".pyd", ".pickle", ".pkl", ".id", ".pt", ".pth"}
)


MAX_HEADER_BYTES = 1 << 20


class WebDatasetReader:
    """Reader of tar files; see `records.Reader`."""

    def __init__(self, source: SourceConfig) -> None:
        """Finds the files. Raises ConfigError: no files."""
        paths = files.find(source.path, [".tar"])
        self._image_key = source.image_key.lower().lstrip(".")
        self._caption_key, self._by_line = source.caption_key, source.caption_lines
        self._files = files.Files(paths)
        self.cache = files.cache_folder(source.path, paths)
        keys = [source.image_key, source.caption_key]
        self.identity = [files.stats(paths), *keys, captions.VERSION, source.caption_lines]

    def scan(self) -> Iterator[Item]:
        """Lists the images in the order of the files."""
        for number, name in enumerate(files.names(self._files.paths)):
            members, fault = self._members(number)
            if fault:
                yield Item(name, fault=fault)
            yield from self._shard(number, name, members)

    def read(self, key: str, location: Location) -> bytes:
        """The image at `location`: file number, offset, bytes."""
        del key
        return self._files.read(*location)

    def _shard(self, number: int, name: str, members: list[tarfile.TarInfo]) -> Iterator[Item]:
        """The records of a shard."""
        kept = [member for member in members if not names.is_junk(member.name)]
        images = [member for member in kept if self._is_image(number, member)]
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        for member in kept:
            key, part = _split(member.name)
            samples.setdefault(key, {}).setdefault(part.lower(), member)
        used: set[str] = set()
        for member in images:
            record = f"{name}/{member.name}"
            if not member.isfile():
                yield Item(record, fault="no regular file (a link)")
                continue
            key, part = _split(member.name)
            chosen = self._chosen(part.lower(), samples[key])
            if chosen and part.lower() not in chosen:
                yield Item(record, ignored=f"images other than {self._image_key!r}")
            elif not chosen:
                yield Item(record, fault=f"no image {self._image_key!r} in the sample")
            else:
                found = self._captions(number, samples[key], part.lower(), used)
                location = (number, member.offset_data, member.size)
                yield Item(record, found.texts, location, found.fault, found.notes)
        listed = {id(member) for member in images}
        for member in members:
            if id(member) not in listed and member.name not in used:
                yield _other(name, member)

    def _is_image(self, number: int, member: tarfile.TarInfo) -> bool:
        """By the suffix, else by the first bytes."""
        suffix = names.suffix(member.name)
        if suffix in names.IMAGE_SUFFIXES:
            return True
        known = suffix in captions.SUFFIXES or suffix in _PARTS or suffix in names.OTHER_IMAGES
        if known or not member.isfile():
            return False
        start = min(member.size, names.MAGIC_BYTES)
        return names.has_magic(self._files.read(number, member.offset_data, start))

    def _chosen(self, image: str, sample: Mapping[str, tarfile.TarInfo]) -> list[str]:
        """The parts of a sample that are records, by `data.image_key`; []: it has none."""
        if self._image_key == _DEFAULT_IMAGE_KEY:
            return [image]
        kinds = {part for part in sample if f".{part.rpartition('.')[2]}" in names.IMAGE_SUFFIXES}
        chosen = [part for part in (*kinds, image) if _matches(part, self._image_key)]
        # A sample without that part has its plain image, if `data.image_key` is a plain suffix.
        plain = f".{self._image_key}" in names.IMAGE_SUFFIXES and "." not in image
        return chosen or ([image] if plain else [])

    def _captions(
        self, number: int, sample: dict[str, tarfile.TarInfo], image: str, used: set[str]
    ) -> captions.Captions:
        """The captions of one image of a sample; adds the names of the files read to `used`."""
        own, plain = [], []
        stem = image.rpartition(".")[0]
        for suffix in (*captions.SUFFIXES, _JSON):
            own += [f"{image}{suffix}", f"{stem}{suffix}" if stem else suffix[1:]]
            plain.append(suffix[1:])
        parts = [part for part in dict.fromkeys([*own, *plain]) if part in sample]
        # All texts come before all .json: img2dataset writes both with the same caption.
        parts.sort(key=lambda part: part.endswith("json"))
        used.update(sample[part].name for part in parts)
        if explicit := captions.explicit_key(self._caption_key):
            for part, member in sample.items():
                if _matches(part, explicit.lower()) and not part.endswith("json"):
                    used.add(member.name)
                    return self._text(number, member)
            for part in parts:
                row = self._json(number, sample[part]) if part.endswith("json") else {}
                if explicit in row:
                    return captions.Captions(texts_of(row[explicit]))
        note = (f"caption without {explicit!r}",) if explicit else ()
        first: captions.Captions | None = None
        for part in parts:
            if not part.endswith("json"):
                found = self._text(number, sample[part])
            else:
                row = self._json(number, sample[part])
                found = captions.Captions(captions.of_fields(row, self._caption_key))
            blank = not found.fault and not any(caption.strip() for caption in found.texts)
            first = first or (found if found.texts or found.fault else None)
            if not blank:
                return found._replace(notes=(*found.notes, *note))
        return first or captions.Captions(())

    def _text(self, number: int, member: tarfile.TarInfo) -> captions.Captions:
        fault = "" if member.isfile() else "caption unreadable (a link)"
        if fault := fault or captions.size_fault(member.size):
            return captions.Captions((), fault=fault)
        data = self._files.read(number, member.offset_data, member.size)
        return captions.of_file(data, by_line=self._by_line)

    def _json(self, number: int, member: tarfile.TarInfo) -> dict[str, Any]:
        """The object in a .json; {}: none. Text that is not Unicode becomes bytes."""
        if not member.isfile():
            return {}
        data = self._files.read(number, member.offset_data, member.size)
        try:
            content = text.decode(data)
            if isinstance(content, str):
                row = json.loads(content)
            else:
                row = json.loads(data.decode("utf-8", "surrogateescape"))
                row = {name: _as_bytes(value) for name, value in dict(row).items()}
        except (text.TextError, ValueError, TypeError, RecursionError):
            return {}
        return row if isinstance(row, dict) else {}

    def _members(self, number: int) -> tuple[list[tarfile.TarInfo], str]:
        """All files in a shard before the first damage, and a description of the damage."""
        path, found = self._files.paths[number], []
        end = path.stat().st_size
        try:
            with (
                path.open("rb") as file,
                tarfile.open(fileobj=cast(Any, _Headers(file)), mode="r:") as shard,
            ):
                at = -1
                for member in shard:
                    if member.offset <= at or member.size < 0:
                        raise tarfile.ReadError("headers that lead back")
                    at = member.offset
                    if member.offset_data + member.size > end:
                        raise tarfile.ReadError("unexpected end of data")
                    if not member.isdir():
                        found.append(member)
        # tarfile raises ValueError for numbers and names that it cannot read.
        except (tarfile.TarError, OSError, ValueError) as error:
            return found, f"truncated (the first {len(found)} files are used: {error})"
        return found, ""


class _Headers:
    """A tar file for reading headers: `tarfile` reads a long name or a PAX header as a whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Reads `size` bytes. Raises ReadError: no header has so many."""
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _split(name: str) -> tuple[str, str]:
    """Key of a sample and name of the part: the file name up to its first dot, and the rest."""
    *folders, last = names.parts(name)
    stem, _, part = last.partition(".")
    return unicodedata.normalize("NFC", "/".join([*folders, stem])), unicodedata.normalize(
        "NFC", part
    )


def _matches(part: str, key: str) -> bool:
    """Whether a key names a part, with or without the last suffix."""
    return part == key or ("." in part and part.rpartition(".")[0] == key)


def _as_bytes(value: Any) -> Any:
    """Undoes "surrogateescape" in a text or in a list of texts."""
    if isinstance(value, list):
        return [_as_bytes(item) for item in value]
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value


def _other(shard: str, member: tarfile.TarInfo) -> Item:
    """A file of a shard that is neither an image nor a caption of one."""
    key, suffix = f"{shard}/{member.name}", names.suffix(member.name)
    if names.is_junk(member.name):
        return Item(key, ignored="junk")
    if suffix in names.OTHER_IMAGES:
        return Item(key, fault=f"wrong type ({suffix})")
    if suffix in captions.SUFFIXES:
        return Item(key, ignored="text files without an image")
    return Item(key, ignored=f"{suffix} files" if suffix else "files without a suffix")
