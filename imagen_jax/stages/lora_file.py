"""The adapter folder: a trained LoRA apart from its stage.

lora.safetensors   A and B of every kernel, `PATH/a` and `PATH/b`, the scale included
config.json        the configuration of the run
"""

from __future__ import annotations

import pathlib

from imagen_jax.config import overrides
from imagen_jax.config.schema import Config
from imagen_jax.interop import if_lora, weights
from imagen_jax.interop.weights import WeightsError
from imagen_jax.stages.folder import CONFIG_FILE
from imagen_jax.stages.lora import Adapter, Factors

LORA_FILE = "lora.safetensors"


def write(folder: pathlib.Path, adapter: Adapter, config: Config) -> None:
    """Writes the files of an adapter into a folder that exists."""
    arrays = {f"{path}/a": pair.a for path, pair in adapter.items()}
    arrays |= {f"{path}/b": pair.b for path, pair in adapter.items()}
    weights.write_safetensors(folder / LORA_FILE, arrays)
    (folder / CONFIG_FILE).write_text(overrides.to_json(config))


def read(path: str, config: Config) -> dict[str, Factors]:
    """Reads an adapter folder, or a LoRA of diffusers or peft for a U-Net of IF.

    Args:
      path: of either.
      config: the stage that it updates.

    Raises:
      WeightsError: it is neither, damaged, or of another network.
    """
    file = pathlib.Path(path) / LORA_FILE
    if file.is_file():
        arrays = weights.read_safetensors(file)
        paths = [name.removesuffix("/a") for name in arrays if name.endswith("/a")]
        missing = [path for path in paths if f"{path}/b" not in arrays]
        if missing:
            raise WeightsError(f"{file} has no {missing[0]}/b")
        return {path: Factors(arrays[f"{path}/a"], arrays[f"{path}/b"]) for path in paths}
    if not if_lora.is_lora(path):
        raise WeightsError(
            f"{path} is no LoRA; give a folder of `imagen export --format=lora`, or one of "
            "diffusers or peft"
        )
    if config.model.name != "unet":
        raise WeightsError(
            f"{path} is of diffusers or peft and updates a U-Net of IF; stage {config.name!r} has "
            f"config.model.name={config.model.name!r}"
        )
    return {kernel: Factors(*pair) for kernel, pair in if_lora.read(path, config.model).items()}
