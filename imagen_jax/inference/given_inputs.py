"""Embeddings, low-resolution images and noise of a .npz file in place of computed ones.

For parity with other implementations and for debugging: `imagen sample --inputs=FILE.npz`. Row i of
every array is of image i: prompt by prompt, the samples of a prompt one after the other.

    text_emb, text_mask           [N, L, D], [N, L]
    negative_emb, negative_mask   the same of the negative prompts
    lowres                        [N, h, w, 3] for a first super-resolution stage, in [-1, 1]
    STAGE/start, STAGE/steps, STAGE/lowres   noise of a stage, see `stage_sampler.Noise`
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from imagen_jax.inference.request import RequestError
from imagen_jax.inference.stage_sampler import Noise

FIELDS = ("text_emb", "text_mask", "negative_emb", "negative_mask", "lowres")


class GivenInputs(NamedTuple):
    """The arrays of a file.

    Attributes:
      arrays: by name.
      count: N, rows of every array.
    """

    arrays: Mapping[str, np.ndarray]
    count: int

    def rows(self, rows: np.ndarray) -> dict[str, Any]:
        """The fields of `SampleRequest` for some of the images."""
        some = {name: array[rows] for name, array in self.arrays.items()}
        noise: dict[str, Noise] = {}
        for name in some.keys() - set(FIELDS):
            stage, _, field = name.rpartition("/")
            noise[stage] = noise.get(stage, Noise())._replace(**{field: some[name]})
        return {name: some[name] for name in FIELDS if name in some} | {"noise": noise}

    def digest(self) -> str:
        """Hash of names and values."""
        digest = hashlib.sha256()
        for name in sorted(self.arrays):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self.arrays[name]).data)
        return digest.hexdigest()[:16]


def read(path: str) -> GivenInputs:
    """Reads a .npz file.

    Raises:
      RequestError: the file cannot be read, or an array has an unknown name or another number of
        rows.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, EOFError) as error:
        raise RequestError(f"--inputs={path} is no .npz file of arrays: {error}") from error
    for name in arrays:
        stage, _, field = name.rpartition("/")
        if name not in FIELDS and not (stage and field in Noise._fields):
            raise RequestError(
                f"--inputs={path}: array {name!r} is not one of {', '.join(FIELDS)} or "
                f"STAGE/{', STAGE/'.join(Noise._fields)}"
            )
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(counts.values())) != 1:
        raise RequestError(f"--inputs={path}: arrays must have equally many rows, got {counts}")
    masks = {name: a.astype(bool) for name, a in arrays.items() if name.endswith("_mask")}
    return GivenInputs({**arrays, **masks}, next(iter(counts.values())))
