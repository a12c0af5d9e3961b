"""The whole sampler of a stage as StableHLO: text and numbers in, pictures out, for any platform.

`OUT/sampler.jaxexport` is what `jax.export` makes of it: for a batch of any size, on CPU, CUDA and
TPU. The weights are arguments, so the program is small whatever the model's size; they lie beside
it as safetensors. `OUT/load.py` is a copy of `stablehlo_loader`, all that a reader needs besides
jax and numpy.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.config.schema import Config
from imagen_jax.diffusion import samplers
from imagen_jax.export import check, export, stablehlo_loader
from imagen_jax.inference import stage_sampler
from imagen_jax.interop import weights
from imagen_jax.io import atomic
from imagen_jax.stages import model_card
from imagen_jax.stages.folder import Stage

PLATFORMS = ("cpu", "cuda", "tpu")
BATCH = "b"  # the symbolic size, as signature.json writes it

USE = """\
The sampler of one stage of a text-to-image cascade as StableHLO, for {platforms}, with a batch of
any size. `load.py` draws with it and needs jax and numpy alone; `signature.json` tells shapes and
ranges. The sampling settings above are part of the program.

```python
import load
stage = load.Stage("{folder}")
pictures = stage(text_emb, text_mask, seed=0, prompt_index=[0], sample_index=[0]{lowres})
```

Exported by JAX {jax} (calling convention {convention}).
"""


def export_stablehlo(source: str, out: str, log: Callable[[str], None] = print) -> Config:
    """Writes a folder from which the sampler of a stage runs with jax and numpy alone.

    Args:
      source: folder of a training run, whose average is taken, or a stage folder.
      out: folder to write; appears whole or not at all.
      log: receives the lines.

    Raises:
      StageError, CheckpointError: nothing can be read. OutputError: `out` holds something else.
      ExportError: what was written draws something else.
    """
    folder = atomic.check_replaceable(out, "signature.json", "folder of an exported sampler")
    stage = export.read_source(source)
    program = make_program(stage)
    with atomic.folder(folder) as temporary:
        (temporary / "sampler.jaxexport").write_bytes(program.serialize())
        flat = weights.flatten(jax.tree.map(np.asarray, stage.params))
        weights.write_safetensors(temporary / "params.safetensors", flat)
        text = export.copy_encoder(stage.config.text, temporary)
        config = dataclasses.replace(stage.config, text=text)
        signature = describe(config, program)
        (temporary / "signature.json").write_text(json.dumps(signature, indent=1) + "\n")
        loader = pathlib.Path(stablehlo_loader.__file__).read_text()
        (temporary / "load.py").write_text(loader)
        (temporary / "card.md").write_text(_card(config, flat, folder.name, signature))

        inputs = check.random_inputs(stage.config)
        drawn = stablehlo_loader.Stage(temporary)(**inputs)
        check.compare(check.draw(stage, inputs), np.asarray(drawn), "StableHLO", log)
    log(f"{folder}: the sampler of {source}, {len(program.mlir_module_serialized):,} bytes")
    return stage.config


def make_program(stage: Stage) -> jax.export.Exported:
    """The sampler as (parameters by path, inputs by name) -> pictures in [-1, 1]."""
    config = stage.config

    def draw(params: dict[str, Any], inputs: dict[str, Any]) -> Any:
        seeds = jnp.broadcast_to(inputs["seed"], inputs["prompt_index"].shape)
        keys = stage_sampler.fold_image_keys(seeds, inputs["prompt_index"], inputs["sample_index"])
        keys = samplers.fold(keys, inputs["stage_index"])
        return stage_sampler.sample_stage(
            weights.unflatten(params),
            config,
            inputs["text_emb"],
            inputs["text_mask"],
            keys,
            inputs.get("lowres"),
        )

    shapes = {
        path: jax.ShapeDtypeStruct(np.shape(leaf), jnp.float32)
        for path, leaf in weights.flatten(stage.params).items()
    }
    (batch,) = jax.export.symbolic_shape(BATCH)
    inputs = {
        name: jax.ShapeDtypeStruct([batch if n == BATCH else n for n in shape], dtype)
        for name, (shape, dtype, _) in _inputs(config).items()
    }
    return jax.export.export(jax.jit(draw), platforms=PLATFORMS)(shapes, inputs)


def describe(config: Config, program: jax.export.Exported) -> dict[str, Any]:
    """What signature.json says."""
    size, text = config.data.image_size, config.text
    return {
        "stage": config.name,
        "inputs": {
            name: {"shape": shape, "dtype": dtype, "meaning": meaning}
            for name, (shape, dtype, meaning) in _inputs(config).items()
        },
        "output": {
            "shape": [BATCH, size, size, 3],
            "dtype": "float32",
            "meaning": "RGB pictures in [-1, 1]; level = round((x + 1) * 127.5)",
        },
        "params": "params.safetensors: float32 arrays, the program's first argument, by name",
        "sampling": dataclasses.asdict(config.sampling),
        "text_encoder": {
            "encoder": text.encoder,
            "path": text.path,
            "fingerprint": text.fingerprint,
            "max_len": text.max_len,
        },
        "platforms": list(program.platforms),
        "jax": jax.__version__,
        "calling_convention_version": program.calling_convention_version,
    }


def _inputs(config: Config) -> dict[str, tuple[list[int | str], str, str]]:
    """Shape, dtype and meaning of the sampler's inputs, by name."""
    length, low = config.data.max_text_len, config.data.lowres_size
    whole = "0 to 4294967295"
    inputs: dict[str, tuple[list[int | str], str, str]] = {
        "text_emb": (
            [BATCH, length, config.model.text_dim],
            "float32",
            "the text encoder's vectors, one per token, zero at padding",
        ),
        "text_mask": ([BATCH, length], "bool", "true at real tokens, at least one"),
        "seed": ([], "uint32", f"{whole}; with the next three, all that the noise depends on"),
        "prompt_index": ([BATCH], "uint32", f"{whole}; a prompt's place in its list"),
        "sample_index": ([BATCH], "uint32", f"{whole}; tells pictures of one prompt apart"),
        "stage_index": ([], "uint32", "place of the stage in the cascade, the base stage is 0"),
    }
    if low:
        meaning = "pictures of the stage before, RGB in [-1, 1]"
        inputs["lowres"] = ([BATCH, low, low, 3], "float32", meaning)
    return inputs


def _card(
    config: Config, params: Mapping[str, np.ndarray], folder: str, signature: Mapping[str, Any]
) -> str:
    rows = {
        "draws": model_card.size_line(config),
        "parameters": f"{sum(array.size for array in params.values()):,} (float32)",
        "draws with": model_card.sampling_line(config),
        "text encoder": config.text.path
        and f"{config.text.encoder} `{config.text.path}`, "
        f"fingerprint {config.text.fingerprint or 'unknown'}",
    }
    use = USE.format(
        platforms=", ".join(PLATFORMS),
        folder=folder,
        lowres=", lowres=smaller_pictures" if config.model.lowres else "",
        jax=signature["jax"],
        convention=signature["calling_convention_version"],
    )
    return f"# {config.name}\n\n{model_card.table(rows)}\n\n{use}"
