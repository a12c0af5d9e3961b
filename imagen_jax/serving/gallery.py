"""The pictures a server keeps: ID.png with its settings in text chunks, and ID.json beside it.

Identifiers are random, never made of anything a client sent. The newest `keep` pictures stay, over
restarts too; other files in the folder are not touched.
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
    """Pictures in a folder, newest last."""

    def __init__(self, folder: str | os.PathLike, keep: int):
        """Reads what an earlier server left; the folder is made if it is missing."""
        self._folder = pathlib.Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._lock = threading.Lock()
        found = {}
        for file in self._folder.iterdir():
            match = _FILE.fullmatch(file.name)
            if match and file.with_suffix(".png").is_file():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    about = json.loads(file.read_text(encoding="utf-8"))
                    found[match[1]] = {**about, "id": match[1], "created": str(about["created"])}
        self._about = dict(sorted(found.items(), key=lambda item: item[1]["created"]))
        self._forget()

    def add(self, picture: UInt8[ndarray, "h w 3"], about: Mapping[str, Any]) -> str:
        """Keeps a picture with its settings, a JSON object; returns its identifier."""
        identifier = secrets.token_hex(16)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        about = {**about, "id": identifier, "created": now}
        text = json.dumps(about, ensure_ascii=False)
        chunks = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}
        images.save_png(self._folder / f"{identifier}.png", picture, chunks)
        atomic.write_text(self._folder / f"{identifier}.json", text)
        with self._lock:
            self._about[identifier] = about
            self._forget()
        return identifier

    def newest(self, count: int) -> list[dict[str, Any]]:
        """Settings of the newest pictures, newest first."""
        with self._lock:
            return list(self._about.values())[: -count - 1 : -1]

    def file(self, identifier: str) -> pathlib.Path | None:
        """The picture's file, if there is such a picture."""
        with self._lock:
            known = identifier in self._about
        return self._folder / f"{identifier}.png" if known else None

    def _forget(self) -> None:
        for identifier in list(self._about)[: max(len(self._about) - self._keep, 0)]:
            del self._about[identifier]
            for suffix in (".json", ".png"):
                (self._folder / f"{identifier}{suffix}").unlink(missing_ok=True)
