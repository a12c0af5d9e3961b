"""The public weights of FID's InceptionV3: the torch file or a safetensors copy.

The file is `pt_inception-2015-12-05-6726825d.pth` of the pytorch-fid project, TensorFlow's graph of
2015 with other names. Weights are never downloaded; the card records their SHA-256. The pickle is
not executed (interop/torch_pickle.py).
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from imagen_jax.interop import weights
from imagen_jax.models import inception

PUBLIC_FILE = "pt_inception-2015-12-05-6726825d.pth"

_PARTS = {
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "variance": "bn.running_var",
}
# The classifier, not used by FID; its 1008 rows distinguish these weights from torchvision's.
_CLASSIFIER = {"fc.weight": (1008, inception.FEATURES), "fc.bias": (1008,)}


def read(path: str | pathlib.Path) -> tuple[dict[str, Any], str]:
    """Parameters of `models.inception.Inception`, and the SHA-256 of their values.

    Args:
      path: a `.pth` (`.pt`, `.bin`) or `.safetensors` file.

    Raises:
      WeightsError: the file is missing, damaged or of another network (every missing, extra and
        wrong-shape tensor is named).
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise weights.WeightsError(
            f"--inception={path}: no such file; download {PUBLIC_FILE} from the releases of "
            "github.com/mseitzer/pytorch-fid"
        )
    opener = weights.open_safetensors if path.suffix == ".safetensors" else weights.open_torch
    found = opener(path, lambda name: not name.endswith("num_batches_tracked"))
    flat, digest = weights.read_as(path, found, _expected(), _transpose, _CLASSIFIER)
    return weights.unflatten(flat), digest


def _transpose(path: str, array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0) if path.endswith("/kernel") else array


def _expected() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Parameter path -> name and shape in the file."""
    names = {}
    for path, leaf in weights.flatten(inception.param_shapes()).items():
        *layers, part = path.split("/")
        shape = leaf.shape
        if part == "kernel":
            height, width, inputs, outputs = shape
            shape = (outputs, inputs, height, width)
        names[path] = (".".join([*layers, _PARTS[part]]), shape)
    return names
