"""Image files as bytes, within a limit: a sparse file of some bytes may claim terabytes."""

from __future__ import annotations

import os

from imagen_jax.io.images import ImageError

MAX_BYTES = 1 << 30  # `images.MAX_PIXELS` of four channels of 16 bits have 683 MiB.


def size_fault(size: int) -> str:
    """Why an image file of `size` bytes is not read; "" if it is."""
    return f"too large ({size:,} bytes, at most {MAX_BYTES:,})" if size > MAX_BYTES else ""


def read(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file.

    Raises:
      ImageError: more than MAX_BYTES.
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        if fault := size_fault(os.fstat(file.fileno()).st_size):
            raise ImageError(fault)
        return file.read()
