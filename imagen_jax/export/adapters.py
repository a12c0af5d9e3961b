"""Writes the LoRA of a run apart from its stage, for this program, diffusers and peft."""

from __future__ import annotations

from collections.abc import Callable

from imagen_jax.config.schema import Config
from imagen_jax.export.export import read_average
from imagen_jax.interop import if_lora
from imagen_jax.io import atomic
from imagen_jax.stages import lora, lora_file
from imagen_jax.stages.stage import Stage


def export_lora(
    workdir: str, out: str, *, step: int = 0, log: Callable[[str], None] = print
) -> Config:
    """Writes an adapter folder (`stages.lora_file`); replaces an older one.

    A LoRA of a `unet` is also written in the formats of diffusers and peft, where these have such a
    network.

    Args:
      workdir: folder of a run with `lora.rank` above 0.
      out: folder to write, atomically.
      step: step of the checkpoint; 0: the newest one.
      log: receives the lines.

    Returns:
      The configuration of the run.

    Raises:
      CheckpointError: there is no checkpoint, or it cannot be read.
      WeightsError: the run has no LoRA.
      OutputError: `out` exists and is no adapter folder.
    """
    folder = atomic.check_replaceable(out, lora_file.LORA_FILE, "adapter folder")
    params, config, step = read_average(workdir, step)
    adapter = lora.adapter_of(Stage(config, params))
    formats = "imagen_jax"
    with atomic.folder(folder) as temporary:
        lora_file.write(temporary, adapter, config)
        if config.model.name == "unet" and if_lora.is_representable(config.model):
            if_lora.save(temporary, adapter, config.model)
            formats += ", diffusers, peft"
    count = sum(pair.a.size + pair.b.size for pair in adapter.values())
    log(f"{folder}: LoRA of {count:,} parameters of step {step} of {workdir}, for {formats}")
    return config
