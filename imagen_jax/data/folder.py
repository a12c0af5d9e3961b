"""A folder of pictures as index entries.

Captions come from `metadata.jsonl` files (Hugging Face's imagefolder: `file_name` relative to the
file, `text` or `caption`, a string or a list) or from `NAME.txt` beside a picture, one per line.
Every picture is decoded once here, so that a truncated one is found before the training starts.
"""

from __future__ import annotations

import errno
import json
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from imagen_jax import images
from imagen_jax.data.records import Entry, Quarantine, caption_fault, clean, size_fault

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
# Files that commonly lie beside pictures and are no records: captions, tables, notes.
COMPANIONS = frozenset({"", ".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".html", ".parquet"})
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


def index(
    root: pathlib.Path, files: list[File], *, min_size: int, report: Quarantine
) -> list[Entry]:
    """Opens and decodes every picture; what cannot be used goes into `report`.

    Args:
      root: the folder.
      files: what `walk` found.
      min_size: shorter side below which a picture is too small, pixels.
      report: filled in place.

    Returns:
      The usable records, in the order of `files`.
    """
    captions = _captions(root, files, report)
    entries = []
    for file in files:
        suffix = pathlib.PurePosixPath(file.name).suffix.lower()
        if suffix in COMPANIONS and not file.fault:
            continue
        texts = captions.get(file.name, ())
        fault = file.fault or _picture_fault(root / file.name, suffix, min_size)
        fault = fault or caption_fault(texts)
        if fault:
            report.add(file.name, fault)
        else:
            entries.append(Entry(file.name, clean(texts), file.size))
    report.total = len(entries) + len(report.rejected)
    return entries


def _picture_fault(path: pathlib.Path, suffix: str, min_size: int) -> str | None:
    if suffix not in PICTURES:
        return f"wrong type ({suffix})"
    try:
        image = images.decode(path.read_bytes())
    except images.PictureError as error:
        return str(error)
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return size_fault(min(image.shape[:2]), min_size)


def _captions(
    root: pathlib.Path, files: list[File], report: Quarantine
) -> dict[str, tuple[str, ...]]:
    """Captions by picture name; rows of metadata without a picture go into `report`."""
    found: dict[str, tuple[str, ...]] = {}
    names = {file.name for file in files}
    by_stem: dict[str, list[str]] = {}
    for name in names:
        if pathlib.PurePosixPath(name).suffix.lower() in PICTURES:
            by_stem.setdefault(str(pathlib.PurePosixPath(name).with_suffix("")), []).append(name)
    for file in files:
        path = pathlib.PurePosixPath(file.name)
        if path.suffix == ".txt" and not file.fault:
            text = (root / path).read_text("utf-8-sig", errors="replace")
            for picture in by_stem.get(str(path.with_suffix("")), ()):
                found[picture] = found.get(picture, ()) + tuple(text.splitlines() or [""])
        elif path.name == METADATA and not file.fault:
            for row, picture, texts in _metadata(root, path):
                if picture not in names:
                    report.add(row, f"missing file ({picture or 'no file_name'})")
                else:
                    found[picture] = found.get(picture, ()) + texts
    return found


def _metadata(
    root: pathlib.Path, path: pathlib.PurePosixPath
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(row name, picture name or "", captions) for each row of a metadata file."""
    lines = (root / path).read_text("utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            yield f"{path}:{number}", "", ()
            continue
        value = row["text"] if "text" in row else row.get("caption", ())
        texts = value if isinstance(value, list) else [value] if isinstance(value, str) else []
        picture = os.path.normpath(path.parent / row["file_name"]).replace(os.sep, "/")
        yield f"{path}:{number}", picture, tuple(str(text) for text in texts)
