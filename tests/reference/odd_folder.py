"""A folder of 400 files as people have them, with the caption or the reason expected of each."""

import csv
import importlib.util
import io
import json
import pathlib
import unicodedata
from typing import NamedTuple

import numpy as np
from PIL import Image

COUNT = 400  # Files in the folder.
FRENCH = [f"un café à la plage, numéro {i} — l’été" for i in range(6)] + [
    "naïve Ångström coöperation"
]
RUSSIAN = ["красный круг на синем фоне", "кошка сидит на окне", "большая собака бежит по полю"]
JAPANESE = ["赤い丸と青い四角", "猫が窓に座っている", "公園を走る犬"]
LONG = "a very long caption, " * 9000  # 189,000 characters.


class Entry(NamedTuple):
    """An image: its file name, content, captions (or why it is rejected) and encoded captions."""

    name: str
    data: bytes
    captions: tuple[str, ...] = ()
    reason: str = ""
    encoded: tuple[bytes, ...] = ()


def encode(seed: int, kind: str = "JPEG", side: int = 24) -> bytes:
    """A smooth image, with a seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    stream = io.BytesIO()
    small.resize((side, side), Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


class Builder:
    """Writes the folder and keeps the table of what is expected."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root, self.entries, self.ignored = root, [], {}
        self.seed = 0

    def write(self, name: str, data: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def image(self, name: str, caption: str = "", *, encoding="utf-8", **options) -> Entry:
        """An image with the caption (or the reason of its rejection) that is expected of it."""
        self.seed += 1
        data = options.pop("data", None)
        data = encode(self.seed, options.pop("kind", "JPEG")) if data is None else data
        texts = (caption,) if caption else ()
        raw = options.pop("raw", caption.encode(encoding, "surrogatepass") if caption else None)
        entry = Entry(name, data, texts, options.pop("reason", ""), () if raw is None else (raw,))
        assert not options
        self.write(name, data)
        self.entries.append(entry)
        return entry

    def beside(self, name: str, caption: str = "", *, sidecar: str = "", **options) -> None:
        """An image with a text file beside it."""
        entry = self.image(name, caption, **options)
        sidecar = sidecar or str(pathlib.PurePosixPath(name).with_suffix(".txt"))
        self.write(sidecar, entry.encoded[0])

    def junk(self, kind: str, *names: str, data: bytes = b"junk") -> None:
        """Files that are no records."""
        for name in names:
            self.write(name, data)
            self.ignored[kind] = self.ignored.get(kind, 0) + 1

    def encodings(self) -> None:
        for i, text in enumerate(FRENCH):
            self.beside(f"cp1252/{i}.jpg", text, encoding="cp1252")
        for i, text in enumerate(RUSSIAN):
            self.beside(f"cp1251/{i}.jpg", text, encoding="cp1251")
        for i, text in enumerate(JAPANESE):
            self.beside(f"sjis/{i}.jpg", text, encoding="cp932")
        for mark, name in [("\ufeff", n) for n in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le")]:
            text = "a café with 🐱 — “zwei Bälle”"
            raw = (mark + text).encode(name)
            self.beside(f"marks/{name}.jpg", text, raw=raw)
        self.beside("marks/none.jpg", "two balls", raw="two balls".encode("utf-16-le"))
        self.beside("lines/cr.jpg", "a red\ncircle", raw=b"a red\r\ncircle\r\n")
        self.entries[-1] = self.entries[-1]._replace(encoded=(b"a red\ncircle",))
        self.beside("lines/separator.jpg", "a red\u2028circle\u0085here")

    def rejected(self) -> None:
        nul, half = "caption with a NUL character", "caption with an unpaired surrogate"
        self.beside("bad/nul.jpg", raw=b"a red\0 circle", reason=nul)
        self.beside("bad/half8.jpg", raw=b"half of \xed\xa0\xbd", reason=half)
        raw = "\ufeffhalf \ude00 of".encode("utf-16-le", "surrogatepass")
        self.beside("bad/half16.jpg", raw=raw, reason=half)
        cut = "красный круг".encode()[:-1]
        self.beside("bad/cut8.jpg", raw=cut, reason="caption in damaged UTF-8")
        cut = "\ufeffa circle".encode("utf-16-le")[:-1]
        self.beside("bad/cut16.jpg", raw=cut, reason="caption in damaged UTF-16")
        self.beside("bad/blank.jpg", raw=b" \r\n\t", reason="empty caption")
        self.image("bad/silent.jpg", reason="no caption")
        self.beside("bad/cut.jpg", data=encode(1)[:300], raw=b"x", reason="unreadable")
        self.beside("bad/empty.png", data=b"", raw=b"x", reason="unreadable (empty)")
        self.beside("bad/page.jpg", data=b"<html>", raw=b"x", reason="wrong type (not an image)")
        self.image("bad/layers.psd", data=b"8BPS", reason="wrong type")

    def names(self) -> None:
        nfc, nfd = "Erdbeer-Törtchen", unicodedata.normalize("NFD", "Erdbeer-Törtchen")
        self.beside(f"names/{nfd}1.jpg", "a cake", sidecar=f"names/{nfc}1.txt")
        self.beside(f"names/{nfc}2.jpg", "two cakes", sidecar=f"names/{nfd}2.txt")
        self.beside("names/IMG_1.JPG", "upper case", sidecar="names/IMG_1.TXT")
        self.beside("names/IMG_2.JpEg", "mixed case", sidecar="names/IMG_2.Txt")
        self.beside("names/a.b.c.jpg", "dots", sidecar="names/a.b.c.txt")
        self.beside("names/double.jpg", "both suffixes", sidecar="names/double.jpg.txt")
        self.beside("names/caption.png", "as kohya", sidecar="names/caption.caption", kind="PNG")
        self.beside("names/with\\slash.jpg", "a slash of Windows")
        kinds = {"jfif": "JPEG", "jpe": "JPEG", "webp": "WEBP", "avif": "AVIF", "png": "PNG"}
        kinds |= {"tif": "TIFF", "tiff": "TIFF", "gif": "GIF", "bmp": "BMP", "pjpeg": "JPEG"}
        if importlib.util.find_spec("pillow_heif"):
            importlib.import_module("pillow_heif").register_heif_opener()
            kinds |= {"heic": "HEIF"}
        for suffix, kind in kinds.items():
            name = f"formats/one.{suffix}"
            self.beside(name, f"a {suffix}", sidecar=f"{name}.txt", kind=kind)
        self.beside("formats/nothing", "no suffix", sidecar="formats/nothing.txt")
        self.beside("formats/photo.jpg_large", "an unknown suffix", kind="PNG")
        self.beside("formats/named_wrongly.jpg", "a PNG", kind="PNG")

    def tables(self) -> None:
        rows = []
        for i in range(10):
            text = {3: "a patch,\u2028number 3", 5: "a \x85 patch"}.get(i, f"patch {i}")
            self.image(f"jsonl/{i}.jpg", text)
            rows.append(json.dumps({"file_name": f"{i}.jpg", "text": text}, ensure_ascii=False))
        entry = self.image("jsonl/half.jpg", reason="caption with an unpaired surrogate")
        rows.append('{"file_name": "half.jpg", "text": "half of \\ud83d"}')
        self.entries[-1] = entry._replace(encoded=(b"half of \xed\xa0\xbd",))
        self.write("jsonl/metadata.jsonl", "\n".join(rows).encode())

        stream = io.StringIO()
        writer = csv.writer(stream, delimiter=";")
        writer.writerow(["file_name", "Prompt"])
        for i, text in enumerate(["deux crêpes; une fraise", 'a "quoted"\ncaption', LONG]):
            self.image(f"csv/sub/{i}.jpg", text)
            writer.writerow([f"sub\\{i}.JPG" if i == 1 else f"sub/{i}.jpg", text])
        name = unicodedata.normalize("NFD", "été.jpg")
        self.image(f"csv/{name}", "l'été")
        writer.writerow(["été.jpg", "l'été"])
        self.write("csv/metadata.csv", stream.getvalue().encode("cp1252"))

    def build(self) -> None:
        """Writes all, and plain images until there are COUNT files."""
        for part in (self.encodings, self.rejected, self.names, self.tables):
            part()
        self.junk(
            "junk",
            *("Thumbs.db", "names/desktop.ini", "cp1252/.DS_Store", "cp1252/._0.jpg"),
            *("names/IMG_1.jpg:Zone.Identifier", "sjis/0.jpg.part", "~$notes.docx", "x.tmp"),
            "Icon\r",
        )
        (self.root / "__MACOSX").mkdir()
        self.junk("junk", "@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg", data=encode(0))
        self.write("__MACOSX/._a.jpg", b"junk")
        self.ignored["junk"] += 1
        self.junk(".mp4 files", "formats/clip.mp4", "formats/b.MP4")
        self.junk("text files without an image", "readme.txt")
        there = sum(path.is_file() for path in self.root.rglob("*"))
        for i in range((COUNT - there) // 2):
            self.beside(f"plain/{i:03}.jpg", f"a plain image, number {i}")
        if (COUNT - there) % 2:
            self.junk(".mp4 files", "c.mp4")
        self.entries.sort(key=lambda entry: entry.name)
