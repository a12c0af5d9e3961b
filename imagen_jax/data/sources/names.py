"""Names of files: which are images, which are junk of other systems, and which belong together."""

from __future__ import annotations

import functools
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Iterator

HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
IMAGE_SUFFIXES = HEIF_SUFFIXES | {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo"),
    *(".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
}
# Formats that are not read.
OTHER_IMAGES = frozenset(
    {".jxl", ".jp2", ".j2k", ".jpx", ".psd", ".psb", ".xcf", ".exr", ".hdr", ".tga", ".dds"}
    | {".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".raf", ".rw2", ".raw"}
    | {".ico", ".cur", ".icns", ".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".qoi", ".pcx"}
    | {".eps", ".wmf", ".emf", ".fits"}
)
# First bytes of the formats that are read; WebP, AVIF and HEIF have their mark at an offset.
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|BM.{12}[\x0c\x28\x38\x40\x6c\x7c]\0\0\0|II\*\0|MM\0\*"
    rb"|RIFF....WEBP|....ftyp(?:avif|avis|heic|heix|mif1|msf1|hevc)",
    re.DOTALL,
)
MAGIC_BYTES = 32
# Files that Windows, macOS, cameras, editors and synchronisation tools leave beside images. Names
# that begin with a dot are junk, too.
_JUNK_NAME = re.compile(
    r"(eh)?thumbs(_\w+)?\.db(:encryptable)?|desktop\.ini|folder\.ini|picasa\.ini|zbthumbnail\.info"
    r"|pspbrwse\.jbf|icon\r|.*[:_]zone\.identifier|~\$.*|~syncthing~.*|.*~"
    r"|.*\.(tmp|temp|part|partial|crdownload|download|lnk|url|webloc|bak|swp|aae|ini|thm|icloud)"
    r"|.*\.sync-conflict-\d{8}-\d{6}.*|.*conflicted copy \d{4}-\d{2}-\d{2}.*"
    r"|.* \((case|unicode encoding|selective sync) conflict( \d+)?\)(\..*)?"
    r"|.*\.conflict\d+(\..*)?|.*\.!sync|.*_original|autorun\.inf|albumart(small|_\{).*",
    re.IGNORECASE,
)
_JUNK_FOLDER = re.compile(
    r"__macosx|@eadir|@tmp|#recycle|#snapshot|\$recycle\.bin|recycler|system volume information"
    r"|lost\+found|found\.\d{3}|paxheaders?(\.\w+)?|network trash folder|temporary items",
    re.IGNORECASE,
)


def is_junk(name: str) -> bool:
    """Whether a file below a source's root, or a folder above it, is junk of another system."""
    *folders, last = parts(name)
    hidden = (part.startswith(".") and part != ".." for part in folders)
    if any(hidden) or any(map(_JUNK_FOLDER.fullmatch, folders)):
        return True
    return bool(last.startswith(".") or _JUNK_NAME.fullmatch(last) or _JUNK_FOLDER.fullmatch(last))


def parts(name: str) -> list[str]:
    """Folders and file name, with either slash, without `.`; at least one part."""
    found = [part for part in re.split(r"[/\\]+", name) if part not in ("", ".")]
    return found or [name]


def suffix(name: str) -> str:
    """Suffix of the file name in lower case; "" if it has none."""
    return pathlib.PurePosixPath(parts(name)[-1]).suffix.lower()


def is_image(name: str) -> bool:
    """Whether the suffix is that of an image format."""
    return suffix(name) in IMAGE_SUFFIXES


def has_magic(start: bytes) -> bool:
    """Whether a file begins as an image format does; `start`: its first MAGIC_BYTES."""
    return _MAGIC.match(start) is not None


def key(name: str) -> str:
    """The name by which files belong together: NFC, slashes, the suffix in lower case."""
    whole = unicodedata.normalize("NFC", "/".join(_resolved(parts(name))))
    end = suffix(whole)
    return whole[: len(whole) - len(end)] + end


def stem(name: str) -> str:
    """`key` without the suffix."""
    whole = key(name)
    return whole[: len(whole) - len(suffix(whole))]


class Lookup:
    """Names by key; a key in other case is found where it is the only one."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Takes (key, name) pairs."""
        self._names: dict[str, list[str]] = {}
        for key, name in pairs:
            self._names.setdefault(key, []).append(name)

    def find(self, key: str) -> list[str]:
        """The names with a key."""
        if key in self._names:
            return self._names[key]
        same = self._by_folded_key.get(key.casefold(), [])
        return self._names[same[0]] if len(same) == 1 else []

    @functools.cached_property
    def _by_folded_key(self) -> dict[str, list[str]]:
        """Keys by their case-folded form; rarely needed."""
        found: dict[str, list[str]] = {}
        for key in self._names:
            found.setdefault(key.casefold(), []).append(key)
        return found


def _resolved(names: Iterable[str]) -> Iterator[str]:
    found: list[str] = []
    for name in names:
        if name == ".." and found and found[-1] != "..":
            found.pop()
        else:
            found.append(name)
    return iter(found)
