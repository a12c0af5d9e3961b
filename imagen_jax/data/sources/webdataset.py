"""Uncompressed tar files of images with captions beside them (webdataset shards).

The files of a sample share a key, the file name up to its first dot; what follows the dot names the
part. A caption is that of the part with the image's own name (`a.left.txt` of `a.left.jpg`), else
that of the whole sample (`a.txt`). It is a text, or the field `text`, `caption` or `prompt` of a
.json. `data.caption_key` names another part or field, which then comes first, and
`data.image_key` the parts that are images. One pass over the headers stores the offset of every
image; each later read of an image is one `pread`.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from imagen_jax.config.data import SourceConfig
from imagen_jax.data.index.table import Location
from imagen_jax.data.sources import captions, files, names, tar
from imagen_jax.data.sources.records import Item, is_blank, texts_of
from imagen_jax.data.sources.sample_fields import SampleFields
from imagen_jax.data.sources.tar import Member
from imagen_jax.io import image_files, text

MAX_JSON_BYTES = 16 << 20  # Of a .json; img2dataset's have some kilobytes.
_DEFAULT_IMAGE_KEY = SourceConfig.image_key  # Any part with the suffix of an image.
_JSON = ".json"
# Parts that webdataset's tools write beside images.
_PARTS = frozenset(
    {_JSON, ".cls", ".cls2", ".npy", ".npz", ".pyd", ".pickle", ".pkl", ".id", ".pt", ".pth"}
)
# Names as img2dataset writes them: a number and a suffix. None of them is junk.
_PLAIN = re.compile(r"[0-9]+\.(?:jpg|png|webp|txt|json)", re.ASCII)

_REPEATED = ("several samples of this name",)


class WebDatasetReader:
    """Reader of tar files; see `records.Reader`."""

    def __init__(self, source: SourceConfig) -> None:
        """Finds the files. Raises ConfigError: no files."""
        paths = files.find(source.path, [".tar"])
        self._image_key = source.image_key.lower().lstrip(".")
        self._caption_key, self._by_line = source.caption_key, source.caption_lines
        self._files, self.shards = files.Files(paths), paths
        self._names, self._metadata = files.names(paths), SampleFields(source)
        self.cache = files.cache_folder(source.path, paths)
        keys = [source.image_key, source.caption_key]
        self.identity = [files.stats(paths), *keys, captions.VERSION, source.caption_lines]

    def scan(self) -> Iterator[Item]:
        """Lists the images in the order of the files."""
        for number in range(len(self.shards)):
            yield from self.scan_shard(number)

    def scan_shard(self, number: int) -> Iterator[Item]:
        """Lists the images of a file."""
        members, fault = tar.members(self._files.local(number))
        if fault:
            yield Item(self._names[number], fault=fault)
        yield from self._shard(number, self._names[number], members)

    def read(self, key: str, location: Location) -> bytes:
        """The image at `location`: file number, offset, bytes."""
        del key
        return self._files.read(*location)

    def read_start(self, key: str, location: Location, count: int) -> tuple[bytes, int]:
        """The first bytes of the image at `location`, and its size."""
        return self._files.read_start(location, count)

    def _shard(self, number: int, name: str, members: list[Member]) -> Iterator[Item]:
        """The records of a shard."""
        files_ = [_described(member) for member in members]
        images = [file for file in files_ if not file.junk and self._is_image(number, file)]
        samples, repeated = _samples(files_)
        used: set[str] = set()
        for file in images:
            member, sample = file.member, samples[file.member.offset]
            record = f"{name}/{member.name}"
            if not member.is_file:
                yield Item(record, fault="no regular file (a link)")
                continue
            if fault := image_files.size_fault(member.size):
                yield Item(record, fault=fault)
                continue
            chosen = self._chosen(file.part, sample)
            if chosen and file.part not in chosen:
                yield Item(record, ignored=f"images other than {self._image_key!r}")
            elif not chosen:
                yield Item(record, fault=f"no image {self._image_key!r} in the sample")
            else:
                found = self._captions(number, sample, file.part, used)
                location = (number, member.offset, member.size)
                notes = (*found.notes, *(_REPEATED if file.key in repeated else ()))
                item = Item(record, found.texts, location, found.fault, notes)
                if self._metadata.names:
                    item = self._metadata.add(item, self._row(number, sample, used))
                yield item
        listed = {id(file) for file in images}
        for file in files_:
            if id(file) not in listed and file.member.name not in used:
                yield _other(name, file)

    def _row(self, number: int, sample: Sample, used: set[str]) -> dict[str, Any]:
        """The metadata of a sample: its .json, and texts by the names of their parts."""
        row = (self._json(number, sample["json"]) or {}) if "json" in sample else {}
        for name in self._metadata.captions:
            for part, member in sample.items():
                if _matches(part, name.lower()) and not part.endswith("json"):
                    used.add(member.name)
                    row = {**row, name: list(self._text(number, member).texts)}
        return row

    def _is_image(self, number: int, file: _File) -> bool:
        """By the suffix, else by the first bytes."""
        suffix, member = file.suffix, file.member
        if suffix in names.IMAGE_SUFFIXES:
            return True
        known = suffix in captions.SUFFIXES or suffix in _PARTS or suffix in names.OTHER_IMAGES
        if known or not member.is_file:
            return False
        start = min(member.size, names.MAGIC_BYTES)
        return names.has_magic(self._files.read(number, member.offset, start))

    def _chosen(self, image: str, sample: Sample) -> list[str]:
        """The parts of a sample that are records, by `data.image_key`; []: it has none."""
        if self._image_key == _DEFAULT_IMAGE_KEY:
            return [image]
        kinds = {part for part in sample if f".{part.rpartition('.')[2]}" in names.IMAGE_SUFFIXES}
        chosen = [part for part in (*kinds, image) if _matches(part, self._image_key)]
        # A sample without that part has its plain image, if `data.image_key` is a plain suffix.
        plain = f".{self._image_key}" in names.IMAGE_SUFFIXES and "." not in image
        return chosen or ([image] if plain else [])

    def _captions(
        self, number: int, sample: Sample, image: str, used: set[str]
    ) -> captions.Captions:
        """The captions of one image of a sample; adds the names of the files read to `used`."""
        parts = [part for part in _caption_parts(image) if part in sample]
        used.update(sample[part].name for part in parts)
        if explicit := captions.explicit_key(self._caption_key):
            for part, member in sample.items():
                if _matches(part, explicit.lower()) and not part.endswith("json"):
                    used.add(member.name)
                    return self._text(number, member)
            for part in parts:
                row = self._json(number, sample[part]) if part.endswith("json") else {}
                if row and explicit in row:
                    return captions.Captions(texts_of(row[explicit]))
        note = (f"caption without {explicit!r}",) if explicit else ()
        first: captions.Captions | None = None
        for part in parts:
            if not part.endswith("json"):
                found = self._text(number, sample[part])
            else:
                row = self._json(number, sample[part])
                fault = "" if row is not None else "caption unreadable (no JSON object)"
                fault = captions.size_fault(sample[part].size, MAX_JSON_BYTES) or fault
                texts = captions.of_fields(row or {}, self._caption_key)
                found = captions.Captions(texts, fault=fault)
            blank = not found.fault and all(map(is_blank, found.texts))
            first = first or (found if found.texts or found.fault else None)
            if not blank:
                return found._replace(notes=(*found.notes, *note))
        return first or captions.Captions(())

    def _text(self, number: int, member: Member) -> captions.Captions:
        fault = "" if member.is_file else "caption unreadable (a link)"
        if fault := fault or captions.size_fault(member.size):
            return captions.Captions((), fault=fault)
        data = self._files.read(number, member.offset, member.size)
        return captions.of_file(data, by_line=self._by_line)

    def _json(self, number: int, member: Member) -> dict[str, Any] | None:
        """The object in a .json; None: there is none. Text that is not Unicode becomes bytes."""
        if not member.is_file or member.size > MAX_JSON_BYTES:
            return None
        data = self._files.read(number, member.offset, member.size)
        try:
            content = text.decode(data)
            if isinstance(content, str):
                row = json.loads(content)
            else:
                row = json.loads(data.decode("utf-8", "surrogateescape"))
                row = {name: _as_bytes(value) for name, value in dict(row).items()}
        except (text.TextError, ValueError, TypeError, RecursionError):
            return None
        return row if isinstance(row, dict) else None


class _File(NamedTuple):
    """A file of a shard.

    Attributes:
      member: its place in the shard.
      key: of its sample.
      part: what follows the key, in lower case.
      suffix: in lower case.
      junk: whether it is junk of another system.
    """

    member: Member
    key: str
    part: str
    suffix: str
    junk: bool


Sample = dict[str, Member]  # By part.


def _samples(files_: Sequence[_File]) -> tuple[dict[int, Sample], set[str]]:
    """The sample of each file, by the file's offset, and the keys of more than one sample.

    The files of a sample may stand anywhere; a part that comes again begins another sample.
    """
    latest: dict[str, Sample] = {}
    found, repeated = {}, set()
    for file in files_:
        if file.junk:
            continue
        sample = latest.setdefault(file.key, {})
        if file.part in sample:
            repeated.add(file.key)
            sample = latest[file.key] = {}
        sample[file.part] = file.member
        found[file.member.offset] = sample
    return found, repeated


def _described(member: Member) -> _File:
    name = member.name
    if _PLAIN.fullmatch(name):
        stem, _, part = name.partition(".")
        return _File(member, stem, part, f".{part}", False)
    key, part = _split(name)
    return _File(member, key, part.lower(), names.suffix(name), names.is_junk(name))


@functools.lru_cache(4096)
def _caption_parts(image: str) -> list[str]:
    """The parts that hold the captions of the image `image` of a sample, in their order."""
    own, plain = [], []
    stem = image.rpartition(".")[0]
    for suffix in (*captions.SUFFIXES, _JSON):
        own += [f"{image}{suffix}", f"{stem}{suffix}" if stem else suffix[1:]]
        plain.append(suffix[1:])
    # All texts come before all .json: img2dataset writes both with the same caption.
    return sorted(dict.fromkeys([*own, *plain]), key=lambda part: part.endswith("json"))


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


def _other(shard: str, file: _File) -> Item:
    """A file of a shard that is neither an image nor a caption of one."""
    key, suffix = f"{shard}/{file.member.name}", file.suffix
    if file.junk:
        return Item(key, ignored="junk")
    if suffix in names.OTHER_IMAGES:
        return Item(key, fault=f"wrong type ({suffix})")
    if suffix in captions.SUFFIXES:
        return Item(key, ignored="text files without an image")
    return Item(key, ignored=f"{suffix} files" if suffix else "files without a suffix")
