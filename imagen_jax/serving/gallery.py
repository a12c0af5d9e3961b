"""The folder of finished images: ID.png with its settings in text chunks, and ID.json beside it.

Identifiers are random and never derived from a client's input. The newest `keep` images are kept,
also when the server restarts; other files in the folder are not touched.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import re
import secrets
import threading
from collections.abc import Mapping
from typing import Any

from jaxtyping import UInt8
from numpy import ndarray

from imagen_jax.io import atomic, images

_FILE = re.compile(r"([0-9a-f]{32})\.json")


class Gallery:
    """Images in a folder, ordered by the time they were added."""

    def __init__(self, folder: str | os.PathLike, keep: int):
        """Reads the images of earlier servers.

        Args:
          folder: made if it is missing.
          keep: number of images to keep.
        """
        self._folder = pathlib.Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._lock = threading.Lock()
        found = {}
        for file in self._folder.iterdir():
            match = _FILE.fullmatch(file.name)
            if match and file.with_suffix(".png").is_file():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    settings = json.loads(file.read_text(encoding="utf-8"))
                    created = str(settings["created"])
                    found[match[1]] = {**settings, "id": match[1], "created": created}
        self._settings = dict(sorted(found.items(), key=lambda item: item[1]["created"]))
        self._delete_oldest()

    def add(self, image: UInt8[ndarray, "h w 3"], settings: Mapping[str, Any]) -> str:
        """Writes an image with its settings, a JSON object; returns its identifier."""
        identifier = secrets.token_hex(16)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        settings = {**settings, "id": identifier, "created": now}
        text = json.dumps(settings, ensure_ascii=False)
        chunks = {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()}
        images.save_png(self._folder / f"{identifier}.png", image, chunks)
        atomic.write_text(self._folder / f"{identifier}.json", text)
        with self._lock:
            self._settings[identifier] = settings
            self._delete_oldest()
        return identifier

    def newest(self, count: int) -> list[dict[str, Any]]:
        """Settings of the newest images, newest first."""
        with self._lock:
            return list(self._settings.values())[: -count - 1 : -1]

    def file(self, identifier: str) -> pathlib.Path | None:
        """The image's file; None: there is no such image."""
        with self._lock:
            known = identifier in self._settings
        return self._folder / f"{identifier}.png" if known else None

    def _delete_oldest(self) -> None:
        for identifier in list(self._settings)[: max(len(self._settings) - self._keep, 0)]:
            del self._settings[identifier]
            for suffix in (".json", ".png"):
                (self._folder / f"{identifier}{suffix}").unlink(missing_ok=True)
