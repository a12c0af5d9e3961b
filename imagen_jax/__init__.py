"""imagen_jax: text-to-image diffusion cascades in JAX.

    from imagen_jax import Cascade, Config, train

`Cascade` samples images with trained stages, `train` trains one stage that a `Config` describes.
The three are imported when they are first used: `import imagen_jax` loads neither TensorFlow nor
Orbax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagen_jax.config.schema import Config
    from imagen_jax.inference.cascade import Cascade
    from imagen_jax.training.train import train

__version__ = "0.1.0"
__all__ = ["Cascade", "Config", "__version__", "train"]

_HOMES = {
    "Cascade": "imagen_jax.inference.cascade",
    "Config": "imagen_jax.config.schema",
    "train": "imagen_jax.training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
